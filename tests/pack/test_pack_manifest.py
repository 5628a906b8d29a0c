"""What a manifest may say of shared weights and of where the model comes from, and what reading one costs."""

import json
import time

import pytest
from forge import seal, split

from hub_mpq.core.task import tasks
from hub_mpq.errors import InvalidArgument, PackedFormat
from hub_mpq.pack import read_indicators, read_manifest, read_packed, read_shapes, write_indicators
from hub_mpq.pack.canonical import MAX_DEPTH, dump_json, load_json
from hub_mpq.pack.provenance import check_provenance


def changed(path, change):
    """The file with another manifest and right digests."""
    header, payload = split(path.read_bytes())
    tree = json.loads(header["__metadata__"]["manifest"])
    change(tree)
    header["__metadata__"]["manifest"] = dump_json(tree)
    path.write_bytes(seal(header, payload))


def cells(**given):
    """A change of one layer's cells, of layers by the columns `layer__column`."""

    def change(tree):
        columns = tree["layers"]["columns"]
        for key, value in given.items():
            layer, _, column = key.partition("__")
            row = next(row for row in tree["layers"]["rows"] if row[0] == layer)
            row[columns.index(column)] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (cells(emb__weight_owner="nowhere"), "weight_owner 'nowhere' must be a layer with its own weight"),
        (cells(emb__weight_owner="emb"), "weight_owner 'emb' must be a layer with its own weight"),
        (cells(emb__weight_owner="stem", stem__weight_owner="emb"), "must be a layer with its own weight"),
        (cells(emb__weight_owner="stem"), "'emb' cannot share the weight of 'stem'"),
    ],
)
def test_a_shared_weight_is_another_layers_own(packed, change, match):
    path = packed[0]
    changed(path, change)
    for read in (read_packed, read_shapes, read_manifest):
        with pytest.raises(PackedFormat, match=match):
            read(path)


METRICS = "provenance: metrics must be an object of figures"
RUNTIME = {
    **dict.fromkeys(("exact", "integer layers", "float layers"), 1),
    **dict.fromkeys(("largest error", "codes one step off", "values wrong"), 0.5),
    "machine": "x",
    "metrics": {"runtime": {"top1": 1.0}, "reference": {"top1": 1.0}},
}
LATENCY = {
    **dict.fromkeys(("measured", "spread", "limit", "predicted", "batch_size", "threads"), 1),
    "runtime": "x",
    "machine": "x",
}


@pytest.mark.parametrize(
    ("provenance", "match"),
    [
        *(({"metrics": value}, METRICS) for value in (5, [1], "x", None, {"float": 5}, {"float": [1, 2]})),
        *(({"metrics": {"float": {"top1": value}}}, METRICS) for value in (None, [1], {"a": 1}, 10**400)),
        ({"metrics": {"float": {"task": 5}}}, METRICS),
        ({"metrics": {"float": {"samples": "x"}}}, METRICS),
        *(
            ({key: value}, f"provenance: {key} must be an object")
            for key in ("search", "finetune")
            for value in (5, [], "")
        ),
        *(({"task": value}, "provenance: task") for value in (5, {}, {"name": 5}, {"name": "x", "label_keys": 5})),
        *(({"target": value}, "provenance: target must be a string") for value in (5, [], {})),
        ({"hub_mpq": {}}, "provenance: hub_mpq must be a string"),
        ({"latency": {}}, "provenance: latency"),
        ({"latency": {**LATENCY, "measured": "x"}}, "provenance: latency"),
        ({"runtimes": []}, "provenance: runtimes"),
        ({"runtimes": {"x": {}}}, "provenance: runtimes"),
        ({"runtimes": {"x": {**RUNTIME, "metrics": {"runtime": {}}}}}, "provenance: runtimes"),
    ],
)
def test_provenance_of_another_type_is_refused(packed, provenance, match):
    path = packed[0]
    changed(path, lambda tree: tree["provenance"].update(provenance))
    for read in (read_packed, read_manifest):
        with pytest.raises(PackedFormat, match=match):
            read(path)


@pytest.mark.parametrize(
    "provenance",
    [
        {"metrics": {"float": {"top1": 1, "task": "x", "samples": 2.0, "of mine": "text"}}},
        {"latency": LATENCY, "runtimes": {"x": RUNTIME}, "search": {"a": [1]}, "of a later version": [{"a": None}]},
        {"task": {"name": "x", "ignore_index": -100, "output": None, "label_keys": ["a"]}, "target": "vllm"},
    ],
)
def test_provenance_that_is_right_is_read(packed, provenance):
    path = packed[0]
    changed(path, lambda tree: tree.update(provenance=provenance))
    assert read_manifest(path).provenance == provenance


@pytest.mark.parametrize("provenance", [{"task": []}, {"seconds": "x"}, {"seconds": float("1e12")}, {"seconds": -1}])
def test_indicators_of_another_type_are_refused(tmp_path, provenance):
    from hub_mpq.core import Indicators

    write_indicators(tmp_path / "i", Indicators({"a": {2: 0.5}}, {}, {}, provenance))
    with pytest.raises(PackedFormat, match="provenance: "):
        read_indicators(tmp_path / "i")


def test_shapes_are_those_of_the_tensors(packed):
    path = packed[0]
    (shapes, manifest), (tensors, same) = read_shapes(path), read_packed(path)
    assert manifest == same
    assert list(shapes) == list(tensors)
    for name, tensor in tensors.items():
        parts, there = (x.parts() if hasattr(x, "parts") else {"": x} for x in (tensor, shapes[name]))
        assert [(k, t.shape, t.dtype) for k, t in parts.items()] == [(k, t.shape, t.dtype) for k, t in there.items()]
        assert all(t.is_meta for k, t in there.items() if k != "weight_shape")


def test_a_payload_that_was_changed_is_not_looked_at_for_shapes(packed):
    path = packed[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    read_shapes(path)
    with pytest.raises(PackedFormat):
        read_packed(path)


@pytest.mark.parametrize(("open_", "close"), [('{"a":', "}"), ("[", "]")])
def test_depth_is_bounded_however_deep_the_reader_is_called(open_, close):
    def at(depth):
        return load_json(open_ * depth + "0" + close * depth, "it")

    at(MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 500, 990, 10**5):
        with pytest.raises(InvalidArgument, match="it is not valid JSON: nested more than"):
            at(depth)


def test_the_search_for_a_duplicate_key_is_linear():
    """60,000 keys took 48 s of CPU when every key was counted by itself."""
    keys = [f'"k{i}":0' for i in range(60_000)]
    began = time.process_time()
    with pytest.raises(InvalidArgument, match="duplicate key 'k59999'"):
        load_json("{" + ",".join([*keys, keys[-1]]) + "}", "it")
    assert time.process_time() - began < 20


@pytest.mark.parametrize("name", tasks.names())
def test_the_settings_of_each_task_can_be_read_again(name):
    check_provenance({"task": json.loads(dump_json(tasks.get(name).settings()))})
