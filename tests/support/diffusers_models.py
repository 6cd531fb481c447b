"""Tiny random video models of diffusers, one of every kind that the integration knows, with inputs for them.

``head_dim`` 12 to 24 as in diffusers' own tests, or 64, which our kernels take in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor, nn

FRAMES, HEIGHT, WIDTH = 3, 4, 6  # of the latents
VERSION = tuple(map(int, diffusers.__version__.split(".")[:2]))


def needs_group_offload() -> None:
    """Skips a test where diffusers is older than 0.41, which offloads groups where there is an accelerator only."""
    if VERSION < (0, 41) and not torch.accelerator.is_available():
        pytest.skip(f"diffusers {diffusers.__version__} offloads groups where there is an accelerator only")


class Model(NamedTuple):
    """One kind of model: its name in the documentation, how it is made for a head_dim, and inputs for a forward."""

    name: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]


def build(model: Model, head_dim: int, seed: int = 0) -> nn.Module:
    """Returns a model in evaluation mode and float32; biases, norms and modulation tables are no longer trivial."""
    torch.manual_seed(seed)
    module = model.make(head_dim).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or "pos_frequencies" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def run(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Returns the sample, without gradients."""
    with torch.no_grad():
        return module(**inputs, return_dict=False)[0]


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, Any]:
    """Returns nine tokens of text, of which the second entry has four, and two timesteps."""
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).to(torch.int64)
    tokens = {"encoder_hidden_states": _noise(2, 9, 16), "encoder_attention_mask": mask}
    return tokens | {"timestep": torch.tensor([900, 300])}


def _transformer(kind: str, head_dim: int, config: dict[str, Any]) -> nn.Module:
    kind = f"{kind}Transformer3DModel"
    return getattr(diffusers, kind)(num_attention_heads=2, attention_head_dim=head_dim, **config)


def _wan(head_dim: int, kind: str = "Wan", **options: Any) -> nn.Module:
    config = {"in_channels": 16, "out_channels": 16, "num_layers": 2, "cross_attn_norm": True, "patch_size": (1, 2, 2)}
    config |= {"text_dim": 16, "freq_dim": 32, "ffn_dim": 48, "rope_max_seq_len": 32}
    return _transformer(kind, head_dim, config | options)


def _wan_inputs(module: nn.Module, text: int = 9, per_token: bool = False) -> dict[str, Any]:
    tokens = FRAMES * HEIGHT * WIDTH // 4
    time = torch.tensor([900.0, 300.0])
    inputs = {
        "hidden_states": _noise(2, module.config.in_channels, FRAMES, HEIGHT, WIDTH),
        "timestep": time[:, None] * (torch.arange(tokens) >= tokens // FRAMES) if per_token else time,
        "encoder_hidden_states": _noise(2, text, 16),
    }
    if module.config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = _noise(2, 5, module.config.image_dim)
    return inputs


def _vace_inputs(module: nn.Module) -> dict[str, Any]:
    control = _noise(2, module.config.vace_in_channels, FRAMES, HEIGHT, WIDTH)
    return _wan_inputs(module) | {"control_hidden_states": control}


def _animate(head_dim: int) -> nn.Module:
    config = {"in_channels": 36, "latent_channels": 16, "image_dim": 16, "motion_encoder_size": 16}
    config |= {"motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_style_dim": 8, "motion_dim": 4}
    config |= {"motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2}
    return _wan(head_dim, "WanAnimate", inject_face_latents_blocks=2, **config)


def _animate_inputs(module: nn.Module) -> dict[str, Any]:
    return {name: value[:1] for name, value in _wan_inputs(module).items()} | {
        "pose_hidden_states": _noise(1, 16, FRAMES - 1, HEIGHT, WIDTH),
        "face_pixel_values": _noise(1, 3, 4 * (FRAMES - 2) + 1, 16, 16),
    }


def _hunyuan(head_dim: int, kind: str = "HunyuanVideo", **options: Any) -> nn.Module:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1}
    config |= {"patch_size": 2, "patch_size_t": 1, "text_embed_dim": 16, "pooled_projection_dim": 8}
    axes = {12: (4, 4, 4), 64: (8, 28, 28)}[head_dim]
    return _transformer(kind, head_dim, config | {"rope_axes_dim": axes} | options)


def _hunyuan_inputs(module: nn.Module) -> dict[str, Any]:
    return {
        "hidden_states": _noise(2, module.config.in_channels, FRAMES, HEIGHT, WIDTH),
        **_text(),
        "pooled_projections": _noise(2, 8),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }


def _framepack(head_dim: int) -> nn.Module:
    config = {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}
    return _hunyuan(head_dim, "HunyuanVideoFramepack", **config)


def _framepack_inputs(module: nn.Module) -> dict[str, Any]:
    # Its coarsest history has patches of 4 x 8 x 8.
    inputs = _hunyuan_inputs(module) | {"hidden_states": _noise(2, 4, FRAMES, 8, 8), "image_embeds": _noise(2, 5, 16)}
    inputs["indices_latents"] = torch.tensor([2, 3, 4])
    for name, count in (("clean", 2), ("history_2x", 2), ("history_4x", 4)):
        inputs |= {f"latents_{name}": _noise(2, 4, count, 8, 8), f"indices_latents_{name}": torch.arange(count)}
    return inputs


def _ltx(head_dim: int) -> nn.Module:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 16}
    return _transformer("LTXVideo", head_dim, config | {"cross_attention_dim": 2 * head_dim})


