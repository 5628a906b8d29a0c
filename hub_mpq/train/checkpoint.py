"""Resumable checkpoints of a training, written atomically: incomplete checkpoints are ignored."""

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
    """The checkpoints of a training: folders such as step-00000123, of which the newest is kept.

    A checkpoint can only be loaded on the machine that wrote it, with the same number of processes and of batches.

    Args:
        folder: Their folder, to which all processes have access.
        accelerator: The accelerator of the training.
        per_epoch: Batches in an epoch of a process.
        spread: The model's wrapper over several processes, if any.
    """

    def __init__(
        self, folder: str | Path, accelerator: Any, *, per_epoch: int = 0, spread: Spread | None = None
    ) -> None:
        check_output_folder(folder)
        self.folder, self.accelerator, self.spread = Path(folder), accelerator, spread
        self.run = {"processes": accelerator.num_processes, "batches_per_epoch": per_epoch}

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint; None if there is none."""
        found = sorted(p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name) and (p / _RUN).is_file())
        return found[-1] if found else None

    def save(self, step: int) -> None:
        """Write the state after `step` optimizer steps.

        Raises:
            HubMPQError: It cannot be written, for example because the disk is full. The previous one is kept.
        """
        before, final = self.last, self.folder / f"step-{step:08d}"
        partial = self.folder / f"partial-{step:08d}"
        for write in (self._begin, self._write):
            failed: HubMPQError | None = None
            try:
                write(partial)
            except (OSError, RuntimeError, SafetensorError) as error:
                failed = HubMPQError(f"checkpoint {final} cannot be written: {error}; last good checkpoint: {before}")
            try:
                raise_together(failed)
            except HubMPQError:
                if self.accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        if self.accelerator.is_main_process:  # all processes have written
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
                raise FileExistsError(f"{final} was not written by hub-mpq")
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
        """Restore the newest checkpoint and return its step, or 0 if there is none.

        Raises:
            HubMPQError: It cannot be read.
            InvalidArgument: It is of another number of processes, or of data of another length.
        """
        if self.last is None:
            return 0
        try:
            written = json.loads((self.last / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HubMPQError(f"{self.last / _RUN} cannot be read: {error}") from error
        if written != self.run:
            raise InvalidArgument(
                f"{self.last} was written by {_words(written)}, and this run has {_words(self.run)}; resume with the "
                f"same numbers, or remove {self.folder} to start over"
            )
        self.accelerator.load_state(str(self.last))
        if self.spread is not None:
            self.spread.load(self.last)
        return int(self.last.name.removeprefix("step-"))


def _words(run: dict[str, int]) -> str:
    count = run["processes"]
    return f"{count} {'process' if count == 1 else 'processes'} with {run['batches_per_epoch']} batches per epoch"


def discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a partly removed one does not look complete."""
    if folder.exists():
        torn = folder.with_name(f"partial-{folder.name}")
        shutil.rmtree(torn, ignore_errors=True)
        folder.rename(torn)
        shutil.rmtree(torn, ignore_errors=True)


class StopOnSignal:
    """Stop the loop after its current step on SIGINT or SIGTERM, which set `raised`.

    The same signal a second time stops immediately. (Ctrl-C in a terminal sends SIGINT, and a launcher may then forward
    SIGTERM.)
    """

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
