"""A :class:`Recipe` says what replaces one kind of a host's modules; a :class:`Patch` replaces one of these modules.

The place of a module's own ``forward`` is beneath the hooks that a host puts around it. accelerate keeps the wrapped
``forward`` in an attribute of the module, diffusers in the references of a registry, torch beside it. All of them may
be put on and taken off at any time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from .probing import Probe

#: Attribute of a patched module that holds its :class:`Patch`. So a copy of the module has counts of its own.
PATCH = "_swifti2v_patch"
#: Hooks of diffusers and accelerate that change where and in which dtype weights are, and nothing else.
_MOVING_HOOKS = {
    *("GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook"),
    *("LayerwiseCastingHook", "PeftInputAutocastDisableHook", "AlignDevicesHook", "CpuOffload"),
}


class HostChanged(RuntimeError):
    """The error that a host's code is not what a replacement was written for; nothing was changed then.

    The message names the version of the host, and the attribute or parameter in which it differs.
    """


def check(text: str, owner: Any, *needs: str) -> None:
    """Checks that an object of a host has all attributes ``needs``.

    Raises:
        HostChanged: one is not there; the message names it after ``text``.
    """
    for need in needs:
        try:
            operator.attrgetter(need)(owner)
        except AttributeError:
            raise HostChanged(f"{text} has no attribute {need!r}; nothing was changed") from None


@dataclass(frozen=True)
class Recipe:
    """The replacement for one kind of host module, and what that module must look like.

    Args:
        host: class name of the module, or of its ``processor`` if the replacement is for modules with that.
        feature: ``attention``, ``norms`` or ``vae``.
        by: what replaces it, for the report.
        forward: ``forward(module, ...)`` that replaces the module's own, with parameters of the same names. For a call
            that it does not take, it changes nothing and returns the reason, a string; the host's own forward is called
            then.
        needs: attributes of the package's module that the replacement reads, dotted.
        apart: names of children that are only called, as the host calls them. A hook within another child, unless it
            only moves weights, may see what is computed otherwise: the host's own forward is called then.
        processor: whether ``host`` is the class of the module's attention processor, whose ``__call__`` has the
            parameters.
        fits: says why one particular module cannot be replaced, or None.
        package: the host's package; a class or a ``forward`` of the same name from elsewhere is left and named, and one
            of its own that lacks something is a :class:`HostChanged`. Without it, that is left and named too.
        own: gives the host's own forward by the class of a module.
        served_apart: whether :attr:`Report.calls` says which calls are served, and the replacement cannot.
        probe: gives the trials that prove that ``forward`` computes what the module's own does. A recipe without a
            package has one, unless ``forward`` is the host's code, since a class's name proves nothing.
    """

    host: str
    feature: str
    by: str
    forward: Callable[..., Any]
    needs: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    processor: bool = False
    fits: Callable[[Any], str | None] = lambda module: None
    package: str | None = None
    own: Callable[[type[nn.Module]], Callable[..., Any]] = lambda kind: kind.forward
    served_apart: bool = False
    probe: Probe | None = None

    def unlike(self, module: nn.Module) -> str | None:
        """Returns in which parameter the host's code is not what this was written for, or None."""
        theirs, where = type(module).forward, "forward"
        if self.processor:
            theirs, where = type(module.processor).__call__, "processor"
        ours = list(inspect.signature(self.forward).parameters.values())[1:]
        if any(p.kind is p.VAR_POSITIONAL for p in ours):
            return None
        found = [
            name for name in inspect.signature(theirs).parameters if name not in ("self", "attn", "args", "kwargs")
        ]
        for name in found:
            if all(name != p.name for p in ours):
                return f"a parameter {name!r} in its {where} that is not known"
        # What a version does not have yet, it does not have at the end.
        for i, p in enumerate(ours):
            if p.name not in found and (p.default is p.empty or i < len(found)):
                return f"no parameter {p.name!r} in its {where}"
        return None

    # One function for all modules: compiled code of one layer is then that of the others too.
    @functools.cached_property
    def counted_forward(self) -> Callable[..., Any]:
        """``forward``, with the host's own for the calls that it does not take; both are counted.

        Calls in compiled code are not counted, as those of :class:`~swifti2v_kernels.integrations.sdpa.AttentionCalls`.
        """
        forward = self.forward

        @functools.wraps(forward)
        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = "a hook on a layer inside" if watched(module, self.apart) else forward(module, *args, **kwargs)
            reason = out if isinstance(out, str) else None
            if not torch.compiler.is_compiling() and (patch := module.__dict__.get(PATCH)) is not None:
                patch.calls[reason] += 1
            return out if reason is None else self.own(type(module))(module, *args, **kwargs)

        return counted


