"""The options that several commands share, and what they parse to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import Budget, Candidates, LayerBits
from ..errors import HubMPQError, InvalidArgument

Text = str | None
Number = float | None
Count = int | None
File = Path | None
Many = list[str] | None

Model = Annotated[
    str, typer.Argument(help="A timm name, a Hugging Face id, hf-hub:…, or a folder.", show_default=False)
]
Library = Annotated[
    Text, typer.Option(help="Library of the model, such as timm or transformers, if its id does not tell.")
]
InputSize = Annotated[Text, typer.Option(help="Other input than the model's own: 160, 160x192 or 3x160x192.")]
ModelArg = Annotated[
    Many, typer.Option(help="KEY=VALUE for the model's constructor, such as num_classes=10. Repeatable.")
]
CheckpointPath = Annotated[File, typer.Option(help="Weights from this file.")]
Pretrained = Annotated[bool, typer.Option(help="Fetch the published weights.")]
Pin = Annotated[Many, typer.Option(help="PATTERN=W8A8 keeps layers at widths, PATTERN=none searches them. Repeatable.")]
Exclude = Annotated[Many, typer.Option(help="Pattern of layers to leave float. Repeatable.")]
WeightOnly = Annotated[bool, typer.Option("--weight-only", help="All inputs stay float.")]
TieFused = Annotated[bool, typer.Option("--tie-fused", help="Layers of one input (q, k, v) share a width, as in vLLM.")]

Bitops = Annotated[Text, typer.Option(help='A level ("W4A4") or the whole model ("34.7G").')]
Size = Annotated[Text, typer.Option(help='Bytes of the packed file ("5.7MB", "4MiB") or a level ("W4").')]
Compression = Annotated[Text, typer.Option(help='Float bytes over packed bytes of the quantized weights ("12.2").')]
WeightBits = Annotated[Number, typer.Option(help="Mean bits of the searched weights.")]
ActivationMemory = Annotated[Text, typer.Option(help='Bytes of all quantized inputs of a sample ("200KB") or "A4".')]
ActivationPeak = Annotated[Text, typer.Option(help='Bytes of the largest quantized input ("50KB") or "A4".')]
CandidateBits = Annotated[Text, typer.Option("--candidates", help="Widths to choose from, such as 2,3,4,5,6.")]
Alpha = Annotated[Number, typer.Option(help="Weight of the weight indicators; balanced when left out.")]
Strategy = Annotated[str, typer.Option(help="limpq, dq, ebs, seam, bsq, gradient, hessian, mse, kl, or FILE.py:NAME.")]
StrategyOption = Annotated[list[str] | None, typer.Option("--strategy-option", help="KEY=VALUE for the strategy.")]
Indicators = Annotated[File, typer.Option(help="Indicators trained before.")]

_SOURCES = "folder of class folders or of images without labels, .tar file, hfds/NAME[:SPLIT], wds/FOLDER[:SPLIT]"
Data = Annotated[str, typer.Option(help=f"Images: {_SOURCES}.")]
OptionalData = Annotated[Text, typer.Option("--data", help=f"Images: {_SOURCES}; none: data-free, with a warning.")]
Val = Annotated[Text, typer.Option(help="Labelled images to measure on, before and after.")]
ClassMap = Annotated[File, typer.Option(help="Text file: one class folder a line, in the order of the labels.")]
BatchSize = Annotated[int, typer.Option(min=1)]
MaxCorrupt = Annotated[
    float, typer.Option(min=0, max=1, help="Part of the images that may be unreadable; they are skipped and counted.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Epochs = Annotated[float, typer.Option(min=0, help="Length of the training.")]
Steps = Annotated[Count, typer.Option(min=0, help="Length in steps; wins over --epochs.")]
LearningRate = Annotated[Number, typer.Option("--lr", help="Learning rate of the weights.")]
Seed = Annotated[int, typer.Option(min=0)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint an interrupted run left.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output of hub-mpq that is there.")]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between states to go on from.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16; weights and scales stay float32.")]
Recompute = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory: activations are computed again.")
]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Memory order of CNNs that GPUs like.")]
Compile = Annotated[bool, typer.Option("--compile", help="Quantizers through torch.compile.")]
SyncNorms = Annotated[
    bool, typer.Option("--sync-batch-norm", help="BatchNorm over all processes' batches (CUDA); else over each one's.")
]
Fsdp = Annotated[bool, typer.Option("--fsdp", help="Shard the parameters over the processes.")]
LogWith = Annotated[
    Text, typer.Option(help="jsonl, tensorboard, wandb, …: losses, speed and scales go to OUTPUT.logs.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Plot = Annotated[File, typer.Option(help="Picture to write (.png, .svg or .pdf).")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]


_LIMITS = ("bitops", "size", "compression", "weight_bits", "activation_memory", "activation_peak")


def budget_of(values: Mapping[str, Any], *, needed: bool = True) -> dict[str, Any]:
    """The limits among a command's values, checked for units; InvalidArgument when one is needed and there is none."""
    given = {name: values[name] for name in _LIMITS if values[name] is not None}
    if given or needed:
        Budget(**given)
    for name, value in given.items():
        _check(name, value)
    return given


def _check(name: str, value: Any) -> None:
    """Refuse nonsense before a model is loaded; what depends on the model is checked by the search."""
    from ..core import parse_bytes, parse_count

    if name in ("bitops", "size", "activation_memory", "activation_peak") and Budget.level(value) is None:
        (parse_count if name == "bitops" else parse_bytes)(value, name)


def candidates_of(text: str | None) -> Candidates | None:
    """ "2,3,4" → Candidates."""
    if text is None:
        return None
    try:
        return Candidates.of([int(part) for part in text.split(",")])
    except ValueError as error:
        if isinstance(error, HubMPQError):
            raise
        raise InvalidArgument(f"--candidates: {text!r} is no list of widths; write for example 2,3,4,5,6") from None


def pins_of(items: list[str] | None) -> dict[str, LayerBits | None]:
    """["PATTERN=W8A8", "PATTERN=none"] → {pattern: widths or None}."""
    pins: dict[str, LayerBits | None] = {}
    for item in items or ():
        pattern, equals, bits = item.rpartition("=")
        if not equals or not pattern:
            raise InvalidArgument(f"--pin: {item!r} is not PATTERN=W8A8 or PATTERN=none")
        pins[pattern] = None if bits.lower() == "none" else LayerBits.parse(bits)
    return pins


def input_size_of(text: str | None) -> tuple[int, int, int] | None:
    """ "160", "160x192" or "3x160x192" → (channels, height, width)."""
    if text is None:
        return None
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 3:
        raise InvalidArgument(f"--input-size: {text!r} is not 160, 160x192 or 3x160x192")
    sides = [int(part) for part in parts]
    sides = sides * 2 if len(sides) == 1 else sides
    return (3, *sides) if len(sides) == 2 else tuple(sides)  # type: ignore[return-value]


def model_args_of(items: list[str] | None, option: str = "--model-arg") -> dict[str, Any]:
    """["num_classes=10"] → {"num_classes": 10}; values are JSON, else text. `option` is named in errors."""
    out: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidArgument(f"{option}: {item!r} is not KEY=VALUE")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out


def read_json(path: Path) -> Any:
    """Content of a JSON file ("-": standard input); HubMPQError when it is none."""
    try:
        return json.loads(typer.get_text_stream("stdin").read() if str(path) == "-" else path.read_text())
    except (OSError, ValueError) as error:
        raise HubMPQError(f"{path} cannot be read as JSON: {error}") from error
