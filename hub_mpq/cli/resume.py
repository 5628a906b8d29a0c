"""Outputs that are not overwritten, and what an interrupted run leaves."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from ..errors import HubMPQError, InvalidArgument
from .launch import announce, is_main
from .models import is_packed

SETTINGS = "run.json"


def states_of(output: Path) -> Path:
    """Where the states of the run that writes `output` are."""
    return output.with_name(output.name + ".checkpoints")


def check_folder(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that holds something, unless hub-mpq wrote it and may replace it, or the interrupted run that is
    resumed did."""
    if output.exists() and not output.is_dir():
        raise InvalidArgument(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not is_packed(output):
            raise InvalidArgument(f"{output} holds something else than a packed model; name another folder")
        if not overwrite and not (resume and states_of(output).is_dir()):
            raise InvalidArgument(f"{output} holds a packed model; name another folder or pass --overwrite")


def check_file(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a file that is there, unless the interrupted run that is resumed wrote it."""
    if output.is_dir():
        raise InvalidArgument(f"{output} is a folder; name a file")
    if output.exists() and not overwrite and not (resume and states_of(output).is_dir()):
        raise InvalidArgument(f"{output} exists; name another file or pass --overwrite")


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
        shutil.rmtree(self._beside("finished"), ignore_errors=True)
        if self.resume and (self.folder / SETTINGS).is_file():
            try:
                before = json.loads((self.folder / SETTINGS).read_text())
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
        if self.folder.exists():
            raise InvalidArgument(f"{self.folder} holds an interrupted run: pass --resume to go on, or remove it")
        new = self._beside("new")
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            (new / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
            new.rename(self.folder)  # whole or not at all, whenever the process is killed
        except OSError as error:
            raise HubMPQError(f"{self.folder} cannot be written: {error}") from error
        return False

    def _beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

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
            # under another name first: a state that is half removed must not be gone on from
            self.folder.rename(self._beside("finished"))
            shutil.rmtree(self._beside("finished"), ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            said = str(error) or "stopped"
            raise KeyboardInterrupt(f"{said}; the same command with --resume goes on" if kept else said) from None
