"""Proof that a replacement computes what a host's own ``forward`` does: both run on tiny tensors and are compared.

Modules that only the name of their class tells have look-alikes: the same names, layers and parameters, and another
result. A recipe for such a name has a ``probe``, which gives :class:`Trial` objects; what they do not prove is left.

Trials run on a :func:`twin` of the module: on the CPU, with random weights of its own and few channels. So it does not
matter where and how a host keeps its weights, or whether they are zero; no hook of the host runs, nothing of it
changes, and no code is compiled. Modules with equal twins are tried once.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
import zlib
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..common.dispatch import use_backend

Forward = Callable[..., Any]
#: What a computation gave, by what it means if another one gives something else.
Outcome = Mapping[str, Any]

#: What a difference in the result means, and in what was given after the call.
RETURNS = "its forward returns something else"
CHANGES = "its forward leaves what it is given in another state"
#: Attributes by which ComfyUI's modules say that their weights are lent for every call, with the values of those whose
#: weights are not.
LENDING: dict[str, Any] = {"comfy_cast_weights": False, "weight_function": (), "bias_function": ()}
#: Attributes that hooks, ``compile()`` and patches leave in a module.
_HOOKS = {"forward", "_old_forward", "_hf_hook", "_diffusers_hook", "_compiled_call_impl"}
_PATCHES = "_swifti2v"
_FRESH = set(vars(nn.Module()))
#: The largest tolerance of a trial that proves something by itself.
_EXACT = 1e-3
#: The largest number of integers that are settings of a module.
_FEW = 1024


@dataclass(frozen=True)
class Trial:
    """Computations that must give the same.

    Args:
        host: the host's own.
        ours: those with the replacement in them.
        tolerance: the error allowed, relative to the largest value. A trial in 16 bits shows dtypes, and needs an exact
            one beside it.
    """

    host: Callable[[], Outcome]
    ours: Sequence[Callable[[], Outcome]]
    tolerance: float


#: Gives the trials for a module and the ``forward`` that is to replace its own.
Probe = Callable[[nn.Module, Forward], Iterable[Trial]]


def disproofs(modules: Iterable[tuple[nn.Module, Forward, Probe]]) -> dict[nn.Module, str]:
    """Returns the modules for which it is not proved that the replacement computes the same, with the reason."""
    reasons: dict[Hashable, str | None] = {}
    found: dict[nn.Module, str] = {}
    for module, forward, probe in modules:
        form: Hashable = None
        try:
            form = forward, probe, _form(module)
            if form not in reasons:
                reasons[form] = _disproof(module, forward, probe)
        except Exception as error:
            reasons[form] = f"its forward could not be tried: {one_line(error)}"
        if (reason := reasons[form]) is not None:
            found[module] = reason
    return found


def twin(module: nn.Module, dtype: torch.dtype, stand_ins: Sequence[str] = ()) -> Any:
    """Returns a module of the same classes, attributes and modes, without hooks, with random weights.

    Without ``stand_ins`` it has fewer channels: sizes of weights, and attributes that are such a size or its root, are
    smaller by one factor.

    Args:
        module: the module; neither it nor anything in it is changed.
        dtype: dtype of the weights.
        stand_ins: names of children that are only called. A cheap function takes the place of their ``forward``, which
            depends on all its arguments and, if there are several, gives small tokens too. Weights take no memory.
    """
    generator = torch.Generator().manual_seed(0)
    number = (lambda value: value) if stand_ins else _smaller(module)

    def draw(t: Tensor) -> Tensor:
        return _random(t, [number(n) for n in t.shape], dtype, generator)

    parts = {}
    for seed, name in enumerate(stand_ins):
        if (child := module._modules.get(name)) is not None:
            parts[name] = _bare(child, lambda t: torch.zeros((), dtype=dtype).expand(t.shape), number)
            parts[name].forward = _stand_in(child, seed)
    return _bare(module, draw, number, parts)


def magnitudes(count: int) -> Tensor:
    """Returns factors for tokens, which make some of them so small that an epsilon shows."""
    return torch.tensor([1, 1e-2, 1e-3, 1e-4], dtype=torch.float32).repeat(-(-count // 4))[:count]


def _disproof(module: nn.Module, forward: Forward, probe: Probe) -> str | None:
    failure, proved = None, False
    with _apart():
        for trial in probe(module, forward):
            # What the host does not take, such as a dtype, proves nothing; there must be something that it takes.
            try:
                expected = _alone(trial.host)
            except Exception as error:
                failure = failure or error
                continue
            for run in trial.ours:
                try:
                    actual = _alone(run)
                except Exception as error:
                    return f"{RETURNS}: ours raises {one_line(error)}"
                for words, value in expected.items():
                    if (what := _difference(value, actual[words], trial.tolerance)) is not None:
                        return f"{words}: {what}"
            proved = proved or trial.tolerance <= _EXACT
    if not proved:
        raise failure or ValueError("there is no trial")
    return None


def _alone(run: Callable[[], Outcome]) -> Outcome:
    # Dropout is the same in all runs. Only the CPU's random numbers are the caller's again after a trial.
    torch.default_generator.manual_seed(0)
    return run()


@contextmanager
def _apart() -> Iterator[None]:
    """Keeps what runs in the block from the caller's settings, and the caller's random numbers from the block."""
    # A mode, which every call of torch passes through; it would take a third of the time.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    # A host's function may be a compiled one, which would be compiled again for the shapes here. Whoever has none has
    # not imported the compiler, which takes seconds.
    stance = getattr(torch.compiler, "set_stance", None) if "torch._dynamo" in sys.modules else None
    with (
        torch.no_grad(),
        device,
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        use_backend("torch"),
        stance("force_eager") if stance else nullcontext(),
    ):
        yield


def _difference(host: Any, ours: Any, tolerance: float) -> str | None:
    if isinstance(host, Tensor) and isinstance(ours, Tensor):
        if host.shape != ours.shape:
            return "another shape"
        if host.dtype != ours.dtype:
            return f"{host.dtype}, not {ours.dtype}"
        if torch.equal(host, ours):
            return None
        a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (host, ours))
        limit = tolerance * a.nan_to_num().abs().max().item()
        return None if torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True) else "other values"
    if isinstance(host, (tuple, list)) and type(host) is type(ours) and len(host) == len(ours):
        found = (_difference(a, b, tolerance) for a, b in zip(host, ours, strict=True))
        return next((what for what in found if what is not None), None)
    if type(host) is type(ours) and host == ours:
        return None
    return f"{_described(host)}, not {_described(ours)}"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list, dict)) else repr(value)[:60]


def one_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes of a module that a host has put there, but for hooks."""
    apart = _FRESH | _HOOKS
    return {name: x for name, x in vars(module).items() if name not in apart and not name.startswith(_PATCHES)}


