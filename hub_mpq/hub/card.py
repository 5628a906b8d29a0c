"""The model card: what was measured, what it costs, how to load it, how it was made. Nothing that is not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import FLOAT_BITS, LayerBits, Policy, human
from ..core.files import PACKED
from ..cost.size import layer_nbytes
from ..export.compressed_tensors import FORMAT
from ..pack import Manifest
from ..search.policy_search import usage_of
from .card_text import code, loading, making, own_name

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("card_template.md")
MEASURES = {
    "top1": ("accuracy", "top-1 (%)"),
    "top5": ("accuracy", "top-5 (%)"),
    "perplexity": ("perplexity", "perplexity"),
    "loss": ("loss", "loss"),
    "fidelity_db": ("snr", "signal to noise against the float model (dB)"),
    "agreement": ("agreement", "same answer as the float model (%)"),
    "spearman": ("spearmanr", "Spearman correlation (×100)"),
}
"""{key of evaluate: (type in the front matter, column of the table)}; another key stands for itself."""


@dataclass(frozen=True)
class CardFacts:
    """What the packed file does not say. None and () where it is not known: it is then left out.

    `nbytes`: {file name: bytes} of what is published. `license`, `base_model`: of the float model, as Hub ids go.
    `dataset`: what the figures were measured on. `eval_task`: its task, where it is a benchmark of the Hub.
    `trained_on`: the data of indicators and fine-tuning.
    `picture`: name of the policy picture. `indicators`: provenance of the indicators. `seconds`: of each stage.
    """

    nbytes: Mapping[str, int]
    license: str | None = None
    base_model: str | None = None
    pipeline_tag: str | None = None
    dataset: str | None = None
    eval_task: str | None = None
    trained_on: str | None = None
    picture: str | None = None
    architecture: str | None = None
    indicators: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def render_card(repo_id: str, manifest: Manifest, facts: CardFacts) -> str:
    """README.md of a published model, front matter included."""
    from huggingface_hub import ModelCard

    graph = manifest.graph
    bits = sorted({b.weight for b in manifest.policy.bits.values()})
    acts = sorted({b.activation for b in manifest.policy.bits.values()} - {FLOAT_BITS})
    inputs = f"inputs of layers at {_list(acts)} bits" if acts else "inputs of layers in float"
    base = f"[`{facts.base_model}`](/{facts.base_model})" if facts.base_model else f"`{code(own_name(graph.model_id))}`"
    intro = f"{base} in mixed precision: {len(graph)} layers with weights at {_list(bits)} bits, {inputs}."
    floats = [f"- `{code(op.name)}` ({code(op.kind)}): {code(op.reason)}" for op in graph.floats]
    card = ModelCard.from_template(
        card_data=_front_matter(repo_id, manifest, facts),
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        intro=intro,
        picture=facts.picture or "",
        rows=_figures(manifest, facts),
        notes=_notes(manifest, facts),
        loading=loading(repo_id, manifest, facts.nbytes, facts.architecture, facts.base_model),
        making=making(manifest, facts.base_model, facts.indicators, facts.trained_on, facts.seconds),
        limits="\n".join(floats),
    )
    return str(card)


def eval_results(manifest: Manifest, facts: CardFacts) -> bytes | None:
    """Content of .eval_results/hub-mpq.yaml; None unless a benchmark of the Hub was named and measured."""
    figures = manifest.provenance.get("metrics", {}).get("quantized", {})
    first = next((key for key in MEASURES if key in figures), None)
    if first is None or facts.dataset is None or facts.eval_task is None:
        return None
    import yaml

    entry = {"dataset": {"id": facts.dataset, "task_id": facts.eval_task}, "value": figures[first]}
    text: str = yaml.safe_dump([{**entry, "notes": f"{MEASURES[first][1]}, quantized model"}], sort_keys=False)
    return text.encode()


def _front_matter(repo_id: str, manifest: Manifest, facts: CardFacts) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    figures = manifest.provenance.get("metrics", {}).get("quantized", {})
    results = None
    if facts.dataset is not None and facts.pipeline_tag is not None and figures:
        results = [
            EvalResult(
                task_type=facts.pipeline_tag,
                dataset_type=facts.dataset,
                dataset_name=facts.dataset.rpartition("/")[2],
                metric_type=MEASURES.get(key, (key, key))[0],
                metric_name=MEASURES.get(key, (key, key))[1],
                metric_value=value,
            )
            for key, value in figures.items()
            if key != "samples"
        ]
    known: dict[str, Any] = {
        "license": facts.license,
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else None,
        "pipeline_tag": facts.pipeline_tag,
        "datasets": [facts.trained_on] if facts.trained_on and "/" in facts.trained_on else None,
        "eval_results": results,
        "model_name": repo_id.rpartition("/")[2] if results else None,
    }
    compressed = PACKED not in facts.nbytes
    tags = ["mixed-precision", "quantization", *([FORMAT] if compressed else [])]
    return ModelCardData(
        library_name="transformers" if compressed else "hub-mpq",  # whose code loads it
        tags=[*tags, *([manifest.library] if manifest.library != "module" else [])],
        **{key: value for key, value in known.items() if value},
    )


def _figures(manifest: Manifest, facts: CardFacts) -> str:
    """One row a model that was measured; BitOps and bytes are computed, and of the packed file counted."""
    metrics: Mapping[str, Mapping[str, float]] = manifest.provenance.get("metrics", {})
    keys = [k for k in dict.fromkeys(k for row in metrics.values() for k in row) if k != "samples"]
    rows = []
    levels = [name for name in metrics if name not in ("float", "quantized", "float copy")]
    last = [name for name in ("float copy",) if name in metrics]
    for name in ["float", *levels, "quantized", *last]:
        cells = _costs(name, manifest, facts)
        label = "mixed precision (this repo)" if name == "quantized" else name
        rows.append([label, *cells, *(f"{metrics[name][k]:.4g}" if k in metrics.get(name, {}) else "" for k in keys)])
    head = ["", "BitOps", "weights on disk", *(MEASURES.get(k, (k, k))[1] for k in keys)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(name: str, manifest: Manifest, facts: CardFacts) -> list[str]:
    graph = manifest.graph
    if name == "quantized":
        policy, nbytes = manifest.policy, f"{human(facts.nbytes.get(PACKED) or facts.nbytes['model.safetensors'])}B"
    elif name == "float copy":
        return ["", f"{human(facts.nbytes['model.safetensors'])}B" if "model.safetensors" in facts.nbytes else ""]
    elif name == "float":
        policy = Policy({layer.name: LayerBits(32, 32) for layer in graph}, graph.digest)
        owned = sum(layer.weight_count for layer in graph if layer.weight_owner is None)
        nbytes = f"{human(4 * owned + graph.other_bytes)}B"
    else:  # "uniform W4A4"
        try:
            policy = Policy.uniform(graph, name.rpartition(" ")[2])
        except ValueError:
            return ["", ""]
        nbytes = ""
        own = manifest.policy.bits
        if PACKED in facts.nbytes and all(_floats(own[n]) == _floats(policy.bits[n]) for n in own):
            # the same tensors: a header as long
            size = sum(layer_nbytes(x, policy.bits[x.name]) - layer_nbytes(x, own[x.name]) for x in graph)
            nbytes = f"{human(facts.nbytes[PACKED] + size)}B"
    return [human(usage_of(graph, policy, None, 0)["bitops"]), nbytes]


def _floats(bits: LayerBits) -> tuple[bool, bool]:
    return bits.weight == FLOAT_BITS, bits.activation == FLOAT_BITS


def _notes(manifest: Manifest, facts: CardFacts) -> str:
    metrics = manifest.provenance.get("metrics", {})
    samples = {int(row["samples"]) for row in metrics.values() if "samples" in row}
    out = []
    if metrics:
        where = f" of `{code(facts.dataset)}`" if facts.dataset else ""
        out.append(f"Measured on {_list(sorted(samples))} samples{where}." if samples else "")
    if {"model.safetensors", PACKED} <= set(facts.nbytes):
        out.append("`model.safetensors` holds the same weights in float, and inputs of layers are not quantized there:")
        out.append("its figures are its own." if "float copy" in metrics else "it was not measured by itself.")
    return " ".join(part for part in out if part)


def _list(values: list[int]) -> str:
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "no"
