"""Options that several commands share, what they parse to, and how a dataclass of options becomes options of a command.

A command is a function. Its parameters are single options or whole groups: a dataclass (`IndicatorOptions`, `Engine`,
`ModelOptions`, …), whose fields become options, or a `Budget`, for which every registered limit becomes one.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from ..core import Budget, Candidates, Engine, LayerBits, limits
from ..core.bits import check_group_size
from ..core.checks import MAX_INT, MAX_SEED, number, seconds
from ..core.options import Options, option
from ..core.output import check_output_folder
from ..errors import HubMPQError, InvalidArgument

Text = str | None
Number = float | None


def _checked(check: Callable[[str, object], object]) -> Any:
    """A typer callback that rejects what Python rejects, with the same message."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None:
            check(str(param.name), value)
        return value

    return callback


File = Path | None
Many = list[str] | None

FREE = "may differ when an interrupted run is resumed"
"""Marks an option, next to typer's own description, that does not affect what a run computes."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A timm name, a Hugging Face id, hf-hub:…, or a local folder.", show_default=False
    ),
]
CandidateBits = Annotated[
    Text,
    typer.Option("--candidates", help="Bit-widths to choose from. Default: 2,3,4,5,6, or all that --target supports."),
]
ScoredBits = Annotated[
    Text, typer.Option("--candidates", help="Bit-widths to choose from. Default: all that have a score.")
]
GroupSize = Annotated[
    Text,
    typer.Option(
        help="Weights of a row that share one scale: 128, or several (none,128,32) for the solver to choose from. "
        "Default: one scale per output channel."
    ),
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Store zero points with the weight scales.")]
Rounding = Annotated[
    Text,
    typer.Option(
        help="How weights are rounded before they are scored: gptq, calibrated on --text or --data, or nearest. "
        "Default: gptq for weight-only quantization without fine-tuning.",
        show_default=False,
    ),
]
Alpha = Annotated[
    Number,
    typer.Option(
        callback=_checked(number),
        help="Factor on the weights' scores relative to the activations', for limpq. Default: 1 if both are in one "
        "unit, else such that their sums are equal.",
    ),
]
TimeLimit = Annotated[
    Number,
    typer.Option(
        callback=_checked(seconds),
        help="Time limit in seconds; after it the best policy so far is returned, with its gap. Default: none.",
    ),
]
Strategy = Annotated[
    Text,
    typer.Option(
        help="How layers are scored. By training: limpq (default), dq, ebs, seam, bsq; without: gradient (default with "
        "GPTQ), hessian, mse, kl. Or your own, FILE.py:NAME.",
        show_default=False,
    ),
]
StrategyOption = Annotated[
    list[str] | None, typer.Option("--strategy-option", help="KEY=VALUE, an argument of the strategy. Repeatable.")
]
Indicators = Annotated[
    File, typer.Option(help="File written by `hub-mpq indicators`. Default: the indicators stored with a packed model.")
]
TrainedIndicators = Annotated[
    File, typer.Option(help="File written by `hub-mpq indicators`. Default: layers are scored by --strategy.")
]

_SOURCES = (
    "Images: a folder of class folders, a folder of unlabelled images, a .tar file, hfds/NAME[:SPLIT] or "
    "wds/FOLDER[:SPLIT]. Text, for causal language models: a text, .parquet or .jsonl file, or "
    "hfds/NAME[:CONFIG][:SPLIT]."
)
Data = Annotated[str, typer.Option(help=_SOURCES)]
OptionalData = Annotated[
    Text, typer.Option("--data", help=f"{_SOURCES} Without it quantization is data-free, with a warning.")
]
CalibrationText = Annotated[
    Text,
    typer.Option(
        "--text",
        help="Text to calibrate a causal language model on, sources as for --data. Nothing is fine-tuned unless "
        "--epochs or --steps is given, and inputs stay float unless the budget limits them.",
    ),
]
Val = Annotated[Text, typer.Option(help="Labelled images, or text, to evaluate on before and after.")]
ValidateSeconds = Annotated[
    Number,
    typer.Option(
        callback=_checked(seconds),
        help="Time limit in seconds for measuring policies. Default: a quarter of what the scores took, at least 30.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted run from its checkpoint."), FREE]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Overwrite an existing hub-mpq output."), FREE]
Output = Annotated[Path, typer.Option("--output", "-o", help="Output folder."), FREE]
Plot = Annotated[File, typer.Option(help="File for a plot (.png, .svg or .pdf)."), FREE]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout."), FREE]


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which model to load, and what of it to quantize."""

    title = "Model"

    library: str | None = option(None, "Library of the model (timm, transformers), if it is not clear from the name.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub. Default: main.")
    task: str | None = option(
        None,
        "Task, if it is not clear from model and data: classification, multi-label, regression, segmentation, "
        "detection, token-classification, question-answering, masked-lm, "
        "causal-lm, seq2seq-lm, contrastive, embedding or own.",
    )
    input_size: str | None = option(None, "Input size, if not the model's own: 160, 160x192 or 3x160x192.")
    model_arg: list[str] | None = option(
        None, "KEY=VALUE, an argument of the model's constructor, for example num_classes=10. Repeatable."
    )
    checkpoint_path: Path | None = option(None, "Load the weights from this file.")
    pretrained: bool = option(True, "Download the published weights.")
    exclude: list[str] | None = option(None, "Pattern of layers to leave float, for example layer1.*. Repeatable.")
    pin: list[str] | None = option(
        None,
        "PATTERN=W8A8 pins layers at bit-widths, PATTERN=none searches them. By default the first and last layers "
        "and all embeddings are pinned at 8 bits. Repeatable.",
    )
    weight_only: bool = option(False, "Quantize weights only; all inputs stay float.")
    tie_fused: bool = option(False, "Layers that read the same input (q, k, v) share a bit-width, as vLLM requires.")
    target: str | None = option(
        None, "Program that the policy is made for: onednn, openvino, onnxruntime, bit_serial, vllm or gguf."
    )
    per_expert: bool = option(False, "Give each expert of a stack its own bit-widths.")


