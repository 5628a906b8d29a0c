"""What is known of the float model a packed one was made from: its name on the Hub, licence and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pack import Manifest
from .remote import hub_api, repo_of

_TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
}


@dataclass(frozen=True)
class Origin:
    """None where it is not known. `architecture`: the class that transformers builds."""

    base_model: str | None
    license: str | None
    pipeline_tag: str | None
    architecture: str | None


def origin_of(
    manifest: Manifest, config: Mapping[str, Any], base_model: str | None, token: str | bool | None = None
) -> Origin:
    """From the config, timm's registry and, where it can be had, the base model's own card."""
    names = config.get("architectures") or [None]
    architecture = names[0] if isinstance(names, list) and isinstance(names[0], str) else None
    base = base_model or _hub_id(manifest)
    card = _base_card(base or manifest.base_model, manifest.revision, token)
    tag = card.get("pipeline_tag")
    if manifest.library == "timm" and tag is None and config.get("num_classes"):
        tag = "image-classification"
    if tag is None and architecture is not None:
        tag = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    license = card.get("license") or (config.get("pretrained_cfg") or {}).get("license")
    return Origin(base, license if isinstance(license, str) else None, tag, architecture)


def local_card(folder: Path | None) -> dict[str, str]:
    """Licence and task that the card in the folder a model was loaded from names; {} where there is none."""
    card = None if folder is None else folder / "README.md"
    found = _front_matter(card) if card is not None and card.is_file() else {}
    return {key: found[key] for key in ("license", "pipeline_tag") if isinstance(found.get(key), str)}


def _hub_id(manifest: Manifest) -> str | None:
    """The base model's Hub id: what a timm name stands for, or the id itself."""
    name = manifest.base_model
    if manifest.library == "module":
        return None
    if (found := repo_of(name)) is not None:
        return found[0]
    if manifest.library != "timm" or Path(name).exists():
        return None
    import timm

    known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    hub_id = known.hf_hub_id if known is not None else None
    return str(hub_id) if hub_id and not str(hub_id).endswith("/") else None


def _base_card(base: str, revision: str | None, token: str | bool | None) -> Mapping[str, Any]:
    """Front matter of the base model's card; empty when there is none or it can't be had."""
    found = repo_of(base)
    if found is None and not base.startswith("timm/"):
        return {}
    try:
        path = hub_api(token).hf_hub_download(found[0] if found else base, "README.md", revision=revision)
    except Exception:  # whatever it is: a card of others must not stop a push
        return {}
    return _front_matter(Path(path))


def _front_matter(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return dict(found.data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:
        return {}
