"""Names of tensors in the Wan repositories' own checkpoints, for a state under this project's (diffusers') names; and
their weights in float8, as ComfyUI ships them.

Written from the published modules, independently of ``model/weights/keys.py``; where diffusers has a converter of
its own, the tests hold these names against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_DIT = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("attn2.add_k_proj", "cross_attn.k_img"),
    ("attn2.add_v_proj", "cross_attn.v_img"),
    ("attn2.norm_added_k", "cross_attn.norm_k_img"),
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    ("proj_out", "head.head"),
]

_VAE_PARTS = [
    ("mid_block.resnets.0", "middle.0"),
    ("mid_block.attentions.0", "middle.1"),
    ("mid_block.resnets.1", "middle.2"),
    ("norm_out", "head.0"),
    ("conv_out", "head.2"),
    ("conv_in", "conv1"),
]
_VAE_BLOCK = [
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    ("conv_shortcut", "shortcut"),
]


def original_dit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a DiT's state under the original names."""
    renamed = {}
    for name, tensor in state.items():
        if name == "scale_shift_table":
            name = "head.modulation"
        elif name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation")
        elif name.startswith("blocks.") and name.split(".")[2] == "norm2":
            name = name.replace("norm2", "norm3")
        for here, there in _DIT:
            name = name.replace(here, there)
        renamed[name] = tensor
    return renamed


def original_module(module: str) -> str:
    """Returns the original name of a DiT module such as ``blocks.0.attn1.to_q``."""
    (name,) = original_dit({f"{module}.weight": torch.empty(0)})
    return name.removesuffix(".weight")


def float8_with_scales(
    state: Mapping[str, Tensor],
    *,
    scale_name: str = "scale_weight",
    dtype: torch.dtype = torch.float8_e4m3fn,
    by_row: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of a file whose matrices are float8 (or int8), and what they stand for, in float32.

    The largest number of each matrix (or of each row) is at the end of the range.
    """
    stored, meant = {}, {}
    for name, tensor in state.items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 2 and "blocks." in name:
            largest = tensor.abs().amax(dim=1, keepdim=True) if by_row else tensor.abs().amax()
            whole = dtype == torch.int8
            scale = largest / (127 if whole else torch.finfo(dtype).max)
            stored[name] = ((tensor / scale).round() if whole else tensor / scale).to(dtype)
            stored[name.removesuffix("weight") + scale_name] = scale
            meant[name] = stored[name].float() * scale
    return stored, meant


def original_vae(state: Mapping[str, Tensor], num_res_blocks: int, residual: bool) -> dict[str, Tensor]:
    """Returns a VAE's state under the original names of version 2.2 (``residual``) or 2.1."""
    renamed = {}
    for name, tensor in state.items():
        side, _, rest = name.partition(".")
        if side not in ("encoder", "decoder"):
            renamed[{"quant_conv": "conv1", "post_quant_conv": "conv2"}[side] + "." + rest] = tensor
            continue
        in_block = rest.startswith(("down_blocks", "up_blocks", "mid_block.resnets"))
        if rest.startswith(("down_blocks", "up_blocks")):
            rest = _place(rest, num_res_blocks, residual)
        for here, there in _VAE_PARTS:
            rest = rest.replace(here, there) if not rest.startswith(("downsamples", "upsamples")) else rest
        for here, there in _VAE_BLOCK if in_block else []:
            rest = rest.replace(here, there)
        renamed[f"{side}.{rest}"] = tensor
    return renamed


def _place(rest: str, num_res_blocks: int, residual: bool) -> str:
    kind, stage, *tail = rest.split(".")
    group = "downsamples" if kind == "down_blocks" else "upsamples"
    if not residual and kind == "down_blocks":
        return ".".join((group, stage, *tail))
    per_stage = num_res_blocks + (kind == "up_blocks")
    is_block = tail[0] == "resnets"
    index = int(tail[1]) if is_block else per_stage
    tail = tail[2:] if is_block or tail[0] == "upsamplers" else tail[1:]
    if residual:
        return ".".join((group, stage, group, str(index), *tail))
    return ".".join((group, str(int(stage) * (per_stage + 1) + index), *tail))
