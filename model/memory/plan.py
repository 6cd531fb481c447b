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
from dataclasses import replace

import torch

from model.errors import InputError
from model.machine.measure import format_bytes, format_enough
from model.memory.dit_bytes import StageChoice, passes_of
from model.memory.estimate import FILE_RATE, estimate
from model.memory.report import MemoryPlan, Phase, PipelinePlans
from model.memory.request import HOST_USABLE, USABLE, MemoryRequest
from model.memory.search import PROCESS_BYTES, TEXT_WORK_BYTES, Choices, Search

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
    timer = threading.Timer(PATIENCE, print, (SLOW,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        plan = find_plan(request)
        if plan is None:
            raise InputError(_refusal(request))
        return plan
    finally:
        timer.cancel()


def find_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Plans as :func:`plan_memory`; returns None where no plan fits, without looking for one that would."""
    search = Search(request)
    return _plan(search, search.best(math.inf if request.usable is None else request.usable), request.usable)


def smallest_plan(request: MemoryRequest) -> MemoryPlan | None:
    """Returns the plan that takes least in every phase, on any card, and that the host memory allows, or None."""
    search = Search(replace(request, vram=None))
    return _plan(search, search.least(), None)


def _plan(search: Search, choices: Choices | None, limit: int | None) -> MemoryPlan | None:
    """Returns the plan of choices within ``limit`` bytes on the device; None for no choices."""
    if choices is None:
        return None
    condition, one, reference, two, decode = choices
    request, vaes = search.request, PipelinePlans(condition, reference.motion, reference.encode, decode)
    text = limit is None or request.text_encoder_bytes + TEXT_WORK_BYTES <= limit
    stages = {"Stage I": one, "Stage II": two}
    copied = {
        name: stage.placed.copied * sum(n for n, *_ in passes_of(request, name == "Stage I"))
        for name, stage in stages.items()
    }
    beside = {"other weights": search.vae_bytes() - condition.peak.weights, "clip": search.condition_clip}
    clip, clip_host = {"clip": search.clip_bytes(decode.plan.park)}, two.placed.host + decode.host
    dit = {f"DiT: {name}": size for name, size in two.held.items()}
    phases = [
        Phase("condition", condition.held | beside, condition.host, condition.copied),
        Phase("Stage I", one.held, one.placed.host + search.vae_bytes(), copied["Stage I"]),
        Phase("reference", reference.held, reference.host, reference.motion.copied + reference.encode.copied),
        Phase("Stage II", two.held | decode.idle | clip, clip_host, copied["Stage II"]),
        Phase("decode", dit | decode.held | clip, clip_host, decode.copied),
    ]
    seconds = estimate(request, stages, vaes, {phase.name: phase.copied for phase in phases})
    if request.text_encoder_bytes:
        held = {"text encoder": request.text_encoder_bytes, "its activations": TEXT_WORK_BYTES}
        where = "the device" if text else "the CPU, since the device has too little for it"
        phases.insert(0, Phase("text", held if text else {}, request.text_encoder_bytes, 0, f"runs on {where}"))
    with_process = tuple(replace(phase, host=PROCESS_BYTES + phase.host) for phase in phases)
    notes = tuple(_notes(request, stages, vaes, text))
    return MemoryPlan(request, *stages.values(), vaes, text, with_process, seconds, notes)


def _notes(request: MemoryRequest, stages: Mapping[str, StageChoice], vaes: PipelinePlans, text: bool) -> Iterator[str]:
    for name, choice in stages.items():
        if choice.changed:
            yield f"{name}: float8, since its weights fit the host memory in no form that keeps numbers as they are"
    if vaes.encode_dtype != torch.float32:
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
        least = max(used.peak.total for used in smallest_plan(replace(free, vae_limit=None)).vae_plans)
        told = f"vae-memory: {format_bytes(request.vae_limit)} are too little for any tiles"
        return f"{told}; those of the smallest plan take up to {format_bytes(least)}"
    # More host memory helps where a plan would then fit the card; else a larger card has to.
    enough = None if request.ram is None else find_plan(free)
    if enough is not None:
        low, ram = request.ram or 0, math.ceil((enough.host_peak + 1) / HOST_USABLE)
        while ram - low > RAM_STEP:
            middle = (low + ram) // 2
            found = find_plan(replace(request, ram=middle))
            low, ram, enough = (middle, ram, enough) if found is None else (low, middle, found)
        return _too_little("ram", enough, request)
    smallest = smallest_plan(request) or smallest_plan(free)
    return _too_little("vram", smallest, request)


def _too_little(name: str, smallest: MemoryPlan, request: MemoryRequest) -> str:
    given, share, needed = request.ram, HOST_USABLE, smallest.host_peak
    if card := name == "vram":
        given, share, needed = request.vram, USABLE, smallest.peak
    helps = ["a smaller --size", "fewer --frames"]
    if request.mode == "end_to_end":
        helps.insert(0, "--mode bidirectional")
    if not card and not request.from_files:
        helps.append("--weights, whose layers can be read from files in every pass")
    if not card and request.quantize in ("none", "file"):
        helps.append("--quantize auto or float8")
    where = smallest.limiting if card else max(smallest.phases, key=lambda phase: phase.host)
    if where.name == "text":
        helps = ["--text-embeddings in place of a text encoder (for model.plan: --no-text-encoder)"]
    return (
        f"{name}: {format_bytes(given or 0)} are too little, since {share:.0%} of it are planned with and the smallest"
        f" plan takes {format_bytes(needed)} in {where.name}; {format_enough(needed / share)} would do."
        f" What helps: {', '.join(helps)}. The smallest plan:\n{smallest}"
    )
