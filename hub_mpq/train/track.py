"""Log a training while it runs, with Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HubMPQError


class Tracks:
    """Log the loss of each pass, the learning rate, samples per second and what the hooks watch.

    Does nothing without a tracker.

    Args:
        accelerator: The accelerator of the training.
        with_: The tracker; None for none.
        every: Steps between entries.
        label: Name of the training.
        names: Name of the loss of each pass.
    """

    def __init__(self, accelerator: Any, with_: Any, every: int, label: str, names: Sequence[str]) -> None:
        self.accelerator, self.active, self.every, self.names = accelerator, with_ is not None, every, names
        self.label = label

    def __enter__(self) -> Tracks:
        if self.active:
            self.accelerator.init_trackers(f"hub_mpq-{self.label}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # end_training would also end the process group, which the next stage needs
        given = {id(tracker) for tracker in self.accelerator.log_with}
        for tracker in self.accelerator.trackers if self.active else ():
            if id(tracker) not in given:  # a tracker that the user created is finished by the user
                tracker.finish()

    def log(
        self,
        step: int,
        losses: Sequence[float],
        rate: float,
        lr: float,
        watch: Callable[[], dict[str, float]],
        *,
        last: bool,
    ) -> None:
        """Write an entry, if one is due. `rate` is in samples per second of all processes."""
        if not self.active or not (step == 1 or last or step % self.every == 0):
            return
        values = dict(zip(self.names, losses, strict=True))
        self.accelerator.log({**values, "samples/s": rate, "lr": lr, **watch()}, step=step)


def tracker(log_with: Any, log_dir: str | Path | None, label: str) -> Any:
    """Return the tracker to pass to Accelerate.

    Raises:
        HubMPQError: The tracker is unknown, or its package is not installed.
    """
    if log_with is None or not isinstance(log_with, str):
        return log_with
    if log_with == "jsonl":
        return _json_lines(Path(log_dir or ".") / f"{label}.jsonl")
    from accelerate.tracking import get_available_trackers

    there = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if log_with not in there:
        raise HubMPQError(
            f"unknown tracker {log_with!r}; choose jsonl or an installed tracker of Accelerate "
            f"({', '.join(sorted(there)) or 'none is installed'})"
        )
    return log_with


def _json_lines(file: Path) -> Any:
    from accelerate.tracking import GeneralTracker, on_main_process

    class JSONLines(GeneralTracker):  # type: ignore[misc]
        """Append one JSON object per line and entry; in a resumed run, the last line of a step counts."""

        name, requires_logging_directory, main_process_only = "jsonl", False, True
        tracker = file

        @on_main_process
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as opened:
                    opened.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                raise HubMPQError(f"{file} cannot be written: {error}") from error

    return JSONLines()
