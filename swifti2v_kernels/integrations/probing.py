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
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.dispatch import use_backend

Forward = Callable[..., Any]

#: What is said of a module whose trial shows a difference: in what it returns, changes, or keeps for the next call.
DIFFERS = "its forward does something else"
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


class Trial(NamedTuple):
    """A computation that must give the same with the host's forward and with ours.

    Args:
        run: computes something by the forwards that it is given, and returns all that must be the same.
        tolerance: the error allowed, relative to the largest value. A trial in 16 bits shows dtypes, and needs an exact
            one beside it.
        in_turn: whether ``run`` takes two forwards in turn too, ours and the host's, which must go on from each other.
    """

    run: Callable[..., Any]
    tolerance: float
    in_turn: bool = False


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
            reasons[form] = f"its forward could not be tried: {_one_line(error)}"
        if (reason := reasons[form]) is not None:
            found[module] = reason
    return found


def twin(module: nn.Module, dtype: torch.dtype, stand_ins: Sequence[str] = ()) -> Any:
    """Returns a copy of a module without hooks, with random weights.

    Without ``stand_ins`` it has fewer channels: sizes of weights, and attributes that are such a size or its root, are
    smaller by one factor. They are the names of children that are only called: a cheap function takes the place of
    their ``forward``, which depends on all its arguments and, if there are several, gives small tokens too. Their
    weights take no memory.
    """
    generator = torch.Generator().manual_seed(0)
    number = (lambda value: value) if stand_ins else _smaller(module)
    children = {name: child for name in stand_ins if (child := module._modules.get(name)) is not None}
    called = {id(p) for child in children.values() for p in child.parameters()}
    # What the copy has in place of each object.
    memo: dict[int, Any] = {id(part): type(part).__new__(type(part)) for part in module.modules()}

    def weight(t: Tensor | None) -> Tensor | None:
        if t is not None and id(t) not in memo:
            shape = [number(n) for n in t.shape]
            idle = id(t) in called
            new = torch.zeros((), dtype=dtype).expand(shape) if idle else _random(t, shape, dtype, generator)
            memo[id(t)] = nn.Parameter(new, requires_grad=False) if isinstance(t, nn.Parameter) else new
        return None if t is None else memo[id(t)]

    def attribute(name: str, value: Any) -> Any:
        if name in LENDING:
            return LENDING[name]
        if isinstance(value, Tensor):
            return weight(value)
        # Anything else is such as a lock, a process group, or what keeps the weights of other modules.
        copies = isinstance(value, (nn.Module, MethodType, Collection))
        return number(copy.deepcopy(value, memo) if copies else value)

    for part in module.modules():
        new = memo[id(part)]
        new.__dict__ |= vars(nn.Module()) | {"training": part.training}
        new._parameters |= {name: weight(t) for name, t in part._parameters.items()}
        new._buffers |= {name: weight(t) for name, t in part._buffers.items()}
        new._modules |= {name: None if child is None else memo[id(child)] for name, child in part._modules.items()}
    # Afterwards, since a list among them may hold weights.
    for part in module.modules():
        memo[id(part)].__dict__ |= {name: attribute(name, value) for name, value in _own_attributes(part).items()}
    made = memo[id(module)]
    for seed, (name, child) in enumerate(children.items()):
        made._modules[name].forward = _stand_in(child, seed)
    return made


def magnitudes(count: int) -> Tensor:
    """Returns factors for tokens, which make some of them so small that an epsilon shows."""
    return torch.tensor([1, 1e-2, 1e-3, 1e-4], dtype=torch.float32).repeat(-(-count // 4))[:count]


def _disproof(module: nn.Module, forward: Forward, probe: Probe) -> str | None:
    failure, proved, host = None, False, type(module).forward
    with _apart():
        for run, tolerance, in_turn in probe(module, forward):
            # What the host does not take, such as a dtype, proves nothing; there must be something that it takes.
            try:
                expected = _alone(run, host)
            except Exception as error:
                failure = failure or error
                continue
            for codes in ((forward,), (forward, host), (host, forward)) if in_turn else ((forward,),):
                try:
                    actual = _alone(run, *codes)
                except Exception as error:
                    return f"{DIFFERS}: ours raises {_one_line(error)}"
                if not _same(expected, actual, tolerance):
                    return DIFFERS
            proved = proved or tolerance <= _EXACT
    if not proved:
        raise failure or ValueError("there is no trial")
    return None


def _alone(run: Callable[..., Any], *codes: Forward) -> Any:
    # Dropout is the same in all runs. Only the CPU's random numbers are the caller's again after a trial.
    torch.default_generator.manual_seed(0)
    return run(*codes)


@contextmanager
def _apart() -> Iterator[None]:
    """Keeps what runs in the block from the caller's settings, and the caller's random numbers from the block."""
    # A mode, which every call of torch passes through; it would take a third of the time.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    # A host's function may be a compiled one, which would be compiled anew for the shapes here. Whoever has none has
    # not imported the compiler, which takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    no_autocast = torch.autocast("cpu", enabled=False)
    with torch.no_grad(), device, no_autocast, torch.random.fork_rng(devices=[]), use_backend("torch"), eager:
        yield


def _same(host: Any, ours: Any, tolerance: float) -> bool:
    if isinstance(host, Tensor) and isinstance(ours, Tensor):
        if host.shape != ours.shape or host.dtype != ours.dtype:
            return False
        a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (host, ours))
        limit = tolerance * a.nan_to_num().abs().max().item()
        return torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True)
    if isinstance(host, (tuple, list)) and type(host) is type(ours) and len(host) == len(ours):
        return all(_same(a, b, tolerance) for a, b in zip(host, ours, strict=True))
    return type(host) is type(ours) and host == ours


def _one_line(error: Exception) -> str:
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
            return plain(tuple(value.shape)), repr(value.tolist()) if known else None
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        # What has no better one has its address in it, and so is a form of its own.
        return repr(number(getattr(value, "__func__", value)))

    return tuple(
        (name, type(part), part.training, *((key, plain(x)) for key, x in sorted(_own_attributes(part).items())))
        for name, part in module.named_modules()
    ), tuple((name, plain(t)) for name, t in (*module.named_parameters(), *module.named_buffers()))
