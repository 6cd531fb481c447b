"""Operations, bytes and memory of the DiT, in closed form.

For a window of L tokens, of which L' are to be predicted, C channels, F hidden channels, n layers, S tokens of text:

    linear            n * 2 L (2 C^2)                          keys and values
                      (n - 1) * 2 L (4 C^2 + 2 C F) + 2 L' (4 C^2 + 2 C F)
                                                               queries, outputs, feed-forward; the last layer has L'
    self-attention    4 C L ((n - 1) L + L')
    cross-attention   4 C S ((n - 1) L + L')
    embedding, head   2 L K C and 2 L' C H                     K and H: channels of a patch, in and out

The last layer's queries are the blocks to predict only (``model/dit/model.py``). Text keys and values, 2 S n (2 C^2),
and the modulation of all timesteps are made once a clip. Between matmuls a layer moves 18 rows of C channels a token:
rotated queries (2) and keys (2), queries of cross-attention (2), and three updates with their norms (4 each).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

import torch

from model.config import MASK_CHANNELS, DiTConfig
from model.dit.model import WanDiT, dit_parameter_dtype
from model.dit.workspace import Workspace
from model.errors import InputError
from model.memory.cost.work import Matmul, Traffic, Work
from model.pipeline.encoders import TEXT_LENGTH

#: Bytes that eager code moves between matmuls, for each token, channel and layer in 16 bits. Fitted, together with the
#: rates of the profile ``reference``, to published times (``bench/cost/calibration.py``): 240 rows of the stream.
EAGER_BYTES = 480.0
#: Tokens of one image embedded by CLIP.
IMAGE_TOKENS = 257
STORE_ITEMSIZE = 4


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
    return 0 if config.image_dim is None else config.pos_embed_seq_len or IMAGE_TOKENS


def forward(
    config: DiTConfig,
    tokens: int,
    *,
    targets: int | None = None,
    remembered: int = 0,
    text_tokens: int = TEXT_LENGTH,
    itemsize: int = 2,
) -> Work:
    """Returns the work of one pass over a window.

    Args:
        config: the shape of the model.
        tokens: L, the tokens of all blocks.
        targets: L', those of the blocks to predict; None: all. With 0 only keys and values are computed.
        remembered: tokens of other blocks whose keys and values are kept, and which every query attends to.
        text_tokens: S, the tokens of text.
        itemsize: bytes of an activation.

    Raises:
        InputError: a number does not fit.
    """
    targets = tokens if targets is None else targets
    if tokens < 1 or not 0 <= targets <= tokens:
        raise InputError(f"tokens, targets: expected at least 1, and 0..tokens, got {tokens} and {targets}")
    if remembered < 0 or text_tokens < 1:
        raise InputError(f"remembered, text_tokens: expected >= 0 and >= 1, got {remembered} and {text_tokens}")
    dim, hidden, layers = config.dim, config.ffn_dim, config.num_layers
    features, written = (prod(config.patch_size) * c for c in (config.in_channels, config.out_channels))
    queries = (layers - 1) * tokens + targets  # of all layers
    keys, context = tokens + remembered, text_tokens + image_tokens(config)
    matmuls = (
        Matmul("linear", 4 * layers * tokens * dim * dim + 2 * queries * dim * (4 * dim + 2 * hidden), dim),
        Matmul("self_attention", 4 * queries * keys * dim, keys),
        Matmul("cross_attention", 4 * queries * context * dim, context),
        Matmul("linear", 2 * tokens * features * dim, features),
        Matmul("linear", 2 * targets * dim * written, dim),
    )
    # In elements: tokens in and out of every matmul, keys and values of every layer's attention, weights.
    rows = layers * tokens * 4 + queries * 14
    sources = 2 * layers * (keys + context)
    weights = layers * dim * (6 * dim + 2 * hidden) + dim * (features + written)
    operands = itemsize * (dim * (rows + sources + tokens + targets) + 2 * queries * hidden + weights)
    stores = STORE_ITEMSIZE * (
        tokens * max(features - prod(config.patch_size) * _masks(config), 0) + 2 * targets * written
    )
    updates = 12 if config.cross_attn_norm else 13
    moved = 2 * tokens + 2 * layers * tokens + (updates + 4) * queries - targets
    if config.added_kv:
        moved += 3 * queries  # a second softmax, whose result is added
    fused = float(itemsize * dim * moved)
    eager = EAGER_BYTES * itemsize / 2 * dim * layers * tokens
    return Work(matmuls, operands + stores, Traffic(fused, fused, eager))


def context(config: DiTConfig, text_tokens: int = TEXT_LENGTH, itemsize: int = 2) -> Work:
    """Returns the work of embedding text and image and making all layers' keys and values: once a clip and prompt."""
    dim, image = config.dim, image_tokens(config)
    text = text_tokens * dim * (config.text_dim + dim)
    pairs = 2 * config.num_layers * (text_tokens + image) * dim * dim
    matmuls = [Matmul("linear", 2 * (text + pairs), dim)]
    if config.image_dim is not None:
        matmuls.append(Matmul("linear", 2 * image * config.image_dim * (config.image_dim + dim), config.image_dim))
    sets = 2 if config.added_kv else 1
    weights = dim * (config.text_dim + dim) + 2 * sets * config.num_layers * dim * dim
    written = 2 * config.num_layers * (text_tokens + image) * dim
    return Work(tuple(matmuls), float(itemsize * (weights + 2 * written)), Traffic.same(float(itemsize * written)))


