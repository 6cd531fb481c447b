"""Patch embedding of a window straight from the stores of latents that its blocks lie in.

    token[t, y, x] = W @ patch(concat(latents[latent_index[t]], mask[t], reference[reference_index[t]]), y, x) + bias

The T blocks of a window (a block is one latent frame) are wherever their indices say, in any order: noisy ones in
``latents``; given ones, index -1, in ``reference``. Gathering them, joining the channels, cutting patches and the
matmul of the patch embedding are one kernel: no tensor of the window's pixels or patches exists.

L = T * (h/p) * (w/q) are the tokens of all blocks. C_in is z (latents alone) or z + m + z_ref (latents, m mask channels
of one value a block, reference; Wan I2V: 16 + 4 + 16). Channels are rounded to the dtype of ``weight``, sums and the
bias are float32, the token is rounded once. Sums run in the order of tiles, so results of different backends differ by
rounding only.

FLOPs: 2 * B * L * C * C_in * p * q. Least traffic: the blocks and the weight read once, the tokens written
once. Against ``torch.cat`` and a Conv3d it saves the copies of the window's channels, in the stores' dtype and in the
weight's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.checks import Spec, check_index, check_tensor, check_tensors, check_written
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator

#: Where blocks are stored, any number of them for an entry of the batch.
STORE = Spec(("B*", "z", "S", "h", "w"), last="w")


class EmbedCall(NamedTuple):
    """The arguments of a call, as the registered operator takes them; ``out`` is None where it is to be made."""

    latents: Tensor
    weight: Tensor
    bias: Tensor | None
    reference: Tensor | None
    latent_index: Tensor | None
    reference_index: Tensor | None
    mask: Tensor | None
    out: Tensor | None

    def num_blocks(self) -> int:
        return self.latents.shape[2] if self.latent_index is None else self.latent_index.shape[0]

    def result(self) -> tuple[int, int, int]:
        batch, _, _, height, width = self.latents.shape
        channels, _, _, p, q = self.weight.shape
        return batch, self.num_blocks() * (height // p) * (width // q), channels

    def check(self) -> None:
        """Checks what can be known of the call: values of indices on the CPU only."""
        latents, weight, reference = self.latents, self.weight, self.reference
        check_tensor("latents", latents, STORE)
        device, (batch, z, num_latents, height, width) = latents.device, latents.shape
        check_tensor("weight", weight, Spec(("C", "C_in", 1, "p", "q"), whole=True), device)
        channels, in_channels, _, p, q = weight.shape
        if height % p or width % q:
            raise ValueError(f"latents: {height} x {width} is not a multiple of weight's patch {p} x {q}")
        given = Spec((batch, "z", "S", height, width), last="w")
        check_tensors(self, device, bias=Spec((channels,), weight.dtype, whole=True), reference=given)
        z_ref, num_given = (0, 0) if reference is None else reference.shape[1:3]
        if self.latent_index is not None:
            least = -1 if z_ref == z else 0
            check_index("latent_index", self.latent_index, None, least, num_latents - 1, device)
        num_blocks = self.num_blocks()
        if self.reference_index is not None:
            if reference is None:
                raise ValueError("reference_index: expected None, since there is no reference")
            check_index("reference_index", self.reference_index, num_blocks, 0, num_given - 1, device)
        elif reference is not None and num_given < num_blocks:
            raise ValueError(
                f"reference: expected at least {num_blocks} blocks without reference_index, got {num_given}"
            )
        mask_channels = 0 if in_channels == z else in_channels - z - z_ref
        if mask_channels < 0 or (reference is None and in_channels != z):
            more = "; more need a reference" if reference is None else f", or at least {z} + {z_ref} with the reference"
            raise ValueError(f"weight: expected {z} channels, those of latents{more}, got {in_channels}")
        if reference is not None and in_channels == z != z_ref:
            raise ValueError(f"reference: expected {z} channels as latents, got {z_ref}; weight takes latents alone")
        if (self.mask is None) != (mask_channels == 0):
            expected = f"float32 [{num_blocks}]" if mask_channels else "None"
            raise ValueError(
                f"mask: expected {expected} for weight's {mask_channels} mask channels,"
                f" got {'None' if self.mask is None else 'a tensor'}"
            )
        check_tensors(self, device, mask=Spec((num_blocks,), torch.float32, whole=True))
        check_tensors(self, device, out=Spec(self.result(), weight.dtype, last="its last axis"))

    def check_written(self) -> None:
        check_written(self, ("out",))

    def obstacle(self) -> str | None:
        return kernel_obstacle(self)

    def by_torch(self) -> Tensor:
        """Computes the formula above in PyTorch, differentiable; tokens are NaN for an index that names no block."""
        self.check_written()
        weight, reference, latent_index = self.weight, self.reference, self.latent_index
        x, inside = _gather(self.latents, latent_index, self.num_blocks(), weight.dtype)
        if reference is not None:
            given, known = _gather(reference, self.reference_index, self.num_blocks(), weight.dtype)
            if latent_index is not None and given.shape[1] == x.shape[1]:
                replaced = latent_index == -1
                x = torch.where(replaced[:, None, None], given, x)
                inside = inside | (replaced & known)
            if weight.shape[1] != self.latents.shape[1]:
                parts = [x, given]
                if self.mask is not None:
                    channels = weight.shape[1] - x.shape[1] - given.shape[1]
                    shown = self.mask.to(weight.dtype)[:, None, None].expand(len(x), channels, -1, *x.shape[3:])
                    parts.insert(1, shown)
                x, inside = torch.cat(parts, dim=1), inside & known
        wide = torch.promote_types(weight.dtype, torch.float32)
        patches = rearrange(
            x.to(wide), "b c t (y p) (x q) -> b t (y x) (c p q)", p=weight.shape[3], q=weight.shape[4]
        )  # [B, T, tokens of a block, K]
        tokens = F.linear(patches, weight.flatten(1).to(wide), None if self.bias is None else self.bias.to(wide))
        if latent_index is not None or self.reference_index is not None:
            tokens = tokens.masked_fill(~inside[:, None, None], float("nan"))
        tokens = tokens.flatten(1, 2).to(weight.dtype)
        return tokens if self.out is None else self.out.copy_(tokens)

    def by_kernel(self) -> Tensor:
        out = self.weight.new_empty(self.result()) if self.out is None else self.out
        _embed_window_op(*self[:-1], out)
        return out


def _gather(store: Tensor, index: Tensor | None, num_blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the blocks ``[B, z, T, h, w]`` of a store, any one for an index outside, and which are inside."""
    if index is None:
        index = torch.arange(num_blocks, device=store.device)
    last = store.shape[2] - 1
    return store.index_select(2, index.clamp(0, last)).to(dtype), (index >= 0) & (index <= last)


