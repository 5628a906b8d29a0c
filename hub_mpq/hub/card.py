"""The model card: what was measured, what it costs, how to load it and how it was made; only what is known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..core import FLOAT_BITS, LayerBits, Policy, human
from ..core.files import FLOAT_COPY, INDICATORS, PACKED
from ..core.library import libraries
from ..cost.size import layer_nbytes
from ..errors import shown
from ..export import COMPRESSED_TENSORS, exportable, llm_compressor_recipe, unequal_inputs, unread_inputs
from ..pack import Manifest
from ..search.policy_search import usage_of
from .origin import OWN_WEIGHTS

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("card_template.md")
MEASURES = {
    "top1": ("accuracy", "top-1 (%)"),
    "top5": ("accuracy", "top-5 (%)"),
    "accuracy": ("accuracy", "accuracy (%)"),
    "f1": ("f1", "F1 (%)"),
    "mean_iou": ("mean_iou", "mean IoU (%)"),
    "exact_match": ("exact_match", "exact match (%)"),
    "map": ("mean_average_precision", "mAP (%)"),
    "map_50": ("mean_average_precision_50", "mAP at IoU 0.5 (%)"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "r2": ("r_squared", "R²"),
    "mse": ("mse", "mean squared error"),
    "mae": ("mae", "mean absolute error"),
    "perplexity": ("perplexity", "perplexity"),
    "loss": ("loss", "loss"),
    "fidelity_db": ("snr", "signal-to-noise ratio against the float model (dB)"),
    "kl": ("kl_divergence", "KL divergence from the float model"),
    "agreement": ("agreement", "agreement with the float model (%)"),
    "spearman": ("spearmanr", "Spearman correlation (×100)"),
}
"""{key of evaluate: (type in the front matter, column of the table)}; other keys are used directly."""

NO_MEASURE = ("task", "samples")
"""Keys of evaluate that are not metrics."""


@dataclass(frozen=True)
class CardFacts:
    """Facts for the card that the packed file does not hold; unknown ones (None, empty) are omitted.

    Args:
        nbytes: `{file name: bytes}` of the published files.
        license: Licence of the float model, as the Hub names it.
        base_model: Hub id of the float model.
        pipeline_tag: Pipeline tag of the model.
        dataset: What the figures were measured on.
        eval_task: Task of that dataset, if it is a benchmark on the Hub.
        trained_on: Training data of indicators and fine-tuning.
        picture: File name of the policy plot.
        config: Content of config.json.
        indicators: Provenance of the indicators.
        seconds: `{stage: wall time}`.
    """

    nbytes: Mapping[str, int]
    license: str | None = None
    base_model: str | None = None
    pipeline_tag: str | None = None
    dataset: str | None = None
    eval_task: str | None = None
    trained_on: str | None = None
    picture: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    indicators: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def code(text: object) -> str:
    """One line of text between backticks; names come from untrusted models and must not write the card's Markdown."""
    return shown(" ".join(str(text).replace("`", "'").replace("|", "/").replace("<", "‹").split()))


def prose(text: object) -> str:
    """One line of text that the card shows literally, whatever Markdown or HTML it contains."""
    return _SPECIAL.sub(r"\\\g<0>", shown(text)).replace("<", "&lt;")


_SPECIAL = re.compile(r"[\\`*\[\]|~]")


def own_name(model_id: str) -> str:
    """A folder's name without its path, which would reveal the author's disk."""
    return Path(model_id).name if Path(model_id).is_absolute() or model_id.startswith((".", "~")) else model_id


