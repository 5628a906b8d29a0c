"""The tokenizer of a model in a GGUF file."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    json.dumps(["ByteLevel"]): "gpt-2",
    json.dumps(["Digits", "ByteLevel"]): "smollm",
    json.dumps([_LLAMA3, "ByteLevel"]): "llama-bpe",
    json.dumps([_LLAMA3.replace("{1,3}", ""), "ByteLevel"]): "qwen2",
}
"""{how text is split: its name in llama.cpp}, for byte-level BPE tokenizers."""


def add_tokenizer(writer: GGUFWriter, model: nn.Module) -> None:
    """Add the tokenizer next to the model if it is a known byte-level BPE.

    Otherwise the file takes token ids instead of text; if there is an unsupported tokenizer, with a warning.
    """
    tokenizer = _tokenizer(model)
    known = _content(tokenizer) if tokenizer is not None else None
    if known is None:
        writer.add_tokenizer_model("none")
        if tokenizer is not None:
            warnings.warn(
                "the tokenizer is not exported, so the GGUF file takes token ids; supported are the byte-level BPEs of "
                "GPT-2, SmolLM, Llama 3 and Qwen2",
                stacklevel=2,
            )
        return
    data, pre = known
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    count = model.config.vocab_size
    words, kinds = _words(data, count)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in data["model"]["merges"]]
    writer.add_token_merges(merges)
    special = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, add in special.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < count:
            add(number)
    ids = tokenizer("a")["input_ids"]  # a template may add them without setting an attribute
    writer.add_add_bos_token(ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(ids[-1:] == [tokenizer.eos_token_id])
    writer.add_add_space_prefix(False)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _tokenizer(model: nn.Module) -> Any:
    """The fast tokenizer of the folder or cached repository that a model came from, or None."""
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # not found, in various errors
        return None
    # for a folder without a tokenizer, some classes create an empty one
    return found if getattr(found, "is_fast", False) and len(found) > len(found.all_special_tokens) else None


def _content(tokenizer: Any) -> tuple[dict[str, Any], str] | None:
    """(tokenizer.json, llama.cpp's name for its splitting); None if it has no name."""
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if data["model"]["type"] != "BPE" or data.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = data.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    split = [step["pattern"].get("Regex") if step.get("type") == "Split" else step.get("type") for step in steps]
    pre = PRE_TOKENIZERS.get(json.dumps(split))
    return None if pre is None else (data, pre)


def _words(data: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """(tokens by id, their types), as many as the embedding has rows; tokens without a row are omitted."""
    from gguf import TokenType

    words = [f"[PAD{i}]" for i in range(count)]
    kinds = [int(TokenType.UNUSED)] * count
    tokens = [(i, word, TokenType.NORMAL) for word, i in data["model"]["vocab"].items()]
    for added in data["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens.append((added["id"], added["content"], kind))
    for i, word, kind in tokens:
        if i < count:
            words[i], kinds[i] = word, int(kind)
    return words, kinds
