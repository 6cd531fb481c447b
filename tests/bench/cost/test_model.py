"""The closed forms of the cost model equal what the model really does, counted.

Operations are counted by torch's flop counter while the model runs on tensors without memory, at the sizes that are
predicted: on this project's operators, by formulas of the shapes that they are called with, and on torch's own, by
torch's formulas.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.cost import dit, vae
from bench.cost.configuration import Configuration
from bench.cost.pipeline import parts
from bench.cost.work import Work
from bench.vae.layers import all_kernels
from model.config import PRESETS, DiTConfig, VAEConfig
from model.csg.sampler import SegmentPlan, sample_latents
from model.csg.schedule import flow_sigmas
from model.memory.dit_bytes import tokens_per_block
from model.memory.vae_plan import meta_vae
from model.pipeline.stages import make_motion, make_reference, motion_condition
from model.vae.model import WanVAE
from swifti2v_kernels import pretend_gpu
from swifti2v_kernels.common.shapes import WINDOWS
from tests.support.denoisers import denoiser, meta_dit, open_window

META = torch.device("meta")
#: The relative deviation of operations that the closed forms promise.
FLOPS = 0.02
_1B, _5B, _14B = PRESETS["1.3b"].stage_two, PRESETS["5b"].stage_two, PRESETS["14b-1.3b"].stage_one
BLOCK = WINDOWS["CSG window 2560x1408, 1.3B"].block_len
VERSIONS = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}


class Counted(ExitStack):
    """The operations of a body by operator, ``attention`` by the number of its keys.

    With ``kernels`` the operators are this project's, as on a GPU.
    """

    def __init__(self, kernels: bool = True) -> None:
        super().__init__()
        self.attention: Counter[int] = Counter()
        own = torch.ops.swifti2v
        formulas = {own.segment_attention_out: self._attention, own.segment_attention: self._attention}
        formulas |= {own.embed_window: self._embed, own.project_step: self._project}
        self.counter = FlopCounterMode(display=False, custom_mapping=formulas if kernels else {})
        self.modes = (torch.no_grad(), pretend_gpu(90) if kernels else nullcontext(), self.counter)

    def __enter__(self) -> Counted:
        super().__enter__()
        for mode in self.modes:
            self.enter_context(mode)
        return self

    @property
    def total(self) -> int:
        return self.counter.get_total_flops()

    @property
    def by_operator(self) -> dict[str, int]:
        return {str(name).split(".")[1]: n for name, n in self.counter.get_flop_counts()["Global"].items()}

    def _attention(self, q, k, v, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
        keys = sum(shape[1] for shape in k)
        flops = sum(4 * prod(shape) * keys for shape in q)
        self.attention[keys] += flops
        return flops

    @staticmethod
    def _embed(latents, weight, bias, reference, latent_index, reference_index, mask, out, **kwargs) -> int:  # type: ignore[no-untyped-def]
        return 2 * prod(out) * prod(weight[1:])

    @staticmethod
    def _project(x, weight, bias, shift, scale, out, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
        # Every slot of the store is a target of the windows here.
        return 2 * prod(out) * weight[1]


def flops_by_extent(work: Work, *kinds: str) -> Counter[int]:
    """Returns the operations of matmuls of these kinds by their extent."""
    found: Counter[int] = Counter()
    for p in work.matmuls:
        found[p.extent] += p.flops if p.kind in kinds else 0
    return +found


@pytest.mark.parametrize(
    ("config", "latent_size", "window", "noisy"),
    [
        # Layers are alike: two of them say the same as all 40.
        pytest.param(replace(_14B, num_layers=2), (44, 80), 21, 21, id="14B Stage I"),
        pytest.param(replace(_1B, num_layers=2), (176, 320), 5, 3, id="1.3B window at 2K"),
        pytest.param(replace(_5B, num_layers=2), (88, 160), 5, 3, id="5B window at 2K"),
    ],
)
def test_a_step_of_the_dit_has_the_operations_that_are_counted(
    config: DiTConfig, latent_size: tuple[int, int], window: int, noisy: int
) -> None:
    """The operations of a step agree by kind and number of keys, with the operators that run on a GPU."""
    denoise = denoiser(meta_dit(config), latent_size, window, noisy)
    open_window(denoise, window, noisy)
    with Counted() as counted:
        denoise.step(0)
    tokens = tokens_per_block(config, latent_size)
    work = dit.forward(config, window * tokens, targets=noisy * tokens)
    attention = flops_by_extent(work, "self_attention", "cross_attention")
    assert set(counted.attention) == set(attention) == {window * tokens, 512}
    for keys, flops in attention.items():
        assert flops == pytest.approx(counted.attention[keys], rel=FLOPS)
    linear = counted.total - counted.attention.total()
    assert work.flops["linear"] == pytest.approx(linear, rel=FLOPS)


def test_what_a_clip_needs_once_has_the_operations_that_are_counted() -> None:
    model = meta_dit(_1B)
    with Counted() as counted:
        denoiser(model, (16, 16), 5, 3)
    assert (dit.context(_1B) + dit.modulation(_1B, 5)).total_flops == pytest.approx(counted.total, rel=FLOPS)


def run_vae(config: VAEConfig, half: str, num_frames: int) -> None:
    """Runs a clip at 2K through one half of the VAE in bfloat16, without memory, by our convolutions."""
    model, stride = meta_vae(config, torch.bfloat16), config.spatial_stride
    with all_kernels():
        if half == "encode":
            model.encode(torch.empty(1, 3, num_frames, 1408, 2560, device=META))
            return
        blocks = 1 + (num_frames - 1) // config.temporal_stride
        for _ in model.decode_frames(
            [torch.empty(1, config.z_dim, blocks, 1408 // stride, 2560 // stride, device=META)]
        ):
            pass


@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize("version", list(VERSIONS))
def test_the_vae_has_the_operations_that_are_counted(version: str, half: str) -> None:
    """The operations at 2K agree by kind, with the kernels of a GPU; attention does not run without memory."""
    config = VERSIONS[version]
    with Counted() as counted:
        run_vae(config, half, 21)
    flops = vae.work(config, half, 2560, 1408, 21).flops
    operators = {"causal_conv3d": "convolution", "addmm": "linear"}
    if half == "decode":
        operators |= {"upsample_conv2d": "upsample", "frames_out": "last_convolution"}
    assert set(counted.by_operator) == set(operators)
    assert set(flops) == {*operators.values(), "frame_attention"}
    for operator, kind in operators.items():
        assert flops[kind] == pytest.approx(counted.by_operator[operator], rel=FLOPS), kind


def test_the_vaes_attention_has_the_operations_that_are_counted(tiny_vae: WanVAE) -> None:
    """The attention's operations are those that torch counts on a CPU, where it runs as two matmuls."""
    latents = torch.zeros(1, 4, 3, 6, 10)
    with sdpa_kernel(SDPBackend.MATH), Counted(kernels=False) as counted:
        tiny_vae.decode(latents)
    flops = vae.work(tiny_vae.config, "decode", 80, 48, 9, itemsize=4).flops
    assert flops["frame_attention"] == counted.by_operator["bmm"] == 3 * 4 * 60**2 * 16
    assert flops["linear"] == counted.by_operator["addmm"]


