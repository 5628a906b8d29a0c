"""From options to a model and its data. Heavy imports are inside."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core import tasks
from ..core.files import PACKED
from ..errors import HubMPQError, InvalidArgument, PackedFormat
from .launch import is_main
from .options import DataOptions, ModelOptions, input_size_of, model_args_of, pins_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..core import Indicators
    from ..model import HubMPQ


_OWN = frozenset(
    {
        *("model_id", "module", "task", "fixed", "exclude", "weight_only", "tie_fused", "target", "per_expert"),
        *("pretrained", "resident", "runtime", "library", "revision", "meta", "input_size", "checkpoint_path"),
    }
)
"""Arguments of `HubMPQ.from_pretrained` that commands set through their own options, or not at all."""


def load(model: str, options: ModelOptions, *, meta: bool = False, runtime: str | None = None) -> HubMPQ:
    """The model of a command, on the GPU if there is one.

    Args:
        model: Its name or folder.
        options: How to load it.
        meta: Build its skeleton only, without weights or network.
        runtime: The runtime that executes it; it then stays on the CPU.
    """
    kwargs = model_args_of(options.model_arg)
    for name in kwargs:
        if name in _OWN:
            raise InvalidArgument(
                f"--model-arg: {name!r} is not an argument of the model; use the option of hub-mpq, see --help"
            )
    if options.task is not None:
        tasks.get(options.task)  # fail before the model is loaded if the name is unknown
    exclude = options.exclude or ()
    searched: dict[str, Any] = {
        "fixed": pins_of(options.pin),
        "weight_only": options.weight_only,
        "tie_fused": options.tie_fused,
        "target": options.target,
        "task": options.task,
    }
    if options.library is not None:
        kwargs["library"] = options.library
    if options.revision is not None:
        kwargs["revision"] = options.revision
    if runtime is not None:
        kwargs["runtime"] = runtime
    if options.per_expert:
        kwargs["per_expert"] = True
    if options.input_size is not None:
        kwargs["input_size"] = input_size_of(options.input_size)

    from ..model import HubMPQ

    if meta:
        from .. import adapters

        source = adapters.load(model, pretrained=False, meta=True, exclude=exclude, **kwargs)
        return HubMPQ(source, **searched)
    import torch

    if options.checkpoint_path is not None:
        kwargs["checkpoint_path"] = options.checkpoint_path
    with torch.random.fork_rng(devices=[]):
        # for weights that no file holds (--no-pretrained, a new head): the same when a run is resumed
        torch.manual_seed(0)
        mpq = HubMPQ.from_pretrained(model, pretrained=options.pretrained, exclude=exclude, **searched, **kwargs)
        return mpq if runtime not in (None, "torch") else place(mpq)


def runs_on(mpq: HubMPQ) -> dict[str, Any]:
    """The runtime and how many layers it computes in integers; {} without a runtime."""
    layers = getattr(mpq.model, "runtime_layers", None)
    if layers is None:
        return {}
    return {"runtime": layers.runtime, "integer_layers": len(layers.integer), "float_layers": len(layers.float)}


def place(mpq: HubMPQ) -> HubMPQ:
    """The model, on the GPU if there is one."""
    import torch

    return mpq.to("cuda") if torch.cuda.is_available() else mpq


def is_packed(folder: str | Path) -> bool:
    """Whether hub-mpq wrote the folder."""
    if Path(folder).is_dir():
        from ..pack.atomic_folder import finish_interrupted

        finish_interrupted(Path(folder))
    return (Path(folder) / PACKED).is_file()


def loader(mpq: HubMPQ, data: str, options: DataOptions, *, train: bool, seed: int = 0) -> DataLoader[Any]:
    """Batches of images, preprocessed for the model, or of chunks of text for a model that reads tokens."""
    with contextlib.redirect_stdout(sys.stderr):  # readers print, and stdout is for the command's result
        return _loader(mpq, data, options, train=train, seed=seed)


def _loader(mpq: HubMPQ, data: str, options: DataOptions, *, train: bool, seed: int) -> DataLoader[Any]:
    from ..core.library import libraries
    from ..data import data_config, image_loader, text_loader, text_tokens
    from ..data.text import CHUNK
    from ..tasks.tokens import most_tokens

    source = mpq.source
    if reads_text(mpq):
        most = most_tokens(mpq.model)
        length = options.chunk_length or min(CHUNK, most or CHUNK)
        if most is not None and length > most:
            raise InvalidArgument(f"--chunk-length must be at most {most} for this model, got {length}")
        ids = text_tokens(data, source, mpq.model, mpq.task)
        return text_loader(ids, length=length, train=train, batch_size=options.batch_size or 1, seed=seed)
    classes = None
    if mpq.task in (None, "classification"):
        classes = getattr(mpq.model, "num_classes", None)
        if classes is None:
            classes = getattr(getattr(mpq.model, "config", None), "num_labels", None)
    return image_loader(
        data,
        data_config(libraries.get(source.library).image_preprocess(source), mpq.graph.input_shape),
        train=train,
        classes=classes or None,
        class_map=options.class_map,
        batch_size=options.batch_size or 64,
        workers=options.workers,
        seed=seed,
        max_corrupt=options.max_corrupt,
    )


def reads_text(mpq: HubMPQ) -> bool:
    """Whether the model's inputs are token ids."""
    return "tokenizer" in mpq.source.preprocess


def tell_corrupt(*loaders: Any) -> None:
    """Print one warning about images that were skipped, in all processes."""
    from ..train.processes import total

    found = [loader.dataset for loader in loaders if hasattr(getattr(loader, "dataset", None), "corrupt")]
    skipped = int(total(sum(data.corrupt for data in found))[0])
    if skipped and is_main():
        where = f"{skipped} of {sum(map(len, found))} images"
        typer.echo(f"warning: {where} could not be read and were skipped", err=True)


def read_indicators_of(path: Path) -> Indicators:
    """The indicators of a file; InvalidArgument if there is no such file."""
    from ..pack import read_indicators

    if not path.is_file():
        raise InvalidArgument(f"indicators file {str(path)!r} not found; create it with `hub-mpq indicators`")
    return read_indicators(path)


def indicators_for(mpq: HubMPQ, path: Path | None) -> None:
    """Give the model the indicators of a file, or those of its folder; HubMPQError if there are none."""
    if path is not None:
        mpq.scores = read_indicators_of(path)
    elif mpq.scores is None:
        folder = Path(mpq.graph.model_id)
        if folder.is_dir():
            from ..hub.folder import read_folder_indicators

            mpq.scores = read_folder_indicators(folder)
    if mpq.scores is None:
        raise HubMPQError("no indicators found; train them with `hub-mpq indicators` and pass --indicators FILE")


def read_policy(text: str, mpq: HubMPQ) -> Any:
    """A policy from a file (a policy, or the output of `search --json`), or a level such as W4A4."""
    from ..core import LayerBits, Policy
    from .options import read_json

    if not Path(text).is_file():
        try:
            return LayerBits.parse(text)
        except InvalidArgument:
            raise InvalidArgument(f"--policy: expected a file or a level such as W4A4, got {text!r}") from None
    tree = read_json(Path(text))
    tree = tree.get("policy", tree) if isinstance(tree, dict) else tree
    try:
        policy = Policy.from_dict(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise PackedFormat(text, "not a policy: expected graph_digest and bits") from error
    policy.check(mpq.graph)
    return policy
