"""Pictures of policies, fronts and indicators, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HubMPQError, InvalidArgument
from .spec import FLOAT_BITS, Indicators, LayerGraph, Policy, SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WEIGHT, ACTIVATION = "#1f4e79", "#e08214"
_UNITS = {
    "bitops": (1e9, "BitOps of the whole model (G)"),
    "size": (1e6, "packed file (MB)"),
    "activation_memory": (1e3, "quantized activations of one sample (KB)"),
    "weight_bits": (1.0, "mean bits of the searched weights"),
}


def check_plot(path: str | Path) -> None:
    """Raise HubMPQError when matplotlib is missing, InvalidArgument when `path` is no picture."""
    if find_spec("matplotlib") is None:
        raise HubMPQError("pictures need matplotlib: pip install 'hub-mpq[report]'")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InvalidArgument(f"a picture is a .png, .svg or .pdf file, not {str(path)!r}")


def _figure(path: str | Path, width: float, height: float) -> Figure:
    check_plot(path)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise HubMPQError(f"{path} cannot be written: {error}") from error


def plot_policy(graph: LayerGraph, policy: Policy, path: str | Path, *, title: str | None = None) -> None:
    """Bits per layer in the order the layers run: weights upwards, activations downwards; fixed layers hatched."""
    policy.check(graph)
    names = [layer.name for layer in graph]
    fixed = [layer.fixed is not None for layer in graph]
    count = len(names)
    figure = _figure(path, min(max(6.5, 1.6 + 0.22 * count), 24), 5.2)
    axes = figure.subplots()
    for side, colour, sign in (("weight", WEIGHT, 1), ("activation", ACTIVATION, -1)):
        bits = [getattr(policy.bits[name], side) for name in names]
        drawn = [0 if b == FLOAT_BITS else b for b in bits]
        bars = axes.bar(range(count), [sign * b for b in drawn], width=0.82, color=colour, linewidth=0)
        for bar, pinned, b in zip(bars, fixed, bits, strict=True):
            if pinned:
                bar.set(hatch="////", edgecolor="white", alpha=0.55)
            if count <= 80:
                text = "float" if b == FLOAT_BITS else str(b)
                x, y = bar.get_x() + bar.get_width() / 2, sign * (0 if b == FLOAT_BITS else b)
                axes.annotate(
                    text,
                    (x, y),
                    xytext=(0, 2 * sign),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if sign > 0 else "top",
                    fontsize=7,
                    rotation=90 if b == FLOAT_BITS else 0,
                )
    _policy_axes(axes, names)
    axes.set_title(title or f"{graph.model_id}: bits per layer", loc="left")
    _policy_legend(figure, any(fixed))
    _save(figure, path)


def _policy_axes(axes: Axes, names: Sequence[str]) -> None:
    top = 9
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(-top, top))
    axes.set_yticks(range(-8, 9, 2), [str(abs(b)) for b in range(-8, 9, 2)])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("← activation bits      weight bits →")
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # a name for every bar as long as names can be read; then every k-th
    every = -(-len(names) // 110)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7 if len(names) <= 60 else 5.5)


def _policy_legend(figure: Figure, fixed: bool) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=WEIGHT, label="weights"), Patch(color=ACTIVATION, label="activations")]
    if fixed:
        handles.append(Patch(facecolor="0.6", edgecolor="white", hatch="////", label="fixed, not searched"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def plot_pareto(
    results: Mapping[str, Sequence[SearchResult]], path: str | Path, *, x: str = "bitops", title: str | None = None
) -> None:
    """Fronts of proved optima: the limit across, the objective (sum of the layers' scores) upwards, one line a name."""
    if x not in _UNITS:
        raise InvalidArgument(f"a front runs over {', '.join(sorted(_UNITS))}, not {x!r}")
    if not any(results.values()):
        raise InvalidArgument("there is no point to draw")
    scale, label = _UNITS[x]
    figure = _figure(path, 6.5, 4.4)
    axes = figure.subplots()
    for name, front in results.items():
        ordered = sorted(front, key=lambda r: r.usage[x])
        xs, ys = [r.usage[x] / scale for r in ordered], [r.objective for r in ordered]
        axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.2, label=name)
    axes.set(xlabel=label, ylabel="objective (lower: less is lost)")
    axes.grid(color="0.88", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(results) > 1:
        axes.legend(frameon=False)
    axes.set_title(title or "best policy at each budget", loc="left")
    _save(figure, path)


def plot_indicators(indicators: Indicators, path: str | Path, *, title: str | None = None) -> None:
    """Learned scales per layer, one line a width, on a log axis: weights above, activations below."""
    names = list(indicators.weight)
    if not names:
        raise InvalidArgument("the indicators name no layer")
    from matplotlib import colormaps

    widths = sorted({b for row in (*indicators.weight.values(), *indicators.activation.values()) for b in row})
    colours = colormaps["viridis"]
    figure = _figure(path, min(max(6.5, 1.6 + 0.22 * len(names)), 24), 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, table, what in ((upper, indicators.weight, "weight"), (lower, indicators.activation, "activation")):
        for i, bits in enumerate(widths):
            points = [(k, table[n][bits]) for k, n in enumerate(names) if bits in table.get(n, {})]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3.5,
                    linewidth=0.9,
                    color=colours(0.9 * i / max(len(widths) - 1, 1)),
                    label=f"{bits} bits",
                )
        axes.set(yscale="log", ylabel=f"{what} scale")
        axes.grid(axis="y", which="both", color="0.9", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    every = -(-len(names) // 110)
    lower.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=7 if len(names) <= 60 else 5.5)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    upper.set_title(title or "indicators: a larger scale, a layer that needs more bits", loc="left")
    _save(figure, path)
