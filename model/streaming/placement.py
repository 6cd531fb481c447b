"""The decision where the weights of a DiT's layers are while it runs and how they are written, and its bytes.

    device   a layer stays there
    host     it waits in pinned host memory and is copied into one of two slots on the device in every pass
    file     it is read from its checkpoint, memory-mapped, in every pass, and goes the same way

Streamed layers lie evenly between those that stay, so that each copy is hidden by the work of several layers. What is
not in a layer (embeddings, head, modulation tables) is small and always on the device.

Matrices may be written in 8 bits, with one scale a row (``quantize``). They are then either unpacked into the room of
one layer on the device just before that layer runs, so that matmuls are those of the model's dtype and the result is,
bit for bit, that of a model loaded from the same 8-bit numbers; or multiplied as they are (``matmul``), which gives
another result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import DiTConfig
from model.dit.layer import DiTLayer
from model.dit.model import WanDiT, dit_parameter_dtype
from model.errors import InputError
from model.streaming.stream import SLOTS

#: How layer matrices are written: in the model's dtype; in 8 bits where the checkpoint has them so; or all in 8 bits.
QUANTIZE = ("none", "file", "float8", "int8")
#: How layer matrices are multiplied: in the model's dtype, or in 8 bits.
MATMUL = ("plain", "8bit")
#: Every tensor in a buffer begins at a multiple of this number of bytes.
ALIGNMENT = 256
SCALE = ".scale"
#: A parameter of a layer that is not in its buffer: those of all layers are read at once when a clip begins.
TABLE = "scale_shift_table"
NO_TENSORS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Placement:
    """The decision for one DiT.

    Args:
        resident: the number of layers that stay on the device; None: all.
        pinned: the number of the others that wait in pinned host memory; None: all. The rest is read from files.
        quantize: one of :data:`QUANTIZE`: the form of layer weights.
        matmul: ``plain``, or ``8bit``: activations are quantised too, one scale a token (W8A8).

    Raises:
        InputError: a value is unknown, or they do not go together.
    """

    resident: int | None = None
    pinned: int | None = None
    quantize: str = "none"
    matmul: str = "plain"

    def __post_init__(self) -> None:
        for name, allowed in (("quantize", QUANTIZE), ("matmul", MATMUL)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("resident", "pinned"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise InputError(f"{name}: expected None or at least 0, got {getattr(self, name)}")
        if self.matmul == "8bit" and self.quantize not in ("float8", "int8"):
            raise InputError(f"matmul: 8bit goes with quantize float8 or int8, got {self.quantize}")

    def homes(self, num_layers: int) -> tuple[str, ...]:
        """Returns ``device``, ``host`` or ``file`` for every layer."""
        kept = num_layers if self.resident is None else min(self.resident, num_layers)
        streamed = _spread(num_layers - kept, num_layers)
        pinned = len(streamed) if self.pinned is None else min(self.pinned, len(streamed))
        from_file = {streamed[i] for i in _spread(len(streamed) - pinned, len(streamed))}
        moving = set(streamed)
        return tuple("file" if i in from_file else "host" if i in moving else "device" for i in range(num_layers))

    @property
    def matmul_dtype(self) -> torch.dtype | None:
        """The dtype of quantised activations; None where matmuls are plain."""
        if self.matmul == "plain":
            return None
        return torch.int8 if self.quantize == "int8" else torch.float8_e4m3fn


def _spread(count: int, total: int) -> list[int]:
    """Returns ``count`` of ``total`` indices, evenly spread."""
    return [(2 * k + 1) * total // (2 * count) for k in range(count)]


class Entry(NamedTuple):
    """A tensor of a layer in a buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def room(self) -> int:
        """The bytes from the beginning of the tensor to that of the next one."""
        return -(-prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Buffer:
    """Tensors of a layer that lie one after the other in a flat buffer of bytes."""

    entries: tuple[Entry, ...]

    @functools.cached_property
    def nbytes(self) -> int:
        """The bytes of the buffer."""
        return sum(entry.room for entry in self.entries)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns the tensors in ``flat``, by name."""
        rooms = flat[: self.nbytes].split([entry.room for entry in self.entries])
        return {
            name: room.view(dtype)[: prod(shape)].view(shape)
            for (name, shape, dtype), room in zip(self.entries, rooms, strict=True)
        }


class LayerLayout(NamedTuple):
    """The buffer of a layer's weights, kept or copied, and that of the matrices unpacked just before the layer runs."""

    stored: Buffer
    unpacked: Buffer


def layer_layouts(
    config: DiTConfig, dtype: torch.dtype, placement: Placement, stored: Mapping[str, str] = NO_TENSORS
) -> list[LayerLayout]:
    """Returns the layouts of all layers.

    Args:
        config: the shape of the DiT.
        dtype: the dtype of the model.
        placement: where its layers are, and their form.
        stored: dtypes, by name, of the tensors that the checkpoint holds in 8 bits and that are taken as they are.
    """
    layouts, names = [], _shapes(config) if stored else ()
    for i in range(config.num_layers):
        given = tuple((name, stored[full]) for name in names if (full := f"blocks.{i}.{name}") in stored)
        layouts.append(_layout(config, dtype, placement.quantize, placement.matmul, given))
    return layouts


@functools.lru_cache(maxsize=256)
def _layout(
    config: DiTConfig, dtype: torch.dtype, quantize: str, matmul: str, given: tuple[tuple[str, str], ...]
) -> LayerLayout:
    known = dict(given)
    stored, unpacked = [], []
    for name, shape in _shapes(config).items():
        kind = _eight_bits(quantize, matmul, len(shape), known.get(name))
        if kind is None:
            stored.append(Entry(name, shape, dit_parameter_dtype(f"blocks.0.{name}", dtype)))
            continue
        stored += [Entry(name, shape, kind), Entry(name + SCALE, shape[:1], torch.float32)]
        if matmul == "plain":
            unpacked.append(Entry(name, shape, dtype))
    return LayerLayout(Buffer(tuple(stored)), Buffer(tuple(unpacked)))


def _eight_bits(quantize: str, matmul: str, rank: int, given: str | None) -> torch.dtype | None:
    """Returns the 8-bit dtype that a tensor is kept in, or None. Only matrices are ever in 8 bits."""
    if rank != 2 or quantize == "none" or (quantize == "file" and given is None):
        return None
    if quantize == "int8" or (quantize == "file" and given == "int8"):
        return torch.int8
    # 8-bit matmuls take e4m3 only.
    if given == "float8_e5m2" and matmul == "plain":
        return torch.float8_e5m2
    return torch.float8_e4m3fn


@functools.cache
def _shapes(config: DiTConfig) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of the tensors of one layer that its buffer holds."""
    with torch.device("meta"):
        layer = DiTLayer(config)
    return {name: tuple(p.shape) for name, p in layer.named_parameters() if name != TABLE}


@dataclass(frozen=True)
class PlacedBytes:
    """The bytes of a placed DiT.

    ``fixed`` is what is not in layers, ``resident`` the layers that stay, ``slots`` the room for those that are copied,
    ``unpacked`` that of one layer's unpacked matrices: all on the device. ``pinned`` are the layers in host memory and
    ``staging`` the two buffers there that files are read into. ``copied`` crosses the bus in every pass, and ``read``
    comes from files.
    """

    fixed: int
    resident: int
    slots: int
    unpacked: int
    pinned: int
    staging: int
    copied: int
    read: int

    @property
    def device(self) -> int:
        """The bytes on the device."""
        return self.fixed + self.resident + self.slots + self.unpacked

    @property
    def host(self) -> int:
        """The bytes in host memory."""
        return self.pinned + self.staging


def placed_bytes(
    config: DiTConfig, dtype: torch.dtype, placement: Placement, stored: Mapping[str, str] = NO_TENSORS
) -> PlacedBytes:
    """Returns the bytes that a placement takes; arguments as for :func:`layer_layouts`."""
    layouts = layer_layouts(config, dtype, placement, stored)
    homes = placement.homes(config.num_layers)
    on_device, on_host, in_file = (
        [layout.stored.nbytes for layout, at in zip(layouts, homes, strict=True) if at == home]
        for home in ("device", "host", "file")
    )
    moving = on_host + in_file
    return PlacedBytes(
        fixed=_fixed_bytes(config, dtype),
        resident=sum(on_device),
        slots=min(len(moving), SLOTS) * max(moving, default=0),
        unpacked=max(layout.unpacked.nbytes for layout in layouts),
        pinned=sum(on_host),
        staging=min(len(in_file), SLOTS) * max(in_file, default=0),
        copied=sum(moving) if len(moving) > SLOTS else 0,
        read=sum(in_file) if len(moving) > SLOTS else 0,
    )


@functools.cache
def _fixed_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    with torch.device("meta"):
        model = WanDiT(config)
    return sum(
        p.numel() * dit_parameter_dtype(name, dtype).itemsize
        for name, p in model.named_parameters()
        if not name.startswith("blocks.") or name.endswith(TABLE)
    )
