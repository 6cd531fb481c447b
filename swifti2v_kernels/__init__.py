"""Operators for high-resolution video diffusion: transformers and autoencoders.

Every operator is a plain function on tensors: no model code, no global state, and nothing imported beyond torch,
triton, einops and numpy. The model in this repository and any other call the same functions. :func:`sample_segments` is
CSG for any of them; ``swifti2v_kernels.integrations`` puts the operators into diffusers, ComfyUI and the Wan code.

Every operator has a PyTorch path, which runs anywhere and is the reference that its kernel must meet, and all but
``linear_gelu``, which is torch's own, have Triton kernels (on an NVIDIA H200 checked and timed, but for those that make
or read 8-bit rows; on other cards not yet timed on hardware). :func:`explain` says what would compute a call.
"""

from .attention.arguments import BlockWindow
from .attention.merge_attention import merge_attention
from .attention.segment_attention import segment_attention
from .common.dispatch import Choice, default_backend, explain, use_backend
from .common.target import pretend_gpu
from .conv.causal_conv3d import causal_conv3d
from .conv.frames_out import frames_out
from .conv.upsample_conv2d import fold_upsample_weight, upsample_conv2d
from .csg.plan import SegmentPlan, Window, assemble_window, block_noise
from .csg.sampler import WindowModel, sample_segments
from .linear.dequantize_rows import dequantize_rows
from .linear.linear_gelu import linear_gelu
from .linear.quantize_rows import QuantizedRows, quantize_rows
from .linear.scaled_linear import scaled_linear
from .norm.adaln import gated_residual, gated_residual_norm_modulate, norm_modulate
from .norm.qk_norm_rope import norm_rope, qk_norm_rope
from .norm.rms_norm_silu import rms_norm_silu
from .norm.rope import Rope3D, rope_3d, rope_from_tokens
from .window.embed_window import embed_window
from .window.project_step import project_step

__version__ = "0.1.0"

__all__ = [
    "BlockWindow",
    "Choice",
    "QuantizedRows",
    "Rope3D",
    "SegmentPlan",
    "Window",
    "WindowModel",
    "__version__",
    "assemble_window",
    "block_noise",
    "causal_conv3d",
    "default_backend",
    "dequantize_rows",
    "embed_window",
    "explain",
    "fold_upsample_weight",
    "frames_out",
    "gated_residual",
    "gated_residual_norm_modulate",
    "linear_gelu",
    "merge_attention",
    "norm_modulate",
    "norm_rope",
    "pretend_gpu",
    "project_step",
    "qk_norm_rope",
    "quantize_rows",
    "rms_norm_silu",
    "rope_3d",
    "rope_from_tokens",
    "sample_segments",
    "scaled_linear",
    "segment_attention",
    "upsample_conv2d",
    "use_backend",
]
