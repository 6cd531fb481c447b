"""The VAE's encoder in every dtype, compared with float64: what 16 bits cost, and how much room float16 leaves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.assets import PHOTO
from bench.precision.forms import compared
from model.io.photo import fit_image, open_image
from model.machine.host import release
from model.vae.model import WanVAE

IDENTITY = ("model", "weights", "size", "frames", "form")
METRICS = ("error", "largest_error", "error_ratio", "largest_activation")
NOTE = (
    "Latents of a pan over the shipped photograph, compared with the same weights in float64. Float32 is multiplied as"
    " torch is set to, on a GPU in TF32 unless told otherwise. The largest activation is that of the tensors that"
    f" operators hand to each other; float16 ends at {torch.finfo(torch.float16).max:,.0f}."
)
#: The coarsest, the baseline of ``error_ratio``, first.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FRAMES = 5
#: Pixels that the pan moves a frame.
PAN = 2


class Largest(TorchDispatchMode):
    """A mode that finds, as ``value``, the largest magnitude in the tensors of a dtype that operators hand to each
    other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.value = dtype, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        arguments = func._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        # A view writes nothing, and the memory that ``empty`` returns has not been written.
        if "empty" not in func.name() and not any(r.alias_info is not None for r in func._schema.returns):
            written.append(result)
        for x in tree_leaves(written):
            if isinstance(x, Tensor) and x.dtype == self.dtype and x.numel():
                self.value = max(self.value, x.abs().max().item())
        return result


def make_video(size: tuple[int, int]) -> Tensor:
    """Returns a video of the photograph moved sideways, ``[1, 3, F, H, W]`` in -1..1, float32 on the CPU."""
    picture = fit_image(open_image(PHOTO), size)
    return torch.cat([picture.roll(PAN * i, 4) for i in range(FRAMES)], 2)


@torch.no_grad()
def encoder_rows(
    build: Callable[[], WanVAE], model: str, weights: str, size: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the table ``encoder``, one for each dtype; one VAE is in memory at a time.

    Args:
        build: makes a VAE with its encoder in float32.
        model, weights: the names of both in the table.
        size: width and height of the frames in pixels.
    """
    video = make_video(size)
    # The largest activation is that in bfloat16, which holds what float16 cannot.
    largest = Largest(torch.bfloat16)

    def encoded(dtype: torch.dtype) -> Tensor:
        vae = build().to(dtype)
        device = vae.device
        try:
            with largest if dtype == largest.dtype else nullcontext():
                return vae.encode(video.to(device, dtype)).cpu()
        finally:
            del vae
            release(device)

    base = {"model": model, "weights": weights, "size": f"{size[0]}x{size[1]}", "frames": FRAMES}
    made = {str(dtype).removeprefix("torch."): functools.partial(encoded, dtype) for dtype in DTYPES}
    for row in compared(base, "float64", functools.partial(encoded, torch.float64), made):
        yield row | {"largest_activation": largest.value or None}
