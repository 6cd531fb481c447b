"""Channels stay last from the first layer to the last, as the operators that move data show, at 2K on empty tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.vae.layers import settle, settled_layers
from bench.vae.shapes import SHAPES, Shape

#: The most channels of a colour picture, which is folded 2 x 2 or not.
COLOURS = 12


class Moves(TorchDispatchMode):
    """A count of bytes written by torch's own operators, and of the tensors that they copy in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.written: Counter[str] = Counter()
        self.permuted: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        name = name.split(".")[0]
        makes_nothing = name in ("empty", "new_empty", "empty_like", "_unsafe_view")
        if namespace == "swifti2v" or func.is_view or makes_nothing or not isinstance(result, Tensor):
            return result
        self.written[name] += result.nbytes
        if name in ("clone", "copy_", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            if source.stride(-1) != 1 and source.shape[-1] > 1:
                self.permuted.append((name, tuple(source.shape)))
        return result


def moves(shape: Shape, part: str) -> Moves:
    with Moves() as found:
        settle(shape, part, lambda: (found.written.clear(), found.permuted.clear()))
    return found


def at_2k(version: str) -> Shape:
    return next(shape for shape in SHAPES if str(shape) == f"{version}, 2K, 81 frames")


def history_bytes(shape: Shape, part: str) -> int:
    """Returns the bytes of the frames that layers remember: each as many as its taps in time less its step in time."""
    layers = settled_layers(shape, part)
    return sum(calls * layer.past * 2 * layer.height * layer.width * layer.channels for layer, calls in layers.items())


def test_a_decoded_frame_is_only_convolved_normed_and_remembered() -> None:
    """No frame of Wan2.1's decoder is permuted, padded, concatenated, cast or added to by an operator of its own."""
    shape = at_2k("2.1")
    found = moves(shape, "decode")
    # The denormalised latents and the attention of the lowest resolution; clone and cat are the layers' histories.
    assert set(found.written) == {"addcmul", "addmm", "add", "clone", "cat"}
    assert found.written["clone"] + found.written["cat"] <= history_bytes(shape, "decode")
    assert found.written["addcmul"] + found.written["addmm"] + found.written["add"] < 2**28
    assert found.permuted == []


def test_wan_2_2_s_shortcuts_are_all_that_is_copied_besides() -> None:
    shape = at_2k("2.2")
    found = moves(shape, "decode")
    assert set(found.written) == {"addcmul", "addmm", "add", "clone", "cat", "copy_"}
    assert found.written["clone"] + found.written["cat"] <= history_bytes(shape, "decode")
    # Three shortcuts write the features that the stage then adds to: all that each stage makes, once.
    rows, columns = shape.latent_size
    made = sum(frames * 4**i * channels for i, (frames, channels) in enumerate([(2, 1024), (4, 1024), (4, 512)], 1))
    assert found.written["copy_"] == 2 * rows * columns * made
    # They gather every so many channels.
    assert {name for name, _ in found.permuted} == {"copy_"}


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_the_encoder_permutes_the_pixels_that_it_is_given_and_nothing_else(version: str) -> None:
    found = moves(at_2k(version), "encode")
    assert all(size[-1] <= COLOURS or torch.Size(size).numel() < 2**22 for _, size in found.permuted), found.permuted
    assert found.permuted


def test_kernels_are_given_no_copies() -> None:
    """A permuted tensor is counted as such, so that the tests above can fail."""
    x = torch.empty(1, 8, 4, 6, 16, device="meta").permute(0, 2, 3, 4, 1)
    with Moves() as found:
        y: Tensor = x.contiguous()
    assert found.permuted == [("clone", (1, 4, 6, 16, 8))]
    assert found.written["clone"] == y.nbytes
