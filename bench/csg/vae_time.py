"""The time of the stages around Stage II, from few latent frames: all but a clip's first are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bench.csg.setups import Setup
from bench.harness.timing import wall_seconds
from model.csg.sampler import SegmentPlan
from model.machine.cards import device_options
from model.machine.host import release
from model.memory.plan import plan_memory
from model.memory.report import PipelinePlans
from model.memory.request import DiTRequest, MemoryRequest
from model.pipeline.stages import make_reference
from model.sizes import size_multiple, stage_one_size
from model.vae.model import WanVAE
from model.weights.load import random_weights

#: Latent frames that are run: the anchor, and one or two segments of three after it.
BLOCKS, SEGMENT = (4, 7), 3
#: Runs longer than so many seconds are not repeated.
LONG = 2.0


def plan_vaes(setup: Setup, device: torch.device, dtype: torch.dtype) -> PipelinePlans:
    """Plans the VAE as ``model.generate`` would for the setup's two stages on this device, decoding in ``dtype``."""
    size = setup.width, setup.height
    request = MemoryRequest(
        stage_one=DiTRequest(setup.stage_one), stage_two=DiTRequest(setup.dit), vae=setup.vae, size=size,
        motion_size=stage_one_size(*size, size_multiple(setup.vae, setup.stage_one)), num_frames=setup.num_frames,
        plan=SegmentPlan(setup.num_blocks), steps=setup.steps, dtype=dtype, **device_options(device),
    )  # fmt: skip
    return plan_memory(request).vae_plans


class VAEClock:
    """Runs and times the reference and the decode of one setup.

    Args:
        setup: gives the sizes and the VAE.
        plans: as of :func:`plan_vaes`.
        device: where the VAE runs.
    """

    def __init__(self, setup: Setup, plans: PipelinePlans, device: torch.device):
        self.setup, self.plans, self.device = setup, plans, device
        self.vae = random_weights(WanVAE, setup.vae, 0, device=device).to_dtypes(decode=plans.decode.request.dtype)
        self.vae.to_dtypes(encode=plans.encode_dtype)

    @torch.no_grad()
    def reference(self, blocks: int) -> None:
        """Makes the reference of so many latent frames."""
        motion = torch.randn(
            1, self.setup.vae.z_dim, blocks, *self.plans.motion.request.latent_size, device=self.device
        )
        picture = torch.zeros(1, 3, 1, self.setup.height, self.setup.width, device=self.device)
        plans = {"plan": self.plans.reference.plan, "motion_plan": self.plans.motion.plan}
        make_reference(motion, self.vae, self.vae, picture, **plans)

    @torch.no_grad()
    def decode(self, blocks: int) -> None:
        """Decodes so many latent frames, the anchor and then segment by segment; frames are dropped as they come."""
        self.vae.drop_encoder()
        latents = torch.randn(1, self.setup.vae.z_dim, blocks, *self.setup.latent_size, device=self.device)
        segments = latents[:, :, :1], *latents[:, :, 1:].split(SEGMENT, dim=2)
        for frames in self.vae.decode_frames(segments, self.plans.decode.plan):
            del frames

    def extrapolated(self, run: Callable[[int], None]) -> tuple[float, int | None]:
        """Returns the seconds in which one of the above is done for the whole clip, and the peak in bytes."""
        release(self.device)
        cuda = self.device.type == "cuda"
        run(BLOCKS[0])  # compiles
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for blocks in BLOCKS:
            seconds.append(self.seconds(run, blocks))
            if seconds[-1] < LONG:
                seconds[-1] = min(seconds[-1], self.seconds(run, blocks))
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return extrapolated(BLOCKS, seconds, self.setup.num_blocks), peak

    def seconds(self, run: Callable[[int], None], blocks: int) -> float:
        """Returns the seconds of one run."""
        return wall_seconds(lambda: run(blocks), self.device)

    @property
    def note(self) -> str:
        """A note that says from how many latent frames the times are extrapolated."""
        return f"from {BLOCKS[1]} of {self.setup.num_blocks} latent frames"


def extrapolated(counts: Sequence[int], seconds: Sequence[float], total: int) -> float:
    """Returns the seconds of ``total`` items from those of two smaller counts.

    Raises:
        RuntimeError: more items took less time, so that there is nothing to scale.
    """
    slope = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    if slope <= 0:
        raise RuntimeError(
            f"{counts[1]} took {seconds[1]:.3g} s and {counts[0]} {seconds[0]:.3g} s: too short to scale"
        )
    return seconds[1] + (total - counts[1]) * slope
