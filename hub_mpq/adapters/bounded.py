"""Build a network from an untrusted config with no more memory and time than its packed file accounts for.

Our construction: the network is built on the meta device while operators and modules are counted, and the output size
of an operator is known before it runs. This bounds configs of every model family, whatever their fields are called.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .count import storage_key

PARTS, PARTS_PER_TENSOR = 2000, 8
OPERATORS, OPERATORS_PER_TENSOR = 20_000, 100
"""A fixed number, plus so many for each tensor of the file. The models of timm and transformers register at most 4
modules and run at most 106 operators for each of their tensors; a file has at least as many tensors."""
LINES, LINES_PER_BYTE = 3_000_000, 16
"""Lines of Python: a fixed number, plus so many for each byte of the file (a loop over a position table takes one line
per entry). TinyViT runs 27 million for its 21 million weights, all others a tenth of that or less."""
NBYTES, NBYTES_PER_BYTE = 1 << 27, 64
"""Bytes of the largest tensor: a fixed number, plus eight 1-bit weights in float64 for each byte of the file."""
BESIDE, BESIDE_PER_BYTE = 1 << 27, 256
"""Bytes of all tensors outside the state dict (masks, position tables), which the real network takes too. BEiT-large
at 1024 pixels has 83 for each byte of its 1-bit weights."""
RESIDENT, RESIDENT_PER_BYTE, RESIDENT_PER_TENSOR = 150 << 20, 3, 1 << 14
"""Bytes that the process may take during the build, including Python objects."""
_EVERY = 256
"""Lines of Python between two checks of the process's memory."""

_current = threading.local()
_hooked: list[Any] = []


class Exceeded(Exception):
    """A network takes more than its file accounts for."""


