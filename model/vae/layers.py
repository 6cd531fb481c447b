"""The layers of the Wan VAE, on the operators of ``swifti2v_kernels``.

Activations are frames ``[B, T, h, w, C]``, channels last from the latents to the pixels, over a region of the frame.
A layer is told the region that the next one needs (``want``) and takes from its input what it needs for that, where it
lies. Between calls, a layer's history is in the :class:`State` of the tile and clip; the modules hold weights only.

Norms belong to the operators before them: a convolution is told the weight of the norm that follows and returns the
normed and activated frames besides, or instead of, its own. Where activations come and go is written out
(:class:`Features`), because a frame at 2560x1408 with 96 channels is 0.7 GB and Python keeps what a caller names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.machine.finite import Finite
from model.vae.tiles import Region, conv_padding
from swifti2v_kernels import causal_conv3d, fold_upsample_weight, norm_modulate, rms_norm_silu, upsample_conv2d


@dataclass
class Features:
    """Frames on their way through the layers: ``x`` as summed, ``normed`` as the next convolution reads them."""

    x: Tensor | None
    normed: Tensor | None
    region: Region

    def take(self, name: str) -> Tensor:
        """Hands ``x`` or ``normed`` over: it is gone from here, so that its last reader can let it go."""
        tensor = getattr(self, name)
        setattr(self, name, None)
        return tensor


@dataclass
class State:
    """The history of a clip in the layers of one tile: their last frames, and frames that wait for a partner."""

    #: Folded weights of upsampling, by module; shared by all tiles of a stream.
    folded: dict[nn.Module, Tensor]
    past: dict[nn.Module, Tensor] = field(default_factory=dict)
    waiting: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    started: set[nn.Module] = field(default_factory=set)

    def remember(self, module: nn.Module, frames: Tensor, count: int) -> None:
        """Keeps the last ``count`` frames that ``module`` has read, without a copy where they fill their memory."""
        if count == 0:
            return
        last, before = frames[:, -count:], self.past.get(module)
        if last.shape[1] < count and before is not None:
            last = torch.cat((before[:, last.shape[1] - count :], last), dim=1)
        elif last.untyped_storage().nbytes() > last.numel() * last.element_size():
            last = last.clone(memory_format=torch.contiguous_format)
        self.past[module] = last

    def first(self, module: nn.Module) -> bool:
        """Returns whether ``module`` is at the clip's first frame; it asks once in each of its calls."""
        if module in self.started:
            return False
        self.started.add(module)
        return True

    def clear(self) -> None:
        """Forgets all frames, since the clip has ended."""
        self.past, self.waiting = {}, {}

    def move(self, how: Callable[[Any], Any]) -> None:
        """Replaces every tensor by ``how`` of it, which brings it to host memory or back."""
        self.past = {module: how(x) for module, x in self.past.items()}
        self.waiting = {module: [how(x) for x in parts] for module, parts in self.waiting.items()}


class Level(NamedTuple):
    """The regions that one stage works on for a tile: its input, what is between its two halves, and its result."""

    read: Region
    middle: Region
    result: Region


def levels_of(steps: Sequence[tuple[Any, Any]], want: Region) -> list[Level]:
    """Returns the regions that stages work on, one after the other, for the result ``want``.

    ``steps`` are the two halves of each stage, which have a method ``needs``.
    """
    levels: list[Level] = []
    for first, second in reversed(steps):
        middle = second.needs(want)
        levels.insert(0, Level(first.needs(middle), middle, want))
        want = levels[0].read
    return levels


