"""hub-mpq launch, and what a command does when it runs as one of several processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer

from ..errors import HubMPQError, InvalidArgument

TRAINS = ("indicators", "quantize", "finetune", "evaluate")


def launch(
    ctx: typer.Context,
    processes: Annotated[int, typer.Option(min=1, max=4096, help="How many; on GPUs, one a GPU.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="CPUs even where there are GPUs.")] = False,
) -> None:
    """Run a command on several processes of this machine: hub-mpq launch --processes 2 indicators MODEL …"""
    command = list(ctx.args)
    if not command or command[0] not in TRAINS:
        raise InvalidArgument(f"launch runs {', '.join(TRAINS)}, not {command[0] if command else 'nothing'!r}")
    import torch

    gpus = 0 if cpu else torch.cuda.device_count()
    if gpus and processes > gpus:
        raise InvalidArgument(f"this machine has {gpus} GPU for {processes} processes; pass --cpu for CPUs")
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        # two processes on the same cores, each with as many threads as there are cores, are 3 to 5 times slower
        os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    raise typer.Exit(_launched(arguments(processes), command))


def arguments(processes: int) -> list[str]:
    """Accelerate's options. Without --multi_gpu it starts one process on CPUs, whatever the number."""
    many = ["--multi_gpu"] if processes > 1 else []
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*many, "--num_processes", str(processes), *fixed]


def _launched(options: list[str], command: list[str]) -> int:
    """Hand over to Accelerate's launcher; the exit code of the process that failed first."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # each process says what was wrong; the launcher's own report is 40 lines about its internals
    logging.disable(logging.ERROR)
    parsed = launch_command_parser().parse_args([*options, "-m", "hub_mpq", *command])
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 128 + int(error.sigval)
    except SystemExit as error:  # one process is a child of the launcher, which exits with its code
        return error.code if isinstance(error.code, int) else 1
    return 0


def announce(*, early: bool = False) -> None:
    """The first line of a command that trains: how many processes run, and on what. Many start here.

    early: only where a launcher started this process, before anything else can be said; by itself, a command says it as
    its training begins, so that a mistake in its options stays one sentence.
    """
    if early != ("ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ):
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's note that all parameters are in use
    from ..train.processes import describe

    processes = describe()
    if is_main():
        typer.echo(f"hub-mpq: {processes}", err=True)


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def tells(error: HubMPQError) -> bool:
    """Whether this process should say what went wrong: not when all met the same."""
    torch: Any = sys.modules.get("torch")
    started = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_main() or (started and not getattr(error, "agreed", False))
