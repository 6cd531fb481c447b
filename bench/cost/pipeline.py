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

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.cost import dit, vae
from bench.cost.configuration import Configuration
from bench.cost.profiles import NARROW, RATES, WIDE, seconds
from bench.cost.work import Matmul, Work, total
from model.config import DiTConfig
from model.errors import InputError
from model.memory.dit_bytes import dit_memory, tokens_per_block
from model.memory.request import USABLE
from model.memory.vae_plan import PlannedVAE, half_bytes, plan_vae, state_bytes
from model.streaming.placement import Placement, placed_bytes
from swifti2v_kernels.common.cards import Card

STAGES = ("Stage I", "reference", "Stage II", "decode")
#: Of DiTs and decoders, and of encoders.
DTYPES = {"dit": torch.bfloat16, "decode": torch.bfloat16, "encode": torch.float32}


@dataclass(frozen=True)
class Part:
    """One part of the pipeline for a whole clip.

    ``peak_bytes`` is all that is on the card while it runs, and ``weight_bytes`` its share of DiT weights, each of
    which is read once in every one of ``forwards``. ``host_bytes`` are copied between the card and host memory, where
    states of tiles wait. ``note`` says how the VAE works through the frames. Predicted are ``seconds``, whether it
    ``fits`` the card, and whether its weights do not and are ``streamed`` from host memory in every forward.
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
    seconds: float = 0.0
    fits: bool = True
    streamed: bool = False


@dataclass(frozen=True)
class Prediction:
    """The predicted parts of a configuration on a card, and the assumptions, a sentence each."""

    parts: tuple[Part, ...]
    assumptions: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The seconds of all parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def by_stage(self) -> dict[str, float]:
        """The seconds of each of :data:`STAGES` that the configuration has."""
        stages = dict.fromkeys(part.stage for part in self.parts)
        return {stage: sum(part.seconds for part in self.parts if part.stage == stage) for stage in stages}

    @property
    def peak_bytes(self) -> int:
        """The highest peak of any part."""
        return max(part.peak_bytes for part in self.parts)


def parts(c: Configuration, card: Card | None = None) -> list[Part]:
    """Returns the parts of a clip in their order.

    Args:
        c: models and clip.
        card: the card, of whose memory :data:`model.memory.request.USABLE` is planned with: the VAE works in tiles
            where it must. None, or where no tiles fit: untiled.
    """
    size, latent = (c.width, c.height), _latent_size(c, (c.width, c.height))
    held, weights = _dit_bytes(c, c.stage_two, latent, c.stage_one is None)
    if c.stage_one is None:
        work = whole_work(c, c.stage_two, latent, c.steps)
        before = [_condition(c, card, "reference", c.stage_two, size, weights)]
    else:
        work = segments_work(c, latent)
        before = [*_stage_one(c, card, c.stage_one), *_reference(c, card)]
    decode, planned = _vae(
        c, card, "decode", "decode", "decode", size, weights + held, len(c.plan) + 1, piece=c.blocks_per_segment
    )
    denoise = Part(
        "denoise", "Stage II", (1 + c.guidance) * work, 2,
        weights + held + planned.peak.weights + planned.peak.state, weights,
        (1 + c.guidance) * (c.steps + (c.mode == "causal")) * len(c.plan),
    )  # fmt: skip
    return [*before, denoise, decode]


def whole_work(c: Configuration, config: DiTConfig, latent_size: tuple[int, int], steps: int) -> Work:
    """Returns the work of all blocks in one window, as ``model.pipeline.stages.make_motion`` takes them, unguided."""
    tokens = tokens_per_block(config, latent_size)
    # A DiT without mask channels is given its first block.
    targets = c.plan.num_blocks - (config.in_channels == config.out_channels)
    step = dit.forward(config, c.plan.num_blocks * tokens, targets=targets * tokens)
    return dit.context(config) + dit.modulation(config, steps + 1) + steps * step


def segments_work(c: Configuration, latent_size: tuple[int, int]) -> Work:
    """Returns the work of all windows and steps of Stage II, as ``model.csg.sampler.sample_latents`` takes them.

    Guidance is not included.
    """
    works = [dit.context(c.stage_two), dit.modulation(c.stage_two, c.steps + 1)]
    tokens = tokens_per_block(c.stage_two, latent_size)
    for window in c.plan:
        given, noisy = len(window.conditioning) * tokens, len(window.noisy) * tokens
        if c.mode == "causal":
            works.append(dit.forward(c.stage_two, given, targets=0))
            step = dit.forward(c.stage_two, noisy, remembered=given)
        else:
            step = dit.forward(c.stage_two, given + noisy, targets=noisy)
        works.append(c.steps * step)
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
    return Work(matmuls, fused=moved, separate=moved)


def _dit_bytes(
    c: Configuration, config: DiTConfig, latent_size: tuple[int, int], whole: bool, steps: int | None = None
) -> tuple[int, int]:
    """Returns the bytes that a DiT holds beside its weights, and these; ``whole`` is a stage of one window."""
    held = dit_memory(
        config, c.plan, latent_size, steps=steps or c.steps, dtype=DTYPES["dit"],
        causal=c.mode == "causal", whole=whole, contexts=1 if steps else 1 + c.guidance,
    )  # fmt: skip
    return sum(held.values()), placed_bytes(config, DTYPES["dit"], Placement()).device


def _stage_one(c: Configuration, card: Card | None, config: DiTConfig) -> list[Part]:
    latent = _latent_size(c, c.motion_size)
    held, weights = _dit_bytes(c, config, latent, True, c.stage_one_steps)
    condition = _condition(c, card, "Stage I", config, c.motion_size, weights)
    peak = weights + held + sum(half_bytes(c.vae, half, DTYPES[half]) for half in ("encode", "decode"))
    work = whole_work(c, config, latent, c.stage_one_steps)
    return [condition, Part("motion", "Stage I", work, 2, peak, weights, c.stage_one_steps)]


def _reference(c: Configuration, card: Card | None) -> list[Part]:
    size = c.width, c.height
    # Both are one stream, so one is on the card beside the other.
    low, planned = _vae(c, card, "low decode", "reference", "decode", c.motion_size, 0, c.plan.num_blocks)
    encode, _ = _vae(c, card, "encode", "reference", "encode", size, planned.peak.total, 1)
    return [low, replace(encode, work=encode.work + resize_work(c.motion_size, size, c.num_frames))]


def _condition(
    c: Configuration, card: Card | None, stage: str, config: DiTConfig, size: tuple[int, int], beside: int
) -> Part:
    """Returns the encoding of the picture and grey frames beside the DiT; without mask channels, of the picture."""
    masked = config.in_channels != config.out_channels
    frames, pieces = (c.num_frames, c.plan.num_blocks) if masked else (1, 1)
    return _vae(c, card, "condition", stage, "encode", size, beside, pieces, frames=frames)[0]


def _vae(
    c: Configuration, card: Card | None, name: str, stage: str, half: str, size: tuple[int, int], beside: int,
    pieces: int, *, piece: int = 1, frames: int | None = None,
) -> tuple[Part, PlannedVAE]:  # fmt: skip
    """Returns one half of the VAE with ``beside`` bytes of something else on the card, and its plan.

    The clip, or the first ``frames`` of it, comes in so many ``pieces`` of ``piece`` latent frames.
    """
    dtype = DTYPES[half]
    planned, taken = _planned(c, card, half, size, beside, piece)
    work = vae.work(c.vae, half, *size, frames or c.num_frames, dtype.itemsize)
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


def _planned(
    c: Configuration, card: Card | None, half: str, size: tuple[int, int], beside: int, piece: int
) -> tuple[PlannedVAE, int]:
    """Returns the first plan that fits, and the bytes beside it: none if it must be; untiled if no plan fits."""
    options = {"dtype": DTYPES[half], "capability": 90 if card is None else card.capability, "piece": piece}
    for taken in dict.fromkeys((beside, 0)) if card is not None else ():
        limit = int(USABLE * card.memory_bytes) - taken
        if limit <= 0:
            continue
        try:
            return plan_vae(c.vae, half, *size, limit=limit, **options), taken
        except InputError:  # no tiles are small enough
            continue
    return plan_vae(c.vae, half, *size, **options), beside


def _latent_size(c: Configuration, size: tuple[int, int]) -> tuple[int, int]:
    return size[1] // c.vae.spatial_stride, size[0] // c.vae.spatial_stride


def predict(c: Configuration, gpu: Card) -> Prediction:
    """Predicts the seconds of every part on ``gpu``, and returns the assumptions too.

    A part that does not fit is predicted as if it did; but where it fits without weights, these come from host memory
    once in every forward, and the part takes that long if its matmuls take less.
    """
    usable, predicted = int(USABLE * gpu.memory_bytes), []
    for part in parts(c, gpu):
        needed, fits = seconds(part.work, gpu, part.itemsize), part.peak_bytes <= usable
        streamed = not fits and part.weight_bytes > 0 and part.peak_bytes - part.weight_bytes <= usable
        if streamed:
            needed = max(needed, part.forwards * part.weight_bytes / (1e9 * gpu.host))
        needed += part.host_bytes / (1e9 * gpu.host)
        predicted.append(replace(part, seconds=needed, fits=fits, streamed=streamed))
    return Prediction(tuple(predicted), (*_general(c, gpu), *_particular(gpu, predicted)))


def _general(c: Configuration, gpu: Card) -> list[str]:
    rates = RATES[gpu.architecture]
    guided = "with guidance (two forwards a step)" if c.guidance else "without guidance"
    stages = f"All blocks are denoised in one window, in {c.steps} steps {guided}."
    if c.stage_one is not None:
        stages = f"Stage I takes {c.stage_one_steps} steps without guidance, Stage II ({c.mode.replace('_', ' ')})"
        stages += f" takes {c.steps} steps {guided}."
    known = "fitted to a 2K clip on an H200" if gpu.architecture == "hopper" else "assumed to be those of bf16"
    return [
        f"All seconds are predicted, for the kernels and the model of this project, on {gpu.name} ({gpu.source}).",
        f"Rates on {gpu.architecture} are {rates.basis}: of {gpu.bf16:g} TFLOP/s dense bf16 long attention reaches"
        f" {rates.attention[-1][1]:.2f}, linear layers {rates.linear:.2f}, convolutions of up to {NARROW} channels"
        f" {rates.narrow:.2f} and from {WIDE} on {rates.wide:.2f}; of {gpu.bandwidth:g} TB/s the rest reaches"
        f" {rates.bandwidth:.2f}.",
        "Matmuls hide the traffic of their operands; what moves between matmuls is added; nothing else overlaps, and"
        " launches cost nothing.",
        stages,
        "DiTs and decoders work in bfloat16, encoders in float32; float32 runs as TF32.",
        "Encoders of text and image, reading weights and writing the file are not included.",
        f"Convolutions in float32 are cuDNN's; their fractions of the TF32 peak are {known}.",
    ]


def _particular(gpu: Card, predicted: list[Part]) -> Iterator[str]:
    for part in predicted:
        where = f"{part.stage}, {part.name}"
        if part.note:
            yield f"{where}: {part.note}."
        if not part.fits:
            how = "its weights come from host memory in every forward" if part.streamed else "predicted as if it fitted"
            need = f"needs {part.peak_bytes / 1e9:.1f} GB and {USABLE * gpu.memory:.1f} of {gpu.memory:g} are planned"
            yield f"{where}: {need} with; {how}."
