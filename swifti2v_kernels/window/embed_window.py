"""Patch embedding of a window straight from the stores of latents that its blocks lie in.

    token[t, y, x] = W @ patch(concat(latents[latent_index[t]], mask[t], reference[reference_index[t]]), y, x) + bias

The T blocks of a window (a block is one latent frame) are wherever their indices say, in any order: noisy ones in
``latents``; given ones, index -1, in ``reference``. Gathering them, joining the channels, cutting patches and the
matmul of the patch embedding are one kernel: no tensor of the window's pixels or patches exists.

| tensor          | shape                 | dtype            | layout                                            |
|-----------------|-----------------------|------------------|---------------------------------------------------|
| latents         | [B, z, S, h, w]       | fp32, fp16, bf16 | any strides, w contiguous                         |
| reference       | [B, z_ref, N, h, w]   | fp32, fp16, bf16 | the same; a dtype of its own                      |
| weight, bias    | [C, C_in, 1, p, q], [C] | fp32, fp16, bf16 | contiguous, as in Conv3d                        |
| latent_index, reference_index | [T]     | int32            | contiguous                                        |
| mask            | [T]                   | fp32             | contiguous                                        |
| out             | [B, L, C]             | as weight        | any batch and token strides, C contiguous         |

L = T * (h/p) * (w/q) are the tokens of all blocks. C_in is z (latents alone) or z + m + z_ref (latents, m mask channels
of one value a block, reference; Wan I2V: 16 + 4 + 16). Channels are rounded to the dtype of ``weight``, sums and the
bias are float32, the token is rounded once. Sums run in the order of tiles, so results of different backends differ by
rounding only.

FLOPs: 2 * B * L * C * C_in * p * q. Least traffic: the blocks and the weight read once, the tokens written
once. Against ``torch.cat`` and a Conv3d it saves the copies of the window's channels, in the stores' dtype and in the
weight's.

Limits: patches of one latent frame. The kernel runs on NVIDIA GPUs of compute capability 8.0 or newer and has no
derivative: the PyTorch reference, which has one, computes all other calls. Timed on an NVIDIA H200 only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.checks import Spec, check_index, check_tensor, check_tensors, check_written
from ..common.cost import Cost
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import registered_operator

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
        """Returns the number of blocks of the window."""
        return self.latents.shape[2] if self.latent_index is None else self.latent_index.shape[0]

    def result(self) -> tuple[int, int, int]:
        """Returns the shape of the tokens."""
        batch, _, _, height, width = self.latents.shape
        channels, _, _, p, q = self.weight.shape
        return batch, self.num_blocks() * (height // p) * (width // q), channels

    def check(self) -> None:
        """Checks what can be known of the call: values of indices on the CPU only."""
        latents, weight, reference = self.latents, self.weight, self.reference
        check_tensor("latents", latents, STORE)
        device, (batch, z, num_latents, height, width) = latents.device, latents.shape
        check_tensors(self, device, reference=Spec((batch, "z", "S", height, width), last="w"))
        check_tensor("weight", weight, Spec(("C", "C_in", 1, "p", "q"), whole=True), device)
        channels, in_channels, _, p, q = weight.shape
        if height % p or width % q:
            raise ValueError(f"latents: {height} x {width} is not a multiple of weight's patch {p} x {q}")
        check_tensors(self, device, bias=Spec((channels,), weight.dtype, whole=True))
        if self.latent_index is not None:
            has_given = reference is not None and reference.shape[1] == z
            check_index("latent_index", self.latent_index, None, -1 if has_given else 0, num_latents - 1, device)
        num_blocks, mask_channels = self.num_blocks(), self._check_reference(z, in_channels)
        if mask_channels and self.mask is None:
            raise ValueError(
                f"mask: expected float32 [{num_blocks}] for weight's {mask_channels} mask channels, got None"
            )
        if self.mask is not None and not mask_channels:
            raise ValueError(f"mask: expected None, since weight ({in_channels} channels) has no mask channels")
        check_tensors(self, device, mask=Spec((num_blocks,), torch.float32, whole=True))
        if self.out is not None:
            check_tensor("out", self.out, Spec(self.result(), weight.dtype, last="its last axis"), device)

    def _check_reference(self, z: int, in_channels: int) -> int:
        """Checks the reference and returns the number of mask channels."""
        if self.reference is None:
            if self.reference_index is not None:
                raise ValueError("reference_index: expected None, since there is no reference")
            if in_channels != z:
                raise ValueError(
                    f"weight: expected {z} channels, those of latents, got {in_channels}; more need a reference"
                )
            return 0
        z_ref, num_references = self.reference.shape[1:3]
        if self.reference_index is not None:
            check_index(
                "reference_index", self.reference_index, self.num_blocks(), 0, num_references - 1, self.latents.device
            )
        elif num_references < self.num_blocks():
            raise ValueError(
                f"reference: expected at least {self.num_blocks()} blocks without reference_index, got {num_references}"
            )
        if in_channels == z:
            if z_ref != z:
                raise ValueError(
                    f"reference: expected {z} channels as latents, got {z_ref}; weight takes latents alone"
                )
            return 0
        if in_channels < z + z_ref:
            raise ValueError(
                f"weight: expected {z} channels (latents), or at least {z} + {z_ref} (latents, mask, reference),"
                f" got {in_channels}"
            )
        return in_channels - z - z_ref

    def obstacle(self) -> str | None:
        """Returns why the kernel cannot take the call, or None if it can."""
        return kernel_obstacle(self)

    def by_torch(self) -> Tensor:
        """Computes the formula above in PyTorch, differentiable."""
        if self.out is not None:
            check_written(self, ("out",))
        tokens = embed_window_reference(self)
        return tokens if self.out is None else self.out.copy_(tokens)

    def by_kernel(self) -> Tensor:
        """Computes the call by the fused kernel."""
        out = self.weight.new_empty(self.result()) if self.out is None else self.out
        _embed_window_op(*self[:-1], out)
        return out


def embed_window_reference(call: EmbedCall) -> Tensor:
    """Returns the tokens of a checked call by PyTorch, differentiable; NaN for an index that names no block."""
    weight, reference, latent_index = call.weight, call.reference, call.latent_index
    x, inside = _gather(call.latents, latent_index, call.num_blocks(), weight.dtype)
    if reference is not None:
        given, known = _gather(reference, call.reference_index, call.num_blocks(), weight.dtype)
        if latent_index is not None and given.shape[1] == x.shape[1]:
            replaced = latent_index == -1
            x = torch.where(replaced[:, None, None], given, x)
            inside = inside | (replaced & known)
        if weight.shape[1] != call.latents.shape[1]:
            parts = [x, given]
            if call.mask is not None:
                channels = weight.shape[1] - x.shape[1] - given.shape[1]
                shown = call.mask.to(weight.dtype)[:, None, None].expand(len(x), channels, -1, *x.shape[3:])
                parts.insert(1, shown)
            x, inside = torch.cat(parts, dim=1), inside & known
    wide = torch.promote_types(weight.dtype, torch.float32)
    patches = rearrange(
        x.to(wide), "b c t (y p) (x q) -> b t (y x) (c p q)", p=weight.shape[3], q=weight.shape[4]
    )  # [B, T, tokens of a block, K]
    tokens = F.linear(patches, weight.flatten(1).to(wide), None if call.bias is None else call.bias.to(wide))
    if latent_index is not None or call.reference_index is not None:
        tokens = tokens.masked_fill(~inside[:, None, None], float("nan"))
    return tokens.flatten(1, 2).to(weight.dtype)


def _gather(store: Tensor, index: Tensor | None, num_blocks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the blocks ``[B, z, T, h, w]`` of a store, any one for an index outside, and which are inside."""
    if index is None:
        index = torch.arange(num_blocks, device=store.device)
    last = store.shape[2] - 1
    return store.index_select(2, index.clamp(0, last)).to(dtype), (index >= 0) & (index <= last)


