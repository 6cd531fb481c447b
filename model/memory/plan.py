"""The memory plan of a clip, so that it fits a card: which layers of the DiTs stay on the device and which come from
host memory or from files in every pass, in what form; the tiles of the VAE; and what that costs.

A clip is made in phases, one after the other. In each the device holds only this:

    text       the text encoder, if it fits alone; else it runs on the CPU
    condition  the VAEs, encoding the picture at Stage I's size
    Stage I    its DiT (of two experts one after the other); the VAEs wait in host memory
    reference  the VAEs, decoding the motion and encoding the reference
    Stage II   its DiT, and the decoder with its state
    decode     the same, while frames are decoded

Every phase that has a choice has candidates, whose bytes come from shapes alone. The first that fits is taken, in this
order: the preferred form of weights, nothing parked in host memory, the fewest tiles, the fewest streamed layers. The
order does not depend on the limit, so that with a higher one a plan's peak is never lower. Where the least candidate
does not fit, no other is looked at.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from model.errors import InputError
from model.machine.measure import format_bytes, format_enough
from model.memory.dit_bytes import passes_of
from model.memory.estimate import FILE_RATE, estimate
from model.memory.report import MemoryPlan, Phase, StagePlan
from model.memory.request import HOST_USABLE, MemoryRequest
from model.memory.search import PROCESS_BYTES, TEXT_WORK_BYTES, Choices, ReferenceChoice, Search, vae_held, vae_idle
from model.memory.stage_choice import StageChoice
from model.memory.vae_places import USABLE, PipelinePlans

#: The bytes to which the least host memory that would do is looked for.
RAM_STEP = 10_000_000
#: The seconds after which planning says what it does, and what it says.
PATIENCE = 2.0
SLOW = "planning: the VAE is run without memory, once for every tiling that may fit ..."


def plan_memory(request: MemoryRequest) -> MemoryPlan:
    """Plans the first way that fits, in the order that the top of this file gives.

    ``quantize="auto"`` never changes numbers: layer matrices stay in 8 bits where the checkpoint has them so
    (``file``), else none are quantised. Only where no such plan fits the host memory, and there is no checkpoint that
    layers could be read from in every pass, it is ``float8``, and a note of the plan says so. With 8-bit matmuls it is
    ``float8``, or ``int8`` on a card without float8 matmuls. The reference is encoded in float32, unless only
    bfloat16 fits.

    Raises:
        InputError: no plan fits. The message says what limits, what the smallest plan is, and what would help.
    """
    with _told():
        plan = find_plan(request)
        if plan is None:
            raise InputError(_refusal(request))
    return plan


@contextmanager
def _told() -> Iterator[None]:
    """Says on stderr what the body does, if that takes longer than :data:`PATIENCE`."""
    timer = threading.Timer(PATIENCE, print, (SLOW,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def find_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Plans as :func:`plan_memory`; returns None where no plan fits, without looking for one that would."""
    search = Search(request)
    return _plan(search, search.best(math.inf if request.usable is None else request.usable), request.usable)