def _smaller(module: nn.Module) -> Callable[[Any], Any]:
    """Returns the function that makes the numbers of channels within ``module``, and their roots, smaller."""
    sizes = {n for p in module.parameters() for n in p.shape[:2] if n > 1}
    common = math.gcd(*sizes)
    # Four or a few more; what is changed is 8 at least, and so no size of a kernel.
    factor = common // next((n for n in range(4, common) if common % n == 0), common) if common else 1

    def number(value: Any) -> Any:
        if type(value) is int and value in sizes:
            return value // factor
        is_root = type(value) is float and any(math.isclose(value, n**0.5) for n in sizes)
        return value / factor**0.5 if is_root else value

    return number


def _bare(
    module: nn.Module,
    fill: Callable[[Tensor], Tensor],
    number: Callable[[Any], Any],
    parts: Mapping[str, nn.Module] | None = None,
) -> Any:
    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return fill(value)
        if type(value) in (tuple, set):
            return type(value)(map(own, value))
        if isinstance(value, Collection):
            value = copy.copy(value)
            if isinstance(value, (MutableMapping, MutableSequence)):
                for key in list(value) if isinstance(value, MutableMapping) else range(len(value)):
                    value[key] = own(value[key])
            return value
        # A method that somebody has put over one of the class.
        bound = isinstance(value, MethodType) and value.__self__ is module
        return MethodType(value.__func__, result) if bound else number(value)

    result = type(module).__new__(type(module))
    nn.Module.__init__(result)
    result.__dict__ |= {name: own(value) for name, value in _own_attributes(module).items()}
    result.__dict__ |= {name: value for name, value in LENDING.items() if hasattr(result, name)}
    result.__dict__["training"] = module.training
    for name, p in module._parameters.items():
        result._parameters[name] = None if p is None else nn.Parameter(fill(p), requires_grad=False)
    for name, buffer in module._buffers.items():
        result._buffers[name] = None if buffer is None else fill(buffer)
    for name, child in module._modules.items():
        result._modules[name] = (parts or {}).get(name) or (None if child is None else _bare(child, fill, number))
    return result


def _random(t: Tensor, shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if not t.is_floating_point():
        return t.detach().to("cpu", copy=True)
    fan = math.prod(shape[1:])
    # Vectors are biases and gains, and gains are about 1.
    return (torch.randn(shape, generator=generator, dtype=torch.float32) / fan**0.5 + (fan == 1)).to(dtype)


def _stand_in(child: nn.Module, seed: int) -> Forward:
    signature = inspect.signature(type(child).forward)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(child, *args, **kwargs)
        bound.apply_defaults()
        _, x, *others = bound.arguments.values()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        gain = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        if others:
            x = x * magnitudes(x.shape[-2])[:, None]
        for i, other in enumerate(others, 1):
            gain = gain * (1 + 0.5 * math.sin(i * _number(other)))
        return (x * gain).to(dtype)

    return forward


def _number(value: Any) -> float:
    """Returns a number that depends on all of an argument, and little on how it is rounded."""
    if not isinstance(value, Tensor):
        return zlib.crc32(repr(value).encode()) / 2**32
    flat = (torch.view_as_real(value) if value.is_complex() else value).double().flatten()
    return ((flat * torch.cos(torch.arange(len(flat)))).sum() / max(1, len(flat)) ** 0.5).item()


def _form(module: nn.Module) -> Hashable:
    """Returns all that a module's twin is made of: classes, attributes and shapes of weights."""
    number = _smaller(module)

    def plain(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            # A twin has the values of integers too. Many of them are a quantised weight, which is a stand-in's.
            known = not (value.is_floating_point() or value.is_meta) and value.numel() <= _FEW
            return plain(tuple(value.shape)), plain(value.flatten().tolist()) if known else None
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        value = number(getattr(value, "__func__", value))
        try:
            hash(value)
        except TypeError:
            value = id(value)
        # 1, 1.0 and True are equal.
        return type(value), value

    return tuple(
        (name, type(part), part.training, *((key, plain(x)) for key, x in sorted(_own_attributes(part).items())))
        for name, part in module.named_modules()
    ), tuple((name, plain(t)) for name, t in (*module.named_parameters(), *module.named_buffers()))