@dataclass(frozen=True)
class DataOptions(Options):
    """How images and text are read."""

    title = "Data"

    class_map: Path | None = option(None, "Text file with one class folder per line, in the order of the labels.")
    batch_size: int | None = option(
        None, "Images per batch (default 64), or chunks of text (default 1).", low=1, high=MAX_INT
    )
    chunk_length: int | None = option(
        None,
        "Tokens per chunk of text. Default: 512, or the model's maximum if that is less.",
        low=2,
        high=MAX_INT,
    )
    workers: int = option(2, "Number of processes that read images.", low=0, high=1024, free=True)
    max_corrupt: float = option(
        0.01, "Fraction of images that may be unreadable; they are skipped and counted.", low=0, high=1
    )


class Group(NamedTuple):
    """How the fields of a dataclass become options: `Annotated[Engine, Group(…)]`.

    Args:
        prefix: Prefix of every name.
        only: The fields that become options; () for all.
        without: Fields that do not.
    """

    prefix: str = ""
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


NoWeights = Annotated[ModelOptions, Group(without=("checkpoint_path", "pretrained", "task"))]
"""The options of commands that load no weights."""


class Settings(dict[str, Any]):
    """{option: value} of everything that must not change when an interrupted run is resumed."""


class _Row(NamedTuple):
    """One option of the command line: its parameter for typer, and where its value goes."""

    parameter: inspect.Parameter
    home: str
    field: str
    free: bool


