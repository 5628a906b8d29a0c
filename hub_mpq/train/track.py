"""What is seen of a training while it runs: Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HubMPQError


class Tracks:
    """Entries every `every` steps of the main process: the loss of each pass, learning rate, images (samples) a second,
    and what the hooks watch. Does nothing without a tracker."""

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
        # not end_training: it would end the processes' group too, which the next stage needs
        given = {id(tracker) for tracker in self.accelerator.log_with}
        for tracker in self.accelerator.trackers if self.active else ():
            if id(tracker) not in given:  # one that the user made is the user's to finish
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
        """An entry, when one is due. rate: samples a second of all processes together."""
        if not self.active or not (step == 1 or last or step % self.every == 0):
            return
        values = dict(zip(self.names, losses, strict=True))
        self.accelerator.log({**values, "samples/s": rate, "lr": lr, **watch()}, step=step)


def tracker(log_with: Any, log_dir: str | Path | None, label: str) -> Any:
    """What Accelerate is given as `log_with`; HubMPQError for a tracker whose package is not there."""
    if log_with is None or not isinstance(log_with, str):
        return log_with
    if log_with == "jsonl":
        return _json_lines(Path(log_dir or ".") / f"{label}.jsonl")
    from accelerate.tracking import get_available_trackers

    there = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if log_with not in there:
        raise HubMPQError(
            f"no tracker {log_with!r}: jsonl, or one of Accelerate's whose package is installed "
            f"({', '.join(sorted(there)) or 'none is'})"
        )
    return log_with


def _json_lines(file: Path) -> Any:
    from accelerate.tracking import GeneralTracker, on_main_process

    class JSONLines(GeneralTracker):  # type: ignore[misc]
        """One JSON object a line and entry, appended: of a resumed run, the last line of a step counts."""

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
