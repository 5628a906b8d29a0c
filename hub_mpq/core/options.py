"""Options of the trainings, shared by Python, the command line and the model card."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import InvalidArgument
from .checks import MAX_INT, MAX_SEED, ends, is_finite

O = TypeVar("O", bound="Options")  # noqa: E741


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its default.
        help: One sentence for the command line.
        metadata: `low`, `high`: ends of a number's range. `on_command_line`: False for what commands set themselves.
            `flag`: the option's own name. `free`: whether it may change when an interrupted run goes on.
            `strategy`: name of the one strategy that takes it.
    """
    return field(default=default, metadata={"help": help, **metadata})


class Options:
    """Base of the dataclasses of options: names, types and ranges are checked, with errors that name the field.

    Attributes:
        title: What the options are about, over their part of a command's help.
    """

    title: ClassVar[str] = ""
    _given: tuple[str, ...] = ()  # fields that were named when it was made, whatever their values

    def __new__(cls: type[O], *values: Any, **given: Any) -> O:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
                raise InvalidArgument(f"{cls.__name__} has no option {name!r}{hint}")
        out = super().__new__(cls)
        object.__setattr__(out, "_given", (*names[: len(values)], *given))
        return out

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, low, high = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("high")
            kinds = [_KINDS.get(name) for name in str(f.type).split(" | ")]
            if None in kinds:
                continue
            if not any(fits(value) for _, fits in kinds):  # type: ignore[misc]
                wanted = " or ".join(words for words, _ in kinds)  # type: ignore[misc]
                raise InvalidArgument(f"{f.name} is {wanted}, not {value!r}")
            if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
                kind = "a whole number" if isinstance(value, Integral) and "int" in str(f.type) else "a number"
                raise InvalidArgument(f"{f.name} is {kind} {ends(value, low, high)}, not {value!r}")

    @classmethod
    def of(
        cls: type[O],
        options: O | Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> O:
        """Options as they are, a mapping of them, or None for the defaults; with `changes` in place.

        Args:
            options: The options.
            defaults: Values for what `options` leaves out.
            changes: Single options by name.

        Raises:
            InvalidArgument: No such option (the error names the nearest one), or a value out of range.
        """
        if isinstance(options, cls):
            given = {name: getattr(options, name) for name in options._given}
        elif options is None or isinstance(options, Mapping):
            given = dict(options or {})
        else:
            raise InvalidArgument(f"options are {cls.__name__} or a mapping, not {options!r}")
        return cls(**{**(defaults or {}), **given, **changes})

    def filled(self: O, **values: Any) -> O:
        """The same options with `values` for those that were not given."""
        return type(self).of(self, values)

    def changed(self) -> dict[str, Any]:
        """{option: value} of those that are not at their defaults and say how the result was made: for the card."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default and not f.metadata.get("free")
        }


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "None": ("None", lambda value: value is None),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "float": ("a number", is_finite),
    "str": ("text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
}
"""{type as fields name it: (in words, whether a value is of it)}; other types are not checked."""


@dataclass(frozen=True)
class _Length(Options):
    """How long a training is, and how it is repeated and resumed."""

    epochs: float = option(1, "Length in epochs.", low=0)
    steps: int | None = option(None, "Length in optimizer steps; wins over epochs.", low=0, high=MAX_INT)
    seed: int = option(0, "Seed of the training.", low=0, high=MAX_SEED, on_command_line=False)
    checkpoint_dir: str | Path | None = option(None, "Folder of resumable states.", on_command_line=False, free=True)
    checkpoint_every: int = option(500, "Steps between states to go on from.", low=1, high=MAX_INT, free=True)
    resume: bool = option(False, "Go on from the newest state.", on_command_line=False, free=True)


@dataclass(frozen=True)
class IndicatorOptions(_Length):
    """How the scores of layers are learned (LIMPQ §3.3, and every other strategy).

    Args:
        epochs: Length in epochs.
        steps: Length in optimizer steps; wins over epochs. 0: untrained quantizers.
        seed: Seed of shuffling and of the random widths.
        checkpoint_dir: Folder of resumable states; None writes none.
        checkpoint_every: Steps between states.
        resume: Go on from the newest state.
        share: Part of each epoch's batches that is used, above 0 and at most 1.
        lr: Learning rate of the weights; None for the strategy's own.
        smoothing: Label smoothing, for tasks with classes; None: 0.1 for classification, 0 for other tasks and for the
            strategies "ebs" and "seam".
        distill: Weight in [0, 1] of the distillation loss from the float model; None: 1 for batches without labels,
            else 0.
        preset: "short" (our construction, for runs of tens to thousands of steps) or "authors" (LIMPQ's settings for
            ImageNet-sized runs). LIMPQ only, as are those that follow.
        scale_lr: Learning rate of the scales; None for the preset's.
        freeze_weights: Only scales and norms learn.
        uniform: False trains by random widths alone, for ablations.
        indicator: "divergence", "scale" or "raw scale", see `hub_mpq.search.limpq.LIMPQ`; None for the preset's.
        granularity: "tensor" or "channel" for weight scales; None for the indicator's own.
    """

    title = "Indicators"

    share: float = option(1.0, "Part of each epoch's batches that is used.", low=0, high=1)
    lr: float | None = option(None, "Learning rate of the weights.", low=0)
    smoothing: float | None = option(
        None,
        "Label smoothing; 0.1 for classification, 0 for other tasks and for ebs and seam, when left out.",
        low=0,
        high=1,
    )
    distill: float | None = option(None, "Weight of distillation from the float model.", low=0, high=1)
    preset: str = option("short", "short, or authors: LIMPQ's own settings for ImageNet-sized runs.", strategy="limpq")
    scale_lr: float | None = option(None, "Learning rate of the scales.", low=0, strategy="limpq")
    freeze_weights: bool = option(False, "Only scales and norms learn.", strategy="limpq")
    uniform: bool = option(True, "Train at the uniform widths too.", strategy="limpq")
    indicator: str | None = option(None, "What is read out: divergence, scale, or raw scale.", strategy="limpq")
    granularity: str | None = option(None, "Of weight scales: tensor, or channel.", strategy="limpq")

    def of_strategy(self, name: str) -> dict[str, Any]:
        """Options that go to the constructor of a strategy.

        Raises:
            InvalidArgument: An option was set that belongs to another strategy.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("strategy") == name}
        for f in fields(self):
            if f.metadata.get("strategy") not in (None, name) and getattr(self, f.name) != f.default:
                raise InvalidArgument(f"{f.name} is an option of strategy {f.metadata['strategy']!r}, not of {name!r}")
        return own