def modulation(config: DiTConfig, timesteps: int, itemsize: int = 2) -> Work:
    """Returns the work of the modulation of so many timesteps in all layers: once a clip."""
    dim = config.dim
    flops = 2 * timesteps * dim * (config.freq_dim + dim + 6 * dim)
    weights = dim * ((config.freq_dim + dim) * 4 + 6 * dim * itemsize)
    return Work(
        (Matmul("linear", flops, dim),), float(weights), Traffic.same(8.0 * modulation_elements(config, timesteps))
    )


def modulation_elements(config: DiTConfig, timesteps: int) -> int:
    """Returns the number of elements, in float32, of the modulation of all layers and of the head."""
    return timesteps * config.dim * (6 * config.num_layers + 2)


@dataclass(frozen=True)
class DiTMemory:
    """The bytes that denoising holds from its first to its last step; nothing is allocated in between."""

    weights: int
    context: int
    modulation: int
    workspace: int
    stores: int
    remembered: int

    @property
    def total(self) -> int:
        """The sum of all, which is the peak."""
        return sum(vars(self).values())


def memory(
    config: DiTConfig,
    latent_size: tuple[int, int],
    *,
    window_blocks: int,
    denoised_blocks: int,
    num_blocks: int,
    steps: int,
    dtype: torch.dtype,
    remembered_blocks: int = 0,
    contexts: int = 1,
    text_tokens: int = TEXT_LENGTH,
    eight_bits: torch.dtype | None = None,
) -> DiTMemory:
    """Returns the peak of denoising windows of one clip, part by part; activations are planned as the model does it.

    Args:
        config: the shape of the model.
        latent_size: rows and columns of a latent frame.
        window_blocks: blocks of the largest window that is run at once.
        denoised_blocks: blocks of the store of latents.
        num_blocks: blocks of the store of what is known: the clip's.
        steps: steps of the schedule.
        dtype: the dtype of weights and activations.
        remembered_blocks: blocks whose keys and values are kept (the causal mode).
        contexts: sets of text keys and values: 2 with guidance.
        text_tokens: the tokens of one set.
        eight_bits: the dtype of what is quantised before a matmul; None where matmuls are in ``dtype``.
    """
    block_len = tokens_per_block(config, latent_size)
    workspace = Workspace.plan(config, 1, window_blocks, block_len, dtype=dtype, device="meta", eight_bits=eight_bits)
    pairs = 2 * config.num_layers * config.dim * dtype.itemsize
    latents = config.out_channels * latent_size[0] * latent_size[1] * STORE_ITEMSIZE
    return DiTMemory(
        weights=weight_bytes(config, dtype),
        context=contexts * (text_tokens + image_tokens(config)) * pairs,
        modulation=4 * modulation_elements(config, steps + 1),
        workspace=workspace.nbytes,
        stores=(denoised_blocks + num_blocks) * latents,
        remembered=remembered_blocks * block_len * pairs,
    )


@functools.cache
def weight_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Returns the bytes of the parameters when the model is loaded in ``dtype``: some small ones stay in float32."""
    with torch.device("meta"):
        model = WanDiT(config)
    return sum(p.numel() * dit_parameter_dtype(name, dtype).itemsize for name, p in model.named_parameters())


def _masks(config: DiTConfig) -> int:
    """Returns the number of mask channels among the inputs, which are not read from memory."""
    return MASK_CHANNELS if config.in_channels == 2 * config.out_channels + MASK_CHANNELS else 0
