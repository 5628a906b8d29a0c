"""Two chapters of the card: how to load the model, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import FLOAT_BITS, human
from ..core.files import INDICATORS, PACKED
from ..export.compressed_tensors import FORMAT, exportable, unequal_inputs
from ..pack import Manifest

_TIMM = "AutoModelForImageClassification"


def code(text: object) -> str:
    """One line of text for a card: names come from models of others and must not write its markdown."""
    return " ".join(str(text).replace("`", "'").replace("|", "/").replace("<", "‹").split())


def own_name(model_id: str) -> str:
    """A folder's name without its path, which says more about the author's disk than about the model."""
    return Path(model_id).name if Path(model_id).is_absolute() or model_id.startswith((".", "~")) else model_id


def loading(
    repo_id: str, manifest: Manifest, nbytes: Mapping[str, int], architecture: str | None, base_model: str | None
) -> str:
    """Three lines for each audience that the repo serves."""
    if PACKED not in nbytes:
        return _compressed(repo_id, manifest, nbytes, architecture)
    own = manifest.library == "module"
    parts = [
        _block(
            f"With hub-mpq (packed weights, {human(nbytes[PACKED])}B):",
            "from hub_mpq import HubMPQ",
            f'model = HubMPQ.from_pretrained("{repo_id}"{", module=net" if own else ""})',
            "y = model(x)",
        )
    ]
    if own:
        parts.append("`net` is the network itself, built from its own code: no hub library can build it.")
    cls = architecture or "AutoModel"
    if not own:
        by, auto = (
            ("transformers", cls) if manifest.library == "transformers" else ("transformers (TimmWrapper)", _TIMM)
        )
        parts.append(
            _block(
                f"With {by} and hub-mpq (packed weights):",
                "import hub_mpq, transformers",
                f'model = transformers.{auto}.from_pretrained("{repo_id}")',
            )
        )
    if "model.safetensors" in nbytes and not own:
        plain = (
            ("import timm", f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True)')
            if manifest.library == "timm"
            else ("import transformers", f'model = transformers.{cls}.from_pretrained("{repo_id}")')
        )
        parts.append(_block(f"With {manifest.library} alone (the float copy, weights dequantized):", *plain))
    elif not own:
        parts.append(
            f"Without hub-mpq it does not load: {manifest.library} alone finds no weights here and says so. "
            "Never take a model whose weights were newly initialised."
        )
    if INDICATORS in nbytes:
        again = (
            f'HubMPQ.from_pretrained("{code(base_model or own_name(manifest.base_model))}")'
            if not own
            else "HubMPQ.from_module(net, x)"
        )
        parts.append(
            _block(
                "Another budget at once, with the indicators stored here:",
                f'indicators = HubMPQ.from_pretrained("{repo_id}"{", module=net" if own else ""}).indicators',
                f'model = {again}.quantize(bitops="W3A3", indicators=indicators, train=loader)',
            )
        )
    if exportable(manifest):
        parts.append(
            "Weights alone are quantized, in Linear and Embedding layers: "
            f'`push_to_hub(…, format="{FORMAT}")` publishes this policy so that transformers loads it without hub-mpq.'
        )
    return "\n\n".join(parts)


def _compressed(repo_id: str, manifest: Manifest, nbytes: Mapping[str, int], architecture: str | None) -> str:
    """A repo in compressed-tensors' form: nobody needs hub-mpq."""
    parts = [
        _block(
            f"With transformers and compressed-tensors ({human(nbytes['model.safetensors'])}B; hub-mpq is not needed):",
            "import transformers  # pip install transformers compressed-tensors",
            f'model = transformers.{architecture or "AutoModel"}.from_pretrained("{repo_id}")',
        )
    ]
    widths = {bits.weight for bits in manifest.policy.bits.values()} - {FLOAT_BITS}
    if len({max(width, 2) for width in widths}) > 1:
        parts.append(
            "Do not pass `dequantize=True`: transformers 5.23 then reads all layers at one width, and the weights are "
            "wrong without a word."
        )
    unequal = unequal_inputs(manifest)
    parts.append(
        "vLLM computes layers that read one input as one matrix and needs one width for them, which "
        + (f"{len(unequal)} groups here do not have: it cannot load this repo." if unequal else "they have here.")
        + " No load by vLLM was tried."
    )
    if any(layer.kind == "embedding" for layer in manifest.graph):
        parts.append(
            "Embeddings lie on their quantized grid and are stored in float: transformers reads no packed ones."
        )
    return "\n\n".join(parts)


def _block(title: str, *lines: str) -> str:
    rows = [row for line in lines for row in ((line, "") if line.startswith(("import ", "from ")) else (line,))]
    return "\n".join([title, "", "```python", *rows, "```"])


def making(
    manifest: Manifest,
    base_model: str | None,
    indicators: Mapping[str, Any],
    trained_on: str | None,
    seconds: Mapping[str, float],
) -> str:
    """What is recorded, and no more: tool, base revision, indicators, search and its proof, fine-tuning, seconds."""
    provenance = manifest.provenance
    rows: list[tuple[str, object]] = [("tool", f"hub-mpq {provenance.get('hub_mpq', '')}".strip())]
    rows.append(
        (
            "float model",
            (base_model or own_name(manifest.base_model)) + (f" at {manifest.revision}" if manifest.revision else ""),
        )
    )
    if trained_on:
        rows.append(("trained on", trained_on))
    stages = {"indicators": indicators, **{k: provenance[k] for k in ("search", "finetune") if k in provenance}}
    for title, tree in stages.items():
        rows += [(f"{title}: {key}", _plain(value)) for key, value in tree.items() if _short(value)]
    rows += [(f"seconds: {key}", f"{value:.3g}") for key, value in seconds.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {code(k)} | {code(v)} |" for k, v in rows)])


def _short(value: object) -> bool:
    return isinstance(value, (str, int, float)) and len(str(value)) <= 120


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
