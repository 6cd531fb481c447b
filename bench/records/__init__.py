"""Results: written, read, compared and drawn. ``python -m bench compare``."""
