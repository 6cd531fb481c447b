"""Convolutions of video autoencoders.

causal_conv3d    with history, norm and residual; ``upsample_conv2d`` also doubles rows and columns
frames_out       the last one, which writes finished frames
calls            what their calls share; ``by_torch`` their sums in PyTorch
loop             the implicit GEMM of their kernels
cases            named calls: what is compiled, checked, timed and tuned

A file's Triton kernel is in the file of its name and ``_kernel``. Limits are listed in docs/operators/conv.md.
"""
