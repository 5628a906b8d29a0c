"""Push and pull over real HTTP: what goes up, what comes down, who may."""

import json

import pytest
import torch

from hub_mpq import HubMPQ
from hub_mpq.core.files import INDICATORS, PACKED
from hub_mpq.errors import HubMPQError, InvalidArgument, PackedFormat
from hub_mpq.hub.publish import FLOAT_COPY, publish
from hub_mpq.hub.pull import fetch, pull, remote_manifest

pytestmark = pytest.mark.hub
NAME = "me/toy"


@pytest.fixture
def saved(mpq, tmp_path):
    mpq.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_push_and_pull_give_the_same_model(hub, mpq, net, x, tmp_path):
    mpq.train_indicators([x], steps=0)
    done = mpq.push_to_hub(NAME, token="write-token")
    there = hub.store.content(NAME)
    assert {"config.json", PACKED, INDICATORS, "README.md", "policy.png"} <= set(there)
    assert FLOAT_COPY not in there, "a network of one's own has no plain loader to serve"
    assert PACKED not in json.dumps(json.loads(there["config.json"])), "config.json never names the packed file"
    assert hub.store.repos[NAME].refs["main"] == done.oid
    assert len(hub.store.repos[NAME].commits) == 2, "one commit after the first"
    again = HubMPQ.from_pretrained(NAME, module=net)
    assert torch.equal(again(x), mpq(x))
    assert (again.policy, again.indicators) == (mpq.policy, mpq.indicators)
    agents = {s.headers.get("user-agent") or s.headers.get("User-Agent", "") for s in hub.seen if "commit" in s.path}
    assert all(agent.startswith("hub-mpq/") for agent in agents)
    assert pull(NAME, tmp_path / "copy") == tmp_path / "copy"
    assert (tmp_path / "copy" / PACKED).read_bytes() == there[PACKED]
    assert not (tmp_path / "copy" / PACKED).is_symlink()
    with pytest.raises(InvalidArgument, match="already exists and is not empty"):
        pull(NAME, tmp_path / "copy")


def test_second_push_is_one_commit_and_unchanged_files_are_not_sent(hub, mpq, other, saved, net, x):
    first = publish(saved, NAME, token="write-token")
    other.push_to_hub(NAME, token="write-token")
    assert len(hub.store.repos[NAME].commits) == 3
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net)(x), other(x))
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net, revision=first.oid)(x), mpq(x))
    up = hub.bytes_up()
    again = other.push_to_hub(NAME, token="write-token")
    assert again.oid == hub.store.repos[NAME].refs["main"]
    assert len(hub.store.repos[NAME].commits) == 3, "nothing had changed"
    assert hub.bytes_up() - up < 20_000, "weights went up again"


def test_what_a_new_version_lacks_goes_with_the_old_one(hub, mpq, saved):
    mpq.push_to_hub(NAME, token="write-token", float_copy=True)
    assert FLOAT_COPY in hub.store.content(NAME)
    publish(saved, NAME, token="write-token")
    assert FLOAT_COPY not in hub.store.content(NAME), "weights of an older version would be loaded without a word"


def test_weights_of_others_are_never_mixed_with_ours(hub, saved):
    hub.store.make("me/bert", files={"pytorch_model.bin": b"weights", "README.md": b"mine"})
    hub.store.make("me/float", files={FLOAT_COPY: b"weights"})
    for name in ("me/bert", "me/float"):
        before = hub.store.content(name)
        with pytest.raises(HubMPQError, match="did not write"):
            publish(saved, name, token="write-token")
        assert hub.store.content(name) == before


def test_only_files_of_known_names_are_published_and_the_folder_stays(hub, saved):
    for name in ("random_states_0.pkl", "optimizer.bin", "notes.txt", "tokenizer.json"):
        (saved / name).write_text("{}")
    (saved / "README.md").write_text("---\nlicense: mit\n---\nmy own card\n")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    publish(saved, NAME, token="write-token")
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    there = hub.store.content(NAME)
    assert set(there) == {".gitattributes", "README.md", "config.json", PACKED, "policy.png", "tokenizer.json"}
    assert there["README.md"].endswith(b"my own card\n")


