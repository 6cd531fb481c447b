"""Loading checkpoints: diffusers directories and files of the Wan repositories, and seeded random weights.

Tensors are read one by one into a model that holds no memory yet, so the peak is the model itself; float8 weights are
multiplied by their scales and LoRAs are merged in the same pass, each in float32 and rounded once. What a file may be
is in ``model/weight_files.py``, scales in ``model/scaled_weights.py``, names in ``model/checkpoint_keys.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.checkpoint_keys import dit_key_map, infer_dit_config, infer_vae_config, strip_prefix, vae_key_map
from model.config import DiTConfig, VAEConfig
from model.dit import FLOAT32_PARAMETERS, WanDiT
from model.errors import InputError
from model.lora import LoRA, LoRASet
from model.scaled_weights import plain_weights
from model.vae import WanVAE
from model.weight_files import FLOATS, looking_at, open_weights

# Tensors that published checkpoints carry and no forward pass uses (diffusers ignores them too).
_UNUSED = ("norm_added_q",)

Model = TypeVar("Model", WanDiT, WanVAE)


def load_dit(
    path: str | Path,
    *,
    config: DiTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    loras: Sequence[LoRA] = (),
) -> WanDiT:
    """Loads a Wan DiT (any variant of :class:`WanDiT`).

    Args:
        path: a diffusers directory (``config.json`` and one or several safetensors shards, or a pipeline directory
            with a ``transformer`` folder), or a file, directory or index of shards with the key names of the Wan
            repositories; float8 with or without scales, as ComfyUI ships it, and its files of a whole pipeline too.
        config: overrides what is read from ``config.json`` or inferred from the tensors.
        dtype: of the large products; the parameters in ``FLOAT32_PARAMETERS`` stay in float32.
        device: where the weights go.
        loras: merged into each tensor as it is read, at the checkpoint's precision: rounded to ``dtype`` once.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: nothing loadable there, or tensors are missing, surplus or misshapen (all of them named); a
            quantisation that is not read here; or a LoRA that does not fit (:class:`~model.lora.LoRAMismatch`).
    """
    checkpoint, config = _open_dit(Path(path), config)
    return checkpoint.load(WanDiT, config, lambda name: dit_parameter_dtype(name, dtype), device, loras)


def inspect_dit(path: str | Path, loras: Sequence[LoRA] = ()) -> DiTConfig:
    """The configuration of the checkpoint that :func:`load_dit` would load, checked without reading its tensors.

    Raises:
        InputError: as :func:`load_dit`.
    """
    checkpoint, config = _open_dit(Path(path), None)
    checkpoint.check(WanDiT, config, loras)
    return config


def dit_config(path: str | Path) -> DiTConfig:
    """The configuration of a checkpoint, whether or not its tensors are all there and readable.

    Raises:
        InputError: it cannot be told.
    """
    return _open_dit(Path(path), None)[1]


def load_vae(
    path: str | Path,
    *,
    config: VAEConfig | None = None,
    dtype: torch.dtype = torch.float32,
    decode_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> WanVAE:
    """Loads a Wan VAE, version 2.1 or 2.2; arguments and errors as for :func:`load_dit`.

    ``dtype`` is the encoder's: others report drift from encoding the conditioning image in bfloat16, and none from
    decoding (FastVideo PR 1472). ``decode_dtype`` is the decoder's; by default bfloat16 on a GPU where ``dtype`` is
    float32, else the same. Whether float32 convolutions use TF32 is torch's setting
    (``torch.backends.cudnn.allow_tf32``, on by default).
    """
    checkpoint, config = _open_vae(Path(path), config)
    if decode_dtype is None:
        on_gpu = torch.device(device).type == "cuda" and dtype == torch.float32
        decode_dtype = torch.bfloat16 if on_gpu else dtype
    decodes = ("decoder.", "post_quant_conv.")
    return checkpoint.load(WanVAE, config, lambda name: decode_dtype if name.startswith(decodes) else dtype, device)


def inspect_vae(path: str | Path) -> VAEConfig:
    """As :func:`inspect_dit`, for :func:`load_vae`."""
    checkpoint, config = _open_vae(Path(path), None)
    checkpoint.check(WanVAE, config)
    return config


def _open_dit(path: Path, config: DiTConfig | None) -> tuple[_Checkpoint, DiTConfig]:
    checkpoint = _Checkpoint(_part_of_pipeline(path, ("transformer",)), "DiT", "WanTransformer3DModel", dit_key_map)
    if config is not None:
        return checkpoint, config
    with _named(checkpoint.path):
        if checkpoint.is_diffusers:
            return checkpoint, DiTConfig.from_diffusers(checkpoint.config)
        return checkpoint, infer_dit_config(checkpoint.shapes, checkpoint.config)


def _open_vae(path: Path, config: VAEConfig | None) -> tuple[_Checkpoint, VAEConfig]:
    path = _part_of_pipeline(path, ("vae", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"))
    checkpoint = _Checkpoint(path, "VAE", "AutoencoderKLWan", vae_key_map)
    if config is not None:
        return checkpoint, config
    with _named(checkpoint.path):
        if checkpoint.is_diffusers:
            return checkpoint, VAEConfig.from_diffusers(checkpoint.config)
        return checkpoint, infer_vae_config(checkpoint.shapes)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the checkpoint's name before what is wrong with its configuration."""
    try:
        yield
    except InputError as error:
        raise InputError(f"weights: {path}: {error}") from error


