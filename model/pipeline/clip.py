"""One clip through both stages: the functions of ``model/pipeline/stages.py`` in their order, each model in memory
only while it is needed. ``model.generate`` and the benchmarks run this and differ in what they watch.

    condition = make_condition(components, job, watcher)             Stage I, its clip upsampled and encoded
    for frames in make_frames(components, job, condition, watcher):  Stage II, decoded segment by segment
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeVar

from torch import Tensor

from model.csg.sampler import SegmentPlan, sample_latents
from model.dit.model import WanDiT
from model.machine.host import Host, release
from model.pipeline.components import Components
from model.pipeline.stages import decode_frames, make_motion, make_reference, motion_condition
from model.streaming.placement import Placement
from model.vae.model import WanVAE
from model.vae.tiles import VAEPlans

Item = TypeVar("Item")


@dataclass(frozen=True)
class ClipJob:
    """The clip that is wanted: its inputs, its segments, its schedules and its seed.

    ``picture`` is the input image at the target size and ``low_picture`` at Stage I's, ``[1, 3, 1, H, W]`` in -1..1;
    ``text`` an embedding ``[1, L, D]`` for both stages; ``image_one`` and ``image_two`` CLIP tokens for DiTs that read
    them.
    """

    picture: Tensor
    low_picture: Tensor
    text: Tensor
    plan: SegmentPlan
    sigmas_one: Sequence[float]
    sigmas_two: Sequence[float]
    vae_plans: VAEPlans
    image_one: Tensor | None = None
    image_two: Tensor | None = None
    seed: int = 0
    mode: str = "bidirectional"
    cuda_graph: bool = True
    #: Whether the VAEs leave the device while Stage I's DiT is on it.
    vae_waits: bool = False
    #: Where the layers of each stage's DiT are, those of both experts of Stage I alike; None: all on the device.
    stage_one_at: Placement | None = None
    stage_two_at: Placement | None = None


class Watcher:
    """A listener that is told how far a clip is and does nothing; others time stages, draw progress, watch memory."""

    #: The innermost stage in which an error was raised last, for messages; a watcher that does not look says ``load``.
    failed: str = "load"

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Returns the context in which a stage runs: ``load``, ``Stage I``, ``reference`` or ``file``."""
        return nullcontext()

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items of a stage that streams, ``Stage II`` or ``decode``; each is made while this waits."""
        yield from items

    def step(self, name: str, done: int, total: int, where: str) -> None:
        """Hears of each step of a stage as soon as it is done: ``done`` of ``total``, and where that is in words."""


@dataclass
class Condition:
    """The VAE and the reference that Stage II starts from; ``reference`` is updated in place."""

    vae: WanVAE
    reference: Tensor


def make_condition(
    components: Components,
    job: ClipJob,
    watcher: Watcher | None = None,
    *,
    motion: Tensor | None = None,
    reference: Tensor | None = None,
    on_motion: Callable[[Tensor], None] | None = None,
) -> Condition:
    """Runs Stage I and makes the hybrid reference of its result.

    At the end Stage I's DiT and the VAE's encoder are released.

    An earlier run may have made Stage I's latents (``motion``) or the ``reference``, both ``[1, z, T, h, w]``; with the
    second only the VAE is loaded. ``on_motion`` is given Stage I's latents if this run makes them.
    """
    watcher = watcher or Watcher()
    device, plans = job.text.device, job.vae_plans
    with watcher.stage("load"):
        vae = vae_one = components.vae("vae")
        if reference is None and "stage1_vae" in components.parts:
            vae_one = components.vae("stage1_vae")
    if reference is None:
        if motion is None:
            motion = _make_motion(components, job, {vae, vae_one}, vae_one, watcher)
            if on_motion is not None:
                on_motion(motion)
        with watcher.stage("reference"):
            vae.to_dtypes(encode=plans.encode_dtype)
            reference = make_reference(
                motion.to(device),
                vae_one,
                vae,
                job.picture.to(device),
                lambda block, blocks: watcher.step("reference", block, blocks, f"block {block}/{blocks}"),
                plan=plans.reference,
                motion_plan=plans.motion,
            )
    del vae_one, motion
    vae.drop_encoder()
    release(device)
    return Condition(vae, reference.to(device))


def _make_motion(components: Components, job: ClipJob, vaes: set[WanVAE], vae_one: WanVAE, watcher: Watcher) -> Tensor:
    """Runs Stage I: its condition is encoded before its DiT is loaded, for which the VAEs make room if they must."""
    device = job.text.device
    with watcher.stage("Stage I"):
        picture, blocks = job.low_picture.to(device), job.plan.num_blocks
        condition = motion_condition(vae_one, components.stage_one_config, picture, blocks, job.vae_plans.condition)
        host, waiting = Host(device, True), vaes if job.vae_waits else set()
        parameters = [p for vae in waiting for p in vae.parameters()]
        for p in parameters:
            p.data = host.park(p.data)
        release(device)
        experts = ["stage1"] + ["stage1_low_noise"] * ("stage1_low_noise" in components.parts)
        motion = make_motion(
            [partial(_loaded, watcher, components, part, job.stage_one_at) for part in experts],
            condition,
            job.text,
            job.image_one,
            sigmas=job.sigmas_one,
            seed=job.seed,
            cuda_graph=job.cuda_graph,
            on_step=lambda step, steps: watcher.step("Stage I", step, steps, f"step {step}/{steps}"),
        )
        for p in parameters:
            p.data = host.fetch(p.data)
        for vae in waiting:
            vae.order_weights()
    return motion


def _loaded(watcher: Watcher, components: Components, part: str, at: Placement | None) -> WanDiT:
    with watcher.stage("load"):
        return components.dit(part, at)


def make_frames(
    components: Components,
    job: ClipJob,
    condition: Condition,
    watcher: Watcher | None = None,
    *,
    done: Sequence[Tensor] = (),
    on_segment: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Yields frames ``[F, H, W, 3]`` uint8 on the device: the anchor's, then each segment's as soon as it is done.

    ``done`` is blocks ``[1, z, m, h, w]`` of the first segments, which an earlier run has made; they are decoded again,
    since what the decoder remembers of them is not kept. ``on_segment`` is given the number of every other segment,
    from 1, and its blocks, before they are decoded.
    """
    watcher = watcher or Watcher()
    steps, windows = len(job.sigmas_two) - 1, list(job.plan)
    reference = condition.reference
    earlier = [blocks.to(reference) for blocks in done]
    for window, blocks in zip(windows, earlier, strict=False):
        reference[:, :, list(window.noisy)] = blocks

    def on_step(segment: int, segments: int, step: int, of: int) -> None:
        made = (segment - 1) * steps + step
        watcher.step("Stage II", made, segments * steps, f"segment {segment}/{segments} step {step}/{of}")

    def segments() -> Iterator[Tensor]:
        if len(earlier) == len(windows):
            return
        dit = _loaded(watcher, components, "stage2", job.stage_two_at)
        options = {"plan": job.plan, "sigmas": job.sigmas_two, "seed": job.seed, "mode": job.mode}
        options |= {"cuda_graph": job.cuda_graph, "on_step": on_step, "done": len(earlier)}
        sampled = sample_latents(dit, reference, job.text, job.image_two, **options)
        for number, blocks in enumerate(watcher.iterate("Stage II", sampled), start=len(earlier) + 1):
            if on_segment is not None:
                on_segment(number, blocks)
            yield blocks
        dit.settle()

    frames = decode_frames(condition.vae, reference[:, :, :1], chain(earlier, segments()), plan=job.vae_plans.decode)
    yield from watcher.iterate("decode", frames)
