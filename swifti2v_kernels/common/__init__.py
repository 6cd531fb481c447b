"""Parts that all operators share.

checks        arguments: one line that names the argument, what was given and what is allowed
dispatch      kernel or reference, and ``explain``
registration  the names that operators are registered under
target        the GPUs that kernels are for
configs       the measured tables, and which configuration a kernel is launched with
frames        strides and addresses of video frames, for kernels
case          named calls for reports and benchmarks, and their least cost
"""
