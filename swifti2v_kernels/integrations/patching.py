"""Replacing parts of a host's modules so that it can be undone: planned first, then all or nothing.

A :class:`Recipe` says what one kind of host module must look like and what replaces it. :func:`plan_patches` looks for
everything that recipes know and raises :class:`HostChanged` before anything is touched if one of them no longer fits.
Hooks of the host (offloading, caching) wrap a module's ``forward``; a replacement goes beneath them, where the module's
own ``forward`` stood, so hooks may come before or after it and may go again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

#: Attribute of a patched root module that holds what was done to it.
_RECORD = "_swifti2v_patches"


class HostChanged(RuntimeError):
    """The host's code is not what the replacement was written for; nothing was changed."""


@dataclass(frozen=True)
class Recipe:
    """What replaces one kind of host module.

    Args:
        host: class name of the module, or of its attention processor if ``processor`` is given.
        feature: ``attention``, ``norms`` or ``vae``.
        by: what replaces it, for the report.
        needs: attributes of the module that the replacement reads, dotted.
        parameters: names of the parameters of the host's ``forward`` (or of the processor's ``__call__``); None:
            ``fits`` looks at them.
        forward: ``forward(module, ...)`` that replaces the module's own.
        processor: makes an attention processor from the present one.
        fits: says why one particular module cannot be replaced, or None.
    """

    host: str
    feature: str
    by: str
    needs: tuple[str, ...]
    parameters: tuple[str, ...] | None
    forward: Callable[..., Any] | None = None
    processor: Callable[[Any], Any] | None = None
    fits: Callable[[Any], str | None] = lambda module: None


@dataclass(frozen=True)
class Patch:
    """One replacement in one module: ``original`` is what stood there and ``replacement`` what stands there now."""

    name: str
    module: nn.Module
    recipe: Recipe
    original: Any
    replacement: Any

    def apply(self) -> None:
        """Puts the replacement in place."""
        if self.recipe.processor is not None:
            _set_processor(self.module, self.replacement)
            return
        holder, attribute = _own_forward(self.module) or (self.module, "forward")
        setattr(holder, attribute, self.replacement)

    def undo(self) -> bool:
        """Puts the original back; False if something else has taken the replacement's place since."""
        if self.recipe.processor is not None:
            if self.module.processor is not self.replacement:
                return False
            _set_processor(self.module, self.original)
            return True
        for holder, attribute in _forward_slots(self.module):
            if getattr(holder, attribute) is self.replacement:
                if holder is self.module and attribute == "forward":
                    del self.module.forward
                else:
                    setattr(holder, attribute, self.original)
                return True
        return False


@dataclass(frozen=True)
class Line:
    """One line of a report: where, what kind of module, how many, and what replaced it or why nothing did."""

    component: str
    host: str
    count: int
    text: str


@dataclass
class Report:
    """What was replaced, and what was not and why. ``restore()`` undoes it.

    ``dry_run``: nothing was replaced; ``replaced`` is what would be.
    """

    title: str
    dry_run: bool = False
    replaced: list[Line] = field(default_factory=list)
    left: list[Line] = field(default_factory=list)
    roots: list[nn.Module] = field(default_factory=list, repr=False)

    def restore(self) -> Report:
        """Puts the host's own code back, as :func:`restore_module` does for each of the modules."""
        result = Report("restored")
        for root in self.roots:
            result.left += restore_module(root).left
        return result

    def __str__(self) -> str:
        rows = [("would replace" if self.dry_run else "replaced", line) for line in self.replaced]
        rows += [("left", line) for line in self.left]
        cells = [(verb, f"{x.count} x {x.host}" if x.count else x.host, x.component, x.text) for verb, x in rows]
        widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(3)]
        lines = [
            "  ".join(part.ljust(w) for part, w in zip(cell, widths, strict=False)) + f"  {cell[3]}" for cell in cells
        ]
        return "\n".join([self.title, *(f"  {line}" for line in lines or ["nothing here is known"])])


def plan_patches(
    component: str, root: nn.Module, recipes: Sequence[Recipe], wanted: Mapping[str, bool], host_version: str
) -> tuple[list[Patch], list[Line], list[Line]]:
    """Everything in ``root`` that recipes know.

    Args:
        component: name of ``root`` for the report.
        root: the host's model; looked through, not changed.
        recipes: what is known.
        wanted: whether each feature was asked for.
        host_version: for the error, such as ``diffusers 0.42.1``.

    Returns:
        The patches, the report's lines of what they replace, and those of what is left alone.

    Raises:
        HostChanged: a module is of a known kind but lacks an attribute, or its ``forward`` takes other parameters.
    """
    by_host = {recipe.host: recipe for recipe in recipes}
    patches: list[Patch] = []
    left: list[Line] = []
    for name, module in root.named_modules():
        for kind in _kinds(module):
            recipe = by_host.get(kind)
            path = f"{component}.{name}" if name else component
            if recipe is None:
                if kind != type(module).__name__:  # a processor
                    left.append(Line(path, kind, 1, "no replacement for this attention processor"))
                continue
            if not wanted[recipe.feature]:
                left.append(Line(path, kind, 1, f"{recipe.feature}=False"))
                continue
            _check_host(path, module, recipe, host_version)
            reason = recipe.fits(module) or (None if recipe.processor else _foreign_forward(module))
            if reason is not None:
                left.append(Line(path, kind, 1, reason))
            else:
                patches.append(_make_patch(path, module, recipe))
    return (
        patches,
        _grouped((Line(p.name, p.recipe.host, 1, p.recipe.by) for p in patches), component),
        _grouped(left, component),
    )


