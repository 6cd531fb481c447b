"""The Hopper kernel's protocol and numbers, simulated; the simulator is shown to find the mistakes one would make."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from swifti2v_kernels.attention import hopper
from swifti2v_kernels.attention.arguments import check_call
from swifti2v_kernels.attention.hopper import HopperConfig
from tests.support.attention_oracle import cat_attention
from tests.support.hopper_simulator import ProtocolError, SimulatedKernel
from tests.support.tolerances import KERNEL, LSE, relative_error

KERNEL_NAME = "segment_attention_hopper_kernel"


def run_and_check(
    module: ModuleType,
    query_lens: tuple[int, ...],
    key_lens: tuple[int, ...],
    config: HopperConfig,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float16,
    attends: list[list[int]] | None = None,
    patience: float = 10.0,
) -> None:
    """Runs the real launcher, with the kernel replaced by its simulation, and compares all results with float64."""
    random.seed(0)
    q = [torch.randn(2, n, 3, 2, head_dim).to(dtype)[:, :, 0] for n in query_lens]
    sources = [tuple(torch.randn(2, n, 3, 2, head_dim).to(dtype)[:, :, 1:].unbind(2)) for n in key_lens]
    out = [torch.full_like(x, float("nan")) for x in q]
    lse = [torch.full((2, 2, n), float("nan")) for n in query_lens]
    kernel = getattr(module, KERNEL_NAME)
    setattr(module, KERNEL_NAME, SimulatedKernel(module, kernel, patience))
    try:
        module.launch_hopper(check_call(q, sources, attends=attends)._replace(out=out, lse=lse), config)
    finally:
        setattr(module, KERNEL_NAME, kernel)
    name = str(dtype).removeprefix("torch.")
    for x, o, s, seen in zip(q, out, lse, attends or [range(len(sources))] * len(q), strict=True):
        expected, expected_lse = cat_attention(x, [sources[j] for j in seen])
        assert relative_error(o, expected) < KERNEL[name]
        assert (s - expected_lse).abs().max() < LSE[name]


@pytest.mark.parametrize("config", [HopperConfig(64, 2), HopperConfig(64, 3), HopperConfig(128, 4)], ids=str)
@pytest.mark.parametrize("key_lens", [(1,), (64,), (300,), (130, 64, 77), (128, 256)], ids=str)
def test_simulated_kernel(key_lens: tuple[int, ...], config: HopperConfig) -> None:
    run_and_check(hopper, (150,), key_lens, config)


def test_shipped_configuration_in_bfloat16() -> None:
    run_and_check(hopper, (70,), (300, 5), HopperConfig.heuristic(128), 128, torch.bfloat16)


def test_query_views_see_their_sources_only() -> None:
    run_and_check(hopper, (130, 1, 40), (70, 129, 3), HopperConfig(64, 2), attends=[[0], [1, 2], [0, 2]])


MISTAKES = {
    "a tile of v is given back before it is read": (
        "        acc, p, p_new = warpgroup_mma_wait(0, [o_token, p, p_new])\n"
        "        mbarrier.arrive(v_empty.index(before), count=1)\n",
        "        mbarrier.arrive(v_empty.index(before), count=1)\n"
        "        acc, p, p_new = warpgroup_mma_wait(0, [o_token, p, p_new])\n",
    ),
    "a tile of v is never given back": ("        mbarrier.arrive(v_empty.index(before), count=1)\n", ""),
    "the wait for v names the wrong phase": ("((i - 1) // STAGES) & 1)", "(i // STAGES) & 1)"),
    "the product with v is not waited for": ("warpgroup_mma_wait(0, [o_token,", "warpgroup_mma_wait(1, [o_token,"),
    "ragged tiles are not masked": ("        if i < num_ragged:", "        if i < 0:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_simulator_finds_the_mistake(mistake: str, tmp_path: Path) -> None:
    right, wrong = MISTAKES[mistake]
    source = Path(hopper.__file__).read_text()
    assert right in source, "the kernel changed: adapt the mistake"
    path = tmp_path / "mistaken.py"
    path.write_text(source.replace(right, wrong))
    # Within the package, for its relative imports.
    name = f"{hopper.__package__}.mistaken"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        with pytest.raises((ProtocolError, AssertionError)):
            run_and_check(module, (150,), (300, 70, 130), HopperConfig(64, 2), patience=1.0)
    finally:
        del sys.modules[name]
