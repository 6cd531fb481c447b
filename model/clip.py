"""One clip through both stages: the functions of ``model/pipeline.py`` in their order, each model there only while it
is needed. ``model.generate`` and the benchmarks run this and differ in what they watch.

    condition = make_condition(components, job, watcher)             Stage I, its clip upsampled and encoded
    for frames in make_frames(components, job, condition, watcher):  Stage II, decoded segment by segment
        ...
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from model.components import Components
from model.csg import SegmentPlan, sample_latents
from model.host import Host
from model.pipeline import decode_frames, make_motion, make_reference
from model.pipeline_plan import PipelinePlans
from model.vae import WanVAE

Item = TypeVar("Item")


@dataclass(frozen=True)
class ClipJob:
    """What is made of which inputs.

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
    vae_plans: PipelinePlans
    image_one: Tensor | None = None
    image_two: Tensor | None = None
    seed: int = 0
    mode: str = "bidirectional"
    cuda_graph: bool = True
    #: Where the VAE keeps what waits; None: as its plans say.
    host: Callable[[bool], Host] | None = None

    def waiting(self, park: bool) -> Host | None:
        """The host memory of a plan that parks or does not."""
        return None if self.host is None else self.host(park)


class Watcher:
    """Is told where a clip is; this one does nothing. Others time stages, draw progress, or watch memory."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Around a stage: ``load``, ``Stage I``, ``reference``."""
        return nullcontext()

    def iterate(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Around the making of each item of a stage that streams: ``Stage II``, ``decode``."""
        yield from items

    def step(self, name: str, done: int, total: int, where: str) -> None:
        """After each step of a stage."""


@dataclass
class Condition:
    """What Stage II starts from; ``reference`` is updated in place."""

    vae: WanVAE
    reference: Tensor


def make_condition(components: Components, job: ClipJob, watcher: Watcher | None = None) -> Condition:
    """Stage I and the hybrid reference; afterwards the VAE has a decoder only, and Stage I's DiT is gone."""
    watcher = watcher or Watcher()
    device, plans = job.text.device, job.vae_plans
    with watcher.stage("load"):
        vae = components.vae()
        vae_one = vae if components.stage_one_vae is None else components.stage_one_vae()
        dit = components.stage_one()
        low_noise = None if components.low_noise is None else components.low_noise()
    num_blocks = job.plan.num_blocks
    with watcher.stage("Stage I"):
        motion = make_motion(
            dit,
            vae_one,
            job.low_picture.to(device),
            job.text,
            job.image_one,
            num_blocks=num_blocks,
            sigmas=job.sigmas_one,
            seed=job.seed,
            low_noise_dit=low_noise,
            cuda_graph=job.cuda_graph,
            on_step=lambda step, steps: watcher.step("Stage I", step, steps, f"step {step}/{steps}"),
            vae_plan=plans.condition.plan,
        )
    del dit, low_noise
    release(device)
    with watcher.stage("reference"):
        vae.to_dtypes(encode=plans.encode_dtype)
        reference = make_reference(
            motion,
            vae_one,
            vae,
            job.picture.to(device),
            lambda block, blocks: watcher.step("reference", block, blocks, f"block {block}/{blocks}"),
            plan=plans.reference.plan,
            motion_plan=plans.motion.plan,
            host=job.waiting(plans.reference.plan.park),
        )
    del vae_one, motion
    vae.drop_encoder()
    release(device)
    return Condition(vae, reference)


def make_frames(
    components: Components, job: ClipJob, condition: Condition, watcher: Watcher | None = None
) -> Iterator[Tensor]:
    """Frames ``[F, H, W, 3]`` uint8 on the device: of the anchor block, and of every segment as soon as it is done."""
    watcher = watcher or Watcher()
    with watcher.stage("load"):
        dit = components.stage_two()
    steps = len(job.sigmas_two) - 1

    def on_step(segment: int, segments: int, step: int, of: int) -> None:
        done = (segment - 1) * steps + step
        watcher.step("Stage II", done, segments * steps, f"segment {segment}/{segments} step {step}/{of}")

    segments = sample_latents(
        dit,
        condition.reference,
        job.text,
        job.image_two,
        plan=job.plan,
        sigmas=job.sigmas_two,
        seed=job.seed,
        mode=job.mode,
        cuda_graph=job.cuda_graph,
        on_step=on_step,
    )
    made = watcher.iterate("Stage II", segments)
    anchor = condition.reference[:, :, :1]
    plan = job.vae_plans.decode.plan
    frames = decode_frames(condition.vae, anchor, made, plan=plan, host=job.waiting(plan.park))
    yield from watcher.iterate("decode", frames)


def release(device: torch.device) -> None:
    """Gives the memory of a model that is no longer referenced back, before the next one arrives."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
