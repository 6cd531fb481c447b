"""The weights for which errors are stated: random, structured, or a checkpoint's.

*Random* weights are normal, as in all other benchmarks. They are the easiest there are for a quantiser: the largest of
1,536 normal numbers is 3.4 times as large as their root mean square, and a scale a row loses nothing to its neighbours.

*Structured* weights have what makes trained ones harder, by numbers that are ours:

* heavy tails: Student's t with 5 degrees of freedom, to which weights and activations of 30 trained networks were
  fitted best (arXiv 2405.03103);
* log-normal scales of rows (0.4) and of columns (0.3);
* one input channel in 200 is 8 times as large: outlier channels as transformers have them (arXiv 2208.07339);
* a part of rank 16 with a fifth of the energy;
* norm weights and modulation that are far from 1 and 0, biases that are not 0; the same outlier channels in the norms'
  scales of every layer, so that activations have them too.

Every matrix keeps the root mean square that a random one has. This is a model of structure and no trained checkpoint:
it shows which way errors go, and their order of magnitude. ``--weights`` states them for a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import DiTConfig
from model.dit.model import WanDiT
from model.streaming.placed import place
from model.streaming.placement import TABLE, Placement
from model.weights.load import random_weights
from swifti2v_kernels import quantize_rows

DEGREES = 5
ROW_SPREAD, COLUMN_SPREAD = 0.4, 0.3
OUTLIERS, OUTLIER_SCALE = 0.005, 8.0
RANK, LOW_RANK_SHARE = 16, 0.2
NORM_SPREAD, MODULATION, BIAS = 0.4, 0.3, 0.1
#: The rows of a layer's modulation table (shift, scale, gate; twice) that norms are multiplied by.
SCALES = (1, 4)

#: Weight [N, K] and bias [N] of a linear layer, float32.
Linear = tuple[Tensor, Tensor]


class StructuredTensors:
    """A :class:`model.streaming.placed.TensorSource` of structured weights.

    A tensor depends on its name, its shape and the kind of device only, so that tensors can be asked for in any order,
    by models of any number of layers, and again.

    Args:
        shapes: the shapes of all tensors by name.
        device: the device on which they are drawn.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str) -> None:
        self.shapes, self.device = shapes, torch.device(device)

    def plain(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Returns a tensor by its name, in ``dtype``."""
        return self._drawn(name, self.shapes[name]).to(device, dtype)

    def eight_bits(self, name: str, kind: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Returns a matrix by its name, as values ``[N, K]`` of ``kind`` and float32 scales ``[N]``, one a row."""
        return quantize_rows(self.plain(name, torch.float32, device), kind)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        draw = Drawing(f"0 {name}", self.device)
        if name.endswith(TABLE):
            table = MODULATION * draw.normal(*shape)
            if name.startswith("blocks."):
                # A channel is multiplied by 1 + scale.
                factors = Drawing("0 channels", self.device).outliers(shape[-1])
                table[:, SCALES] = (1 + table[:, SCALES]) * factors - 1
            return table
        if name.endswith("bias"):
            return BIAS * draw.normal(*shape)
        if len(shape) == 1:
            return draw.spread(NORM_SPREAD, *shape)
        if len(shape) == 2 and name.startswith("blocks."):
            return structured_matrix(draw, *shape)
        # The other weights are never written in 8 bits, so they are random.
        return math.prod(shape[1:]) ** -0.5 * draw.normal(*shape)


class Drawing:
    """A source of random float32 tensors on a device, with a text as the seed."""

    def __init__(self, seed: str, device: torch.device | str) -> None:
        number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(number >> 1)

    def normal(self, *shape: int) -> Tensor:
        """Returns standard normal numbers."""
        return torch.empty(shape, device=self.device).normal_(generator=self.generator)

    def heavy(self, *shape: int) -> Tensor:
        """Returns numbers of Student's t with 5 degrees of freedom, scaled to a variance of 1."""
        # Two degrees of freedom of chi-squared are an exponential of mean 2.
        squared = self.normal(*shape).square_()
        for _ in range(DEGREES // 2):
            squared.add_(torch.empty_like(squared).exponential_(generator=self.generator), alpha=2.0)
        return self.normal(*shape).mul_(squared.div_(DEGREES - 2).rsqrt_())

    def spread(self, deviation: float, *shape: int) -> Tensor:
        """Returns log-normal numbers around 1, whose logarithms have this standard deviation."""
        return self.normal(*shape).mul_(deviation).exp_()

    def outliers(self, channels: int) -> Tensor:
        """Returns a factor for each channel: 8 for one in 200, but at least for one, and 1 for the others."""
        count = math.ceil(OUTLIERS * channels)
        chosen = torch.randperm(channels, generator=self.generator, device=self.device)[:count]
        return torch.ones(channels, device=self.device).index_fill_(0, chosen, OUTLIER_SCALE)


def structured_matrix(draw: Drawing, rows: int, columns: int) -> Tensor:
    """Returns ``[rows, columns]`` float32 with the module's structure and a root mean square of ``columns ** -0.5``."""
    rank = min(RANK, rows, columns)
    weight = draw.heavy(rows, columns).mul_((1 - LOW_RANK_SHARE) ** 0.5)
    weight.addmm_(draw.normal(rows, rank), draw.normal(rank, columns), alpha=(LOW_RANK_SHARE / rank) ** 0.5)
    weight.mul_(draw.spread(COLUMN_SPREAD, columns).mul_(draw.outliers(columns)))
    weight.mul_(draw.spread(ROW_SPREAD, rows, 1))
    return weight.mul_((rows**0.5 / weight.norm()).item())


@dataclass(frozen=True)
class SyntheticWeights:
    """The random or structured weights of a configuration, the same in every run."""

    kind: str
    config: DiTConfig
    device: torch.device

    def build(self, dtype: torch.dtype, placement: Placement) -> WanDiT:
        """Returns the DiT with large matrices in ``dtype`` or in the form of ``placement``."""
        options = {"dtype": dtype, "device": self.device}
        if self.kind == "random":
            return random_weights(WanDiT, self.config, 0, **options, placement=placement)
        with torch.device("meta"):
            model = WanDiT(self.config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        return place(model, placement, StructuredTensors(shapes, self.device), **options)

    def linears(self, names: Sequence[str]) -> list[Linear]:
        """Returns linear layers of the first DiT layer, float32, on the device."""
        one = replace(self, config=replace(self.config, num_layers=1)).build(torch.float32, Placement())
        return _linears(one.blocks[0], names)


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint, whose DiT ``load`` gives in a dtype and a placement."""

    config: DiTConfig
    load: Callable[[torch.dtype, Placement], WanDiT]
    kind: str = "checkpoint"

    def build(self, dtype: torch.dtype, placement: Placement) -> WanDiT:
        """Returns the DiT in a form; matrices that the file holds in 8 bits of that form are taken as they are."""
        return self.load(dtype, placement)

    def linears(self, names: Sequence[str]) -> list[Linear]:
        """Returns linear layers of the middle DiT layer, float32; two layers at a time are on the device."""
        found: list[Linear] = []
        for i, layer in enumerate(self.load(torch.float32, Placement(resident=0, pinned=0)).walk()):
            if i == self.config.num_layers // 2:
                found = _linears(layer, names)
        return found


#: One DiT's weights before they are rounded, which every form is built of.
Weights = SyntheticWeights | CheckpointWeights


def _linears(layer: torch.nn.Module, names: Sequence[str]) -> list[Linear]:
    """Copies linear layers of a DiT layer, whose memory may be given to another layer next."""
    return [tuple(layer.get_parameter(f"{name}.{leaf}").clone() for leaf in ("weight", "bias")) for name in names]
