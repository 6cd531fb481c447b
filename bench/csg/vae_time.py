"""The time of the stages around Stage II, from few latent frames: all but a clip's first are alike."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.csg.setups import Setup
from model.csg.sampler import SegmentPlan
from model.io.media import VideoWriter
from model.machine.host import release
from model.memory.plan import plan_memory
from model.memory.request import DiTRequest, MemoryRequest
from model.memory.vae_places import PipelinePlans, device_options
from model.pipeline.stages import make_reference
from model.sizes import size_multiple, stage_one_size
from model.vae.model import WanVAE
from model.weights.load import random_weights

#: Latent frames that are run: the anchor, and one or two segments of three after it.
BLOCKS, SEGMENT = (4, 7), 3
#: Frames that are written.
FRAMES = (4, 12)
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
    """Times the reference and the decode of one setup.

    Args:
        setup: gives the sizes and the VAE.
        plans: as of :func:`plan_vaes`.
        device: where the VAE runs.
    """

    def __init__(self, setup: Setup, plans: PipelinePlans, device: torch.device):
        self.setup, self.plans, self.device = setup, plans, device
        self.vae = random_weights(WanVAE, setup.vae, 0, device=device).to_dtypes(decode=plans.decode.request.dtype)
        self.vae.to_dtypes(encode=plans.encode_dtype)

    def reference(self) -> tuple[float, int | None]:
        """Returns the seconds to make the reference of the whole clip, and the peak of memory in bytes."""
        z, (rows, columns) = self.setup.vae.z_dim, self.plans.motion.request.latent_size
        picture = torch.zeros(1, 3, 1, self.setup.height, self.setup.width, device=self.device)

        def run(blocks: int) -> None:
            motion = torch.randn(1, z, blocks, rows, columns, device=self.device)
            plans = {"plan": self.plans.reference.plan, "motion_plan": self.plans.motion.plan}
            make_reference(motion, self.vae, self.vae, picture, **plans)

        return self._extrapolated(run)

    def decode(self) -> tuple[float, int | None]:
        """Returns the seconds to decode the whole clip, and the peak of memory in bytes."""
        rows, columns = self.setup.latent_size
        self.vae.drop_encoder()

        def run(blocks: int) -> None:
            latents = torch.randn(1, self.setup.vae.z_dim, blocks, rows, columns, device=self.device)
            for frames in self.vae.decode_frames(segments(latents), self.plans.decode.plan):
                del frames

        return self._extrapolated(run)

    @torch.no_grad()
    def _extrapolated(self, run: Callable[[int], None]) -> tuple[float, int | None]:
        release(self.device)
        cuda = self.device.type == "cuda"
        run(BLOCKS[0])  # compiles
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [self._least(lambda blocks=blocks: run(blocks)) for blocks in BLOCKS]
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return extrapolated(BLOCKS, seconds, self.setup.num_blocks), peak

    def _least(self, run: Callable[[], None]) -> float:
        """Returns the fewer seconds of two runs, or those of one that takes long."""
        seconds = []
        while not seconds or (len(seconds) < 2 and max(seconds) < LONG):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    @property
    def note(self) -> str:
        """A note that says from how many latent frames the times are extrapolated."""
        return f"from {BLOCKS[1]} of {self.setup.num_blocks} latent frames"


def segments(latents: torch.Tensor) -> Sequence[torch.Tensor]:
    """Splits latents ``[B, z, T, h, w]`` as the pipeline decodes them: the anchor, then segment by segment."""
    return latents[:, :, :1], *latents[:, :, 1:].split(SEGMENT, dim=2)


def file_seconds(setup: Setup) -> float | None:
    """Returns the seconds in which the file of a clip is written, on the CPU; None where PyAV is not installed."""
    if importlib.util.find_spec("av") is None:
        return None
    frames = torch.randint(0, 255, (max(FRAMES), setup.height // 8, setup.width // 8, 3), dtype=torch.uint8)
    # Smooth pictures, as videos are: noise would take x264 many times as long.
    frames = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), (setup.height, setup.width), mode="bilinear"
    )
    frames = frames.permute(0, 2, 3, 1).to(torch.uint8)
    seconds = []
    with tempfile.TemporaryDirectory() as room:
        for count in (1, *FRAMES):  # the first loads the encoder
            start = time.perf_counter()
            with VideoWriter(Path(room) / f"{count}.mp4", setup.width, setup.height, 16) as writer:
                writer.write(frames[:count])
            seconds.append(time.perf_counter() - start)
    return extrapolated(FRAMES, seconds[1:], setup.num_frames)


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
