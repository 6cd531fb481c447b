"""The configurations of the DiT and the VAE, and the presets of the two-stage pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from model.errors import InputError

MASK_CHANNELS = 4
#: The smallest and the largest number above 0 that float32 holds in full precision; models compute in it at most.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def _expect(fits: bool, name: str, wanted: str, got: Any) -> None:
    if not fits:
        raise InputError(f"{name}: expected {wanted}, got {got!r}")


#: What config.json calls a field that has another name here.
_NAMES = {
    "num_heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "residual": "is_residual",
    "temporal_downsample": "temperal_downsample",
}


def check_count(name: str, value: Any) -> int:
    """Returns ``value`` if it is an integer of at least 1.

    Raises:
        InputError: it is not; the message names ``name``.
    """
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _expect(fits, name, "an integer of at least 1", value)
    return value


def _check_above_zero(name: str, value: float) -> None:
    _expect(value >= _SMALLEST, name, f"a number above 0 (at least {_SMALLEST:.2g})", value)


def _check_fields(config: DiTConfig | VAEConfig) -> None:
    """Checks that each value of a configuration, or of a list in it, is what its field's type says.

    Raises:
        InputError: one is not; the message names the field.
    """
    for field in fields(config):
        name, value = _NAMES.get(field.name, field.name), getattr(config, field.name)
        is_list = field.type.startswith("tuple")
        _expect(not is_list or isinstance(value, (list, tuple)), name, "a list", value)
        for one in value if is_list else (value,):
            if "bool" in field.type:
                _expect(isinstance(one, bool), name, "true or false", one)
            elif "float" in field.type:
                finite = isinstance(one, (int, float)) and not isinstance(one, bool) and abs(one) <= _LARGEST
                _expect(finite, name, "a finite number (of float32)", one)
            elif one is not None or not field.type.endswith("None"):
                check_count(name, one)


def _said(kind: type[DiTConfig | VAEConfig], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a configuration of which a ``config.json`` says something; its lists are tuples."""
    keys = {field.name: _NAMES.get(field.name, field.name) for field in fields(kind)}
    said = {name: config[key] for name, key in keys.items() if key in config}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a Wan DiT; the defaults are Wan2.1 T2V-1.3B.

    ``in_channels`` tells the variant for latents of z channels: z (text to video, TI2V-5B), 2z + 4 (image to video and
    Stage II: latents, mask, reference). ``image_dim`` switches the image (CLIP) embedding on and ``added_kv`` its own
    keys and values in cross-attention.
    """

    num_heads: int = 12
    head_dim: int = 128
    num_layers: int = 30
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv: bool = False
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        """The width of the model: heads times head_dim."""
        return self.num_heads * self.head_dim

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_above_zero("eps", self.eps)
        patch, head = self.patch_size, self.head_dim
        _expect(len(patch) == 3 and patch[0] == 1 and patch[1] == patch[2], "patch_size", "[1, p, p]", patch)
        _expect(head >= 6 and head % 2 == 0, "head_dim", "an even number of at least 6 (three axes of rotation)", head)
        _expect(self.freq_dim % 2 == 0, "freq_dim", "an even number (cosines and sines)", self.freq_dim)
        if self.added_kv and self.image_dim is None:
            raise InputError("added_kv_proj_dim is set but image_dim is not: there would be nothing to attend to")

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> DiTConfig:
        """Reads the ``config.json`` of a diffusers ``WanTransformer3DModel``.

        Raises:
            InputError: a value is of the wrong kind, or means something that is not built here.
        """
        added = config.get("added_kv_proj_dim")
        # What diffusers takes where nothing is said is not all what Wan2.1 T2V-1.3B has.
        given = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, **config, "added_kv": added is not None}
        given["out_channels"] = config.get("out_channels", 16) or config.get("in_channels", 16)
        made = cls(**_said(cls, given))
        _expect(added in (None, made.dim), "added_kv_proj_dim", f"the model width {made.dim}", added)
        return made


# Mean and standard deviation per latent channel of the published Wan2.1 (16) and Wan2.2 (48) autoencoders.
# fmt: off
VAE_LATENT_STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
         -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
         2.8251, 1.9160),
    ),
    48: (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
         -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055,
         -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083,
         -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
         0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
         0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
         0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}
# fmt: on


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a Wan autoencoder; the defaults are Wan2.1 (4x8x8, 16 channels).

    ``residual`` selects the Wan2.2 architecture (parameter-free shortcuts round every stage) and ``patch_size`` its
    folding of pixels into channels before the encoder. ``latents_mean`` and ``latents_std`` have one number a channel.
    """

    base_dim: int = 96
    decoder_base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    residual: bool = False
    patch_size: int = 1
    latents_mean: tuple[float, ...] = VAE_LATENT_STATISTICS[16][0]
    latents_std: tuple[float, ...] = VAE_LATENT_STATISTICS[16][1]

    def __post_init__(self) -> None:
        _check_fields(self)
        stages, times = len(self.dim_mult), len(self.temporal_downsample)
        _expect(stages >= 2, "dim_mult", "at least two stages", stages)
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name))
            _expect(count == self.z_dim, name, f"{self.z_dim} numbers (z_dim)", count)
        for deviation in self.latents_std:
            _check_above_zero("latents_std", deviation)
        _expect(times == stages - 1, "temperal_downsample", f"{stages - 1} entries for {stages} stages", times)
        self._check_widths()

    def _check_widths(self) -> None:
        """Checks that each stage can be built, and that its shortcut (of Wan2.2) can average and repeat channels."""
        down = [self.base_dim * factor for factor in (1, *self.dim_mult)]
        up = [self.decoder_base_dim * factor for factor in (self.dim_mult[-1], *reversed(self.dim_mult))]
        if not self.residual:
            _expect(min(up[1:-1]) >= 2, "decoder_base_dim, dim_mult", "stages of 2 channels or more", up[1:-1])
            return
        # In space a cell has 2 x 2 pixels, and in time 2 frames where a stage changes their number.
        cells = [4 * (2 if temporal else 1) for temporal in self.temporal_downsample]
        for i, (given, made) in enumerate(itertools.pairwise(down)):
            numbers, name = given * (*cells, 1)[i], f"base_dim, dim_mult: channels after the encoder's stage {i}"
            _expect(numbers % made == 0, name, f"a divisor of {numbers} (is_residual)", made)
        for i, (given, made) in enumerate(itertools.pairwise(up[:-1])):
            fits = given % made == 0 and cells[-1 - i] * made % given == 0
            name = f"decoder_base_dim, dim_mult: channels after the decoder's stage {i}"
            _expect(fits, name, f"{given}, a half or a quarter of it (is_residual)", made)

    @property
    def pixel_channels(self) -> int:
        """The channels of what the encoder reads and the decoder makes: RGB of a patch's pixels."""
        return 3 * self.patch_size**2

    @property
    def temporal_stride(self) -> int:
        """The number of frames for each latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """The number of pixels, in each direction, for each latent pixel."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> VAEConfig:
        """Reads the ``config.json`` of a diffusers ``AutoencoderKLWan``.

        Raises:
            InputError: a value is of the wrong kind, or means something that is not built here.
        """
        _expect(not config.get("attn_scales"), "attn_scales", "[]", config.get("attn_scales"))
        given = {**config, "patch_size": config.get("patch_size") or 1}
        given["decoder_base_dim"] = config.get("decoder_base_dim") or config.get("base_dim", 96)
        made = cls(**_said(cls, given))
        rgb = made.pixel_channels
        for name in ("in_channels", "out_channels"):
            _expect(config.get(name, 3) == rgb, name, f"{rgb} (RGB at patch_size {made.patch_size})", config.get(name))
        return made


