"""The distance of predictions from times that were published or measured.

The published times are the tables of computational efficiency in the README files of Wan-Video/Wan2.1 and
Wan-Video/Wan2.2, on one GPU, all steps with guidance. They are those of the whole command, whose text encoder, VAE and
moving of weights take 10 to 60 s that are not predicted here. The measured times are those of an NVIDIA H200 (torch
2.11, triton 3.6). For whole clips few layers, steps and latent frames were measured, and scaled (``python -m bench
csg``); in eager code's end-to-end time the attention is torch's FlashAttention-2 and all else is this project's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.cost.paper import baseline
from model.config import PRESETS, DiTConfig, VAEConfig
from model.memory.cost import dit, vae
from model.memory.cost.configuration import Configuration
from model.memory.cost.gpus import get_gpu
from model.memory.cost.pipeline import predict
from model.memory.cost.profiles import get_profile, seconds
from model.memory.cost.work import Work

_REFERENCE, _FLASH_3, _OWN = "reference", "reference, FlashAttention-3", "swifti2v"
_T2V_1B = DiTConfig()
_T2V_14B = DiTConfig(num_heads=40, ffn_dim=13824, num_layers=40)
_I2V_14B = replace(_T2V_14B, in_channels=36, image_dim=1280, added_kv=True)
_TI2V_5B = PRESETS["5b"].stage_one
_VAE_21, _VAE_22 = VAEConfig(), PRESETS["5b"].vae
_WAN_21, _WAN_22 = "published, Wan-Video/Wan2.1 README", "published, Wan-Video/Wan2.2 README"
_MEASURED = "measured, NVIDIA H200, 2026-11-26"
_EXTRAPOLATED = "extrapolated from few layers and steps, NVIDIA H200, 2026-11-27"


@dataclass(frozen=True)
class Calibration:
    """A known time and its prediction, in seconds."""

    case: str
    gpu: str
    profile: str
    known: float
    predicted: float
    source: str

    @property
    def ratio(self) -> float:
        """The predicted time over the known one."""
        return self.predicted / self.known


def _clip(config: DiTConfig, vae_config: VAEConfig, size: tuple[int, int], num_frames: int, forwards: int) -> Work:
    """Returns the work of all forwards of a clip of (width, height) pixels, with all blocks in one window."""
    latent = size[1] // vae_config.spatial_stride, size[0] // vae_config.spatial_stride
    blocks = 1 + (num_frames - 1) // vae_config.temporal_stride
    return forwards * dit.forward(config, blocks * dit.tokens_per_block(config, latent))


def _published() -> Iterator[tuple[str, str, str, float, str, Work]]:
    hd, sd = (1280, 720), (832, 480)
    for case, config, size, forwards, gpu, profile, known, source in (
        ("T2V-14B, 1280x720, 50 steps", _T2V_14B, hd, 100, "H800", _REFERENCE, 1837.9, _WAN_21),
        ("I2V-14B, 1280x720, 40 steps", _I2V_14B, hd, 80, "H800", _REFERENCE, 1491.6, _WAN_21),
        ("T2V-A14B, 1280x720, 40 steps", _T2V_14B, hd, 80, "H800", _FLASH_3, 1041.5, _WAN_22),
        ("T2V-A14B, 832x480, 40 steps", _T2V_14B, sd, 80, "H800", _FLASH_3, 326.9, _WAN_22),
        ("T2V-A14B, 1280x720, 40 steps", _T2V_14B, hd, 80, "A100", _REFERENCE, 2735.7, _WAN_22),
        ("T2V-A14B, 832x480, 40 steps", _T2V_14B, sd, 80, "A100", _REFERENCE, 785.7, _WAN_22),
        ("T2V-1.3B, 832x480, 50 steps", _T2V_1B, sd, 100, "RTX 4090", _REFERENCE, 261.4, _WAN_21),
    ):
        yield f"Wan {case}, 81 frames", gpu, profile, known, source, _clip(config, _VAE_21, size, 81, forwards)
    work = _clip(_TI2V_5B, _VAE_22, (1280, 704), 121, 100)
    yield "Wan TI2V-5B, 1280x704, 50 steps, 121 frames", "RTX 4090", _REFERENCE, 534.7, _WAN_22, work


def layer(config: DiTConfig, tokens: int) -> Work:
    """Returns the work of one layer of the DiT over so many tokens, without embedding and head."""
    deep, shallow = (dit.forward(replace(config, num_layers=n), tokens) for n in (3, 2))
    return difference(deep, shallow)


def latent_frame(config: VAEConfig, part: str, width: int, height: int, itemsize: int = 2) -> Work:
    """Returns the work of one more latent frame for the VAE in the middle of a clip."""
    longer, shorter = (vae.work(config, part, width, height, 1 + 4 * n, itemsize) for n in (9, 8))
    return difference(longer, shorter)


def difference(more: Work, less: Work) -> Work:
    """Returns ``more`` without ``less``, which has the same kinds of matrix multiplications."""
    known = {(p.kind, p.extent): p.flops for p in less.matmuls}
    matmuls = tuple(replace(p, flops=p.flops - known.get((p.kind, p.extent), 0)) for p in more.matmuls)
    between = type(more.between)(*(a - b for a, b in zip(more.between, less.between, strict=True)))
    return Work(matmuls, more.operand_bytes - less.operand_bytes, between)


def _measured() -> Iterator[tuple[str, str, float, Work]]:
    for name, config, tokens, known in (
        ("1.3B", PRESETS["1.3b"].stage_two, 70400, 60.1e-3),
        ("14B", PRESETS["14b-1.3b"].stage_one, 18480, 31.3e-3),
    ):
        yield f"layer of the {name}, {tokens:,} tokens", _OWN, known, layer(config, tokens)
    for version, config, own, eager in (("2.1", _VAE_21, 0.286, 0.692), ("2.2", _VAE_22, 0.382, 0.640)):
        work = latent_frame(config, "decode", 2560, 1408)
        yield f"decode, VAE {version}, 2560x1408, a latent frame", _OWN, own, work
        yield f"decode, VAE {version}, 2560x1408, a latent frame, diffusers", _REFERENCE, eager, work


def _clips() -> Iterator[tuple[str, str, float, float]]:
    """Yields case, profile, known and predicted seconds of whole clips, 81 frames at 2560x1408."""
    c = Configuration.for_preset("14b-1.3b")
    ours = predict(c, get_gpu("H200"), get_profile(_OWN)).by_stage
    for stage, known in (("reference", 14.10), ("Stage II", 45.41)):
        yield f"{stage} of 14B + 1.3B, 4 steps", _OWN, known, ours[stage]
    for profile, known in ((_OWN, 13_183.0), (_REFERENCE, 21_996.0)):
        predicted = predict(baseline(), get_gpu("H200"), get_profile(profile)).by_stage
        yield "14B end to end, 50 steps", profile, known, predicted["Stage II"]


def calibration() -> list[Calibration]:
    """Returns every time that the profiles were fitted to or checked against, and its prediction."""
    rows = []
    for case, gpu, profile, known, source, work in _published():
        predicted = seconds(work, get_gpu(gpu), get_profile(profile))
        rows.append(Calibration(case, gpu, profile, known, predicted, source))
    for case, profile, known, work in _measured():
        predicted = seconds(work, get_gpu("H200"), get_profile(profile))
        rows.append(Calibration(case, "H200", profile, known, predicted, _MEASURED))
    for case, profile, known, predicted in _clips():
        rows.append(Calibration(case, "H200", profile, known, predicted, _EXTRAPOLATED))
    return rows
