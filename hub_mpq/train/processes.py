"""The processes of a run: which there are, what each one sees of the data, and what all of them agree on.

All of it is Accelerate's; alone, every function hands back what it was given. With more than one process the functions
that speak to the others must be called by all of them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import HubMPQError
from ..versions import warn_if_untested

T = TypeVar("T")
Rows = dict[str, dict[Any, float]]
_SAMPLE = 1 << 18


def world() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def make_accelerator(*, seed: int = 0, cpu: bool | None = None, log_with: Any = None, log_dir: Any = None) -> Any:
    """Accelerator that shuffles by `seed` and epoch, whatever the global seed is, so that a run can be repeated and
    resumed. `cpu` None: a GPU (NCCL between processes) when there is one, else gloo.

    Raises HubMPQError when Accelerate's FSDP was asked for: it would leave the scales' gradients unreduced.
    """
    from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs

    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower()
    if asked in ("1", "true", "yes"):
        raise HubMPQError(
            "Accelerate's FSDP plug-in is not active here and would leave the gradients of the scales unreduced; "
            "start without --use_fsdp and pass --fsdp (Engine(fsdp=True)), which shards with torch's own fully_shard"
        )
    there, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cpu is None and wanted > 1:
        cpu = not torch.cuda.is_available()
        if there and wanted > there and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
            raise HubMPQError(f"{wanted} processes were started on this machine and it has {there} GPU")
    # a process whose share of an epoch is shorter repeats a batch at weight zero, see `fit`; streams are read by all
    data = DataLoaderConfiguration(
        use_seedable_sampler=True, data_seed=seed, even_batches=False, dispatch_batches=False
    )
    # parts that a model has and does not use (a pooler, a second head) must not keep DDP waiting
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        cpu=bool(cpu), dataloader_config=data, kwargs_handlers=[unused], log_with=log_with, project_dir=log_dir
    )


def describe() -> str:
    """How many processes run, and on what."""
    state = make_accelerator().state
    count = state.num_processes
    return f"{count} {'process' if count == 1 else 'processes'}, device {state.device.type}" + (
        f", {state.backend}" if count > 1 else ""
    )


def own_share(loader: Iterable[Any], *, seed: int = 0) -> Iterable[Any]:
    """The batches of a loader that are this process's: of P processes, number r takes batches r, r+P, r+2P, … What a
    DataLoader shuffles is shuffled by `seed`, so that one process and many see the same samples; the loader itself
    stays as it is.

    A loader that splits itself (its sampler has `num_replicas`, its data set was split by node, or it has a true
    attribute `sharded`) and one that Accelerate prepared stay as they are.
    """
    return _ordered(loader, seed, *world())


def seeded(loader: Iterable[Any], *, seed: int = 0) -> Iterable[Any]:
    """All batches of a loader, in every process; what a DataLoader shuffles is shuffled by `seed`."""
    return _ordered(loader, seed, 0, 1)


def _ordered(loader: Iterable[Any], seed: int, rank: int, processes: int) -> Iterable[Any]:
    own = unshared(loader)
    if (processes == 1 and own is loader) or is_sharded(loader):
        return loader
    if not isinstance(own, torch.utils.data.DataLoader):
        return _EveryNth(loader, rank, processes)
    from accelerate.data_loader import prepare_data_loader

    warn_if_untested("accelerate")
    return prepare_data_loader(  # type: ignore[no-any-return]
        own,
        num_processes=processes,
        process_index=rank,
        put_on_device=False,
        even_batches=False,
        use_seedable_sampler=True,
        data_seed=seed,
    )


def unshared(loader: Any) -> Any:
    """A shuffled DataLoader with a sampler and generator of its own, which Accelerate may replace and seed: else the
    user's loader would be changed. Any other loader as it is."""
    if not isinstance(loader, torch.utils.data.DataLoader) or is_sharded(loader):
        return loader
    for name in ("batch_sampler", "sampler"):
        batches = getattr(loader, name)
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            generator = sampler.generator and torch.Generator(sampler.generator.device)
            own, batches, mine = copy.copy(loader), copy.copy(batches), copy.copy(sampler)
            batches.sampler, mine.generator = mine, generator
            own.__dict__[name] = batches  # a DataLoader lets nobody set it
            if loader.generator is sampler.generator:
                own.generator = generator
            return own
    return loader


