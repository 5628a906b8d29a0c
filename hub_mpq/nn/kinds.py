"""The kinds of layers that hub_mpq quantizes. To add one: an entry here, a class in layers.py, a class in packed.py.

Types and classes are named, not imported: neither torch nor timm nor transformers is loaded to look a kind up.
"""

from __future__ import annotations

from ..core.layer_kind import LayerKind, register_layer_kind

register_layer_kind(
    LayerKind(
        name="conv2d",
        channel_axis=0,
        row_axes=None,
        types=(
            "torch.nn.modules.conv.Conv2d",
            # pads its input to the "same" size, then convolves as nn.Conv2d does
            "timm.layers.conv2d_same.Conv2dSame",
            # constructors of their own, nn.Conv2d's forward
            "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d",
            "transformers.models.align.modeling_align.AlignVisionDepthwiseConv2d",
        ),
        quantized="hub_mpq.nn.layers:QuantConv2d",
        packed="hub_mpq.nn.packed:PackedConv2d",
    )
)
register_layer_kind(
    LayerKind(
        name="linear",
        channel_axis=0,
        row_axes=(0, 1),
        types=(
            "torch.nn.modules.linear.Linear",
            # differs from nn.Linear under torch.jit only
            "timm.layers.linear.Linear",
            # input @ weight.T + bias, written out
            "transformers.models.falcon.modeling_falcon.FalconLinear",
        ),
        quantized="hub_mpq.nn.layers:QuantLinear",
        packed="hub_mpq.nn.packed:PackedLinear",
        shares_input=True,
    )
)
register_layer_kind(
    LayerKind(
        name="conv1d",  # GPT-2's name for a linear layer whose weight is [in, out]
        channel_axis=1,
        row_axes=(1, 0),
        types=("transformers.pytorch_utils.Conv1D",),
        quantized="hub_mpq.nn.layers:QuantConv1D",
        packed="hub_mpq.nn.packed_conv1d:PackedConv1D",
        shares_input=True,
    )
)
register_layer_kind(
    LayerKind(
        name="embedding",
        channel_axis=0,
        row_axes=(0, 1),
        types=("torch.nn.modules.sparse.Embedding",),
        quantized="hub_mpq.nn.layers:QuantEmbedding",
        packed="hub_mpq.nn.packed:PackedEmbedding",
        reads_indices=True,
    )
)
