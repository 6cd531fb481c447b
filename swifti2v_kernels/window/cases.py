"""Calls of patch embedding and head as DiTs make them for windows: compiled, checked, timed and tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.case import Arguments, Case, RealSize
from ..common.cost import Work
from .embed_window import cost as embed_cost
from .embed_window import embed_window
from .project_step import cost as project_cost
from .project_step import project_step


class _EmbedInputs(NamedTuple):
    """The tensors of one case: a window of four blocks, one of them given, in stores of seven and nine."""

    width: int
    z: int
    z_ref: int = 0
    mask_channels: int = 0
    dtype: torch.dtype = torch.bfloat16
    store: torch.dtype = torch.float32
    patch: int = 2
    #: Elements between the rows of a block beyond w; 1 leaves nothing aligned.
    gap: int = 0
    batch: int = 2
    #: Rows and columns of a block.
    size: tuple[int, int] = (16, 32)
    index: tuple[int, ...] = (3, -1, 0, 6)
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        def blocks(z: int, number: int) -> Tensor:
            rows, columns = self.size
            return self.new(self.batch, z, number, rows, columns + self.gap, dtype=self.store, device=device)[
                ..., :columns
            ]

        in_channels = self.z + self.mask_channels + self.z_ref
        weight = self.new(self.width, in_channels, 1, self.patch, self.patch, dtype=self.dtype, device=device)
        index = torch.tensor(self.index, dtype=torch.int32, device=device)
        options: dict[str, object] = {"backend": "triton", "latent_index": index, "reference_index": index.clamp(min=0)}
        options["reference"] = blocks(self.z_ref or self.z, 9)
        if self.mask_channels:
            options["mask"] = torch.tensor([float(i < 0) for i in self.index], device=device)
        return (blocks(self.z, 7), weight, weight[:, 0, 0, 0, 0].contiguous()), options


def _embed_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step of features: pixels of 4 bytes gathered, a tile of 16-bit weights loaded."""
    rows, columns, depth = (constants[f"BLOCK_{x}"] for x in "MNK")
    return Work(rows * columns * depth, (4 * rows + 2 * columns) * depth)


