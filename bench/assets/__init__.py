"""Inputs that are shipped."""

from pathlib import Path

#: The launch of DSCOVR (see the README's Licence).
PHOTO = Path(__file__).parent / "rocket.jpg"
