"""The cost of a whole clip, part by part: operations, bytes and peak memory, and predicted seconds on a card.

    Stage I     condition   the picture and grey frames at Stage I's size, encoded
                motion      Stage I's DiT, all blocks in one window
    reference   low decode  the motion, decoded at its size
                encode      enlarged to the target size and encoded
    Stage II    denoise     Stage II's DiT, window by window (``model.csg.sampler.SegmentPlan``)
    decode      decode      the clip, while Stage II makes it

Without a Stage I (:meth:`Configuration.end_to_end`) the target itself is made as Stage I makes the motion: condition,
denoise, decode.

Peaks are those of ``model``: the DiT's workspace is what its planner allocates, and the VAE's peak is counted by
running it on tensors without memory. All else that is on the card at that moment is part of a peak: the decoder and its
state beside Stage II, Stage II beside the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bench.cost import dit, vae
from bench.cost.configuration import DTYPES, Configuration
from bench.cost.dit import whole_step, window_passes
from bench.cost.profiles import NARROW, WIDE, Profile, seconds
from bench.cost.work import Matmul, Traffic, Work, total
from model.config import DiTConfig, VAEConfig
from model.errors import InputError
from model.memory.dit_bytes import DiTMemory, dit_memory
from model.memory.vae_places import USABLE
from model.memory.vae_plan import PlannedVAE, half_bytes, plan_vae, state_bytes
from model.streaming.placement import Placement, placed_bytes
from swifti2v_kernels.common.cards import Card

STAGES = ("Stage I", "reference", "Stage II", "decode")


@dataclass(frozen=True)
class Part:
    """One part of the pipeline for a whole clip.

    ``peak_bytes`` is all that is on the card while it runs, and ``weight_bytes`` its share of DiT weights, each of
    which is read once in every one of ``forwards``. ``host_bytes`` are copied between the card and host memory, where
    states of tiles wait. ``note`` says how the VAE works through the frames.
    """

    name: str
    stage: str
    work: Work
    itemsize: int
    peak_bytes: int
    weight_bytes: int = 0
    forwards: int = 0
    host_bytes: int = 0
    note: str = ""

    @property
    def flops(self) -> Mapping[str, int]:
        """The operations by kind (``bench.cost.work.KINDS``), halos of tiles included."""
        return self.work.flops

    @property
    def bytes(self) -> int:
        """The bytes that this project's operators move, operands of matmuls included."""
        return self.work.bytes


@dataclass(frozen=True)
class PredictedPart:
    """A part on a card. ``streamed`` says that its weights do not fit and come from host memory in every forward."""

    part: Part
    seconds: float
    fits: bool
    streamed: bool


@dataclass(frozen=True)
class Prediction:
    """The predicted seconds of a configuration on a card, and its assumptions, a sentence each."""

    configuration: Configuration
    gpu: Card
    profile: Profile
    parts: tuple[PredictedPart, ...]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return sum(predicted.seconds for predicted in self.parts)

    @property
    def by_stage(self) -> dict[str, float]:
        """The seconds of each of :data:`STAGES` that the configuration has."""
        stages = dict.fromkeys(predicted.part.stage for predicted in self.parts)
        return {s: sum(p.seconds for p in self.parts if p.part.stage == s) for s in stages}

    @property
    def peak_bytes(self) -> int:
        """The highest peak of any part."""
        return max(predicted.part.peak_bytes for predicted in self.parts)


def whole_work(configuration: Configuration, config: DiTConfig, latent_size: tuple[int, int], steps: int) -> Work:
    """Returns the work of all blocks in one window, as ``model.pipeline.stages.make_motion`` takes them, unguided."""
    itemsize = configuration.dtype.itemsize
    step = whole_step(config, configuration.plan.num_blocks, latent_size, itemsize)
    return dit.context(config, itemsize=itemsize) + dit.modulation(config, steps + 1, itemsize) + steps * step


def segments_work(configuration: Configuration, latent_size: tuple[int, int]) -> Work:
    """Returns the work of all windows and steps of Stage II, as ``model.csg.sampler.sample_latents`` takes them.

    Guidance is not included.
    """
    config, itemsize, steps = configuration.stage_two, configuration.dtype.itemsize, configuration.steps
    works = [dit.context(config, itemsize=itemsize), dit.modulation(config, steps + 1, itemsize)]
    for window in configuration.plan:
        once, step = window_passes(config, window, configuration.mode, latent_size, itemsize)
        works += [once, steps * step]
    return total(works)


def resize_work(low: tuple[int, int], size: tuple[int, int], num_frames: int) -> Work:
    """Returns the work of interpolating all frames but the first from ``low`` (width, height) to ``size``.

    It is two matmuls in float32.
    """
    (w, h), (width, height) = low, size
    frames = num_frames - 1
    matmuls = (
        Matmul("resize", 2 * 3 * frames * height * h * w, h),
        Matmul("resize", 2 * 3 * frames * height * w * width, w),
    )
    moved = 4.0 * 3 * frames * (w * h + 2 * w * height + 3 * width * height)
    return Work(matmuls, between=Traffic.same(moved))