@dataclass(frozen=True)
class Tile:
    """A tile on its way through a clip.

    ``core`` is its part of the latents, ``source`` the region of the input that it reads, ``levels`` has the regions of
    each stage, and ``frames`` is the number of frames that layers handle at once. ``finite`` judges the decoder's last
    features, since pixels of 8 bits have no NaN.
    """

    core: Region
    source: Region
    levels: list[Level]
    frames: int
    state: State
    finite: Finite = field(default_factory=lambda: Finite("the VAE's decoder"))


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that is padded in time at the front only, by zeros or by the frames that the state remembers."""

    def needs(self, want: Region) -> Region:
        """Returns the region of the input that the output ``want`` depends on."""
        return want.grown(self.kernel_size[1] // 2)

    def forward(self, x: Tensor, have: Region, want: Region, state: State, **options: Any) -> Any:
        """Returns ``[B, T, h', w', C']`` over ``want`` of ``x`` ``[B, T, h, w, C]`` over ``have``.

        ``options`` are those of :func:`swifti2v_kernels.causal_conv3d`.
        """
        padding = conv_padding(have, want, self.kernel_size[1] // 2)
        y = causal_conv3d(x, self.weight, self.bias, past=state.past.get(self), padding=padding, **options)
        state.remember(self, x, self.kernel_size[0] - 1)
        return y


class RMSNorm(nn.Module):
    """The weight of a norm ``x / |x| * sqrt(C) * gamma`` over channels, which the operators compute."""

    def __init__(self, dim: int, spatial_dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims))

    @property
    def weight(self) -> Tensor:
        """The norm's weight ``[C]``."""
        return self.gamma.flatten()


class ResidualBlock(nn.Module):
    """A residual block: twice norm, SiLU and convolution, added to the input or its projection."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim_in), RMSNorm(dim_out)
        self.conv1 = CausalConv3d(dim_in, dim_out, (3, 3, 3))
        self.conv2 = CausalConv3d(dim_out, dim_out, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(dim_in, dim_out, (1, 1, 1)) if dim_in != dim_out else None

    def needs(self, want: Region) -> Region:
        """Returns the region of the input that the output ``want`` depends on."""
        return self.conv1.needs(self.conv2.needs(want))

    def forward(
        self, features: Features, want: Region, state: State, norm: RMSNorm | None, *, overwrite: bool, keep: bool
    ) -> None:
        """Replaces the features by the result, which is normed by ``norm`` too if there is one.

        Args:
            features: the input, normed by :attr:`norm1`, and its sum ``x``.
            want: the region of the result.
            state: the state of the tile.
            norm: the norm before the next convolution.
            overwrite: whether the result may take the memory of ``x``.
            keep: whether the sum is needed besides the normed frames.
        """
        have, middle = features.region, self.conv2.needs(want)
        hidden = self.conv1(features.take("normed"), have, middle, state, norm_weight=self.norm2.weight, keep_sum=False)
        x = want.part_of(features.take("x"), have)
        if self.conv_shortcut is not None:
            x, overwrite = self.conv_shortcut(x, want, want, state), True
        options: dict[str, Any] = {"residual": x, "out": x if overwrite and keep else None}
        if norm is not None:
            options |= {"norm_weight": norm.weight, "keep_sum": keep}
        result = self.conv2(hidden, middle, want, state, **options)
        features.region = want
        if norm is None:
            features.x = result
        elif keep:
            features.x, features.normed = result
        else:
            features.normed = result


class ResidualBlocks(nn.ModuleList):
    """Residual blocks in a row, of which the first changes the number of channels."""

    def __init__(self, dim_in: int, dim_out: int, count: int):
        super().__init__(ResidualBlock(dim_out if i else dim_in, dim_out) for i in range(count))

    def needs(self, want: Region) -> Region:
        """Returns the region of the input that the output ``want`` depends on."""
        for resnet in reversed(self):
            want = resnet.needs(want)
        return want

    def forward(
        self, features: Features, want: Region, state: State, norm: RMSNorm | None, *, overwrite: bool,
        keep: bool = True,
    ) -> None:  # fmt: skip
        """Replaces the features by the result; arguments are those of :class:`ResidualBlock`."""
        resnets, regions, norms = list(self), [want], [norm]
        for resnet in reversed(resnets[1:]):  # each computes just what the next one reads
            regions.insert(0, resnet.needs(regions[0]))
            norms.insert(0, resnet.norm1)
        for i, (resnet, region, following) in enumerate(zip(resnets, regions, norms, strict=True)):
            # Only the input of the first one may be read by others, and only the last one's sum may be let go.
            options = {"overwrite": overwrite or i > 0, "keep": keep or i + 1 < len(resnets)}
            resnet(features, region, state, following, **options)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of each frame, added to its input."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, spatial_dims=2)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the result for whole frames ``x`` ``[B, T, h, w, C]``, in the same shape."""
        tokens = x.flatten(2, 3).flatten(0, 1)
        # The mean square of a pixel is bounded from below by what diffusers bounds its length with.
        y = norm_modulate(tokens, norm="rms", weight=self.norm.weight, eps=1e-24 / tokens.shape[2])
        q, k, v = F.linear(y, self.to_qkv.weight.flatten(1), self.to_qkv.bias).unsqueeze(1).chunk(3, dim=3)
        # On meta tensors, where only memory is counted, torch would take attention apart and count its matrix.
        out = q.new_empty(q.shape) if x.is_meta else F.scaled_dot_product_attention(q, k, v)
        del q, k, v, y
        return (tokens + F.linear(out.squeeze(1), self.proj.weight.flatten(1), self.proj.bias)).view(x.shape)


class MidBlock(nn.Module):
    """A residual block, attention and a residual block at the lowest resolution, on whole frames."""

    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(dim, dim) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, features: Features, state: State, norm: RMSNorm, *, keep: bool) -> None:
        """Replaces the features by the result; arguments are those of :class:`ResidualBlock`."""
        first, last = self.resnets
        first(features, features.region, state, None, overwrite=True, keep=True)
        features.x = self.attentions[0](features.take("x"))
        features.normed = rms_norm_silu(features.x, last.norm1.weight)
        last(features, features.region, state, norm, overwrite=True, keep=keep)


