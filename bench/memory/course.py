"""The course of memory, from allocations and frees: bytes over time, the peak, and what was alive then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.streaming import placed
from model.weights import load, scaled


class Event(NamedTuple):
    """An allocation of ``size`` bytes under ``key`` by ``label``, or a free, which is negative and has no label."""

    seconds: float
    key: int
    size: int
    label: str = ""


@dataclass
class Course:
    """The course of a run: its events in order, and when stages and segments began."""

    base: int = 0
    events: list[Event] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)

    @property
    def points(self) -> list[tuple[float, int]]:
        """The time of every event and the bytes alive after it."""
        live, points = self.base, [(0.0, self.base)]
        for event in self.events:
            live += event.size
            points.append((event.seconds, live))
        return points

    def peak(self) -> int:
        """Returns the most bytes that were alive at once."""
        return max(live for _, live in self.points)

    def peaks(self) -> dict[str, int]:
        """Returns the most bytes that were alive at once in each stage; the segments of Stage II count together."""
        found: dict[str, int] = {}
        live, marks, current = self.base, list(self.marks), ""
        for event in self.events:
            while marks and marks[0][0] <= event.seconds:
                current = marks.pop(0)[1].rstrip(" 0123456789")
                found[current] = max(found.get(current, 0), live)
            live += event.size
            if current:
                found[current] = max(found[current], live)
        return found

    def holders(self, most: int = 12) -> list[tuple[str, int, int]]:
        """Returns what was alive at the peak: (label, bytes, how many), the largest first, the rest as one entry."""
        alive: dict[int, Event] = {}
        live, top, best = self.base, self.base, {}
        before = kept = self.base
        for event in self.events:
            live += event.size
            if event.size >= 0:
                alive[event.key] = event
            elif alive.pop(event.key, None) is None:
                before += event.size
            if live > top:
                top, best, kept = live, dict(alive), before
        held: dict[str, list[int]] = {"before the run": [kept]} if kept else {}
        for event in best.values():
            held.setdefault(event.label, []).append(event.size)
        ranked = sorted(((label, sum(sizes), len(sizes)) for label, sizes in held.items()), key=lambda held: -held[1])
        if rest := ranked[most:]:
            ranked[most:] = [("everything else", sum(size for _, size, _ in rest), sum(count for *_, count in rest))]
        return ranked


def from_trace(trace: Sequence[dict[str, Any]]) -> list[Event]:
    """Returns the events of the CUDA allocator's history, ``torch.cuda.memory._snapshot()["device_traces"][i]``.

    It begins with the run; what was allocated before is freed without having been taken.
    """
    events: list[Event] = []
    for entry in trace:
        seconds = (entry["time_us"] - trace[0]["time_us"]) / 1e6
        if entry["action"] == "alloc":
            events.append(Event(seconds, entry["addr"], entry["size"], label_of(entry.get("frames") or ())))
        elif entry["action"] == "free_completed":
            events.append(Event(seconds, entry["addr"], -entry["size"]))
    return events


#: The files whose functions allocate weights.
LOADERS = tuple(f"/{module.__name__.replace('.', '/')}.py" for module in (load, scaled, placed))


def label_of(frames: Iterable[Any]) -> str:
    """Returns the innermost place in this project among the frames of a stack: ``model/vae/layers.py remember``."""
    for frame in frames:
        name, function = (frame["filename"], frame["name"]) if isinstance(frame, dict) else frame
        if name.endswith(LOADERS):
            return "weights"
        for room in ("/model/", "/swifti2v_kernels/"):
            if room in name:
                return f"{room.strip('/')}/{name.split(room)[-1]} {function}"
    return "elsewhere"
