"""``python -m bench attention``: our attention kernels against torch's and others'."""
