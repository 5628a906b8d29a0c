"""Measure the time of each layer of a model on a runtime, at each bit-width and in float.

A layer is built on the runtime as a separate network, with the input that it receives in the model, which works for all
runtimes. It is timed from float32 to float32, with the conversions of its input and output.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..adapters.restore_state import copied
from ..core import FLOAT_BITS, LatencyTable, LayerBits, LayerGraph, LayerSpec, Policy, Runtime, runtimes
from ..core.latency import FLOAT, MOST
from ..errors import HubMPQError, InvalidArgument
from ..nn.calibrate import calibrate_inputs, calibrate_weights, sample_inputs
from ..nn.layers import first_operand
from ..nn.quantize import quantize_to_policy
from . import machine as here
from .rebuilt import run
from .timing import Timing, batch_of, threads_of, time_calls

PAIRS = tuple(LayerBits(w, a) for w in range(1, 9) for a in range(1, 9))


@dataclass(eq=False)
class _Kernel:
    """Calls that take the same time: equal layers with inputs of equal shape.

    Args:
        layer: One of the layers.
        module: Its float module.
        x: Its input in the model.
        seconds: {bit-widths: seconds of one call}, and "float"; empty until it is timed.
    """

    layer: LayerSpec
    module: nn.Module
    x: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


def runtime_here(name: str) -> Runtime:
    """Look up a runtime by name, and check that it is available on this machine.

    Args:
        name: Name of the runtime, such as `"onednn"`.

    Returns:
        The runtime.

    Raises:
        InvalidArgument: The name is unknown.
        HubMPQError: The runtime is not available, with the reason.

    Example:
        >>> from hub_mpq.runtime import runtime_here
        >>> runtime_here("torch").name
        'torch'
    """
    runtime = runtimes.get(name)
    if (why := runtime.available()) is not None:
        raise HubMPQError(f"runtime {name!r} is not available: {why}")
    return runtime


def measure_latency(
    model: nn.Module,
    graph: LayerGraph,
    example: Any,
    *,
    runtime: str = "onednn",
    batch_size: int = 1,
    threads: int = 1,
    widths: Iterable[LayerBits] = PAIRS,
) -> LatencyTable:
    """Time the layers of a float model on a runtime, and the whole model.

    Equal layers are timed once. So are all bit-widths, if the runtime computes them with the same kernel.

    Args:
        model: The float network, on the CPU; it is not changed.
        graph: Its layers.
        example: One sample: positional arguments or a mapping of keyword arguments.
        runtime: Name of the runtime.
        batch_size: Samples per call.
        threads: Threads that a call may use.
        widths: Bit-widths to time, on a runtime whose time depends on them; default: all pairs of 1 to 8 bits.

    Returns:
        The table, in seconds.

    Raises:
        InvalidArgument: A number is out of range, or the runtime is unknown.
        HubMPQError: The runtime is not available, or cannot run the model.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.runtime import measure_latency
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> table = measure_latency(mpq.model, mpq.graph, torch.zeros(1, 3, 32, 32), runtime="torch")
        >>> table.runtime, table.batch_size, table.whole > 0
        ('torch', 1, True)
    """
    for name, value in {"batch_size": batch_size, "threads": threads}.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST[name]:
            raise InvalidArgument(f"{name} must be an integer from 1 to {MOST[name]}, got {value!r}")
    engine = runtime_here(runtime)
    batch = batch_of(example, batch_size)
    asked = set(widths)
    with threads_of(threads), torch.no_grad():
        net = copied(model).eval()
        menus = {layer.name: engine.menu(layer) for layer in graph}
        calls = _calls(net, [layer for layer in graph if menus[layer.name]], batch)
        kernels = {id(kernel): kernel for of in calls.values() for kernel in of}.values()
        _time_kernels(engine, list(kernels), menus, asked)
        rows = {name: _sums(of) for name, of in calls.items()}
        widest = {name: _widest(menu, asked) for name, menu in menus.items()}
        policies = [
            Policy({x.name: x.fitted(bits[x.name]) for x in graph}, graph.digest)
            for bits in (widest, {name: _outside(menu) for name, menu in menus.items()})
        ]
        wholes = [partial(run, build_at(net, graph, policy, engine, batch)[0], batch) for policy in policies]
        whole, whole_float, plain = (x.seconds for x in time_calls([*wholes, partial(run, net, batch)], seconds=1.0))
    layers, floats = sum(rows[n][str(widest[n])] for n in rows), sum(row[FLOAT] for row in rows.values())
    constant = max(min(whole - layers, whole_float - floats), 0.0) if rows else whole
    factor, float_factor = ((whole - constant) / layers, (whole_float - constant) / floats) if rows else (1.0, 1.0)
    return LatencyTable(
        model=graph.model_id,
        graph_digest=graph.digest,
        input_shape=graph.input_shape,
        machine=here.machine(),
        runtime=runtime,
        engine=here.engine(engine),
        batch_size=batch_size,
        threads=threads,
        entries={name: _scaled(row, menus[name], factor, float_factor) for name, row in rows.items()},
        constant=constant,
        factor=factor,
        float_factor=float_factor,
        whole=whole,
        whole_float=whole_float,
        float_model=plain,
        date=datetime.date.today().isoformat(),
        hub_mpq=__version__,
    )


def build_at(model: nn.Module, graph: LayerGraph, policy: Policy, engine: Runtime, batch: Any) -> tuple[nn.Module, Any]:
    """Build a float model at a policy on a runtime, with scales that suffice for timing; returns as `Runtime.build`."""
    net = copied(model).eval()
    quantize_to_policy(net, graph.at(policy.bits), policy)
    calibrate_inputs(net, sample_inputs(net, [batch], run), mse=False)
    calibrate_weights(net, mse=False)
    return engine.build(net, batch)


def policy_latency(model: nn.Module, graph: LayerGraph, table: LatencyTable, example: Any, policy: Policy) -> Timing:
    """Time a whole model at a policy, with the runtime, batch size and threads of a table.

    Args:
        model: The float network, on the CPU; it is not changed.
        graph: Its layers.
        table: A latency table of the model.
        example: One sample: positional arguments or a mapping of keyword arguments.
        policy: Bit-widths of all layers.

    Returns:
        The time of one call.

    Raises:
        HubMPQError: The runtime is not available, or cannot run the model.

    Example:
        >>> import torch
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.runtime import policy_latency
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> table = mpq.measure_latency("torch")
        >>> policy = Policy.uniform(mpq.graph, "W4A4")
        >>> policy_latency(mpq.model, mpq.graph, table, torch.zeros(1, 3, 32, 32), policy).seconds > 0
        True
    """
    engine, batch = runtime_here(table.runtime), batch_of(example, table.batch_size)
    with threads_of(table.threads), torch.no_grad():
        built, _ = build_at(model, graph, policy, engine, batch)
        (found,) = time_calls([partial(run, built, batch)], seconds=1.0)
    return found


def _widest(menu: Iterable[LayerBits], asked: set[LayerBits]) -> LayerBits:
    """The widest of the requested pairs, or of all; W8A8 for a layer that never computes in integers."""
    pairs = [bits for bits in menu if bits in asked] or list(menu) or [LayerBits(8, 8)]
    return max(pairs, key=lambda bits: (bits.weight * bits.activation, bits.activation))


def _outside(menu: Iterable[LayerBits]) -> LayerBits:
    """Bit-widths that are computed in float: W8A8 if it is not on the menu, else a float input."""
    return LayerBits(8, FLOAT_BITS) if LayerBits(8, 8) in menu else LayerBits(8, 8)


def _scaled(
    row: Mapping[str, float], menu: Iterable[LayerBits], factor: float, float_factor: float
) -> dict[str, float]:
    """The entries of a layer: its times multiplied by the factors, and pairs outside the menu in float."""
    plain = float_factor * row[FLOAT]
    outside = {str(bits): plain for bits in PAIRS if bits not in menu}
    return {key: factor * x for key, x in row.items() if key != FLOAT} | outside | {FLOAT: plain}


def _calls(net: nn.Module, layers: Iterable[LayerSpec], batch: Any) -> dict[str, list[_Kernel]]:
    """{layer: the kernel of each of its calls} in one run; layers that did not run are omitted."""
    found: dict[str, list[_Kernel]] = {}
    known: dict[Any, _Kernel] = {}

    def note(layer: LayerSpec, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_operand(args, kwargs).detach()
        kind = (layer.kind, layer.weight_shape, repr(module), tuple(x.shape), bool((x < 0).any()))
        if kind not in known:
            known[kind] = _Kernel(layer, module, x.clone())
        found.setdefault(layer.name, []).append(known[kind])

    hooks = []
    for layer in layers:

        def hook(module: nn.Module, args: Any, kwargs: Any, layer: LayerSpec = layer) -> None:
            note(layer, module, args, kwargs)

        hooks.append(net.get_submodule(layer.name).register_forward_pre_hook(hook, with_kwargs=True))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path bypasses the modules
    try:
        run(net, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in hooks:
            handle.remove()
    return found


def _time_kernels(
    engine: Runtime, kernels: list[_Kernel], menus: dict[str, tuple[LayerBits, ...]], asked: set[LayerBits]
) -> None:
    from huggingface_hub.utils import tqdm

    for kernel in tqdm(kernels, desc=f"layers on {engine.name}", unit="kernel", leave=False, disable=None):
        menu = menus[kernel.layer.name]
        widest = _widest(menu, asked)
        timed = [bits for bits in menu if bits in asked] or [widest] if engine.time_by_width else [widest]
        calls = [_alone(kernel, bits, engine) for bits in (*timed, _outside(menu))]
        *found, plain = (timing.seconds for timing in time_calls(calls))
        alike = () if engine.time_by_width else menu
        kernel.seconds = {str(bits): found[0] for bits in alike} | {FLOAT: plain}
        kernel.seconds |= {str(bits): seconds for bits, seconds in zip(timed, found, strict=True)}


def _alone(kernel: _Kernel, bits: LayerBits, engine: Runtime) -> Any:
    """A call of a single layer on a runtime."""
    net = nn.Sequential(copied(kernel.module)).eval()
    free = {"tie": None, "activation_tie": None, "weight_owner": None, "input_owner": None, "fixed": None}
    graph = LayerGraph("", None, "", (), (replace(kernel.layer, name="0", **free),))  # type: ignore[arg-type]
    built, _ = build_at(net, graph, Policy({"0": bits}, graph.digest), engine, (kernel.x,))
    return partial(run, built, (kernel.x,))


def _sums(kernels: list[_Kernel]) -> dict[str, float]:
    """Seconds of all calls of a layer in one run."""
    return {key: sum(kernel.seconds[key] for kernel in kernels) for key in kernels[0].seconds}
