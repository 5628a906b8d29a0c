"""hub-mpq bench."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core import human, human_seconds
from ..core.checks import MAX_INT
from ..errors import InvalidArgument
from . import models, show
from . import options as o
from .resume import check_file

if TYPE_CHECKING:
    from ..core import LatencyTable
    from ..runtime.bench import RuntimeBench


def bench(
    model: o.Model,
    runtime: Annotated[
        str, typer.Option(help="Runtime: onednn, openvino, onnxruntime, bit_serial or torch.", show_default=False)
    ],
    loading: Annotated[o.ModelOptions, o.Group(without=("pin", "weight_only", "tie_fused", "target"))],
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Samples per call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads per call.")] = 1,
    candidates: Annotated[
        o.Text, typer.Option(help="Bit-widths to time on bit_serial, for example 1,2,4. Default: all.")
    ] = None,
    output: Annotated[
        o.File,
        typer.Option("--output", "-o", help="File to write the table of a float model to (.json).", show_default=False),
    ] = None,
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
) -> None:
    """Time a model on a runtime, on this machine.

    For a float model: each layer at each bit-width, the table that --latency requires.

    For a packed folder: the whole model against float, and whether both compute the same.
    """
    packed = models.is_packed(model)
    if packed and (output is not None or candidates is not None):
        raise InvalidArgument(f"{model} is packed; --output and --candidates are only for float models")
    if output is not None:
        check_file(output, overwrite)
    widths = o.candidates_of(candidates)
    from ..runtime.latency import runtime_here

    runtime_here(runtime)  # fail before the model is loaded if it cannot be used
    mpq = models.load(model, loading).to("cpu")
    told: dict[str, Any] = {"batch_size": batch_size, "threads": threads}
    if packed:
        from ..runtime.bench import bench_runtime

        found = bench_runtime(mpq.model, runtime, mpq.source.example, **told)
        if any(timing.spread > timing.seconds for timing in (found.runtime, found.float)):
            typer.echo("warning: timing is unsteady; the machine is busy, repeat the measurement", err=True)
        return show.emit(as_json, {"model": model, **found.to_json()}, _against_float(model, found))
    table = mpq.measure_latency(runtime, candidates=widths, **told)
    if widths is not None and all(_one_time(row) for row in table.entries.values()):
        typer.echo(f"warning: --candidates has no effect: {runtime} computes all bit-widths with one kernel", err=True)
    saved = ""
    if output is not None:
        from ..pack import write_latency_table

        write_latency_table(output, table)
        saved = f"\nsaved {output}; use it with --latency AMOUNT --latency-table {output}"
    show.emit(as_json, table.to_dict(), f"{_layers(table)}{saved}")


def _one_time(row: Mapping[str, float]) -> bool:
    """Whether a layer takes the same time at all bit-widths."""
    return len({seconds for key, seconds in row.items() if key != "float"}) <= 1


def _head(model: str, of: LatencyTable | RuntimeBench, runtime: str) -> str:
    threads = "1 thread" if of.threads == 1 else f"{of.threads} threads"
    return f"{model} on {runtime} ({of.engine}), batch {of.batch_size}, {threads}, {of.machine}"


def _layers(table: LatencyTable) -> str:
    from ..report import table as text_table

    rows = []
    for name, row in table.entries.items():
        times = sorted((seconds, key) for key, seconds in row.items() if key != "float")
        ends = [f"{human_seconds(seconds)} ({key})" for seconds, key in (times[0], times[-1])]
        same = times[0][0] == times[-1][0]
        rows.append([name, human_seconds(times[0][0]) if same else " to ".join(ends), human_seconds(row["float"])])
    return "\n".join(
        [
            _head(table.model, table, table.runtime),
            text_table(["layer", "quantized", "float"], rows),
            f"outside these layers: {human_seconds(table.constant)}",
            f"whole model: {human_seconds(table.whole)} in integers, {human_seconds(table.whole_float)} in float, "
            f"{human_seconds(table.float_model)} in float by torch",
        ]
    )


def _against_float(model: str, found: RuntimeBench) -> str:
    def time(timing: Any) -> str:
        return f"{human_seconds(timing.seconds)} ± {human_seconds(timing.spread)}"

    layers = found.layers
    lines = [
        _head(model, found, layers.runtime),
        f"{layers.runtime}: {time(found.runtime)}; float in torch: {time(found.float)}; {found.speedup:.2f}× as fast",
        f"{len(layers.integer)} layers compute in integers: {human(found.integer_nbytes)}B "
        f"({human(found.float_nbytes)}B in float32)",
    ]
    lines += [f"float: {name} ({why})" for name, why in layers.float.items()]
    return "\n".join([*lines, str(found.certificate)])
