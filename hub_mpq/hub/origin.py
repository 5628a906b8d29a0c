"""The float model that a packed one was made from: its Hub id, licence and task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.library import Library, libraries
from ..pack import Manifest
from .cached import is_foreign_link
from .remote import COMMIT, bounded, hub_api, repo_of

_CARD = 16 << 20
"""Maximum bytes of a card."""

OWN_WEIGHTS = "own"
"""`weights` of the provenance of a model whose float weights are not those that its library or the Hub publishes."""


@dataclass(frozen=True)
class Origin:
    """Hub id, licence and pipeline tag of the float model; None if unknown."""

    base_model: str | None
    license: str | None
    pipeline_tag: str | None


def origin_of(
    manifest: Manifest, config: Mapping[str, Any], base_model: str | None, token: str | bool | None = None
) -> Origin:
    """Read them from the base model's card if it is available, else from its library and config.json.

    A model with its own weights has no base model, and no licence that could be known.
    """
    library = libraries.get(manifest.library)
    if manifest.provenance.get("weights") == OWN_WEIGHTS:
        return Origin(base_model, None, library.card_data(config).get("pipeline_tag"))
    base = base_model or _hub_id(library, manifest.base_model)
    card = _base_card(base or manifest.base_model, manifest.revision, token)
    own = library.card_data(config)
    license = card.get("license") or own.get("license")
    return Origin(
        base, license if isinstance(license, str) else None, card.get("pipeline_tag") or own.get("pipeline_tag")
    )


def local_card(folder: Path | None) -> dict[str, str]:
    """Licence and task from the card in the folder that a model was loaded from; {} without a card."""
    card = None if folder is None else folder / "README.md"
    if card is not None and is_foreign_link(card):
        warnings.warn(f"{card} is a symbolic link and is ignored", stacklevel=2)
        card = None
    found = _front_matter(card) if card is not None and card.is_file() else {}
    return {key: found[key] for key in ("license", "pipeline_tag") if isinstance(found.get(key), str)}


def _hub_id(library: Library, name: str) -> str | None:
    """The base model's Hub id: its name, or the id that its library knows."""
    if not library.builds_from_folder:
        return None
    if (found := repo_of(name)) is not None:
        return found[0]
    return None if Path(name).exists() else library.hub_id(name)


def _base_card(base: str, revision: str | None, token: str | bool | None) -> Mapping[str, Any]:
    """Front matter of the base model's card; {} if there is none or it cannot be downloaded."""
    found = repo_of(base)
    if found is None and not base.startswith("timm/"):
        return {}
    try:
        revision = revision if revision and COMMIT.fullmatch(revision) else None
        with bounded(_CARD):
            path = hub_api(token).hf_hub_download(found[0] if found else base, "README.md", revision=revision)
    except Exception:  # whatever it is: a foreign card must not stop a push
        return {}
    return _front_matter(Path(path))


def _front_matter(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    try:
        found = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return dict(found.data.to_dict())  # type: ignore[no-untyped-call]
    except Exception:
        return {}