class Downsample(nn.Module):
    """A layer that halves the frame's sides and, if ``temporal``, the frame rate after the clip's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        # The first entry pads in diffusers; here it only keeps the names of the weights.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def needs(self, want: Region) -> Region:
        """Returns the region of the input that ``want`` depends on: rows 2r, 2r + 1 and 2r + 2 for row r."""
        doubled = want.scaled(2)
        return Region(*(type(s)(s.start, min(s.stop + 1, s.size), s.size) for s in doubled))

    def forward(self, x: Tensor, have: Region, want: Region, state: State, **options: Any) -> Any:
        """Returns ``[B, T', h', w', C]`` over ``want`` of ``x`` ``[B, T, h, w, C]`` over ``have``.

        Where time is halved too, T is 1 for the clip's first frame and even after it. ``options`` are those of
        :func:`swifti2v_kernels.causal_conv3d`.
        """
        rows, columns = have
        padding = (
            rows.start - 2 * want.rows.start, 2 * want.rows.stop + 1 - rows.stop,
            columns.start - 2 * want.columns.start, 2 * want.columns.stop + 1 - columns.stop,
        )  # fmt: skip
        conv, later = self.resample[1], self.time_conv

        def halve(**options: Any) -> Any:
            return causal_conv3d(x, conv.weight.unsqueeze(2), conv.bias, stride=(1, 2, 2), padding=padding, **options)

        if later is None:
            return halve(**options)
        y = halve()
        if state.first(self):
            # The clip's first frame passes as it is and is the history of the next ones.
            state.remember(later, y, 1)
            return halve(**options) if options else y
        past = state.past[later]
        result = causal_conv3d(y, later.weight, later.bias, past=past, stride=(2, 1, 1), **options)
        state.remember(later, y, 1)
        return result


class Upsample(nn.Module):
    """A layer that doubles the frame's sides and, if ``temporal``, the frame rate after the clip's first frame."""

    def __init__(self, dim: int, dim_out: int, temporal: bool):
        super().__init__()
        # The first entry upsamples in diffusers; here it only keeps the names of the weights.
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(dim, dim_out, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def needs(self, want: Region) -> Region:
        """Returns the region of the input that the output ``want`` depends on."""
        return want.grown(1).halved()

    def double_frames(self, x: Tensor, have: Region, want: Region, state: State) -> Tensor:
        """Returns ``[B, 2T, h', w', C]`` over ``want`` of ``x`` ``[B, T, h, w, C]``: two frames of each.

        The clip's first frame stays one. The layer must be ``temporal``.
        """
        conv = self.time_conv
        if state.first(self):
            # The first frame is neither doubled nor part of the history of the second.
            return want.part_of(x, have)
        batch, frames, _, _, channels = x.shape
        past = state.past.get(conv)
        out = x.new_empty(batch, 2 * frames, len(want.rows), len(want.columns), channels)
        for i, (w, b) in enumerate(zip(conv.weight.chunk(2), conv.bias.chunk(2), strict=True)):
            # Each half of the features is every second frame and is written there.
            causal_conv3d(x, w, b, past=past, padding=conv_padding(have, want, 0), out=out[:, i::2])
        state.remember(conv, x, 2)
        return out

    def enlarge(self, x: Tensor, have: Region, want: Region, state: State, **options: Any) -> Any:
        """Returns ``[B, T, h', w', C']`` of ``x`` ``[B, T, h, w, C]``: the region ``want`` of frames twice as large.

        ``options`` are those of :func:`swifti2v_kernels.upsample_conv2d`.
        """
        conv = self.resample[1]
        if conv not in state.folded:
            state.folded[conv] = fold_upsample_weight(conv.weight)
        padding = conv_padding(have.scaled(2), want)
        return upsample_conv2d(x, state.folded[conv], conv.bias, padding=padding, **options)
