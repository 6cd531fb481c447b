"""Calls of patch embedding and head as DiTs make them for windows: compiled, checked, timed and tuned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..common.case import Arguments, Case, Cost, RealSize, Work
from ..common.shapes import WINDOWS
from .embed_window import embed_window
from .project_step import project_step


@dataclass(frozen=True)
class _Window:
    """A window of four blocks in stores of seven and nine."""

    width: int
    z: int
    z_ref: int = 0
    mask_channels: int = 0
    dtype: torch.dtype = torch.bfloat16
    store: torch.dtype = torch.float32
    #: Elements between rows of pixels, or between tokens, beyond their own; 1 leaves nothing aligned.
    gap: int = 0
    step: bool = True
    batch: int = 2
    #: Rows and columns of a block.
    size: tuple[int, int] = (16, 32)
    real: bool = False
    new: Callable[..., Tensor] = torch.ones

    def blocks(self, z: int, number: int, device: torch.device) -> Tensor:
        rows, columns = self.size
        wide = self.new(self.batch, z, number, rows, columns + self.gap, dtype=self.store, device=device)
        return wide[..., :columns]

    def embedding(self, device: torch.device) -> Arguments:
        """Returns a call of ``embed_window``, with one given block among four."""
        in_channels = self.z + self.mask_channels + self.z_ref
        weight = self.new(self.width, in_channels, 1, 2, 2, dtype=self.dtype, device=device)
        index = _int32((-1, -1, 0, 1, 2) if self.real else (3, -1, 0, 6), device)
        options: dict[str, object] = {"backend": "triton", "latent_index": index, "reference_index": index.clamp(min=0)}
        options["reference"] = self.blocks(self.z_ref or self.z, 9, device)
        if self.mask_channels:
            options["mask"] = (index < 0).float()
        return (self.blocks(self.z, 7, device), weight, weight[:, 0, 0, 0, 0].contiguous()), options

    def head(self, device: torch.device) -> Arguments:
        """Returns a call of ``project_step``, with three targets among four blocks."""
        index, rows = ((-1, -1, 0, 1, 2), (0, 1, 2, 2, 2)) if self.real else ((5, -1, 0, 3), (0, 1, 2, 2))
        x = self.new(self.batch, self.tokens(len(index)), self.width + self.gap, dtype=self.dtype, device=device)[
            ..., : self.width
        ]
        weight = self.new(4 * self.z, self.width, dtype=self.dtype, device=device)
        shift, scale = torch.zeros(self.batch, 3, 2, self.width, device=device).unbind(2)
        options: dict[str, object] = {"latent_index": _int32(index, device), "block_map": _int32(rows, device)}
        options |= {"step": torch.full((), -0.05, device=device) if self.step else None, "backend": "triton"}
        return (x, weight, weight[:, 0].contiguous(), shift, scale, self.blocks(self.z, 7, device)), options

    def work(self, constants: Mapping[str, Any], pixel: int) -> Work:
        """Returns the work of one step: a tile of tokens, or of pixels of ``pixel`` bytes, and one of weights."""
        rows, columns, depth = (constants[f"BLOCK_{x}"] for x in "MNK")
        if self.dtype == torch.float32:  # which the tensor cores do not take
            return Work(0, 4 * (rows + columns) * depth)
        return Work(rows * columns * depth, (pixel * rows + 2 * columns) * depth)

    def at(self, model: str) -> _Window:
        """Returns the largest window of a model, of two given blocks and three noisy ones."""
        rows, columns = WINDOWS[f"CSG window 2560x1408, {model}"].grid
        return replace(self, batch=1, size=(2 * rows, 2 * columns), real=True, new=torch.empty)

    def tokens(self, blocks: int) -> int:
        return blocks * self.size[0] * self.size[1] // 4


def _int32(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _case(operator: Callable[..., Any], name: str, window: _Window, model: str = "") -> Case:
    """Returns a case; with a model, its real size is that of the model's largest window, in 16 bits.

    All five of its blocks are embedded, and the three that are targets projected.
    """
    embeds, real = operator is embed_window, None
    inputs = _Window.embedding if embeds else _Window.head
    if model:
        whole = window.at(model)
        tokens, features = whole.tokens(5 if embeds else 3), 4 * (window.z + window.z_ref)
        latents, results = 4 * tokens * features, 2 * tokens * window.width  # latents are float32
        features += 4 * window.mask_channels  # which are not read
        weight = 2 * window.width * (features + 1) if embeds else 2 * features * (window.width + 1)
        read, written = (latents, results) if embeds else (results + latents, latents)
        cost = Cost(2 * tokens * features * window.width, read + weight, written)
        real = RealSize(f"CSG window 2560x1408, {model}", functools.partial(inputs, whole), cost)
    work = functools.partial(window.work, pixel=4 if embeds else 2)
    return Case(f"{operator.__name__} {name}", operator, functools.partial(inputs, window), work, real)


_embed, _project = (functools.partial(_case, operator) for operator in (embed_window, project_step))
CASES = [
    _embed("c1536 z16+4+16", _Window(1536, 16, 16, 4), "1.3B"),
    _embed("c3072 z48+4+48", _Window(3072, 48, 48, 4), "5B"),
    _embed("c3072 z48", _Window(3072, 48)),
    _embed("c5120 z16+4+16 fp16", _Window(5120, 16, 16, 4, torch.float16, torch.float16)),
    _embed("c1536 z16 fp32", _Window(1536, 16, dtype=torch.float32)),
    _embed("c96 z16+4+16", _Window(96, 16, 16, 4, store=torch.bfloat16)),
    _embed("c1536 z16+4+16 unaligned", _Window(1536, 16, 16, 4, gap=1)),
    _project("c1536 z16", _Window(1536, 16), "1.3B"),
    _project("c3072 z48", _Window(3072, 48), "5B"),
    _project("c5120 z16 fp16, velocity", _Window(5120, 16, dtype=torch.float16, store=torch.float16, step=False)),
    _project("c1536 z16 fp32", _Window(1536, 16, dtype=torch.float32)),
    _project("c96 z16", _Window(96, 16, store=torch.bfloat16)),
    _project("c1536 z16 unaligned", _Window(1536, 16, gap=1)),
]
