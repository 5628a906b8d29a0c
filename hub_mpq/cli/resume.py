"""Outputs that are not overwritten, and what an interrupted run leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from ..errors import HubMPQError, InvalidArgument
from .models import is_packed

SETTINGS = "run.json"


def check_folder(output: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless hub-mpq wrote it and may replace it."""
    if output.exists() and not output.is_dir():
        raise InvalidArgument(f"{output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        if not is_packed(output):
            raise InvalidArgument(f"{output} holds something else than a packed model; name another folder")
        if not overwrite:
            raise InvalidArgument(f"{output} holds a packed model; name another folder or pass --overwrite")


def check_file(output: Path, overwrite: bool) -> None:
    """Refuse a file that is there."""
    if output.is_dir():
        raise InvalidArgument(f"{output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise InvalidArgument(f"{output} exists; name another file or pass --overwrite")


class Run:
    """The checkpoint folder `OUTPUT.checkpoints` of one command: made on entry, removed when the command is done.

    After Ctrl-C, SIGTERM or an error it stays when it holds a state to go on from. `settings` must be the same
    when the run is resumed. Raises InvalidArgument when they are not, and when a run was interrupted there but
    `resume` is not asked for.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = output.with_name(output.name + ".checkpoints")
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        self.resume = resume and (self.folder / SETTINGS).is_file()
        if resume and not self.resume:
            typer.echo(f"hub-mpq: nothing to resume in {self.folder}; starting from the beginning", err=True)

    def __enter__(self) -> Run:
        if self.resume:
            try:
                before = json.loads((self.folder / SETTINGS).read_text())
            except (OSError, ValueError) as error:
                raise HubMPQError(f"{self.folder / SETTINGS} cannot be read: {error}") from error
            changed = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
            if changed:
                raise InvalidArgument(
                    f"{self.folder} is of a run with other {', '.join(changed)}; remove it to start anew"
                )
            return self
        if self.folder.exists():
            raise InvalidArgument(f"{self.folder} holds an interrupted run: pass --resume to go on, or remove it")
        try:
            self.folder.mkdir(parents=True)
            (self.folder / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        except OSError as error:
            raise HubMPQError(f"{self.folder} cannot be written: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = any(self.folder.glob("*/step-*")) or any(self.folder.glob("*.safetensors"))
        if error is None or not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            said = str(error) or "stopped"
            raise KeyboardInterrupt(f"{said}; the same command with --resume goes on" if kept else said) from None
