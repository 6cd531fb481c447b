"""Result files: written, read, compared (``python -m bench compare``) and drawn."""
