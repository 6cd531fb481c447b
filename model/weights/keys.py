"""Names of tensors, from the Wan repositories' own to diffusers', and configurations from the shapes of tensors.

The modules here carry diffusers' names, so a diffusers checkpoint needs no map. Original checkpoints (also as
repackaged for ComfyUI, with a prefix) are renamed by the tables below. Mind that the original's ``norm3`` is the norm
before cross-attention, which is ``norm2`` in diffusers. What a shape cannot tell (heads, epsilon, latent statistics)
comes from the original's ``config.json`` or from the published models. LoRA files use the same names, also with
underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from model.config import VAE_LATENT_STATISTICS, DiTConfig, VAEConfig, check_count
from model.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

#: The number of a stage in a key; longer ones number nothing, and Python refuses to make integers of the longest.
_INDEX = r"\d{1,4}"

_PREFIXES = (
    *("model.diffusion_model.", "diffusion_model.", "first_stage_model."),
    *("module.", "model.", "pipe.dit.", "dit.", "vae."),
)
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
_TABLES = ("blocks.0.modulation", "head.modulation", "img_emb.emb_pos")

_VAE_RULES = [
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


def dit_name(key: str) -> str:
    """Returns this project's name for a DiT's parameter or module under either naming."""
    layer, name = re.fullmatch(r"(?s)(blocks\.\d+\.|)(.*)", key).groups()
    names = _LAYER if layer else _OUTER
    if name in names:
        return layer + names[name]
    module, _, leaf = name.rpartition(".")
    return f"{layer}{names[module]}.{leaf}" if module in names else key


_THEIRS = (*_OUTER, *(f"blocks.0.{name}" for name in _LAYER))
_PARAMETERS = {
    dit_name(name) + leaf for name in _THEIRS for leaf in ([""] if name in _TABLES else [".weight", ".bias"])
}
_WITHOUT_DOTS = {name.replace(".", "_"): name for name in (*_THEIRS, *map(dit_name, _THEIRS), "blocks.0", "head")}


def is_dit_parameter(name: str) -> bool:
    """Returns whether some Wan DiT has a parameter of this name (of this project)."""
    return re.sub(rf"^blocks\.{_INDEX}\.", "blocks.0.", name) in _PARAMETERS


def dotted(module: str) -> str:
    """Returns a DiT module's name with dots, some or all of which LoRA files may write as underscores.

    Other names are returned as they are.
    """
    flat = module.replace(".", "_")
    layer = re.match(r"blocks_(\d+)(?=_|$)", flat)
    if layer is None:
        return _WITHOUT_DOTS.get(flat, module)
    name = _WITHOUT_DOTS.get(f"blocks_0{flat[layer.end() :]}")
    return module if name is None else name.replace("blocks.0", f"blocks.{layer[1]}", 1)


def strip_prefix(keys: Iterable[str], part: str = "DiT") -> dict[str, str]:
    """Returns ``{key without prefix: key}`` for the prefixes that repackagers add to all keys.

    A file may hold several parts of a pipeline. Keys of parts other than ``part`` (a key of :data:`PARTS`) are then
    left out; keys that belong to no part stay as they are.
    """
    keys = list(keys)
    parts = {key: name for key in keys for name, prefixes in PARTS.items() if key.startswith(prefixes)}
    if part in parts.values() and len(set(parts.values())) > 1:
        prefix = next(prefix for prefix in PARTS[part] if any(key.startswith(prefix) for key in keys))
        return {key.removeprefix(prefix): key for key in keys if parts.get(key, part) == part}
    # torch.compile's, around the model or around its layers.
    names = {re.sub(r"\b_orig_mod\.", "", key): key for key in keys}
    names = names if len(names) == len(keys) else {key: key for key in keys}
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): key for name, key in names.items()}
    return names


def is_original(keys: Iterable[str]) -> bool:
    """Returns whether these are names of the Wan repositories rather than of diffusers."""
    marks = ("self_attn.", "text_embedding.", "time_embedding.", ".residual.", ".middle.", "head.head.")
    return any(mark in key for key in keys for mark in marks)


def _by_rules(key: str) -> str:
    for pattern, replacement in _VAE_RULES:
        key = re.sub(pattern, replacement, key)
    return key


def vae_key_map(keys: Iterable[str]) -> Callable[[str], str]:
    """Returns a function from a checkpoint's VAE keys to this project's names (both versions)."""
    keys = list(keys)
    if not is_original(keys):
        return lambda key: key
    resamplers = {
        re.sub(r"\.(resample|time_conv)\..*", "", key) for key in keys if re.search("resample|time_conv", key)
    }
    nested = any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", key) for key in keys)
    # In the flat numbering of version 2.1 a decoder stage is its residual blocks and one resampler.
    stages = [re.fullmatch(rf"decoder\.upsamples\.({_INDEX})", name) for name in resamplers] if not nested else []
    flat = sorted(int(stage[1]) for stage in stages if stage)
    per_stage = flat[0] + 1 if flat else 1

    def rename(key: str) -> str:
        name = re.match(
            rf"(encoder\.downsamples|decoder\.upsamples)\.({_INDEX})(?:\.(?:down|up)samples\.({_INDEX}))?\.", key
        )
        if name is None:
            return _by_rules(key)
        side, stage, rest = name[1].split(".")[0], int(name[2]), key[name.end() :]
        resampler = name[0].rstrip(".") in resamplers
        blocks = "down_blocks" if side == "encoder" else "up_blocks"
        if nested:
            part = ("downsampler" if side == "encoder" else "upsampler") if resampler else f"resnets.{name[3]}"
            place = f"{side}.{blocks}.{stage}.{part}"
        elif side == "encoder":
            place = f"{side}.{blocks}.{stage}"
        else:
            part = "upsamplers.0" if resampler else f"resnets.{stage % per_stage}"
            place = f"{side}.{blocks}.{stage // per_stage}.{part}"
        return _by_rules(f"{place}.{rest}")

    return rename


def _count(shapes: Shapes, pattern: str) -> int:
    """Counts the different numbers in keys; one far too high for the others is then surplus, and asks for no model."""
    return len({m[1] for m in (re.match(pattern, key) for key in shapes) if m})


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
    num_layers = _count(shapes, r"blocks\.(\d+)\.")
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
    """Infers a VAE's configuration from its tensors' shapes (this project's names).

    Raises:
        InputError: a tensor that decides is missing or has another number of dimensions, or the latent statistics of
            this z_dim are not published.
    """
    base_dim, pixel_channels = _sizes(shapes, "encoder.conv_in.weight", 5, "VAE")[:2]
    z_dim = _sizes(shapes, "post_quant_conv.weight", 5, "VAE")[0]
    decoder_last = _sizes(shapes, "decoder.conv_out.weight", 5, "VAE")[1]
    if z_dim not in VAE_LATENT_STATISTICS:
        raise InputError(
            f"latents_mean and latents_std are known for z_dim 16 and 48, not for {z_dim};"
            " use a diffusers directory with a config.json or pass config="
        )
    residual = "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes
    num_blocks = _count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    if residual:
        firsts = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(num_blocks)]
        num_res_blocks = _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
        temporal = [f"encoder.down_blocks.{i}.downsampler.time_conv.weight" in shapes for i in range(num_blocks - 1)]
    else:
        down = [i for i in range(num_blocks) if f"encoder.down_blocks.{i}.resample.1.weight" in shapes]
        num_res_blocks = down[0] if down else num_blocks
        # Without any block the first is asked for all the same, and missed.
        starts = range(0, max(num_blocks, 1), num_res_blocks + 1)
        firsts = [f"encoder.down_blocks.{i}.conv1.weight" for i in starts]
        temporal = [f"encoder.down_blocks.{i}.time_conv.weight" in shapes for i in down]
    widths = [_sizes(shapes, first, 5, "VAE")[0] for first in firsts]
    dim_mult = tuple(check_count("dim_mult", width // base_dim) for width in widths)
    mean, std = VAE_LATENT_STATISTICS[z_dim]
    return VAEConfig(
        base_dim=base_dim,
        decoder_base_dim=decoder_last // dim_mult[0],
        z_dim=z_dim,
        dim_mult=dim_mult,
        num_res_blocks=num_res_blocks,
        temporal_downsample=tuple(temporal),
        residual=residual,
        patch_size=round((pixel_channels / 3) ** 0.5),
        pixel_channels=pixel_channels,
        latents_mean=mean,
        latents_std=std,
    )
