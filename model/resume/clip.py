"""A clip that is never lost: each result is on disk as soon as it is there, and a run goes on after the last one.

    inputs       the picture at both sizes, text and image embeddings
    motion       Stage I's latents
    condition    the reference that Stage II starts from
    segment-n    the blocks of segment n
    piece-n      the frames of segment n, encoded; piece 0 is the input image's frame

A run that was killed, one that ran out of memory and is planned anew, and one that was never interrupted are the same
code: :func:`make_clip` looks at what there is and makes the rest. On the same device and software the film is the
same, byte for byte; the decoder runs through finished segments again, since its memory of them (17 GB at 2560x1408) is
not kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import VAEConfig
from model.csg.sampler import SegmentPlan
from model.errors import NoMemoryError
from model.io.media import VideoWriter
from model.machine.host import release
from model.machine.measure import format_bytes, full_memory
from model.memory.plan import find_plan
from model.memory.report import MemoryPlan, Phase
from model.memory.request import HOST_USABLE, MemoryRequest
from model.pipeline.clip import ClipJob, Watcher, make_condition, make_frames
from model.pipeline.components import Components
from model.pipeline.encoders import TEXT_LENGTH
from model.resume.files import Shapes
from model.resume.state import RunState

#: The most plans that a run tries when it runs out of memory, and the share of a peak that the next plan may take.
MOST_PLANS = 3
SHRINK = 0.85


def piece_ends(plan: SegmentPlan, stride: int) -> list[int]:
    """Returns how many frames the film has at the end of each piece: the anchor's, and then every segment's."""
    ends = [1]
    for window in plan:
        ends.append(ends[-1] + stride * len(window.noisy))
    return ends


def input_shapes(components: Components, size: tuple[int, int], motion_size: tuple[int, int]) -> Shapes:
    """Returns the shapes of a clip's inputs, as they are kept, of its (width, height) and that of Stage I."""
    shapes: dict[str, tuple[int | None, ...]] = {
        "picture": (1, 3, 1, *reversed(size)),
        "low_picture": (1, 3, 1, *reversed(motion_size)),
        "text": (1, TEXT_LENGTH, components.stage_two_config.text_dim),
    }
    for name, config in (("image_one", components.stage_one_config), ("image_two", components.stage_two_config)):
        if config.image_dim is not None:
            shapes[name] = (1, None, config.image_dim)
    return shapes


@dataclass(frozen=True)
class _Shortage:
    """A lack of memory: ``memory`` is ``device`` or ``host``, ``phase`` the phase of the plan, ``told`` the message."""

    memory: str
    phase: Phase
    told: str


def make_clip(
    components: Components, job: ClipJob, plan: MemoryPlan, state: RunState, writer: VideoWriter, watcher: Watcher
) -> MemoryPlan:
    """Makes what is not there yet, and writes the film. Where memory does not suffice it is planned anew with less.

    Args:
        components: the models, whose layers are placed as the plan says.
        job: the clip that is wanted; its tiles are those of the plan.
        plan: the first plan of the memory.
        state: the folder of the run.
        writer: the film, whose pieces are in that folder; it is entered.
        watcher: is told of each stage and step, and says which stage failed.

    Returns:
        The plan that the clip was finished by.

    Raises:
        NoMemoryError: memory did not suffice for the last plan either, or no smaller one exists. Everything that was
            made stays in the state.
    """
    for attempt in range(1, MOST_PLANS + 1):
        try:
            _go_on(*as_planned(components, job, plan), state, writer, watcher)
            return plan
        except (RuntimeError, MemoryError) as error:
            memory = full_memory(error)
            if memory is None:
                raise
            shortage = _explain(error, memory, plan, watcher.failed, job.text.device)
        # Only here, after the handler: the exception would keep alive what was on the device.
        release(job.text.device)
        if attempt == MOST_PLANS:
            raise NoMemoryError(f"{shortage.told}\n  and {MOST_PLANS} plans were tried")
        smaller = next((p for p in map(find_plan, _with_less(plan, shortage)) if p is not None), None)
        if smaller is None:
            raise NoMemoryError(
                f"{shortage.told}\n  and there is no smaller plan (python -m model.plan shows the smallest)"
            )
        plan = smaller
        print(f"{shortage.told}\nplanned anew, {attempt} of at most {MOST_PLANS - 1} times; it goes on:\n{plan}")
        writer.drop_begun()
    raise AssertionError("every attempt returns or raises")


