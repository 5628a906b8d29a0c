"""Damaged caches, broken optional files, one commit, and servers that lie or fail."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from hub_toys import IDS, float_bert
from server import Fault

from hub_mpq import HubMPQ
from hub_mpq.core.files import CONFIG, INDICATORS, PACKED
from hub_mpq.errors import HubMPQError, PackedFormat
from hub_mpq.hub.publish import publish
from hub_mpq.hub.pull import pull, remote_manifest

pytestmark = [pytest.mark.hub, pytest.mark.usefixtures("no_waits")]
NAME = "me/toy"
ALWAYS = 10**6


@pytest.fixture
def published(hub, mpq, x, tmp_path):
    """The folder in the cache of a published model with indicators, loaded once."""
    mpq.train_indicators([x], steps=0)
    mpq.save_pretrained(tmp_path / "saved")
    hub.store.make(NAME, files={p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()})
    return pull(NAME)


def flip(file, at=-100):
    blob = file.resolve()
    raw = bytearray(blob.read_bytes())
    raw[at] ^= 1
    blob.write_bytes(raw)


def halve(file):
    os.truncate(file.resolve(), file.stat().st_size // 2)


def empty(file):
    os.truncate(file.resolve(), 0)


@pytest.mark.parametrize("damage", [flip, halve, empty])
@pytest.mark.parametrize("name", [PACKED, CONFIG, INDICATORS])
def test_a_damaged_file_of_the_cache_is_fetched_anew(hub, published, mpq, net, x, damage, name):
    damage(published / name)
    again = HubMPQ.from_pretrained(NAME, module=net)
    assert torch.equal(again(x), mpq(x))
    assert again.indicators == mpq.indicators
    damage(published / name)
    assert pull(NAME) == published
    seen = len(hub.seen)
    HubMPQ.from_pretrained(NAME, module=net)
    assert len(hub.seen) == seen + 1, "what is whole is not fetched again"


def test_without_network_a_damaged_file_is_told_with_the_way(hub, published, net, monkeypatch):
    from huggingface_hub import constants

    flip(published / PACKED)
    with pytest.raises(HubMPQError, match="has changed since it was downloaded; load it online"):
        HubMPQ.from_pretrained(NAME, module=net, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubMPQError, match="has changed since it was downloaded; load it online"):
        HubMPQ.from_pretrained(NAME, module=net)
    flip(published / CONFIG)
    with pytest.raises(HubMPQError, match="has changed since it was downloaded"):
        pull(NAME)


def test_a_file_that_was_published_broken_is_fetched_once(hub, published, net):
    files = {**hub.store.content(NAME)}
    hub.store.make("me/broken", files={**files, PACKED: files[PACKED][:-1] + b"x"})
    for _ in range(2):
        with pytest.raises(PackedFormat):
            HubMPQ.from_pretrained("me/broken", module=net)
    assert hub.count("GET", f"me/broken/resolve/{hub.store.repos['me/broken'].refs['main']}/{PACKED}") == 1


def test_transformers_heals_a_damaged_file_too(hub, tmp_path, monkeypatch):
    import transformers

    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "bert")
    hub.store.make("me/bert", files={p.name: p.read_bytes() for p in (tmp_path / "bert").iterdir()})
    flip(pull("me/bert") / PACKED)
    assert torch.equal(transformers.AutoModel.from_pretrained("me/bert")(IDS)[0], mpq(IDS)[0])


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (INDICATORS, Fault("GET", INDICATORS, times=ALWAYS, status=500)),
        (INDICATORS, Fault("HEAD", INDICATORS, times=ALWAYS, status=403)),
        (INDICATORS, Fault("GET", INDICATORS, times=ALWAYS, answer=(200, {}, b"<html>"))),
        ("tokenizer.json", Fault("GET", "tokenizer.json", times=ALWAYS, answer=(200, {}, None))),
    ],
)
def test_a_file_that_a_model_runs_without_never_blocks_it(hub, published, mpq, net, x, name, fault):
    hub.store.make("me/more", files={**hub.store.content(NAME), "tokenizer.json": b"{}"})
    hub.faults.append(fault)
    with pytest.warns(UserWarning, match=f"cannot download {name} of me/more"):
        assert torch.equal(HubMPQ.from_pretrained("me/more", module=net)(x), mpq(x))


def test_a_folder_without_or_with_broken_indicators_loads(published, net, mpq, x, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    for content in (b"", b"x" * 100, (published / INDICATORS).read_bytes()[:-1]):
        (tmp_path / "copy" / INDICATORS).write_bytes(content)
        with pytest.warns(UserWarning, match="are ignored"):
            assert torch.equal(HubMPQ.from_pretrained(tmp_path / "copy", module=net)(x), mpq(x))
    (tmp_path / "copy" / INDICATORS).unlink()
    assert HubMPQ.from_pretrained(tmp_path / "copy", module=net).indicators is None


@pytest.fixture
def moves(hub, published, other, tmp_path):
    """Publishes another version of NAME when called; the cache is empty again."""
    other.save_pretrained(tmp_path / "other")
    shutil.rmtree(hub.cache)
    return lambda: publish(tmp_path / "other", NAME, token="write-token")


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("path", [CONFIG, PACKED])
def test_config_and_weights_are_of_one_commit_when_the_branch_moves(hub, moves, net, method, path):
    old = json.loads(hub.store.content(NAME)[CONFIG])["quantization_config"]
    first = Fault(method, path)
    first.before = lambda: (setattr(first, "times", 0), moves())
    hub.faults.append(first)
    folder = pull(NAME)
    found = json.loads((folder / CONFIG).read_text())["quantization_config"]["policy"]
    assert HubMPQ.from_pretrained(folder, module=net).policy.to_dict() == found
    assert {p.resolve().parent for p in folder.iterdir()} == {folder.parents[1] / "blobs"}
    commit = hub.store.repos[NAME].at(folder.name)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: hub.store.blob(commit.files[name].sha256).read_bytes() for name in (p.name for p in folder.iterdir())
    }
    assert (found == old["policy"]) == (folder.name != hub.store.repos[NAME].refs["main"])


def test_without_network_the_branch_is_the_last_whole_commit(hub, moves, net, mpq, x):
    whole = pull(NAME)
    moves()
    hub.faults.append(Fault("GET", PACKED, times=ALWAYS, status=500))
    with pytest.raises(HubMPQError, match="cannot download me/toy"):
        pull(NAME)
    assert pull(NAME, local_files_only=True) == whole
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net, local_files_only=True)(x), mpq(x))


def everything(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize(
    "value", ["../../../../evil", "/tmp/evil", '"../evil"', 'W/"/../evil"', "..", "a/b", "e" * 300]
)
def test_headers_lead_to_no_path_outside_the_cache(hub, published, net, tmp_path, name, value):
    from huggingface_hub import close_session

    shutil.rmtree(hub.cache)
    before = everything(tmp_path)
    for close in (lambda: None, close_session):  # a client that was made anew is checked as the first one was
        close()
        hub.extra_headers[name] = value
        for use in (pull, remote_manifest, lambda repo: HubMPQ.from_pretrained(repo, module=net)):
            with pytest.raises(HubMPQError, match=r"header .* is not valid"):
                use(NAME)
        hub.extra_headers.clear()
    hub.store.make("me/none")
    hub.extra_headers[name] = value
    with pytest.raises(HubMPQError):
        pull("me/none")
    found = everything(tmp_path) - before
    assert not [p for p in found if not p.startswith(("cache", "blobs"))]
    assert not [p for p in found if "evil" in p]


def test_a_client_that_is_made_anew_in_the_middle_is_checked(hub, published):
    from huggingface_hub import close_session

    shutil.rmtree(hub.cache)
    hub.extra_headers["ETag"] = "../../evil"
    hub.faults.append(Fault("HEAD", CONFIG, lost=True, before=close_session))
    with pytest.raises(HubMPQError, match=r"header .* is not valid"):
        pull(NAME)


LIARS = {
    "config without end": Fault("GET", CONFIG, times=ALWAYS, answer=(200, {}, None)),
    "weights without end": Fault("GET", PACKED, times=ALWAYS, answer=(200, {}, None)),
    "weights larger than announced": Fault("GET", PACKED, times=ALWAYS, answer=(200, {}, bytes(1 << 20))),
    "file names without end": Fault("GET", "/tree/", times=ALWAYS, answer=(200, {}, None)),
    "a compressed config": Fault("GET", CONFIG, times=ALWAYS, answer=(200, {"Content-Encoding": "gzip"}, b"x")),
    "weights of a petabyte": Fault("HEAD", PACKED, times=ALWAYS, answer=(200, {"X-Linked-Size": str(10**15)}, b"")),
    "ask again in a year": Fault("GET", CONFIG, times=ALWAYS, answer=(429, {"Retry-After": "31536000"}, b"")),
}


@pytest.mark.parametrize("fault", LIARS.values(), ids=LIARS)
def test_what_a_server_sends_is_bounded(hub, published, tmp_path, fault):
    shutil.rmtree(hub.cache)
    headers = {"X-Repo-Commit": hub.store.repos[NAME].refs["main"], "ETag": "e" * 40}
    status, more, body = fault.answer
    hub.faults.append(Fault(fault.method, fault.path, fault.times, answer=(status, {**headers, **more}, body)))
    with pytest.raises(HubMPQError, match=r"cannot download .*: .*(bytes|compressed|asks to wait)"):
        pull(NAME)
    assert hub.bytes_down() < 200e6, "a gigabyte was on offer"
    assert sum(p.stat().st_size for p in hub.cache.rglob("*") if p.is_file()) < 100_000


def test_the_header_of_a_remote_file_is_bounded(hub, published):
    hub.faults.append(Fault("GET", PACKED, times=ALWAYS, answer=(206, {}, None)))
    with pytest.raises(HubMPQError, match="more than"):
        remote_manifest(NAME)


FAULTS = {
    **{str(status): Fault("", "", times=ALWAYS, status=status) for status in (400, 401, 403, 404, 408, 410, 429, 500)},
    "connection reset": Fault("", "", times=ALWAYS, cut=0, lost=True),
    "HTML": Fault("", "", times=ALWAYS, answer=(200, {"Content-Type": "text/html"}, b"<html>log in</html>")),
    "JSON of another form": Fault("", "", times=ALWAYS, answer=(200, {}, b'[{"x": 1}, 5]')),
    "redirect loop": Fault("", "", times=ALWAYS, answer=(302, {"Location": "/me/toy/resolve/main/config.json"}, b"")),
    "redirect to nowhere": Fault("", "", times=ALWAYS, answer=(302, {"Location": "file:///etc/passwd"}, b"")),
    "no commit": Fault("", "", times=ALWAYS, answer=(200, {"ETag": "a"}, b"{}")),
}


def what_is_said(use):
    """The message of an error of ours; "" where there is none."""
    try:
        use()
    except HubMPQError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", ["", "/tree/", PACKED, "/commit/"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_hub_is_one_sentence(hub, published, net, tmp_path, fault, path):
    """In every method, at every place: the error is ours, of one line, and the next try works."""
    shutil.rmtree(hub.cache)
    loads = {"", "/tree/", PACKED} - ({PACKED, "/tree/"} if fault.answer else set())  # some will do there
    uses = {
        "pull": (lambda: pull(NAME, tmp_path / "copy"), path in loads),
        "from_pretrained": (lambda: HubMPQ.from_pretrained(NAME, module=net), path in loads),
        "push": (lambda: publish(tmp_path / "saved", NAME, token="write-token"), path in ("", "/commit/")),
    }
    for use, surely in uses.values():
        hub.faults[:] = [
            Fault(method, path, times=ALWAYS, status=fault.status, lost=fault.lost, cut=fault.cut, answer=fault.answer)
            for method in ("GET", "HEAD", "POST", "PUT")
        ]
        said = what_is_said(use)
        assert said or not surely
        assert "\n" not in said
        assert len(said) < 600
        assert not list(tmp_path.glob(".copy*"))
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    hub.faults.clear()
    pull(NAME, tmp_path / "copy")


def test_a_disk_that_is_full_or_cannot_be_written(hub, published, tmp_path, monkeypatch):
    from huggingface_hub import constants

    shutil.rmtree(hub.cache)
    monkeypatch.setattr("hub_mpq.hub.cached.shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(HubMPQError, match="only 100 are free"):
        pull(NAME)
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(HubMPQError, match="cannot download me/toy"):
        pull(NAME)


@pytest.mark.parametrize("name", [CONFIG, PACKED, INDICATORS, "README.md", "tokenizer.json"])
def test_links_are_not_followed_when_a_folder_is_published(hub, published, mpq, tmp_path, name):
    folder = tmp_path / "saved"
    secret = tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("secret")
    (folder / name).symlink_to(secret)
    seen = len(hub.seen)
    with pytest.raises(HubMPQError, match=f"{name} is a symbolic link"):
        publish(folder, "me/links", token="write-token")
    assert len(hub.seen) == seen
    assert "me/links" not in hub.store.repos


def test_a_folder_of_the_cache_is_published_though_the_client_links_its_files(hub, published, mpq):
    publish(published, "me/again", token="write-token")
    assert hub.store.content("me/again")[PACKED] == hub.store.content(NAME)[PACKED]


def test_links_in_the_folder_of_a_model_are_not_copied_with_it(hub, tmp_path):
    float_bert(tmp_path / "float")
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\nsecret\n")
    for name in ("tokenizer.json", "README.md"):
        (tmp_path / "float" / name).unlink()
        (tmp_path / "float" / name).symlink_to(tmp_path / "secret")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    with pytest.warns(UserWarning, match="is a symbolic link"):
        mpq.push_to_hub("me/bert", token="write-token", float_copy=False)
    assert not [name for name, content in hub.store.content("me/bert").items() if b"secret" in content]


def test_transformers_takes_config_and_weights_of_one_commit(hub, tmp_path):
    """It asks once which commit the branch is at; what the plug-in does in between must not undo that."""
    import transformers

    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "bert")
    HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W3A8").save_pretrained(tmp_path / "next")
    old, new = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("bert", "next"))
    repo = hub.store.make("me/bert", files=old)

    def moves():
        repo.refs["main"] = repo.add({name: hub.store.put(name, content) for name, content in new.items()})

    hub.faults.append(Fault("HEAD", PACKED, before=moves))
    assert torch.equal(transformers.AutoModel.from_pretrained("me/bert")(IDS)[0], mpq(IDS)[0])
    assert hub.faults[0].times == 0


def test_an_interrupted_save_is_finished_by_whoever_loads(tmp_path):
    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "bert")

    def interrupt():
        whole = tmp_path / "bert" / ".0123456789abcdef.hub-mpq-whole"
        whole.mkdir()
        (tmp_path / "bert" / PACKED).rename(whole / PACKED)

    interrupt()
    assert torch.equal(HubMPQ.from_pretrained(tmp_path / "bert")(IDS)[0], mpq(IDS)[0])