# The operator writes into ``out`` and returns nothing, so that the public function's allocation is the only one and
# torch.compile sees it.
_embed_window_op = kernel_operator(
    "embed_window",
    "(Tensor latents, Tensor weight, Tensor? bias, Tensor? reference, Tensor? latent_index, Tensor? reference_index,"
    " Tensor? mask, Tensor(a!) out)",
    EmbedCall,
)


@public_operator
def embed_window(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    latent_index: Tensor | None = None,
    reference_index: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Embeds the patches of a window whose blocks are read where they are stored.

    Token (t, y, x) is ``W @ patch(concat(latents[latent_index[t]], mask[t], reference[reference_index[t]]), y, x)``
    plus ``bias``, with the weight as a matrix W.

    Args:
        latents: store of noisy latents ``[B, z, S, h, w]``, any strides but w contiguous; h and w are multiples of the
            patch. Stride 0 (``expand``) is fine. Stores and weight are float32, float16 or bfloat16, each its own.
        weight: weight ``[C, C_in, 1, p, q]`` of the patch embedding, contiguous, as Conv3d has it. ``C_in`` is ``z``,
            or ``z + m + z_ref`` for channels in the order latents, mask, reference.
        bias: ``[C]`` in the dtype of ``weight``.
        reference: store ``[B, z_ref, N, h, w]`` of given blocks; any strides but w contiguous.
        latent_index: int32 ``[T]`` on the device: block i of the window is ``latents[:, :, latent_index[i]]``, in any
            order and repeated if need be. At -1 the block is given, and its latents are those of ``reference``, which
            must then have z channels. Default ``0 .. S-1``.
        reference_index: int32 ``[T]``: the index of each block in ``reference``; default ``0 .. T-1``.
        mask: float32 ``[T]``: the value of all m mask channels of each block (1: given). For ``m > 0`` only.
        out: where to write, ``[B, T*(h/p)*(w/q), C]`` in the dtype of ``weight``, C contiguous; overlaps no input.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        Tokens ``[B, T*(h/p)*(w/q), C]`` in the dtype of ``weight``, by block, row and column (``out`` if given). Index
        values are checked on the CPU only; on a GPU, an entry out of range makes its block's tokens NaN.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> latents, given = torch.randn(1, 16, 5, 4, 6), torch.randn(1, 16, 9, 4, 6)
        >>> weight = torch.randn(32, 36, 1, 2, 2)
        >>> index, mask = torch.tensor([4, -1, 0], dtype=torch.int32), torch.tensor([0.0, 1.0, 0.0])
        >>> embed_window(latents, weight, reference=given, latent_index=index, mask=mask).shape
        torch.Size([1, 18, 32])

    Source: patch embedding of Wan's DiT (arXiv 2503.20314); windows of SwiftI2V's CSG (arXiv 2605.06356).
    """
    return compute(EmbedCall(latents, weight, bias, reference, latent_index, reference_index, mask, out), backend)