def _work_float32(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step in float32, whose matrix multiplications the tensor cores do not take."""
    rows, columns, depth = (constants[f"BLOCK_{x}"] for x in "MNK")
    return Work(0, 4 * (rows + columns) * depth)


def _embed_real(shape: str, inputs: _EmbedInputs, rows: int, columns: int) -> RealSize:
    """Returns a call at real size: a window of two given blocks and three noisy ones."""
    whole = inputs._replace(batch=1, size=(rows, columns), index=(-1, -1, 0, 1, 2), new=torch.empty)
    features = 4 * (inputs.z + inputs.mask_channels + inputs.z_ref)
    return RealSize(
        shape, whole, embed_cost(1, 5 * rows * columns // 4, features, inputs.width, 4 * inputs.mask_channels)
    )


_EMBED_TIMED = {
    "c1536 z16+4+16": _embed_real("CSG window 2560x1408, 1.3B", _EmbedInputs(1536, 16, 16, 4), 176, 320),
    "c3072 z48+4+48": _embed_real("CSG window 2560x1408, 5B", _EmbedInputs(3072, 48, 48, 4), 88, 160),
}


_EMBED_CASES = [
    Case(
        f"embed_window {name}",
        embed_window,
        inputs,
        _work_float32 if inputs.dtype == torch.float32 else _embed_work,
        _EMBED_TIMED.get(name),
    )
    for name, inputs in {
        "c1536 z16+4+16": _EmbedInputs(1536, 16, 16, 4),
        "c3072 z48+4+48": _EmbedInputs(3072, 48, 48, 4),
        "c3072 z48": _EmbedInputs(3072, 48),
        "c5120 z16+4+16 fp16": _EmbedInputs(5120, 16, 16, 4, torch.float16, torch.float16),
        "c1536 z16 fp32": _EmbedInputs(1536, 16, dtype=torch.float32),
        "c96 z16+4+16": _EmbedInputs(96, 16, 16, 4, store=torch.bfloat16),
        "c1536 z16+4+16 unaligned": _EmbedInputs(1536, 16, 16, 4, gap=1),
    }.items()
]


class _ProjectInputs(NamedTuple):
    """The tensors of one case: a window of four blocks, three of them targets, in a store of seven."""

    width: int
    z: int
    dtype: torch.dtype = torch.bfloat16
    store: torch.dtype = torch.float32
    step: bool = True
    #: Elements between the tokens beyond C; 1 leaves nothing aligned.
    gap: int = 0
    batch: int = 2
    #: Rows and columns of a block of latents.
    size: tuple[int, int] = (16, 32)
    index: tuple[int, ...] = (5, -1, 0, 3)
    new: Callable[..., Tensor] = torch.ones

    def __call__(self, device: torch.device) -> Arguments:
        rows, columns = self.size
        length = len(self.index) * rows * columns // 4
        x = self.new(self.batch, length, self.width + self.gap, dtype=self.dtype, device=device)[..., : self.width]
        weight = self.new(4 * self.z, self.width, dtype=self.dtype, device=device)
        shift, scale = torch.zeros(self.batch, 3, 2, self.width, device=device).unbind(2)
        out = self.new(self.batch, self.z, 7, rows, columns + self.gap, dtype=self.store, device=device)[..., :columns]
        index = torch.tensor(self.index, dtype=torch.int32, device=device)
        options: dict[str, object] = {"latent_index": index, "backend": "triton"}
        chosen = [min(i, 2) for i in range(len(self.index))]
        options["block_map"] = torch.tensor(chosen, dtype=torch.int32, device=device)
        options["step"] = torch.full((), -0.05, device=device) if self.step else None
        return (x, weight, weight[:, 0].contiguous(), shift, scale, out), options


def _project_work(constants: Mapping[str, Any]) -> Work:
    """Returns the work of one step of channels: tokens and weights of 16 bits."""
    rows, columns, depth = (constants[f"BLOCK_{x}"] for x in "MNK")
    return Work(rows * columns * depth, 2 * (rows + columns) * depth)


def _project_real(shape: str, inputs: _ProjectInputs, rows: int, columns: int) -> RealSize:
    """Returns a call at real size: a window of two given blocks and three targets."""
    whole = inputs._replace(batch=1, size=(rows, columns), index=(-1, -1, 0, 1, 2), new=torch.empty)
    return RealSize(shape, whole, project_cost(1, 3 * rows * columns // 4, inputs.width, 4 * inputs.z))


_PROJECT_TIMED = {
    "c1536 z16": _project_real("CSG window 2560x1408, 1.3B", _ProjectInputs(1536, 16), 176, 320),
    "c3072 z48": _project_real("CSG window 2560x1408, 5B", _ProjectInputs(3072, 48), 88, 160),
}


_PROJECT_CASES = [
    Case(
        f"project_step {name}",
        project_step,
        inputs,
        _work_float32 if inputs.dtype == torch.float32 else _project_work,
        _PROJECT_TIMED.get(name),
    )
    for name, inputs in {
        "c1536 z16": _ProjectInputs(1536, 16),
        "c3072 z48": _ProjectInputs(3072, 48),
        "c5120 z16 fp16, velocity": _ProjectInputs(5120, 16, torch.float16, torch.float16, False),
        "c1536 z16 fp32": _ProjectInputs(1536, 16, torch.float32),
        "c96 z16": _ProjectInputs(96, 16, store=torch.bfloat16),
        "c1536 z16 unaligned": _ProjectInputs(1536, 16, gap=1),
    }.items()
]

CASES = [*_EMBED_CASES, *_PROJECT_CASES]
