"""A model that AutoModel loaded packed pushes the same bytes, in one commit, with a fresh float copy."""

import json

import pytest
import torch
import transformers
from hub_toys import IDS, float_bert
from huggingface_hub import HfApi

from hub_mpq import HubMPQ, MPQConfig
from hub_mpq.core.files import PACKED
from hub_mpq.hub.publish import FLOAT_COPY

pytestmark = pytest.mark.hub


def test_pull_with_automodel_push_with_its_own_method(hub, tmp_path):
    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    mpq.push_to_hub("me/first", token="write-token", float_copy=False)
    model = transformers.AutoModel.from_pretrained("me/first")
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], mpq(IDS)[0])
    other = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W3A8")
    other.push_to_hub("me/second", token="write-token")
    old = hub.store.content("me/second")
    model.push_to_hub("me/second", token="write-token", commit_message="from AutoModel", max_shard_size="1MB")
    new = hub.store.content("me/second")
    assert new[PACKED] == hub.store.content("me/first")[PACKED] != old[PACKED]
    assert new[FLOAT_COPY] != old[FLOAT_COPY], "no stale float copy stays"
    hub.seen.clear()
    again = transformers.AutoModel.from_pretrained("me/second")
    assert not hub.count("GET", FLOAT_COPY), "the copy is not fetched"
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], mpq(IDS)[0])
    model.save_pretrained(tmp_path / "third", push_to_hub=True, repo_id="me/third", token="write-token")
    assert hub.store.content("me/third")[PACKED] == new[PACKED]


def test_indicators_are_there_also_when_automodel_fetched_the_commit_first(hub, tmp_path):
    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    bare = mpq.push_to_hub("me/bare", token="write-token").oid
    mpq.train_indicators([{"input_ids": IDS}], steps=0)
    full = mpq.push_to_hub("me/full", token="write-token").oid
    for name, commit in (("me/bare", bare), ("me/full", full)):
        transformers.AutoModel.from_pretrained(name, revision=commit)
        found = HubMPQ.from_pretrained(name, revision=commit)
        assert found.indicators == (mpq.indicators if name == "me/full" else None)
        assert (found.home / "tokenizer.json").is_file()
        hub.seen.clear()
        HubMPQ.from_pretrained(name, revision=commit)
        assert not hub.seen, "pinned and in the cache: no request"


def test_a_float_repo_that_is_quantized_while_it_is_loaded_keeps_its_commit(hub, tmp_path):
    float_bert(tmp_path / "float")
    hub.store.make("me/float", files={p.name: p.read_bytes() for p in (tmp_path / "float").iterdir()})
    calibration = [{"input_ids": IDS}]
    model = transformers.AutoModel.from_pretrained(
        "me/float", quantization_config=MPQConfig("W4A8", calibration=calibration)
    )
    commit = HfApi().model_info("me/float").sha
    assert model.hf_quantizer.manifest.revision == commit
    assert HubMPQ.from_pretrained("me/float").graph.revision == commit


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_that_are_decisions_of_their_own_are_pushed_and_pulled(hub, tmp_path, kind):
    """Also the float copy, whose experts stand as transformers reads them."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(num_hidden_layers=1, num_experts_per_tok=2, **sizes)
    config.update({"intermediate_size": 48, "moe_intermediate_size": 48, "num_local_experts": 4, "num_experts": 4})
    cls = getattr(transformers, f"{kind}ForCausalLM")
    cls(config).save_pretrained(tmp_path / "float")
    ids = torch.arange(12)[None]
    mpq = HubMPQ.from_pretrained(tmp_path / "float", weight_only=True, per_expert=True)
    mpq.quantize(weight_bits=3.0, train=[{"input_ids": ids}], epochs=0, candidates=(2, 4), validate=False)
    repo = f"me/experts-{kind.lower()}"  # caches know a repository by its name
    mpq.push_to_hub(repo, token="write-token")
    with torch.no_grad():
        wanted = mpq(input_ids=ids).logits
        assert torch.equal(HubMPQ.from_pretrained(repo)(input_ids=ids).logits, wanted)
        assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(repo)(ids).logits, wanted)
        (tmp_path / "plain").mkdir()
        for name in ("config.json", FLOAT_COPY):
            (tmp_path / "plain" / name).write_bytes(hub.store.content(repo)[name])
        plain = json.loads((tmp_path / "plain" / "config.json").read_text())
        plain.pop("quantization_config")
        (tmp_path / "plain" / "config.json").write_text(json.dumps(plain))
        torch.testing.assert_close(cls.from_pretrained(tmp_path / "plain")(ids).logits, wanted, rtol=1e-4, atol=1e-5)