def smallest_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Returns the plan that takes least of the device in every phase and that the host memory allows, or None.

    What the card has does not matter.
    """
    search = Search(replace(request, vram=None))
    return _plan(search, search.least(), None)


def _plan(search: Search, choices: Choices | None, limit: int | None) -> MemoryPlan | None:
    """Returns the plan of choices within ``limit`` bytes on the device; None for no choices."""
    if choices is None:
        return None
    condition, one, reference, clip = choices
    request, vaes = search.request, (condition, reference.motion, reference.encode, clip.decode)
    text = search.text_fits(math.inf if limit is None else limit)
    dits = {"Stage I": one.placed, "Stage II": clip.stage.placed}
    beside = vae_idle("decoder", clip.decode) | {"clip": clip.clip}
    decode = {f"DiT: {name}": size for name, size in clip.stage.held.items()} | vae_held("decoder", clip.decode)
    copied = {
        name: placed.copied * sum(n for n, *_ in passes_of(request, name == "Stage I")) for name, placed in dits.items()
    }
    phases = (
        _phase("condition", search.condition_held(condition), condition.host, condition.copied),
        _phase("Stage I", one.held, one.placed.host + search.vae_bytes(), copied["Stage I"]),
        _phase("reference", reference.held, reference.host, reference.motion.copied + reference.encode.copied),
        _phase("Stage II", clip.stage.held | beside, clip.stage.placed.host + clip.decode.host, copied["Stage II"]),
        _phase("decode", decode | {"clip": clip.clip}, clip.stage.placed.host + clip.decode.host, clip.decode.copied),
    )
    configs = {"Stage I": search.one.config, "Stage II": search.two.config}
    return MemoryPlan(
        request,
        StagePlan(search.one.config, one.placement, one.placed),
        StagePlan(search.two.config, clip.stage.placement, clip.stage.placed),
        PipelinePlans(*(use.planned for use in vaes)),
        text,
        (*_text_phase(search, text), *phases),
        estimate(
            request,
            {name: (configs[name], placed) for name, placed in dits.items()},
            [use.planned for use in vaes],
            {phase.name: phase.copied for phase in phases},
        ),
        tuple(_notes(search, one, reference, clip.stage, text)),
    )


def _text_phase(search: Search, on_device: bool) -> Iterator[Phase]:
    size = search.request.text_encoder_bytes
    if size:
        held = {"text encoder": size, "its activations": TEXT_WORK_BYTES} if on_device else {}
        where = "the device" if on_device else "the CPU, since the device has too little for it"
        yield Phase("text", held, PROCESS_BYTES + search.text_host, 0, f"runs on {where}")


def _phase(name: str, held: Mapping[str, int], host: int, copied: int) -> Phase:
    return Phase(name, held, PROCESS_BYTES + host, copied, _most(held))


def _most(held: Mapping[str, int]) -> str:
    name = max(held, key=lambda name: held[name])
    return f"most memory: {name}, {format_bytes(held[name])}"


def _notes(search: Search, one: StageChoice, reference: ReferenceChoice, two: StageChoice, text: bool) -> Iterator[str]:
    request = search.request
    stages = {"Stage I": one, "Stage II": two}
    for name, choice in stages.items():
        if choice.rank:
            yield f"{name}: float8, since its weights fit the host memory in no form that keeps numbers as they are"
    if reference.encode.planned.request.dtype != torch.float32:
        yield "the reference is encoded in bfloat16, since float32 does not fit"
    if any(choice.placed.read for choice in stages.values()):
        yield f"files are assumed to be read at {FILE_RATE / 1e9:g} GB/s, and to hold the form that layers are kept in"
        yield "what the CPU does to layers of files in every pass (converting, quantising, LoRAs) is not predicted"
    if request.matmul == "8bit":
        yield "the estimated time does not know what 8-bit matmuls save"
    if request.text_encoder_bytes and not text:
        yield "seconds of the text encoder on the CPU are not predicted"


def _refusal(request: MemoryRequest) -> str:
    """Returns why no plan fits: what limits, the smallest plan, and what helps."""
    free = replace(request, ram=None)
    if request.vae_limit is not None and smallest_plan(free) is None:
        plans = smallest_plan(replace(free, vae_limit=None))
        least = 0 if plans is None else max(used.peak.total for used in vars(plans.vae_plans).values())
        shown = f"; those of the smallest plan take up to {format_bytes(least)}" if least else ""
        return f"vae-memory: {format_bytes(request.vae_limit or 0)} are too little for any tiles{shown}"
    # More host memory helps where a plan would then fit the card; else a larger card has to.
    enough = None if request.ram is None else find_plan(free)
    if enough is not None:
        low, ram = request.ram or 0, math.ceil((enough.host_peak + 1) / HOST_USABLE)
        while ram - low > RAM_STEP:
            middle = (low + ram) // 2
            found = find_plan(replace(request, ram=middle))
            low, ram, enough = (middle, ram, enough) if found is None else (low, middle, found)
        return _too_little(request, "ram", request.ram, HOST_USABLE, enough.host_peak, enough)
    smallest = smallest_plan(request) or smallest_plan(free)
    if smallest is None:
        raise AssertionError("without limits there is a plan")
    return _too_little(request, "vram", request.vram, USABLE, smallest.peak, smallest)


def _too_little(
    request: MemoryRequest, name: str, given: int | None, share: float, needed: int, smallest: MemoryPlan
) -> str:
    helps = ["a smaller --size", "fewer --frames"]
    if request.mode == "end_to_end":
        helps.insert(0, "--mode bidirectional")
    if name == "ram":
        if not request.from_files:
            helps.append("--weights, whose layers can be read from files in every pass")
        if request.quantize in ("none", "file"):
            helps.append("--quantize auto or float8")
    where = smallest.limiting if name == "vram" else max(smallest.phases, key=lambda phase: phase.host)
    if where.name == "text":
        helps = ["--text-embeddings in place of a text encoder (for model.plan: --no-text-encoder)"]
    return (
        f"{name}: {format_bytes(given or 0)} are too little, since {share:.0%} of it are planned with and the smallest"
        f" plan takes {format_bytes(needed)} in {where.name}; {format_enough(needed / share)} would do."
        f" What helps: {', '.join(helps)}. The smallest plan:\n{smallest}"
    )
