"""A clip that is never lost: each result is on disk as soon as it is there, and a run goes on after the last one.

    inputs       the picture at both sizes, text and image embeddings
    motion       Stage I's latents
    condition    the reference that Stage II starts from
    segment-n    the blocks of segment n

A run that was killed, one that ran out of memory and is planned anew, and one that was never interrupted are the same
code: :func:`make_clip` looks at what there is and makes the rest. On the same device and software the film is the
same, byte for byte; the decoder runs through finished segments again, since its memory of them (17 GB at 2560x1408) is
not kept, and so does the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from model.errors import NoMemoryError
from model.io.media import VideoWriter
from model.machine.host import release
from model.machine.measure import format_bytes, full_memory
from model.memory.plan import find_plan
from model.memory.report import MemoryPlan, Phase
from model.memory.request import HOST_USABLE, MemoryRequest
from model.pipeline.clip import ClipJob, Watcher, make_condition, make_frames
from model.pipeline.components import Components
from model.resume.state import RunState

#: The most plans that a run tries when it runs out of memory, and the share of a peak that the next plan may take.
MOST_PLANS = 3
SHRINK = 0.85


def make_clip(
    components: Components, job: ClipJob, plan: MemoryPlan, state: RunState, writer: VideoWriter, watcher: Watcher
) -> None:
    """Makes what is not there yet, and writes the film. Where memory does not suffice it is planned anew with less.

    Args:
        components: the models.
        job: the clip that is wanted; layers and tiles are placed as the plans say.
        plan: the first plan of the memory.
        state: the folder of the run.
        writer: the film; it is entered.
        watcher: is told of each stage and step, and says which stage failed.

    Raises:
        NoMemoryError: memory did not suffice for the last plan either, or no smaller one exists. Everything that was
            made stays in the state.
    """
    for attempt in range(1, MOST_PLANS + 1):
        try:
            _go_on(components, as_planned(job, plan), state, writer, watcher)
            return
        except (RuntimeError, MemoryError) as error:
            memory = full_memory(error)
            if memory is None:
                raise
            phase, told = _explain(error, memory, plan, watcher.failed)
        # Only here, after the handler: the exception would keep alive what was on the device.
        release(job.text.device)
        if attempt == MOST_PLANS:
            raise NoMemoryError(f"{told}\n  and {MOST_PLANS} plans were tried")
        smaller = next((p for p in map(find_plan, with_less(plan, memory, phase)) if p is not None), None)
        if smaller is None:
            raise NoMemoryError(f"{told}\n  and there is no smaller plan (python -m model.plan shows the smallest)")
        plan = smaller
        print(f"{told}\nplanned anew, {attempt} of at most {MOST_PLANS - 1} times; it goes on:\n{plan}")


def with_less(plan: MemoryPlan, memory: str, phase: Phase) -> list[MemoryRequest]:
    """Returns requests whose plans take less of the memory, ``device`` or ``host``, that was too little in a phase.

    They are in the order to try them.
    """
    if memory == "host":
        return [replace(plan.request, ram=int(SHRINK * plan.host_peak / HOST_USABLE))]
    taken = [phase.device]
    if phase.name == "Stage II":
        # The plan chooses Stage II together with the decoder, which may be the one for which memory is too little.
        taken.append(plan.phase("decode").device)
    return [replace(plan.request, less={**plan.request.less, phase.name: int(SHRINK * size)}) for size in taken]


def as_planned(job: ClipJob, plan: MemoryPlan) -> ClipJob:
    """Returns the job with the DiTs' layers and the VAE's tiles where a plan wants them."""
    at = {"stage_one_at": plan.stage_one.placement, "stage_two_at": plan.stage_two.placement}
    return replace(job, vae_plans=plan.vae_plans.tiles, vae_waits=plan.vae_waits, **at)


def _go_on(components: Components, job: ClipJob, state: RunState, writer: VideoWriter, watcher: Watcher) -> None:
    """Makes what the folder of the run does not have yet."""
    reference = (state.load("condition") or {}).get("reference")
    motion = (state.load("motion") or {}).get("motion") if reference is None else None
    condition = make_condition(
        components,
        job,
        watcher,
        motion=motion,
        reference=reference,
        on_motion=lambda latents: state.save("motion", {"motion": latents}),
    )
    if reference is None:
        state.save("condition", {"reference": condition.reference})
    # How many frames the film has at the end of each piece: the anchor's, and then every segment's.
    stride = components.vae_config.temporal_stride
    ends = list(accumulate((stride * len(window.noisy) for window in job.plan), initial=1))
    done = state.finished_segments(len(job.plan))
    # A partial film of the finished segments stays until there is a longer one.
    writer.restart(shown=ends[len(done)])
    while state.damaged:
        print(state.damaged.pop(0))
    if done:
        print(f"{len(done)} of {len(job.plan)} segments are there already")
    for part in make_frames(components, job, condition, watcher, done=done, on_segment=state.save_segment):
        with watcher.stage("file"):
            writer.write(part)
            if writer.num_frames in ends:
                writer.end_piece()


def _explain(error: BaseException, memory: str, plan: MemoryPlan, stage: str) -> tuple[Phase, str]:
    """Returns the phase in which memory did not suffice, and a message on what holds it by the plan.

    The message of CUDA's allocator, which is the first line of its error, says what it holds and what is free.
    """
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    phase = plan.phase(stage) if stage in {phase.name for phase in plan.phases} else plan.limiting
    held = ", ".join(f"{name} {format_bytes(size)}" for name, size in phase.held.items() if size)
    told = f"out of memory in {stage} ({what})\n  predicted for {phase.name}: {format_bytes(phase.device)} ({held})"
    if memory == "host":
        told += f"\n  predicted of the machine's memory: {format_bytes(phase.host)}"
    return phase, told
