"""The Hopper kernel's protocol and numbers, simulated; the simulator is shown to find the mistakes one would make."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from swifti2v_kernels.attention import hopper
from swifti2v_kernels.attention.arguments import check_call
from swifti2v_kernels.attention.hopper import HopperConfig
from tests.support.attention_oracle import cat_attention
from tests.support.hopper_simulator import ProtocolError, SimulatedKernel
from tests.support.tolerances import KERNEL, LSE, relative_error

KERNEL_NAME = "segment_attention_hopper_kernel"


def run(
    module: ModuleType,
    query_lens: tuple[int, ...],
    key_lens: tuple[int, ...],
    head_dim: int = 64,
    config: HopperConfig | None = None,
    attends: list[int] | None = None,
    dtype: torch.dtype = torch.float16,
    patience: float = 10.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Runs the real launcher, with the kernel replaced by its simulation."""
    random.seed(0)
    q = [torch.randn(2, n, 3, 2, head_dim).to(dtype)[:, :, 0] for n in query_lens]
    sources = [tuple(torch.randn(2, n, 3, 2, head_dim).to(dtype)[:, :, 1:].unbind(2)) for n in key_lens]
    out = [torch.full_like(x, float("nan")) for x in q]
    lse = [torch.full((2, 2, n), float("nan")) for n in query_lens]
    kernel = getattr(module, KERNEL_NAME)
    setattr(module, KERNEL_NAME, SimulatedKernel(module, kernel, patience))
    try:
        call = check_call(q, sources)
        call = call._replace(out=out, lse=lse, attends=attends or call.attends)
        module.launch_hopper(call, config or HopperConfig(64, 2))
    finally:
        setattr(module, KERNEL_NAME, kernel)
    return q, out, lse, sources


def run_and_check(module: ModuleType, *lengths: tuple[int, ...], patience: float) -> None:
    q, out, lse, sources = run(module, *lengths, patience=patience)
    check(q[0], out[0], lse[0], sources)


def check(q: Tensor, out: Tensor, lse: Tensor, sources: list[tuple[Tensor, Tensor]]) -> None:
    expected, expected_lse = cat_attention(q, sources)
    name = str(q.dtype).removeprefix("torch.")
    assert relative_error(out, expected) < KERNEL[name]
    assert (lse - expected_lse).abs().max() < LSE[name]


@pytest.mark.parametrize("config", [HopperConfig(64, 2), HopperConfig(64, 3), HopperConfig(128, 4)], ids=str)
@pytest.mark.parametrize("key_lens", [(1,), (64,), (300,), (130, 64, 77), (128, 256)], ids=str)
def test_simulated_kernel(key_lens: tuple[int, ...], config: HopperConfig) -> None:
    q, out, lse, sources = run(hopper, (150,), key_lens, config=config)
    check(q[0], out[0], lse[0], sources)


def test_shipped_configuration_in_bfloat16() -> None:
    config = HopperConfig.heuristic(128)
    q, out, lse, sources = run(hopper, (70,), (300, 5), 128, config, dtype=torch.bfloat16)
    check(q[0], out[0], lse[0], sources)


def test_query_views_see_their_sources_only() -> None:
    q, out, lse, sources = run(hopper, (130, 1, 40), (70, 129, 3), attends=[0b001, 0b110, 0b101])
    for x, o, s, seen in zip(q, out, lse, ([0], [1, 2], [0, 2]), strict=True):
        check(x, o, s, [sources[j] for j in seen])


MISTAKES = {
    "a tile of v is given back before it is read": (
        "        acc, p, p_new = warpgroup_mma_wait(0, [o_token, p, p_new])\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n",
        "        mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        acc, p, p_new = warpgroup_mma_wait(0, [o_token, p, p_new])\n",
    ),
    "a tile of v is never given back": ("        mbarrier.arrive(v_empty.index(before), count=1)\n", ""),
    "the wait for v names the wrong phase": ("((i - 1) // STAGES) & 1)", "(i // STAGES) & 1)"),
    "k is not waited for": (
        "        mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < total)\n",
        "",
    ),
    "the producer starts on the wrong phase": ("parity ^ 1)", "parity)"),
    "the product with v is not waited for": ("warpgroup_mma_wait(0, [o_token,", "warpgroup_mma_wait(1, [o_token,"),
    "ragged tiles are not masked": ("        if i < num_ragged:", "        if i < 0:"),
    "the wrong number of bytes is announced": (".shape[4] * 2\n", ".shape[4] * 4\n"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulator_finds_the_mistake(mistake: str, tmp_path: Path) -> None:
    right, wrong = MISTAKES[mistake]
    source = Path(hopper.__file__).read_text()
    assert source.count(right) >= 1, "the kernel changed: adapt the mistake"
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong))
    # Within the package, for its relative imports.
    name = f"{hopper.__package__}.mistaken"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        with pytest.raises((ProtocolError, AssertionError)):
            run_and_check(module, (150,), (300, 70, 130), patience=1.0)
    finally:
        del sys.modules[name]
