"""hub-mpq inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..core import Usage
from ..core.files import PACKED
from ..core.limit import show_amount
from ..report import report, table
from . import models, show
from . import options as o

if TYPE_CHECKING:
    from ..pack import Manifest


def inspect(
    model: o.Model,
    loading: Annotated[
        o.ModelOptions,
        o.Group(only=("library", "revision", "input_size", "model_arg", "pin", "exclude", "target", "per_expert")),
    ],
    as_json: o.Json = False,
) -> None:
    """Show a model's layers, their costs, and what stays float and why.

    Loads no weights; timm names need no network.

    For a packed model, local or published, only the header of its file is read.
    """
    if (found := _header(model, loading.revision)) is not None:
        from ..hub.pull import refuse_choices

        of = loading.pin, loading.exclude, loading.target, loading.per_expert
        refuse_choices(model, **dict(zip(("--pin", "--exclude", "--target", "--per-expert"), of, strict=True)))
        return _packed(*found, as_json)
    mpq = models.load(model, loading, meta=True)
    levels = {level: dict(mpq.usage(level).amounts) for level in ("W8A8", "W4A4", "W2A2") if mpq.graph.searched}
    tree = {**_graph(mpq.graph), "levels": levels}
    parts = [mpq.report()]
    if amounts := levels.get("W4A4"):
        rows = [[level, *map(show_amount, found, found.values())] for level, found in levels.items()]
        parts.append(f"whole model, all searched layers at one level:\n{table(['level', *amounts], rows)}")
    show.emit(as_json, tree, "\n\n".join(parts))


def _header(model: str, revision: str | None) -> tuple[Manifest, int] | None:
    """(manifest, bytes) of a packed file; None for a float model."""
    if models.is_packed(model):
        from ..pack import read_manifest

        path = Path(model) / PACKED
        return read_manifest(path), path.stat().st_size
    if Path(model).exists() or ("/" not in model):
        return None  # without importing the Hub client
    from ..hub.pull import remote_manifest
    from ..hub.remote import repo_of

    found = repo_of(model)
    return None if found is None else remote_manifest(found[0], revision=revision or found[1])


def _packed(manifest: Manifest, nbytes: int, as_json: bool) -> None:
    """From the packed file's header alone."""
    from ..search.policy_search import usage_of

    amounts: dict[str, float] = dict(usage_of(manifest.graph, manifest.policy, None, 0).amounts)
    amounts["size"] = nbytes
    metrics = manifest.provenance.get("metrics", {})
    tree = {
        **_graph(manifest.graph),
        "policy": manifest.policy.to_dict(),
        "usage": amounts,
        "provenance": manifest.provenance,
    }
    text = report(manifest.graph, manifest.policy, None, metrics, {})
    show.emit(as_json, tree, f"{text}\n{Usage(amounts)}")


def _graph(graph: Any) -> dict[str, Any]:
    """The graph as JSON values, with its total MACs."""
    tree = graph.to_dict()
    macs = sum(layer.macs for layer in graph)
    return {**tree, "macs": macs + sum(op.macs for op in graph.floats), "quantized_macs": macs}
