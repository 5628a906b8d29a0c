"""Files that say how a model's input is made: tokenizers, image processors, generation defaults."""

from __future__ import annotations

from pathlib import Path

from ..errors import is_connection_error
from .remote import hub_api, repo_of

PREPROCESS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""All of them text or protocol buffers: none can run code. timm's are in its config.json."""


def local_preprocess(folder: Path | None) -> dict[str, bytes]:
    """{name: content} of those files in the folder that a model was loaded from; {} when it was no folder."""
    if folder is None:
        return {}
    return {name: (folder / name).read_bytes() for name in PREPROCESS if (folder / name).is_file()}


def preprocess_files(
    base_model: str, revision: str | None, *, library: str, token: str | bool | None = None
) -> dict[str, Path]:
    """{name: path} of the base model's own files; {} for timm, for a network of one's own, or where none are found.

    `base_model` is what a packed file says, which others may have written: a Hub id, never a path on this disk.
    A base that can't be reached leaves them out: they are its files, and a packed model runs without them.
    """
    if library != "transformers":
        return {}
    found = repo_of(base_model)
    if found is None:
        return {}
    api = hub_api(token)
    try:
        names = set(api.list_repo_files(found[0], revision=revision))
        return {
            name: Path(api.hf_hub_download(found[0], name, revision=revision)) for name in PREPROCESS if name in names
        }
    except Exception as error:
        if is_connection_error(error):
            return _cached(found[0], revision)
        raise


def _cached(repo: str, revision: str | None) -> dict[str, Path]:
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(repo, name, revision=revision) for name in PREPROCESS}
    return {name: Path(path) for name, path in found.items() if isinstance(path, str)}
