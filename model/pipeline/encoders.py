"""Embeddings of text and image: UMT5 and CLIP by transformers, a file of precomputed ones, or the empty prompt.

Wan reads 512 text positions. The prompt's tokens come first, the rest are zero vectors, and the DiT attends to all.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import InputError, require
from model.machine.finite import check_finite

TEXT_LENGTH = 512


def clean_prompt(prompt: str) -> str:
    """Repairs broken Unicode, HTML entities and white space, as Wan's own pipeline does."""
    text = require("ftfy", "text").fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def encode_prompt(
    prompt: str, weights: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the UMT5 embedding ``[1, 512, text_dim]`` of a prompt in float32, zero after its last token.

    Args:
        prompt: any text; longer ones are cut at 512 tokens.
        weights: a directory with ``text_encoder`` and ``tokenizer``, as diffusers saves them.
        dtype, device: dtype and device of the encoder, which is loaded for this call and released: 11 GB in bfloat16.

    Raises:
        InputError: transformers is missing, the directory does not hold an encoder, or what it gives is not finite.
    """
    parts = {"tokenizer": "AutoTokenizer", "text_encoder": "UMT5EncoderModel"}
    tokenizer, encoder = _loaded(parts, "no UMT5 encoder", weights, dtype, device)
    tokens = tokenizer(clean_prompt(prompt), max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        # Without padding: the masked run of the padded sequence gives the same embedding.
        states = encoder(tokens.input_ids.to(device), tokens.attention_mask.to(device)).last_hidden_state
    check_finite(f"weights: {weights / 'text_encoder'} in {_name(dtype)}, whose weights may be damaged", states)
    return _pad(states.float())


def _loaded(
    parts: Mapping[str, str], lacking: str, weights: Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, Any]:
    """Returns a preprocessor and an encoder, by folder their classes of transformers; says what is lacking."""
    transformers = require("transformers", "text")
    (first, preprocessor), (second, model) = parts.items()
    try:
        made = getattr(transformers, preprocessor).from_pretrained(weights / first, local_files_only=True)
        encoder = getattr(transformers, model).from_pretrained(weights / second, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"weights: {lacking} in {weights}: {str(error).splitlines()[0]}") from error
    return made, encoder.to(device).eval()


def load_text_embedding(path: Path, text_dim: int) -> Tensor:
    """Returns a precomputed embedding ``[1, 512, text_dim]``, zero after the rows that the file has.

    Args:
        path: a safetensors file with one tensor ``[L, text_dim]`` or ``[1, L, text_dim]`` of any float dtype, L in
            1..512.
        text_dim: the width that the DiTs read.

    Raises:
        InputError: the file is unreadable, or its tensor has another shape or dtype, or holds NaN or infinity.
    """
    safetensors = require("safetensors", "generate")
    if not path.is_file():
        raise InputError(f"text-embeddings: {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        # The header is judged first: somebody may name a whole model.
        with safetensors.safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            told = ", ".join(name if name.isprintable() else ascii(name) for name in names[:9]) or "none"
            if len(names) != 1:
                raise InputError(f"text-embeddings: expected one tensor in {path}, got {told}")
            shape = tuple(file.get_slice(names[0]).get_shape())
            length, *width = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape or (0,)
            if width != [text_dim] or not 1 <= length <= TEXT_LENGTH:
                expected = f"[1 <= L <= {TEXT_LENGTH}, {text_dim}]"
                raise InputError(f"text-embeddings: expected {expected} in {path}, got {shape}")
            states = file.get_tensor(names[0])
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"text-embeddings: {path} is not a readable safetensors file: {error}") from error
    if not states.is_floating_point():
        raise InputError(f"text-embeddings: expected floating numbers in {path}, got {told} in {_name(states.dtype)}")
    states = states.float().view(1, length, text_dim)
    check_finite(f"text-embeddings: {told} in {path}", states)
    return _pad(states)


def empty_text(text_dim: int) -> Tensor:
    """Returns the embedding ``[1, 512, text_dim]`` that stands for no text where there is no encoder: all zero."""
    return torch.zeros(1, TEXT_LENGTH, text_dim, dtype=torch.float32, device="cpu")


def encode_image(image: Any, weights: Path, *, device: torch.device | str = "cpu") -> Tensor:
    """Returns the CLIP tokens ``[1, 257, image_dim]`` that Wan2.1 I2V attends to: the last but one hidden state.

    Args:
        image: the PIL image in its own size.
        weights: a directory with ``image_encoder`` and ``image_processor``, as diffusers saves them.
        device: the device of the encoder, which is loaded for this call, in float32, and released.

    Raises:
        InputError: transformers is missing, the directory does not hold an encoder, or what it gives is not finite.
    """
    parts = {"image_processor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModel"}
    processor, encoder = _loaded(parts, "Stage I needs a CLIP encoder", weights, torch.float32, device)
    pixels = processor(images=image, return_tensors="pt").pixel_values.to(device)
    with torch.inference_mode():
        tokens = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    check_finite(f"weights: {weights / 'image_encoder'} in float32, whose weights may be damaged", tokens)
    return tokens.float()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pad(states: Tensor) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, TEXT_LENGTH - states.shape[1]))
