"""One DiT: the bytes that denoising holds and its passes over the layers, in closed form; where its layers may be."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.config import DiTConfig
from model.csg.sampler import SegmentPlan
from model.dit.workspace import Workspace
from model.errors import InputError
from model.memory.request import FLOAT8_MATMUL, MemoryRequest
from model.pipeline.encoders import TEXT_LENGTH
from model.streaming.placement import PlacedBytes, Placement, placed_bytes
from model.streaming.stream import SLOTS

_FLOAT = 4


def tokens_per_block(config: DiTConfig, latent_size: tuple[int, int]) -> int:
    """Returns the tokens of one latent frame of (rows, columns) latent pixels.

    Raises:
        InputError: they are not multiples of the patch.
    """
    (rows, columns), (_, p, q) = latent_size, config.patch_size
    if rows < 1 or columns < 1 or rows % p or columns % q:
        raise InputError(f"latent_size: expected positive multiples of the patch {p} x {q}, got {rows} x {columns}")
    return (rows // p) * (columns // q)


def image_tokens(config: DiTConfig) -> int:
    """Returns the CLIP tokens that the model reads: none, or those of one image or of its stored positions."""
    return 0 if config.image_dim is None else config.pos_embed_seq_len or 257


def modulation_elements(config: DiTConfig, timesteps: int) -> int:
    """Returns the number of elements, in float32, of the modulation of all layers and of the head."""
    return timesteps * config.dim * (6 * config.num_layers + 2)


@functools.cache
def dit_memory(
    config: DiTConfig,
    plan: SegmentPlan,
    latent_size: tuple[int, int],
    *,
    steps: int,
    dtype: torch.dtype,
    causal: bool = False,
    whole: bool = False,
    contexts: int = 1,
    eight_bits: torch.dtype | None = None,
) -> dict[str, int]:
    """Returns the bytes that denoising holds from its first to its last step, by name, as the model plans them.

    Args:
        config: the shape of the model.
        plan: the segments of the clip, for its mode (:func:`model.csg.sampler.plan_for`).
        latent_size: rows and columns of a latent frame.
        steps: steps of the schedule.
        dtype: the dtype of weights and activations.
        causal: whether windows remember the keys and values of what is given.
        whole: whether all blocks are one window, as in Stage I.
        contexts: sets of text keys and values: 2 with guidance.
        eight_bits: the dtype of what is quantised before a matmul; None where matmuls are in ``dtype``.
    """
    windows, blocks = list(plan), plan.num_blocks
    given, noisy = (max(len(getattr(w, kind)) for w in windows) for kind in ("conditioning", "noisy"))
    largest = max(given, noisy) if causal else max(len(window.blocks) for window in windows)
    block_len = tokens_per_block(config, latent_size)
    workspace = Workspace.plan(
        config, 1, blocks if whole else largest, block_len, dtype=dtype, device="meta", eight_bits=eight_bits
    )
    pairs = 2 * config.num_layers * config.dim * dtype.itemsize
    latents = config.out_channels * latent_size[0] * latent_size[1] * _FLOAT
    return {
        "workspace": workspace.nbytes,
        "text keys and values": contexts * (TEXT_LENGTH + image_tokens(config)) * pairs,
        "modulation": _FLOAT * modulation_elements(config, steps + 1),
        "latents": ((blocks if whole else noisy) + blocks) * latents,
        "remembered keys and values": given * contexts * block_len * pairs if causal and not whole else 0,
    }


def passes_of(r: MemoryRequest, first: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields all passes over a stage's layers: how often, tokens, those to predict, and those remembered."""
    tokens = tokens_per_block((r.stage_one if first else r.stage_two).config, r.latent_size(first))
    if first:
        # A DiT without mask channels is given its first block.
        noisy = r.plan.num_blocks - (not r.masked)
        yield r.stage_one_steps, r.plan.num_blocks * tokens, noisy * tokens, 0
    for window in () if first else r.plan:
        given, noisy = len(window.conditioning) * tokens, len(window.noisy) * tokens
        if r.mode == "causal":
            yield 1, given, 0, 0
            yield r.steps, noisy, noisy, given
        else:
            yield r.steps, given + noisy, noisy, 0


