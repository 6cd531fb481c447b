"""Head of a video DiT and one solver step, written straight into the store of latents.

    velocity = unpatchify(W @ (LayerNorm(x) * (1 + scale[r]) + shift[r]) + bias)        (no affine; r = block_map[i])
    out[:, :, latent_index[i]] = velocity                                               (step is None)
    out[:, :, latent_index[i]] += step * velocity                                       (Euler: sigma_next - sigma)

This is done for the blocks i of the window that are targets (a block is one latent frame); the others cost nothing.
Neither the normalised tokens nor the velocity exist as tensors, and the update needs no gather or scatter of blocks.

| tensor                  | shape           | dtype            | layout                                          |
|-------------------------|-----------------|------------------|-------------------------------------------------|
| x                       | [B, L, C]       | fp32, fp16, bf16 | any batch and token strides, C contiguous       |
| weight, bias            | [N, C], [N]     | as x             | contiguous; features (p, q, channel), as in Wan |
| shift, scale            | [B, R, C]       | fp32, fp16, bf16 | any batch and row strides, C contiguous         |
| latent_index, block_map | [T]             | int32            | contiguous                                      |
| out                     | [B, z, S, h, w] | fp32, fp16, bf16 | any strides, w contiguous                       |

L = T * (h/p) * (w/q) are the tokens of all blocks, and N = p * q * z the features of a token.

Statistics (Chan's merge of chunks' means and centred sums), modulation, sums, bias and update are float32. The
modulated token is rounded to the dtype of ``x`` before the matmul, as in torch; the velocity is not rounded before the
update, and the result once. Sums run in the order of tiles, so results of different backends differ by rounding only.

FLOPs: 2 * B * tokens * C * N, of target blocks alone. Least traffic: their tokens and the weight read once, their
latents read (with a step) and written once. Against separate operators it saves the normalised tokens (written and
read), the velocity and its copies in another layout.

Limits: patches of one latent frame. The kernel takes up to 256 features (p * q * z) on NVIDIA GPUs of compute
capability 8.0 or newer and has no derivative: the PyTorch reference, which has one, computes all other calls. Timed on
an NVIDIA H200 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..common.checks import FLOATS, check_index, check_parameter, check_range, check_store, check_targets, concrete
from ..common.cost import Cost
from ..common.dispatch import Choice, kernel_obstacle, pick_backend, public_operator
from ..common.registration import add_op_namespace_prefix
from ..common.target import on_device
from ..norm.adaln import layer_norm_reference

#: A program holds all features of its tokens: 256 float32 sums a token are what registers allow.
MAX_FEATURES = 256


def project_step_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    latent_index: Tensor | None,
    block_map: Tensor | None,
    step: float | Tensor | None,
    patch_size: Sequence[int],
    eps: float,
) -> Tensor:
    """Computes the formula above in PyTorch, differentiable; writes and returns ``out``.

    Arguments are as in :func:`project_step`.
    """
    num_slots, height, width = out.shape[2:]
    ph, pw = patch_size[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    blocks = x.unflatten(1, (-1, (height // ph) * (width // pw)))  # [B, T, tokens of a block, C]
    num_blocks = blocks.shape[1]
    if block_map is not None:
        rows = block_map.clamp(0, shift.shape[1] - 1)
        shift, scale = shift.index_select(1, rows), scale.index_select(1, rows)
    y = layer_norm_reference(blocks.to(wide), None, None, eps)
    y = (y * (1 + scale.to(wide).unsqueeze(2)) + shift.to(wide).unsqueeze(2)).to(x.dtype)
    velocity = F.linear(y.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    if block_map is not None:
        velocity = velocity.masked_fill((block_map != rows)[:, None, None], float("nan"))
    pattern = "b t (y x) (p q c) -> b c t (y p) (x q)"
    velocity = rearrange(velocity, pattern, y=height // ph, p=ph, q=pw)
    # One block after the other, without asking the device which of them are targets: the others rewrite what they read.
    for i in range(num_blocks):
        slot = torch.full((1,), i, device=x.device) if latent_index is None else latent_index[i : i + 1].long()
        inside = slot.clamp(0, num_slots - 1)
        before = out.index_select(2, inside)
        after = velocity[:, :, i : i + 1]
        if step is not None:
            after = before.to(torch.promote_types(out.dtype, wide)) + step * after
        out.index_copy_(2, inside, torch.where(slot == inside, after.to(out.dtype), before))
    return out


# The schema is spelled out because torch 2.6 cannot read ``Tensor?`` from ``Tensor | None``.
@torch.library.custom_op(
    add_op_namespace_prefix("project_step"),
    mutates_args=("out",),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor shift, Tensor scale, Tensor(a!) out, Tensor? latent_index,"
    " Tensor? block_map, Tensor? step, float? factor, SymInt[] patch_size, float eps) -> ()",
)
def _project_step_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    latent_index: Tensor | None,
    block_map: Tensor | None,
    step: Tensor | None,
    factor: float | None,
    patch_size: Sequence[int],
    eps: float,
) -> None:
    _check_contents(x, weight, bias, shift, scale, out, latent_index, block_map, step)
    if out.numel():
        from .project_step_kernel import launch_project_step

        with on_device(out.device):
            launch_project_step(
                x, weight, bias, shift, scale, out, latent_index, block_map, factor if step is None else step,
                patch_size, eps,
            )  # fmt: skip


@_project_step_op.register_fake
def _(x, weight, bias, shift, scale, out, latent_index, block_map, step, factor, patch_size, eps):  # type: ignore[no-untyped-def]
    return None


def _choose(*, patch_size: Sequence[int], eps: float, backend: str, **arguments: Any) -> Choice:
    _check(**arguments, patch_size=patch_size)
    chosen, reason = pick_backend(backend, _obstacle(*arguments.values()))
    return Choice(chosen, "reference" if chosen == "torch" else "fused kernel", reason)


@public_operator(_choose)
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
        x: tokens ``[B, T*(h/p)*(w/q), C]`` by block, row and column, C contiguous.
        weight: ``[p*q*z, C]`` contiguous, in the dtype of ``x``; features by pixel row, pixel column and channel, the
            channel fastest.
        bias: ``[p*q*z]`` in the dtype of ``x``, or None.
        shift: modulation rows ``[B, R, C]`` of any floating dtype, C contiguous.
        scale: modulation rows ``[B, R, C]``, likewise.
        out: store of latents ``[B, z, S, h, w]``, any strides but w contiguous, written in place. Its elements are
            distinct and overlap no input.
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
    arguments = (x, weight, bias, shift, scale, out, latent_index, block_map, step)
    _check(*arguments, patch_size)
    chosen, _ = pick_backend(backend, _obstacle(*arguments))
    if chosen == "torch":
        _check_contents(*arguments)
        return project_step_reference(*arguments, patch_size, eps)
    tensor, factor = (step, None) if isinstance(step, Tensor) else (None, step)
    _project_step_op(*arguments[:-1], tensor, factor, patch_size, eps)
    return out


def _obstacle(x: Tensor, weight: Tensor, *others: Any) -> str | None:
    if (reason := kernel_obstacle(y for y in (x, weight, *others) if isinstance(y, Tensor))) is not None:
        return reason
    if weight.shape[0] > MAX_FEATURES:
        return f"kernels exist for at most {MAX_FEATURES} features, got {weight.shape[0]}"
    return None


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    latent_index: Tensor | None,
    block_map: Tensor | None,
    step: float | Tensor | None,
    patch_size: Sequence[int],
) -> None:
    """Checks what can be known of a call without values and addresses."""
    check_store("out", out)
    batch, z, num_slots, height, width = out.shape
    if len(patch_size) != 3 or patch_size[0] != 1 or min(patch_size) < 1:
        raise ValueError(f"patch_size: expected (1, p, q), got {tuple(patch_size)}")
    _, ph, pw = patch_size
    if height % ph or width % pw:
        raise ValueError(f"out: {height} x {width} is not a multiple of patch_size {ph} x {pw}")
    device, block_len = out.device, (height // ph) * (width // pw)
    _check_rows("x", x, batch, "L", None, device)
    num_tokens, channels = x.shape[1:]
    num_blocks = num_tokens // block_len
    if num_blocks * block_len != num_tokens:
        raise ValueError(f"x: expected a multiple of {block_len} tokens, those of a block of out, got {num_tokens}")
    check_parameter("weight", weight, (ph * pw * z, channels), x.dtype, device)
    if bias is not None:
        check_parameter("bias", bias, (ph * pw * z,), x.dtype, device)
    _check_rows("shift", shift, batch, "R", channels, device)
    _check_rows("scale", scale, batch, shift.shape[1], channels, device)
    rows = shift.shape[1]
    if block_map is not None:
        check_index("block_map", block_map, num_blocks, 0, rows - 1, device)
    elif rows not in (1, num_blocks):
        raise ValueError(f"shift, scale: expected 1 or {num_blocks} rows without block_map, got {rows}")
    if latent_index is not None:
        check_index("latent_index", latent_index, num_blocks, -1, num_slots - 1, device)
    elif num_blocks != num_slots:
        raise ValueError(f"x: expected {num_slots} blocks as out without latent_index, got {num_blocks}")
    if not isinstance(step, (Tensor, int, float, torch.SymFloat, type(None))):
        raise TypeError(f"step: expected None, a number or a tensor, got {type(step).__name__}")
    if isinstance(step, Tensor) and (step.shape not in ((), (1,)) or step.dtype not in _STEPS or step.device != device):
        raise ValueError(
            f"step: expected a number or one float32 element on {device}, got {list(step.shape)} {step.dtype}"
            f" on {step.device}"
        )


#: float64 is for references alone.
_STEPS = (torch.float32, torch.float64)


def _check_rows(
    name: str, x: Tensor, batch: int, length: int | str, channels: int | None, device: torch.device
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    fits = x.ndim == 3 and x.shape[0] == batch and x.shape[1] > 0 and x.shape[2] > 0
    fits = fits and length in ("L", "R", x.shape[1]) and channels in (None, x.shape[2])
    if not fits or x.dtype not in FLOATS or x.device != device:
        wanted = f"[{batch}, {length}, {'C' if channels is None else channels}]"
        raise ValueError(
            f"{name}: expected {wanted} float32, float16 or bfloat16 on {device},"
            f" got {list(x.shape)} {x.dtype} on {x.device}"
        )
    if x.shape[2] > 1 and x.stride(2) != 1:
        raise ValueError(f"{name}: expected its last axis to be contiguous (stride 1), got stride {x.stride(2)}")


def _check_contents(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    out: Tensor,
    latent_index: Tensor | None,
    block_map: Tensor | None,
    step: float | Tensor | None,
) -> None:
    """Checks what only real tensors can tell: values of indices, and addresses."""
    if x.device.type == "cpu" and concrete(latent_index, block_map):
        if block_map is not None:
            check_range("block_map", block_map, 0, shift.shape[1] - 1)
        if latent_index is not None:
            check_range("latent_index", latent_index, -1, out.shape[2] - 1)
            targets = [slot for slot in latent_index.tolist() if slot >= 0]
            if len(set(targets)) != len(targets):
                raise ValueError(f"latent_index: expected distinct targets, got {latent_index.tolist()}")
    inputs = {"x": x, "weight": weight, "bias": bias, "shift": shift, "scale": scale}
    inputs |= {"latent_index": latent_index, "block_map": block_map, "step": step if isinstance(step, Tensor) else None}
    check_targets({"out": out}, inputs, ())


def cost(
    batch: int, tokens: int, width: int, features: int, itemsize: int = 2, store: int = 4, update: bool = True
) -> Cost:
    """Returns the least cost of one call.

    Args:
        batch: entries of the batch.
        tokens: tokens of an entry in target blocks.
        width: C.
        features: N.
        itemsize: bytes of an element of ``x``.
        store: bytes of an element of ``out``.
        update: whether there is a step, which also reads the latents.
    """
    latents = batch * tokens * features * store
    read = (batch * tokens * width + features * (width + 1)) * itemsize + (latents if update else 0)
    return Cost(2 * batch * tokens * width * features, read, latents)
