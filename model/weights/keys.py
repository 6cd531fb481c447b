"""Names of tensors, from the Wan repositories' own to diffusers', and configurations from the shapes of tensors.

The modules here carry diffusers' names, so a diffusers checkpoint needs no map. Original checkpoints (also as
repackaged for ComfyUI, with a prefix) are renamed by the tables below. Mind that the original's ``norm3`` is the norm
before cross-attention, which is ``norm2`` in diffusers. What a shape cannot tell (heads, epsilon, latent statistics)
comes from the original's ``config.json`` or from the published models, as the depth of a VAE does. LoRA files use the
same names, also with underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from model.config import PRESETS, DiTConfig, VAEConfig, check_count
from model.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

#: The number of a stage in a key; longer ones number nothing, and Python refuses to make integers of the longest.
_INDEX = r"\d{1,4}"

#: What programs that save a DiT or a LoRA write before its names, several of these after each other too.
_PREFIXES = re.compile(
    r"(?:(?:base_model\.model|model|diffusion_model|first_stage_model|vae|transformer(?:_2)?|pipe\.dit|dit|module)\."
    r"|lora_(?:unet|transformer)_+|lycoris_+)*"
)
#: Modules that torch puts around others, also inside a model: by compiling, sharding, checkpointing.
_WRAPPERS = re.compile(r"(?:\b|(?<=_))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")
#: Prefixes of the parts in files that hold a whole pipeline, as ComfyUI saves its checkpoints.
PARTS = {
    "DiT": ("model.diffusion_model.",),
    "VAE": ("first_stage_model.", "vae."),
    "text encoder": ("text_encoders.", "cond_stage_model.", "conditioner."),
    "image encoder": ("clip_vision.",),
}

_PROJECTIONS = {name: f"to_{name}" for name in "qkv"} | {"o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
#: The modules of a DiT's layer, by the names of the Wan repositories; and its table, which is a parameter.
_LAYER = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _PROJECTIONS.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _PROJECTIONS.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_EMBEDDER = "condition_embedder"
#: The same for what is in no layer.
_OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
    "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
    "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
    "img_emb.emb_pos": f"{_EMBEDDER}.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
#: Those of all these that are parameters themselves.
_TABLES = ("blocks.0.modulation", "head.modulation", "img_emb.emb_pos")

#: What comes next in a key of a resampler, which a residual block has not.
_RESAMPLER = r"(?=resample\.|time_conv\.)"
#: The stages of the VAE of version 2.2, whose blocks have numbers of their own.
_STAGE = r"^(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\."
_VAE_RULES = [
    (rf"{_STAGE}\d+\.{_RESAMPLER}", r"\1.\2_blocks.\3.\2sampler."),
    (rf"{_STAGE}(\d+)\.", r"\1.\2_blocks.\3.resnets.\4."),
    (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
]


def _flat_names() -> dict[str, str]:
    """Returns this project's names of all parameters, layer 0's for all layers, by either name without its dots."""
    found = {}
    layer = {f"blocks.0.{theirs}": f"blocks.0.{ours}" for theirs, ours in _LAYER.items()}
    for theirs, ours in {**_OUTER, **layer}.items():
        for leaf in [""] if theirs in _TABLES else [".weight", ".bias"]:
            for name in (theirs, ours):
                found[f"{name}{leaf}".replace(".", "_")] = ours + leaf
    return found


_FLAT_NAMES = _flat_names()


def dit_parameter(name: str) -> str | None:
    """Returns this project's name of a Wan DiT's parameter, or None if there is none.

    Args:
        name: under either naming, with underscores for some or all of its dots, as LoRA files may write them.
    """
    flat = name.replace(".", "_")
    layer = re.match(rf"blocks_({_INDEX})_", flat)
    if layer is None:
        return _FLAT_NAMES.get(flat)
    found = _FLAT_NAMES.get(f"blocks_0_{flat[layer.end() :]}")
    return None if found is None else found.replace("blocks.0", f"blocks.{layer[1]}", 1)


def split_prefix(key: str) -> tuple[str, str]:
    """Returns what programs have written before a name, and the name, without torch's wrappers around modules."""
    key = _WRAPPERS.sub("", key)
    end = _PREFIXES.match(key).end()
    return key[:end], key[end:]


def strip_prefix(keys: Iterable[str], part: str = "DiT") -> dict[str, str]:
    """Returns ``{key without prefix: key}``.

    A file may hold several parts of a pipeline. Keys of parts other than ``part`` (a key of :data:`PARTS`) are then
    left out; keys that belong to no part stay.
    """
    keys = list(keys)
    parts = {key: name for key in keys for name, prefixes in PARTS.items() if key.startswith(prefixes)}
    if part in parts.values():
        keys = [key for key in keys if parts.get(key, part) == part]
    names = {split_prefix(key)[1]: key for key in keys}
    return names if len(names) == len(keys) else {key: key for key in keys}


def is_original(keys: Iterable[str]) -> bool:
    """Returns whether these are names of the Wan repositories rather than of diffusers."""
    marks = ("self_attn.", "text_embedding.", "time_embedding.", ".residual.", ".middle.", "head.head.")
    return any(mark in key for key in keys for mark in marks)


