"""Conditional Segment-wise Generation with the Wan transformer of diffusers.

The transformer is used as it is: called publicly, with LoRAs, other attention processors, offloading hooks and
compilation in place. One thing is added, for the time of a call alone: a forward hook on its module ``rope``, which
puts the rotary positions of a window's frames where they belong in the clip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...csg.plan import Window
from ..recipe import HostChanged, check
from .cross import TEXT_TOKENS

#: The noisiest timestep of Wan.
_TIMESTEPS = 1000
#: Attributes of the transformer that are read, dotted.
_NEEDS = (
    *("config.in_channels", "config.out_channels", "config.patch_size", "config.image_dim"),
    *("config.added_kv_proj_dim", "config.rope_max_seq_len", "dtype"),
    *("rope.attention_head_dim", "rope.register_forward_hook"),
)


class DiffusersWanWindow:
    """An adapter that makes a diffusers ``WanTransformer3DModel`` a :class:`swifti2v_kernels.WindowModel`.

    :func:`swifti2v_kernels.sample_segments` then generates a clip with it segment by segment. Every block (latent
    frame) gets its own timestep on the path of Wan2.2 TI2V, a timestep per token, which the weights of all Wan versions
    take. It costs memory: the modulation is ``[B, tokens, 6, C]``, in float32 while a layer runs. For a window of
    70,400 tokens and C = 1536 that is 2.6 GB.

    Wan2.2 A14B has two experts, each of which is a model of its own: ``lambda latents, sigma, window: (high if sigma >=
    0.9 else low)(latents, sigma, window)``. A transformer may be compiled, layer by layer
    (``compile_repeated_blocks()``) or as a whole, which breaks the graph at ``rope`` (so not with ``fullgraph=True``).
    It serves one call at a time: another thread would find the positions of the first.

    Args:
        transformer: the transformer, on the device of the latents it will be called with.
        text: embeddings ``[1 or B, L, text_dim]``; with a CLIP branch L is 512.
        image: CLIP tokens for a transformer that has an image embedding, as its pipeline makes them, for as many batch
            entries as ``text``; else None.

    Raises:
        HostChanged: the transformer lacks something that is read of it; the message names it.
        ValueError: text or image do not fit the transformer, or its patch spans several latent frames.

    Examples:
        >>> model = DiffusersWanWindow(pipe.transformer, prompt_embeds)  # doctest: +SKIP
        >>> options = {"plan": SegmentPlan(num_blocks=21), "mask_channels": model.mask_channels}  # doctest: +SKIP
        >>> segments = sample_segments(model, reference, sigmas=sigmas, seed=0, **options)  # doctest: +SKIP
    """

    def __init__(self, transformer: nn.Module, text: Tensor, image: Tensor | None = None) -> None:
        message = f"transformer: {type(transformer).__name__} is not the WanTransformer3DModel of diffusers that this"
        check(f"{message} adapter was written for: it", transformer, *_NEEDS)
        config: Any = transformer.config
        if config.patch_size[0] != 1:
            raise ValueError(f"transformer: expected a patch of one latent frame, got {tuple(config.patch_size)}")
        if text.ndim != 3 or (config.added_kv_proj_dim is not None and text.shape[1] != TEXT_TOKENS):
            length = "L" if config.added_kv_proj_dim is None else TEXT_TOKENS
            raise ValueError(f"text: expected [B, {length}, text_dim], got {tuple(text.shape)}")
        if (image is None) != (config.image_dim is None):
            if config.image_dim is None:
                raise ValueError("image: expected None, since the transformer has no image embedding")
            raise ValueError(f"image: expected CLIP tokens [B, L, {config.image_dim}], got None")
        self.transformer, self.text, self.image = transformer, text, image
        self._blocks: tuple[int, ...] = ()
        self._placed = False
        # Left out of a compiled graph, which would otherwise hold the positions and be traced anew for every window.
        # One object for all calls, by which such a graph knows it again.
        self._hook = torch.compiler.disable(self._place)

    @property
    def mask_channels(self) -> int | None:
        """The ``mask_channels`` of :func:`swifti2v_kernels.sample_segments` for this transformer.

        They are 4 for Wan I2V (36 channels of 16), and None for one that takes latents alone.

        Raises:
            ValueError: the transformer's input is neither.
        """
        config: Any = self.transformer.config
        z = config.out_channels or config.in_channels
        if config.in_channels == z:
            return None
        rest = config.in_channels - 2 * z
        if rest < 0:
            raise ValueError(
                f"transformer: expected in_channels of {z} (latents) or at least {2 * z} (latents, mask, reference),"
                f" got {config.in_channels}"
            )
        return rest

    def __call__(self, latents: Tensor, sigma: float, window: Window, /) -> Tensor:
        """Returns the velocity ``[B, z, W, h, w]`` of a window.

        Args:
            latents: the window ``[B, C, W, h, w]`` as :func:`swifti2v_kernels.assemble_window` makes it.
            sigma: noise level in 0..1 of the blocks ``window.noisy``.
            window: the indices of these blocks in the clip.

        Raises:
            ValueError: the latents or the window do not fit the transformer.
            HostChanged: the transformer did not call its module ``rope``, or what that returned is not known.
        """
        config: Any = self.transformer.config
        if latents.ndim != 5 or latents.shape[1:3] != (config.in_channels, len(window.blocks)):
            raise ValueError(
                f"latents: expected [B, {config.in_channels}, {len(window.blocks)}, h, w], got {tuple(latents.shape)}"
                " (mask_channels of sample_segments decides the channels)"
            )
        if max(window.blocks) >= config.rope_max_seq_len:
            raise ValueError(
                f"window: expected blocks below {config.rope_max_seq_len}, the positions that the transformer knows"
                f" (rope_max_seq_len), got {window.blocks}"
            )
        batch, _, _, height, width = latents.shape
        if self.text.shape[0] not in (1, batch):
            raise ValueError(f"text: expected a batch of 1 or {batch}, got {self.text.shape[0]}")
        tokens = (height // config.patch_size[1]) * (width // config.patch_size[2])
        per_block = [0.0] * len(window.conditioning) + [_TIMESTEPS * sigma] * len(window.noisy)
        timestep = torch.tensor(per_block, dtype=torch.float32, device=latents.device)
        timestep = timestep.repeat_interleave(tokens).expand(batch, -1)
        copies = batch // self.text.shape[0], 1, 1
        text, image = (
            None if x is None else x.to(latents.device, self.transformer.dtype).repeat(*copies)
            for x in (self.text, self.image)
        )
        self._blocks, self._placed = window.blocks, False
        handle = self.transformer.rope.register_forward_hook(self._hook)
        try:
            velocity = self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                timestep=timestep,
                encoder_hidden_states=text,
                encoder_hidden_states_image=image,
                return_dict=False,
            )[0]
        finally:
            handle.remove()
        if not self._placed:
            raise HostChanged(
                "transformer: its module rope was not called, so the window's blocks had no true positions; if it is"
                " compiled as a whole, compile its layers instead (compile_repeated_blocks)"
            )
        return velocity

    def _place(self, rope: Any, inputs: Any, output: Any) -> tuple[Tensor, ...]:
        """Returns the tables of the window's blocks instead of those of 0, 1, 2, ..., as a hook of ``rope``."""
        self._placed, blocks = True, list(self._blocks)
        if not isinstance(output, tuple):
            raise HostChanged(f"transformer: expected rope to return a tuple, got {type(output).__name__}")
        # One token a frame, up to the last: the module's own rows for time, wherever its tables are kept.
        patch = self.transformer.config.patch_size
        frames = rope.forward(output[0].new_empty(1, 1, max(blocks) + 1, *patch[1:]))
        # Rows and columns have 2 * (D // 6) channels each, time the rest.
        t_dim = rope.attention_head_dim - 4 * (rope.attention_head_dim // 6)
        tables = []
        for table, rows in zip(output, frames, strict=True):
            if table.ndim != 4 or table.shape[1] % len(blocks) or rows.shape != (1, max(blocks) + 1, *table.shape[2:]):
                raise HostChanged(
                    f"transformer: expected rope to return tables [1, tokens, 1, D], got {tuple(table.shape)}"
                    f" and {tuple(rows.shape)}"
                )
            by_block = table.unflatten(1, (len(blocks), -1)).clone()
            by_block[..., :t_dim] = rows[:, blocks, None, :, :t_dim]
            tables.append(by_block.flatten(1, 2))
        return tuple(tables)
