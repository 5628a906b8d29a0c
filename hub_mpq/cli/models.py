"""From options to a model and its data. Heavy imports are inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..core.files import PACKED
from ..errors import HubMPQError, InvalidArgument, PackedFormat
from .launch import is_main
from .options import input_size_of, model_args_of, pins_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..model import HubMPQ


def load(
    model: str,
    *,
    meta: bool = False,
    library: str | None = None,
    input_size: str | None = None,
    model_arg: list[str] | None = None,
    checkpoint_path: Path | None = None,
    pretrained: bool = True,
    pin: list[str] | None = None,
    exclude: list[str] | None = None,
    weight_only: bool = False,
    tie_fused: bool = False,
) -> HubMPQ:
    """The model of a command. meta: its skeleton without weights or network; else on the GPU when there is one."""
    kwargs = model_args_of(model_arg)
    searched: dict[str, Any] = {"fixed": pins_of(pin), "weight_only": weight_only, "tie_fused": tie_fused}
    if library is not None:
        kwargs["library"] = library
    if input_size is not None:
        kwargs["input_size"] = input_size_of(input_size)
    if checkpoint_path is not None:
        kwargs["checkpoint_path"] = checkpoint_path

    from ..model import HubMPQ

    if meta:
        from .. import adapters

        kwargs.pop("checkpoint_path", None)
        source = adapters.load(model, pretrained=False, meta=True, exclude=exclude or (), **kwargs)
        return HubMPQ(source, **searched)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of weights that no file gives (--no-pretrained, a new head): the same when a run goes on
        return place(HubMPQ.from_pretrained(model, pretrained=pretrained, exclude=exclude or (), **searched, **kwargs))


def place(mpq: HubMPQ) -> HubMPQ:
    """The model and its example on the GPU, when there is one."""
    import torch

    if torch.cuda.is_available():
        from ..adapters.base import placed

        mpq.model.to("cuda")
        mpq.source.example = placed(mpq.source.example, mpq.model)
    return mpq


def is_packed(folder: str | Path) -> bool:
    """Whether a folder is one that hub-mpq wrote."""
    return (Path(folder) / PACKED).is_file()


def loader(
    mpq: HubMPQ,
    data: str,
    *,
    train: bool,
    class_map: Path | None,
    batch_size: int,
    workers: int,
    max_corrupt: float,
    seed: int = 0,
) -> DataLoader[Any]:
    """Batches of images, prepared as the model wants them."""
    from ..core.library import libraries
    from ..data import data_config, image_loader

    source = mpq.source
    classes = getattr(mpq.model, "num_classes", None)
    if classes is None:
        classes = getattr(getattr(mpq.model, "config", None), "num_labels", None)
    return image_loader(
        data,
        data_config(libraries.get(source.library).image_preprocess(source), mpq.graph.input_shape),
        train=train,
        classes=classes or None,
        class_map=class_map,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        max_corrupt=max_corrupt,
    )


def tell_corrupt(*loaders: Any) -> None:
    """One warning of the images that were skipped, of all processes."""
    from ..train.processes import total

    found = [loader.dataset for loader in loaders if hasattr(getattr(loader, "dataset", None), "corrupt")]
    skipped = int(total(sum(data.corrupt for data in found))[0])
    if skipped and is_main():
        told = f"{skipped} of {sum(map(len, found))} images could not be read and were skipped"
        typer.echo(f"warning: {told}", err=True)


def indicators_for(mpq: HubMPQ, path: Path | None) -> None:
    """Give the model the indicators of a file, or keep those of its folder; HubMPQError when there are none."""
    if path is not None:
        from ..pack import read_indicators

        if not path.is_file():
            raise InvalidArgument(f"no indicators file {str(path)!r}; `hub-mpq indicators` writes one")
        mpq.indicators = read_indicators(path)
    elif mpq.indicators is None:
        folder = Path(mpq.graph.model_id)
        if folder.is_dir():
            from ..hub.folder import read_folder_indicators

            mpq.indicators = read_folder_indicators(folder)
    if mpq.indicators is None:
        raise HubMPQError("there are no indicators; train them with `hub-mpq indicators` and pass --indicators FILE")


def read_policy(text: str, mpq: HubMPQ) -> Any:
    """A policy from a file (a policy, or what `search --json` printed), or a level such as W4A4."""
    from ..core import LayerBits, Policy
    from .options import read_json

    if not Path(text).is_file():
        try:
            return LayerBits.parse(text)
        except InvalidArgument:
            raise InvalidArgument(f"--policy: {text!r} is neither a file nor a level such as W4A4") from None
    tree = read_json(Path(text))
    tree = tree.get("policy", tree) if isinstance(tree, dict) else tree
    try:
        policy = Policy.from_dict(tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise PackedFormat(text, "no policy: expected graph_digest and bits") from error
    policy.check(mpq.graph)
    return policy