def render_card(repo_id: str, manifest: Manifest, facts: CardFacts) -> str:
    """README.md of a published model, with front matter."""
    from huggingface_hub import ModelCard

    graph = manifest.graph
    bits = sorted({b.weight for b in manifest.policy.bits.values()})
    acts = sorted({b.activation for b in manifest.policy.bits.values()} - {FLOAT_BITS})
    inputs = f"inputs at {_list(acts)} bits" if acts else "inputs in float"
    base = (
        f"[`{code(facts.base_model)}`](/{quote(facts.base_model)})"
        if facts.base_model
        else f"`{code(own_name(graph.model_id))}`"
    )
    intro = f"{base} in mixed precision: {len(graph)} layers with weights at {_list(bits)} bits and {inputs}."
    floats = [f"- `{code(op.name)}` ({prose(op.kind)}): {prose(op.reason)}" for op in graph.floats]
    card = ModelCard.from_template(
        card_data=_front_matter(repo_id, manifest, facts),
        template_path=str(TEMPLATE),
        title=repo_id.rpartition("/")[2],
        intro=intro,
        picture=facts.picture or "",
        rows=_figures(manifest, facts),
        notes=_notes(manifest, facts),
        loading=_loading(repo_id, manifest, facts),
        making=_making(manifest, facts),
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
                dataset_type=shown(facts.dataset),
                dataset_name=shown(facts.dataset.rpartition("/")[2]),
                metric_type=MEASURES[key][0] if key in MEASURES else shown(key),
                metric_name=MEASURES[key][1] if key in MEASURES else shown(key),
                metric_value=value,
            )
            for key, value in figures.items()
            if key not in NO_MEASURE and not isinstance(value, str)
        ]
    known: dict[str, Any] = {
        "license": facts.license,
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else None,
        "pipeline_tag": facts.pipeline_tag,
        "datasets": [shown(facts.trained_on)] if facts.trained_on and "/" in facts.trained_on else None,
        "eval_results": results,
        "model_name": repo_id.rpartition("/")[2] if results else None,
    }
    compressed = PACKED not in facts.nbytes
    tags = ["mixed-precision", "quantization", *([COMPRESSED_TENSORS] if compressed else [])]
    if libraries.get(manifest.library).builds_from_folder:
        tags.append(manifest.library)
    return ModelCardData(
        library_name=manifest.library if compressed else "hub-mpq",  # whose code loads it
        tags=tags,
        **{key: shown(value) if isinstance(value, str) else value for key, value in known.items() if value},
    )


