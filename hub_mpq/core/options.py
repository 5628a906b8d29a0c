"""Training options, shared by Python, the command line and the model card."""

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
        metadata: `low`, `high`: range of a number. `on_command_line`: False for what commands set themselves. `free`:
            whether it may change when an interrupted run is resumed. `strategy`: name of the only strategy that takes
            it. `type`: type of the command-line value, if it is not that of the field.
    """
    return field(default=default, metadata={"help": help, **metadata})


class Options:
    """Base class of the dataclasses of options; names, types and ranges are checked, with errors that name the field.

    Attributes:
        title: Heading of the options in a command's help.
    """

    title: ClassVar[str] = ""
    _given: tuple[str, ...] = ()  # fields that were passed to the constructor, even at their defaults

    def __new__(cls: type[O], *values: Any, **given: Any) -> O:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(names)}"
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
                raise InvalidArgument(f"{f.name} must be {wanted}, got {value!r}")
            if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
                kind = "an integer" if isinstance(value, Integral) and "int" in str(f.type) else "a number"
                raise InvalidArgument(f"{f.name} must be {kind} {ends(value, low, high)}, got {value!r}")

    @classmethod
    def of(
        cls: type[O],
        options: O | Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> O:
        """Build options from options, a mapping, or None for the defaults.

        Args:
            options: The options.
            defaults: Values for the options that `options` does not set.
            **changes: Single options by name; they replace those of `options`.

        Returns:
            The options.

        Raises:
            InvalidArgument: An option is unknown (the error suggests the closest name), or a value is not valid.
        """
        if isinstance(options, cls):
            given = {name: getattr(options, name) for name in options._given}
        elif options is None or isinstance(options, Mapping):
            given = dict(options or {})
        else:
            raise InvalidArgument(f"options must be {cls.__name__} or a mapping, got {options!r}")
        return cls(**{**(defaults or {}), **given, **changes})

    def filled(self: O, **values: Any) -> O:
        """Return the same options with values for those that were not set.

        Args:
            **values: {option: value}.

        Returns:
            The new options.
        """
        return type(self).of(self, values)

    def changed(self) -> dict[str, Any]:
        """Return the options that differ from their defaults and affect the result, for the model card.

        Returns:
            {option: value}.
        """
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default and not f.metadata.get("free")
        }


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "None": ("None", lambda value: value is None),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("an integer", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "float": ("a number", is_finite),
    "str": ("a string", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
}
"""{type annotation: (its description, whether a value has it)}; other types are not checked."""


@dataclass(frozen=True)
class _Length(Options):
    """The length of a training, its seed and its checkpoints."""

    epochs: float = option(1, "Number of epochs.", low=0)
    steps: int | None = option(None, "Number of optimizer steps; overrides epochs.", low=0, high=MAX_INT)
    seed: int = option(0, "Random seed of the training.", low=0, high=MAX_SEED, on_command_line=False)
    checkpoint_dir: str | Path | None = option(None, "Folder for checkpoints.", on_command_line=False, free=True)
    checkpoint_every: int = option(500, "Steps between checkpoints.", low=1, high=MAX_INT, free=True)
    resume: bool = option(False, "Resume from the newest checkpoint.", on_command_line=False, free=True)


@dataclass(frozen=True)
class IndicatorOptions(_Length):
    """Options for learning the scores of layers, with LIMPQ or any other strategy.

    Args:
        epochs: Number of epochs.
        steps: Number of optimizer steps; overrides `epochs`. 0 leaves the quantizers untrained.
        seed: Random seed of the shuffling and of the random bit-widths.
        checkpoint_dir: Folder for checkpoints; None writes none.
        checkpoint_every: Steps between checkpoints.
        resume: Resume from the newest checkpoint.
        share: Fraction of each epoch's batches to use, above 0 and at most 1.
        lr: Learning rate of the weights; None for the strategy's default.
        smoothing: Label smoothing, for tasks with classes; None for 0.1 in classification, and 0 in other tasks and for
            the strategies "ebs" and "seam".
        distill: Weight in [0, 1] of the distillation loss from the float model; None for 1 if batches have no labels,
            else 0.
        preset: "short" (our construction, for runs of tens to thousands of steps) or "authors" (LIMPQ's settings for
            ImageNet-sized runs). This and all following options are for LIMPQ only.
        scale_lr: Learning rate of the scales; None for the preset's value.
        freeze_weights: Train only scales and norms.
        uniform: Train at uniform bit-widths as well as random ones; False is for ablations.
        indicator: "divergence", "scale" or "raw scale", see `hub_mpq.search.limpq.LIMPQ`; None for the preset's value.
        granularity: Granularity of the weight scales, "tensor" or "channel"; None for the indicator's default.

    Raises:
        InvalidArgument: An option is unknown, or its value is not valid.

    References:
        LIMPQ (Tang et al., ECCV 2022), §3.3.

    Example:
        >>> from hub_mpq import IndicatorOptions
        >>> IndicatorOptions(steps=100, lr=1e-4).changed()
        {'steps': 100, 'lr': 0.0001}
    """

    title = "Indicators"

    epochs: float = option(1, "Number of epochs to train indicators for.", low=0)
    steps: int | None = option(
        None, "Number of optimizer steps to train indicators for, instead of epochs.", low=0, high=MAX_INT
    )
    share: float = option(1.0, "Fraction of each epoch's batches to use.", low=0, high=1)
    lr: float | None = option(None, "Learning rate of the weights. Default: 0.0001 (--preset authors: 0.01).", low=0)
    smoothing: float | None = option(
        None,
        "Label smoothing. Default: 0.1 for classification, else 0.",
        low=0,
        high=1,
    )
    distill: float | None = option(
        None, "Weight of the distillation loss from the float model. Default: 1 without labels, else 0.", low=0, high=1
    )
    preset: str = option("short", "short, or authors for LIMPQ's settings for ImageNet-sized runs.", strategy="limpq")
    scale_lr: float | None = option(None, "Learning rate of the scales. Default: 0.01.", low=0, strategy="limpq")
    freeze_weights: bool = option(False, "Train only scales and norms.", strategy="limpq")
    uniform: bool = option(True, "Train at uniform bit-widths as well as random ones.", strategy="limpq")
    indicator: str | None = option(
        None,
        "Indicator to compute: divergence, scale or raw scale. Default: divergence (--preset authors: raw scale).",
        strategy="limpq",
    )
    granularity: str | None = option(
        None,
        "Granularity of the weight scales: tensor or channel. Default: channel (--indicator raw scale: tensor).",
        strategy="limpq",
    )

    def of_strategy(self, name: str) -> dict[str, Any]:
        """Return the options for the constructor of a strategy.

        Args:
            name: Name of the strategy.

        Returns:
            {option: value} of the strategy's own options.

        Raises:
            InvalidArgument: An option of another strategy is set.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("strategy") == name}
        for f in fields(self):
            if f.metadata.get("strategy") not in (None, name) and getattr(self, f.name) != f.default:
                raise InvalidArgument(
                    f"{f.name} is an option of strategy {f.metadata['strategy']!r} only, got strategy {name!r}"
                )
        return own


