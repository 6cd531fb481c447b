"""A :class:`Recipe` says what replaces one kind of a host's modules; a :class:`Patch` replaces one of these modules."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .calls import counts
from .hooks import forward_slots, own_forward
from .probing import Probe

#: Attribute of a patched module that holds the counts of its calls. There a copy of the module has counts of its own.
CALLS = "_swifti2v_calls"
#: Attribute of a patched layer of a VAE that holds the classes of the modules in it.
PARTS = "_swifti2v_parts"


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


@dataclass(frozen=True)
class Recipe:
    """The replacement for one kind of host module, and what that module must look like.

    Args:
        host: class name of the module, or of its attention processor if ``processor`` is given.
        feature: ``attention``, ``norms`` or ``vae``.
        by: what replaces it, for the report.
        needs: attributes of the module that the replacement reads, dotted; or a function of the module that gives them.
        forward: ``forward(module, ...)`` that replaces the module's own, with parameters of the same names. For a call
            that it does not take, it changes nothing and returns the reason, a string; the host's own forward is called
            then.
        processor: class of attention processors, made from the present one; its ``__call__`` has the same parameters.
        fits: says why one particular module cannot be replaced, or None.
        package: the host's package; a class or a ``forward`` of the same name from elsewhere is left and named.
        own: gives the host's own forward by the class of a module.
        served_apart: whether :attr:`Report.calls` says which calls are served, and the replacement cannot.
        probe: gives the trials that prove that ``forward`` computes what the module's own does. A recipe without a
            package has one, unless ``forward`` is the host's code, since a class's name proves nothing.
        common: whether the class name is a common one: a module with other parameters is left, and no host has changed.
    """

    host: str
    feature: str
    by: str
    needs: tuple[str, ...] | Callable[[Any], tuple[str, ...]]
    forward: Callable[..., Any] | None = None
    processor: type | None = None
    fits: Callable[[Any], str | None] = lambda module: None
    package: str | None = None
    own: Callable[[type[nn.Module]], Callable[..., Any]] = lambda kind: kind.forward
    served_apart: bool = False
    probe: Probe | None = None
    common: bool = False

    @property
    def parameters(self) -> Sequence[inspect.Parameter]:
        """The parameters after the module of ``forward``, or of the processor's ``__call__``."""
        function = self.forward if self.processor is None else self.processor.__call__
        return tuple(inspect.signature(function).parameters.values())[1:]

    def unlike(self, module: nn.Module) -> str | None:
        """Returns in what ``module`` is not what this was written for, an attribute or a parameter, or None."""
        for need in self.needs(module) if callable(self.needs) else self.needs:
            if lacks(module, need):
                return f"no attribute {need!r}"
        ours = self.parameters
        if any(p.kind is p.VAR_POSITIONAL for p in ours):
            return None
        function = type(module).forward if self.processor is None else type(module.processor).__call__
        found = [name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")]
        where = "forward" if self.processor is None else "processor"
        surplus = [name for name in found if all(name != p.name for p in ours)]
        # What a version does not have yet, it does not have at the end.
        needed = [p.name for i, p in enumerate(ours) if p.default is p.empty or (i < len(found) and not surplus)]
        missing = [] if self.common else [name for name in needed if name not in found]
        if missing:
            return f"no parameter {missing[0]!r} in its {where}"
        return f"a parameter {surplus[0]!r} in its {where} that is not known" if surplus else None

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
    """Returns whether ``out`` is a replacement's result, and not the reason why the host must compute; counts it."""
    reason = out if isinstance(out, str) else None
    if counts() and (calls := module.__dict__.get(CALLS)) is not None:
        calls[reason] += 1
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

    def is_in(self, layer: Patch) -> bool:
        """Returns whether the module is within that of ``layer``, and both are of one feature."""
        return self.name.startswith(f"{layer.name}.") and self.recipe.feature == layer.recipe.feature

    def count(self) -> None:
        """Has the module's calls counted from now on, and changes of its parts noticed."""
        self.module.__dict__[CALLS] = self.calls
        if self.parts:
            self.module.__dict__[PARTS] = self.parts

    def apply(self) -> None:
        """Puts the replacement in place."""
        self.count()
        if self.recipe.processor is not None:
            _set_processor(self.module, self.replacement)
            return
        holder, attribute = own_forward(self.module) or (self.module, "forward")
        setattr(holder, attribute, self.replacement)

    def undo(self) -> bool:
        """Puts the original back; returns False if something else has taken the replacement's place since."""
        self.module.__dict__.pop(CALLS, None)
        self.module.__dict__.pop(PARTS, None)
        if self.recipe.processor is not None:
            if self.module.processor is not self.replacement:
                return False
            self.replacement.hand_back()
            _set_processor(self.module, self.original)
            return True
        for holder, attribute in forward_slots(self.module):
            if getattr(holder, attribute) is self.replacement:
                if holder is self.module and attribute == "forward":
                    del self.module.forward
                else:
                    setattr(holder, attribute, self.original)
                return True
        return False


def _set_processor(module: nn.Module, processor: Any) -> None:
    setter = getattr(module, "set_processor", None)
    if setter is not None:
        setter(processor)
    else:  # Mochi's attention has the attribute alone
        module.processor = processor