def _figures(manifest: Manifest, facts: CardFacts) -> str:
    """One row per measured model; BitOps and bytes are computed, bytes of the packed file counted."""
    metrics: Mapping[str, Mapping[str, Any]] = manifest.provenance.get("metrics", {})
    keys = [k for k in dict.fromkeys(k for row in metrics.values() for k in row) if k not in NO_MEASURE]
    rows = []
    levels = [name for name in metrics if name not in ("float", "quantized", "float copy")]
    last = [name for name in ("float copy",) if name in metrics]
    for name in ["float", *levels, "quantized", *last]:
        cells = _costs(name, manifest, facts)
        label = "mixed precision (this repo)" if name == "quantized" else prose(name)
        found = metrics.get(name, {})
        rows.append([label, *cells, *(prose(_figure(found[k])) if k in found else "" for k in keys)])
    head = ["", "BitOps", "weights on disk", *(MEASURES[k][1] if k in MEASURES else prose(k) for k in keys)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _costs(name: str, manifest: Manifest, facts: CardFacts) -> list[str]:
    graph = manifest.graph
    if name == "quantized":
        policy, nbytes = manifest.policy, f"{human(facts.nbytes.get(PACKED) or facts.nbytes['model.safetensors'])}B"
    elif name == "float copy":
        return ["", f"{human(facts.nbytes['model.safetensors'])}B" if FLOAT_COPY in facts.nbytes else ""]
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
            # the same tensors, so the header has the same length
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
        as_tasks = sorted({prose(row["task"]) for row in metrics.values() if "task" in row})
        how = f" (task: {_list(as_tasks)})" if as_tasks else ""
        out.append(f"Measured on {_list(sorted(samples))} samples{where}{how}." if samples else "")
        out.append("BitOps are multiply-accumulates × weight bits × activation bits, per sample.")
    if {FLOAT_COPY, PACKED} <= set(facts.nbytes):
        measured = "are given separately (row `float copy`)" if "float copy" in metrics else "were not measured"
        out.append("`model.safetensors` holds the same weights in float, with inputs that are not quantized.")
        out.append(f"Its results {measured}.")
    return " ".join(part for part in out if part)


def _list(values: Sequence[int | str]) -> str:
    texts = [str(v) for v in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "no"


def _loading(repo_id: str, manifest: Manifest, facts: CardFacts) -> str:
    """A few lines for each way to load the repo."""
    nbytes, library = facts.nbytes, libraries.get(manifest.library)
    if PACKED not in nbytes:
        return _compressed(library.float_code(repo_id, facts.config), manifest, nbytes)
    needs_net = not library.builds_from_folder
    given = ", module=net" if needs_net else ""
    parts = [
        _block(
            f"With hub-mpq (`pip install hub-mpq`; packed weights, {human(nbytes[PACKED])}B):",
            "from hub_mpq import HubMPQ",
            f'model = HubMPQ.from_pretrained("{repo_id}"{given})',
            *library.input_code(repo_id, tuple(nbytes), manifest.graph.input_shape),
        )
    ]
    if needs_net:
        parts.append("`net` is the network itself, built by its own code; no library on the Hub can build it.")
    if plugin := library.plugin_code(repo_id, facts.config):
        parts.append(_block("With transformers and hub-mpq (packed weights):", *plugin))
    if alone := library.float_code(repo_id, facts.config):
        if FLOAT_COPY in nbytes:
            parts.append(_block(f"With {library.name} alone (float copy with dequantized weights):", *alone))
        else:
            parts.append(
                f"hub-mpq is required: {library.name} alone finds no weights in this repo and reports that. "
                "Do not use a model whose weights were newly initialised."
            )
    if INDICATORS in nbytes and not _has_own_weights(manifest, facts):  # no one else has those
        base = code(facts.base_model or own_name(manifest.base_model)).replace('"', "'")
        again = "HubMPQ.from_module(net, x)" if needs_net else f'HubMPQ.from_pretrained("{base}")'
        parts.append(
            _block(
                "For another budget, quantize the float model with the scores stored here:",
                f'scores = HubMPQ.from_pretrained("{repo_id}"{given}).scores',
                f'model = {again}.quantize(bitops="W3A3", indicators=scores, train=loader)',
            )
        )
    return "\n\n".join(parts)


def _compressed(alone: tuple[str, ...], manifest: Manifest, nbytes: Mapping[str, int]) -> str:
    """Loading a repo in compressed-tensors format, which does not need hub-mpq."""
    imports, *load = alone
    parts = [
        _block(
            f"With transformers and compressed-tensors ({human(nbytes[FLOAT_COPY])}B; hub-mpq is not needed):",
            f"{imports}  # pip install transformers compressed-tensors",
            *load,
        )
    ]
    widths = {bits.weight for bits in manifest.policy.bits.values()} - {FLOAT_BITS}
    if len({max(width, 2) for width in widths}) > 1:
        parts.append(
            "Do not pass `dequantize=True`: transformers 5.23 then reads all layers at one bit-width, and the weights "
            "are silently wrong; inputs stay float."
        )
    unequal = unequal_inputs(manifest)
    parts.append(
        "vLLM fuses layers that read the same input into one matrix, which must have one bit-width. "
        + (f"Here {len(unequal)} groups of layers do not: vLLM cannot load this repo." if unequal else "Here all do.")
        + (f" It cannot load the quantized inputs: {code(why)}." if (why := unread_inputs(manifest)) else "")
        + " Loading with vLLM was not tested."
    )
    if any(layer.kind == "embedding" for layer in manifest.graph):
        parts.append(
            "Embeddings are rounded to their quantized grid but stored in float: transformers cannot read packed ones."
        )
    return "\n\n".join(parts)


def _block(title: str, *lines: str) -> str:
    """Python code below a title, imports first."""
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    rest = [line for line in lines if line not in imports]
    return "\n".join([title, "", "```python", *imports, *([""] if imports else []), *rest, "```"])


def _has_own_weights(manifest: Manifest, facts: CardFacts) -> bool:
    """Whether the float weights are other than published ones, and the author names no base model."""
    return facts.base_model is None and manifest.provenance.get("weights") == OWN_WEIGHTS


def _in_short(indicators: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """One sentence on how the model was made; "" if nothing is recorded."""
    parts = []
    if "strategy" in indicators:
        samples = f" on {prose(indicators['samples'])} samples" if "samples" in indicators else ""
        parts.append(f"layers scored by `{code(str(indicators['strategy']))}`{samples}")
    if budget := provenance.get("search", {}).get("budget"):
        parts.append(f"policy searched for {prose(budget)}")
    if steps := provenance.get("finetune", {}).get("steps"):
        parts.append(f"fine-tuned for {prose(steps)} steps")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _making(manifest: Manifest, facts: CardFacts) -> str:
    """What is recorded: tool, base revision, indicators, search with its proof, fine-tuning, seconds."""
    provenance = manifest.provenance
    base = facts.base_model or own_name(manifest.base_model)
    rows: list[tuple[str, object]] = [("tool", f"hub-mpq {provenance.get('hub_mpq', '')}".strip())]
    if _has_own_weights(manifest, facts):
        rows.append(("float model", f"{base}, with its own weights"))
    else:
        rows.append(("float model", f"{base} at {manifest.revision}" if manifest.revision else base))
    if facts.trained_on:
        rows.append(("trained on", facts.trained_on))
    stages = {"indicators": facts.indicators, **{k: provenance[k] for k in ("search", "finetune") if k in provenance}}
    for title, tree in stages.items():
        rows += [(f"{title}: {key}", _plain(value)) for key, value in tree.items() if _short(value)]
    rows += [(f"runtime {name}", _certificate(tree)) for name, tree in provenance.get("runtimes", {}).items()]
    rows += [(f"seconds: {key}", f"{value:.3g}") for key, value in facts.seconds.items()]
    table = "\n".join(["| | |", "|---|---|", *(f"| {prose(k)} | {prose(v)} |" for k, v in rows)])
    all_of_it = f"<details>\n<summary>All settings</summary>\n\n{table}\n\n</details>"
    made = "\n\n".join(part for part in (_in_short(facts.indicators, provenance), all_of_it) if part)
    if not exportable(manifest):
        return made
    # layer names are untrusted: none of their lines may end the block
    recipe = llm_compressor_recipe(manifest).replace("`", "'")
    told = "The same bit-widths as a recipe for llm-compressor, which uses its own scales and rounding:"
    return "\n\n".join([made, told, f"```yaml\n{recipe}\n```"])


def _certificate(tree: Mapping[str, Any]) -> str:
    """One line about what was measured on a runtime."""
    metrics = tree["metrics"]
    figures = [
        f"{key} {_figure(metrics['runtime'][key])} (reference {_figure(value)})"
        for key, value in metrics["reference"].items()
        if key not in NO_MEASURE and key in metrics["runtime"]
    ]
    return ", ".join(
        [
            "the same model" if tree["exact"] else "not the same model",
            f"{tree['integer layers']} layers in integers and {tree['float layers']} in float",
            f"largest error of a layer {tree['largest error']:.1e}",
            f"fraction of codes one step off {tree['codes one step off']:.1e}",
            f"wrong values {tree['values wrong']}",
            *figures,
            f"on {tree['machine']}",
        ]
    )


def _short(value: object) -> bool:
    return isinstance(value, (str, int, float)) and len(str(value)) <= 120


def _plain(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
