"""Norms, gated residuals and rotations.

adaln          ``norm_modulate``, ``gated_residual``, ``gated_residual_norm_modulate``: adaptive norms of DiTs
qk_norm_rope   ``qk_norm_rope`` and ``norm_rope``: norm and rotation of queries and keys; ``rope`` makes the tables
rms_norm_silu  norm and activation of VAEs
cases          named calls: what is compiled, checked, timed and tuned

A file's Triton kernel is in the file of its name and ``_kernel``.
"""
