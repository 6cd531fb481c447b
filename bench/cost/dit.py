"""Operations and bytes of the DiT, in closed form: of a window, and of the passes of a stage.

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

from math import prod

from bench.cost.work import Matmul, Traffic, Work
from model.config import MASK_CHANNELS, DiTConfig
from model.csg.sampler import Window
from model.errors import InputError
from model.memory.dit_bytes import image_tokens, modulation_elements, tokens_per_block
from model.pipeline.encoders import TEXT_LENGTH

#: Bytes that eager code moves between matmuls, for each token, channel and layer in 16 bits. Fitted, together with the
#: rates of the profile ``reference``, to published times (docs/results/notes.md): 240 rows of the stream.
EAGER_BYTES = 480.0
STORE_ITEMSIZE = 4


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


def whole_step(config: DiTConfig, num_blocks: int, latent_size: tuple[int, int], itemsize: int = 2) -> Work:
    """Returns one step of all blocks of a clip in one window, as ``model.pipeline.stages.make_motion`` takes it."""
    tokens = tokens_per_block(config, latent_size)
    # A DiT without mask channels is given its first block.
    targets = num_blocks - (config.in_channels == config.out_channels)
    return forward(config, num_blocks * tokens, targets=targets * tokens, itemsize=itemsize)


def window_passes(
    config: DiTConfig, window: Window, mode: str, latent_size: tuple[int, int], itemsize: int = 2
) -> tuple[Work, Work]:
    """Returns a Stage II window's work done once, and in every step (``model.csg.sampler.sample_latents``)."""
    tokens = tokens_per_block(config, latent_size)
    given, noisy = len(window.conditioning) * tokens, len(window.noisy) * tokens
    if mode == "causal":
        once = forward(config, given, targets=0, itemsize=itemsize)
        return once, forward(config, noisy, remembered=given, itemsize=itemsize)
    return Work(), forward(config, given + noisy, targets=noisy, itemsize=itemsize)


def _masks(config: DiTConfig) -> int:
    """Returns the number of mask channels among the inputs, which are not read from memory."""
    return MASK_CHANNELS if config.in_channels == 2 * config.out_channels + MASK_CHANNELS else 0
