"""``python -m bench csg``: segment-wise generation against end to end."""
