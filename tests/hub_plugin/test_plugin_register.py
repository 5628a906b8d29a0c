"""import hub_mpq is light, and transformers knows "mpq" in either order of imports."""

from __future__ import annotations

import importlib
import sys

import pytest
from plugin_toys import python

CHECK = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
assert type(model.embeddings.word_embeddings).__name__ == "PackedEmbedding", type(model.embeddings.word_embeddings)
print("packed")
"""


def test_hub_mpq_first_is_light_and_waits_for_transformers(bert):
    script = """
import sys
import hub_mpq
heavy = {"torch", "transformers", "timm", "numpy", "pyscipopt", "accelerate"} & set(sys.modules)
assert not heavy, heavy
waiting = [f for f in sys.meta_path if type(f).__name__ == "_AfterImport"]
assert len(waiting) == 1
import transformers.quantizers.auto as auto
assert "mpq" in auto.AUTO_QUANTIZER_MAPPING and "mpq" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert waiting[0] not in sys.meta_path, "the finder stayed"
"""
    assert "packed" in python(script + CHECK, bert.folder)


def test_transformers_first():
    script = """
import sys
import transformers.quantizers.auto as auto
assert "mpq" not in auto.AUTO_QUANTIZER_MAPPING
import hub_mpq
assert "mpq" in auto.AUTO_QUANTIZER_MAPPING
from hub_mpq.hub.register import install
assert not [f for f in sys.meta_path if type(f).__name__ == "_AfterImport"]
print("known")
"""
    assert "known" in python(script)


def test_the_config_class_may_be_the_first_thing_imported():
    assert "ok" in python(
        """
import warnings
warnings.simplefilter("error", UserWarning)
from hub_mpq import MPQConfig
import transformers.quantizers.auto as auto
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["mpq"] is MPQConfig
print("ok")
"""
    )


def test_registering_twice_does_nothing():
    import transformers.quantizers.auto as auto

    from hub_mpq.hub import plugin
    from hub_mpq.hub.register import install

    before = auto.AUTO_QUANTIZER_MAPPING["mpq"]
    plugin.register()
    install()
    importlib.reload(sys.modules["hub_mpq"])
    assert auto.AUTO_QUANTIZER_MAPPING["mpq"] is before
    with pytest.raises(ValueError, match="already registered"):
        auto.register_quantizer("mpq")(before)  # what the guard guards against