class Command:
    """A command's function as typer sees it, with its groups unfolded, and with limits that were registered later."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__

    @property
    def __signature__(self) -> inspect.Signature:
        rows = sorted((row.parameter for row in self._rows()), key=lambda p: p.default is not inspect.Parameter.empty)
        return inspect.Signature([p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in rows])

    @property
    def __annotations__(self) -> dict[str, Any]:  # type: ignore[override]
        return {row.parameter.name: row.parameter.annotation for row in self._rows()}

    def __call__(self, **values: Any) -> None:
        rows = list(self._rows())
        grouped: dict[str, dict[str, Any]] = {}
        for row in rows:
            if isinstance(value := values[row.parameter.name], str) and not value.strip():
                raise InvalidArgument(
                    f"{row.parameter.name.replace('_', '-')} must not be empty; pass a value or omit it"
                )
            grouped.setdefault(row.home, {})[row.field] = values[row.parameter.name]
        arguments: dict[str, Any] = {}
        for name, annotation, _ in self._parameters:
            kind, _ = _group_of(annotation)
            if kind is Settings:
                arguments[name] = Settings({r.parameter.name: values[r.parameter.name] for r in rows if not r.free})
            elif kind is Budget:
                arguments[name] = Budget.of(None, grouped[name])
            elif kind is not None:
                arguments[name] = kind(**grouped[name])
            else:
                arguments[name] = grouped[name][name]
        self.function(**arguments)

    @cached_property
    def _parameters(self) -> list[tuple[str, Any, Any]]:
        """(name, annotation, default) of the function's parameters."""
        hints = get_type_hints(self.function, include_extras=True)
        return [(p.name, hints[p.name], p.default) for p in inspect.signature(self.function).parameters.values()]

    def _rows(self) -> Iterator[_Row]:
        for name, annotation, default in self._parameters:
            kind, group = _group_of(annotation)
            if kind is Settings:
                continue
            if kind is Budget:
                for limit in limits:
                    described = typer.Option(help=limit.help or f"{limit.label}.", rich_help_panel="Budget")
                    yield _row(limit.name, Annotated[Text, described], None, name, limit.name, False)
                described = typer.Option(
                    help="Table from `hub-mpq bench`; required by --latency.", rich_help_panel="Budget"
                )
                yield _row("latency_table", Annotated[File, described], None, name, "latency_table", False)
            elif kind is not None:
                yield from _fields(kind, group, name)
            else:
                free = FREE in get_args(annotation)[1:]
                yield _row(name, annotation, default, name, name, free)


def _row(name: str, annotation: Any, default: Any, home: str, field: str, free: bool) -> _Row:
    kind = inspect.Parameter.KEYWORD_ONLY
    return _Row(inspect.Parameter(name, kind, default=default, annotation=annotation), home, field, free)


def _group_of(annotation: Any) -> tuple[Any, Group]:
    """(the dataclass, Budget or Settings that a parameter takes, how its fields appear); (None, …) for one option."""
    group = Group()
    if get_origin(annotation) is Annotated:
        annotation, *marks = get_args(annotation)
        group = next((mark for mark in marks if isinstance(mark, Group)), group)
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    grouped = len(kinds) == 1 and (kinds[0] in (Budget, Settings) or is_dataclass(kinds[0]))
    return (kinds[0] if grouped else None), group


def _fields(kind: Any, group: Group, home: str) -> Iterator[_Row]:
    hints = get_type_hints(kind)
    for f in fields(kind):
        hidden = not f.metadata.get("on_command_line", True) or f.name in group.without
        if hidden or (group.only and f.name not in group.only):
            continue
        name = group.prefix + f.name
        flag = [f"--{name.replace('_', '-')}"] if f.default is False else []  # no --no-… for what is off anyway
        described = typer.Option(
            *flag,
            help=f.metadata["help"],
            min=f.metadata.get("low"),
            max=f.metadata.get("high"),
            rich_help_panel=kind.title,
        )
        wanted = f.metadata.get("type")
        annotation = hints[f.name] if wanted is None else wanted | None
        yield _row(name, Annotated[annotation, described], f.default, home, f.name, f.metadata.get("free", False))


