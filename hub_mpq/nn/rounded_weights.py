"""Weights of layers rounded for all choices of a search and stored on disk, so that each is rounded only once."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..core import Candidates, LayerBits, LayerGraph, LayerSpec, QuantSpec
from ..errors import HubMPQError
from ..pack import PackedTensor
from ..pack.atomic import write_atomic
from ..quantizers import LSQ, Quantizer
from .quantize import quantize_layers

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point")


class RoundedWeights:
    """Packed weights in a folder, one file per layer, read one at a time.

    Args:
        folder: Folder in which they are kept; None for a temporary folder that is deleted with the object.
        settings: Identifies the data and settings that they were made with; files with other settings are ignored.
        nearest: Whether they are the nearest grid points to the float weights.

    Attributes:
        unreached: {layer of experts: number of its matrices that no token reached}, without zeros.
    """

    def __init__(self, folder: Path | None = None, settings: str = "", *, nearest: bool = False) -> None:
        if folder is None:
            holder = tempfile.TemporaryDirectory(prefix="hub-mpq-rounded-")
            self._holder = weakref.finalize(self, holder.cleanup)
            folder = Path(holder.name)
        self.folder, self.settings, self.nearest = folder, settings, nearest
        self.layers: dict[str, LayerSpec] = {}
        self.unreached: dict[str, int] = {}
        self._held: dict[str, dict[LayerBits, PackedTensor]] = {}

    def _file(self, layer: LayerSpec) -> Path:
        return self.folder / f"{hashlib.sha256(layer.name.encode()).hexdigest()[:24]}.safetensors"

    def add(self, layer: LayerSpec, choices: Mapping[LayerBits, PackedTensor], unreached: int = 0) -> None:
        """Store the weights of a layer.

        Args:
            layer: The layer.
            choices: {bits that its weight may take: the packed weight}.
            unreached: For experts, the number of its matrices that no token reached.

        Raises:
            HubMPQError: The file cannot be written.
        """
        tensors = {
            f"{bits}/{part}": tensor.detach().cpu().contiguous()
            for bits, packed in choices.items()
            for part, tensor in packed.parts().items()
            if part in _PARTS
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HubMPQError(f"{self.folder} cannot be written: {error}") from error
        metadata = {"settings": self.settings, "unreached": str(unreached)}
        write_atomic(self._file(layer), [save(tensors, metadata=metadata)])
        self._know(layer, unreached)
        self._held.pop(layer.name, None)

    def _know(self, layer: LayerSpec, unreached: int) -> None:
        self.layers[layer.name] = layer
        if unreached:
            self.unreached[layer.name] = unreached

    def has(self, layer: LayerSpec, choices: Sequence[LayerBits]) -> bool:
        """Whether a layer's weights exist from an interrupted run with the same settings."""
        with suppress(OSError, SafetensorError):
            with safe_open(self._file(layer), "pt") as file:
                there = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118
                known = file.metadata() or {}
            if known.get("settings") == self.settings and {str(bits) for bits in choices} <= there:
                self._know(layer, int(known["unreached"]))
                return True
        return False

    def packed(self, name: str, bits: LayerBits) -> PackedTensor:
        """A layer's weight at the given bits; raises HubMPQError if it was not rounded for them."""
        layer, key = self.layers[name], str(bits.of_weight)
        try:
            with safe_open(self._file(layer), "pt") as file:
                parts = {
                    part: file.get_tensor(f"{key}/{part}") if f"{key}/{part}" in file.keys() else None  # noqa: SIM118
                    for part in _PARTS
                }
        except (OSError, SafetensorError) as error:
            raise HubMPQError(f"cannot read the rounded weight of layer {name!r}: {error}") from error
        words, scale, zero = (parts[part] for part in _PARTS)
        if words is None or scale is None:
            raise HubMPQError(f"layer {name!r} was not rounded for {bits.of_weight}")
        return PackedTensor(words, scale, layer.weight_shape, bits.weight, layer.kind, zero, bits.group_size)

    def held(self, name: str, bits: LayerBits) -> PackedTensor:
        """As `packed`, for stacks, which are read once per running expert: those of the last two layers are kept in
        memory."""
        if name not in self._held:
            for oldest in list(self._held)[:-1]:
                del self._held[oldest]
            self._held[name] = {}
        found = self._held[name]
        if bits.of_weight not in found:
            found[bits.of_weight] = self.packed(name, bits)
        return found[bits.of_weight]


class StoredWeight(Quantizer):
    """A quantizer that ignores its input and returns a weight that was quantized before.

    Args:
        rounded: The weights.
        name: Name of the layer.
        widths: The bits that its weight may take.
    """

    def __init__(self, rounded: RoundedWeights, name: str, widths: Sequence[LayerBits]) -> None:
        super().__init__()
        self.rounded, self.name, self.widths = rounded, name, tuple(widths)
        self.bits: LayerBits | None = None

    def set_width(self, bits: LayerBits | None) -> None:
        """Select the bits; None passes the weight through."""
        self.bits = bits

    @property
    def spec(self) -> QuantSpec | None:
        return None if self.bits is None else QuantSpec(self.bits.weight)

    @property
    def scale(self) -> Tensor:
        if self.bits is None:
            return torch.ones(1)
        return self.rounded.packed(self.name, self.bits).weight_scale.float()

    @property
    def zero_point(self) -> int:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x
        return self.rounded.packed(self.name, self.bits).dequantize().to(x)

    def of_matrix(self, stack: Tensor, index: int) -> Tensor:
        if self.bits is None:
            return stack[index]
        return self.rounded.held(self.name, self.bits).matrix(index).to(stack)

    def to_int(self, x: Tensor) -> Tensor:
        """The stored integers, without subtracting zero points."""
        if self.bits is None:
            raise HubMPQError(f"no bit-width is selected for layer {self.name!r}")
        return self.rounded.packed(self.name, self.bits).unpack().to(torch.int16)


def quantize_with_stored(
    model: nn.Module, graph: LayerGraph, rounded: RoundedWeights, candidates: Mapping[str, Candidates]
) -> dict[str, Any]:
    """Replace layers of a model by layers whose weights are read from `rounded`, in place, all of them off.

    Inputs get LSQ quantizers if their bit-widths are to be chosen. For arguments and result see `quantize_with_lsq`.
    """

    def make(layer: LayerSpec, module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
        c = candidates[layer.name]
        owner = layer.weight_owner or layer.name
        inputs = None if c.float_inputs else LSQ(c.activation, signed=False)
        return StoredWeight(rounded, owner, c.weights), inputs

    return quantize_layers(model, graph, list(candidates), make)
