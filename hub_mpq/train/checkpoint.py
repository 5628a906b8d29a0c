"""Resumable states of a training, written beside and renamed, so that a torn one is never picked."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import HubMPQError

_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """Folders step-00000123 in `folder`, the newest one kept. They are for the machine that wrote them only."""

    def __init__(self, folder: str | Path, accelerator: Any) -> None:
        self.folder, self.accelerator = Path(folder), accelerator

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name))
        return found[-1] if found else None

    def save(self, step: int) -> None:
        """Write the state after `step` optimizer steps; HubMPQError when the disk is full, the old one then stays."""
        before, final = self.last, self.folder / f"step-{step:08d}"
        partial = self.folder / f"partial-{step:08d}"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(partial), safe_serialization=True)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                shutil.rmtree(final, ignore_errors=True)  # of an earlier run
                partial.rename(final)
                if before is not None and before != final:
                    shutil.rmtree(before, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise HubMPQError(f"checkpoint {final} could not be written ({error}); last good one: {before}") from error

    def load(self) -> int:
        """Restore the newest state and return its step; 0 when there is none."""
        if self.last is None:
            return 0
        self.accelerator.load_state(str(self.last))
        return int(self.last.name.removeprefix("step-"))


class StopOnSignal:
    """While active, SIGINT and SIGTERM set `raised`, and the loop stops after its step; a second one stops at once."""

    def __init__(self, *, active: bool) -> None:
        self.raised = False
        self._active = active and threading.current_thread() is threading.main_thread()
        self._old: dict[int, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True

    def __enter__(self) -> StopOnSignal:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
