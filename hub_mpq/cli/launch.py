"""hub-mpq launch, and how a command behaves as one of several processes."""

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
    processes: Annotated[int, typer.Option(min=1, max=4096, help="Number of processes; on GPUs one per GPU.")],
    cpu: Annotated[bool, typer.Option("--cpu", help="Use CPUs even if there are GPUs.")] = False,
) -> None:
    """Run a command on several processes of this machine.

    COMMAND is indicators, quantize, finetune or evaluate, with its own arguments.

    Example: hub-mpq launch --processes 2 indicators MODEL …
    """
    command = list(ctx.args)
    if not command or command[0] not in TRAINS:
        raise InvalidArgument(
            f"expected a command to launch ({', '.join(TRAINS)}), got {command[0] if command else 'none'!r}"
        )
    import torch

    gpus = 0 if cpu else torch.cuda.device_count()
    if gpus and processes > gpus:
        raise InvalidArgument(
            f"--processes {processes} requires as many GPUs, but this machine has {gpus}; pass --cpu to run on CPUs"
        )
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

    # each process reports its error; the launcher's own report is 40 lines about its internals
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
    """Print the first line of a command that trains: how many processes run, and on what. Many start here.

    Args:
        early: Print only if a launcher started this process, before anything else. Otherwise a command prints it when
            its training begins, so that an error in its options stays one line.
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
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def tells(error: HubMPQError) -> bool:
    """Whether this process should report the error: only the main one if all processes have the same."""
    torch: Any = sys.modules.get("torch")
    started = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_main() or (started and not getattr(error, "agreed", False))
