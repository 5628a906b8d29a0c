"""Plots of policies, Pareto fronts and indicators."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core import FLOAT_BITS, Indicators, LayerGraph, Policy, SearchResult, limits
from .core.output import check_output_file
from .errors import HubMPQError, InvalidArgument

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHT, ACTIVATION = "#1f4e79", "#e08214"
_ACROSS = 56  # layers in one row of a plot; more are wrapped, so that names and numbers stay readable


def check_plot(path: str | Path) -> None:
    """Check that a plot can be written to a file, before the work that it shows.

    Args:
        path: The file to write: `.png`, `.svg` or `.pdf`.

    Raises:
        HubMPQError: matplotlib is not installed.
        InvalidArgument: The suffix is not supported, or the file cannot be written.

    Example:
        >>> from hub_mpq.plot import check_plot
        >>> check_plot("policy.png")
    """
    if find_spec("matplotlib") is None:
        raise HubMPQError("plots need matplotlib: pip install 'hub-mpq[report]'")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidArgument(f"a plot must be a .png, .svg or .pdf file, got {str(path)!r}")
    check_output_file(path)


def _figure(path: str | Path, width: float, height: float) -> Figure:
    check_plot(path)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    from .pack.atomic import write_atomic

    path, drawn = Path(path), io.BytesIO()
    figure.savefig(drawn, dpi=150, format=path.suffix[1:].lower())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HubMPQError(f"{path} cannot be written: {error}") from error
    write_atomic(path, [drawn.getvalue()])


def _rows(names: Sequence[str]) -> list[list[str]]:
    """Wrap the layers into rows of equal length, in order."""
    rows = -(-len(names) // _ACROSS)
    across = -(-len(names) // rows)
    return [list(names[i : i + across]) for i in range(0, len(names), across)]


def _width(across: int) -> float:
    return max(6.5, 1.4 + 0.23 * across)


def _name_layers(axes: Axes, names: Sequence[str], across: int) -> None:
    axes.set_xlim(-0.7, across - 0.3)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def plot_policy(graph: LayerGraph, policy: Policy, path: str | Path, *, title: str | None = None) -> None:
    """Plot the bit-widths of each layer, in execution order.

    Weight bits point up and activation bits point down. Pinned layers (`fixed=`) are hatched.

    Args:
        graph: The layers of the model.
        policy: Their bit-widths.
        path: The file to write: `.png`, `.svg` or `.pdf`. Its folder is created.
        title: Title of the plot; None for the model's id.

    Raises:
        HubMPQError: matplotlib is not installed, or the file cannot be written.
        InvalidArgument: The suffix is not supported.
        PolicyMismatch: The policy is for other layers.

    Example:
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.plot import plot_policy
        >>> graph = HubMPQ.from_pretrained("test_resnet", pretrained=False).graph
        >>> plot_policy(graph, Policy.uniform(graph, "W4A4"), "policy.png")
    """
    policy.check(graph)
    rows = _rows(graph.names)
    across = len(rows[0])
    fixed = {layer.name for layer in graph if layer.fixed is not None}
    figure = _figure(path, _width(across), 1.0 + 4.2 * len(rows))
    for axes, names in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        for side, colour, sign in (("weight", WEIGHT, 1), ("activation", ACTIVATION, -1)):
            for x, name in enumerate(names):
                _bar(axes, x, getattr(policy.bits[name], side), sign, colour, name in fixed)
        axes.set_ylim(-9.2, 9.2)
        axes.set_yticks(range(-8, 9, 2), [str(abs(b)) for b in range(-8, 9, 2)])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("← activation bits      weight bits →", fontsize=8)
        axes.grid(axis="y", color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
        _name_layers(axes, names, across)
    figure.suptitle(title or f"{graph.model_id}: bits per layer", fontsize=11)
    _policy_legend(figure, bool(fixed))
    _save(figure, path)


def _bar(axes: Axes, x: int, bits: int, sign: int, colour: str, fixed: bool) -> None:
    """Draw one bar with its number; "float" stands in place of a bar."""
    height = 0 if bits == FLOAT_BITS else bits
    style: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "alpha": 0.55} if fixed else {}
    axes.bar(x, sign * height, width=0.82, color=colour, linewidth=0, **style)
    axes.annotate(
        str(bits) if height else "float",
        (x, sign * height),
        xytext=(0, 2 * sign),
        textcoords="offset points",
        ha="center",
        va="bottom" if sign > 0 else "top",
        fontsize=7,
        rotation=0 if height else 90,
    )


def _policy_legend(figure: Figure, fixed: bool) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=WEIGHT, label="weights"), Patch(color=ACTIVATION, label="activations")]
    if fixed:
        handles.append(Patch(facecolor="0.6", edgecolor="white", hatch="////", label="pinned, not searched"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def plot_pareto(
    results: Mapping[str, Sequence[SearchResult]], path: str | Path, *, x: str = "bitops", title: str | None = None
) -> None:
    """Plot Pareto fronts: the sum of the layers' scores over one limit.

    Args:
        results: `{name of the line: what HubMPQ.pareto returned}`.
        path: The file to write: `.png`, `.svg` or `.pdf`. Its folder is created.
        x: Name of the limit on the horizontal axis.
        title: Title of the plot; None for a default.

    Raises:
        HubMPQError: matplotlib is not installed, or the file cannot be written.
        InvalidArgument: There are no results, the limit is unknown, or the suffix is not supported.

    Example:
        >>> from hub_mpq import Policy, SearchResult
        >>> from hub_mpq.core import Usage
        >>> from hub_mpq.plot import plot_pareto
        >>> front = [
        ...     SearchResult(Policy({}, ""), Usage({"bitops": 1e9 * i}), "optimal", 1 / i, 1 / i, 0.0, 0.0, "limpq")
        ...     for i in (1, 2, 3)
        ... ]
        >>> plot_pareto({"toy": front}, "front.png")
    """
    limit = limits.get(x)
    if not any(results.values()):
        raise InvalidArgument("results must hold at least one point to plot")
    from matplotlib.ticker import EngFormatter

    figure = _figure(path, 6.5, 4.4)
    axes = figure.subplots()
    for name, front in results.items():
        ordered = sorted(front, key=lambda r: r.usage[x])
        xs, ys = [r.usage[x] for r in ordered], [r.objective for r in ordered]
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.2, label=name)
    drawn = [result.objective for front in results.values() for result in front]
    if min(drawn) > 0 and max(drawn) > 100 * min(drawn):
        axes.set_yscale("log")
    axes.set(xlabel=limit.label, ylabel="sum of the layers' scores (lower is better)")
    if limit.whole_numbers or limit.unit:
        axes.xaxis.set_major_formatter(EngFormatter(unit=limit.unit))
    axes.grid(color="0.88", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(results) > 1:
        axes.legend(frameon=False)
    alone = f"{next(iter(results))}: " if len(results) == 1 else ""
    figure.suptitle(title or f"{alone}the best policy at each budget", fontsize=11)
    _save(figure, path)


def plot_indicators(indicators: Indicators, path: str | Path, *, title: str | None = None) -> None:
    """Plot the indicator of each layer on a log axis, one line for each bit-width.

    Weight indicators are above, activation indicators are below.

    Args:
        indicators: Scores that have one value for each operand and bit-width, as LIMPQ's.
        path: The file to write: `.png`, `.svg` or `.pdf`. Its folder is created.
        title: Title of the plot; None for a default.

    Raises:
        HubMPQError: matplotlib is not installed, or the file cannot be written.
        InvalidArgument: There are no weight indicators, or the suffix is not supported.

    Example:
        >>> from hub_mpq import Indicators
        >>> from hub_mpq.plot import plot_indicators
        >>> found = Indicators({"conv": {2: 0.3, 4: 0.1}, "fc": {2: 0.2, 4: 0.05}}, {"conv": {2: 0.1, 4: 0.02}})
        >>> plot_indicators(found, "indicators.png")
    """
    names = list(indicators.weight)
    if not names:
        raise InvalidArgument("indicators must have values for at least one layer")
    rows = _rows(names)
    across = len(rows[0])
    figure = _figure(path, _width(across), 1.0 + 5.6 * len(rows))
    panels = figure.subplots(2 * len(rows), 1, squeeze=False)[:, 0]
    for i, shown in enumerate(rows):
        for axes, which in zip(panels[2 * i : 2 * i + 2], ("weight", "activation"), strict=True):
            _scales(axes, getattr(indicators, which), shown)
            axes.set_ylabel(f"{which} indicator", fontsize=8)
            _name_layers(axes, shown if which == "activation" else [""] * len(shown), across)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False, fontsize=8
    )
    figure.suptitle(title or "indicators: larger values mean that a layer needs more bits", fontsize=11)
    _save(figure, path)


def _scales(axes: Axes, table: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> None:
    """Draw one line for each bit-width over the layers that have it."""
    from matplotlib import colormaps
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    widths = sorted({bits for row in table.values() for bits in row})
    for i, bits in enumerate(widths):
        points = [(x, table[name][bits]) for x, name in enumerate(names) if bits in table.get(name, {})]
        colour = colormaps["viridis"](0.9 * i / max(len(widths) - 1, 1))
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        axes.plot(xs, ys, marker="o", markersize=3.5, linewidth=0.9, color=colour, label=f"{bits} bits")
    axes.set_yscale("log")
    top = max((v for row in table.values() for v in row.values()), default=1.0)
    low = max(axes.get_ylim()[0], top * 1e-9)
    axes.set_ylim(bottom=low)  # layers that hardly change the loss may leave the axis at the bottom
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if top < 1000 * low else (1.0,), numticks=20))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="both", color="0.9", linewidth=0.5)