def _with_less(plan: MemoryPlan, shortage: _Shortage) -> list[MemoryRequest]:
    """Returns requests whose plans take less of the memory that was too little, in the order to try them."""
    if shortage.memory == "host":
        return [replace(plan.request, ram=int(SHRINK * plan.host_peak / HOST_USABLE))]
    name, taken = shortage.phase.name, [shortage.phase.device]
    if name == "Stage II":
        # The plan chooses Stage II together with the decoder, which may be the one for which memory is too little.
        taken.append(plan.phase("decode").device)
    return [replace(plan.request, less={**plan.request.less, name: int(SHRINK * size)}) for size in taken]


def as_planned(components: Components, job: ClipJob, plan: MemoryPlan) -> tuple[Components, ClipJob]:
    """Returns the models with their layers, and the job with the VAE's tiles, where a plan wants them."""
    placed = components.placed(plan.stage_one.placement, plan.stage_two.placement)
    return placed, replace(job, vae_plans=plan.vae_plans.tiles, vae_waits=plan.vae_waits)


def _go_on(components: Components, job: ClipJob, state: RunState, writer: VideoWriter, watcher: Watcher) -> None:
    """Makes what the folder of the run does not have yet."""
    blocks, stride = job.plan.num_blocks, components.vae_config.temporal_stride
    reference = state.load("condition", {"reference": _latents(components.vae_config, blocks, job.picture)})
    motion = None
    if reference is None:
        low = _latents(components.stage_one_vae_config, blocks, job.low_picture)
        motion = state.load("motion", {"motion": low})
    condition = make_condition(
        components,
        job,
        watcher,
        motion=None if motion is None else motion["motion"],
        reference=None if reference is None else reference["reference"],
        on_motion=lambda latents: state.save("motion", {"motion": latents}),
    )
    if reference is None:
        state.save("condition", {"reference": condition.reference})
    ends, size = piece_ends(job.plan, stride), condition.reference.shape[3:]
    done = state.finished_segments((1, components.vae_config.z_dim, len(window.noisy), *size) for window in job.plan)
    # Pieces after the first segment that is missing are made again.
    writer.keep(min(writer.num_pieces, len(done) + 1))
    while state.damaged:
        print(state.damaged.pop(0))
    if done and writer.num_pieces == len(ends):
        return
    if done:
        print(f"{len(done)} of {len(job.plan)} segments are there already, and {writer.num_frames} frames")
    encoded, count = writer.num_frames, 0
    for part in make_frames(components, job, condition, watcher, done=done, on_segment=state.save_segment):
        count += len(part)
        if count > encoded:
            with watcher.stage("file"):
                writer.write(part)
                if count in ends:
                    writer.end_piece()


def _latents(vae: VAEConfig, num_blocks: int, picture: Tensor) -> tuple[int, ...]:
    """Returns the shape of the latents of a clip that is as large as a picture ``[1, 3, 1, H, W]``."""
    return (1, vae.z_dim, num_blocks, *(n // vae.spatial_stride for n in picture.shape[3:]))


def _explain(error: BaseException, memory: str, plan: MemoryPlan, stage: str, device: torch.device) -> _Shortage:
    """Returns the lack of memory with a message on what held it, by the allocator and by the plan."""
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lines = [f"out of memory in {stage} ({what})"]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        lines.append(
            f"  {format_bytes(torch.cuda.memory_allocated(device))} are allocated,"
            f" {format_bytes(torch.cuda.memory_reserved(device))} reserved; {format_bytes(free)} of"
            f" {format_bytes(total)} are free on the card"
        )
    phase = plan.phase(stage) if stage in {phase.name for phase in plan.phases} else plan.limiting
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in phase.held.items() if size)
    lines.append(f"  predicted for {phase.name}: {format_bytes(phase.device)} ({held})")
    if memory == "host":
        lines.append(f"  predicted of the machine's memory: {format_bytes(phase.host)}")
    return _Shortage(memory, phase, "\n".join(lines))
