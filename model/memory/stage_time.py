"""Predicted seconds of a stage's DiT by where its layers are: every pass over them, with its copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model.memory.cost.gpus import GPU
from model.memory.cost.profiles import get_profile, seconds_by_kind
from model.memory.cost.work import Work
from model.memory.stream_time import PassTime, pass_time
from model.streaming.placement import LayerLayout, Placement

PROFILE = "swifti2v"


@dataclass(frozen=True)
class StageTime:
    """The seconds of all passes: the layers' work, copies, reads, and the part of these two that work does not hide.

    ``step`` is the longest pass.
    """

    compute: float
    copy: float
    read: float
    exposed: float
    step: PassTime

    @property
    def total(self) -> float:
        """The seconds of the stage."""
        return self.compute + self.exposed


def work_seconds(work: Work, gpu: GPU, itemsize: int, quantize: str = "none", matmul: str = "plain") -> float:
    """Returns the seconds of one pass with all weights on the device.

    8-bit linear layers are assumed to reach the share of their peak that those in 16 bits reach; a card without float8
    matmuls computes them in 16 bits.
    """
    spent = seconds_by_kind(work, gpu, get_profile(PROFILE), itemsize)
    if matmul == "8bit" and "linear" in spent:
        # int8 has the peak of float8 where there is one, and twice that of bf16 on older cards.
        eight = gpu.fp8 or (2 * gpu.bf16 if quantize == "int8" else gpu.bf16)
        spent["linear"] *= itemsize / 2 * gpu.bf16 / eight
    return sum(spent.values())


def unpack_seconds(layouts: Sequence[LayerLayout], gpu: GPU) -> float:
    """Returns the seconds to unpack all layers' 8-bit matrices once: read in 8 bits, written in the model's dtype."""
    moved = sum(e.nbytes + e.nbytes // e.dtype.itemsize for layout in layouts for e in layout.unpacked)
    return moved / (1e12 * gpu.bandwidth * get_profile(PROFILE).rates_for(gpu).bandwidth)


def stage_time(
    passes: Iterable[tuple[int, Work]],
    layouts: Sequence[LayerLayout],
    placement: Placement,
    gpu: GPU,
    itemsize: int,
) -> StageTime:
    """Predicts the seconds of all passes of a stage.

    Args:
        passes: how often, and the work of one.
        layouts: the layouts of all layers.
        placement: where the layers are, and their form.
        gpu: the card.
        itemsize: bytes of an element of the model's dtype.
    """
    counts: Counter[Work] = Counter()
    for count, work in passes:
        counts[work] += count
    homes, sizes = placement.homes(len(layouts)), [layout.nbytes for layout in layouts]
    unpacking = unpack_seconds(layouts, gpu)
    timed = [
        (
            count,
            pass_time(
                homes,
                sizes,
                work_seconds(work, gpu, itemsize, placement.quantize, placement.matmul) + unpacking,
                1e9 * gpu.host,
            ),
        )
        for work, count in counts.items()
    ]
    compute, copy, read, exposed = (
        sum(count * getattr(found, name) for count, found in timed) for name in ("compute", "copy", "read", "exposed")
    )
    return StageTime(compute, copy, read, exposed, max((found for _, found in timed), key=lambda p: p.compute))
