"""Text as token ids, and as chunks of equal length for calibration and training."""

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
"""Tokens per chunk, unless the model takes fewer."""

_ROWS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
"""{suffix of a tabular file: its builder in `datasets`}"""

_NAME = re.compile(r"hfds/(?P<name>[^:]+)(?::(?P<config>[^:\[]+))??(?::(?P<split>[^:\[]+(?:\[.*\])?))?")


class Chunks(Dataset[dict[str, Tensor]]):
    """Successive chunks of a text as `{"input_ids", "labels"}`, where the labels equal the inputs.

    Args:
        ids: Token ids, [tokens]; a last, incomplete chunk is dropped.
        length: Tokens per chunk.

    Raises:
        InvalidArgument: The text is shorter than one chunk.
    """

    def __init__(self, ids: Tensor, length: int) -> None:
        if length < 2:
            raise InvalidArgument(f"a chunk of text must have at least 2 tokens, got {length}")
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
    """Create a DataLoader of chunks of a text.

    Args:
        ids: Token ids, `[tokens]`, such as those of `text_tokens`.
        length: Tokens per chunk.
        train: Shuffle the chunks anew each epoch, seeded by `seed`; otherwise keep the order of the text.
        batch_size: Chunks per batch.
        seed: Seed of the order.

    Returns:
        A DataLoader of `{"input_ids", "labels"}`, each `[batch_size, length]`; the labels equal the inputs. A last,
        incomplete chunk is dropped.

    Raises:
        InvalidArgument: `length` is below 2, or the text is shorter than one chunk.

    Example:
        >>> import torch
        >>> from hub_mpq.data import text_loader
        >>> loader = text_loader(torch.arange(10), length=4, train=False)
        >>> len(loader), loader.dataset[1]["input_ids"]
        (2, tensor([4, 5, 6, 7]))
    """
    chunks = Chunks(ids, length)
    order = Shuffled(len(chunks), seed) if train else None
    return DataLoader(chunks, batch_size=batch_size, sampler=order)


def text_tokens(data: str | Path, source: Source, model: nn.Module, task: TaskLike = None) -> Tensor:
    """Tokenize a text with the model's own tokenizer.

    Args:
        data: A UTF-8 text file; a `.parquet`, `.jsonl`, `.json` or `.csv` file, a folder of such files, or
            `"hfds/NAME[:CONFIG][:SPLIT]"` (a Hub data set or a local folder), which require `datasets`. The texts are
            read from the column `text`, or from the only text column.
        source: Where the model was loaded from, which is where its tokenizer is looked for.
        model: The network, a causal language model.
        task: The model's task; None to detect it.

    Returns:
        Token ids, `[tokens]`, including the special tokens that the tokenizer adds.

    Raises:
        InvalidArgument: The model is not a causal language model, or the text is empty or cannot be read.
        HubMPQError: The tokenizer is missing or does not fit the model, or a package is not installed.

    Example:
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.data import text_tokens
        >>> mpq = HubMPQ.from_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> text_tokens("corpus.txt", mpq.source, mpq.model)  # doctest: +SKIP
    """
    if not isinstance(task_of(task, model), CausalLM):
        raise InvalidArgument(
            f"text data require a causal language model, got {type(model).__name__}; the command line reads only text "
            "and images, so use hub_mpq from Python with your own DataLoader"
        )
    tokenizer, name = _tokenizer(source)
    text = read_text(data)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    if not len(ids):  # without its files, a class of transformers is a tokenizer without a vocabulary
        raise HubMPQError(f"the tokenizer of {name!r} returned no tokens for {data}; check that its files exist")
    words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(ids.max()) >= words:
        raise HubMPQError(
            f"the tokenizer of {name!r} returned token {int(ids.max())}, but the model has only {words} embeddings"
        )
    return ids


def read_text(data: str | Path) -> str:
    """Read the text of a UTF-8 file, or the rows of a data set joined by blank lines.

    Args:
        data: A text file; a .parquet, .jsonl, .json or .csv file, a folder of such files, or
            "hfds/NAME[:CONFIG][:SPLIT]" (a Hub data set or a local folder), which require `datasets`. SPLIT defaults to
            "train" and may be a slice, such as train[:1000]. The rows are read from the column "text", or from the only
            text column.

    Returns:
        The text.

    Raises:
        InvalidArgument: The text is empty or cannot be read.
        HubMPQError: `datasets` is not installed.
    """
    path, named = Path(data), str(data).startswith("hfds/")
    if named or path.is_dir() or path.suffix.lower() in _ROWS:
        text = "\n\n".join(_rows(str(data), named))
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"cannot read {data} as text: {error}") from error
    if not text.strip():
        raise InvalidArgument(f"{data} contains no text")
    return text


def _rows(data: str, named: bool) -> list[str]:
    try:
        from datasets import Value, load_dataset
    except ImportError as error:
        raise HubMPQError(f"{data} requires an extra package; pip install 'hub-mpq[data]' ({error})") from error
    split = "train"
    if named:
        found = _NAME.fullmatch(data)
        if found is None:
            raise InvalidArgument(f"expected hfds/NAME[:CONFIG][:SPLIT], got {data!r}")
        split = found["split"] or split
        given: tuple[Any, ...] = (found["name"], found["config"])
        files = None
    elif Path(data).is_dir():
        given, files = (data,), None
    elif Path(data).is_file():
        given, files = (_ROWS[Path(data).suffix.lower()],), data
    else:
        raise InvalidArgument(f"cannot read {data} as text: file not found")
    try:
        rows = load_dataset(*given, data_files=files, split=split)
    except Exception as error:  # each builder raises its own errors
        raise InvalidArgument(f"cannot read {data} ({type(error).__name__}: {error})") from error
    texts = [name for name, kind in rows.features.items() if isinstance(kind, Value) and "string" in kind.dtype]
    column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if column is None:
        raise InvalidArgument(f"column 'text' not found in {data}; its columns are {', '.join(rows.column_names)}")
    return [row for row in rows[column] if row]


def _tokenizer(source: Source) -> tuple[Any, str]:
    """The tokenizer of the folder or id that a model was loaded from, else of its base model; and that name."""
    import transformers

    names = dict.fromkeys([str(source.preprocess.get("tokenizer", source.model_id))])
    # the base model that a packed file names is not trusted: only a Hub id, never a path on this disk
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
        told.append(f"{name!r}: no tokenizer files")
    raise HubMPQError(f"tokenizer not found ({'; '.join(told)}); put its files into the model's folder")
