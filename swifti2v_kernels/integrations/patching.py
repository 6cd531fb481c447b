"""Replacement of parts of a host's modules, which can be undone: planned first, then all or nothing.

A :class:`Recipe` says what one kind of host module must look like and what replaces it. :func:`plan_patches` looks for
everything that recipes know and raises :class:`HostChanged` before anything is touched if one of them no longer fits.
Hooks of the host (offloading, caching) wrap a module's ``forward``; a replacement goes beneath them, where the module's
own ``forward`` stood, so hooks may come before or after it and may go again.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from .calls import COMPILED, AttentionCalls, any_traced
from .hooks import forward_slots, own_forward
from .obstacles import in_model
from .probing import disproofs, one_line
from .recipe import CALLS, HostChanged, Patch, Recipe

#: Attribute of a patched root module that holds what was done to it.
_RECORD = "_swifti2v_patches"


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
    Modules of which no call has finished are named.

    Attributes:
        title: the first line.
        dry_run: whether nothing was replaced; ``replaced`` is then what would be.
        replaced: the kinds of modules that were replaced, by what.
        left: the kinds of modules that were not, with the reason.
        roots: the models that were changed.
        planned: the models by name, with what is replaced in each; None for one whose host moves it as it runs.
        calls: the counts of attention calls by what served them, where a host's attention function is replaced.
    """

    title: str
    dry_run: bool = False
    replaced: list[Line] = field(default_factory=list)
    left: list[Line] = field(default_factory=list)
    roots: list[nn.Module] = field(default_factory=list, repr=False)
    planned: list[tuple[str, nn.Module | None, list[Patch]]] = field(default_factory=list, repr=False)
    calls: AttentionCalls | None = None

    def restore(self) -> Report:
        """Puts the host's own code back in all models of this report.

        Returns:
            A report whose ``left`` names what somebody else has replaced in the meantime, and which is therefore left.
        """
        return restore_module(*self.roots)

    def obstacles(self) -> Iterator[tuple[str, Line]]:
        """Yields rows that say where no kernel runs, by where the models are now."""
        for component, root, patches in self.planned:
            # Attention that is served apart is the host's function, which casts queries to 16 bits first.
            attentions = [(p.module, p.recipe.served_apart) for p in patches if p.recipe.feature == "attention"]
            for reason in in_model(root, attentions) if root is not None and patches else ():
                yield "no kernel", Line(component, type(root).__name__, 0, reason)

    def outcomes(self) -> Iterator[tuple[str, Line]]:
        """Yields rows that say what has become of the calls of each kind of module until now."""
        for component, _, patches in self.planned:
            served = [patch for patch in patches if None in patch.calls]
            for recipe in {patch.recipe.host: patch.recipe for patch in patches}.values():
                kind = [patch for patch in patches if patch.recipe.host == recipe.host]
                for reason, n in sum((patch.calls for patch in kind), Counter()).most_common():
                    some = [patch for patch in kind if reason in patch.calls]
                    calls = f"{n} call{'s' * (n > 1)}"
                    if reason is not None:
                        yield "handed back", _line(some, component, f"{calls}: {reason}")
                    else:
                        yield "called" if recipe.served_apart else "served", _line(some, component, calls)
                idle = [patch for patch in kind if not patch.calls]
                # A layer of a VAE computes with the weights of its parts and calls none of them.
                if parts := [patch for patch in idle if any(map(patch.is_in, served))]:
                    yield "served", _line(parts, component, "as parts of layers that were")
                    idle = [patch for patch in idle if patch not in parts]
                if idle:
                    names = [patch.name.removeprefix(f"{component}.") for patch in idle]
                    text = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                    if any_traced():
                        yield "not counted", _line(idle, component, f"{text}: no counted call; {COMPILED}")
                    else:
                        yield "never called", _line(idle, component, text)

    def __str__(self) -> str:
        rows = [("would replace" if self.dry_run else "replaced", line) for line in self.replaced]
        rows += [("left", line) for line in self.left]
        rows += self.obstacles()
        outcomes = [] if self.dry_run else list(self.outcomes())
        called = any(verb != "never called" for verb, _ in outcomes)
        lines = [self.title, *(table(rows + outcomes * called) or ["  nothing here is known"])]
        if outcomes and not called:
            lines.append("  no call so far; after a run this report says which were served")
        if self.calls is not None and self.calls.kinds:
            lines += (f"  {line}" for line in str(self.calls).splitlines())
        return "\n".join(lines)


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
    host_version: str,
    earlier: Mapping[nn.Module, str] | None = None,
) -> tuple[list[Patch], list[Line], list[Line]]:
    """Plans the replacement of everything in ``root`` that recipes know; only looks, with arguments as elsewhere here.

    ``component`` names it in the report, and ``earlier`` has the modules that other models have too, which are left,
    with the model's name. Returned are the patches, the lines of what they replace, and those of what is left.

    Raises:
        HostChanged: a module is of a known kind but lacks an attribute, or its ``forward`` takes other parameters.
    """
    by_host = {recipe.host: recipe for recipe in recipes}
    fitting: list[tuple[str, nn.Module, Recipe]] = []
    left: list[Line] = []
    for name, module in root.named_modules():
        path = f"{component}.{name}" if name else component
        owner = (earlier or {}).get(module)
        for kind in (type(x) for x in (module, getattr(module, "processor", None)) if x is not None):
            recipe = by_host.get(kind.__name__)
            if recipe is None and kind is type(module):
                reason = "not known" if any(base.__name__ in by_host for base in kind.__mro__) else ""
            elif owner is not None:
                reason = f"the same modules as in {owner}"
            elif recipe is None:
                ours = CALLS in module.__dict__
                reason = "accelerated already" if ours else "no replacement for this attention processor"
            elif not wanted[recipe.feature]:
                reason = f"{recipe.feature}=False"
            else:
                reason = _unfit(path, module, recipe, host_version)
            if reason is None:
                fitting.append((path, module, recipe))
            elif reason:
                left.append(Line(path, kind.__name__, 1, reason))
    unproved = disproofs((m, r.counted_forward, r.probe) for _, m, r in fitting if r.forward and r.probe)
    left += [Line(path, recipe.host, 1, unproved[m]) for path, m, recipe in fitting if m in unproved]
    patches = [_make_patch(path, module, recipe) for path, module, recipe in fitting if module not in unproved]
    return (
        patches,
        _grouped([Line(p.name, p.recipe.host, 1, p.recipe.by) for p in patches], component),
        _grouped(left, component),
    )


