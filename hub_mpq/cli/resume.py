"""Outputs that must not be overwritten, and the checkpoints of interrupted runs."""

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
    """The checkpoint folder of the run that writes `output`."""
    return output.with_name(output.name + ".checkpoints")


def check_folder(output: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that cannot be written or is not empty, unless it is a hub-mpq output that may be overwritten, or
    belongs to the run that is resumed."""
    check_output_folder(output, (CONFIG, PACKED, INDICATORS))
    _check_states(states_of(output), resume)
    if output.is_dir() and any(output.iterdir()):
        if not is_packed(output):
            raise InvalidArgument(f"{output} is not empty and not a packed model; choose another folder")
        if not overwrite and not (resume and states_of(output).is_dir()):
            raise InvalidArgument(f"{output} already holds a packed model; choose another folder or pass --overwrite")


def check_file(output: Path, overwrite: bool, resume: bool | None = None) -> None:
    """Refuse a file that cannot be written or exists, unless it belongs to the run that is resumed.

    Args:
        output: The file.
        overwrite: Whether it may be overwritten.
        resume: Whether a run is resumed; None for a command without checkpoints.
    """
    check_output_file(output)
    if resume is not None:
        _check_states(states_of(output), resume)
    if output.exists() and not overwrite and not (resume and states_of(output).is_dir()):
        raise InvalidArgument(f"{output} already exists; choose another file or pass --overwrite")


def _check_states(states: Path, resume: bool) -> None:
    """Refuse an output with checkpoints that are not resumed, or whose checkpoint folder is not hub-mpq's."""
    check_output_folder(states)
    if states.is_dir() and not (states / SETTINGS).is_file():
        raise InvalidArgument(
            f"{states} is not a checkpoint folder of hub-mpq, but the run writes its checkpoints there; move it away"
        )
    if states.is_dir() and not resume:
        raise InvalidArgument(f"{states} holds an interrupted run; pass --resume to resume it, or remove the folder")


class Run:
    """The checkpoint folder `OUTPUT.checkpoints` of one command: created on entry, removed when the command is done.

    After Ctrl-C, SIGTERM or an error it is kept if it holds a checkpoint to resume from, after SIGKILL always. With
    several processes the main one does the work and tells the others.

    Args:
        output: What the command writes.
        settings: The options that must not change when the run is resumed.
        resume: Whether to resume.

    Raises:
        InvalidArgument: On entry, if the settings have changed, or if a run was interrupted and `resume` is False.
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
        """Create the folder, or check that it belongs to this run; whether there is a checkpoint to resume from."""
        _check_states(self.folder, self.resume)
        if self.resume and (self.folder / SETTINGS).is_file():
            try:
                before = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise HubMPQError(f"cannot read {self.folder / SETTINGS}: {error}") from error
            changed = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
            if changed:
                raise InvalidArgument(
                    f"{self.folder} belongs to a run with different options ({', '.join(changed)}); "
                    "remove it to start over"
                )
            saved = max(self.folder.glob("*/step-*"), key=lambda path: path.stat().st_mtime_ns, default=self.folder)
            typer.echo(f"hub-mpq: resuming from {saved}", err=True)
            return True
        if self.resume:
            typer.echo(f"hub-mpq: nothing to resume in {self.folder}, starting from the beginning", err=True)
        from ..pack.atomic_folder import atomic_folder

        with atomic_folder(self.folder) as new:
            (new / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        return False

    def _holds_state(self) -> bool:
        """Whether there is a checkpoint to resume from; also False while the main process removes the folder."""
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
            raise KeyboardInterrupt(
                f"{said}; run the same command with --resume to continue" if kept else said
            ) from None
