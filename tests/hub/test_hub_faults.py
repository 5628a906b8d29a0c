"""A Hub that fails: afterwards the repo holds the old version or the new one whole, the local folder is intact."""

import pytest
import torch
from server import Fault

from hub_mpq import HubMPQ
from hub_mpq.core.files import INDICATORS, PACKED
from hub_mpq.errors import HubMPQError
from hub_mpq.hub.publish import publish
from hub_mpq.hub.pull import pull

pytestmark = [pytest.mark.hub, pytest.mark.usefixtures("no_waits")]
NAME = "me/toy"
ALWAYS = 10**6


@pytest.fixture
def versions(hub, mpq, other, tmp_path):
    """The old version is published; (content of the old, folder of the new, content the new will have)."""
    mpq.push_to_hub(NAME, token="write-token")
    old = hub.store.content(NAME)
    other.save_pretrained(tmp_path / "new")
    publish(tmp_path / "new", "me/twin", token="write-token")
    new = hub.store.content("me/twin")
    hub.seen.clear()
    for path in set(hub.store.repos["me/twin"].at("main").files) & {PACKED}:
        hub.store.blob(hub.store.repos["me/twin"].at("main").files[path].sha256).unlink()
    return (
        old,
        tmp_path / "new",
        {k: v.replace(b"me/twin", b"me/toy").replace(b"# twin", b"# toy") for k, v in new.items()},
    )


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


PASSING = {
    "503 when asked how to upload": Fault("POST", "preupload", status=503),
    "503 at the LFS batch": Fault("POST", "batch", times=2, status=503),
    "500 in the middle of the weights": Fault("PUT", "/lfs/", status=500),
    "connection cut in the middle of the weights": Fault("PUT", "/lfs/", cut=1000),
    "weights arrive, the answer is lost": Fault("PUT", "/lfs/", lost=True),
    "slow": Fault("POST", "", times=4, delay=0.25),
}
LASTING = {
    "503 without end": Fault("PUT", "/lfs/", times=ALWAYS, status=503),
    "cut without end": Fault("PUT", "/lfs/", times=ALWAYS, cut=1000),
    "500 at the commit": Fault("POST", "/commit/", status=500),
    "503 at the commit": Fault("POST", "/commit/", status=503),
    "commit cut off": Fault("POST", "/commit/", cut=100),
    "no head": Fault("GET", "/api/models/", times=ALWAYS, status=503),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(hub, versions, fault):
    _, folder, new = versions
    local = files_of(folder)
    hub.faults.append(Fault(**vars(fault)))
    publish(folder, NAME, token="write-token")
    assert hub.faults[0].times < fault.times, "the fault was never met"
    assert hub.store.content(NAME) == new
    assert files_of(folder) == local


@pytest.mark.parametrize("fault", LASTING.values(), ids=LASTING)
def test_what_lasts_leaves_the_old_version_whole(hub, versions, fault):
    old, folder, new = versions
    local = files_of(folder)
    hub.faults.append(Fault(**vars(fault)))
    with pytest.raises(HubMPQError, match="cannot publish me/"):
        publish(folder, NAME, token="write-token")
    assert hub.store.content(NAME) == old
    assert files_of(folder) == local
    hub.faults.clear()
    publish(folder, NAME, token="write-token")
    assert hub.store.content(NAME) == new


def test_a_commit_whose_answer_is_lost_is_whole_and_pushing_again_is_harmless(hub, versions):
    _, folder, new = versions
    hub.faults.append(Fault("POST", "/commit/", lost=True))
    with pytest.raises(HubMPQError, match="either unchanged or fully updated"):
        publish(folder, NAME, token="write-token")
    assert hub.store.content(NAME) == new
    head = hub.store.repos[NAME].refs["main"]
    assert publish(folder, NAME, token="write-token").oid == head


def somebody_commits(hub, name="notes.txt"):
    repo = hub.store.repos[NAME]
    files = dict(repo.at("main").files)
    repo.refs["main"] = repo.add(files | {name: hub.store.put(name, name.encode())})


def test_a_stale_parent_is_tried_once_on_the_new_head(hub, versions):
    _, folder, new = versions
    hub.faults.append(Fault("POST", "/commit/", before=lambda: somebody_commits(hub)))
    publish(folder, NAME, token="write-token")
    assert hub.store.content(NAME) == {**new, "notes.txt": b"notes.txt"}
    assert hub.count("POST", "/commit/") == 2
    assert hub.count("PUT") == 1, "the weights went up once"


def test_a_parent_stale_twice_is_reported(hub, versions):
    old, folder, _ = versions
    hub.faults.append(Fault("POST", "/commit/", times=ALWAYS, before=lambda: somebody_commits(hub)))
    with pytest.raises(HubMPQError, match="keeps changing while it is published"):
        publish(folder, NAME, token="write-token")
    assert hub.store.content(NAME) == {**old, "notes.txt": b"notes.txt"}
    assert hub.count("POST", "/commit/") == 2


@pytest.mark.parametrize("path", ["/tree/", f"/{PACKED}"])
def test_a_head_that_moves_during_a_pull_gives_one_version_whole(hub, versions, mpq, net, x, path):
    _, folder, new = versions
    hub.faults.append(Fault("GET", path, before=lambda: publish(folder, NAME, token="write-token")))
    pulled = HubMPQ.from_pretrained(NAME, module=net)
    assert torch.equal(pulled(x), mpq(x))
    assert pulled.policy == mpq.policy
    assert hub.store.content(NAME) == new
    assert HubMPQ.from_pretrained(NAME, module=net).policy != mpq.policy


def test_an_interrupted_download_goes_on_where_it_stopped(hub, versions, mpq, net, x, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    size = len(versions[0][PACKED])
    hub.faults += [Fault("GET", PACKED, cut=5000), Fault("GET", PACKED, cut=2000)]
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net)(x), mpq(x))
    parts = [s for s in hub.seen if s.method == "GET" and PACKED in s.path]
    assert [s.headers.get("range") or s.headers.get("Range") for s in parts] == [None, "bytes=5000-", "bytes=7000-"]
    assert sum(s.sent for s in parts) == size


