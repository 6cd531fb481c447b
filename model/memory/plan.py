"""The memory plan of a clip, so that it fits a card: which layers of the DiTs stay on the device and which come from
host memory or from files in every pass, in what form; the tiles of the VAE; and what that costs.

A clip is made in phases, one after the other. In each the device holds only this:

    text       the text encoder, if it fits alone; else it runs on the CPU
    condition  the VAEs, encoding the picture at Stage I's size
    Stage I    its DiT (of two experts one after the other); the VAEs wait in host memory
    reference  the VAEs, decoding the motion and encoding the reference
    Stage II   its DiT, and the decoder with its state
    decode     the same, while frames are decoded

Every phase that has a choice has candidates with predicted seconds and bytes, which come from shapes alone. The fastest
of those that fit is taken; of equals the one with most layers on the device, then with the fewest tiles. The order does
not depend on the limit, so that with a higher one a plan's peak is never lower, nor is it slower. The one exception is
``quantize="auto"``: with a higher limit it may take weights as they are, which did not fit before, instead of faster
ones in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from model.errors import InputError
from model.machine.measure import format_bytes, format_enough
from model.memory.report import MemoryPlan, Phase, StagePlan
from model.memory.request import HOST_USABLE, MemoryRequest
from model.memory.search import PROCESS_BYTES, TEXT_WORK_BYTES, ReferenceChoice, Search, vae_held, vae_idle
from model.memory.stage_choice import StageChoice, StageChoices
from model.memory.stream_time import FILE_RATE
from model.memory.vae_choice import VAEUse
from model.memory.vae_places import USABLE, PipelinePlans


def plan_memory(request: MemoryRequest) -> MemoryPlan:
    """Plans the fastest way that fits.

    ``quantize="auto"`` never changes numbers: layer matrices stay in 8 bits where the checkpoint has them so
    (``file``), else none are quantised. Only where no such plan fits the host memory, and there is no checkpoint that
    layers could be read from in every pass, it is ``float8``, and a note of the plan says so. With 8-bit matmuls it is
    ``float8``, or ``int8`` on a card without float8 matmuls. The reference is encoded in float32, unless only
    bfloat16 fits.

    Raises:
        InputError: no plan fits. The message says what limits, what the smallest plan is, and what would help.
    """
    plan = find_plan(request)
    if plan is None:
        raise InputError(_refusal(request))
    return plan


def find_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Plans as :func:`plan_memory`; returns None where no plan fits, without looking for one that would."""
    return _best(Search(request), request.usable)


def smallest_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Returns the plan with the lowest peak on the device that the host memory allows, whatever the card has.

    Each of its phases is as fast as that peak lets it be. None: the host memory allows no plan.
    """
    search = Search(replace(request, vram=None))
    least = search.least_peak()
    return None if least is None else _best(search, least)


def _best(search: Search, limit: int | None) -> MemoryPlan | None:
    """Returns the fastest plan within ``limit`` bytes on the device, or None."""
    room = math.inf if limit is None else limit
    of = search.request.room
    condition, one = search.best_condition(of(room, "condition")), search.best_motion(of(room, "Stage I"))
    reference, clip = search.best_reference(of(room, "reference")), search.best_clip(of(room, "Stage II", "decode"))
    if condition is None or one is None or reference is None or clip is None or search.text_host > search.host:
        return None
    text = search.text_fits(room)
    beside = vae_idle("decoder", clip.decode) | {"clip": clip.clip}
    vaes = (condition, reference.motion, reference.encode, clip.decode)
    return MemoryPlan(
        search.request,
        _stage(search.one, one),
        _stage(search.two, clip.stage),
        PipelinePlans(*(replace(use.planned, limit=limit) for use in vaes)),
        text,
        (
            *_text_phase(search, text),
            _vae_phase("condition", search.condition_held(condition), condition.host, condition.seconds, condition),
            _stage_phase("Stage I", one, {}, search.vae_bytes()),
            _vae_phase(
                "reference",
                reference.held,
                reference.host,
                reference.motion.seconds + reference.encode.seconds,
                reference.encode,
            ),
            _stage_phase("Stage II", clip.stage, beside, clip.decode.host),
            _vae_phase(
                "decode",
                {f"DiT: {name}": size for name, size in clip.stage.held.items()}
                | vae_held("decoder", clip.decode)
                | {"clip": clip.clip},
                clip.stage.placed.host + clip.decode.host,
                clip.decode.seconds,
                clip.decode,
            ),
        ),
        tuple(_notes(search, one, reference, clip.stage, text)),
    )


def _stage(choices: StageChoices, choice: StageChoice) -> StagePlan:
    return StagePlan(choices.config, choice.placement, choice.placed, choice.time)


def _text_phase(search: Search, on_device: bool) -> Iterator[Phase]:
    size = search.request.text_encoder_bytes
    if size:
        held = {"text encoder": size, "its activations": TEXT_WORK_BYTES} if on_device else {}
        where = "the device" if on_device else "the CPU, since the device has too little for it"
        yield Phase("text", held, PROCESS_BYTES + search.text_host, None, f"runs on {where}")


def _vae_phase(name: str, held: Mapping[str, int], host: int, seconds: float, use: VAEUse) -> Phase:
    return Phase(name, held, PROCESS_BYTES + host, seconds, f"{use.limit}; {_most(held)}")


def _stage_phase(name: str, choice: StageChoice, beside: Mapping[str, int], host: int) -> Phase:
    held = choice.held | dict(beside)
    said = f"{choice.time.step.limit}; {_most(held)}"
    return Phase(name, held, PROCESS_BYTES + choice.placed.host + host, choice.time.total, said)


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
        yield "8-bit matmuls are assumed to reach the share of their peak that 16-bit ones reach"
    if request.text_encoder_bytes and not text:
        yield "seconds of the text encoder on the CPU are not predicted"


def _refusal(request: MemoryRequest) -> str:
    """Returns why no plan fits: what limits, the smallest plan, and what helps."""
    free = replace(request, ram=None)
    if request.vae_limit is not None and smallest_plan(free) is None:
        plans = smallest_plan(replace(free, vae_limit=None))
        shown = "" if plans is None else f"; those of the smallest plan take more: {plans.vae_plans}"
        return f"vae-memory: {format_bytes(request.vae_limit or 0)} are too little for any tiles{shown}"
    # More host memory helps where a plan would then fit the card; else a larger card has to.
    room = math.inf if request.usable is None else request.usable
    least = None if request.ram is None else Search(free).least_host(room)
    if least is not None:
        ram = math.ceil(least / HOST_USABLE)
        while int(HOST_USABLE * ram) < least:
            ram += 1
        smallest = _best(Search(replace(request, ram=ram)), request.usable)
        if smallest is not None:
            return _too_little(request, "ram", request.ram, HOST_USABLE, smallest.host_peak, smallest)
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
