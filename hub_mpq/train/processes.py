"""The processes of a run: their number, their shares of the data, and communication between them.

Everything is based on Accelerate. In a single process, every function returns its argument. With several processes, a
function that communicates must be called by all of them.
"""

from __future__ import annotations

import atexit
import copy
import os
import time
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
_LINGER = 0.5
"""Seconds between the end of a program and that of its interpreter, if gloo was used."""


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def make_accelerator(*, seed: int = 0, cpu: bool | None = None, log_with: Any = None, log_dir: Any = None) -> Any:
    """Create an Accelerator that shuffles by `seed` and epoch, whatever the global seed, so that runs are repeatable.

    Args:
        seed: Seed of shuffling.
        cpu: Whether to use the CPU; None to use GPUs (NCCL between processes) if there are any, else the CPU (gloo).
        log_with: A tracker, as Accelerate takes it.
        log_dir: Folder of the logs.

    Raises:
        HubMPQError: Accelerate's FSDP plug-in is on, which would not reduce the gradients of the scales, or there are
            more processes than GPUs.
    """
    from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs

    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower()
    if asked in ("1", "true", "yes"):
        raise HubMPQError(
            "Accelerate's FSDP plug-in is not supported: it would not reduce the gradients of the scales; start "
            "without --use_fsdp and pass --fsdp (Engine(fsdp=True)), which uses torch's fully_shard"
        )
    there, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cpu is None and wanted > 1:
        cpu = not torch.cuda.is_available()
        if there and wanted > there and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes"):
            raise HubMPQError(
                f"each process needs its own GPU, got {wanted} processes and {there} GPU; start fewer processes"
            )
    # a process with a shorter share of an epoch repeats a batch with weight zero, see `feed`; all read streams
    data = DataLoaderConfiguration(
        use_seedable_sampler=True, data_seed=seed, even_batches=False, dispatch_batches=False
    )
    # DDP must not wait for parts that a model does not use, such as a pooler or a second head
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=bool(cpu), dataloader_config=data, kwargs_handlers=[unused], log_with=log_with, project_dir=log_dir
    )
    if accelerator.state.backend == "gloo":
        atexit.unregister(_linger)
        atexit.register(_linger)
    return accelerator


def _linger() -> None:
    """Give gloo's threads time to free the tensors of the last operations, for which they need the interpreter.

    Once the interpreter is being finalized, Python before 3.14 ends such a thread in a way that aborts the process.
    torch joins the threads when the process group is destroyed, which DistributedDataParallel prevents (torch 2.14).
    """
    time.sleep(_LINGER)


def describe() -> str:
    """Describe the number of processes and their device."""
    state = make_accelerator().state
    count = state.num_processes
    return f"{count} {'process' if count == 1 else 'processes'}, device {state.device.type}" + (
        f", {state.backend}" if count > 1 else ""
    )


def own_share(loader: Iterable[Any], *, seed: int = 0) -> Iterable[Any]:
    """Return this process's share of the batches: of P processes, number r takes batches r, r+P, r+2P, …

    A DataLoader that shuffles is shuffled by `seed`, so that one process and several see the same samples. The loader
    itself is not changed.

    A loader that is already split is returned as it is: its sampler has `num_replicas`, its data set was split by node,
    it has a true attribute `sharded`, or Accelerate prepared it.
    """
    return _ordered(loader, seed, *world())


def seeded(loader: Iterable[Any], *, seed: int = 0) -> Iterable[Any]:
    """Return all batches of a loader, in every process; a DataLoader that shuffles is shuffled by `seed`."""
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
    """Copy the sampler and generator of a shuffled DataLoader, because Accelerate replaces and seeds them, which would
    change the user's loader. Any other loader is returned as it is."""
    if not isinstance(loader, torch.utils.data.DataLoader) or is_sharded(loader):
        return loader
    for name in ("batch_sampler", "sampler"):
        batches = getattr(loader, name)
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, torch.utils.data.RandomSampler):
            generator = sampler.generator and torch.Generator(sampler.generator.device)
            own, batches, mine = copy.copy(loader), copy.copy(batches), copy.copy(sampler)
            batches.sampler, mine.generator = mine, generator
            own.__dict__[name] = batches  # a DataLoader does not allow setting it
            if loader.generator is sampler.generator:
                own.generator = generator
            return own
    return loader


def is_sharded(loader: Any) -> bool:
    """Whether a loader already gives each process its own part."""
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
    """Sum each value over the processes."""
    if world()[1] == 1:
        return list(values)
    from accelerate.utils import reduce

    summed: Tensor = reduce(torch.tensor(values, dtype=torch.float64, device=_device()), "sum")
    return summed.tolist()


def most(value: int) -> int:
    """Return the largest value of all processes."""
    return value if world()[1] == 1 else max(int(v) for v in each(value))


def least(value: int) -> int:
    """Return the smallest value of all processes."""
    return -most(-value)


def each(value: Any) -> list[Any]:
    """Gather the values of all processes, in order."""
    from accelerate.utils import gather_object

    return gather_object([value])  # type: ignore[no-any-return]


def mean_rows(rows: Mapping[str, Mapping[Any, float]]) -> Rows:
    """Average `{layer: {bit-width: value}}` over the processes, which have the same layers and bit-widths."""
    flat = [value for row in rows.values() for value in row.values()]
    if world()[1] == 1 or not flat:
        return {name: dict(row) for name, row in rows.items()}
    means = iter(total(*flat))
    return {name: {key: next(means) / world()[1] for key in row} for name, row in rows.items()}


def share_samples(samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather `{layer: sampled inputs}` of all processes: equal parts of each, at most 2^18 values per layer."""
    processes = world()[1]
    if processes == 1:
        return dict(samples)
    from accelerate.utils import gather

    out = {}
    for name, values in samples.items():
        count = min(int(n) for n in each(values.numel()))
        # random samples, since an even stride could coincide with the channels
        taken = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: -(-_SAMPLE // processes)]
        out[name] = gather(values[taken.to(values.device)])
    return out


def on_main(function: Callable[[], T]) -> T:
    """Call a function in the main process and return its result, or raise its error, in all processes."""
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
    """Mark an error as raised by all processes, so that only one of them prints it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def together(function: Callable[[], T]) -> T:
    """Call a function in each process; an error in any of them is raised in all."""
    found: list[T] = []
    failed: HubMPQError | None = None
    try:
        found.append(function())
    except HubMPQError as error:
        failed = error
    raise_together(failed)
    return found[0]


def raise_together(error: HubMPQError | None) -> None:
    """Raise an error of any process in all of them."""
    if world()[1] == 1:
        if error is not None:
            raise error
        return
    texts: Sequence[str | None] = each(None if error is None else str(error))
    for rank, text in enumerate(texts):
        if text is not None:
            raise agreed(error or HubMPQError(f"process {rank}: {text}"))
