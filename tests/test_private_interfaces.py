"""Interfaces of other libraries that hub_mpq uses though they are not public, where no other test would notice.

The whole list is the table in .github/CONTRIBUTING.md; the first test keeps the table true to the repository.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hub_mpq import HubMPQ
from hub_mpq.errors import HubMPQError, is_connection_error
from hub_mpq.tasks import Classification

ROOT = Path(__file__).parents[1]
TABLE = ROOT / ".github" / "CONTRIBUTING.md"
NODE = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.arange(8)[None]


def rows() -> list[list[str]]:
    """The cells of every row of the table, one list a row."""
    lines = TABLE.read_text(encoding="utf-8").partition("## Private upstream interfaces")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "interface" and not set(row[0]) <= set("-: |")]


def functions(file: Path) -> set[str]:
    """Names of the functions that a test file defines at its top level."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_table_names_files_and_tests_that_exist():
    """Every row has four cells, files of hub_mpq that exist, and at least one test that exists."""
    table = rows()
    assert len(table) > 50
    assert all(len(row) == 4 for row in table), [row[0] for row in table if len(row) != 4]
    for interface, files, purpose, tests in table:
        named = re.findall(r"`([^`]+)`", files)
        assert named, interface
        assert all((ROOT / "hub_mpq" / name).is_file() for name in named), (interface, named)
        assert purpose, interface
        found = NODE.findall(tests)
        assert found, interface
        assert tests.count("`") == 2 * len(found), f"{interface}: a test that is no path::name"
        for path, name in found:
            assert (ROOT / path).is_file(), (interface, path)
            assert name in functions(ROOT / path), (interface, path, name)


def test_every_test_of_this_file_stands_in_the_table():
    """A test that leaves no trace in the table guards nothing that a reader of the table can find."""
    listed = {name for row in rows() for path, name in NODE.findall(row[3]) if path.endswith(Path(__file__).name)}
    own = {name for name in functions(Path(__file__)) if name.startswith("test_")}
    assert own - listed == {
        "test_the_table_names_files_and_tests_that_exist",
        "test_every_test_of_this_file_stands_in_the_table",
    }


# --- torch


# the operators that count.py knows; those of a GPU or of one build of torch never run in the tests
OPERATORS = {
    "_grouped_mm": ("self", "mat2"),
    **dict.fromkeys(["addmm", "_addmm_activation"], ("self", "mat1", "mat2")),
    **dict.fromkeys(["baddbmm", "addbmm"], ("self", "batch1", "batch2")),
    **dict.fromkeys(["convolution", "_convolution"], ("input", "weight", "bias", "stride", "padding", "dilation")),
    **dict.fromkeys(["cudnn_convolution", "mkldnn_convolution"], ("self", "weight")),
    **dict.fromkeys(["_cdist_forward", "_euclidean_dist"], ("x1", "x2")),
    "_trilinear": ("i1", "i2", "i3"),
    "mkldnn_rnn_layer": ("input", "weight0", "weight1"),
    **dict.fromkeys(["_cudnn_rnn", "miopen_rnn"], ("input", "weight")),
    **{
        f"_scaled_dot_product_{kind}": ("query", "key", "value")
        for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    },
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_are_counted_exist_with_the_arguments_that_are_read(name):
    """Their first arguments stand where operands_and_macs takes the operands from."""
    operator = getattr(torch.ops.aten, name)
    schemas = [getattr(operator, overload)._schema for overload in operator.overloads()]
    found = [tuple(argument.name for argument in schema.arguments) for schema in schemas]
    assert any(names[: len(OPERATORS[name])] == OPERATORS[name] for names in found), found
    if name in ("convolution", "_convolution"):
        assert found[0][6] == "transposed"
    if name in ("_cudnn_rnn", "miopen_rnn"):
        assert "List[Tensor]" in str(schemas[0].arguments[1].type)


def test_the_fallback_of_a_grouped_product_is_counted():
    """What transformers runs for stacked experts where torch has no kernel: each row meets one matrix."""
    import transformers.integrations.moe  # noqa: F401  # registers the operator

    from hub_mpq.adapters.count import MacCounter

    rows, experts = torch.randn(4, 3), torch.randn(2, 3, 5)
    with MacCounter([""], {}) as counter:
        torch.ops.transformers.grouped_mm_fallback(rows, experts, torch.tensor([1, 4], dtype=torch.int32))
    assert sum(counter.macs.values()) == 4 * 3 * 5


def test_a_written_zero_point_is_read_again():
    """LSQ keeps its zero points outside of the tensor until the tensor's _version moves."""
    from hub_mpq.quantizers import LSQ

    quantizer = LSQ((4,), signed=False)
    assert quantizer.zero_point == 0
    quantizer.init(4, torch.ones(1), 3)
    assert quantizer.zero_point == 3
    quantizer.load_state_dict({**quantizer.state_dict(), "zero_points": torch.tensor([5], dtype=torch.int32)})
    assert quantizer.zero_point == 5


def test_a_synchronized_norm_has_all_attributes_of_one_that_was_made_so():
    """The class of a norm is changed in place, so nothing runs SyncBatchNorm's constructor for it."""
    from timm.layers import BatchNormAct2d

    from hub_mpq.train.engine import synced_norms

    net = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4))
    with synced_norms(net):
        assert all(set(nn.SyncBatchNorm(4).__dict__) <= set(norm.__dict__) for norm in net)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["interrupted", "terminated"]
)
def test_a_launch_that_a_signal_ends_has_the_signals_code(monkeypatch, number, code):
    """The code is read off torch's SignalException."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    assert launched(monkeypatch, SignalException("ended", sigval=number)) == code


@pytest.mark.parametrize(("exits", "code"), [((1, 3), 3), ((-9, 1), 137)], ids=["exit", "killed"])
def test_a_launch_has_the_code_of_the_process_that_failed_first(monkeypatch, exits, code):
    """Of two ProcessFailures in torch's ChildFailedError the earlier one counts, wherever it stands."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    failures = {rank: ProcessFailure(rank, 1, exitcode, "none") for rank, exitcode in enumerate(exits)}
    first = exits.index(3) if 3 in exits else 0
    for rank, failure in failures.items():
        failure.timestamp = 10 if rank == first else 20
    assert launched(monkeypatch, ChildFailedError("two", failures)) == code


