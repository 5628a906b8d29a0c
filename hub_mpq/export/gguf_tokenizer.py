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
"""{how text is split: its name in llama.cpp} of byte-level BPE tokenizers."""


def add_tokenizer(writer: GGUFWriter, model: nn.Module) -> None:
    """Add the tokenizer that lies beside the model, a byte-level BPE; of any other, or where there is none, llama.cpp
    is told that it takes token numbers, with a warning for the former."""
    tokenizer = _tokenizer(model)
    known = _content(tokenizer) if tokenizer is not None else None
    if known is None:
        writer.add_tokenizer_model("none")
        if tokenizer is not None:
            warnings.warn(
                "this tokenizer is not written as GGUF here (byte-level BPEs of GPT-2, SmolLM, Llama 3 and Qwen2 are): "
                "the file takes token numbers",
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
    ids = tokenizer("a")["input_ids"]  # a template may add them without an attribute that says so
    writer.add_add_bos_token(ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(ids[-1:] == [tokenizer.eos_token_id])
    writer.add_add_space_prefix(False)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _tokenizer(model: nn.Module) -> Any:
    """The fast tokenizer of the folder, or of the cached repository, that a model came from; None."""
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    try:
        found = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except Exception:  # none there, in whatever words
        return None
    # of a folder without one, some classes make an empty one
    return found if getattr(found, "is_fast", False) and len(found) > len(found.all_special_tokens) else None


def _content(tokenizer: Any) -> tuple[dict[str, Any], str] | None:
    """(tokenizer.json, how llama.cpp calls its splitting); None where it has no name for that."""
    data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if data["model"]["type"] != "BPE" or data.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    before = data.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    split = [step["pattern"].get("Regex") if step.get("type") == "Split" else step.get("type") for step in steps]
    pre = PRE_TOKENIZERS.get(json.dumps(split))
    return None if pre is None else (data, pre)


def _words(data: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """(tokens by number, their types), as many as the embedding has rows: a token without a row is left out."""
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