@dataclass(frozen=True)
class Patch:
    """One replacement in one module.

    ``calls`` counts the module's calls, by the reason why the host computed them or, where ours did, None. ``parts``
    are the classes of the modules within a layer whose replacement computes with their weights.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    parts: tuple[type, ...]
    calls: Counter[str | None] = field(default_factory=Counter, compare=False)

    @property
    def replacement(self) -> MethodType:
        """The method that stands where the module's own forward stood."""
        return MethodType(self.recipe.counted_forward, self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        return Patch(self.name, copy.deepcopy(self.module, memo), self.recipe, self.parts, self.calls.copy())

    # Its functions would be missing where it is read again.
    def __reduce__(self) -> Any:
        raise TypeError("an accelerated module cannot be pickled: restore() it first, or save its state_dict()")

    def apply(self) -> None:
        """Puts the replacement in place; the module's calls are counted from now on, and changes of parts noticed."""
        setattr(*(own_forward(self.module) or (self.module, "forward")), self.replacement)
        self.module.__dict__[PATCH] = self

    def undo(self) -> bool:
        """Puts the host's own code back; returns False if something else has taken the replacement's place since."""
        for holder, attribute in forward_slots(self.module):
            if getattr(holder, attribute) == self.replacement:
                if holder is self.module and attribute == "forward":
                    del self.module.forward
                else:
                    setattr(holder, attribute, MethodType(type(self.module).forward, self.module))
                del self.module.__dict__[PATCH]
                return True
        return False


def hooked(module: nn.Module) -> bool:
    """Returns whether something happens when ``module`` is called that reading its parameters would miss."""
    return bool(hook_kinds(module) or module._forward_hooks or module._forward_pre_hooks)


def watched(module: nn.Module, apart: Collection[str] = ()) -> bool:
    """Returns whether a module within ``module`` has a hook that may keep or change data, but for children ``apart``.

    The other hooks only bring weights, take them away or cast them.
    """
    children = (child for name, child in module.named_children() if name not in apart)
    parts = (part for child in children for part in child.modules())
    return any(part._forward_hooks or part._forward_pre_hooks or hook_kinds(part) - _MOVING_HOOKS for part in parts)


def hook_kinds(module: nn.Module) -> set[str]:
    """Returns the class names of the hooks that accelerate and diffusers have on ``module``."""
    registry = getattr(module, "_diffusers_hook", None)
    found = list(registry.hooks.values()) if registry is not None else []
    outer = getattr(module, "_hf_hook", None)
    if outer is not None:
        found += getattr(outer, "hooks", [outer])
    return {type(hook).__name__ for hook in found}


def forward_slots(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yields holder and attribute of every callable in the chain around ``forward``, from the outside in."""
    if "forward" in module.__dict__:
        yield module, "forward"
    if "_old_forward" in module.__dict__:  # accelerate's hooks
        yield module, "_old_forward"
    registry = getattr(module, "_diffusers_hook", None)
    for reference in reversed(registry._fn_refs if registry is not None else []):
        if reference.original_forward is not None:
            yield reference, "original_forward"
        yield reference, "forward"


def own_forward(module: nn.Module) -> tuple[Any, str] | None:
    """Returns the slot with the class's own forward, the innermost of the chain, or None if there is no such slot."""
    for holder, attribute in forward_slots(module):
        value = getattr(holder, attribute)
        if isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward:
            return holder, attribute
    return None
