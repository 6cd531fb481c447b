"""``python -m bench dit``: the DiT's operators and one layer of it."""