def parts(configuration: Configuration, *, memory: int | None = None, capability: int = 90) -> list[Part]:
    """Returns the parts of a clip in their order.

    Args:
        configuration: models and clip.
        memory: bytes of the card, of which :data:`model.memory.vae_places.USABLE` are planned with: the VAE works in
            tiles where it must. None, or where no tiles fit: untiled.
        capability: compute capability of the card as two digits, which decides what computes the VAE's layers.
    """
    limit = None if memory is None else int(USABLE * memory)
    return _Planner(configuration, limit, capability).parts()


@dataclass(frozen=True)
class _Planner:
    configuration: Configuration
    limit: int | None
    capability: int

    def parts(self) -> list[Part]:
        c = self.configuration
        size, latent = (c.width, c.height), _latent_size(c.vae, (c.width, c.height))
        held, weights = self._memory(c.stage_two, latent, c.stage_one is None)
        if c.stage_one is None:
            work = whole_work(c, c.stage_two, latent, c.steps)
            before = [self._condition("reference", c.stage_two, c.vae, size, weights)]
        else:
            work = segments_work(c, latent)
            before = [*self._stage_one(c.stage_one), *self._reference()]
        decode, planned = self._vae(
            "decode", "decode", c.vae, "decode", size, weights + held.total, len(c.plan) + 1, piece=c.blocks_per_segment
        )
        passes = (1 + c.guidance) * (c.steps + (c.mode == "causal"))
        denoise = Part(
            "denoise",
            "Stage II",
            (1 + c.guidance) * work,
            c.dtype.itemsize,
            weights + held.total + planned.peak.weights + planned.peak.state,
            weights,
            passes * len(c.plan),
        )
        return [*before, denoise, decode]

    def _memory(
        self, config: DiTConfig, latent_size: tuple[int, int], whole: bool, steps: int | None = None
    ) -> tuple[DiTMemory, int]:
        """Returns what a DiT holds beside its weights, and these; ``whole`` is a stage of one window."""
        c = self.configuration
        held = dit_memory(
            config, c.plan, latent_size, steps=steps or c.steps, dtype=c.dtype,
            causal=c.mode == "causal", whole=whole, contexts=1 if steps else 1 + c.guidance,
        )  # fmt: skip
        return held, placed_bytes(config, c.dtype, Placement()).device

    def _stage_one(self, config: DiTConfig) -> list[Part]:
        c = self.configuration
        latent = _latent_size(c.motion_vae, c.motion_size)
        held, weights = self._memory(config, latent, True, c.stage_one_steps)
        condition = self._condition("Stage I", config, c.motion_vae, c.motion_size, weights)
        coders = half_bytes(c.motion_vae, "encode", c.encode_dtype) + half_bytes(c.motion_vae, "decode", c.dtype)
        motion = Part(
            "motion",
            "Stage I",
            whole_work(c, config, latent, c.stage_one_steps),
            c.dtype.itemsize,
            weights + held.total + coders,
            weights,
            c.stage_one_steps,
        )
        return [condition, motion]

    def _reference(self) -> list[Part]:
        c = self.configuration
        size = c.width, c.height
        # Both are one stream, so one is on the card beside the other.
        low, planned = self._vae("low decode", "reference", c.motion_vae, "decode", c.motion_size, 0, c.plan.num_blocks)
        encode, _ = self._vae("encode", "reference", c.vae, "encode", size, planned.peak.total, 1)
        return [low, replace(encode, work=encode.work + resize_work(c.motion_size, size, c.num_frames))]

    def _condition(
        self, stage: str, dit_config: DiTConfig, config: VAEConfig, size: tuple[int, int], beside: int
    ) -> Part:
        """Returns the encoding of the picture and grey frames beside the DiT; without mask channels, of the picture."""
        c = self.configuration
        frames, pieces = (
            (c.num_frames, c.plan.num_blocks) if dit_config.in_channels != dit_config.out_channels else (1, 1)
        )
        return self._vae("condition", stage, config, "encode", size, beside, pieces, frames=frames)[0]

    def _vae(
        self,
        name: str,
        stage: str,
        config: VAEConfig,
        half: str,
        size: tuple[int, int],
        beside: int,
        pieces: int,
        *,
        piece: int = 1,
        frames: int | None = None,
    ) -> tuple[Part, PlannedVAE]:
        """Returns one half of the VAE with ``beside`` bytes of something else on the card, and its plan.

        The clip, or the first ``frames`` of it, comes in so many ``pieces`` of ``piece`` latent frames."""
        c = self.configuration
        dtype = c.dtype if half == "decode" else c.encode_dtype
        planned, taken = self._plan(config, half, size, dtype, beside, piece)
        work = vae.work(config, half, *size, frames or c.num_frames, dtype.itemsize)
        note, copied = "", 0
        if planned.plan.tiles > 1:
            work, note = planned.redundancy * work, f"{planned.plan.rows} x {planned.plan.columns} exact tiles"
            note += f", {planned.redundancy:.2f} times the work of whole frames"
        if planned.plan.park:
            # The states of all tiles are together those of the whole frame: fetched and parked once a piece, unless one
            # piece is all there is.
            copied = (2 * pieces - 1) * state_bytes(planned.request) if pieces > 1 else 0
            note += f", {copied / 1e9:.0f} GB copied to host memory and back"
        peak = taken + planned.peak.total
        return Part(name, stage, work, dtype.itemsize, peak, host_bytes=copied, note=note), planned

    def _plan(
        self, config: VAEConfig, half: str, size: tuple[int, int], dtype: torch.dtype, beside: int, piece: int
    ) -> tuple[PlannedVAE, int]:
        """Returns the first plan that fits, and the bytes beside it: none if it must be; untiled if no plan fits."""
        options = {"dtype": dtype, "capability": self.capability, "piece": piece}
        for taken in dict.fromkeys((beside, 0)) if self.limit is not None else ():
            if self.limit <= taken:
                continue
            try:
                return plan_vae(config, half, *size, limit=self.limit - taken, **options), taken
            except InputError:  # no tiles are small enough
                continue
        return plan_vae(config, half, *size, **options), beside