def launched(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Exit code of `hub-mpq launch` when Accelerate's launcher, given our options, raises `error`."""
    import logging

    import accelerate.commands.launch

    from hub_mpq.cli.launch import _launched, arguments

    seen = []

    def launcher(parsed: Any) -> None:
        seen.append(parsed)
        raise error

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launcher)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    code = _launched(arguments(2), ["evaluate", "resnet18", "--data", "x"])
    (parsed,) = seen
    assert (parsed.num_processes, parsed.multi_gpu, parsed.module) == (2, True, True)
    assert (parsed.training_script, parsed.training_script_args[0]) == ("hub_mpq", "evaluate")
    return code


# --- transformers


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(folder of a packed BERT with a tied head, its class, the HubMPQ that wrote it)."""
    import transformers

    root = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=16, tie_word_embeddings=True)
    transformers.BertForMaskedLM(config).save_pretrained(root / "float")
    mpq = HubMPQ.from_pretrained(root / "float").apply_policy("W4")
    mpq.save_pretrained(root / "packed")
    return root / "packed", transformers.BertForMaskedLM, mpq


def test_loading_unpacks_no_weight(bert, monkeypatch):
    """_is_hf_initialized keeps transformers from drawing weights into a packed layer, which reads it for that."""
    from hub_mpq.pack import PackedTensor

    folder, cls, _ = bert
    unpacked = []
    real = PackedTensor.dequantize
    monkeypatch.setattr(PackedTensor, "dequantize", lambda self, *to: unpacked.append(self.kind) or real(self, *to))
    model = cls.from_pretrained(folder)
    assert "linear" not in unpacked
    model(IDS)
    assert "linear" in unpacked


def test_loading_reports_no_tensor_that_was_not_expected(bert):
    """The weight without elements that guards a packed file is in _keys_to_ignore_on_load_unexpected."""
    folder, cls, _ = bert
    _, loading = cls.from_pretrained(folder, output_loading_info=True)
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    assert not cls._keys_to_ignore_on_load_unexpected, "the class is as it was"


def test_a_tied_head_stands_once_in_the_float_copy(bert):
    """By all_tied_weights_keys, {name of the head's weight: name of the embedding's}."""
    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    state = float_copy_state(bert[2].model, libraries.get("transformers"))
    assert [name for name in state if "word_embeddings" in name] == ["bert.embeddings.word_embeddings.weight"]
    assert "cls.predictions.decoder.weight" not in state


def test_a_head_that_is_tied_is_not_missing_from_a_checkpoint(bert, tmp_path):
    """A file that holds a tied weight once fills a model built from a config."""
    from safetensors.torch import save_file

    from hub_mpq.adapters import load
    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    folder, _, mpq = bert
    save_file(float_copy_state(mpq.model, libraries.get("transformers")), tmp_path / "weights.safetensors")
    filled = load(str(folder), checkpoint_path=tmp_path / "weights.safetensors").model
    assert filled.cls.predictions.decoder.weight is filled.bert.embeddings.word_embeddings.weight


def test_a_float_copy_has_the_names_that_transformers_writes(tmp_path):
    """By revert_weight_conversion; and by none that loading the packed file left in _weight_conversions."""
    import transformers
    from safetensors import safe_open

    from hub_mpq.core.library import libraries
    from hub_mpq.export.float_copy import float_copy_state

    net = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=16, patch_size=8))
    net.save_pretrained(tmp_path / "float")
    with safe_open(tmp_path / "float" / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert written != net.state_dict().keys(), "of this model no name differs on disk: take another one"
    mpq = HubMPQ.from_pretrained(tmp_path / "float").apply_policy("W8")
    mpq.save_pretrained(tmp_path / "packed")
    loaded = type(net).from_pretrained(tmp_path / "packed")
    for model in (mpq.model, loaded):
        assert float_copy_state(model, libraries.get("transformers")).keys() == written


def test_an_offload_to_disk_is_refused(bert):
    """validate_environment is given the device_map before anything is loaded."""
    folder, cls, _ = bert
    with pytest.raises(HubMPQError, match="offloaded to disk"):
        cls.from_pretrained(folder, device_map={"bert": "cpu", "cls": "disk"})


def test_adapters_are_saved_by_transformers_itself(bert, monkeypatch, tmp_path):
    """_hf_peft_config_loaded is False for every model, and True once adapters were added."""
    import transformers

    folder, cls, _ = bert
    model = cls.from_pretrained(folder)
    assert transformers.PreTrainedModel._hf_peft_config_loaded is False
    called = []
    monkeypatch.setattr(cls, "save_pretrained", lambda self, *args, **options: called.append("save"))
    monkeypatch.setattr(cls, "push_to_hub", lambda self, *args, **options: called.append("push"))
    model._hf_peft_config_loaded = True
    model.save_pretrained(tmp_path / "adapters")
    model.push_to_hub("me/adapters")
    assert called == ["save", "push"]
    assert not (tmp_path / "adapters").exists()


def test_a_path_of_this_machine_is_in_no_exported_config(bert, tmp_path):
    """_name_or_path of a config is left out of an export too."""
    floats = bert[0].parent / "float"
    HubMPQ.from_pretrained(floats, weight_only=True).apply_policy("W4").export(tmp_path / "out", "compressed-tensors")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "_name_or_path" not in text
    assert str(bert[0].parent) not in text


# --- exact types, of every library


@pytest.fixture(scope="module")
def modules():
    """{qualified name in hub_mpq/nn/types.py: (such a layer, the plain layer of its shape, an input)}."""
    import timm.layers
    from transformers.models.align.configuration_align import AlignVisionConfig
    from transformers.models.align.modeling_align import AlignVisionDepthwiseConv2d
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.pytorch_utils import Conv1D

    from hub_mpq.nn.experts import ExpertStack, TransposedExpertStack
    from hub_mpq.nn.multihead_attention import Projection

    assert AlignVisionConfig().depthwise_padding == []
    image, flat = torch.randn(2, 3, 6, 6), torch.randn(2, 5, 3)
    depthwise = {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False}
    found = [
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), image),
        (nn.Conv1d(3, 4, 2), nn.Conv1d(3, 4, 2), image[:, :, 0]),
        (nn.Conv3d(3, 4, 2), nn.Conv3d(3, 4, 2), image[:, :, None].expand(-1, -1, 2, -1, -1)),
        (nn.ConvTranspose1d(3, 4, 2), nn.ConvTranspose1d(3, 4, 2), image[:, :, 0]),
        (nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose2d(3, 4, 2), image),
        (nn.ConvTranspose3d(3, 4, 2), nn.ConvTranspose3d(3, 4, 2), image[:, :, None]),
        (nn.Linear(3, 4), nn.Linear(3, 4), flat),
        (nn.Embedding(4, 3), nn.Embedding(4, 3), torch.tensor([0, 3])),
        (timm.layers.Conv2dSame(3, 4, 3), nn.Conv2d(3, 4, 3, padding="same"), image),
        (timm.layers.linear.Linear(3, 4), nn.Linear(3, 4), flat),
        (Conv1D(4, 3), nn.Linear(3, 4), flat),
        (EfficientNetDepthwiseConv2d(3, **depthwise), nn.Conv2d(3, 3, groups=3, **depthwise), image),
        (AlignVisionDepthwiseConv2d(3, **depthwise), nn.Conv2d(3, 3, groups=3, **depthwise), image),
        (FalconLinear(3, 4), nn.Linear(3, 4), flat),
        (nn.MultiheadAttention(4, 1).out_proj, nn.Linear(4, 4), torch.randn(2, 5, 4)),
        (nn.MultiheadAttention(4, 1), None, None),
        (Projection(3, 4), nn.Linear(3, 4), flat),
        *((scaled(4, 3, 0, embed_scale=3.0), nn.Embedding(4, 3), torch.tensor([0, 3])) for scaled in _scaled()),
        (ExpertStack(nn.Parameter(torch.randn(2, 4, 3))), nn.Linear(3, 4, bias=False), flat),
        (TransposedExpertStack(nn.Parameter(torch.randn(2, 3, 4))), nn.Linear(3, 4, bias=False), flat),
    ]
    return {f"{type(m).__module__}.{type(m).__qualname__}": (m, plain, x) for m, plain, x in found}


def _scaled():
    """The embeddings of transformers that multiply their rows with a scale."""
    from hub_mpq.core import layer_kinds

    for name in layer_kinds.get("embedding").types[1:]:
        module, _, cls = name.rpartition(".")
        with contextlib.suppress(ModuleNotFoundError):  # of a newer transformers
            yield getattr(importlib.import_module(module), cls)


def test_exact_types_have_the_names_they_are_dispatched_by(modules):
    """A type that moves to another module would stay float without a word."""
    from hub_mpq.core import layer_kinds
    from hub_mpq.nn import types

    known = {name for kind in layer_kinds for name in kind.types} | set(types._REASONS)
    assert set(modules) <= known
    assert len(known - set(modules)) <= 1  # the oldest transformers lacks one
    assert all("ScaledWordEmbedding" in name for name in known - set(modules))
    for name in modules:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), cls), type)


def test_exact_types_compute_what_their_kind_says(modules):
    """Their forward is that of the plain layer with the same weight, so that a quantized form may take their place."""
    from hub_mpq.core import layer_kinds

    kinds = {name: kind.name for kind in layer_kinds for name in kind.types}
    for name, (module, plain, x) in modules.items():
        kind = kinds.get(name)
        if kind is None:
            continue
        if kind.startswith("experts"):
            weight = module.weight[1].t() if module.transposed else module.weight[1]
            plain.load_state_dict({"weight": weight})
            torch.testing.assert_close(module(x, 1), plain(x), msg=name)
            continue
        state = {k: v.t() if kind == "conv1d" and k == "weight" else v for k, v in module.state_dict().items()}
        plain.load_state_dict(state)
        scale = 3.0 if hasattr(module, "embed_scale") else 1.0
        torch.testing.assert_close(module(x), plain(x) * scale, msg=name)


def test_experts_are_computed_by_a_registry_of_transformers():
    """A class that asks the registry has what our way to compute experts reads. No config.json names it."""
    import transformers
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from hub_mpq.nn.experts import IMPLEMENTATION, register, stacked_experts_forward

    register()
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is stacked_experts_forward
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(num_hidden_layers=1, num_local_experts=2))
    experts = model.model.layers[0].mlp.experts
    wanted = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "config", "num_experts", "_apply_gate")
    assert all(hasattr(experts, name) for name in wanted)
    assert experts.is_transposed
    assert experts.has_bias
    model.config._experts_implementation = IMPLEMENTATION
    assert IMPLEMENTATION not in str(model.config.to_dict())


# --- accelerate, datasets, huggingface_hub, SCIP


def test_loaders_that_are_shared_out_already_are_known():
    """By the mark of Accelerate, and the attribute of torch's sampler."""
    from torch.utils.data import DataLoader, DistributedSampler

    from hub_mpq.train.processes import is_sharded, make_accelerator

    data = torch.utils.data.TensorDataset(torch.arange(8))
    plain = DataLoader(data, batch_size=2)
    assert not is_sharded(plain)
    assert is_sharded(make_accelerator(cpu=True).prepare(plain))
    assert is_sharded(DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0)))


