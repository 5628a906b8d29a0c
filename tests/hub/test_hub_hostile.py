"""Repos that lie: nothing is run, nothing lands outside the cache, nothing is believed before it is checked."""

import json
import pickle
import random
import time
import tracemalloc

import pytest
import torch
from hub_toys import IDS, float_bert
from server import Fault

from hub_mpq import HubMPQ
from hub_mpq.core.files import CONFIG, INDICATORS, PACKED
from hub_mpq.errors import HubMPQError, PackedFormat
from hub_mpq.hub.pull import pull, remote_manifest
from hub_mpq.pack import parse_manifest

pytestmark = pytest.mark.hub
NAME = "me/lies"


class Bomb:
    """What a pickle would do: leave a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def good(mpq, x, tmp_path):
    """{name: bytes} of a folder that is right."""
    mpq.train_indicators([x], steps=0)
    mpq.save_pretrained(tmp_path / "good")
    return {p.name: p.read_bytes() for p in (tmp_path / "good").iterdir()}


def everything(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def outside(hub, folder):
    return {p for p in everything(folder) if not p.startswith(("cache", "blobs"))}


def test_no_pickle_is_fetched_or_read(hub, good, net, tmp_path):
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    pickles = dict.fromkeys(("pytorch_model.bin", "random_states_0.pkl", "training_args.bin", "model.pt"), bomb)
    hub.store.make(NAME, files={**good, **pickles})
    HubMPQ.from_pretrained(NAME, module=net)
    pull(NAME, tmp_path / "copy")
    assert not hub.count("GET", ".bin")
    assert not hub.count("GET", ".p")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {CONFIG, PACKED, INDICATORS}
    hub.store.make("me/bare", files={CONFIG: good[CONFIG], **pickles})
    with pytest.raises(HubMPQError, match="config of a packed model"):
        HubMPQ.from_pretrained("me/bare", module=net)
    hub.store.make("me/pickle", files={**good, PACKED: bomb})  # a pickle under a good name
    with pytest.raises(PackedFormat):
        HubMPQ.from_pretrained("me/pickle", module=net)
    hub.store.make("me/pickle2", files={**good, INDICATORS: bomb})
    with pytest.warns(UserWarning, match="indicators are ignored"):
        assert HubMPQ.from_pretrained("me/pickle2", module=net).indicators is None
    assert not (tmp_path / "exploded").exists()


def test_names_that_leave_the_cache_are_never_asked_for(hub, good, net, tmp_path):
    hub.store.make(NAME, files=good)
    hub.extra_names += [
        "../../../evil.txt",
        "/etc/evil.txt",
        "..\\evil.txt",
        "a/../../../../evil.txt",
        "tokenizer.json/../x",
    ]
    before = outside(hub, tmp_path)
    HubMPQ.from_pretrained(NAME, module=net)
    assert not hub.count(path="evil")
    assert outside(hub, tmp_path) == before
    inside = (hub.cache / "models--me--lies").resolve()
    links = [p for p in inside.rglob("*") if p.is_symlink()]
    assert links
    assert all(p.resolve().is_relative_to(inside / "blobs") for p in links)


@pytest.mark.parametrize("name", [CONFIG, PACKED, INDICATORS])
def test_a_symlink_in_the_repo_is_a_file_that_holds_a_path(hub, good, net, tmp_path, name):
    hub.store.make(NAME, files={**good, name: b"../../../../../../../etc/passwd"})
    told = pytest.warns(UserWarning, match="are ignored") if name == INDICATORS else pytest.raises(HubMPQError)
    with told:
        HubMPQ.from_pretrained(NAME, module=net)


@pytest.mark.parametrize("commit", ["../../../../evil", "/tmp/evil", "main", "x" * 40])
def test_a_commit_that_is_none_is_refused(hub, good, net, tmp_path, commit):
    hub.store.make(NAME, files=good)
    hub.extra_headers["X-Repo-Commit"] = commit
    before = outside(hub, tmp_path)
    with pytest.raises((HubMPQError, ValueError)):
        HubMPQ.from_pretrained(NAME, module=net)
    assert outside(hub, tmp_path) == before


@pytest.mark.parametrize("claim", [10**12, 2**63, 2**24 + 8, 192])
def test_a_small_file_that_claims_much_is_refused_at_once(hub, good, net, claim):
    hub.store.make(NAME, files={**good, PACKED: claim.to_bytes(8, "little") + b"{" * 192})
    for use in (remote_manifest, pull, lambda name: HubMPQ.from_pretrained(name, module=net)):
        tracemalloc.start()
        with pytest.raises(PackedFormat):
            use(NAME)
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()


def test_another_format_version_is_named(hub, good, net):
    hub.store.make(NAME, files={**good, PACKED: good[PACKED].replace(b'"format_version":"1"', b'"format_version":"3"')})
    for use in (remote_manifest, lambda name: HubMPQ.from_pretrained(name, module=net)):
        with pytest.raises(PackedFormat, match="version 3"):
            use(NAME)


def test_every_flipped_bit_of_a_published_header_shows(hub, good):
    """One flip in each of 100 places, over the wire."""
    raw = good[PACKED]
    header = 8 + int.from_bytes(raw[:8], "little")
    repo = hub.store.make(NAME, files=good)
    for at in range(0, header, max(1, header // 100)):
        bad = bytearray(raw)
        bad[at] ^= 1 << (at % 8)
        files = {**repo.at("main").files, PACKED: hub.store.put(PACKED, bytes(bad))}
        repo.refs["main"] = repo.add(files)
        with pytest.raises(PackedFormat):
            remote_manifest(NAME)


def test_mutated_first_bytes_are_refused_within_their_own_memory(good):
    """What a range request may bring: 3,000 edits, cuts and false lengths, none of them read as a manifest."""
    raw, rng = good[PACKED], random.Random(5)
    first = raw[: 8 + int.from_bytes(raw[:8], "little")]
    tracemalloc.start()
    for _ in range(3000):
        bad = bytearray(first)
        for _ in range(rng.randint(1, 3)):
            at, what = rng.randrange(len(bad)), rng.randrange(4)
            if what == 0:
                bad[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                bad[:8] = rng.getrandbits(rng.choice([10, 20, 40, 64])).to_bytes(8, "little")
            elif what == 2:
                del bad[max(at, 1) :]
            else:
                bad[at : at + 8] = rng.randbytes(8)
        if bytes(bad) != first:
            with pytest.raises(PackedFormat):
                parse_manifest(bytes(bad), "published")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * len(first)


def test_answers_that_are_too_long_or_no_part_are_not_taken(hub, good):
    hub.store.make(NAME, files=good)
    hub.extra_headers |= {"X-Linked-Size": str(10**15)}
    assert remote_manifest(NAME)[0].base_model == "toy"  # the header is right, whatever size the server claims
    hub.extra_headers.clear()
    hub.faults.append(Fault("GET", PACKED, status=200))
    with pytest.raises(HubMPQError, match="does not support range requests"):
        remote_manifest(NAME)


@pytest.fixture
def bert(tmp_path):
    """(packed BERT, {name: bytes} of its folder)."""
    float_bert(tmp_path / "float")
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W4A8")
    mpq.save_pretrained(tmp_path / "packed")
    return mpq, {p.name: p.read_bytes() for p in (tmp_path / "packed").iterdir()}


@pytest.mark.parametrize("change", [{"vocab_size": 10**11}, {"intermediate_size": 10**12}, {"hidden_size": 10**6}])
def test_a_config_that_would_take_all_memory_is_refused(hub, bert, change):
    files = bert[1]
    config = json.dumps({**json.loads(files[CONFIG]), **change})
    hub.store.make(NAME, files={**files, CONFIG: config.encode()})
    began = time.process_time()
    with pytest.raises(PackedFormat, match="larger tensors than a file of"):
        HubMPQ.from_pretrained(NAME)
    assert time.process_time() - began < 30  # seconds of work, whatever else the machine does


def test_remote_code_is_not_run(hub, bert, tmp_path):
    mpq, files = bert
    tree = json.loads(files[CONFIG])
    code = f"open({str(tmp_path / 'exploded')!r}, 'w')".encode()
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    for kind in ("bert", "evil"):
        bad = json.dumps({**tree, "model_type": kind, "auto_map": auto, "custom_pipelines": {"x": {"impl": "evil.X"}}})
        hub.store.make(f"me/{kind}", files={**files, CONFIG: bad.encode(), "evil.py": code})
    assert torch.equal(HubMPQ.from_pretrained("me/bert")(IDS)[0], mpq(IDS)[0])
    with pytest.raises(HubMPQError):
        HubMPQ.from_pretrained("me/evil")
    assert not hub.count("GET", ".py")
    assert not (tmp_path / "exploded").exists()