# The operator writes into ``out`` and returns nothing, so that the public function's allocation is the only one and
# torch.compile sees it.
@registered_operator(
    "embed_window",
    "(Tensor latents, Tensor weight, Tensor? bias, Tensor? reference, Tensor? latent_index, Tensor? reference_index,"
    " Tensor? mask, Tensor(a!) out)",
    EmbedCall,
)
def _embed_window_op(call: EmbedCall) -> None:
    check_written(call, ("out",))
    if call.out.numel():
        from .embed_window_kernel import launch_embed_window

        launch_embed_window(call)


@public_operator()
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
            patch. Stride 0 (``expand``) is fine.
        weight: weight ``[C, C_in, 1, p, q]`` of the patch embedding, contiguous, as Conv3d has it. ``C_in`` is ``z``,
            or ``z + m + z_ref`` for channels in the order latents, mask, reference.
        bias: ``[C]`` in the dtype of ``weight``.
        reference: store ``[B, z_ref, N, h, w]`` of given blocks, of any floating dtype; any strides but w contiguous.
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


def cost(
    batch: int, tokens: int, features: int, width: int, mask_features: int = 0, itemsize: int = 2, store: int = 4
) -> Cost:
    """Returns the least cost of one window.

    Args:
        batch: entries of the batch.
        tokens: tokens of an entry: blocks times patches of a block.
        features: K, channels of the weight times pixels of a patch.
        width: C.
        mask_features: how many of the features are of the mask, which is not read.
        itemsize: bytes of an element of the weight.
        store: bytes of an element of the stores.
    """
    read = batch * tokens * (features - mask_features) * store + width * (features + 1) * itemsize
    return Cost(2 * batch * tokens * features * width, read, batch * tokens * width * itemsize)
