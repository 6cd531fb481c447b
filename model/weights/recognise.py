"""Recognition of a checkpoint by the names of its tensors and its ``config.json``: Wan's parts, and other models."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import MASK_CHANNELS, DiTConfig, VAEConfig
from model.weights.lora_files import is_lora


@dataclass(frozen=True)
class Kind:
    """The kind of a checkpoint. ``part`` is its use in this project, or None, and ``lacks`` then says why."""

    name: str
    part: str | None
    lacks: str | None = None


_OUR_DIT = "this project's DiT has no"
#: Relatives of Wan, which have its keys and more: a key of theirs, its model, and the part that reads it. The first
#: three have keys that no other model has, and may come without Wan's in a file of their own.
_RELATIVES = (
    (r"^vace_(blocks|patch_embedding)\.", "Wan VACE", "control blocks (vace_blocks)"),
    (r"^(face_adapter|motion_encoder)\.", "Wan Animate", "face and motion branches (face_adapter, motion_encoder)"),
    (r"^casual_audio_encoder\.", "Wan S2V", "audio encoder (casual_audio_encoder)"),
    (r"^control_adapter\.", "Wan Fun Camera", "camera adapter (control_adapter)"),
    (r"^ref_conv\.", "Wan Fun Control", "convolution of a reference image (ref_conv)"),
    (r"^audio_proj\.", "Wan with an audio branch (MultiTalk, HuMo)", "audio branch (audio_proj)"),
)
#: Other families: a key that tells them, their names, and what they are built of.
_FAMILIES = (
    (r"^(audio_patchify_proj|av_ca_)", "LTX-2", "joint audio and video blocks (audio_patchify_proj)"),
    (r"^(patchify_proj\.|adaln_single\.)", "LTX-Video", "single adaptive norm (patchify_proj, adaln_single)"),
    (r"^txt_in\.individual_token_refiner\.", "HunyuanVideo", "token refiner and double blocks (double_blocks)"),
    (r"^context_embedder\.token_refiner\.", "HunyuanVideo", "token refiner and double blocks (token_refiner)"),
    (r"^patch_embed\.text_proj\.", "CogVideoX", "joint text and video tokens (patch_embed.text_proj)"),
    (r"^(blocks\.0\.attn\.qkv_x\.|time_embed\.pooler\.)", "Mochi", "joint text and video blocks"),
    (r"^double_blocks\.", "FLUX or a relative", "double blocks (double_blocks)"),
)
#: The encoders, which transformers loads: keys that tell them, their names, their parts, and transformers' types.
_ENCODERS = (
    (r"(^|\.)SelfAttention\.q\.weight$|^token_embedding\.weight$", "UMT5 text encoder", "text encoder", "umt5"),
    (r"class_embedding$|^visual\.cls_embedding$", "CLIP image encoder", "image encoder", "clip_vision_model"),
)
#: The parts that classes in config.json stand for. The Wan repositories have one config.json for all that lies beside
#: it, the VAE and the encoders too, so that their class stands for none. The last one is VideoX-Fun's.
_OUR_CLASSES = {
    "WanTransformer3DModel": "DiT",
    "AutoencoderKLWan": "VAE",
    "WanModel": None,
    "Wan2_2Transformer3DModel": "DiT",
}
_SIZES = {(1536, 30): "1.3B", (3072, 30): "5B", (5120, 40): "14B"}


def recognise(keys: Collection[str], config: Mapping[str, Any]) -> Kind | None:
    """Returns the kind of a checkpoint with these keys (without a repackager's prefix), or None if it is not known.

    The loaders and ``model.inspect`` both ask this, so that one cannot load what the other says does not.
    """
    if is_lora(keys):
        return Kind("LoRA", "LoRA")

    def any_key(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    is_wan = any_key(r"^patch_embedding\.weight$") and any_key(r"^blocks\.\d+\.(self_attn\.q|attn1\.to_q)\.")
    for pattern, name, lacks in _RELATIVES if is_wan else _RELATIVES[:3]:
        if any_key(pattern):
            return Kind(name, None, f"{_OUR_DIT} {lacks}")
    given = config.get("_class_name")
    if given and given not in _OUR_CLASSES:
        expected = f"expected one of {', '.join(_OUR_CLASSES)}"
        return Kind(f"{given} of diffusers", None, f"_class_name in config.json: {expected}, got {given!r}")
    is_vae = any_key(r"^encoder\.(conv_in|conv1)\.weight$") and any_key(r"^(post_quant_conv|conv2)\.weight$")
    if is_wan or is_vae:
        part = "DiT" if is_wan else "VAE"
        says = _OUR_CLASSES.get(given or "")
        other = says is not None and says != part
        return Kind(f"Wan {part}", part, f"config.json beside it is that of a {says} ({given})" if other else None)
    for pattern, name, lacks in _FAMILIES:
        if any_key(pattern):
            return Kind(name, None, f"{_OUR_DIT} {lacks}")
    for pattern, name, part, wanted in _ENCODERS:
        if any_key(pattern):
            said = config.get("model_type")
            missing = f"expected a directory as transformers saves it, its config.json with model_type {wanted!r}"
            lacks = _lacking_layers(keys, config) if said == wanted else f"{missing}, got {said!r}"
            return Kind(name, part, lacks)
    return None


def _lacking_layers(keys: Collection[str], config: Mapping[str, Any]) -> str | None:
    """Returns which layers an encoder of transformers, which would fill in random ones, lacks; None if none."""
    layers = {match[1] for key in keys if (match := re.search(r"encoder\.(?:block|layers)\.(\d+)\.", key))}
    wanted = config.get("num_layers", config.get("num_hidden_layers"))
    return None if len(layers) == wanted else f"config.json says {wanted} layers, the tensors are {len(layers)}"


def describe_dit(config: DiTConfig) -> str:
    """Returns the variant of a DiT in words: task, size and shape."""
    size = _SIZES.get((config.dim, config.num_layers), "own size")
    shape = f"width {config.dim}, {config.num_layers} layers, {config.in_channels} -> {config.out_channels} channels"
    return f"{_task(config, size)}, {size} ({shape})"


def _task(config: DiTConfig, size: str) -> str:
    if config.in_channels == config.out_channels:
        if config.out_channels == 48:
            return "Wan2.2 TI2V"
        return "T2V (Wan2.1, or an expert of Wan2.2 T2V-A14B)" if size == "14B" else "T2V"
    if config.in_channels == 2 * config.out_channels + MASK_CHANNELS:
        if config.pos_embed_seq_len is not None:
            return "I2V with CLIP, first and last frame (Wan2.1 FLF2V)"
        if config.image_dim is not None:
            return "I2V with CLIP (Wan2.1)"
        return "I2V without CLIP " + ("(an expert of Wan2.2 I2V-A14B)" if size == "14B" else "(Stage II of SwiftI2V)")
    return "another input than latents, mask and reference: for load_dit, not for model.generate"


def describe_vae(config: VAEConfig) -> str:
    """Returns version and strides of a VAE in words."""
    version = "2.2" if config.residual else "2.1"
    return (
        f"version {version} ({config.temporal_stride}x{config.spatial_stride}x{config.spatial_stride},"
        f" {config.z_dim} channels)"
    )
