"""The kinds of layers that hub_mpq quantizes. To add one, add an entry here, a class in layers.py or convolutions.py,
and one in packed.py or packed_convolutions.py.

Types and classes are named instead of imported, so that looking up a kind loads neither torch, timm nor transformers.
"""

from __future__ import annotations

from ..core.layer_kind import LayerKind, register_layer_kind

_SCALED = {
    "bart": "Bart",
    "bigbird_pegasus": "BigBirdPegasus",
    "biogpt": "BioGpt",
    "blenderbot": "Blenderbot",
    "diffusion_gemma": "DiffusionGemmaText",
    "embedding_gemma2": "EmbeddingGemma2Text",
    "gemma": "GemmaText",
    "gemma2": "Gemma2Text",
    "gemma3": "Gemma3Text",
    "gemma3n": "Gemma3nText",
    "gemma4": "Gemma4Text",
    "gemma4_unified": "Gemma4UnifiedText",
    "m2m_100": "M2M100",
    "mbart": "MBart",
    "minicpm3": "MiniCPM3",
    "nllb_moe": "NllbMoe",
    "pegasus_x": "PegasusX",
    "plbart": "PLBart",
    "pp_formulanet": "PPFormulaNet",
    "seamless_m4t": "SeamlessM4T",
    "seamless_m4t_v2": "SeamlessM4Tv2",
    "trocr": "TrOCR",
    "vaultgemma": "VaultGemmaText",
    "xglm": "XGLM",
}
"""{transformers model type: prefix of the class of its embedding, whose rows are multiplied by `embed_scale`}."""

register_layer_kind(
    LayerKind(
        name="conv2d",
        channel_axis=0,
        row_axes=None,
        types=(
            "torch.nn.modules.conv.Conv2d",
            # pads its input to the "same" size, then convolves as nn.Conv2d does
            "timm.layers.conv2d_same.Conv2dSame",
            # own constructors, nn.Conv2d's forward
            "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d",
            "transformers.models.align.modeling_align.AlignVisionDepthwiseConv2d",
        ),
        quantized="hub_mpq.nn.convolutions:QuantConv2d",
        packed="hub_mpq.nn.packed_convolutions:PackedConv2d",
    )
)
for _axes in (1, 3):
    register_layer_kind(
        LayerKind(
            name=f"convolution{_axes}d",  # "conv1d" is GPT-2's linear layer
            channel_axis=0,
            row_axes=None,
            types=(f"torch.nn.modules.conv.Conv{_axes}d",),
            quantized=f"hub_mpq.nn.convolutions:QuantConv{_axes}d",
            packed=f"hub_mpq.nn.packed_convolutions:PackedConv{_axes}d",
        )
    )
for _axes in (1, 2, 3):
    register_layer_kind(
        LayerKind(
            name=f"conv_transpose{_axes}d",
            # [in, out/groups, …]: output channels at the same position in their groups share a scale
            channel_axis=1,
            row_axes=None,
            types=(f"torch.nn.modules.conv.ConvTranspose{_axes}d",),
            quantized=f"hub_mpq.nn.convolutions:QuantConvTranspose{_axes}d",
            packed=f"hub_mpq.nn.packed_convolutions:PackedConvTranspose{_axes}d",
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
        name="projection",  # a linear layer whose weight others read without calling it (see expose.py)
        channel_axis=0,
        row_axes=(0, 1),
        types=(
            "hub_mpq.nn.multihead_attention.Projection",
            # nn.Linear under another name: the output projection of nn.MultiheadAttention
            "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
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
        types=(
            "torch.nn.modules.sparse.Embedding",
            *(f"transformers.models.{m}.modeling_{m}.{cls}ScaledWordEmbedding" for m, cls in _SCALED.items()),
        ),
        quantized="hub_mpq.nn.layers:QuantEmbedding",
        packed="hub_mpq.nn.packed:PackedEmbedding",
        reads_indices=True,
    )
)
for _name, _rows, _type in (
    ("experts", (-2, -1), "ExpertStack"),
    ("experts_transposed", (-1, -2), "TransposedExpertStack"),  # gpt-oss: [experts, in, out]
):
    register_layer_kind(
        LayerKind(
            name=_name,
            channel_axis=_rows[0],
            row_axes=_rows,
            types=(f"hub_mpq.nn.experts.{_type}",),
            quantized="hub_mpq.nn.experts:QuantExperts",
            packed="hub_mpq.nn.experts:PackedExperts",
            weight_only=True,
        )
    )
