"""The options of one command, sorted by who takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InvalidArgument


def check_plot(plot: Path | None) -> None:
    """A picture that cannot be drawn must not cost a training first."""
    if plot is not None:
        from ..plot import check_plot

        check_plot(plot)


def pictures(plot: Path | None, output: Path, log_with: str | None) -> list[Path]:
    """Where pictures of the indicators go: where asked for, and beside a tracker's logs if matplotlib is there."""
    from importlib.util import find_spec

    logs = [logs_of(output) / "indicators.png"] if log_with is not None and find_spec("matplotlib") else []
    return ([plot] if plot is not None else []) + logs


def logs_of(output: Path) -> Path:
    """The folder of a tracker's logs."""
    return output.with_name(output.name + ".logs")


_MODEL_OPTIONS = (
    *("library", "input_size", "model_arg", "checkpoint_path", "pretrained", "pin", "exclude"),
    *("weight_only", "tie_fused"),
)
_NO_SETTINGS = ("output", "resume", "overwrite", "plot", "as_json", "workers", "checkpoint_every", "log_with")
_ENGINE = ("bf16", "gradient_checkpointing", "channels_last", "compile", "sync_batch_norm", "fsdp", "log_with")


def model_options(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in _MODEL_OPTIONS if name in values}


def data_options(values: dict[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in ("class_map", "batch_size", "workers", "max_corrupt")}


def engine_of(values: dict[str, Any]) -> Any:
    """How a training runs; a tracker that is not there must not cost a model's loading first."""
    from ..train.engine import Engine
    from ..train.track import tracker

    logs = logs_of(values["output"])
    tracker(values["log_with"], logs, "run")
    return Engine(**{name: values[name] for name in _ENGINE if name in values}, log_dir=logs)


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    return {name: value for name, value in values.items() if name not in _NO_SETTINGS}


def needs_budget(strategy: str) -> bool:
    """Whether a strategy cannot do without a budget (DQ and BSQ settle on widths themselves)."""
    if strategy == "limpq":
        return True
    from ..search.strategy import infers_widths

    return not infers_widths(strategy)


def search_of(strategy: str, options: list[str] | None, epochs: float, steps: int | None) -> dict[str, Any]:
    """What `HubMPQ.quantize` is told of a strategy; InvalidArgument for an unknown name or option, before any work."""
    if strategy == "limpq":
        if options:
            raise InvalidArgument("--strategy-option: limpq takes none; hub-mpq indicators trains with other settings")
        return {}
    from ..search.strategy import build_strategy
    from .options import model_args_of

    chosen = model_args_of(options, "--strategy-option")
    build_strategy(strategy, chosen)
    return {
        "strategy": strategy,
        "strategy_options": chosen,
        "indicator_options": {"epochs": epochs, "steps": steps},
    }
