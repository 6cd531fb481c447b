"""The VAE's encoder in every dtype, compared with float64: what 16 bits cost, and how much room float16 leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.assets import PHOTO
from bench.precision.forms import add_ratios, errors_of
from bench.records.outcome import FAILURES, failure
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
#: The last one, the coarsest, is the baseline of ``error_ratio``.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FRAMES = 5
#: Pixels that the pan moves a frame.
PAN = 2


class Largest(TorchDispatchMode):
    """A mode that finds the largest magnitude that operators write in a dtype, as ``largest.value``.

    It is used as ``with Largest(dtype) as largest: ...`` and sees the tensors that operators hand to each other, not
    what they compute inside.
    """

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
    base = {"model": model, "weights": weights, "size": f"{size[0]}x{size[1]}", "frames": FRAMES}
    rows: list[dict[str, Any]] = []
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    try:
        expected = _encode(build, torch.float64, video)
    except FAILURES as error:
        # Nothing can be compared without the latents in float64.
        found = failure(error)
        found["reason"] = f"float64: {found['reason']}"
        yield from (base | {"form": name} | found for name in names.values())
        return
    # The largest activation is that in bfloat16, which holds what float16 cannot.
    largest = Largest(torch.bfloat16)
    for dtype in reversed(DTYPES):
        row = base | {"form": names[dtype]}
        try:
            latents = _encode(build, dtype, video, largest if dtype == largest.dtype else None)
            row |= errors_of(latents, expected)
        except ValueError as error:  # the VAE's own check of its latents
            row |= {"status": "wrong", "reason": str(error)}
        except FAILURES as error:
            row |= failure(error)
        row["largest_activation"] = largest.value or None
        rows.insert(0, row)
    add_ratios(rows)
    yield from rows


def _encode(
    build: Callable[[], WanVAE], dtype: torch.dtype, video: Tensor, watched: AbstractContextManager[Any] | None = None
) -> Tensor:
    vae = build().to(dtype)
    device = vae.device
    try:
        with watched or nullcontext():
            return vae.encode(video.to(device, dtype)).cpu()
    finally:
        del vae
        release(device)
