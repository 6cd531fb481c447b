"""The hybrid reference's frames, which never exist as a whole: the motion is upsampled where and when it is read.

Bicubic interpolation is linear in the frame and separable: a crop of the upsampled frame is ``R[rows] @ frame @
C[columns].T``, where ``R`` and ``C`` interpolate rows and columns. These matrices come from torch's own interpolation
of the unit matrix, so that any crop of the frame has the pixels of the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.vae.tiles import Region


def interpolation_matrix(size: int, target: int, device: torch.device) -> Tensor:
    """Returns the matrix ``[target, size]`` of bicubic interpolation on an axis: half-pixel centres, edges repeated."""
    # The unit matrix is an image of which only the number of rows changes, so no column is interpolated.
    unit = torch.eye(size, dtype=torch.float32, device="cpu").view(1, 1, size, size)
    return F.interpolate(unit, (target, size), mode="bicubic", align_corners=False)[0, 0].to(device)


class UpsampledFrames:
    """A :class:`model.vae.model.FrameSource` of low-resolution frames that are upsampled where they are read.

    Args:
        low: ``[B, 3, F, h, w]`` in -1..1, on any device.
        rows, columns: matrices ``[H, h]`` and ``[W, w]`` of :func:`interpolation_matrix`, on the device that reads.
        first: the clip's first frame at the new size, ``[B, 3, 1, H, W]``, which replaces frame 0.
        on_crop: called with the number of frames whenever a tile's frames were read.
    """

    def __init__(
        self,
        low: Tensor,
        rows: Tensor,
        columns: Tensor,
        first: Tensor | None = None,
        on_crop: Callable[[int], None] | None = None,
    ):
        self.low, self.rows, self.columns, self.first, self.on_crop = low, rows, columns, first, on_crop
        self.shape = (*low.shape[:3], rows.shape[0], columns.shape[0])

    def crop(self, start: int, stop: int, region: Region, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns frames ``start .. stop - 1`` over ``region``, ``[B, F, h, w, 3]``, clamped to -1..1."""
        shape = (self.shape[0], stop - start, len(region.rows), len(region.columns), 3)
        out = torch.empty(shape, device=device, dtype=dtype)
        y, x = region.slices
        down, across = self.rows[y], self.columns[x].T
        for i in range(stop - start):
            if start + i == 0 and self.first is not None:
                frame = self.first[:, :, 0, y, x]
            else:
                low = self.low[:, :, start + i].to(device, torch.float32)
                frame = (down @ low @ across).clamp_(-1, 1)  # [B, 3, h, w]
            out[:, i].copy_(frame.permute(0, 2, 3, 1))
        if self.on_crop is not None:
            self.on_crop(stop - start)
        return out
