"""The parts of a pipeline, from a directory of checkpoints or from a preset with seeded random weights.

Each part is built when it is asked for, so that a caller can let go of Stage I before Stage II is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import MASK_CHANNELS, DiTConfig, VAEConfig, get_preset
from model.dit.model import WanDiT
from model.errors import InputError
from model.pipeline.encoders import encode_image
from model.streaming.placement import Placement
from model.vae.model import WanVAE
from model.weights.load import inspect_weights, load_dit, load_vae, random_weights
from model.weights.lora import LoRA

LAYOUT = """\
DIR/stage1             Stage I's DiT            DIR/stage2           Stage II's DiT
DIR/vae                the VAE of both stages
optional:
DIR/stage1_low_noise   Wan2.2 A14B's second expert
DIR/stage1_vae         Stage I's VAE, where it is another one
DIR/text_encoder, DIR/tokenizer                UMT5, for --prompt
DIR/image_encoder, DIR/image_processor         CLIP, for DiTs with an image embedding
Each of the first five is a diffusers directory, or a .safetensors, .gguf or .pth file (stage1.safetensors, ...)
with the key names of diffusers or of the Wan repositories, also in float8 as ComfyUI ships them;
python -m model.inspect says what a file is and whether it loads."""

#: The parts of :data:`LAYOUT` that LoRAs can be given for.
LORA_PARTS = ("stage1", "stage1_low_noise", "stage2")


@dataclass(frozen=True)
class Components:
    """Configurations of all parts, known at once, and functions that build them.

    ``dit`` builds the DiT of a part (:data:`LORA_PARTS`), whose layers are where a
    :class:`~model.streaming.placement.Placement` says (None: all on the device), and ``vae`` the VAE of ``vae`` or
    ``stage1_vae``. ``weights`` is the directory of the checkpoints, or None for random weights, and ``parts`` has the
    place of each part of :data:`LAYOUT` that has weights of its own. ``stored`` has, by part (:data:`LORA_PARTS`), the
    dtypes by name of the matrices that its file holds in 8 bits and that no LoRA changes.
    """

    stage_one_config: DiTConfig
    stage_two_config: DiTConfig
    vae_config: VAEConfig
    stage_one_vae_config: VAEConfig
    dit: Callable[[str, Placement | None], WanDiT]
    vae: Callable[[str], WanVAE]
    weights: Path | None = None
    parts: Mapping[str, Path] = field(default_factory=dict)
    stored: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = (self.stage_one_config, self.stage_one_vae_config), (self.stage_two_config, self.vae_config)
        for name, (dit, vae) in zip(("stage1", "stage2"), pairs, strict=True):
            allowed = (vae.z_dim, 2 * vae.z_dim + MASK_CHANNELS)
            if dit.in_channels not in allowed or dit.out_channels != vae.z_dim:
                raise InputError(
                    f"{name}: with a VAE of {vae.z_dim} channels its in_channels must be {allowed[0]} or {allowed[1]}"
                    f" and its out_channels {vae.z_dim}, got {dit.in_channels} and {dit.out_channels}"
                )
        strides = self.stage_one_vae_config.temporal_stride, self.vae_config.temporal_stride
        if strides[0] != strides[1]:
            raise InputError(f"stage1_vae: expected vae's temporal stride, {strides[1]}, got {strides[0]}")
        dims = {self.stage_one_config.text_dim, self.stage_two_config.text_dim}
        if len(dims) > 1:
            raise InputError(f"weights: both stages must read the same text width, got {sorted(dims)}")

    @property
    def text_encoder(self) -> Path | None:
        """The directory of the text encoder among the weights, if there is one."""
        folder = None if self.weights is None else self.weights / "text_encoder"
        return folder if folder is not None and folder.is_dir() else None

    def check_image_encoder(self) -> None:
        """Raises :class:`InputError` if a DiT reads CLIP tokens and there is no image encoder."""
        if self.weights is not None and (self.weights / "image_encoder").is_dir():
            return
        for stage, config in (("stage1", self.stage_one_config), ("stage2", self.stage_two_config)):
            if config.image_dim is not None:
                raise InputError(f"weights: {stage} reads CLIP tokens, but there is no image_encoder in {self.weights}")

    def clip_tokens(self, stage: str, photo: Any, device: torch.device) -> Tensor | None:
        """Returns CLIP tokens ``[1, 257, image_dim]`` of a PIL image in its own size, or None if the DiT of ``stage1``
        or ``stage2`` reads none.

        Raises:
            InputError: the DiT reads tokens of another width than the image encoder's, or this cannot be loaded.
        """
        wanted = (self.stage_one_config if stage == "stage1" else self.stage_two_config).image_dim
        if wanted is None:
            return None
        tokens = encode_image(photo, self.weights, device=device)
        if tokens.shape[2] != wanted:
            raise InputError(f"weights: the image encoder gives {tokens.shape[2]} channels, {stage} reads {wanted}")
        return tokens

    @classmethod
    def from_preset(cls, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> Components:
        """Returns models of a preset's shapes with random weights, which depend on ``seed`` and the kind of device."""
        preset = get_preset(name)

        def dit(part: str, at: Placement | None) -> WanDiT:
            config, own = (preset.stage_two, seed + 1) if part == "stage2" else (preset.stage_one, seed)
            return random_weights(WanDiT, config, own, dtype=dtype, device=device, placement=at)

        def vae(part: str) -> WanVAE:
            return random_weights(WanVAE, preset.vae, seed + 2, device=device).to_dtypes(decode=dtype)

        return cls(preset.stage_one, preset.stage_two, preset.vae, preset.vae, dit, vae)

    @classmethod
    def from_directory(
        cls,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        loras: Mapping[str, Sequence[LoRA]] | None = None,
    ) -> Components:
        """Returns the models of a directory laid out as in :data:`LAYOUT`: all are checked here, none is read yet.

        ``dtype`` is that of the DiTs' large matrices and of the decoder; ``loras`` has, by part (:data:`LORA_PARTS`),
        what is merged into a DiT as it is read.

        Raises:
            InputError: a part is missing or does not fit, or a LoRA does not fit its part.
        """
        if not path.is_dir():
            raise InputError(f"weights: {path} {'is not a directory' if path.exists() else 'does not exist'}")
        found = {name: _find(path, name) for name in ("stage1", "stage2", "vae", "stage1_low_noise", "stage1_vae")}
        missing = [name for name in ("stage1", "stage2", "vae") if found[name] is None]
        if missing:
            raise InputError(f"weights: {path} lacks {', '.join(missing)}; --help shows the layout")
        low_noise = found["stage1_low_noise"]
        chosen = {part: tuple((loras or {}).get(part, ())) for part in LORA_PARTS}
        if chosen["stage1_low_noise"] and low_noise is None:
            raise InputError(f"lora: {path} has no stage1_low_noise for {chosen['stage1_low_noise'][0].path}")

        def dit(part: str, at: Placement | None) -> WanDiT:
            return load_dit(found[part], dtype=dtype, device=device, loras=chosen[part], placement=at)

        def vae(part: str) -> WanVAE:
            return load_vae(found[part], decode_dtype=dtype, device=device)  # encoding stays in float32

        dits = {part: inspect_weights(found[part], WanDiT, chosen[part]) for part in LORA_PARTS if found[part]}
        if low_noise is not None and dits["stage1_low_noise"].config != dits["stage1"].config:
            raise InputError(f"weights: {low_noise} must have the configuration of {found['stage1']}")
        return cls(
            stage_one_config=dits["stage1"].config,
            stage_two_config=dits["stage2"].config,
            vae_config=inspect_weights(found["vae"], WanVAE).config,
            stage_one_vae_config=inspect_weights(found["stage1_vae"] or found["vae"], WanVAE).config,
            dit=dit,
            vae=vae,
            weights=path,
            parts={part: place for part, place in found.items() if place is not None},
            stored={part: dit.in_eight_bits() for part, dit in dits.items()},
        )


def _find(path: Path, name: str) -> Path | None:
    candidates = [path / name, *(path / f"{name}{suffix}" for suffix in (".safetensors", ".gguf", ".pth", ".pt"))]
    return next((candidate for candidate in candidates if candidate.exists()), None)