@pytest.mark.parametrize(
    ("mode", "preset"),
    [
        ("bidirectional", "tiny"),
        ("causal", "tiny-vae22"),
        pytest.param("end_to_end", "tiny", marks=pytest.mark.slow),
    ],
)
def test_the_parts_have_the_operations_of_the_pipelines_own_functions(preset: str, mode: str) -> None:
    """Every stage agrees, called as by ``model.generate``, with other steps, windows and sizes than the defaults."""
    c = Configuration.for_preset(
        preset, width=384, height=256, num_frames=17, stage_one_steps=2, steps=3, blocks_per_segment=2,
        neighbours_right=1, mode=mode,
    )  # fmt: skip
    first, second = (meta_dit(config) for config in (c.stage_one, c.stage_two))
    encoders, size, plan = meta_vae(c.vae, torch.float32), (c.height, c.width), SegmentPlan(5, 2, 1, 1)
    text = torch.empty(1, 512, c.stage_one.text_dim, device=META)
    stages = {}
    with Counted() as counted:
        picture = torch.empty(1, 3, 1, *c.motion_size[::-1], device=META)
        motion = make_motion(
            [lambda: first],
            motion_condition(encoders, first.config, picture, 5),
            text,
            sigmas=flow_sigmas(2, 5.0),
            seed=0,
        )
        stages["Stage I"] = counted.total
        picture = torch.empty(1, 3, 1, *size, device=META)
        reference = make_reference(motion, encoders, encoders, picture)
        stages["reference"] = counted.total
        options = {"plan": plan, "sigmas": flow_sigmas(3, 5.0), "seed": 0, "mode": mode}
        segments = list(sample_latents(second, reference, text, **options))
        stages["Stage II"] = counted.total
        for _ in meta_vae(c.vae, torch.bfloat16).decode_frames([reference[:, :, :1], *segments]):
            pass
        stages["decode"] = counted.total
    before = 0
    for stage, after in stages.items():
        # Attention over a frame is not run on tensors without memory.
        works = [part.work for part in parts(c) if part.stage == stage]
        predicted = sum(work.total_flops - work.flops.get("frame_attention", 0) for work in works)
        assert predicted == pytest.approx(after - before, rel=FLOPS), stage
        before = after


