"""A DiT whose layers live where a :class:`model.streaming.placement.Placement` says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from model.dit.model import WanDiT, dit_parameter_dtype
from model.dit.parts import ScaledLinear
from model.machine.counted import elsewhere
from model.machine.host import pinned_bytes
from model.streaming.placement import NO_TENSORS, SCALE, TABLE, LayerLayout, Placement, layer_layouts
from model.streaming.stream import SLOTS, DirectCopies, LayerStream, Source, StreamCopies
from swifti2v_kernels import dequantize_rows


class TensorSource(Protocol):
    """The source of a DiT's tensors, by their names in the model."""

    def plain(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Returns a tensor by its name, in ``dtype`` on ``device``."""

    def eight_bits(self, name: str, kind: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Reads a matrix ``[N, K]`` as values of ``kind`` and one float32 scale a row ``[N]``."""


def place(
    model: WanDiT,
    placement: Placement,
    tensors: TensorSource,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    stored: Mapping[str, str] = NO_TENSORS,
) -> WanDiT:
    """Gives a model without memory its weights.

    A layer that is copied in every pass has views of a slot as parameters, which hold its weights while
    :meth:`WanDiT.walk` is at it and another layer's at other times; so the state of such a model cannot be saved, nor
    LoRAs applied to it. Merge them as it is loaded.

    Args:
        model: on ``meta``; it is changed and returned.
        placement: where its layers go.
        tensors: its weights; asked again in every pass for layers that stay in files.
        dtype: the dtype of the model.
        device: where it runs; ``meta`` to count.
        stored: as for :func:`model.streaming.placement.layer_layouts`.
    """
    device = torch.device(device)
    homes = placement.homes(model.config.num_layers)
    layouts = layer_layouts(model.config, dtype, placement, stored)
    moving = [i for i, home in enumerate(homes) if home != "device"]
    size = max((layouts[i].stored.nbytes for i in moving), default=0)
    slots = [_bytes(size, device) for _ in moving[:SLOTS]]
    unpacked = _bytes(max(layout.unpacked.nbytes for layout in layouts), device)
    fixed = [name for name, _ in model.named_parameters() if not name.startswith("blocks.") or TABLE in name]
    plain = {name: tensors.plain(name, dit_parameter_dtype(name, dtype), device) for name in fixed}
    model.load_state_dict(plain, strict=False, assign=True)
    sources: dict[int, Source] = {}
    unpack: dict[int, Callable[[], None]] = {}
    for i, (layer, layout, home) in enumerate(zip(model.blocks, layouts, homes, strict=True)):
        fill = functools.partial(_fill, layout, tensors, f"blocks.{i}.")
        if home == "device":
            flat = _bytes(layout.stored.nbytes, device)
            fill(flat, device)
        else:
            flat = slots[moving.index(i) % SLOTS]
            sources[i] = _source(fill, layout.stored.nbytes, home, device)
        if packed := _bind(layer, layout, flat, unpacked, placement):
            unpack[i] = functools.partial(_unpack, packed)
    engine = DirectCopies(slots)
    if moving and device.type == "cuda":
        size = max((layouts[i].stored.nbytes for i in moving if homes[i] == "file"), default=0)
        engine = StreamCopies(slots, [pinned_bytes(size, device) for _ in slots])
    model.eight_bits = placement.matmul_dtype
    model.stream = LayerStream(list(model.blocks), sources, unpack, engine)
    return model.requires_grad_(False).eval()


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _source(fill: Callable[..., None], size: int, home: str, device: torch.device) -> Source:
    if device.type == "meta":
        return lambda target: None
    if home == "file":
        return lambda target: fill(target, target.device)
    with elsewhere():
        flat = pinned_bytes(size, device)
        # Where there is a GPU, 8-bit forms are computed there.
        fill(flat, device)
    return flat


def _fill(layout: LayerLayout, tensors: TensorSource, prefix: str, flat: Tensor, device: torch.device) -> None:
    """Writes a layer's weights to ``flat``; ``device`` is where its tensors are made."""
    views = layout.stored.views(flat)
    for name, view in views.items():
        if name + SCALE in views:
            values, scales = tensors.eight_bits(prefix + name, view.dtype, device)
            view.copy_(values)
            views[name + SCALE].copy_(scales)
        elif not name.endswith(SCALE):
            view.copy_(tensors.plain(prefix + name, view.dtype, device))


def _bind(
    layer: nn.Module, layout: LayerLayout, flat: Tensor, unpacked: Tensor, placement: Placement
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Makes views of the buffers the parameters of a layer.

    Returns:
        Views of every matrix in 8 bits that is unpacked: its values, its scales, and the place that it is unpacked to.
    """
    stored, targets = layout.stored.views(flat), layout.unpacked.views(unpacked)
    views = {name: view for name, view in (stored | targets).items() if not name.endswith(SCALE)}
    if placement.matmul == "8bit":
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                weight, bias = (views.pop(f"{name}.{leaf}") for leaf in ("weight", "bias"))
                layer.set_submodule(name, ScaledLinear(weight, stored[f"{name}.weight{SCALE}"], bias))
    layer.load_state_dict(views, strict=False, assign=True)
    return [(stored[name], stored[name + SCALE], target) for name, target in targets.items()]


def _unpack(matrices: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for values, scales, target in matrices:
        dequantize_rows(values, scales, dtype=target.dtype, out=target)
