"""The launches that can be tuned, those of cases with a real size, and the configurations worth trying for each.

They are found through the operators' own cases and the ``SPACE`` of their kernels' configurations, so a new operator is
here as soon as it is written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from bench.operators.discover import all_cases
from bench.static.compile_only import compiled_for
from swifti2v_kernels.common.case import Case
from swifti2v_kernels.common.configs import seen_configs


@dataclass(frozen=True)
class Target:
    """One entry of the table to come: a kernel, a class of shapes, and the cases whose launches belong to it."""

    kernel: str
    capability: int
    key: dict[str, Any]
    heuristic: Any
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """The target's name, for people and as identity."""
        return f"{self.kernel} {json.dumps(self.key)[1:-1]}".replace('"', "")

    def candidates(self) -> list[dict[str, Any]]:
        """Returns fields to be forced, those that change little first; the heuristic is not among them."""
        space = dict(type(self.heuristic).SPACE)
        combined = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
        own = {name: getattr(self.heuristic, name) for name in space}
        others = [found for found in combined if found != own]
        return sorted(others, key=lambda found: sum(found[name] != own[name] for name in found))

    def config(self, forced: dict[str, Any]) -> Any:
        """Returns the whole configuration with these fields forced."""
        return replace(self.heuristic, **forced)


def targets(capability: int) -> list[Target]:
    """Returns all targets of a capability, those with the most work first."""
    found: dict[str, list[tuple[Any, Case]]] = {}
    for case in all_cases():
        if case.real is None or case.least_capability > capability:
            continue
        # Only a launch knows its class.
        with compiled_for(capability, compile=False), seen_configs() as seen:
            case.run(torch.device("cpu"))
        for kernel, _, key, heuristic in seen:
            # A case may launch a second kernel, which has cases of its own.
            if seen[0][0] == kernel:
                found.setdefault(json.dumps([kernel, key]), []).append((heuristic, case))
    results = []
    for name, pairs in found.items():
        kernel, key = json.loads(name)
        cases = tuple(dict.fromkeys(case for _, case in pairs))
        results.append(Target(kernel, capability, key, pairs[0][0], cases))
    return sorted(results, key=lambda target: -_work(target.cases))


def _work(cases: Sequence[Case]) -> float:
    """Returns about the seconds that cases take on a card of 600 TFLOP/s and 4 TB/s."""
    costs = [case.real.cost for case in cases if case.real is not None]
    return sum(max(cost.flops / 6e14, cost.bytes / 4e12) for cost in costs)


def shown(config: Any) -> str:
    """Formats a configuration in a few words."""
    return " ".join(f"{field.name}={getattr(config, field.name)}" for field in fields(config))
