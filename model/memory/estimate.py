"""The time of a planned clip, in one estimate: operations from shapes over the rate that was measured on a card.

The rates are those of whole layers and halves (``rates.json``, which ``python -m bench report --rates`` writes from
committed results). A card that nobody measured is taken to reach the share of its peak that the measured one reaches.
Copies of streamed layers run beside the work of other layers, those of parked tiles do not. The detailed model, part
by part and for other code, is ``bench/cost``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from math import prod

import torch

from model.config import DiTConfig
from model.memory.dit_bytes import StageChoice, image_tokens, passes_of
from model.memory.request import MemoryRequest
from model.memory.vae_plan import PlannedVAE, operations
from model.pipeline.encoders import TEXT_LENGTH
from swifti2v_kernels.common.cards import CARDS, Card

#: The measured rates.
RATES = resources.files(__package__).joinpath("rates.json")
#: How much more of their peak, which is that of half the rate, GeForce cards reach. Assumed: published matmuls and
#: attention reach 0.9 of it, and 0.6 on Hopper.
GEFORCE = 1.5
#: Bytes a second that are read from a memory-mapped checkpoint: an NVMe disk of PCI Express 3. Assumed.
FILE_RATE = 3e9


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds by phase: of work, and of copies over the bus and from files."""

    work: Mapping[str, float]
    copies: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """The seconds of the clip: layers' copies run beside work, those of tiles do not."""
        phases = [(name.startswith("Stage"), work, self.copies[name]) for name, work in self.work.items()]
        return sum(max(work, copies) if together else work + copies for together, work, copies in phases)

    def ratio(self, phase: str) -> float:
        """Returns the seconds of a phase's copies over those of its work: below 1, the work of layers hides them."""
        return self.copies[phase] / self.work[phase]


def estimate(
    r: MemoryRequest,
    dits: Mapping[str, StageChoice],
    vaes: Iterable[PlannedVAE],
    copied: Mapping[str, int],
) -> Estimate:
    """Estimates the seconds of a plan on the card of its request, without loading, encoders of text and image, file.

    It is given the placed DiT by stage, the plans of the VAE in its four places, and the bytes that are copied
    between device and host memory by phase.
    """
    work, copies = dict.fromkeys(copied, 0.0), {name: size / (1e9 * r.gpu.host) for name, size in copied.items()}
    for phase, planned in zip(("condition", "reference", "reference", "decode"), vaes, strict=True):
        blocks = 1 if phase == "condition" and not r.masked else r.plan.num_blocks
        # The encoder in float32 runs on cuDNN and is timed by itself; in 16 bits its layers are the decoder's.
        part = "encode" if (planned.request.part, planned.request.dtype) == ("encode", torch.float32) else "decode"
        work[phase] += vae_operations(planned, blocks) / _rate(r.gpu, part)
    for phase, stage in dits.items():
        passes = list(passes_of(r, phase == "Stage I"))
        work[phase] = sum(n * dit_operations(stage.config, *given) for n, *given in passes)
        work[phase] /= _rate(r.gpu, "dit") * 2 / r.dtype.itemsize
        copies[phase] += sum(n for n, *_ in passes) * stage.placed.read / FILE_RATE
    return Estimate(work, copies)


def dit_operations(config: DiTConfig, tokens: int, targets: int, remembered: int = 0) -> int:
    """Returns the operations of one pass over a window, a multiply-add being two.

    The last layer's queries are the tokens to predict only; keys and values of remembered tokens are there already.
    """
    dim, layers, features = config.dim, config.num_layers, prod(config.patch_size) * config.in_channels
    queries, keys = (layers - 1) * tokens + targets, tokens + remembered + TEXT_LENGTH + image_tokens(config)
    linear = 4 * layers * tokens * dim**2 + 2 * queries * dim * (4 * dim + 2 * config.ffn_dim)
    ends = 2 * dim * (tokens * features + targets * prod(config.patch_size) * config.out_channels)
    return linear + 4 * queries * keys * dim + ends


def vae_operations(planned: PlannedVAE, blocks: int) -> int:
    """Returns the operations of a half of the VAE for so many latent frames, with halos and the middle's attention."""
    config, pixels = planned.request.config, prod(planned.request.latent_size)
    base = config.decoder_base_dim if planned.request.part == "decode" else config.base_dim
    attention = 4 * pixels * base * config.dim_mult[-1]
    return round(blocks * pixels * (planned.redundancy * sum(operations(config, planned.request.part)) + attention))


@functools.cache
def rates() -> list[dict]:
    """Returns the measured rates: card, part (``dit``, ``decode`` or ``encode``), TFLOP/s, and the results."""
    return json.loads(RATES.read_text())["rates"]


def _rate(card: Card, part: str) -> float:
    """Returns operations a second: measured on the card, or by the share of its peak that a measured card reaches."""
    found = [row for row in rates() if row["part"] == part]
    row = next((row for row in found if row["card"] == card.name), found[0])
    known = CARDS[row["card"]]
    more = GEFORCE if card.architecture.endswith("geforce") > known.architecture.endswith("geforce") else 1.0
    return 1e12 * row["tflops"] * more * card.bf16 / known.bf16