def apply_patches(*plans: tuple[nn.Module, Sequence[Patch]]) -> None:
    """Applies the patches of all roots, or none if one fails, and remembers them in their roots."""
    done: list[Patch] = []
    try:
        for patch in (patch for _, patches in plans for patch in patches):
            patch.apply()
            done.append(patch)
    except BaseException:
        for patch in reversed(done):
            patch.undo()
        raise
    for root, patches in plans:
        if patches:
            root.__dict__[_RECORD] = _Record(patches)


class _Record(list[Patch]):
    """The patches of a module: they go with a copy of it, not into a pickle, where their functions would be missing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Record:
        return _Record(copy.deepcopy(patch, memo) for patch in self)

    def __reduce__(self) -> Any:
        raise TypeError("an accelerated module cannot be pickled: restore() it first, or save its state_dict()")


def models_in(given: Any, parts: Mapping[str, Any], expected: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields ``given`` if it is a module, else those of its ``parts`` that are, by name.

    What ``torch.compile`` returns wraps a model, which is yielded.

    Raises:
        TypeError: ``given`` is no module and has no parts; ``expected`` begins the message.
    """
    if isinstance(given, nn.Module):
        parts = {type(getattr(given, "_orig_mod", given)).__name__: given}
    if not parts:
        raise TypeError(f"{expected}, got {type(given).__name__}")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            yield name, getattr(part, "_orig_mod", part)