def test_nothing_is_sent_for_a_torn_folder_or_a_wrong_name(hub, saved, tmp_path):
    with pytest.raises(InvalidArgument, match="owner/name"):
        publish(saved, "toy", token="write-token")
    with pytest.raises(InvalidArgument, match="save_pretrained"):
        publish(tmp_path, NAME, token="write-token")
    with pytest.raises(InvalidArgument, match="needs the network"):
        publish(saved, NAME, token="write-token", float_copy=True)
    raw = bytearray((saved / PACKED).read_bytes())
    raw[-3] ^= 1
    (saved / PACKED).write_bytes(raw)
    with pytest.raises(PackedFormat):
        publish(saved, NAME, token="write-token")
    assert not hub.seen


def test_who_may_not_is_told_why(hub, mpq, saved, net, x):
    publish(saved, NAME, token="write-token", private=True)
    assert hub.store.repos[NAME].private
    for token in (False, "other-token"):
        with pytest.raises(HubMPQError, match="repo not found, or it is private"):
            HubMPQ.from_pretrained(NAME, module=net, token=token)
        with pytest.raises(HubMPQError, match="repo not found, or it is private"):
            remote_manifest(NAME, token=token)
    with pytest.raises(HubMPQError, match=r"40[13]"):
        HubMPQ.from_pretrained(NAME, module=net, token="no-token")
    with pytest.raises(HubMPQError, match="403"):
        publish(saved, NAME, token="read-token")
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net, token="read-token")(x), mpq(x))
    publish(saved, "me/open", token="write-token")
    with pytest.raises(HubMPQError, match="public"):
        publish(saved, "me/open", token="write-token", private=True)


def test_branches_and_pull_requests(hub, mpq, other, saved, net, x):
    publish(saved, NAME, token="write-token")
    main = hub.store.repos[NAME].refs["main"]
    other.push_to_hub(NAME, token="write-token", revision="w3")
    done = other.push_to_hub(NAME, token="other-token", create_pr=True)
    assert done.pr_url.endswith("/discussions/1")
    assert hub.store.repos[NAME].refs["main"] == main
    for revision in ("w3", "refs/pr/1"):
        assert torch.equal(HubMPQ.from_pretrained(NAME, module=net, revision=revision)(x), other(x))
    with pytest.raises(HubMPQError, match="revision not found"):
        HubMPQ.from_pretrained(NAME, module=net, revision="nowhere")
    with pytest.raises(HubMPQError, match="repo not found"):
        other.push_to_hub("me/nowhere", token="other-token", create_pr=True)


def test_only_config_and_packed_weights_come_down(hub, mpq, net):
    mpq.push_to_hub(NAME, token="write-token", float_copy=True)
    size = len(hub.store.content(NAME)[PACKED])
    down = hub.bytes_down()
    HubMPQ.from_pretrained(f"hf-hub:{NAME}", module=net)
    assert not hub.count("GET", FLOAT_COPY)
    assert not hub.count("GET", "README.md")
    assert hub.bytes_down() - down < size + 5000