def logs_of(output: Path) -> Path:
    """The folder of a tracker's logs."""
    return output.with_name(output.name + ".logs")


def engine_for(engine: Engine, output: Path) -> Engine:
    """The engine with its folder of logs; a missing tracker fails before a model is loaded."""
    from ..train.track import tracker

    logs = logs_of(output)
    if engine.log_with is not None:
        check_output_folder(logs)
    tracker(engine.log_with, logs, "run")
    return replace(engine, log_dir=logs)


def check_plot(plot: Path | None) -> None:
    """Fail before a training if a plot cannot be drawn."""
    if plot is not None:
        from ..plot import check_plot

        check_plot(plot)


def pictures(plot: Path | None, output: Path, log_with: str | None) -> list[Path]:
    """Where plots of the indicators go: as requested, and next to a tracker's logs if matplotlib is installed."""
    from importlib.util import find_spec

    logs = [logs_of(output) / "indicators.png"] if log_with is not None and find_spec("matplotlib") else []
    return ([plot] if plot is not None else []) + logs


def candidates_of(text: str | None) -> Candidates | None:
    """ "2,3,4" → Candidates."""
    if text is None:
        return None
    try:
        if not text.isascii():
            raise ValueError(text)
        return Candidates.of([int(part) for part in text.split(",")])
    except ValueError as error:
        if isinstance(error, HubMPQError):
            raise InvalidArgument(f"--candidates: {error}") from None
        raise InvalidArgument(
            f"--candidates: {text!r} is not a valid list of bit-widths; use for example 2,3,4,5,6"
        ) from None


def group_sizes_of(text: str | None) -> list[int | None]:
    """ "none,128,32" → [None, 128, 32]."""
    try:
        sizes = [None if part.strip().lower() == "none" else int(part) for part in (text or "none").split(",")]
    except ValueError:
        raise InvalidArgument(
            f"--group-size: {text!r} is not a valid group size; use for example 128 or none,128,32"
        ) from None
    return [_named("--group-size", check_group_size, size) for size in sizes]


def _named(option: str, parse: Callable[[Any], Any], value: Any) -> Any:
    """A parsed value; an error names the option."""
    try:
        return parse(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"{option}: {error}") from None


def pins_of(items: list[str] | None) -> dict[str, LayerBits | None]:
    """["PATTERN=W8A8", "PATTERN=none"] → {pattern: widths or None}."""
    pins: dict[str, LayerBits | None] = {}
    for item in items or ():
        pattern, equals, bits = item.rpartition("=")
        if not equals or not pattern:
            raise InvalidArgument(f"--pin: expected PATTERN=W8A8 or PATTERN=none, got {item!r}")
        pins[pattern] = None if bits.lower() == "none" else _named(f"--pin {item}", LayerBits.parse, bits)
    return pins


def input_size_of(text: str | None) -> tuple[int, int, int] | None:
    """ "160", "160x192" or "3x160x192" → (channels, height, width)."""
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise InvalidArgument(f"--input-size: expected a size such as 160, 160x192 or 3x160x192, got {text!r}")
    sides = [int(part) for part in parts]
    sides = sides * 2 if len(sides) == 1 else sides
    return (3, *sides) if len(sides) == 2 else tuple(sides)  # type: ignore[return-value]


def model_args_of(items: list[str] | None, option: str = "--model-arg") -> dict[str, Any]:
    """["num_classes=10"] → {"num_classes": 10}; values are JSON, else strings. `option` is named in errors."""
    out: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidArgument(f"{option}: expected KEY=VALUE, got {item!r}")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


def read_json(path: Path) -> Any:
    """Content of a JSON file ("-": standard input); HubMPQError if it is not valid JSON."""
    try:
        text = typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise HubMPQError(f"cannot read {path} as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise HubMPQError(f"cannot read {path} as JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members; ValueError for a duplicate name, of which json would keep the last one."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate name {name!r} in one object")
    return tree