@dataclass(frozen=True)
class FinetuneOptions(_Length):
    """Options for fine-tuning a quantized model at its policy.

    Args:
        epochs: Number of epochs.
        steps: Number of optimizer steps; overrides `epochs`.
        seed: Random seed of the shuffling and of random draws.
        checkpoint_dir: Folder for checkpoints; None writes none.
        checkpoint_every: Steps between checkpoints.
        resume: Resume from the newest checkpoint.
        optimizer: "adam" (AdamW) or "sgd" (momentum 0.9), both with a cosine schedule.
        lr: Learning rate of the weights.
        scale_lr: Learning rate of the logarithms of the scales.
        weight_decay: Weight decay of the weights.
        smoothing: Label smoothing, for tasks with classes; None for 0.1 in classification and 0 in other tasks.
        distill: Weight in [0, 1] of the distillation loss from the float model; None for 1 if batches have no labels,
            else 0.
        ema: Decay of the exponential moving average of the weights that replaces them at the end; None for no average.
        reestimate_norms: Re-estimate BatchNorm statistics on up to 32 batches after the training.
        cyclic_bits: Cycle the bit-widths between this one and the policy's (CPT); None does not cycle.
        cycles: Number of cycles.
        gradient_bits: Bit-width of the gradients in the backward pass (fully quantized training); None for float.
        gradient_quantizer: "tensor", "sample" or "householder".

    Raises:
        InvalidArgument: An option is unknown, or its value is not valid.

    Example:
        >>> from hub_mpq import FinetuneOptions
        >>> FinetuneOptions(epochs=3, optimizer="sgd", lr=0.01).changed()
        {'epochs': 3, 'optimizer': 'sgd', 'lr': 0.01}
    """

    title = "Fine-tuning"

    epochs: float = option(1, "Number of epochs of fine-tuning.", low=0)
    steps: int | None = option(
        None, "Number of optimizer steps of fine-tuning, instead of epochs.", low=0, high=MAX_INT
    )
    optimizer: str = option("adam", "Optimizer: adam or sgd.")
    lr: float = option(1e-4, "Learning rate of the weights.", low=0)
    scale_lr: float = option(1e-3, "Learning rate of the scales.", low=0)
    weight_decay: float = option(1e-5, "Weight decay of the weights.", low=0)
    smoothing: float | None = option(None, "Label smoothing. Default: 0.1 for classification, else 0.", low=0, high=1)
    distill: float | None = option(
        None, "Weight of the distillation loss from the float model. Default: 1 without labels, else 0.", low=0, high=1
    )
    ema: float | None = option(
        None, "Decay of an exponential moving average of the weights. Off by default.", low=0, high=1
    )
    reestimate_norms: bool = option(True, "Re-estimate BatchNorm statistics after the training.")
    cyclic_bits: int | None = option(
        None, "Cycle the bit-widths between this one and the policy's (CPT). Off by default.", low=2, high=8
    )
    cycles: int = option(8, "Number of cycles of --cyclic-bits.", low=1, high=MAX_INT)
    gradient_bits: int | None = option(
        None, "Bit-width of gradients (fully quantized training). Float by default.", low=1, high=8
    )
    gradient_quantizer: str = option("sample", "Gradient quantizer: tensor, sample or householder.")


