"""Replacement of parts of a host's modules, which can be undone: all is planned first, then applied.

A :class:`Recipe` says what one kind of host module must look like and what replaces it. :func:`plan_patches` looks for
everything that recipes know and raises :class:`HostChanged` before anything is touched if one of them no longer fits.
Hooks of the host (offloading, caching) wrap a module's ``forward``; a replacement goes beneath them, where the module's
own ``forward`` stood, so hooks may come before or after it and may go again.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.dispatch import pick_backend
from ..common.target import device_obstacle
from .probing import disproofs
from .recipe import PATCH, HostChanged, Patch, Recipe, check, forward_slots, hook_kinds, own_forward
from .sdpa import AttentionCalls


@dataclass(frozen=True)
class Line:
    """One line of a report: where, what kind of module, how many, and what replaced it or why nothing did."""

    component: str
    host: str
    count: int
    text: str


@dataclass
class Report:
    """An account of what was replaced, and of what was not and why; printed, it is a table.

    Printed again after a run, it also counts the calls: served by our operators, handed back to the host and why.
    Modules of which no call was counted are named: they were not called, compiled, or parts of a layer that was served.

    Attributes:
        title: the first line.
        dry_run: whether nothing was replaced; ``replaced`` is then what would be.
        replaced: the kinds of modules that were replaced, by what.
        left: the kinds of modules that were not, with the reason.
        planned: the models by name, with what is replaced in each; None for one whose host moves it as it runs.
        calls: the counts of attention calls by what served them, where a host's attention function is replaced.
    """

    title: str
    dry_run: bool = False
    replaced: list[Line] = field(default_factory=list)
    left: list[Line] = field(default_factory=list)
    planned: list[tuple[str, nn.Module | None, list[Patch]]] = field(default_factory=list, repr=False)
    calls: AttentionCalls | None = None

    def restore(self) -> Report:
        """Puts the host's own code back in all models of this report.

        Returns:
            A report whose ``left`` names what somebody else has replaced in the meantime, and which is therefore left.
        """
        return restore_module(*(root for _, root, _ in self.planned if root is not None and not self.dry_run))

    def obstacles(self) -> Iterator[tuple[str, Line]]:
        """Yields rows that say where no kernel runs, by where the models' weights are now.

        Of a model with offloading hooks nothing is known: they bring its weights elsewhere.
        """
        for component, root, patches in self.planned:
            if root is None or not patches or any(hook_kinds(module) for module in root.modules()):
                continue
            devices = sorted({p.device for p in root.parameters() if p.device.type != "meta"}, key=str)
            reasons = [no_kernel_on(device) for device in devices]
            if devices and all(reasons):
                text = f"weights are on {', '.join(map(str, devices))}: {reasons[0]}; PyTorch computes"
                text += ", no faster than the host and slower on small inputs"
                yield "no kernel", Line(component, type(root).__name__, 0, text)

    def outcomes(self) -> Iterator[tuple[str, Line]]:
        """Yields rows that say what has become of the calls of each kind of module until now."""
        for component, _, patches in self.planned:
            for host in dict.fromkeys(patch.recipe.host for patch in patches):
                kind = [patch for patch in patches if patch.recipe.host == host]
                taken = "called" if kind[0].recipe.served_apart else "served"
                for reason, n in sum((patch.calls for patch in kind), Counter()).most_common():
                    calls = f"{n} call{'s' * (n > 1)}"
                    verb, text = (taken, calls) if reason is None else ("handed back", f"{calls}: {reason}")
                    yield verb, _line(component, host, text, [p.name for p in kind if reason in p.calls])
                if idle := [patch.name for patch in kind if not patch.calls]:
                    text = ", ".join(name.removeprefix(f"{component}.") for name in idle[:4])
                    text += f" and {len(idle) - 4} more" * (len(idle) > 4)
                    yield "not counted", _line(component, host, text, idle)

    def __str__(self) -> str:
        rows = [("would replace" if self.dry_run else "replaced", line) for line in self.replaced]
        rows += [("left", line) for line in self.left]
        rows += self.obstacles()
        outcomes = [] if self.dry_run else list(self.outcomes())
        called = any(verb != "not counted" for verb, _ in outcomes)
        lines = [self.title, *(table(rows + outcomes * called) or ["  nothing here is known"])]
        if outcomes and not called:
            lines.append("  no call so far; after a run this report says which were served")
        if self.calls is not None and (self.calls.served or self.calls.not_served):
            lines += (f"  {line}" for line in str(self.calls).splitlines())
        return "\n".join(lines)


def no_kernel_on(device: torch.device) -> str | None:
    """Returns why no kernel runs on ``device``, or None if kernels do."""
    backend, reason = pick_backend("auto", device_obstacle(device))
    return reason if backend == "torch" else None


def table(rows: Sequence[tuple[str, Line]]) -> list[str]:
    """Returns rows of a report in columns."""
    cells = [(verb, f"{x.count} x {x.host}" if x.count else x.host, x.component, x.text) for verb, x in rows]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(3)]
    return ["  ".join(["", *(part.ljust(w) for part, w in zip(cell, widths, strict=False)), cell[3]]) for cell in cells]


def plan_patches(
    component: str,
    root: nn.Module,
    recipes: Sequence[Recipe],
    wanted: Mapping[str, bool],
    earlier: Mapping[nn.Module, str] | None = None,
) -> tuple[list[Patch], list[Line], list[Line]]:
    """Plans the replacement of everything in ``root`` that recipes know; only looks, with arguments as elsewhere here.

    ``component`` names it in the report, and ``earlier`` has the modules that other models have too, which are left,
    with the model's name. Returned are the patches, the lines of what they replace, and those of what is left.

    Raises:
        HostChanged: a module of the host's package lacks an attribute, or its ``forward`` takes other parameters.
    """
    by_host = {recipe.host: recipe for recipe in recipes}
    fitting: list[tuple[str, nn.Module, Recipe]] = []
    left: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    replaced: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name, module in root.named_modules():
        path = f"{component}.{name}" if name else component
        processor = getattr(module, "processor", None)
        kind = type(module if processor is None else processor)
        recipe = by_host.get(kind.__name__)
        if recipe is None and processor is None:
            if any(base.__name__ in by_host for base in kind.__mro__):
                left[kind.__name__, "not known"].append(path)
            continue
        if earlier is not None and module in earlier:
            reason = f"the same modules as in {earlier[module]}"
        elif recipe is None:
            reason = "no replacement for this attention processor"
        elif not wanted[recipe.feature]:
            reason = f"{recipe.feature}=False"
        else:
            reason = _unfit(path, module, recipe)
        if reason is None:
            fitting.append((path, module, recipe))
        else:
            left[kind.__name__, reason].append(path)
    unproved = disproofs((m, r.counted_forward, r.probe) for _, m, r in fitting if r.probe)
    patches = []
    for path, module, recipe in fitting:
        if module in unproved:
            left[recipe.host, unproved[module]].append(path)
        else:
            replaced[recipe.host, recipe.by].append(path)
            patches.append(Patch(path, module, recipe, parts=tuple(map(type, module.modules()))))
    lines = ([_line(component, *key, names) for key, names in group.items()] for group in (replaced, left))
    return patches, *lines


def _line(component: str, host: str, text: str, names: Sequence[str]) -> Line:
    """Returns one line for all modules of a kind that were treated alike; a single one keeps its full name."""
    return Line(names[0] if len(names) == 1 else component, host, len(names), text)


def models_in(given: Any, argument: str) -> dict[str, nn.Module]:
    """Returns ``given`` if it is a module, else the modules that it has as components or attributes, by name.

    What is no module but has one as its ``model`` stands for that, and what ``torch.compile`` returns for what it
    wraps.

    Raises:
        TypeError: there is none; the message names the ``argument``.
    """
    parts = getattr(given, "components", None)
    parts = parts if isinstance(parts, dict) else getattr(given, "__dict__", {})
    if isinstance(given, nn.Module):
        parts = {type(getattr(given, "_orig_mod", given)).__name__: given}
    found = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            found[name] = getattr(part, "_orig_mod", part)
        elif isinstance(inner := getattr(part, "model", None), nn.Module):
            found[f"{name}.model"] = inner
    if not found:
        got = type(given).__name__
        raise TypeError(f"{argument}: expected a torch module, or an object that holds some, got {got}")
    return found


def patch_models(
    report: Report,
    models: Mapping[str, nn.Module],
    recipes: Sequence[Recipe],
    wanted: Mapping[str, bool],
) -> None:
    """Replaces everything known in several models, or nothing in any of them; fills the report and prints it.

    With the report's ``dry_run`` nothing is replaced. Otherwise a model that is patched already is restored first, so
    that its own code is seen; if this call fails, it stays restored. ``wanted`` says which features were asked for.

    Raises:
        HostChanged: from :func:`plan_patches`, before anything is touched.
    """
    owners: dict[nn.Module, str] = {}
    for name, root in models.items():
        if not report.dry_run:
            restore_module(root)
        patches, replaced, left = plan_patches(name, root, recipes, wanted, owners)
        owners |= {module: owners.get(module, name) for module in root.modules()}
        report.planned.append((name, root, patches))
        report.replaced += replaced
        report.left += left or ([] if replaced else [Line(name, type(root).__name__, 0, "not known")])
    try:
        for patch in (patch for _, _, patches in report.planned for patch in patches if not report.dry_run):
            patch.apply()
    except BaseException:
        report.restore()
        raise
    print(report)


def restore(model: Any) -> Report:
    """Undoes an ``accelerate``: afterwards a model computes with the host's own code, bit for bit as before.

    Args:
        model: the pipeline or model that was accelerated, or a part of it that was accelerated by itself.

    Returns:
        A report whose ``left`` names what somebody else has replaced in the meantime, and which is therefore left.

    Raises:
        TypeError: there is no torch module in ``model``.
    """
    return restore_module(*models_in(model, "model").values(), title=f"restored {type(model).__name__}")


def restore_module(*roots: nn.Module, title: str = "restored") -> Report:
    """Undoes the patches in ``roots`` and in modules within them.

    The report returned names what is not where it was put: others have replaced it, or a chain of hooks hides it. That
    is remembered, so that it can be tried again.
    """
    report, text = Report(title), "replaced or wrapped by others since; left as it is"
    for module in (module for root in roots for module in root.modules()):
        patch = module.__dict__.get(PATCH)
        if patch is not None and not patch.undo():
            report.left.append(Line(patch.name, patch.recipe.host, 1, text))
    return report


def _unfit(path: str, module: nn.Module, recipe: Recipe) -> str | None:
    """Returns why a module of a known kind is left, or None.

    Raises:
        HostChanged: the module is the host's, and not what its replacement was written for.
    """
    sources: list[Any] = [type(module), type(module).forward]
    if recipe.processor:
        sources += type(module.processor), type(module.processor).__call__
    for where in (inspect.unwrap(source).__module__ for source in sources):
        if recipe.package not in (None, where.split(".")[0]):
            return f"not the code of {recipe.package}: it comes from {where}"
    unlike = recipe.unlike(module)
    if recipe.package is not None:
        version = f"{recipe.package} {importlib.import_module(recipe.package).__version__}"
        text = f"{version} is not what the replacement of {recipe.host} was written for: {path}"
        check(text, module, *recipe.needs)
        if unlike is not None:
            raise HostChanged(f"{text} has {unlike}; nothing was changed")
    reason = recipe.fits(module) or unlike
    # Something else is in the place of the class's own forward, which cannot be entered.
    if reason is None and own_forward(module) is None and any(forward_slots(module)):
        return "its forward has been replaced already"
    return reason
