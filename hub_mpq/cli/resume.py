"""Outputs that are not overwritten, and what an interrupted run leaves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from ..core.files import CONFIG, INDICATORS, PACKED
from ..core.output import check_output_file, check_output_folder
from ..errors import HubMPQError, InvalidArgument
from .launch import announce, is_main
from .models import is_packed

SETTINGS = "run.json"


def states_of(output: Path) -> Path:
    """Where the states of the run that writes `output` are."""
    return output.with_name(output.name + ".checkpoints")


def check_folder(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that cannot be written or holds something, unless hub-mpq wrote it and may replace it, or the
    interrupted run that is resumed did."""
    check_output_folder(output, (CONFIG, PACKED, INDICATORS))
    _check_states(states_of(output), resume)
    if output.is_dir() and any(output.iterdir()):
        if not is_packed(output):
            raise InvalidArgument(f"{output} holds something else than a packed model; name another folder")
        if not overwrite and not (resume and states_of(output).is_dir()):
            raise InvalidArgument(f"{output} holds a packed model; name another folder or pass --overwrite")


def check_file(output: Path, overwrite: bool, resume: bool | None = None) -> None:
    """Refuse a file that cannot be written or is there, unless the interrupted run that is resumed wrote it. resume:
    None for a command without states."""
    check_output_file(output)
    if resume is not None:
        _check_states(states_of(output), resume)
    if output.exists() and not overwrite and not (resume and states_of(output).is_dir()):
        raise InvalidArgument(f"{output} exists; name another file or pass --overwrite")


def _check_states(states: Path, resume: bool) -> None:
    """Refuse an output whose states lie there and are not resumed, or whose states' place is taken."""
    check_output_folder(states)
    if states.is_dir() and not (states / SETTINGS).is_file():
        raise InvalidArgument(f"{states} is not of hub-mpq, and the states of the run go there; move it away")
    if states.is_dir() and not resume:
        raise InvalidArgument(f"{states} holds an interrupted run: pass --resume to go on, or remove it")


class Run:
    """The checkpoint folder `OUTPUT.checkpoints` of one command: made on entry, removed when the command is done.

    After Ctrl-C, SIGTERM or an error it stays when it holds a state to go on from, after SIGKILL always. `settings`
    must be the same when the run is resumed. Raises InvalidArgument when they are not, and when a run was interrupted
    there but `resume` is not asked for. Of several processes the main one does it, and all get to know.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = states_of(output)
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        self.resume = resume

    def __enter__(self) -> Run:
        from ..train.processes import on_main

        self.resume = on_main(self._begin)
        announce()
        return self

    def _begin(self) -> bool:
        """Make the folder, or check that it is of this run; whether there is something to go on from."""
        _check_states(self.folder, self.resume)
        if self.resume and (self.folder / SETTINGS).is_file():
            try:
                before = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise HubMPQError(f"{self.folder / SETTINGS} cannot be read: {error}") from error
            changed = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
            if changed:
                raise InvalidArgument(
                    f"{self.folder} is of a run with other {', '.join(changed)}; remove it to start anew"
                )
            return True
        if self.resume:
            typer.echo(f"hub-mpq: nothing to resume in {self.folder}; starting from the beginning", err=True)
        from ..pack.atomic_folder import atomic_folder

        with atomic_folder(self.folder) as new:
            (new / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        return False

    def _holds_state(self) -> bool:
        """Whether there is something to go on from; False too while the main process removes the folder."""
        with contextlib.suppress(FileNotFoundError):
            return any(self.folder.glob("*/step-*")) or any(self.folder.rglob("*.safetensors"))
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._holds_state()
        if is_main() and self.folder.is_dir() and (error is None or not kept):
            from ..pack.atomic_folder import remove_folder

            remove_folder(self.folder)
        if isinstance(error, KeyboardInterrupt):
            said = str(error) or "stopped"
            raise KeyboardInterrupt(f"{said}; the same command with --resume goes on" if kept else said) from None
