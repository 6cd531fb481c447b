"""Linear layers, and numbers in 8 bits with one scale a row.

linear_gelu      torch's own fused matmul and activation, without a kernel of ours
scaled_linear    matmuls in 8 bits
quantize_rows    16 bits to 8, and the type of such rows; ``dequantize_rows`` back
cases            named calls: what is compiled, checked, timed and tuned

A file's Triton kernel is in the file of its name and ``_kernel``. Limits are listed in docs/operators/linear.md.
"""