class Moved(TorchDispatchMode):
    """The bytes of operands and results of every operator that writes memory; a GPU's matmuls store their GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in held]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if (fresh or writes) and not any(name in func.name() for name in ("empty", "gelu_")):
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in given + fresh)
        return result


@pytest.mark.parametrize("half", ["decode", "encode"])
@pytest.mark.parametrize("version", list(VERSIONS))
def test_the_bytes_of_the_vae_are_those_of_its_operators(version: str, half: str) -> None:
    """The bytes of one more latent frame at 2K are every operator's operands and results once, within 5 %."""
    counted, works = [], []
    meta_vae(VERSIONS[version], torch.bfloat16)  # is built once, and that moves bytes too
    for num_frames in (29, 33):
        with torch.no_grad(), pretend_gpu(90), Moved() as moved:
            run_vae(VERSIONS[version], half, num_frames)
        counted.append(moved.bytes)
        works.append(vae.work(VERSIONS[version], half, 2560, 1408, num_frames).bytes)
    assert works[1] - works[0] == pytest.approx(counted[1] - counted[0], rel=0.05)


@pytest.mark.slow
def test_the_bytes_of_a_dit_layer_are_those_of_its_operators() -> None:
    """The bytes between matmuls are exactly 18 rows a token; with matmuls, weights once, they agree within 5 %."""
    counted, works, row = [], [], 2 * _1B.dim * 5 * BLOCK
    for config in (replace(_1B, num_layers=n) for n in (2, 3)):
        denoise = denoiser(meta_dit(config), (176, 320), 5, 3)
        open_window(denoise, 5, 3)
        with torch.no_grad(), pretend_gpu(90), Moved() as moved:
            denoise.step(0)
        counted.append(moved.bytes)
        works.append(dit.forward(config, 5 * BLOCK, targets=3 * BLOCK))
    assert works[1].fused - works[0].fused == 18 * row
    # Each of the window's 25 parts names the weights and all keys and values: a cache may hold them, a count does not.
    weights = 2 * _1B.dim * (4 * _1B.dim + 2 * _1B.ffn_dim)
    again = (25 - 1) * (weights + 2 * row + 2 * 2 * 512 * _1B.dim)
    assert works[1].bytes - works[0].bytes == pytest.approx(counted[1] - counted[0] - again, rel=0.05)