def is_sharded(loader: Any) -> bool:
    """Whether a loader already gives each process a part of its own."""
    data, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    return bool(
        getattr(loader, "sharded", False)
        or getattr(loader, "_is_accelerate_prepared", False)
        or getattr(sampler, "num_replicas", 1) > 1
        or getattr(data, "_distributed", None) is not None
    )


class _EveryNth:
    """Batches r, r+P, r+2P, … of anything that can be iterated again."""

    def __init__(self, loader: Iterable[Any], rank: int, processes: int) -> None:
        self.loader, self.rank, self.processes = loader, rank, processes
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.rank, None, self.processes)

    def __len__(self) -> int:
        return max(0, -(-(len(self.loader) - self.rank) // self.processes))  # type: ignore[arg-type]


def _device() -> torch.device:
    from accelerate import PartialState

    return PartialState().device


def total(*values: float) -> list[float]:
    """Each value summed over the processes."""
    if world()[1] == 1:
        return list(values)
    from accelerate.utils import reduce

    summed: Tensor = reduce(torch.tensor(values, dtype=torch.float64, device=_device()), "sum")
    return summed.tolist()


def most(value: int) -> int:
    """The greatest of the processes' values."""
    return value if world()[1] == 1 else max(int(v) for v in each(value))


def least(value: int) -> int:
    """The smallest of the processes' values."""
    return -most(-value)


def each(value: Any) -> list[Any]:
    """Every process's value, in their order."""
    from accelerate.utils import gather_object

    return gather_object([value])  # type: ignore[no-any-return]


def mean_rows(rows: Mapping[str, Mapping[Any, float]]) -> Rows:
    """{layer: {width: value}}, each value averaged over the processes, which have the same layers and widths."""
    flat = [value for row in rows.values() for value in row.values()]
    if world()[1] == 1 or not flat:
        return {name: dict(row) for name, row in rows.items()}
    means = iter(total(*flat))
    return {name: {key: next(means) / world()[1] for key in row} for name, row in rows.items()}


def share_samples(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: values it read}, of all processes together, the same in all; equal parts, at most 2^18 values a layer."""
    processes = world()[1]
    if processes == 1:
        return dict(samples)
    from accelerate.utils import gather

    out = {}
    for name, values in samples.items():
        count = min(int(n) for n in each(values.numel()))
        # drawn at random where they are too many: an even stride could lock onto the channels
        taken = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: -(-_SAMPLE // processes)]
        out[name] = gather(values[taken.to(values.device)])
    return out


def on_main(function: Callable[[], T]) -> T:
    """What `function` gives in the main process, in all of them; what it raises there is raised in all."""
    rank, processes = world()
    if processes == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]  # (result, message of the error)
    failed: HubMPQError | None = None
    if rank == 0:
        try:
            answer[0] = function()
        except HubMPQError as error:
            failed, answer[1] = error, str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise agreed(failed or HubMPQError(answer[1]))
    return answer[0]  # type: ignore[no-any-return]


def agreed(error: HubMPQError) -> HubMPQError:
    """The same error, marked as one that all processes raise, so that one of them tells it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def together(function: Callable[[], T]) -> T:
    """What `function` gives in each process; what it raises in any of them is raised in all."""
    found: list[T] = []
    failed: HubMPQError | None = None
    try:
        found.append(function())
    except HubMPQError as error:
        failed = error
    raise_together(failed)
    return found[0]


def raise_together(error: HubMPQError | None) -> None:
    """Raise in all processes what any of them met; nothing when none did."""
    if world()[1] == 1:
        if error is not None:
            raise error
        return
    texts: Sequence[str | None] = each(None if error is None else str(error))
    for rank, text in enumerate(texts):
        if text is not None:
            raise agreed(error or HubMPQError(f"process {rank}: {text}"))
