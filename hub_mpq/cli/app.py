"""The app: its commands, and how its errors are shown."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .._version import __version__
from ..core.checks import MAX_INT, MAX_SEED
from ..errors import HubMPQError, last_line
from . import bench, evaluate, hub, indicators, inspect, launch, quantize, solving
from .options import Command

USER_ERROR, INTERRUPTED = 2, 130


MAX_MESSAGE = 2000
"""Maximum length of an error that is shown, in characters."""


def _tidy(command: Any, ctx: Any) -> None:
    """Hide the types of flags and the largest machine integers in the help of a command."""
    for param in command.get_params(ctx):
        if param.param_type_name != "option":
            continue
        ranges: list[Any] = [param, getattr(param, "type", None)]  # older typer keeps the range in the type
        for range_ in ranges:
            if getattr(range_, "max", None) in (MAX_INT, MAX_SEED):
                range_.max = None
        if param.metavar is not None:
            continue
        if getattr(param, "is_flag", False):
            param.metavar = ""
        elif hasattr(param, "display_type"):
            param.metavar = param.display_type(ctx).replace(" range>", ">")


class Plain(TyperCommand):
    """A command with a tidy help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _tidy(self, ctx)
        super().format_help(ctx, formatter)


class Commands(TyperGroup):
    """User errors, file errors and lack of memory print one line to stderr; unknown errors keep their traceback."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _tidy(self, ctx)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        plain, warnings.formatwarning = warnings.formatwarning, _warning
        try:
            # the command's name: click 8.1 calls it protected_args
            words = getattr(ctx, "_protected_args", None) or getattr(ctx, "protected_args", None) or [""]
            if words[0] in launch.TRAINS:
                launch.announce(early=True)
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click exits quietly when the reader is gone
        except (HubMPQError, OSError, MemoryError, RuntimeError) as error:
            if not isinstance(error, (HubMPQError, OSError, MemoryError)) and not _out_of_memory(error):
                raise
            if not isinstance(error, HubMPQError) or launch.tells(error):
                where = "" if launch.is_main() else f"[process {os.environ['RANK']}]"
                typer.echo(f"hub-mpq{where}: {_sentence(error)}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt as error:
            if launch.is_main():
                typer.echo(f"hub-mpq: {error or 'stopped'}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            warnings.formatwarning = plain


def _sentence(error: Exception) -> str:
    """The message, shortened and without control characters."""
    text = last_line(str(error)).strip()
    if not isinstance(error, (HubMPQError, OSError)):
        text = f"out of memory; use a smaller input or batch ({text or 'MemoryError'})"
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed to allocate memory; on the CPU it has no error type for that."""
    words = ("can't allocate memory", "out of memory", "Storage size calculation overflowed", "Invalid buffer size")
    return any(word in str(error) for word in words)


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixed-precision quantization of timm and Hugging Face models: from a model and a budget to packed weights."
    "\n\nStart with `hub-mpq demo`, or `hub-mpq inspect resnet18`.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hub-mpq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


_COMMANDS = (
    *(inspect.inspect, indicators.indicators, solving.search, solving.solve, solving.pareto),
    *(quantize.quantize, quantize.finetune, evaluate.evaluate, bench.bench, evaluate.demo),
)
for _command in _COMMANDS:
    app.command(cls=Plain)(Command(_command))
app.command(
    cls=Plain,
    options_metavar="[OPTIONS] COMMAND [ARGS]...",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(launch.launch)
for _hub in (hub.push, hub.pull, hub.export):
    app.command(cls=Plain)(_hub)


def main() -> None:
    """Entry point of the `hub-mpq` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes instead of failing
            stream.reconfigure(errors="backslashreplace")
    app()