def test_a_stream_that_was_split_by_node_is_known():
    """By the attribute that split_dataset_by_node sets."""
    import datasets
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader

    from hub_mpq.train.processes import is_sharded

    stream = datasets.IterableDataset.from_generator(lambda: iter([{"x": 1}]))
    assert not is_sharded(DataLoader(stream))
    assert is_sharded(DataLoader(split_dataset_by_node(stream, rank=0, world_size=2)))


def test_nothing_of_accelerates_autocast_stays_on_a_model(net, train, monkeypatch):
    """With bf16 at launch Accelerate puts a forward of its own on the model; unwrap_model takes it off again."""
    from accelerate.state import AcceleratorState

    from hub_mpq.train import Finetune, fit

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        fit(
            net,
            Finetune(task=Classification(), lr=1e-3, scale_lr=1e-3, weight_decay=0.0, smoothing=0.0),
            train,
            steps=1,
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" not in net.__dict__
    assert not hasattr(net, "_original_forward")
    assert net(train.dataset.tensors[0][:2]).dtype == torch.float32


def test_offline_is_known_by_the_clients_constant(monkeypatch):
    """It is read when a repo is asked for, so that what the client heeds is heeded here."""
    from huggingface_hub import constants

    from hub_mpq.hub import pull

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull.remote_manifest("me/unknown") is None


def test_the_folder_of_a_cached_file_is_named_by_its_commit(monkeypatch, tmp_path):
    """…/snapshots/<commit>/<file>: neither timm nor transformers says which commit a model was built from."""
    from huggingface_hub import constants

    from hub_mpq.adapters import timm, transformers

    commit, repo = "c" * 40, tmp_path / "models--me--net"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    net = nn.Linear(1, 1)
    net.pretrained_cfg = {"hf_hub_id": "me/net"}
    assert timm._revision(net) == transformers._commit("me/net", None) == commit


def test_accelerates_launcher_tells_its_processes_by_these_variables():
    """hub_mpq reads what the launcher was asked for from the environment of the processes that it starts."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    options = ["--cpu", "--use_fsdp", "--num_machines", "1", "--num_processes", "2", "--dynamo_backend", "no"]
    given = launch_command_parser().parse_args([*options, "--mixed_precision", "bf16", "script.py"])
    alone = prepare_simple_launcher_cmd_env(given)[1]
    assert alone["ACCELERATE_USE_CPU"].lower() == "true"
    several = prepare_multi_gpu_env(given)
    assert several["ACCELERATE_USE_FSDP"].lower() == "true"
    assert alone["ACCELERATE_MIXED_PRECISION"] == several["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_errors_of_the_hubs_client_are_told_by_their_module():
    """They are recognised by the package that the client comes from, which has changed more than once."""
    from huggingface_hub.utils import get_session

    client = type(get_session()).__module__.partition(".")[0]
    failed = type("ConnectError", (Exception,), {"__module__": f"{client}._exceptions"})
    assert is_connection_error(failed())
    assert not is_connection_error(ValueError())


def test_files_of_timms_readers_have_names(tmp_path):
    """An unreadable image is named by the reader's filename(index)."""
    import io
    import tarfile

    from hub_mpq.data.sources import open_source

    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        info = tarfile.TarInfo("cat/0.png")
        tar.addfile(info, io.BytesIO(b""))
    source = open_source(tmp_path / "images.tar", None)
    assert source.name(0) == f"{tmp_path / 'images.tar'}: cat/0.png"
    assert source.labels == {0}


def test_scip_tells_an_interrupt_by_its_status():
    """Ctrl-C during a solve comes back as the status "userinterrupt", never as an answer."""
    from pyscipopt import SCIP_EVENTTYPE, SCIP_PARAMSETTING, Eventhdlr, Model

    class Interrupt(Eventhdlr):
        def eventinit(self):
            self.model.catchEvent(SCIP_EVENTTYPE.PRESOLVEROUND, self)
            self.model.catchEvent(SCIP_EVENTTYPE.NODEFOCUSED, self)

        def eventexec(self, event):
            self.model.interruptSolve()

    model = Model()
    model.hideOutput()
    model.setHeuristics(SCIP_PARAMSETTING.OFF)  # else the root may be solved before the event
    x = [model.addVar(vtype="B", obj=-1.0 - k % 3) for k in range(30)]
    model.addCons(sum((7 + 5 * k % 11) * v for k, v in enumerate(x)) <= 101)
    model.includeEventhdlr(Interrupt(), "interrupt", "ends the solve as Ctrl-C does")
    model.optimize()
    assert model.getStatus() == "userinterrupt"
