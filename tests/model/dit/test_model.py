"""The DiT against diffusers' ``WanTransformer3DModel`` on random weights, loaded from a directory diffusers saved."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from model import WanDiT, load_dit
from model.weights.load import random_weights
from tests.conftest import TINY_DIT
from tests.support.tolerances import BFLOAT16_MODEL, PARITY, relative_error

BASE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
VARIANTS = {
    "wan2.1 T2V": {},
    "wan2.1 T2V, real head size": {
        "attention_head_dim": 128,
        "freq_dim": 256,
        "ffn_dim": 512,
        "num_attention_heads": 3,
    },
    "wan2.1 I2V with CLIP": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48},
    "wan2.1 FLF2V": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 48, "pos_embed_seq_len": 514},
    "CLIP without own keys": {"in_channels": 36, "image_dim": 20},
    "wan2.2 A14B, Stage II": {"in_channels": 36},
    "wan2.2 TI2V-5B": {"in_channels": 48, "out_channels": 48},
    "Stage II of 5B": {"in_channels": 100, "out_channels": 48},
    "no cross-attention norm": {"cross_attn_norm": False, "eps": 1e-5},
}
SIZES = [(1, 1, 4, 6), (2, 3, 6, 10), (1, 5, 2, 2), (1, 2, 14, 8)]


def saved_diffusers_dit(path, **config):
    """Saves a diffusers model with non-trivial norms and biases in shards to ``path``."""
    model = WanTransformer3DModel(**{**BASE, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, max_shard_size="100KB")
    return model


class MaskedProcessor(WanAttnProcessor):
    """The attention processor of diffusers with a dense mask on self-attention."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        mask = self.mask if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def diffusers_window(theirs, latents, timestep, text, index, blind=0):
    """Returns what diffusers makes of blocks at these indices, each with its timestep; the first ones are ``blind``.

    Its rotary table is rearranged to these frames; blind blocks see blind blocks only.
    """
    num_blocks, (height, width) = len(index), latents.shape[3:]
    tokens = height * width // 4
    tables = theirs.rope(latents.new_empty(1, 1, max(index) + 1, height, width))
    window = tuple(table.unflatten(1, (-1, tokens))[:, index].flatten(1, 2) for table in tables)
    mask = torch.ones(num_blocks * tokens, num_blocks * tokens, dtype=torch.bool)
    mask[: blind * tokens, blind * tokens :] = False
    theirs.set_attn_processor(MaskedProcessor(mask))
    with torch.no_grad(), patch.object(theirs.rope, "forward", lambda _: window):
        return theirs(latents, timestep.repeat_interleave(tokens, dim=1), text).sample


def image_tokens(config, batch):
    if config.image_dim is None:
        return None
    # diffusers takes the first and the last frame's tokens stacked on the batch axis.
    return torch.randn(batch * (1 if config.pos_embed_seq_len is None else 2), 257, config.image_dim)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_block", [False, True], ids=["one timestep", "timestep per block"])
def test_equals_diffusers(variant, per_block, tmp_path):
    """The DiT equals diffusers', which is given a block's own timestep for every token of the block."""
    theirs = saved_diffusers_dit(tmp_path, **VARIANTS[variant])
    ours = load_dit(tmp_path)
    for batch, num_blocks, height, width in SIZES:
        latents = torch.randn(batch, theirs.config.in_channels, num_blocks, height, width)
        text, image = torch.randn(batch, 512, 32), image_tokens(theirs.config, batch)
        timestep = torch.rand(batch, num_blocks) * 1000
        timestep[:, 0] = 0
        if not per_block:
            timestep = timestep[:, -1] + 1
        per_token = timestep.repeat_interleave(height * width // 4, dim=1) if per_block else timestep
        with torch.no_grad():
            expected = theirs(latents, per_token, text, image).sample
        assert relative_error(ours(latents, timestep, text, image), expected) < PARITY


def test_block_index_rotates_a_window_as_in_the_whole_clip(tmp_path):
    """Blocks at indices 0, 5, 6 equal diffusers run with its rotary table rearranged to these frames."""
    theirs = saved_diffusers_dit(tmp_path)
    ours = load_dit(tmp_path)
    index = [0, 5, 6]
    latents, text, timestep = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 512, 32), torch.tensor([500.0])
    expected = diffusers_window(theirs, latents, torch.full((1, 3), 500.0), text, index)
    assert relative_error(ours(latents, timestep, text, block_index=index), expected) < PARITY
    assert relative_error(ours(latents, timestep, text), expected) > 100 * PARITY


def test_bfloat16_keeps_small_parameters_in_float32_and_stays_near_float32(tmp_path):
    saved_diffusers_dit(tmp_path)
    ours, half = load_dit(tmp_path), load_dit(tmp_path, dtype=torch.bfloat16)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    expected = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in half.named_parameters()} == expected
    latents, text, timestep = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 512, 32), torch.tensor([500.0])
    result = half(latents, timestep, text)
    assert result.dtype == torch.bfloat16
    assert relative_error(result, ours(latents, timestep, text)) < BFLOAT16_MODEL


def test_images_that_no_text_belongs_to_are_refused():
    dit = random_weights(WanDiT, replace(TINY_DIT, image_dim=8, added_kv=True), 1)
    arguments = torch.zeros(1, 12, 1, 4, 6), torch.zeros(1), torch.zeros(1, 7, 16)
    with pytest.raises(ValueError, match="image: expected as many batch entries as text, got 2 for 1 of text"):
        dit(*arguments, torch.zeros(2, 257, 8))


def test_weights_that_ask_for_gradients_are_refused_by_name(tiny_dit):
    arguments = torch.randn(1, 12, 1, 4, 6), torch.tensor([500.0]), torch.randn(1, 7, 16)
    tiny_dit.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"WanDiT is for inference: call it under torch.no_grad\(\)"):
        tiny_dit(*arguments)
    with torch.no_grad():
        assert tiny_dit(*arguments).shape == (1, 4, 1, 4, 6)


@pytest.mark.slow
def test_compiles_as_one_graph():
    """A DiT compiles as one graph; layers are alike, so one of them is as good as many."""
    model = random_weights(WanDiT, replace(TINY_DIT, num_layers=1), 1)
    arguments = torch.randn(1, 12, 3, 4, 6), torch.tensor([[0.0, 500.0, 500.0]]), torch.randn(1, 7, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*arguments), model(*arguments)) < PARITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 11, 3, 4, 6)}, r"latents: expected \[B, 12, T, h, w\]"),
        ({"latents": torch.zeros(1, 12, 3, 4, 5)}, "latents: 4 x 5 is not a multiple of the patch 2 x 2"),
        ({"timestep": torch.zeros(1, 2)}, r"timestep: expected \[1\] or \[1, 3\]"),
        ({"text": torch.zeros(1, 7, 15)}, r"text: expected \[1, L, 16\]"),
        ({"image": torch.zeros(1, 257, 8)}, "image: expected None"),
        ({"block_index": [0, 1]}, "block_index: expected 3 indices, got 2"),
    ],
)
def test_names_the_argument_that_does_not_fit(tiny_dit, change, message):
    arguments = {
        "latents": torch.zeros(1, 12, 3, 4, 6),
        "timestep": torch.zeros(1),
        "text": torch.zeros(1, 7, 16),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        tiny_dit(**arguments)
