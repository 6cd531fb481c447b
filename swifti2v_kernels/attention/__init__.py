"""Attention over several sources of keys and values.

segment_attention  the operator; ``arguments`` checks its calls, ``reference`` is the formula in PyTorch
choice             which kernel serves a call: ``portable`` (Triton), ``hopper`` (Gluon), or torch's own
merge_attention    the operator that joins partial results, and its kernel
cases              named calls: what is compiled, checked, timed and tuned
"""
