"""Two kernels with a fault each. A check that does not find its own finds nothing in ours either."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SIZE = 256


@triton.jit
def planted_overrun_kernel(x_ptr, SIZE: tl.constexpr):
    """Writes one element beyond the end."""
    tl.store(x_ptr + 1 + tl.arange(0, SIZE), 1)


@triton.jit
def planted_race_kernel(x_ptr, SIZE: tl.constexpr):
    """Writes the same word of shared memory from all threads, each another number, and nothing orders them."""
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    total = tl.sum(x)  # the warps' parts meet in shared memory, so that there is some
    mine = tl.inline_asm_elementwise(
        "{ .reg .u32 place; mov.u32 place, global_smem; st.shared.u32 [place], $1; ld.shared.u32 $0, [place]; }",
        "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr + tl.arange(0, SIZE), mine + total)


#: The kernel that each check must find, by the check.
PLANTED = {"memcheck": planted_overrun_kernel, "racecheck": planted_race_kernel}


def run_planted(check: str, device: torch.device) -> None:
    """Launches the fault that ``check`` must find."""
    x = torch.arange(SIZE, dtype=torch.int32, device=device)
    PLANTED[check][(1,)](x, SIZE, num_warps=4)
