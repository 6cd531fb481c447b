"""A :class:`Recipe` says what replaces one kind of a host's modules; a :class:`Patch` replaces one of these modules."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from .hooks import forward_slots, own_forward
from .probing import Probe

#: Attribute of a patched module that holds its :class:`Patch`. So a copy of the module has counts of its own.
PATCH = "_swifti2v_patch"


class HostChanged(RuntimeError):
    """The error that a host's code is not what a replacement was written for; nothing was changed then.

    The message names the version of the host, and the attribute or parameter in which it differs.
    """


def lacks(owner: Any, need: str) -> bool:
    """Returns whether ``owner`` has no attribute ``need``, which is dotted."""
    try:
        operator.attrgetter(need)(owner)
    except AttributeError:
        return True
    return False


def check(text: str, owner: Any, *needs: str) -> None:
    """Checks that an object of a host has all attributes ``needs``.

    Raises:
        HostChanged: one is not there; the message names it after ``text``.
    """
    for need in needs:
        if lacks(owner, need):
            raise HostChanged(f"{text} has no attribute {need!r}; nothing was changed")


@dataclass(frozen=True)
class Recipe:
    """The replacement for one kind of host module, and what that module must look like.

    Args:
        host: class name of the module, or of its attention processor if ``processor`` is given.
        feature: ``attention``, ``norms`` or ``vae``.
        by: what replaces it, for the report.
        needs: attributes of the module that the replacement reads, dotted.
        forward: ``forward(module, ...)`` that replaces the module's own, with parameters of the same names. For a call
            that it does not take, it changes nothing and returns the reason, a string; the host's own forward is called
            then.
        processor: class of attention processors, made from the present one; its ``__call__`` has the same parameters.
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
    needs: tuple[str, ...]
    forward: Callable[..., Any] | None = None
    processor: type | None = None
    fits: Callable[[Any], str | None] = lambda module: None
    package: str | None = None
    own: Callable[[type[nn.Module]], Callable[..., Any]] = lambda kind: kind.forward
    served_apart: bool = False
    probe: Probe | None = None

    def unlike(self, module: nn.Module) -> str | None:
        """Returns in what ``module`` is not what this was written for, an attribute or a parameter, or None."""
        for need in self.needs:
            if lacks(module, need):
                return f"no attribute {need!r}"
        function, theirs, where = self.forward, type(module).forward, "forward"
        if self.processor is not None:
            function, theirs, where = self.processor.__call__, type(module.processor).__call__, "processor"
        ours = list(inspect.signature(function).parameters.values())[1:]
        if any(p.kind is p.VAR_POSITIONAL for p in ours):
            return None
        found = [name for name in inspect.signature(theirs).parameters if name not in ("self", "args", "kwargs")]
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
        """``forward``, with the host's own for the calls that it does not take; both are counted."""
        forward = self.forward

        @functools.wraps(forward)
        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            out = forward(module, *args, **kwargs)
            if is_taken(out, module):
                return out
            return self.own(type(module))(module, *args, **kwargs)

        return counted


def is_taken(out: Any, module: nn.Module) -> bool:
    """Returns whether ``out`` is a replacement's result, and not the reason why the host must compute; counts it.

    Calls in compiled code are not counted, as those of :class:`~swifti2v_kernels.integrations.sdpa.AttentionCalls`.
    """
    reason = out if isinstance(out, str) else None
    if not torch.compiler.is_compiling() and (patch := module.__dict__.get(PATCH)) is not None:
        patch.calls[reason] += 1
    return reason is None


@dataclass(frozen=True)
class Patch:
    """One replacement in one module: ``original`` is what stood there and ``replacement`` what stands there now.

    ``calls`` counts the module's calls, by the reason why the host computed them or, where ours did, None. ``parts``
    are the classes of the modules within a layer whose replacement computes with their weights.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    original: Any
    replacement: Any
    calls: Counter[str | None] = field(default_factory=Counter, compare=False)
    parts: tuple[type, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        copied = {f.name: copy.deepcopy(getattr(self, f.name), memo) for f in fields(self) if f.name != "recipe"}
        return Patch(recipe=self.recipe, **copied)

    # Its functions would be missing where it is read again.
    def __reduce__(self) -> Any:
        raise TypeError("an accelerated module cannot be pickled: restore() it first, or save its state_dict()")

    def count(self) -> None:
        """Has the module's calls counted from now on, and changes of its parts noticed."""
        self.module.__dict__[PATCH] = self

    def apply(self) -> None:
        """Puts the replacement in place."""
        own = (self.module, "processor") if self.recipe.processor else own_forward(self.module)
        setattr(*(own or (self.module, "forward")), self.replacement)
        self.count()

    def undo(self) -> bool:
        """Puts the original back; returns False if something else has taken the replacement's place since."""
        slots = [(self.module, "processor")] if self.recipe.processor else forward_slots(self.module)
        for holder, attribute in slots:
            if getattr(holder, attribute) is self.replacement:
                if self.recipe.processor:
                    self.replacement.hand_back()
                if holder is self.module and attribute == "forward":
                    del self.module.forward
                else:
                    setattr(holder, attribute, self.original)
                del self.module.__dict__[PATCH]
                return True
        return False
