"""Convolutions of video autoencoders.

causal_conv3d    with history, norm and residual; ``upsample_conv2d`` also doubles rows and columns
frames_out       the last one, which writes finished frames
sums             what the first two share beside the sums; ``checks`` and ``by_torch`` what all three share
loop             the implicit GEMM of their kernels
cases            named calls: what is compiled, checked, timed and tuned

A file's Triton kernel is in the file of its name and ``_kernel``.
"""
