"""The groups of operators to which a layer's time and traffic go."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

#: The groups in the order of tables. Plain "attention" is attention whose kind no label tells.
GROUPS = ("self-attention", "cross-attention", "attention", "linear", "fused norms and rotations", "other")
_LINEAR = ("addmm", "mm", "bmm", "baddbmm", "_addmm_activation", "linear", "matmul")
_LABEL = "layer part: "


def group_of(names: Sequence[str]) -> str:
    """Returns the group of the operator ``names[0]`` (``aten::addmm.out``), called by the others, innermost first."""
    bare = [name.split("::")[-1].split(".")[0] for name in names]
    if any("attention" in name or "scaled_dot_product" in name for name in bare if not name.startswith(_LABEL)):
        label = next((name.removeprefix(_LABEL) for name in names if name.startswith(_LABEL)), "")
        return f"{label}-attention" if label else "attention"
    if any(name.startswith("swifti2v::") for name in names):
        return "fused norms and rotations"
    return "linear" if bare[0] in _LINEAR else "other"


def split_seconds(
    step: Callable[[], Any], attentions: Mapping[str, tuple[Any, str]], device: torch.device
) -> dict[str, float]:
    """Returns the seconds that the device is busy in each group during one call of ``step``, by the profiler.

    Every kernel belongs to the operator that launched it. On the CPU it is the operators' own time.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    run = profile(activities=activities)
    with ExitStack() as stack:
        for label, (owner, name) in attentions.items():
            marked = record_function(_LABEL + label)(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, marked))
        with _quiet_stderr():
            run.start()
        step()
        if cuda:
            torch.cuda.synchronize()
        with _quiet_stderr():
            run.stop()
    seconds: dict[str, float] = defaultdict(float)
    for event in run.events():
        # Labels have spans on the device too, over kernels that are counted by themselves.
        if event.name.startswith(_LABEL) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        time = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        if time:
            seconds[group_of(list(_ancestry(event)))] += time / 1e6
    return {group: seconds[group] for group in GROUPS if group in seconds}


def three_parts(groups: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of ``attention`` of all kinds, ``linear`` and ``other`` among those of groups."""
    attention, linear = sum(s for group, s in groups.items() if "attention" in group), groups.get("linear", 0.0)
    return {"attention": attention, "linear": linear, "other": sum(groups.values()) - attention - linear}


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silences the standard error while the block runs: torch 2.13's profiler announces its start and its end there."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def _ancestry(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
