"""Head of a video DiT and one solver step, written straight into the store of latents.

    velocity = unpatchify(W @ (LayerNorm(x) * (1 + scale[r]) + shift[r]) + bias)        (no affine; r = block_map[i])
    out[:, :, latent_index[i]] = velocity                                               (step is None)
    out[:, :, latent_index[i]] += step * velocity                                       (Euler: sigma_next - sigma)

This is done for the blocks i of the window that are targets (a block is one latent frame); the others cost nothing.
Neither the normalised tokens nor the velocity exist as tensors, and the update needs no gather or scatter of blocks.

L = T * (h/p) * (w/q) are the tokens of all blocks, and N = p * q * z the features of a token.

Statistics (Chan's merge of chunks' means and centred sums), modulation, sums, bias and update are float32. The
modulated token is rounded to the dtype of ``x`` before the matmul, as in torch; the velocity is not rounded before the
update, and the result once. Sums run in the order of tiles, so results of different backends differ by rounding only.

FLOPs: 2 * B * tokens * C * N, of target blocks alone. Least traffic: their tokens and the weight read once, their
latents read (with a step) and written once. Against separate operators it saves the normalised tokens (written and
read), the velocity and its copies in another layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.checks import Spec, check_index, check_tensor, check_tensors, check_written, concrete
from ..common.dispatch import compute, kernel_obstacle, public_operator
from ..common.registration import kernel_operator
from ..norm.adaln import layer_norm_reference
from .embed_window import STORE

#: A program holds all features of its tokens: 256 float32 sums a token are what registers allow.
MAX_FEATURES = 256
#: float64 is for references alone.
_STEPS = (torch.float32, torch.float64)


class ProjectCall(NamedTuple):
    """The arguments of a call, as the registered operator takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    shift: Tensor
    scale: Tensor
    out: Tensor
    latent_index: Tensor | None
    block_map: Tensor | None
    #: The step where it is a tensor.
    step: Tensor | None
    #: The step where it is a number.
    factor: float | None
    patch_size: Sequence[int]
    eps: float

    def check(self) -> None:
        """Checks what can be known of the call: values of indices on the CPU only."""
        check_tensor("out", self.out, STORE)
        device, (batch, z, num_slots, height, width) = self.out.device, self.out.shape
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size: expected (1, p, q), got {tuple(self.patch_size)}")
        _, ph, pw = self.patch_size
        if height % ph or width % pw:
            raise ValueError(f"out: {height} x {width} is not a multiple of patch_size {ph} x {pw}")
        check_tensor("x", self.x, Spec((batch, "L", "C"), last="its last axis"), device)
        block_len, (num_tokens, channels) = (height // ph) * (width // pw), self.x.shape[1:]
        num_blocks = num_tokens // block_len
        if num_blocks * block_len != num_tokens:
            raise ValueError(f"x: expected a multiple of {block_len} tokens, those of a block of out, got {num_tokens}")
        check_tensor("weight", self.weight, Spec((ph * pw * z, channels), self.x.dtype, whole=True), device)
        check_tensors(self, device, bias=Spec((ph * pw * z,), self.x.dtype, whole=True))
        check_tensor("shift", self.shift, Spec((batch, "R", channels), last="its last axis"), device)
        rows = self.shift.shape[1]
        check_tensor("scale", self.scale, Spec((batch, rows, channels), last="its last axis"), device)
        if self.block_map is not None:
            check_index("block_map", self.block_map, num_blocks, 0, rows - 1, device)
        elif rows not in (1, num_blocks):
            raise ValueError(f"shift, scale: expected 1 or {num_blocks} rows without block_map, got {rows}")
        if self.latent_index is not None:
            check_index("latent_index", self.latent_index, num_blocks, -1, num_slots - 1, device)
            if device.type == "cpu" and concrete(self.latent_index):
                targets = [slot for slot in self.latent_index.tolist() if slot >= 0]
                if len(set(targets)) != len(targets):
                    raise ValueError(f"latent_index: expected distinct targets, got {self.latent_index.tolist()}")
        elif num_blocks != num_slots:
            raise ValueError(f"x: expected {num_slots} blocks as out without latent_index, got {num_blocks}")
        step = self.step
        if not isinstance(self.factor, (int, float, torch.SymFloat, type(None))):
            raise TypeError(f"step: expected None, a number or a tensor, got {type(self.factor).__name__}")
        if step is not None and (step.shape not in ((), (1,)) or step.dtype not in _STEPS or step.device != device):
            raise ValueError(
                f"step: expected a number or one float32 element on {device}, got {list(step.shape)} {step.dtype}"
                f" on {step.device}"
            )

    def check_written(self) -> None:
        check_written(self, ("out",))

    def obstacle(self) -> str | None:
        reason, features = kernel_obstacle(self[:9]), self.weight.shape[0]
        if reason is None and features > MAX_FEATURES:
            reason = f"kernels exist for at most {MAX_FEATURES} features, got {features}"
        return reason

    def by_torch(self) -> Tensor:
        """Computes the formula above in PyTorch, differentiable; velocity is NaN for a row that is not there."""
        self.check_written()
        x, shift, scale, out, block_map = self.x, self.shift, self.scale, self.out, self.block_map
        num_slots, height, width = out.shape[2:]
        ph, pw = self.patch_size[1:]
        wide = torch.promote_types(x.dtype, torch.float32)
        blocks = x.unflatten(1, (-1, (height // ph) * (width // pw)))  # [B, T, tokens of a block, C]
        if block_map is not None:
            rows = block_map.clamp(0, shift.shape[1] - 1)
            shift, scale = shift.index_select(1, rows), scale.index_select(1, rows)
        y = layer_norm_reference(blocks.to(wide), None, None, self.eps)
        y = (y * (1 + scale.to(wide).unsqueeze(2)) + shift.to(wide).unsqueeze(2)).to(x.dtype)
        velocity = F.linear(y.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))
        if block_map is not None:
            velocity = velocity.masked_fill((block_map != rows)[:, None, None], float("nan"))
        pattern = "b t (y x) (p q c) -> b c t (y p) (x q)"
        velocity = rearrange(velocity, pattern, y=height // ph, p=ph, q=pw)
        step = self.factor if self.step is None else self.step
        num_blocks = blocks.shape[1]
        slots = torch.arange(num_blocks, device=x.device) if self.latent_index is None else self.latent_index.long()
        # One block after the other, without asking the device which are targets: the others rewrite what they read.
        for i in range(num_blocks):
            slot = slots[i : i + 1]
            inside = slot.clamp(0, num_slots - 1)
            before = out.index_select(2, inside)
            after = velocity[:, :, i : i + 1]
            if step is not None:
                after = before.to(torch.promote_types(out.dtype, wide)) + step * after
            out.index_copy_(2, inside, torch.where(slot == inside, after.to(out.dtype), before))
        return out

    def by_kernel(self) -> Tensor:
        _project_step_op(*self)
        return self.out


_project_step_op = kernel_operator(
    "project_step",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor shift, Tensor scale, Tensor(a!) out, Tensor? latent_index,"
    " Tensor? block_map, Tensor? step, float? factor, SymInt[] patch_size, float eps)",
    ProjectCall,
)


@public_operator
def project_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    latent_index: Tensor | None = None,
    block_map: Tensor | None = None,
    step: float | Tensor | None = None,
    patch_size: Sequence[int] = (1, 2, 2),
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Normalises, modulates and projects the target blocks of a window, and steps their latents in place.

    The velocity is ``unpatchify(weight @ (LayerNorm(x) * (1 + scale) + shift) + bias)``; without ``step`` it is
    written, with ``step`` the latents become ``latents + step * velocity``.

    Args:
        x: tokens ``[B, T*(h/p)*(w/q), C]`` by block, row and column, C contiguous; float32, float16 or bfloat16.
        weight: ``[p*q*z, C]`` contiguous, in the dtype of ``x``; features by pixel row, pixel column and channel, the
            channel fastest.
        bias: ``[p*q*z]`` in the dtype of ``x``, or None.
        shift: modulation rows ``[B, R, C]`` of any floating dtype, C contiguous.
        scale: modulation rows ``[B, R, C]``, likewise.
        out: store of latents ``[B, z, S, h, w]`` in any of these dtypes, any strides but w contiguous, written in
            place. Its elements are distinct and overlap no input.
        latent_index: int32 ``[T]`` on the device: block i of ``x`` goes to ``out[:, :, latent_index[i]]``. At -1 it is
            no target and is skipped. Others are distinct. Default ``0 .. S-1``, with T = S.
        block_map: int32 ``[T]``: the row of ``shift`` and ``scale`` for each block. Default: its own, with R = T, or
            the only one, with R = 1.
        step: None writes the velocity, for other solvers. A number, or a float32 tensor of one element on the device
            (which a CUDA graph reads anew), adds ``step * velocity``: Euler with ``step = sigma_next - sigma``.
        patch_size: ``(1, p, q)``.
        eps: added to the variance.
        backend: ``auto``, ``torch`` or ``triton`` (see :mod:`swifti2v_kernels.common.dispatch`).

    Returns:
        ``out`` itself. Index values are checked on the CPU only; on a GPU, a ``block_map`` out of range makes its
        block's velocity NaN, a ``latent_index`` out of range writes nothing, and of equal ones any may win.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it, with what was given and allowed.

    Examples:
        >>> latents = torch.randn(1, 16, 5, 4, 6)
        >>> x, weight = torch.randn(1, 3 * 2 * 3, 32), torch.randn(64, 32)
        >>> shift, scale = torch.randn(1, 3, 2, 32).unbind(2)
        >>> index = torch.tensor([4, -1, 0], dtype=torch.int32)
        >>> project_step(x, weight, None, shift, scale, latents, latent_index=index, step=-0.05) is latents
        True

    Source: head of DiT and Wan (diffusers ``WanTransformer3DModel``); Euler step of flow matching (arXiv 2210.02747).
    """
    tensor, factor = (step, None) if isinstance(step, Tensor) else (None, step)
    call = ProjectCall(x, weight, bias, shift, scale, out, latent_index, block_map, tensor, factor, patch_size, eps)
    return compute(call, backend)
