"""Operators for high-resolution video diffusion: transformers and autoencoders.

Every operator is a plain function on tensors: no model code, no global state, and nothing imported beyond torch,
triton, einops and numpy. The model in this repository and any other call the same functions. :func:`sample_segments` is
CSG for any of them; ``swifti2v_kernels.integrations`` puts the operators into diffusers, ComfyUI and the Wan code.

Every operator has a PyTorch path, which runs anywhere and is the reference that its kernel must meet, and all but
``linear_gelu``, which is torch's own, have Triton kernels (on an NVIDIA H200 checked and timed, but for those that make
or read 8-bit rows; on other cards not yet timed on hardware). :func:`explain` says what would compute a call.
"""

from swifti2v_kernels.adaln import gated_residual, gated_residual_norm_modulate, norm_modulate
from swifti2v_kernels.attention import segment_attention
from swifti2v_kernels.attention_arguments import BlockWindow
from swifti2v_kernels.attention_merge import merge_attention
from swifti2v_kernels.causal_conv3d import causal_conv3d
from swifti2v_kernels.common.dispatch import Choice, explain
from swifti2v_kernels.common.quantized import QuantizedRows
from swifti2v_kernels.common.target import pretend_gpu
from swifti2v_kernels.csg import SegmentPlan, Window, assemble_window, block_noise
from swifti2v_kernels.csg_sampler import WindowModel, sample_segments
from swifti2v_kernels.dequantize_rows import dequantize_rows
from swifti2v_kernels.embed_window import embed_window
from swifti2v_kernels.frames_out import frames_out
from swifti2v_kernels.linear_gelu import linear_gelu
from swifti2v_kernels.project_step import project_step
from swifti2v_kernels.qk_norm_rope import norm_rope, qk_norm_rope
from swifti2v_kernels.quantize_rows import quantize_rows
from swifti2v_kernels.rms_norm_silu import rms_norm_silu
from swifti2v_kernels.rope import Rope3D, rope_3d, rope_from_tokens
from swifti2v_kernels.scaled_linear import scaled_linear
from swifti2v_kernels.upsample_conv2d import fold_upsample_weight, upsample_conv2d

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
]
