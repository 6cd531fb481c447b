"""``python -m bench compile``: what the compiler made of every kernel, without a GPU."""