@dataclass(frozen=True)
class StageChoice:
    """A placed DiT: where its layers are, what that takes, and the bytes on the device while it runs, by name.

    ``changed`` is true where ``auto`` found no form that keeps numbers as they are, ``streamed`` the number of layers
    that do not stay.
    """

    config: DiTConfig
    placement: Placement
    placed: PlacedBytes
    held: dict[str, int]
    changed: bool
    streamed: int

    @property
    def device(self) -> int:
        """The bytes on the device."""
        return sum(self.held.values())

    @property
    def layers(self) -> dict[str, int]:
        """The number of layers on the device, in pinned host memory and in files."""
        homes = self.placement.homes(self.config.num_layers)
        return {home: homes.count(home) for home in ("device", "host", "file")}


class StageChoices:
    """The candidates for Stage I (its experts have one placement), or for Stage II."""

    def __init__(self, request: MemoryRequest, first: bool) -> None:
        self.request, self.first = request, first
        dits = (request.stage_one, request.low_noise) if first else (request.stage_two,)
        self.dits = [dit for dit in dits if dit is not None]
        self.config = self.dits[0].config
        self.forms = self._forms()
        # As many streamed layers as there are slots would save nothing, and an even number keeps each to one slot.
        layers = self.config.num_layers
        self.counts = sorted({0, *range(SLOTS + 2, layers + 1, 2), *([layers] if layers > SLOTS else [])})
        self.placed = functools.cache(self._placed)

    def _forms(self) -> tuple[str, ...]:
        """Returns the values of ``quantize`` to be tried, the preferred first."""
        r = self.request
        if r.quantize != "auto":
            return (r.quantize,)
        if r.matmul == "8bit":
            return ("float8" if r.capability is None or r.capability >= FLOAT8_MATMUL else "int8",)
        lossless = "file" if any(dit.stored for dit in self.dits) else "none"
        # Layers that can be read in every pass always fit the host memory.
        return (lossless,) if r.from_files else (lossless, "float8")

    def fewest(self, room: float, host: float, quantize: str) -> StageChoice | None:
        """Returns the choice of a form with the fewest streamed layers that fits, or None.

        More streamed layers take less of the device and more of the host.
        """
        fitting = (n for n in self.counts if self.placed(quantize, n).device <= room)
        return next((self.within(host, quantize, n) for n in fitting), None)

    def least(self, host: float, quantize: str) -> Iterator[StageChoice]:
        """Yields the choices of a form that ``host`` bytes of host memory allow, that with most streamed first."""
        found = (self.within(host, quantize, streamed) for streamed in reversed(self.counts))
        return (choice for choice in found if choice is not None)

    def within(self, host: float, quantize: str, streamed: int) -> StageChoice | None:
        """Returns the choice with so many layers streamed, as many from pinned memory as fit the host, or None."""
        found = self.placed(quantize, streamed)
        if found.placed.host <= host:
            return found
        if not self.request.from_files:
            return None
        largest = found.placed.slots // SLOTS
        pinned = min(int((host - SLOTS * largest) // largest), streamed - 1)
        return self.placed(quantize, streamed, pinned) if pinned >= 0 else None

    def least_host(self, quantize: str, streamed: int) -> int:
        """Returns the bytes of host memory that so many streamed layers take at least."""
        pinned = 0 if self.request.from_files and streamed else None
        return self.placed(quantize, streamed, pinned).placed.host

    def _placed(self, quantize: str, streamed: int, pinned: int | None = None) -> StageChoice:
        """Returns the choice with a placement; of two experts, the bytes of the one that takes most."""
        r, layers = self.request, self.config.num_layers
        placement = Placement(layers - streamed if streamed else None, pinned, quantize, r.matmul)
        placed = max(
            (placed_bytes(dit.config, r.dtype, placement, dit.stored) for dit in self.dits),
            key=lambda placed: (placed.device, placed.host),
        )
        weights = {"weights": placed.fixed + placed.resident, "slots": placed.slots, "unpacked layer": placed.unpacked}
        held = weights | {"text": _FLOAT * TEXT_LENGTH * self.config.text_dim} | dit_memory(
            self.config, r.plan, r.latent_size(self.first), steps=r.stage_one_steps if self.first else r.steps,
            dtype=r.dtype, causal=r.mode == "causal", whole=self.first, eight_bits=placement.matmul_dtype,
        )  # fmt: skip
        held = {name: size for name, size in held.items() if size}
        return StageChoice(self.config, placement, placed, held, quantize != self.forms[0], streamed)
