"""A config.json that describes another network than its packed file holds, loaded through transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from hub_mpq import HubMPQ
from hub_mpq.core.files import CONFIG
from hub_mpq.errors import HubMPQError, PackedFormat, PolicyMismatch


def changed(packed, folder, **change):
    shutil.copytree(packed.folder, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    return folder


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"vocab_size": 5 * 10**7}, PackedFormat),
        ({"max_position_embeddings": 10**9}, PackedFormat),
        ({"intermediate_size": 10**12}, PackedFormat),
        ({"num_hidden_layers": 50_000}, PackedFormat),
        ({"num_hidden_layers": 0}, PolicyMismatch),
        ({"max_position_embeddings": 20}, PolicyMismatch),
        ({"type_vocab_size": 3}, HubMPQError),
        ({"hidden_act": "os.system"}, HubMPQError),
    ],
)
def test_it_is_refused_before_the_model_is_built(bert, tmp_path, monkeypatch, change, error):
    folder = changed(bert, tmp_path / "it", **change)
    monkeypatch.setattr(transformers.BertForMaskedLM, "_from_config", _built)  # of the skeleton that is checked
    with pytest.raises(error):
        transformers.AutoModelForMaskedLM.from_pretrained(folder)
    with pytest.raises(error):
        HubMPQ.from_pretrained(folder, resident="packed")


_from_config = transformers.BertForMaskedLM._from_config


def _built(config, **kwargs):
    assert torch.empty(1).is_meta, "memory is taken"
    return _from_config(config, **kwargs)


def test_a_number_of_things_is_refused_before_a_list_of_them_is_made(bert, tmp_path):
    folder = changed(bert, tmp_path / "it", num_labels=10**9)
    with pytest.raises(PackedFormat, match="num_labels is 1000000000"):
        HubMPQ.from_pretrained(folder, resident="packed")


def test_other_heads_and_arguments_are_loaded_as_before(bert):
    transformers.AutoModel.from_pretrained(bert.folder)
    transformers.AutoModelForSequenceClassification.from_pretrained(bert.folder, num_labels=7)
