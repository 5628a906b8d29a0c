"""Resumable states of a training, written beside and renamed, so that a torn one is never picked."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from ..core.output import check_output_folder
from ..errors import HubMPQError, InvalidArgument
from ..pack.atomic import flush_tree, sync_folder
from .processes import raise_together
from .shard import Spread

_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = re.compile(r"partial-(step-)?\d{8}")
_RUN = "processes.json"


class Checkpoints:
    """Folders step-00000123 in `folder`, the newest one kept. They are for the machine that wrote them only, in a
    folder that all processes see. per_epoch: batches of a process's epoch; a state is of so many batches and
    processes, and of no other number."""

    def __init__(
        self, folder: str | Path, accelerator: Any, *, per_epoch: int = 0, spread: Spread | None = None
    ) -> None:
        check_output_folder(folder)
        self.folder, self.accelerator, self.spread = Path(folder), accelerator, spread
        self.run = {"processes": accelerator.num_processes, "batches_per_epoch": per_epoch}

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / _RUN).is_file())
        return found[-1] if found else None

    def save(self, step: int) -> None:
        """Write the state after `step` optimizer steps; HubMPQError when the disk is full, the old one then stays."""
        before, final = self.last, self.folder / f"step-{step:08d}"
        partial = self.folder / f"partial-{step:08d}"
        for write in (self._begin, self._write):
            failed: HubMPQError | None = None
            try:
                write(partial)
            except (OSError, RuntimeError, SafetensorError) as error:
                failed = HubMPQError(f"checkpoint {final} could not be written ({error}); last good one: {before}")
            try:
                raise_together(failed)
            except HubMPQError:
                if self.accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        if self.accelerator.is_main_process:  # all have written
            discard(final)  # of an earlier run
            partial.rename(final)
            sync_folder(self.folder)
            if before is not None and before != final:
                discard(before)
            for torn in self.folder.glob("partial-*"):
                if _PARTIAL.fullmatch(torn.name):
                    shutil.rmtree(torn, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _begin(self, partial: Path) -> None:
        if self.accelerator.is_main_process:
            final = partial.with_name(partial.name.replace("partial", "step"))
            if final.exists() and not (final / _RUN).is_file():
                raise FileExistsError(f"{final} is not of hub-mpq")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def _write(self, partial: Path) -> None:
        self.accelerator.save_state(str(partial), safe_serialization=True)
        if self.spread is not None:
            self.spread.save(partial)
        if self.accelerator.is_main_process:
            (partial / _RUN).write_text(json.dumps(self.run), encoding="utf-8")
        flush_tree(partial)

    def load(self) -> int:
        """Restore the newest state and return its step; 0 when there is none.

        Raises InvalidArgument when it is of another number of processes or of data of another length.
        """
        if self.last is None:
            return 0
        try:
            written = json.loads((self.last / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HubMPQError(f"{self.last / _RUN} cannot be read: {error}") from error
        if written != self.run:
            raise InvalidArgument(
                f"{self.last} is of {_words(written)}, and this run has {_words(self.run)}: go on with as many, or "
                f"remove {self.folder} to start anew"
            )
        self.accelerator.load_state(str(self.last))
        if self.spread is not None:
            self.spread.load(self.last)
        return int(self.last.name.removeprefix("step-"))


def _words(run: dict[str, int]) -> str:
    count = run["processes"]
    return f"{count} {'process' if count == 1 else 'processes'} with {run['batches_per_epoch']} batches an epoch"


def discard(folder: Path) -> None:
    """Remove a state; it has no complete one's name while it is half removed."""
    if folder.exists():
        torn = folder.with_name(f"partial-{folder.name}")
        shutil.rmtree(torn, ignore_errors=True)
        folder.rename(torn)
        shutil.rmtree(torn, ignore_errors=True)


class StopOnSignal:
    """While active, SIGINT and SIGTERM set `raised`, and the loop stops after its step; the same one again stops at
    once. (Ctrl-C in a terminal sends SIGINT, and a launcher may hand on SIGTERM after it.)"""

    def __init__(self, *, active: bool) -> None:
        self.raised = False
        self._seen: set[int] = set()
        self._active = active and threading.current_thread() is threading.main_thread()
        self._old: dict[int, Any] = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            raise KeyboardInterrupt
        self._seen.add(number)
        self.raised = True

    def __enter__(self) -> StopOnSignal:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