def _ltx_inputs(module: nn.Module, per_token: bool = False) -> dict[str, Any]:
    tokens = FRAMES * HEIGHT * WIDTH
    time = torch.tensor([[900.0], [300.0]])
    return {
        "hidden_states": _noise(2, tokens, 4),
        **_text(),
        "timestep": time * (torch.arange(tokens) >= tokens // FRAMES) if per_token else time[:, 0],
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "rope_interpolation_scale": (0.4, 32, 32),
    }


def _cogvideox(head_dim: int, rotary: bool = True) -> nn.Module:
    config = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2}
    config |= {"sample_width": WIDTH, "sample_height": HEIGHT, "sample_frames": 4 * (FRAMES - 1) + 1, "patch_size": 2}
    config |= {"temporal_compression_ratio": 4, "max_text_seq_length": 9}
    return _transformer("CogVideoX", head_dim, config | {"use_rotary_positional_embeddings": rotary})


def _cogvideox_inputs(module: nn.Module) -> dict[str, Any]:
    inputs = _text() | {"hidden_states": _noise(2, FRAMES, 4, HEIGHT, WIDTH)}
    del inputs["encoder_attention_mask"]
    if module.config.use_rotary_positional_embeddings:
        angle = _noise(FRAMES * HEIGHT * WIDTH // 4, module.config.attention_head_dim // 2).repeat_interleave(2, dim=1)
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    return inputs


MODELS = {
    model.name: model
    for model in (
        Model("Wan 2.1 text-to-video", _wan, _wan_inputs),
        Model(
            "Wan 2.1 image-to-video (CLIP)",
            lambda d: _wan(d, in_channels=36, image_dim=16, added_kv_proj_dim=2 * d),
            lambda module: _wan_inputs(module, text=512),
        ),
        Model("Wan 2.2 A14B", lambda d: _wan(d, in_channels=36), _wan_inputs),
        Model(
            "Wan 2.2 TI2V-5B",
            lambda d: _wan(d, in_channels=48, out_channels=48),
            lambda module: _wan_inputs(module, per_token=True),
        ),
        Model(
            "Wan VACE",
            lambda d: _wan(d, "WanVACE", vace_layers=[0], vace_in_channels=8),
            _vace_inputs,
        ),
        Model("Wan Animate", _animate, _animate_inputs),
        Model("HunyuanVideo", _hunyuan, _hunyuan_inputs),
        Model(
            "HunyuanVideo image-to-video (latent_concat)",
            lambda d: _hunyuan(d, in_channels=8, image_condition_type="latent_concat"),
            _hunyuan_inputs,
        ),
        Model(
            "HunyuanVideo image-to-video (token_replace)",
            lambda d: _hunyuan(d, image_condition_type="token_replace"),
            _hunyuan_inputs,
        ),
        Model("HunyuanVideo FramePack", _framepack, _framepack_inputs),
        Model("LTX-Video", _ltx, _ltx_inputs),
        Model("LTX-Video (a timestep per token)", _ltx, lambda module: _ltx_inputs(module, per_token=True)),
        Model("CogVideoX", _cogvideox, _cogvideox_inputs),
        Model("CogVideoX 2B (no rotation)", lambda d: _cogvideox(d, rotary=False), _cogvideox_inputs),
    )
    # Diffusers has it since 0.36.
    if model.make is not _animate or hasattr(diffusers, "WanAnimateTransformer3DModel")
}
#: Of diffusers' own tests where it fits every axis of the rotation.
HEAD_DIM = {name: 12 if name.startswith("Hunyuan") else 24 for name in MODELS} | {"Wan Animate": 12}


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model in evaluation mode, and its inputs."""
    module = build(MODELS[name], HEAD_DIM[name])
    return module, MODELS[name].inputs(module)