def dit_parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the DiT parameter ``name`` is kept when the model is loaded in ``dtype``."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and any(part in name for part in FLOAT32_PARAMETERS) else dtype


def random_weights(
    kind: type[Model], config: Any, seed: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """A model with seeded random weights of the usual magnitude: for tests, and for timing at real sizes.

    Matrices and kernels are normal with variance 1 / fan_in, norms are 1, biases 0. The numbers depend on the kind of
    device, since they are drawn where they are used.
    """
    with torch.device("meta"):
        model = kind(config)
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    state = {}
    for name, parameter in model.state_dict().items():
        target = dit_parameter_dtype(name, dtype) if kind is WanDiT else dtype
        if name.endswith(("gamma", "norm.weight")) or parameter.ndim == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            state[name] = fill(parameter.shape, dtype=target, device=device)
        else:
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            normal = torch.empty(parameter.shape, dtype=target, device=device)
            state[name] = normal.normal_(0, fan_in**-0.5, generator=generator)
    return _assign(model, state)


def _assign(model: Model, state: dict[str, Tensor]) -> Model:
    model.load_state_dict(state, strict=True, assign=True)
    if isinstance(model, WanVAE):
        model.order_weights()
    return model.requires_grad_(False).eval()


def _part_of_pipeline(path: Path, parts: tuple[str, ...]) -> Path:
    """The part inside a pipeline directory, or the path itself."""
    with looking_at(path):
        if path.is_dir() and not (path / "config.json").exists():
            return next((path / part for part in parts if (path / part).exists()), path)
        return path


class _Checkpoint:
    """The tensors of a directory or file under this project's names, read when they are asked for."""

    def __init__(self, path: Path, part: str, class_name: str, key_map: Callable[[Any], Callable[[str], str]]):
        files = open_weights(path)
        self.path, self.config = path, files.config
        given = self.config.get("_class_name")
        self.is_diffusers = given == class_name
        if given in {"WanTransformer3DModel", "AutoencoderKLWan"} - {class_name}:
            raise InputError(f"weights: {path} holds a {given}, not a {class_name}")
        plain = plain_weights(files)
        self._problem = plain.problem
        stripped = strip_prefix(plain.tensors, part)
        rename = key_map(stripped)
        self._keys: dict[str, str] = {}
        for short, key in stripped.items():
            if any(unused in short for unused in _UNUSED):
                continue
            name = rename(short)
            if name in self._keys:
                raise InputError(f"weights: {path} holds {name} twice, as {self._keys[name]} and as {key}")
            self._keys[name] = key
        self._tensors = {name: plain.tensors[key] for name, key in self._keys.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def load(
        self,
        kind: type[Model],
        config: Any,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device | str,
        loras: Sequence[LoRA] = (),
    ) -> Model:
        """Builds the model and gives it the tensors, or says everything that does not fit."""
        model, chosen = self.check(kind, config, loras)
        state = {}
        for name in model.state_dict():
            if name in chosen:
                state[name] = chosen.add_to(name, self._tensors[name].wide(device)).to(dtype_of(name))
            else:
                state[name] = self._tensors[name].load(dtype_of(name), device)
        return _assign(model, state)

    def check(self, kind: type[Model], config: Any, loras: Sequence[LoRA] = ()) -> tuple[Model, LoRASet]:
        """The model without memory, if every tensor of it is there with the right shape and no other, and its LoRAs."""
        if self._problem is not None:
            raise InputError(f"weights: {self.path} is {self._problem}")
        model = self._build(kind, config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in self.shapes]
        problems += [f"surplus {self._keys[name]}" for name in self.shapes if name not in expected]
        problems += [
            f"misshapen {self._keys[name]}: {self.shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        problems += [
            f"{self._keys[name]} is {self._tensors[name].stored.dtype}, expected floats"
            for name in expected
            if name in self.shapes and self._tensors[name].stored.dtype not in FLOATS
        ]
        if problems:
            listed = "; ".join(problems)
            raise InputError(f"weights: {self.path} does not fit {kind.__name__}: {len(problems)} tensors: {listed}")
        return model, LoRASet(loras, expected)

    def _build(self, kind: type[Model], config: Any) -> Model:
        """The model without memory."""
        layers = config.num_layers if kind is WanDiT else len(config.dim_mult) * config.num_res_blocks
        # A layer has tensors. A number far beyond theirs would be built for hours before they are missed.
        if layers > len(self.shapes):
            raise InputError(
                f"weights: {self.path} does not fit {kind.__name__}: its configuration has {layers} layers, and it"
                f" holds {len(self.shapes)} tensors"
            )
        try:
            with torch.device("meta"):
                return kind(config)
        except (RuntimeError, OverflowError, TypeError) as error:
            # Without memory nothing can be too large but a size itself, for which torch has these three.
            raise InputError(f"weights: {self.path}: sizes beyond what torch can count: {config}") from error