def test_requests_of_warm_pinned_and_offline_loads(hub, saved, net, monkeypatch):
    from huggingface_hub import constants

    commit = publish(saved, NAME, token="write-token").oid
    HubMPQ.from_pretrained(NAME, module=net)
    seen = len(hub.seen)
    HubMPQ.from_pretrained(NAME, module=net)
    assert [s.method for s in hub.seen[seen:]] == ["HEAD"], "has the branch moved?"
    seen = len(hub.seen)
    HubMPQ.from_pretrained(NAME, module=net, revision=commit)
    HubMPQ.from_pretrained(NAME, module=net, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    HubMPQ.from_pretrained(NAME, module=net)
    with pytest.raises(HubMPQError, match="cache"):
        HubMPQ.from_pretrained("me/unknown", module=net, local_files_only=True)
    assert len(hub.seen) == seen


def test_inspect_reads_the_header_alone(hub, mpq, saved, monkeypatch):
    import hub_mpq.hub.pull as module

    publish(saved, NAME, token="write-token")
    raw = (saved / PACKED).read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    monkeypatch.setattr(module, "_FIRST", 512)
    down = hub.bytes_down()
    manifest, size = remote_manifest(NAME)
    assert (manifest.policy, size) == (mpq.policy, len(raw))
    assert hub.bytes_down() - down == header
    hub.store.make("me/empty")
    assert remote_manifest("me/empty") is None


def test_a_float_repo_and_an_unknown_one_are_left_to_their_libraries(hub):
    hub.store.make("me/float", files={"config.json": b'{"model_type": "bert"}'})
    assert fetch("me/float") is None
    assert fetch("me/float", revision="main") is None
    with pytest.raises(HubMPQError, match="holds no packed model"):
        pull("me/float")
    with pytest.raises(HubMPQError, match="repo not found"):
        HubMPQ.from_pretrained("me/unknown")


def test_commands(hub, mpq, saved, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from hub_mpq.cli import app

    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in args])

    refused = run("push", saved, NAME)
    assert refused.exit_code == 2
    assert "cannot publish me/" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "write-token")
    pushed = run("push", saved, NAME, "--private", "--license", "mit", "--json")
    assert json.loads(pushed.stdout)["commit"] == hub.store.repos[NAME].refs["main"]
    assert b"license: mit" in hub.store.content(NAME)["README.md"]
    seen = run("inspect", NAME, "--json")
    assert json.loads(seen.stdout)["policy"] == mpq.policy.to_dict()
    assert json.loads(seen.stdout)["usage"]["size"] == (saved / PACKED).stat().st_size
    assert json.loads(run("inspect", saved, "--json").stdout) == json.loads(seen.stdout)
    pulled = run("pull", NAME, "-o", tmp_path / "copy")
    assert pulled.stdout.strip() == str(tmp_path / "copy")
    assert (tmp_path / "copy" / PACKED).read_bytes() == (saved / PACKED).read_bytes()


def test_commands_load_the_revision_that_is_named(hub, tmp_path):
    from hub_toys import float_bert
    from typer.testing import CliRunner

    from hub_mpq.cli import app, models
    from hub_mpq.cli.options import ModelOptions

    files = float_bert(tmp_path / "float")
    repo = hub.store.make("me/float", files=files)
    first = repo.refs["main"]
    shallow = json.loads(files["config.json"]) | {"num_hidden_layers": 1}
    put = {"config.json": hub.store.put("config.json", json.dumps(shallow).encode())}
    repo.refs["main"] = repo.add(repo.at("main").files | put)

    def layers(*args):
        found = CliRunner().invoke(app, ["inspect", "me/float", "--json", *args])
        return len(json.loads(found.stdout)["layers"])

    whole = len(HubMPQ.from_pretrained("me/float", revision=first).graph.layers)
    assert layers("--revision", first) == whole > layers()
    assert len(models.load("me/float", ModelOptions(revision=first)).graph.layers) == whole
    refused = CliRunner().invoke(app, ["evaluate", "me/float", "--data", "x", "--revision", "nowhere"])
    assert refused.exit_code == 2
    assert "revision not found" in refused.stderr


def test_a_model_that_no_float_weights_make_is_published_packed_alone(hub):
    """Its convolutions standardise their weight: what was quantized would be standardised again."""
    small = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    mpq = HubMPQ.from_pretrained("vit_tiny_r_s16_p8_224", pretrained=False, input_size=(3, 32, 32), **small)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mpq.apply_policy("W5A8", [(x,)])
    with pytest.raises(HubMPQError, match="cannot publish a float copy: layer"):
        mpq.push_to_hub(NAME, token="write-token", float_copy=True)
    with pytest.warns(UserWarning, match="published without a float copy: layer"):
        mpq.push_to_hub(NAME, token="write-token")
    assert FLOAT_COPY not in hub.store.content(NAME)
    assert torch.equal(HubMPQ.from_pretrained(NAME)(x), mpq(x))