def patch_models(
    report: Report,
    models: Iterable[tuple[str, nn.Module]],
    recipes: Sequence[Recipe],
    wanted: Mapping[str, bool],
    host_version: str,
    look: Callable[[str, nn.Module], list[Line]] = lambda name, root: [],
) -> None:
    """Replaces everything known in several models, or nothing in any of them, and fills the report.

    Args:
        report: the report to fill; with its ``dry_run`` nothing else is done.
        models: the models by name. One that is patched already is restored first, so that its own code is seen; if this
            call fails, it stays restored.
        recipes: the kinds of modules that are known.
        wanted: whether each feature was asked for.
        host_version: the host and its version, for the error.
        look: a host's own checks of a model, and what it names as left.

    Raises:
        HostChanged: from :func:`plan_patches` or ``look``, before anything is touched.
    """
    plans: list[tuple[nn.Module, list[Patch]]] = []
    names: dict[nn.Module, str] = {}
    owners: dict[nn.Module, str] = {}
    for name, root in models:
        if root in names:
            report.left.append(Line(name, type(root).__name__, 0, f"the same model as {names[root]}"))
            continue
        names[root] = name
        if is_patched(root):
            if report.dry_run:
                report.left.append(Line(name, type(root).__name__, 0, "accelerated already"))
                continue
            restore_module(root)
        patches, replaced, left = plan_patches(name, root, recipes, wanted, host_version, owners)
        owners |= {module: owners.get(module, name) for module in root.modules()}
        left += look(name, root)
        plans.append((root, patches))
        report.planned.append((name, root, patches))
        report.replaced += replaced
        report.left += left or ([] if replaced else [Line(name, type(root).__name__, 0, "not known")])
    if not report.dry_run:
        apply_patches(*plans)
        report.roots = [root for root, _ in plans]


def restore_module(*roots: nn.Module, title: str = "restored") -> Report:
    """Undoes :func:`apply_patches`, in ``roots`` and in modules within them.

    The report returned names what is not where it was put: others have replaced it, or a chain of hooks hides it. That
    is remembered, so that it can be tried again.
    """
    report = Report(title)
    for module in (module for root in roots for module in root.modules()):
        kept = [patch for patch in reversed(module.__dict__.pop(_RECORD, [])) if not patch.undo()]
        if kept:
            module.__dict__[_RECORD] = _Record(reversed(kept))
        text = "replaced or wrapped by others since; left as it is"
        report.left += [Line(p.name, p.recipe.host, 1, text) for p in kept]
    return report


def is_patched(root: nn.Module) -> bool:
    """Returns whether patches of this module, or of one within it, are remembered."""
    return any(_RECORD in module.__dict__ for module in root.modules())


def _unfit(path: str, module: nn.Module, recipe: Recipe, host_version: str) -> str | None:
    """Returns why a module of a known kind is left, or None.

    Raises:
        HostChanged: the module is the host's, and not what its replacement was written for.
    """
    if (elsewhere := _defined_elsewhere(module, recipe)) is not None:
        return elsewhere
    unlike = recipe.unlike(module)
    if unlike is not None and not recipe.common:
        raise HostChanged(
            f"{host_version} is not what the replacement of {recipe.host} was written for: {path} has {unlike};"
            " nothing was changed"
        )
    try:
        reason = recipe.fits(module) or unlike
    # A module of the same name may be anything.
    except Exception as error:
        return f"it could not be looked at: {one_line(error)}"
    # Something else is in the place of the class's own forward, which cannot be entered.
    if reason is None and recipe.processor is None and own_forward(module) is None and any(forward_slots(module)):
        return "accelerated already" if CALLS in module.__dict__ else "its forward has been replaced already"
    return reason


def _make_patch(path: str, module: nn.Module, recipe: Recipe) -> Patch:
    if recipe.processor is not None:
        return Patch(path, module, recipe, module.processor, recipe.processor(module.processor))
    original = MethodType(type(module).forward, module)
    parts = tuple(map(type, module.modules())) if recipe.feature == "vae" else ()
    return Patch(path, module, recipe, original, MethodType(recipe.counted_forward, module), parts=parts)


def _defined_elsewhere(module: nn.Module, recipe: Recipe) -> str | None:
    """Returns why a module's class, or the ``forward`` put into it, is not the host's own code; None if it is."""
    if recipe.package is None:
        return None
    owner: type = type(module.processor) if recipe.processor else type(module)
    function = owner.__call__ if recipe.processor else owner.forward
    for where in (owner.__module__, inspect.unwrap(function).__module__):
        if where.split(".")[0] != recipe.package:
            return f"not the code of {recipe.package}: it comes from {where}"
    return None


def _line(patches: Sequence[Patch], component: str, text: str) -> Line:
    """Returns a line for patches of one kind; a single one has its full name."""
    name = patches[0].name if len(patches) == 1 else component
    return Line(name, patches[0].recipe.host, len(patches), text)


def _grouped(lines: Sequence[Line], component: str) -> list[Line]:
    """Returns one line for all modules of a kind that were treated alike; a single one keeps its full name."""
    counts = Counter((line.host, line.text) for line in lines)
    names = {(line.host, line.text): line.component for line in lines}
    return [Line(names[key] if n == 1 else component, key[0], n, key[1]) for key, n in counts.items()]
