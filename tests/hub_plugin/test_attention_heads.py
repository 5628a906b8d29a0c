"""Models of transformers whose attention reads weights without calling layers, through every way that a packed model
goes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hub_mpq import HubMPQ, MPQConfig
from hub_mpq.core.files import PACKED
from hub_mpq.core.library import libraries
from hub_mpq.errors import HubMPQError
from hub_mpq.export import exportable
from hub_mpq.export.float_copy import float_copy_state
from hub_mpq.nn.multihead_attention import SplitMultiheadAttention
from hub_mpq.nn.packing import predicted_nbytes

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 16, "projection_size": 32, "eos_token_id": 2}
WAVLM = {
    **{**SMALL, "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_buckets": 16, "max_bucket_distance": 20},
}


def build(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if kind == "siglip":
        model = t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=VISION))
    elif kind == "siglip_vision":
        model = t.SiglipVisionModel(t.SiglipVisionConfig(**VISION))
    else:
        model = t.WavLMModel(t.WavLMConfig(**WAVLM))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Packed(NamedTuple):
    kind: str
    float_folder: Path
    folder: Path
    mpq: HubMPQ
    size: int
    cls: Any

    @torch.no_grad()
    def outputs(self, model: Any = None) -> list[torch.Tensor]:
        out = (model or self.mpq)(**self.mpq.source.example)
        return [value for value in out.values() if isinstance(value, torch.Tensor)]


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def make(root: Path, kind: str, level: str = "W3A6", **options: Any) -> Packed:
    model = build(kind)
    model.save_pretrained(root / "float")
    mpq = HubMPQ.from_pretrained(root / "float", **({"sequence_length": 8} if kind == "siglip" else {}), **options)
    mpq.apply_policy(level)
    return Packed(kind, root / "float", root / "packed", mpq, mpq.save_pretrained(root / "packed"), type(model))


@pytest.fixture(scope="module", params=["siglip", "siglip_vision", "wavlm"])
def packed(request: Any, tmp_path_factory: Any) -> Packed:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def test_the_float_model_is_the_same(packed):
    model = packed.cls.from_pretrained(packed.float_folder).eval()
    torch.testing.assert_close(packed.outputs(packed.mpq.float_model), packed.outputs(model), atol=1e-6, rtol=1e-5)
    names = [{key for key in net.state_dict() if "atten" in key} for net in (packed.mpq.float_model, model)]
    assert names[0] == names[1]


def test_all_of_its_attention_is_quantized(packed):
    attention = [op for op in packed.mpq.graph.floats if op.weight_count and "atten" in op.name]
    assert not attention
    kinds = {layer.kind for layer in packed.mpq.graph if layer.name.rpartition(".")[2] in ("q_proj", "out_proj")}
    assert "projection" in kinds


def test_all_ways_of_loading_give_the_same(packed):
    wanted = packed.outputs()
    assert packed.size == (packed.folder / PACKED).stat().st_size
    assert predicted_nbytes(packed.mpq.float_model, packed.mpq._manifest(packed.mpq.policy)) == packed.size
    assert same(packed.outputs(HubMPQ.from_pretrained(packed.folder)), wanted)
    model, info = packed.cls.from_pretrained(packed.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same(packed.outputs(model), wanted)
    assert same(packed.outputs(copy.deepcopy(model)), wanted)
    for resident in ("packed", "float"):
        assert same(packed.outputs(HubMPQ.from_pretrained(packed.folder, resident=resident)), wanted)
    assert same(packed.outputs(pickle.loads(pickle.dumps(model))), wanted)  # noqa: S301


def test_saved_again_it_is_the_same_file(packed, tmp_path):
    packed.cls.from_pretrained(packed.folder).save_pretrained(tmp_path)
    assert (tmp_path / PACKED).read_bytes() == (packed.folder / PACKED).read_bytes()


def test_the_float_copy_has_transformers_names(packed, tmp_path):
    state = float_copy_state(packed.mpq.model, libraries.get("transformers"))
    float_file = packed.float_folder / "model.safetensors"
    assert state.keys() == load_file(float_file).keys()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((packed.float_folder / "config.json").read_bytes())
    plain, info = packed.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    found = packed.cls.from_pretrained(packed.folder).dequantize()
    assert not [module for module in found.modules() if isinstance(module, SplitMultiheadAttention)]
    torch.testing.assert_close(packed.outputs(found), packed.outputs(plain.eval()), atol=1e-6, rtol=1e-5)


def test_formats_that_transformers_alone_reads_are_refused(packed, tmp_path):
    manifest = packed.mpq._manifest(packed.mpq.policy)
    assert not exportable(manifest)
    with pytest.raises(HubMPQError, match=r"layers are .*projection.*exclude="):
        packed.mpq.export(tmp_path, "compressed-tensors")


def test_a_float_model_is_quantized_behind_its_loading(packed):
    batch = dict(packed.mpq.source.example)
    config = MPQConfig("W3A6", calibration=[batch])
    model = packed.cls.from_pretrained(packed.float_folder, quantization_config=config)
    assert packed.mpq.graph.names == model.hf_quantizer.manifest.graph.names
    model.train()
    sum(out.float().square().mean() for out in model(**batch).values() if isinstance(out, torch.Tensor)).backward()
    grads = {name for name, p in model.named_parameters() if p.grad is not None and "weight_quantizer" in name}
    assert any("q_proj" in name and ("head" in name or "attention" in name) for name in grads)


@pytest.mark.parametrize("exclude", ["*head.attention.*", "*head.attention.v_proj", "*head.attention.out_proj"])
def test_a_head_that_is_left_float_is_loaded_too(tmp_path, exclude):
    """Wholly float it has the names of torch's Parameters in the file, as files of before have."""
    packed = make(tmp_path, "siglip_vision", exclude=(exclude,))
    wanted = packed.outputs()
    assert same(packed.outputs(HubMPQ.from_pretrained(packed.folder)), wanted)
    model, info = packed.cls.from_pretrained(packed.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(packed.outputs(model), wanted, atol=1e-6, rtol=1e-5)
    assert any("in_proj_weight" in key for key in load_file(packed.folder / PACKED)) == exclude.endswith("*")
