"""Operators for high-resolution video diffusion transformers.

Every operator is a plain function on tensors: no model code, no global state, and nothing imported beyond torch,
triton, einops and numpy. The model in this repository and any other video DiT call the same functions.

In this version each operator has its PyTorch path only, which is also the reference that its Triton kernel must meet.
"""

from swifti2v_kernels.adaln import gated_residual, norm_modulate
from swifti2v_kernels.attention import segment_attention
from swifti2v_kernels.qk_norm_rope import Rope3D, qk_norm_rope, rope_3d

__version__ = "0.1.0"

__all__ = [
    "Rope3D",
    "__version__",
    "gated_residual",
    "norm_modulate",
    "qk_norm_rope",
    "rope_3d",
    "segment_attention",
]
