"""Channels stay last from the first layer to the last, as the operators that move data show, at 2K on empty tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model import VAEConfig
from model.config import PRESETS
from model.memory.vae_plan import meta_vae
from model.vae.model import WHOLE, _Decoding, _Encoding
from swifti2v_kernels import pretend_gpu

CONFIGS = {"2.1": VAEConfig(), "2.2": PRESETS["5b"].vae}
WIDTH, HEIGHT = 2560, 1408


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


def moves(version: str, part: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Moves, int]:
    """Returns what a settled latent frame moves in our kernels' operators, and the bytes that layers then remember."""
    monkeypatch.setenv("SWIFTI2V_BACKEND", "triton")
    config = CONFIGS[version]
    vae, stride = meta_vae(config, torch.bfloat16), config.spatial_stride
    if part == "decode":
        stream = _Decoding(vae, vae.decoder, WHOLE, None, torch.uint8)
        sizes = [(config.z_dim, 1, HEIGHT // stride, WIDTH // stride)] * 4
    else:
        stream = _Encoding(vae, vae.encoder, WHOLE, None)
        sizes = [(3, frames, HEIGHT, WIDTH) for frames in (1, 4, 4, 4)]
    with torch.no_grad(), pretend_gpu(90):
        for size in sizes:
            piece = torch.empty(1, *size, dtype=torch.bfloat16, device="meta")
            with Moves() as found:
                stream.run(piece, False)
    states = [stream.whole, *(tile.state for tile in stream.tiles)]
    return found, sum(x.nbytes for state in states for x in state.past.values())


@pytest.mark.parametrize("version", CONFIGS)
def test_a_decoded_frame_is_only_convolved_normed_and_remembered(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame is permuted, padded, concatenated, cast or added to by an operator of its own, but for the shortcuts of
    Wan2.2, which gather every so many channels.
    """
    found, remembered = moves(version, "decode", monkeypatch)
    written, copied = found.written, found.written.pop("copy_", 0)
    # The denormalised latents and the attention of the lowest resolution; clone and cat are the layers' histories.
    assert set(written) == {"addcmul", "addmm", "add", "clone", "cat"}
    assert written["clone"] + written["cat"] <= remembered
    if version == "2.1":
        assert written["addcmul"] + written["addmm"] + written["add"] < 2**28
        assert (copied, found.permuted) == (0, [])
    else:
        # Three shortcuts write the features that the stage then adds to: all that each stage makes, once.
        made = sum(frames * 4**i * channels for i, (frames, channels) in enumerate([(2, 1024), (4, 1024), (4, 512)], 1))
        assert copied == 2 * (HEIGHT // 16) * (WIDTH // 16) * made
        assert {name for name, _ in found.permuted} == {"copy_"}


@pytest.mark.parametrize("version", CONFIGS)
def test_the_encoder_permutes_the_pixels_that_it_is_given_and_nothing_else(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only colour pictures, folded 2 x 2 or not, are permuted, and what is small."""
    permuted = moves(version, "encode", monkeypatch)[0].permuted
    assert permuted  # so that a permuted tensor is counted as such
    assert all(size[-1] <= 12 or torch.Size(size).numel() < 2**22 for _, size in permuted), permuted
