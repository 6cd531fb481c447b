"""The time of a denoising step over a window, from few of its layers.

All layers of a DiT but the last are alike (the last computes only the blocks to be denoised), so a step of n layers
takes ``t(a) + (n - a) * (t(b) - t(a)) / (b - a)``, where ``t(a)`` and ``t(b)`` are measured with a and b layers at the
full number of tokens; what lies outside the layers is in ``t(a)``. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bench.dit.split import split_seconds, three_parts
from bench.harness.timing import wall_seconds
from model.config import DiTConfig
from model.csg.denoiser import Denoiser
from model.csg.sampler import SegmentPlan, Window
from model.csg.schedule import flow_sigmas
from model.dit.model import WanDiT
from model.machine.host import release
from model.memory.dit_bytes import tokens_per_block
from model.pipeline.encoders import empty_text
from model.weights.load import random_weights

#: Operations beyond which a step is run once and not captured as a graph: some seconds on a fast card.
LARGE = 5e14
REPEATS = 2


@dataclass(frozen=True)
class WindowTime:
    """Seconds of a window: to open it, and of one step with all layers; how a step's time is shared; its peak."""

    tokens: int
    open_seconds: float
    step_seconds: float
    shares: dict[str, float]
    peak_bytes: int | None
    layers: int
    of: int

    @property
    def note(self) -> str:
        """A note that says from how many layers the times are extrapolated."""
        return f"from {self.layers} of {self.of} layers"

    def seconds(self, steps: int) -> float:
        """Returns the seconds of a segment: the window is opened once and stepped."""
        return self.open_seconds + steps * self.step_seconds


class WindowClock:
    """Times windows of one DiT of ``layers`` layers.

    Args:
        config: the whole DiT's.
        latent_size: rows and columns of a latent frame.
        num_blocks: latent frames of the clip.
        device: where the DiT runs.
        dtype: dtype of the weights.
        layers: the two numbers of layers that are run; a DiT that has no more is run whole, with nothing extrapolated.
    """

    def __init__(
        self,
        config: DiTConfig,
        latent_size: tuple[int, int],
        num_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: tuple[int, int],
    ):
        self.config, self.latent_size, self.num_blocks, self.device = config, latent_size, num_blocks, device
        self.layers = layers if config.num_layers > layers[1] else (config.num_layers, config.num_layers)
        self.dit = random_weights(WanDiT, replace(config, num_layers=self.layers[1]), 0, dtype=dtype, device=device)
        self.text = empty_text(config.text_dim).to(device)

    @torch.no_grad()
    def measure(self, window: Window, mode: str = "bidirectional", split: bool = True) -> WindowTime:
        """Measures one window; with ``split`` also how a step's time is shared."""
        tokens = tokens_per_block(self.config, self.latent_size) * len(window.blocks)
        large = 4 * tokens**2 * self.config.dim * self.layers[1] > LARGE
        found, shares, peak = [], {}, None
        for count in dict.fromkeys(self.layers):
            release(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # The step of a large window takes long: one gives both its time and its shares.
            shared = split and count == self.layers[1]
            *seconds, shares = self._measured(count, window, mode, large, shared and large)
            found.append(seconds)
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() + self._missing_bytes(count)
            if shared and not large:
                *_, shares = self._measured(count, window, mode, True, True)
        opened, step = (self._extrapolated([seconds[i] for seconds in found]) for i in range(2))
        return WindowTime(tokens, opened, step, shares, peak, self.layers[1], self.config.num_layers)

    def _extrapolated(self, seconds: Sequence[float]) -> float:
        if len(seconds) == 1:
            return seconds[0]
        (a, b), (t_a, t_b) = self.layers, seconds
        # Opening a window does not depend on the layers, but for the causal mode: then noise may turn it over.
        return t_a + (self.config.num_layers - a) * max(t_b - t_a, 0.0) / (b - a)

    def _measured(
        self, count: int, window: Window, mode: str, once: bool, split: bool
    ) -> tuple[float, float, dict[str, float]]:
        """Returns the seconds to open the window and to step, and how a step's time is shared.

        Run ``once`` it is not captured, after a small window for which kernels are compiled; else it is the median of
        a few runs, warm and captured as a graph.
        """
        rows, columns = self.latent_size
        options = {"device": self.device, "dtype": torch.float32}
        blocks = [window.conditioning, window.noisy] if mode == "causal" else [window.blocks]
        denoiser = Denoiser(
            shortened(self.dit, count), self.text, None,
            latents=torch.randn(1, self.config.out_channels, max(len(window.noisy), 1), rows, columns, **options),
            reference=torch.randn(1, self.config.out_channels, self.num_blocks, rows, columns, **options),
            sigmas=flow_sigmas(4, 5.0), cuda_graph=not once, max_blocks=max(map(len, blocks)),
        )  # fmt: skip
        for warm in [Window((), (0,))] if once else [window, window]:
            denoiser.open_window(warm, mode)
            denoiser.step(0)
        steps: list[float] = []

        def step() -> None:
            steps.append(self._seconds(lambda: denoiser.step(0)))

        repeats = range(1 if once else REPEATS)
        opened = statistics.median(self._seconds(lambda: denoiser.open_window(window, mode)) for _ in repeats)
        shares = self._shares(step) if split else {}
        for _ in () if split else repeats:
            step()
        return opened, statistics.median(steps), shares

    def _seconds(self, call: Callable[[], None]) -> float:
        if self.device.type != "cuda":
            return wall_seconds(call, self.device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3

    def _shares(self, step: Callable[[], None]) -> dict[str, float]:
        """Returns the shares of attention, linear and other in a step's busy time."""
        found = three_parts(split_seconds(step, {}, self.device))
        total = sum(found.values())
        return {part: seconds / total for part, seconds in found.items()} if total else {}

    def _missing_bytes(self, count: int) -> int:
        """Returns the bytes of weights, text keys and values, and modulation of the layers that were not run."""
        weights = sum(p.nbytes for p in self.dit.blocks[0].parameters())
        kept = 2 * self.text.shape[1] * self.config.dim * self.dit.dtype.itemsize
        rows = 5 * 6 * self.config.dim * 4
        loaded = self.config.num_layers - self.layers[1]
        return loaded * weights + (self.config.num_layers - count) * (kept + rows)


def shortened(dit: WanDiT, count: int) -> WanDiT:
    """Returns the model with its first layers only; the weights are shared."""
    short = copy.copy(dit)
    short._modules = {**dit._modules, "blocks": nn.ModuleList(list(dit.blocks)[:count])}
    short.config = replace(dit.config, num_layers=count)
    return short


def plan_seconds(
    clock: WindowClock, plan: SegmentPlan, steps: int, mode: str = "bidirectional", split: bool = True
) -> tuple[float, list[tuple[int, WindowTime]]]:
    """Returns the seconds of all segments of a plan, and of each kind of window the number and the times."""
    kinds: dict[tuple[int, int], list[Window]] = {}
    for window in plan:
        kinds.setdefault((len(window.conditioning), len(window.noisy)), []).append(window)
    times = [(len(same), clock.measure(same[-1], mode, split)) for same in kinds.values()]
    return sum(count * found.seconds(steps) for count, found in times), times
