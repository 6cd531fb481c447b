"""Where the VAE keeps what waits: on the device, or in pinned host memory and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Host:
    """Moves tensors away from ``device`` while they wait, if ``enabled`` and the device is not the CPU itself.

    Copies are ordered with the work on the current stream; those to pinned memory do not stop it.
    """

    def __init__(self, device: torch.device, enabled: bool):
        self.device = device
        self.enabled = enabled and device.type != "cpu"

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for what is assembled while tiles come and go."""
        if not self.enabled:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.device.type == "cuda")

    def near(self, target: Tensor) -> Tensor:
        """Memory on the device for what belongs into ``target``: itself where nothing is moved."""
        return torch.empty(target.shape, dtype=target.dtype, device=self.device) if self.enabled else target

    def park(self, x: Tensor) -> Tensor:
        """``x`` for later; itself where nothing is moved."""
        if not self.enabled:
            return x
        # A copy that stays dense even of a view into something larger.
        return self.empty(x.shape, x.dtype).copy_(x, non_blocking=True)

    def fetch(self, x: Tensor) -> Tensor:
        """What was parked, or a part of it, on the device again."""
        return x.to(self.device, non_blocking=True) if self.enabled else x