@dataclass(frozen=True)
class Engine(Options):
    """Options for how a training is executed; they do not change what it computes beyond the tolerances given below.

    Args:
        bf16: Autocast to bfloat16 (8 bits of mantissa: losses within about 1 %); weights, scales and their gradients
            stay float32.
        gradient_checkpointing: Recompute activations in the backward pass, for models that support it in transformers
            or timm. Same gradients, less memory, about one more forward pass. A BatchNorm sees each batch twice, so its
            running statistics differ, and with them indicators that are read after a short run.
        channels_last: Channels-last memory format for convolutions, faster on GPUs with bf16.
        compile: Quantize large tensors with kernels generated by torch.compile, equal within 1e-6. The model itself is
            not compiled: bit-widths change from pass to pass, and every change would trigger a recompilation. The first
            use on a machine takes 10 to 20 s.
        sync_batch_norm: Compute BatchNorm statistics over the batches of all processes (CUDA only). Otherwise each
            process normalizes with its own batch, and the running statistics are those of the main process.
        fsdp: Shard the parameters over the processes with torch's `fully_shard`; scales are not sharded, and their
            gradients are averaged. For indicators.
        log_with: Name of an Accelerate tracker ("tensorboard", "wandb", …), "jsonl" (writes log_dir/<stage>.jsonl), or
            a `GeneralTracker`, which the caller must finish.
        log_dir: Folder for the logs.
        log_every: Steps between log entries.

    Raises:
        InvalidArgument: An option is unknown, or its value is not valid.

    Example:
        >>> from hub_mpq import Engine
        >>> Engine(bf16=True, log_with="jsonl", log_dir="logs").changed()
        {'bf16': True}
    """

    title = "Engine"

    bf16: bool = option(False, "Autocast to bfloat16; weights and scales stay float32.")
    gradient_checkpointing: bool = option(False, "Save memory by recomputing activations in the backward pass.")
    channels_last: bool = option(False, "Channels-last memory format for convolutions, faster on GPUs.")
    compile: bool = option(False, "Run the quantizers through torch.compile.")
    sync_batch_norm: bool = option(False, "Synchronize BatchNorm statistics over all processes (CUDA only).")
    fsdp: bool = option(False, "Shard the parameters over the processes.")
    log_with: Any = option(
        None,
        "Tracker for losses, speed and scales: jsonl, tensorboard, wandb or another tracker of Accelerate. "
        "Logs go to OUTPUT.logs. Off by default.",
        free=True,
        type=str,
    )
    log_dir: str | Path | None = option(None, "Folder for the logs.", on_command_line=False, free=True)
    log_every: int = option(10, "Steps between log entries.", low=1, high=MAX_INT, free=True)