def vae_parameter(name: str) -> str:
    """Returns this project's name of a VAE's parameter under either naming (both versions); others stay as they are."""
    for pattern, replacement in _VAE_RULES:
        name = re.sub(pattern, replacement, name)
    # In the flat numbering of version 2.1 a stage of the decoder is three residual blocks and one resampler.
    flat = re.match(rf"decoder\.upsamples\.({_INDEX})\.({_RESAMPLER})?", name)
    if flat is None:
        return name
    stage, block = divmod(int(flat[1]), 4)
    part = f"resnets.{block}" if flat[2] is None else "upsamplers.0"
    return f"decoder.up_blocks.{stage}.{part}.{name[flat.end() :]}"


def _sizes(shapes: Shapes, key: str, dims: int, part: str) -> tuple[int, ...]:
    """Returns the shape of a tensor that decides, which has ``dims`` dimensions."""
    shape = shapes.get(key)
    if shape is None:
        raise InputError(f"not a Wan {part} checkpoint: tensor {key!r} is missing")
    if len(shape) != dims or 0 in shape:
        raise InputError(
            f"not a Wan {part} checkpoint: tensor {key!r} has the shape {list(shape)}, expected {dims} sizes above 0"
        )
    return shape


def infer_dit_config(shapes: Shapes, original_config: Mapping[str, Any]) -> DiTConfig:
    """Infers a DiT's configuration from its tensors' shapes (this project's names) and the original ``config.json``.

    Raises:
        InputError: a tensor that decides is missing or has another number of dimensions, the configuration holds no
            sensible values, or the number of heads cannot be known.
    """
    dim, in_channels, *patch = _sizes(shapes, "patch_embedding.weight", 5, "DiT")
    head_out = _sizes(shapes, "proj_out.weight", 2, "DiT")[0]
    text_dim = _sizes(shapes, "condition_embedder.text_embedder.linear_1.weight", 2, "DiT")[1]
    freq_dim = _sizes(shapes, "condition_embedder.time_embedder.linear_1.weight", 2, "DiT")[1]
    ffn_dim = _sizes(shapes, "blocks.0.ffn.net.0.proj.weight", 2, "DiT")[0]
    heads = original_config.get("num_heads", dim // 128 if dim % 128 == 0 else None)
    if heads is None:
        raise InputError(
            f"the number of heads cannot be read from the tensors (width {dim} is not a multiple of Wan's 128);"
            " put a config.json beside the file or pass config="
        )
    if dim % check_count("num_heads", heads):
        raise InputError(f"num_heads: expected a divisor of the width {dim}, got {heads}")
    # A number far too high for the others is surplus, and asks for no model of as many layers.
    num_layers = len({match[1] for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))})
    # Files that end early may lack whole layers, which nothing but config.json can tell.
    if original_config.get("num_layers", num_layers) != num_layers:
        raise InputError(
            f"num_layers: config.json says {original_config['num_layers']!r}, the tensors are {num_layers}"
        )
    position, image_norm = (f"condition_embedder.image_embedder.{name}" for name in ("pos_embed", "norm1.weight"))
    return DiTConfig(
        num_heads=heads,
        head_dim=dim // heads,
        num_layers=num_layers,
        ffn_dim=ffn_dim,
        in_channels=in_channels,
        out_channels=head_out // (patch[0] * patch[1] * patch[2]),
        text_dim=text_dim,
        freq_dim=freq_dim,
        patch_size=tuple(patch),
        cross_attn_norm="blocks.0.norm2.weight" in shapes,
        eps=original_config.get("eps", 1e-6),
        image_dim=_sizes(shapes, image_norm, 1, "DiT")[0] if image_norm in shapes else None,
        added_kv="blocks.0.attn2.add_k_proj.weight" in shapes,
        pos_embed_seq_len=_sizes(shapes, position, 3, "DiT")[1] if position in shapes else None,
    )


def infer_vae_config(shapes: Shapes) -> VAEConfig:
    """Infers a VAE's configuration from its tensors' shapes (this project's names): the published ones, of any width.

    Raises:
        InputError: a tensor that decides is missing or has another number of dimensions, or no VAE of this z_dim is
            published.
    """
    base_dim = _sizes(shapes, "encoder.conv_in.weight", 5, "VAE")[0]
    z_dim = _sizes(shapes, "post_quant_conv.weight", 5, "VAE")[0]
    decoder_last = _sizes(shapes, "decoder.conv_out.weight", 5, "VAE")[1]
    published = {config.z_dim: config for config in (VAEConfig(), PRESETS["5b"].vae)}
    if z_dim not in published:
        raise InputError(
            f"the VAEs of Wan have z_dim {' and '.join(map(str, published))}, this one {z_dim};"
            " use a diffusers directory with a config.json or pass config="
        )
    config = published[z_dim]
    return replace(config, base_dim=base_dim, decoder_base_dim=decoder_last // config.dim_mult[0])