@dataclass(frozen=True)
class Preset:
    """The two stages of a pipeline and the size at which it is meant to run (pixels, frames, frames a second)."""

    description: str
    stage_one: DiTConfig
    stage_two: DiTConfig
    vae: VAEConfig
    width: int = 2560
    height: int = 1408
    num_frames: int = 81
    fps: int = 16


def stage_two_config(base: DiTConfig) -> DiTConfig:
    """Returns the Stage II variant of a DiT: its input is latents, mask and reference, side by side as channels."""
    return replace(base, in_channels=2 * base.out_channels + MASK_CHANNELS, image_dim=None, added_kv=False)


_VAE_22 = VAEConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    residual=True,
    patch_size=2,
    latents_mean=VAE_LATENT_STATISTICS[48][0],
    latents_std=VAE_LATENT_STATISTICS[48][1],
)
_STAGE_TWO_1B = stage_two_config(DiTConfig())
_DIT_5B = DiTConfig(num_heads=24, ffn_dim=14336, in_channels=48, out_channels=48)
_DIT_14B = DiTConfig(num_heads=40, ffn_dim=13824, num_layers=40, in_channels=36)
_DIT_TINY = DiTConfig(num_heads=2, head_dim=64, num_layers=2, ffn_dim=256, text_dim=64, freq_dim=64)

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "both stages tiny, Wan2.1 VAE shape; for CPUs",
        stage_two_config(_DIT_TINY),
        stage_two_config(_DIT_TINY),
        VAEConfig(base_dim=4, decoder_base_dim=4),
        width=256,
        height=144,
    ),
    "tiny-vae22": Preset(
        "both stages tiny, Wan2.2 VAE shape; for CPUs",
        replace(_DIT_TINY, in_channels=48, out_channels=48),
        stage_two_config(replace(_DIT_TINY, out_channels=48)),
        replace(_VAE_22, base_dim=4, decoder_base_dim=4),
        width=256,
        height=160,
        fps=24,
    ),
    "1.3b": Preset("Stage I and Stage II of 1.3B, Wan2.1 VAE", _STAGE_TWO_1B, _STAGE_TWO_1B, VAEConfig()),
    "14b-1.3b": Preset(
        "Stage I of 14B (Wan2.2 I2V-A14B shape), Stage II of 1.3B, Wan2.1 VAE", _DIT_14B, _STAGE_TWO_1B, VAEConfig()
    ),
    "5b": Preset(
        "Stage I and Stage II of 5B (Wan2.2 TI2V shape), Wan2.2 VAE",
        _DIT_5B,
        stage_two_config(_DIT_5B),
        _VAE_22,
        fps=24,
    ),
}


def get_preset(name: str) -> Preset:
    """Returns the preset called ``name``.

    Raises:
        InputError: there is none; the message lists those that exist.
    """
    if name not in PRESETS:
        raise InputError(f"preset: unknown {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
