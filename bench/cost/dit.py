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

from bench.cost.work import Matmul, Work
from model.config import MASK_CHANNELS, DiTConfig
from model.memory.dit_bytes import modulation_elements
from model.pipeline.encoders import TEXT_LENGTH

#: Bytes of an activation, and of a latent in its store.
ITEMSIZE, STORE_ITEMSIZE = 2, 4


def forward(config: DiTConfig, tokens: int, *, targets: int | None = None, remembered: int = 0) -> Work:
    """Returns the work of one pass over a window.

    Args:
        config: the shape of the model.
        tokens: L, the tokens of all blocks.
        targets: L', those of the blocks to predict; None: all. With 0 only keys and values are computed.
        remembered: tokens of other blocks whose keys and values are kept, and which every query attends to.
    """
    targets = tokens if targets is None else targets
    dim, hidden, layers = config.dim, config.ffn_dim, config.num_layers
    features, written = (prod(config.patch_size) * c for c in (config.in_channels, config.out_channels))
    queries = (layers - 1) * tokens + targets  # of all layers
    keys = tokens + remembered
    matmuls = (
        Matmul("linear", 4 * layers * tokens * dim * dim + 2 * queries * dim * (4 * dim + 2 * hidden), dim),
        Matmul("self_attention", 4 * queries * keys * dim, keys),
        Matmul("cross_attention", 4 * queries * TEXT_LENGTH * dim, TEXT_LENGTH),
        Matmul("linear", 2 * tokens * features * dim, features),
        Matmul("linear", 2 * targets * dim * written, dim),
    )
    # In elements: tokens in and out of every matmul, keys and values of every layer's attention, weights.
    rows = layers * tokens * 4 + queries * 14
    sources = 2 * layers * (keys + TEXT_LENGTH)
    weights = layers * dim * (6 * dim + 2 * hidden) + dim * (features + written)
    operands = ITEMSIZE * (dim * (rows + sources + tokens + targets) + 2 * queries * hidden + weights)
    # Mask channels are not read from memory.
    masks = MASK_CHANNELS if config.in_channels == 2 * config.out_channels + MASK_CHANNELS else 0
    stores = STORE_ITEMSIZE * (tokens * (features - prod(config.patch_size) * masks) + 2 * targets * written)
    moved = float(ITEMSIZE * dim * (2 * tokens + 2 * layers * tokens + 16 * queries - targets))
    return Work(matmuls, operands + stores, moved, moved)


def context(config: DiTConfig) -> Work:
    """Returns the work of embedding text and making all layers' keys and values: once a clip and prompt."""
    dim, layers = config.dim, config.num_layers
    flops = 2 * TEXT_LENGTH * (dim * (config.text_dim + dim) + 2 * layers * dim * dim)
    weights = dim * (config.text_dim + dim) + 2 * layers * dim * dim
    written = 2 * layers * TEXT_LENGTH * dim
    moved = float(ITEMSIZE * written)
    return Work((Matmul("linear", flops, dim),), float(ITEMSIZE * (weights + 2 * written)), moved, moved)


def modulation(config: DiTConfig, timesteps: int) -> Work:
    """Returns the work of the modulation of so many timesteps in all layers: once a clip."""
    dim = config.dim
    flops = 2 * timesteps * dim * (config.freq_dim + dim + 6 * dim)
    weights = dim * ((config.freq_dim + dim) * 4 + 6 * dim * ITEMSIZE)
    moved = 8.0 * modulation_elements(config, timesteps)
    return Work((Matmul("linear", flops, dim),), float(weights), moved, moved)