def apply_patches(root: nn.Module, patches: Sequence[Patch]) -> None:
    """Applies all of them, or none if one fails, and remembers them in ``root``."""
    done: list[Patch] = []
    try:
        for patch in patches:
            patch.apply()
            done.append(patch)
    except BaseException:
        for patch in reversed(done):
            patch.undo()
        raise
    if patches:
        root.__dict__[_RECORD] = list(patches)


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
        report: ``dry_run``: only this is filled.
        models: named. What is patched already is restored first, so that its own code is seen; if this call fails, it
            stays restored.
        recipes, wanted, host_version: as for :func:`plan_patches`.
        look: a host's own checks of a model, and what it names as left.

    Raises:
        HostChanged: from :func:`plan_patches` or ``look``, before anything is touched.
    """
    plans: list[tuple[nn.Module, list[Patch]]] = []
    for name, root in models:
        if is_patched(root):
            if report.dry_run:
                report.left.append(Line(name, type(root).__name__, 0, "accelerated already"))
                continue
            restore_module(root)
        patches, replaced, left = plan_patches(name, root, recipes, wanted, host_version)
        left += look(name, root)
        plans.append((root, patches))
        report.replaced += replaced
        report.left += left or ([] if replaced else [Line(name, type(root).__name__, 0, "not known")])
    if report.dry_run:
        return
    done: list[nn.Module] = []
    try:
        for root, patches in plans:
            apply_patches(root, patches)
            done.append(root)
    except BaseException:
        for root in done:
            restore_module(root)
        raise
    report.roots = done


def restore_module(root: nn.Module) -> Report:
    """Undoes :func:`apply_patches`; its report names what others have replaced since and is therefore left."""
    report = Report("restored")
    for patch in reversed(root.__dict__.pop(_RECORD, [])):
        if not patch.undo():
            report.left.append(Line(patch.name, patch.recipe.host, 1, "replaced by others since; left as it is"))
    return report


def is_patched(root: nn.Module) -> bool:
    """Whether patches of this module are remembered."""
    return _RECORD in root.__dict__


def hooked(module: nn.Module) -> bool:
    """Whether the host has hooks on ``module``: its parameters may then be elsewhere until it is called."""
    registry = getattr(module, "_diffusers_hook", None)
    return hasattr(module, "_hf_hook") or bool(registry is not None and registry.hooks)


def _kinds(module: nn.Module) -> Iterator[str]:
    yield type(module).__name__
    processor = getattr(module, "processor", None)
    if processor is not None:
        yield type(processor).__name__


def _make_patch(path: str, module: nn.Module, recipe: Recipe) -> Patch:
    if recipe.processor is not None:
        return Patch(path, module, recipe, module.processor, recipe.processor(module.processor))
    assert recipe.forward is not None
    original = MethodType(type(module).forward, module)
    return Patch(path, module, recipe, original, MethodType(recipe.forward, module))


def _check_host(path: str, module: nn.Module, recipe: Recipe, host_version: str) -> None:
    def changed(what: str) -> HostChanged:
        return HostChanged(
            f"{host_version} is not what the replacement of {recipe.host} was written for: {path} has {what};"
            " nothing was changed"
        )

    for need in recipe.needs:
        owner: Any = module
        for part in need.split("."):
            if not hasattr(owner, part):
                raise changed(f"no attribute {need!r}")
            owner = getattr(owner, part)
    if recipe.parameters is None:
        return
    function = type(module.processor).__call__ if recipe.processor else type(module).forward
    found = [name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")]
    missing = [name for name in recipe.parameters if name not in found]
    surplus = [name for name in found if name not in recipe.parameters]
    where = "processor" if recipe.processor else "forward"
    if missing:
        raise changed(f"no parameter {missing[0]!r} in its {where}")
    if surplus:
        raise changed(f"a parameter {surplus[0]!r} in its {where} that is not known")


def _forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where callables of the chain around ``forward`` are kept, from the outside in."""
    if "forward" in module.__dict__:
        yield module, "forward"
    if "_old_forward" in module.__dict__:  # accelerate's hooks
        yield module, "_old_forward"
    registry = getattr(module, "_diffusers_hook", None)
    for reference in reversed(registry._fn_refs if registry is not None else []):
        yield reference, "original_forward" if reference.original_forward is not None else "forward"


def _own_forward(module: nn.Module) -> tuple[Any, str] | None:
    """The slot that holds the class's own forward, the innermost of the chain; None if there is no such slot."""
    for holder, attribute in _forward_slots(module):
        value = getattr(holder, attribute)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward:
            return holder, attribute
    return None


def _foreign_forward(module: nn.Module) -> str | None:
    """Why the chain around ``forward`` cannot be entered: something else stands where the class's own should."""
    if _own_forward(module) is None and next(_forward_slots(module), None) is not None:
        return "its forward has been replaced already"
    return None


def _set_processor(module: nn.Module, processor: Any) -> None:
    setter = getattr(module, "set_processor", None)
    if setter is not None:
        setter(processor)
    else:  # Mochi's attention has the attribute alone
        module.processor = processor


def _grouped(lines: Iterator[Line] | list[Line], component: str) -> list[Line]:
    """One line for all of a kind that were treated alike; a single one keeps its full name."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.host, line.text), []).append(line)
    return [
        Line(group[0].component if len(group) == 1 else component, host, len(group), text)
        for (host, text), group in groups.items()
    ]
