"""Denoising of latents by one DiT: what a clip needs once is made once, and every step does the same launches.

A :class:`Denoiser` owns the workspace, the keys and values of the text, the modulation of all timesteps, and for each
*kind* of window (its number of blocks, and which of them are given) tensors of fixed shape and place. A step changes
two small tensors and runs; on CUDA it is captured as a graph the second time and replayed from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.csg.schedule import NUM_TRAIN_TIMESTEPS
from model.dit.model import WanDiT, WindowTensors
from model.dit.parts import KeyValue
from swifti2v_kernels import Rope3D, Window, rope_3d


class StepGraphs:
    """A runner of steps that captures each kind of step as a CUDA graph at its second run and replays it from then on.

    The first run of a kind is an ordinary one: it compiles kernels and lets libraries allocate their workspaces, which
    capturing forbids. Where graphs are not used, ``reason`` says why.
    """

    def __init__(self, device: torch.device, wanted: bool = True) -> None:
        self.reason: str | None = None
        if not wanted:
            self.reason = "switched off"
        elif device.type != "cuda":
            self.reason = f"the device is {device.type}"
        self._warm: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Runs ``step``, or replays the graph that was captured of it.

        Args:
            key: the kind of the step.
            step: does the same launches on the same memory every time that it is called with ``key``.
        """
        if self.reason is None and key in self._warm:
            if key not in self._graphs:
                self._capture(key, step)
            if self.reason is None:
                self._graphs[key].replay()
                return
        self._warm.add(key)
        step()

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        # All graphs run one after another, so they can share one pool for what libraries allocate.
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        try:
            with torch.cuda.graph(graph, pool=pool):
                step()
        except RuntimeError as error:
            self.reason = f"capturing failed: {str(error).splitlines()[0]}"
            warnings.warn(f"steps run without CUDA graphs: {self.reason}", RuntimeWarning, stacklevel=2)
        else:
            self._graphs[key] = graph


@dataclass(frozen=True)
class _Kind:
    """The tensors that serve every window of one kind: the same number of blocks, the same ones given."""

    tensors: WindowTensors
    #: 1 for blocks at the present timestep, 0 for those at timestep 0.
    noisy: Tensor
    step: Tensor
    memory: Sequence[KeyValue] | None


class Denoiser:
    """A DiT with all that it needs to denoise the blocks of a clip, window by window and step by step.

    Args:
        dit: the model.
        text, image: as for :meth:`model.dit.model.WanDiT.context`.
        latents: ``[1, z, S, h, w]`` float32: the blocks that are denoised, updated in place.
        reference: ``[1, z, N, h, w]`` float32: the clip's blocks, from which given blocks and reference channels are
            read.
        sigmas: noise levels from 1 to 0.
        max_blocks: the largest number of blocks that a window has.
        cuda_graph: whether steps may be captured as CUDA graphs.
    """

    def __init__(
        self,
        dit: WanDiT,
        text: Tensor,
        image: Tensor | None,
        *,
        latents: Tensor,
        reference: Tensor,
        sigmas: Sequence[float],
        max_blocks: int,
        cuda_graph: bool = True,
    ) -> None:
        self.dit, self.latents, self.reference = dit, latents, reference
        # A captured step would wait for copies of weights where it begins, and not where it needs them.
        streams = dit.stream is not None and dit.stream.copies
        self.graphs = StepGraphs(latents.device, cuda_graph and not streams)
        self.context = dit.context(text, image)
        # Row 0 belongs to timestep 0, which given blocks carry; row i + 1 belongs to step i.
        timesteps = [0.0, *(NUM_TRAIN_TIMESTEPS * sigma for sigma in sigmas[:-1])]
        self.modulation = dit.modulate(latents.new_tensor([timesteps]))
        self._deltas = [after - sigma for sigma, after in pairwise(sigmas)]
        (height, width), patch = latents.shape[3:], dit.config.patch_size
        self._grid = height // patch[1], width // patch[2]
        self.workspace = dit.workspace(latents, max_blocks)
        self._kinds: dict[Hashable, _Kind] = {}
        self._key: Hashable = None

    def open(
        self, blocks: Sequence[int], slots: Sequence[int], mask: Sequence[float], remembered: Sequence[int] = ()
    ) -> None:
        """Makes a window the present one.

        Args:
            blocks: index in the clip of every block, in window order.
            slots: the index in ``latents`` at which each block is denoised; -1 for a given block, which carries
                timestep 0.
            mask: value of each block's mask channels.
            remembered: given blocks whose keys and values are computed here, at timestep 0 and without a view of the
                window, and read by every step (the causal mode).
        """
        self._key = (tuple(slots), tuple(mask), len(remembered))
        if self._key not in self._kinds:
            memory = self.dit.new_memory(self.latents, len(remembered)) if remembered else None
            self._kinds[self._key] = self._new_kind(slots, mask, memory)
        kind = self._kinds[self._key]
        self._place(kind.tensors, blocks)
        if kind.memory is not None:
            count = len(remembered)
            given = self._new_kind([-1] * count, [1.0] * count, None)
            self._place(given.tensors, remembered)
            self.dit.run(given.tensors, self.context, self.modulation, self.workspace, keep=kind.memory)

    def open_window(self, window: Window, mode: str = "bidirectional") -> None:
        """Makes a clip's window the present one; its noisy blocks are denoised in the first slots of ``latents``.

        In the mode ``causal`` conditioning blocks do not see the noisy ones, so their keys and values are made here.
        """
        noisy, given = tuple(range(len(window.noisy))), len(window.conditioning)
        if mode == "causal":
            self.open(window.noisy, noisy, [0.0] * len(noisy), remembered=window.conditioning)
        else:
            self.open(window.blocks, [-1] * given + [*noisy], [1.0] * given + [0.0] * len(noisy))

    def step(self, i: int) -> None:
        """Runs step ``i`` of the schedule, from 0, on the present window, and updates its blocks in ``latents``."""
        kind = self._kinds[self._key]
        torch.mul(kind.noisy, i + 1, out=kind.tensors.modulation_index)
        kind.step.fill_(self._deltas[i])
        given = kind.tensors, self.context, self.modulation, self.workspace
        self.graphs.run(self._key, lambda: self.dit.run(*given, out=self.latents, step=kind.step, memory=kind.memory))

    def _new_kind(self, slots: Sequence[int], mask: Sequence[float], memory: Sequence[KeyValue] | None) -> _Kind:
        device = self.latents.device

        def index(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        noisy = index([int(slot >= 0) for slot in slots])
        concatenates = self.dit.config.in_channels != self.latents.shape[1]
        window = WindowTensors(
            latents=self.latents, reference=self.reference, latent_index=index(slots),
            reference_index=index([0] * len(slots)),
            mask=torch.tensor(mask, dtype=torch.float32, device=device) if concatenates else None,
            modulation_index=torch.zeros_like(noisy), rope=self._rope(range(len(slots))),
            targets=tuple(i for i, slot in enumerate(slots) if slot >= 0),
        )  # fmt: skip
        return _Kind(window, noisy, torch.zeros(1, dtype=torch.float32, device=device), memory)

    def _rope(self, blocks: Sequence[int]) -> Rope3D:
        return rope_3d(blocks, *self._grid, self.dit.config.head_dim, device=self.latents.device)

    def _place(self, window: WindowTensors, blocks: Sequence[int]) -> None:
        """Writes the blocks' indices into the window's tensors, whose memory a captured step reads."""
        window.reference_index.copy_(torch.tensor(blocks, dtype=torch.int32, device="cpu"))
        window.rope.t.copy_(self._rope(blocks).t)
