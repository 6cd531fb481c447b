"""The Wan diffusion transformer, with a timestep and a position of its own for every latent frame.

One *block* of tokens is one latent frame. Against the published model four things are generalised, and nothing else:

* the timestep may differ between blocks: conditioning blocks carry 0 and noisy blocks t, the convention of Wan2.2
  TI2V-5B, stored per timestep and chosen per block instead of expanded per token;
* ``block_index`` gives the blocks' true indices in the clip, so that a window of blocks is rotated as in the clip;
* ``memory`` holds keys and values of blocks computed before, which self-attention reads as further sources (the causal
  ablation of CSG);
* blocks of a window that are not to be generated (all but ``targets``) are no queries of the last layer, since nothing
  reads what would become of them.

``WanDiT.run`` is the step that samplers call: it reads latent stores, writes one, and allocates nothing beyond its
workspace (``model/dit/workspace.py``) but one part's result where attention goes to torch's own, which returns a
tensor. ``WanDiT.forward`` is the same for tensors, as in diffusers. What a clip needs once is made once: text keys and
values (``context``) and the modulation of every timestep (``modulate``). The model is for inference: it updates its
activations in place.

Module names are those of diffusers' ``WanTransformer3DModel``, so that its checkpoints load without a key map; order
of operations and roundings are its own too (Wan2.1 and Wan2.2; see ``model/weights/load.py`` for the original key
names). What Wan calls a transformer block is a *layer* here, in all names but ``WanDiT.blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import DiTConfig
from model.dit.layer import DiTLayer, written_to
from model.dit.parts import ConditionEmbedder, KeyValue
from model.dit.workspace import Workspace, plan_parts
from swifti2v_kernels import Rope3D, embed_window, norm_modulate, project_step, rope_3d

#: Parts of parameter names that stay in float32 whatever the model's dtype (as in diffusers): the timestep MLP, the
#: modulation tables and the norms' own weights are small, and rounding them costs accuracy.
FLOAT32_PARAMETERS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def dit_parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which the DiT parameter ``name`` is kept when the model is loaded in ``dtype``."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and any(part in name for part in FLOAT32_PARAMETERS) else dtype


#: The keys and values ``[B, L, H, D]`` of each layer's cross-attention: those of the text and, where the CLIP branch
#: has keys of its own, those of the image.
Context = list[list[KeyValue]]


class Modulation(NamedTuple):
    """The shifts, scales and gates that the timesteps of a clip make, one row a timestep, in float32."""

    layers: Tensor  # [layers, B, R, 6, C]: shift, scale, gate of attention; shift, scale, gate of the feed-forward
    head: Tensor  # [B, R, 2, C]: shift, scale


@dataclass(frozen=True)
class WindowTensors:
    """A window of T blocks as the DiT reads and writes it. All indices are int32 tensors on the device.

    ``latents`` [B, z, S, h, w] is the store of what is denoised and ``reference`` [B, z, N, h, w] that of what is
    known. Block i takes its latents from ``latents[:, :, latent_index[i]]``, or is given, ``latent_index[i] = -1``, and
    takes them from ``reference[:, :, reference_index[i]]``; the reference and the ``mask`` [T] are also its further
    channels, if the model has them. Its timestep is row ``modulation_index[i]`` of the modulation. ``targets`` are the
    positions in the window of the blocks to predict; the others' results are not defined.
    """

    latents: Tensor
    reference: Tensor | None
    latent_index: Tensor
    reference_index: Tensor | None
    mask: Tensor | None
    modulation_index: Tensor
    rope: Rope3D
    targets: tuple[int, ...]


class WanDiT(nn.Module):
    """Wan DiT: Wan2.1 1.3B/14B (T2V, I2V), Wan2.2 A14B experts, TI2V-5B, and Stage II of SwiftI2V."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        # The layers. The name is part of Wan's state-dict keys, blocks.N., and of diffusers' API.
        self.blocks = nn.ModuleList(DiTLayer(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, config.dim))
        #: What brings the layers' weights (a ``LayerStream`` of ``model/streaming``, which builds on this file), and
        #: the dtype of their matmuls' inputs if that is an 8-bit one. None: weights are where the module is, in its
        #: dtype.
        self.stream: Any = None
        self.eight_bits: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the large matmuls (some small parameters stay in float32)."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.patch_embedding.weight.device

    @property
    def owns_weights(self) -> bool:
        """True where the parameters are the weights: no layer is streamed, unpacked or multiplied in 8 bits."""
        return self.eight_bits is None and (self.stream is None or self.stream.fixed)

    def _apply(self, fn: Any, recurse: bool = True) -> WanDiT:
        # What ``to()`` and its kin do would cut the parameters off the memory that weights come to.
        if not self.owns_weights:
            raise RuntimeError("WanDiT: a model with streamed or 8-bit layers cannot be moved or cast; load it anew")
        return super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the state of the module, as torch defines it.

        Raises:
            RuntimeError: layers are streamed or in 8 bits, so that parameters hold now one layer and then another.
        """
        if not self.owns_weights:
            raise RuntimeError("WanDiT: a model with streamed or 8-bit layers has no state of its own; save its source")
        return super().state_dict(*args, **kwargs)

    def walk(self) -> Iterator[DiTLayer]:
        """Yields the layers in order, each with its weights on the device until the next one is asked for."""
        return iter(self.blocks) if self.stream is None else self.stream.walk()

    def settle(self) -> None:
        """Ends copies for a pass that does not come, so that the model can be let go after the last pass."""
        if self.stream is not None:
            self.stream.settle()

    def context(self, text: Tensor, image: Tensor | None = None) -> Context:
        """Computes keys and values of all layers' cross-attention, which depend on text and image only: once a clip.

        They are kept for the clip: 2 * layers * L * dim elements, in 16 bits 94 MB for 512 tokens of text and Wan 1.3B
        and 419 MB for the 14B.

        Args:
            text: ``[B, L, text_dim]``; padded positions are zero vectors and are attended to, as in Wan.
            image: ``[B, 257, image_dim]``, for models with the CLIP branch only.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        config, embedder = self.config, self.condition_embedder
        if text.ndim != 3 or text.shape[2] != config.text_dim:
            raise ValueError(f"text: expected [B, L, {config.text_dim}], got {tuple(text.shape)}")
        if (image is None) != (config.image_dim is None):
            wanted = f"[B, 257, {config.image_dim}]" if image is None else "None: this model has no image embedding"
            raise ValueError(f"image: expected {wanted}, got {None if image is None else tuple(image.shape)}")
        if image is not None and (image.ndim != 3 or image.shape[2] != config.image_dim):
            raise ValueError(f"image: expected [B, 257, {config.image_dim}], got {tuple(image.shape)}")
        text = embedder.text_embedder(text.to(self.dtype))
        if image is not None:
            image = embedder.image_embedder(image.to(self.dtype))
            if not config.added_kv:
                text, image = torch.cat((image, text), dim=1), None
            elif image.shape[0] != text.shape[0]:
                given = f"{image.shape[0]} for {text.shape[0]} of text"
                raise ValueError(f"image: expected as many batch entries as text, got {given}")
        found = []
        for layer in self.walk():
            found.append([layer.attn2.context(text)])
            if image is not None:
                found[-1].append(layer.attn2.context(image, added=True))
        return found

    def modulate(self, timestep: Tensor) -> Modulation:
        """Computes the modulation of every layer for timesteps ``[B, R]`` (0..1000): once a clip, which has few."""
        embedding, rows = self.condition_embedder.embed_timestep(timestep, self.dtype)
        tables = torch.stack([layer.scale_shift_table for layer in self.blocks]).unsqueeze(2)
        wide = torch.promote_types(tables.dtype, torch.float32)
        head = self.scale_shift_table.to(wide) + embedding.unsqueeze(2).to(wide)
        return Modulation(tables.to(wide) + rows.to(wide), head)

    def workspace(self, latents: Tensor, num_blocks: int) -> Workspace:
        """Returns a workspace for :meth:`run` on up to ``num_blocks`` blocks of the size of ``latents``."""
        options = {"dtype": self.dtype, "device": latents.device, "eight_bits": self.eight_bits}
        return Workspace.plan(self.config, latents.shape[0], num_blocks, self._block_len(latents), **options)

    def run(
        self,
        window: WindowTensors,
        context: Context,
        modulation: Modulation,
        workspace: Workspace,
        *,
        out: Tensor | None = None,
        step: Tensor | float | None = None,
        memory: Sequence[KeyValue] | None = None,
        keep: Sequence[KeyValue] | None = None,
    ) -> None:
        """Runs one pass over a window, in ``workspace``.

        Args:
            window: the tensors that are read. Its ``targets`` are predicted; with none, only keys and values are
                computed.
            context: from :meth:`context`.
            modulation: from :meth:`modulate`.
            workspace: from :meth:`workspace`.
            out: ``[B, C_out, S, h, w]``: where the velocity ``noise - x_0`` of block i goes, to
                ``out[:, :, latent_index[i]]``; or, with ``step``, the latents that ``step * velocity`` is added to
                (``window.latents`` itself: an Euler step of ``step = next_sigma - sigma``).
            memory: keys and values per layer ``[B, L', H, D]`` of other blocks, which every block here also attends to.
            keep: for every layer the pair (:meth:`new_memory`) that this window's keys and values are written to.

        Raises:
            RuntimeError: the weights ask for gradients, which an update in place cannot give.
        """
        if torch.is_grad_enabled() and self.proj_out.weight.requires_grad:
            raise RuntimeError("WanDiT is for inference: call it under torch.no_grad(), or requires_grad_(False) it")
        config, batch = self.config, window.latents.shape[0]
        num_blocks, block_len = window.latent_index.shape[0], self._block_len(window.latents)
        shape = batch, num_blocks * block_len, config.dim
        x, n = workspace.take("x", *shape), workspace.normed("n", *shape)
        embed_window(
            window.latents,
            self.patch_embedding.weight,
            self.patch_embedding.bias,
            reference=window.reference,
            latent_index=window.latent_index,
            reference_index=window.reference_index,
            mask=window.mask,
            out=x,
        )
        rows = window.modulation_index
        norm_modulate(x, *modulation.layers[0, :, :, :2].unbind(2), block_map=rows, eps=config.eps, **written_to(n))
        kept = workspace.take("k", *shape), workspace.take("v", *shape)
        parts = plan_parts(batch, block_len, range(num_blocks))
        wanted = plan_parts(batch, block_len, window.targets)
        for i, layer in enumerate(self.walk()):
            last = i + 1 == config.num_layers
            layer(
                x,
                n,
                kept if keep is None else tuple(y.flatten(2) for y in keep[i]),
                None if memory is None else memory[i],
                context[i],
                window.rope,
                modulation.layers[i],
                None if last else modulation.layers[i + 1],
                rows,
                # Nothing reads what the last layer makes of blocks that are not to be predicted.
                wanted if last else parts,
                workspace,
            )
        if out is not None:
            shift, scale = modulation.head.unbind(2)
            project_step(
                x,
                self.proj_out.weight,
                self.proj_out.bias,
                shift,
                scale,
                out,
                latent_index=window.latent_index,
                block_map=rows,
                step=step,
                patch_size=config.patch_size,
                eps=config.eps,
            )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        *,
        block_index: Sequence[int] | None = None,
    ) -> Tensor:
        """Predicts the velocity ``noise - x_0``.

        Args:
            latents: ``[B, C_in, T, h, w]``, w contiguous; h and w are multiples of the patch.
            timestep: 0..1000, ``[B]`` or per block ``[B, T]``.
            text, image: as for :meth:`context`.
            block_index: index in the clip of each of the T blocks; default ``0 .. T-1``.

        Returns:
            ``[B, C_out, T, h, w]`` in the model's dtype.

        Raises:
            ValueError: a shape does not fit; the message names the argument.
        """
        config, patch = self.config, self.config.patch_size
        if latents.ndim != 5 or latents.shape[1] != config.in_channels or latents.shape[2] < 1:
            raise ValueError(f"latents: expected [B, {config.in_channels}, T, h, w], got {tuple(latents.shape)}")
        batch, _, num_blocks, height, width = latents.shape
        if height % patch[1] or width % patch[2]:
            raise ValueError(f"latents: {height} x {width} is not a multiple of the patch {patch[1]} x {patch[2]}")
        if timestep.shape not in ((batch,), (batch, num_blocks)):
            raise ValueError(f"timestep: expected [{batch}] or [{batch}, {num_blocks}], got {tuple(timestep.shape)}")
        block_index = range(num_blocks) if block_index is None else block_index
        if len(block_index) != num_blocks:
            raise ValueError(f"block_index: expected {num_blocks} indices, got {len(block_index)}")
        if (*text.shape[:1], *text.shape[2:]) != (batch, config.text_dim):
            raise ValueError(f"text: expected [{batch}, L, {config.text_dim}], got {tuple(text.shape)}")
        place = torch.arange(num_blocks, dtype=torch.int32, device=latents.device)
        window = WindowTensors(
            latents=latents,
            reference=None,
            latent_index=place,
            reference_index=None,
            mask=None,
            modulation_index=torch.zeros_like(place) if timestep.ndim == 1 else place,
            rope=rope_3d(block_index, height // patch[1], width // patch[2], config.head_dim, device=latents.device),
            targets=tuple(range(num_blocks)),
        )
        modulation = self.modulate(timestep.unsqueeze(1) if timestep.ndim == 1 else timestep)
        out = latents.new_empty(batch, config.out_channels, num_blocks, height, width, dtype=self.dtype)
        self.run(window, self.context(text, image), modulation, self.workspace(latents, num_blocks), out=out)
        return out

    def new_memory(self, latents: Tensor, num_blocks: int) -> list[KeyValue]:
        """Returns pairs ``[B, L, H, D]``, not initialised, that :meth:`run` fills as ``keep`` and reads as ``memory``.

        They are for every layer the keys and values of so many blocks of the size of ``latents``.
        """
        config, tokens = self.config, num_blocks * self._block_len(latents)
        shape = latents.shape[0], tokens, config.num_heads, config.head_dim
        return [tuple(latents.new_empty(shape, dtype=self.dtype) for _ in range(2)) for _ in self.blocks]

    def _block_len(self, latents: Tensor) -> int:
        """Returns the number of tokens of one block."""
        (height, width), patch = latents.shape[3:], self.config.patch_size
        return (height // patch[1]) * (width // patch[2])