@dataclass(frozen=True)
class FinetuneOptions(_Length):
    """How a quantized model is trained at its policy.

    Args:
        epochs: Length in epochs.
        steps: Length in optimizer steps; wins over epochs.
        seed: Seed of shuffling and of random draws.
        checkpoint_dir: Folder of resumable states; None writes none.
        checkpoint_every: Steps between states.
        resume: Go on from the newest state.
        optimizer: "adam" (AdamW) or "sgd" (momentum 0.9); cosine schedule.
        lr: Learning rate of the weights.
        scale_lr: Learning rate of the logarithms of the scales.
        weight_decay: Weight decay of the weights.
        smoothing: Label smoothing, for tasks with classes; None: 0.1 for classification, 0 for the others.
        distill: Weight in [0, 1] of the distillation loss from the float model; None: 1 for batches without labels,
            else 0.
        ema: Decay of an average of the weights that replaces them at the end.
        reestimate_norms: Re-estimate BatchNorm statistics on up to 32 batches afterwards.
        cyclic_bits: Widths cycle between this one and the policy's (CPT).
        cycles: How often.
        gradient_bits: Bits of the gradients in the backward pass (fully quantized training).
        gradient_quantizer: "tensor", "sample" or "householder".
    """

    title = "Fine-tuning"

    optimizer: str = option("adam", "adam or sgd.")
    lr: float = option(1e-4, "Learning rate of the weights.", low=0)
    scale_lr: float = option(1e-3, "Learning rate of the scales.", low=0)
    weight_decay: float = option(1e-5, "Weight decay of the weights.", low=0)
    smoothing: float | None = option(
        None, "Label smoothing; 0.1 for classification and 0 for other tasks when left out.", low=0, high=1
    )
    distill: float | None = option(None, "Weight of distillation from the float model.", low=0, high=1)
    ema: float | None = option(None, "Decay of an average of the weights.", low=0, high=1)
    reestimate_norms: bool = option(True, "Re-estimate BatchNorm statistics afterwards.")
    cyclic_bits: int | None = option(None, "Widths cycle between this one and the policy's (CPT).", low=2, high=8)
    cycles: int = option(8, "How often they do.", low=1, high=MAX_INT)
    gradient_bits: int | None = option(None, "Bits of gradients (fully quantized training).", low=1, high=8)
    gradient_quantizer: str = option("sample", "tensor, sample or householder.")


@dataclass(frozen=True)
class Engine(Options):
    """How a training runs, apart from what it computes, which stays as it is within the tolerance named.

    Args:
        bf16: Autocast to bfloat16 (8 bits of mantissa: losses within about 1 %); weights, scales and their gradients
            stay float32.
        gradient_checkpointing: Activations are computed again in the backward pass, for models that have transformers'
            or timm's switch. Same gradients, less memory, about one more forward. A BatchNorm sees each batch twice,
            so its running statistics differ, and indicators read with them after a short run.
        channels_last: Memory order of convolutions, faster on GPUs with bf16.
        compile: Large tensors are quantized by torch.compile's kernels, within 1e-6. Not the whole model: widths change
            from pass to pass, and every change would compile anew. The first use on a machine takes 10 to 20 s.
        sync_batch_norm: BatchNorm statistics over all processes' batches (CUDA only); else each process normalises with
            its own batch and the running statistics are the main one's.
        fsdp: Parameters are sharded over the processes by torch's fully_shard; scales stay whole everywhere and their
            gradients are averaged. For indicators.
        log_with: A tracker of Accelerate's by name ("tensorboard", "wandb", …), "jsonl" (lines in
            log_dir/<stage>.jsonl), or a GeneralTracker, which is yours to finish.
        log_dir: Folder of the logs.
        log_every: Steps between entries.
    """

    title = "Engine"

    bf16: bool = option(False, "Autocast to bfloat16; weights and scales stay float32.")
    gradient_checkpointing: bool = option(False, "Less memory: activations are computed again.")
    channels_last: bool = option(False, "Memory order of CNNs that GPUs like.")
    compile: bool = option(False, "Quantizers through torch.compile.")
    sync_batch_norm: bool = option(False, "BatchNorm over all processes' batches (CUDA); else over each one's.")
    fsdp: bool = option(False, "Shard the parameters over the processes.")
    log_with: Any = option(
        None, "jsonl, tensorboard, wandb, …: losses, speed and scales go to OUTPUT.logs.", free=True, type=str
    )
    log_dir: str | Path | None = option(None, "Folder of the logs.", on_command_line=False, free=True)
    log_every: int = option(10, "Steps between entries of the log.", low=1, high=MAX_INT, free=True)
