"""Text as token ids, by the model's own tokenizer, and as chunks of equal length for calibration and training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..adapters import Source
from ..errors import HubMPQError, InvalidArgument
from ..tasks import CausalLM, TaskLike, task_of
from .order import Shuffled

CHUNK = 512
"""Tokens of a chunk, unless the model takes fewer."""

_ROWS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""{ending of a file of rows: how `datasets` calls it}"""

_NAME = re.compile(r"hfds/(?P<name>[^:]+)(?::(?P<config>[^:\[]+))??(?::(?P<split>[^:\[]+(?:\[.*\])?))?")


class Chunks(Dataset[dict[str, Tensor]]):
    """Successive chunks of a text, each as {"input_ids", "labels"}: a causal language model's labels are its inputs.

    Args:
        ids: Token ids, [tokens]. What is left behind the last whole chunk is not used.
        length: Tokens of a chunk.

    Raises:
        InvalidArgument: The text is shorter than one chunk.
    """

    def __init__(self, ids: Tensor, length: int) -> None:
        if length < 2:
            raise InvalidArgument(f"a chunk of text has at least 2 tokens, not {length}")
        if len(ids) < length:
            raise InvalidArgument(f"the text has {len(ids)} tokens, fewer than one chunk of {length}")
        self.rows = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def text_loader(
    ids: Tensor, *, length: int = CHUNK, train: bool = True, batch_size: int = 1, seed: int = 0
) -> DataLoader[dict[str, Tensor]]:
    """Batches of chunks of a text, which can be read again and again.

    Args:
        ids: Token ids, [tokens].
        length: Tokens of a chunk.
        train: Chunks in an order drawn from `seed`, a new one each epoch; else in the order of the text.
        batch_size: Chunks in a batch.
        seed: Of the order.
    """
    chunks = Chunks(ids, length)
    order = Shuffled(len(chunks), seed) if train else None
    return DataLoader(chunks, batch_size=batch_size, sampler=order)


def text_tokens(data: str | Path, source: Source, model: nn.Module, task: TaskLike = None) -> Tensor:
    """The token ids of a text, [tokens], by the model's own tokenizer and with the special tokens it adds.

    Args:
        data: As in `read_text`.
        source: Where the model comes from, which is where its tokenizer is.
        model: The network.
        task: What it is for; None: found out.

    Raises:
        InvalidArgument: The model is no causal language model, or the text is empty.
        HubMPQError: There is no tokenizer, or it is another model's.
    """
    if not isinstance(task_of(task, model), CausalLM):
        raise InvalidArgument(
            f"{type(model).__name__} is no causal language model; text is read for those alone, and images for models "
            "that take images: use hub_mpq from Python with a loader of your own"
        )
    tokenizer, name = _tokenizer(source)
    text = read_text(data)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if not len(ids):  # a class of transformers without its files is a tokenizer that knows no word
        raise HubMPQError(f"the tokenizer of {name!r} makes no tokens of {data}; are its files there?")
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(ids.max()) >= words:
        raise HubMPQError(f"the tokenizer of {name!r} has token {int(ids.max())}, and the model {words} embeddings")
    return ids


def read_text(data: str | Path) -> str:
    """The text of a UTF-8 file, or the rows of a data set joined by blank lines.

    Args:
        data: A text file; a .parquet, .jsonl, .json or .csv file of rows, a folder of such files, or
            "hfds/NAME[:CONFIG][:SPLIT]", a data set of the Hub or a local folder, which need `datasets`. SPLIT is
            "train" by default and may be a slice, such as train[:1000]. The rows are in the column "text", or in the
            only column of text.

    Raises:
        InvalidArgument: It is empty or can't be read.
        HubMPQError: `datasets` is not installed.
    """
    path, named = Path(data), str(data).startswith("hfds/")
    if named or path.is_dir() or path.suffix.lower() in _ROWS:
        text = "\n\n".join(_rows(str(data), named))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{data} cannot be read as text: {error}") from error
    if not text.strip():
        raise InvalidArgument(f"{data} holds no text")
    return text


def _rows(data: str, named: bool) -> list[str]:
    try:
        from datasets import Value, load_dataset
    except ImportError as error:
        raise HubMPQError(f"{data} needs a package: pip install 'hub-mpq[data]' ({error})") from error
    split = "train"
    if named:
        found = _NAME.fullmatch(data)
        if found is None:
            raise InvalidArgument(f"{data!r} is not hfds/NAME[:CONFIG][:SPLIT]")
        split = found["split"] or split
        given: tuple[Any, ...] = (found["name"], found["config"])
        files = None
    elif Path(data).is_dir():
        given, files = (data,), None
    elif Path(data).is_file():
        given, files = (_ROWS[Path(data).suffix.lower()],), data
    else:
        raise InvalidArgument(f"{data} cannot be read as text: there is no such file")
    try:
        rows = load_dataset(*given, data_files=files, split=split)
    except Exception as error:  # each builder has errors of its own
        raise InvalidArgument(f"{data} cannot be read ({type(error).__name__}: {error})") from error
    texts = [name for name, kind in rows.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column is None:
        raise InvalidArgument(f"{data} has no column 'text'; its columns are {', '.join(rows.column_names)}")
    return [row for row in rows[column] if row]


def _tokenizer(source: Source) -> tuple[Any, str]:
    """(the tokenizer of the folder or id that a model was loaded from, else of its base model; that name)."""
    import transformers

    names = dict.fromkeys([str(source.preprocess.get("tokenizer", source.model_id))])
    # what a packed file names as its base may have been written by others: a Hub id, never a path on this disk
    names |= {} if Path(source.model_id).exists() else {source.model_id: None}
    told = []
    for name in names:
        revision = None if Path(name).exists() else source.revision
        try:
            found = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        except Exception as error:
            told.append(f"{name!r}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if len(found.get_vocab()) > len(found.all_special_tokens):
            return found, name
        told.append(f"{name!r}: its tokenizer has no files")
    raise HubMPQError(f"the model has no tokenizer ({'; '.join(told)}); put its files into the model's folder")
