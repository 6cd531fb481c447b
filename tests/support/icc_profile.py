"""ICC profiles written out byte by byte, and the colours that they stand for, computed from the standards' numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

# Corners of red, green and blue, and the white D65, as x and y (IEC 61966-2-1, SMPTE EG 432-1, Adobe RGB (1998)).
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), (0.3127, 0.3290))

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_to_linear(value: np.ndarray) -> np.ndarray:
    """Returns the light of sRGB's values, both 0 to 1; Display P3 has the same curve."""
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(light: np.ndarray) -> np.ndarray:
    """Returns sRGB's values of light; what lies outside 0 to 1 is clipped."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def rgb_to_xyz(space: tuple) -> np.ndarray:
    """Returns the 3x3 matrix from linear RGB of these corners and white to XYZ, not adapted."""
    corners = np.array([(x / y, 1, (1 - x - y) / y) for x, y in space]).T
    return corners[:, :3] * np.linalg.solve(corners[:, :3], corners[:, 3])


def expected_srgb(pixels: np.ndarray, space: tuple, to_linear: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Returns 8-bit pixels ``[..., 3]`` of an RGB space with white D65 as sRGB of 8 bits, in float64."""
    matrix = np.linalg.inv(rgb_to_xyz(SRGB)) @ rgb_to_xyz(space)
    return np.round(linear_to_srgb(to_linear(pixels / 255) @ matrix.T) * 255)


def light(lightness: np.ndarray) -> np.ndarray:
    """Returns the light, 0 to 1, of a lightness L of 0 to 100 (CIE 1976)."""
    root = (lightness + 16) / 116
    return np.where(root > 6 / 29, root**3, 3 * (6 / 29) ** 2 * (root - 4 / 29))


def _adapt_to_d50(matrix: np.ndarray) -> np.ndarray:
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ matrix.sum(1))
    return np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD @ matrix


def matrix_profile(space: tuple, curve: bytes) -> bytes:
    """Returns a display profile of RGB: corners, white, and one tone curve (a tag's bytes) for all three."""
    matrix = _adapt_to_d50(rgb_to_xyz(space))
    columns = {name: _xyz(matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _profile(b"RGB ", b"XYZ ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)})


def hp_srgb_profile() -> bytes:
    """Returns sRGB with the matrix of HP's "sRGB IEC61966-2.1", the profile of most photographs: another rounding."""
    columns = {b"rXYZ": (0.43607, 0.22249, 0.01392), b"gXYZ": (0.38515, 0.71687, 0.09708)}
    columns = {name: _xyz(values) for name, values in {**columns, b"bXYZ": (0.14307, 0.06061, 0.7141)}.items()}
    return _profile(b"RGB ", b"XYZ ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), srgb_curve())})


def grey_profile(curve: bytes) -> bytes:
    """Returns a display profile of grey with this tone curve."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": curve})


def ink_profile(lightness: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """Returns an output profile of CMYK of greys, whose one table A2B0 (mft1, two points an axis) has those of corners.

    Its paper is yellow, which only the absolute intent shows. ``lightness`` takes ``[N, 4]`` of 0 or 1 and returns L.
    """
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    values = lightness(corners) * 255 / 100
    table = np.stack([values, *[np.full(16, 128)] * 2], -1).round().astype(np.uint8).tobytes()
    unit = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + unit + ramp * 4 + table + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"wtpt": _xyz((0.8, 0.85, 0.5))}, kind=b"prtr")


def gamma_curve(gamma: float) -> bytes:
    """Returns a tone curve tag: a power in 1/256."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def srgb_curve(black: float = 0.0) -> bytes:
    """Returns a tone curve tag: sRGB's, as a table of 4096 values; its black has this light."""
    light = black + (1 - black) * srgb_to_linear(np.linspace(0, 1, 4096))
    values = np.round(light * 65535).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", 4096) + values.tobytes()


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    text = b"written by a test\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + text,
        b"wtpt": _xyz(_D50),
        **tags,
    }
    entries, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        entries += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body