def _latent_size(config: VAEConfig, size: tuple[int, int]) -> tuple[int, int]:
    return size[1] // config.spatial_stride, size[0] // config.spatial_stride


def predict(configuration: Configuration, gpu: Card, profile: Profile) -> Prediction:
    """Predicts the seconds of every part on ``gpu`` by code of ``profile``, and returns the assumptions too.

    A part that does not fit is predicted as if it did; but where it fits without weights, these come from host memory
    once in every forward, and the part takes that long if its matmuls take less.
    """
    usable = int(USABLE * gpu.memory_bytes)
    predicted = []
    for part in parts(configuration, memory=gpu.memory_bytes, capability=gpu.capability):
        needed, fits = seconds(part.work, gpu, profile, part.itemsize), part.peak_bytes <= usable
        streamed = not fits and part.weight_bytes > 0 and part.peak_bytes - part.weight_bytes <= usable
        if streamed:
            needed = max(needed, part.forwards * part.weight_bytes / (1e9 * gpu.host))
        needed += part.host_bytes / (1e9 * gpu.host)
        predicted.append(PredictedPart(part, needed, fits, streamed))
    sentences = (*_general(configuration, gpu, profile), *_particular(gpu, predicted))
    return Prediction(configuration, gpu, profile, tuple(predicted), sentences)


def _general(c: Configuration, gpu: Card, profile: Profile) -> list[str]:
    rates, names = profile.rates_for(gpu), {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
    long, narrow, wide = rates.attention.points[-1][1], rates.convolution.at(NARROW), rates.convolution.at(WIDE)
    guided = "with guidance (two forwards a step)" if c.guidance else "without guidance"
    stages = f"Stage II ({c.mode.replace('_', ' ')}) takes {c.steps} steps {guided}."
    if c.stage_one is None:
        stages = f"All blocks are denoised in one window, in {c.steps} steps {guided}."
    else:
        stages = f"Stage I takes {c.stage_one_steps} steps without guidance, {stages}"
    sentences = [
        f"All seconds are predicted, for {profile.description}, on {gpu.name} ({gpu.source}).",
        f"Rates on {gpu.architecture} are {rates.basis}: of {gpu.bf16:g} TFLOP/s dense bf16 long attention reaches"
        f" {long:.2f}, linear layers {rates.linear:.2f}, convolutions of up to {NARROW} channels {narrow:.2f} and from"
        f" {WIDE} on {wide:.2f}; of {gpu.bandwidth:g} TB/s the rest reaches {rates.bandwidth:.2f}.",
        "Matmuls hide the traffic of their operands; what moves between matmuls is added; nothing else overlaps, and"
        " launches cost nothing.",
        stages,
        "Operations and memory are those of this project's model, whatever the code.",
        f"DiTs and decoders work in {names[c.dtype]}, encoders in {names[c.encode_dtype]}; float32 runs as TF32.",
        "Encoders of text and image, reading weights and writing the file are not included.",
    ]
    if not profile.folded:
        sentences.append("Frames are enlarged before they are convolved, 36/16 of the operations of folded upsampling.")
    if c.encode_dtype == torch.float32:
        known = "fitted to a 2K clip on an H200" if gpu.architecture == "hopper" else "assumed to be those of bf16"
        sentences.append(f"Convolutions in float32 are cuDNN's; their fractions of the TF32 peak are {known}.")
    return sentences


def _particular(gpu: Card, predicted: list[PredictedPart]) -> list[str]:
    sentences = []
    for entry in predicted:
        part, where = entry.part, f"{entry.part.stage}, {entry.part.name}"
        if part.note:
            sentences.append(f"{where}: {part.note}.")
        if not entry.fits:
            how = (
                "its weights come from host memory in every forward" if entry.streamed else "predicted as if it fitted"
            )
            need = (
                f"needs {part.peak_bytes / 1e9:.1f} GB and {USABLE * gpu.memory:.1f} of {gpu.memory:g} are planned with"
            )
            sentences.append(f"{where}: {need}; {how}.")
    return sentences
