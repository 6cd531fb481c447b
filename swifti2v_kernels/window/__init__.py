"""A DiT's patch embedding and its head on windows of latent frames, read and written where they are stored.

embed_window  gathers blocks, joins mask and reference, embeds patches
project_step  norm, projection to patches, and the sampler's step, in place
cases         named calls: what is compiled, checked, timed and tuned

A file's Triton kernel is in the file of its name and ``_kernel``. Limits are listed in docs/operators/window.md.
"""
