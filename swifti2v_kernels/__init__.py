"""Operators for high-resolution video diffusion transformers.

Every operator is a plain function on tensors: no model code, no global state, and nothing imported beyond torch,
triton, einops and numpy. The model in this repository and any other video DiT call the same functions.

Every operator has a PyTorch path, which runs anywhere and is the reference that its kernel must meet.
``segment_attention`` and ``merge_attention`` have Triton kernels (not yet timed on hardware); the others come next.
:func:`explain` says what would compute a call.
"""

from swifti2v_kernels.adaln import gated_residual, norm_modulate
from swifti2v_kernels.attention import segment_attention
from swifti2v_kernels.attention_arguments import BlockWindow
from swifti2v_kernels.attention_merge import merge_attention
from swifti2v_kernels.common.dispatch import Choice, explain
from swifti2v_kernels.qk_norm_rope import Rope3D, qk_norm_rope, rope_3d

__version__ = "0.1.0"

__all__ = [
    "BlockWindow",
    "Choice",
    "Rope3D",
    "__version__",
    "explain",
    "gated_residual",
    "merge_attention",
    "norm_modulate",
    "qk_norm_rope",
    "rope_3d",
    "segment_attention",
]