def test_a_download_that_never_ends_leaves_a_clean_cache(hub, versions, mpq, net, x):
    hub.faults.append(Fault("GET", PACKED, times=ALWAYS, cut=100))
    with pytest.raises(HubMPQError, match="cannot download me/toy"):
        HubMPQ.from_pretrained(NAME, module=net)
    assert not list(hub.cache.rglob("*.incomplete"))
    assert not list(hub.cache.rglob(PACKED))
    hub.faults.clear()
    assert torch.equal(HubMPQ.from_pretrained(NAME, module=net)(x), mpq(x))


def test_a_file_that_a_model_runs_without_does_not_block_it_and_comes_with_the_next_load(hub, mpq, net, x):
    mpq.train_indicators([x], steps=0)
    mpq.push_to_hub("me/more", token="write-token")
    hub.faults.append(Fault("GET", INDICATORS, times=ALWAYS, cut=10))
    with pytest.warns(UserWarning, match="cannot download indicators.safetensors of me/more"):
        assert torch.equal(HubMPQ.from_pretrained("me/more", module=net)(x), mpq(x))
    hub.faults.clear()
    assert HubMPQ.from_pretrained("me/more", module=net).indicators == mpq.indicators


def test_pull_into_a_folder_is_whole_or_not_there(hub, versions, tmp_path):
    hub.faults.append(Fault("GET", PACKED, times=ALWAYS, cut=100))
    with pytest.raises(HubMPQError):
        pull(NAME, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    hub.faults.clear()
    pull(NAME, tmp_path / "copy")
    assert (tmp_path / "copy" / PACKED).read_bytes() == versions[0][PACKED]