class Build(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered, and raises Exceeded as soon as a limit is exceeded.

    `parts`, `operators`, `lines`: remaining modules to register, operators and lines of Python to run. `memory`:
    remaining bytes. `largest`: maximum bytes of one tensor, on any device. `drawn`: storages of tensors that hold
    random values or values computed from them.
    """

    def __init__(self, tensors: int, nbytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = PARTS + PARTS_PER_TENSOR * tensors
        self.operators = OPERATORS + OPERATORS_PER_TENSOR * tensors
        self.lines = LINES + LINES_PER_BYTE * nbytes
        self.largest, self.memory = NBYTES + NBYTES_PER_BYTE * nbytes, NBYTES + nbytes
        self.beside = BESIDE + BESIDE_PER_BYTE * nbytes
        self.resident = RESIDENT + RESIDENT_PER_BYTE * nbytes + RESIDENT_PER_TENSOR * tensors
        self.seen = _process()
        self.drawn: dict[int, Any] = {}
        self.exceeded, self.importing = "", 0

    def check(self, left: int, what: str) -> None:
        if left < 0 or self.exceeded:
            self.exceeded = self.exceeded or what
            raise Exceeded(what)

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        """For sys.settrace, because Python loops cannot be seen otherwise. Imported modules do not count."""
        if event == "call":
            if frame.f_code.co_name == "_find_and_load":
                self.importing += 1
                return self._import
            return None if self.importing else self.trace
        if event == "line" and not self.exceeded and frame.f_code.co_name != "__exit__":  # context managers must exit
            self.lines -= 1
            self.check(self.lines, "more to compute")
            if self.lines % _EVERY == 0:
                self._look()
        return self.trace

    def _import(self, frame: Any, event: str, arg: Any) -> Any:
        self.importing -= event == "return"
        if not self.importing:
            self.seen = _process()  # the memory of an import does not belong to the network
        return self._import

    def _look(self) -> None:
        """Count the memory taken since the last check, unless other threads have run, which may have taken it."""
        before, self.seen = self.seen, _process()
        grown, here, together = (now - then for now, then in zip(self.seen, before, strict=True))
        if together <= 1.25 * here:
            self.resident -= grown
            self.check(self.resident, "more memory")

    def registered(self) -> None:
        self.parts -= 1
        self.check(self.parts, "more modules")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operators -= 1
        self.check(self.operators, "more to compute")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_meta = all(x.is_meta for x in given) if given else _names_meta(kwargs)
        if not on_meta and not any(returned.alias_info for returned in func._schema.returns):
            made = _tensors(_on_meta(func, args, kwargs))
            self.memory -= sum(map(_nbytes, made))
            self.check(self.memory, "more memory")
        out = func(*args, **kwargs)
        made = _tensors(out)
        self.check(self.largest - max(map(_nbytes, made), default=0), "larger tensors")
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(self._is_drawn, given)):
            self.drawn |= {storage_key(x): x.untyped_storage() for x in made if x.layout == torch.strided}
        return out

    def _is_drawn(self, x: Tensor) -> bool:
        return x.layout == torch.strided and storage_key(x) in self.drawn

    def check_beside(self, model: nn.Module) -> None:
        """Raise Exceeded for a network whose tensors outside the state dict are too large."""
        beside = {storage_key(x): _nbytes(x) for _, x in _beside_state(model)}
        self.check(self.beside - sum(beside.values()), "larger tables")

    def drawn_outside_state(self, model: nn.Module) -> list[str]:
        """Names of tensors with random values outside the state dict, which no file can contain."""
        return [name for name, x in _beside_state(model) if self._is_drawn(x)]


def _beside_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of all tensors of a model outside its state dict."""
    stored = {storage_key(x) for x in model.state_dict(keep_vars=True).values() if isinstance(x, Tensor)}
    return [
        (f"{name}.{key}" if name else key, x)
        for name, module in model.named_modules()
        for key, x in (*vars(module).items(), *module._buffers.items(), *module._parameters.items())
        if isinstance(x, Tensor) and x.layout == torch.strided and storage_key(x) not in stored
    ]


def _process() -> tuple[int, int, int]:
    """(bytes of this process, CPU nanoseconds of this thread, of all threads); zeros if the system does not report."""
    try:
        with open("/proc/self/statm", "rb") as file:
            pages = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return 0, 0, 0
    return pages * os.sysconf("SC_PAGESIZE"), time.thread_time_ns(), time.process_time_ns()


def _names_meta(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta"


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns, without memory; None if that depends on values, in which case it returns no more than
    it reads."""

    def moved(x: Any) -> Any:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

    given = {name: moved(x) for name, x in kwargs.items()}
    if any(argument.name == "device" for argument in func._schema.arguments):
        given["device"] = torch.device("meta")
    try:
        return func(*tree_map(moved, args), **given)
    except (NotImplementedError, RuntimeError, TypeError):
        return None


def _register(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if (build := getattr(_current, "build", None)) is not None:
        build.registered()


@contextmanager
def bounded(tensors: int, nbytes: int) -> Iterator[Build]:
    """Bound what is built in this thread.

    Args:
        tensors: Number of tensors in the packed file.
        nbytes: Size of the packed file in bytes.

    Raises:
        Exceeded: A limit was exceeded, even if the building code caught the error.
    """
    if not _hooked:  # registered once and never removed: other threads may iterate over torch's hooks at any time
        _hooked.append(register_module_module_registration_hook(_register))
    build, before = Build(tensors, nbytes), getattr(_current, "build", None)
    _current.build = build
    tracer, cause = sys.gettrace(), None
    if tracer is None:  # else a debugger or a coverage tool uses it
        sys.settrace(build.trace)
    try:
        with build:
            yield build
    except Exception as error:
        if not build.exceeded:
            raise
        cause = error
    finally:
        sys.settrace(tracer)
        _current.build = before
    if build.exceeded:  # also if the building code continued
        raise Exceeded(f"describes a network with {build.exceeded} than a file of {nbytes} bytes can hold") from cause
