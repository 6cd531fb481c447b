"""Loading checkpoints: diffusers directories and files of the Wan repositories, and seeded random weights.

Tensors are read one by one into a model that holds no memory yet, so the peak is the model itself; 8-bit weights are
multiplied by their scales and LoRAs are merged in the same pass, each in float32 and rounded once. What a file may be
is in ``model/weights/files.py``, scales in ``model/weights/scaled.py``, names in ``model/weights/keys.py``. The first
time that a tensor is read it is checked to be finite, and to stay so in the dtype that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.config import DiTConfig, VAEConfig
from model.dit.model import WanDiT, dit_parameter_dtype
from model.errors import InputError
from model.machine.counted import elsewhere
from model.streaming.placed import TensorSource, place
from model.streaming.placement import Placement
from model.vae.model import WanVAE
from model.weights.files import looking_at, open_weights
from model.weights.keys import (
    dit_parameter,
    infer_dit_config,
    infer_vae_config,
    is_original,
    strip_prefix,
    vae_parameter,
)
from model.weights.lora import LoRA, LoRASet
from model.weights.recognise import recognise
from model.weights.scaled import (
    EIGHT_BITS,
    ScaledTensor,
    check_holds,
    check_scaled,
    largest,
    plain_weights,
    quantisation_problem,
)
from swifti2v_kernels import quantize_rows

# Tensors of published checkpoints that no forward pass uses (diffusers ignores them too).
_UNUSED = ("norm_added_q",)

#: Names, inside the directory of a whole pipeline, of its DiT and its VAE.
DIT_PARTS = ("transformer",)
VAE_PARTS = ("vae", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth")

Model = TypeVar("Model", WanDiT, WanVAE)


def load_dit(
    path: str | Path,
    *,
    config: DiTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    loras: Sequence[LoRA] = (),
    placement: Placement | None = None,
) -> WanDiT:
    """Loads a Wan DiT (any variant of :class:`WanDiT`).

    Args:
        path: a diffusers directory (``config.json`` and one or several safetensors shards, or a pipeline directory
            with a ``transformer`` folder), or a file, directory or index of shards with the key names of the Wan
            repositories; in 8 bits, as ComfyUI and LightX2V ship it, GGUF, and files of a whole pipeline too.
        config: overrides what is read from ``config.json`` or inferred from the tensors.
        dtype: the dtype of the large matmuls; the parameters in ``FLOAT32_PARAMETERS`` stay in float32.
        device: where the weights go.
        loras: merged into each tensor as it is read, at the checkpoint's precision: rounded to ``dtype`` once.
        placement: where the weights of its layers live while it runs, and in how many bits
            (:class:`model.streaming.placement.Placement`); None: on the device, in ``dtype``.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: nothing loadable is there; tensors are missing, surplus or misshapen (all of them named); it has a
            quantisation that is not read here; a tensor holds NaN or infinity, or numbers that ``dtype`` cannot hold
            (of a layer that ``placement`` leaves in its file: when it is first read); or a LoRA does not fit.
    """
    checkpoint = Checkpoint(path, WanDiT, config)
    model = checkpoint.check(loras, dtype)
    if placement is None:
        return _fill(model, checkpoint, lambda name: dit_parameter_dtype(name, dtype), device)
    return place(model, placement, checkpoint, dtype=dtype, device=device, stored=checkpoint.in_eight_bits())


def inspect_weights(path: str | Path, kind: type[Model], loras: Sequence[LoRA] = ()) -> Checkpoint:
    """Returns the checkpoint of a DiT or VAE, as it would be loaded, checked without reading its tensors.

    Raises:
        InputError: as :func:`load_dit`.
    """
    checkpoint = Checkpoint(path, kind)
    checkpoint.check(loras)
    return checkpoint


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
    if decode_dtype is None:
        on_gpu = torch.device(device).type == "cuda" and dtype == torch.float32
        decode_dtype = torch.bfloat16 if on_gpu else dtype
    decodes = ("decoder.", "post_quant_conv.")
    checkpoint = Checkpoint(path, WanVAE, config)
    model = checkpoint.check()
    return _fill(model, checkpoint, lambda name: decode_dtype if name.startswith(decodes) else dtype, device)


def random_weights(
    kind: type[Model],
    config: Any,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    placement: Placement | None = None,
) -> Model:
    """Returns a model with seeded random weights of the usual magnitude: for tests, and for timing at real sizes.

    Matrices and kernels are normal with variance 1 / fan_in, norms are 1, biases 0. The numbers depend on the kind of
    device, since they are drawn where they are used, and not on the placement (of a DiT's layers).
    """
    with torch.device("meta"), elsewhere():
        model = kind(config)
    tensors = _RandomTensors({name: tuple(p.shape) for name, p in model.state_dict().items()}, seed, device)
    if placement is not None:
        return place(model, placement, tensors, dtype=dtype, device=device)
    return _fill(model, tensors, lambda name: dit_parameter_dtype(name, dtype) if kind is WanDiT else dtype, device)


class _RandomTensors:
    """Random tensors, each drawn from a seed of its own, so that they can be asked for in any order and again."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, device: torch.device | str) -> None:
        self.shapes, self._device = shapes, torch.device(device)
        self._seeds = {name: (seed + i * 0x9E3779B97F4A7C15) % 2**63 for i, name in enumerate(shapes)}

    def plain(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith(("gamma", "norm.weight")) or len(shape) == 1:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            return fill(shape, dtype=dtype, device=device)
        fan_in = shape[-1] if len(shape) == 3 else prod(shape[1:])
        normal = torch.empty(shape, dtype=torch.float32, device=self._device)
        if self._device.type != "meta":
            generator = torch.Generator(self._device).manual_seed(self._seeds[name])
            normal.normal_(0, fan_in**-0.5, generator=generator)
        return normal.to(device, dtype)

    def eight_bits(self, name: str, kind: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return quantize_rows(self.plain(name, torch.float32, device), kind)


def _fill(
    model: Model, tensors: TensorSource, dtype_of: Callable[[str], torch.dtype], device: torch.device | str
) -> Model:
    """Gives a model without memory its tensors, each in the dtype of its name."""
    state = {name: tensors.plain(name, dtype_of(name), device) for name in model.state_dict()}
    model.load_state_dict(state, strict=True, assign=True)
    if isinstance(model, WanVAE):
        model.order_weights()
    return model.requires_grad_(False).eval()


def part_of_pipeline(path: Path, parts: tuple[str, ...]) -> Path:
    """Returns the path of the part inside a pipeline directory, or the path itself."""
    with looking_at(path):
        if path.is_dir() and not (path / "config.json").exists():
            return next((path / part for part in parts if (path / part).exists()), path)
        return path


class Checkpoint:
    """The tensors of a directory or file under this project's names, read when they are asked for.

    Once they are checked they are a :class:`model.streaming.placed.TensorSource`, LoRAs included. ``config`` is the
    configuration, whether or not the tensors are all there and readable.

    Raises:
        InputError: the file cannot be opened, is of another kind, or its configuration cannot be told.
    """

    def __init__(self, path: str | Path, kind: type[Model], config: Any = None):
        part, places = ("DiT", DIT_PARTS) if kind is WanDiT else ("VAE", VAE_PARTS)
        self.kind, self.path = kind, part_of_pipeline(Path(path), places)
        files = open_weights(self.path)
        plain = plain_weights(files)
        stripped = strip_prefix(plain, part)
        found = recognise(stripped, files.config)
        if found is not None and (found.part != part or found.lacks):
            raise InputError(f"weights: {self.path} is a {found.name}; {found.lacks or f'expected a Wan {part}'}")
        self._problem = quantisation_problem(plain[key] for key in stripped.values())
        rename = dit_parameter if kind is WanDiT else vae_parameter
        self._checked: set[str] = set()
        self._tensors: dict[str, ScaledTensor] = {}
        for short, key in stripped.items():
            if any(unused in short for unused in _UNUSED):
                continue
            name = rename(short) or short
            if name in self._tensors:
                twice = f"as {self._tensors[name].stored.key} and as {key}"
                raise InputError(f"weights: {self.path} holds {name} twice, {twice}")
            self._tensors[name] = plain[key]
        # VideoX-Fun has diffusers' class, and the names and the configuration of the Wan repositories.
        classes = ("WanTransformer3DModel", "AutoencoderKLWan")
        diffusers = files.config.get("_class_name") in classes and not is_original(stripped)
        self.config = self._configuration(files.config, diffusers) if config is None else config

    def _configuration(self, given: dict[str, Any], diffusers: bool) -> Any:
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        try:
            if diffusers:
                return (DiTConfig if self.kind is WanDiT else VAEConfig).from_diffusers(given)
            return infer_dit_config(shapes, given) if self.kind is WanDiT else infer_vae_config(shapes)
        except InputError as error:
            raise InputError(f"weights: {self.path}: {error}") from error

    def check(self, loras: Sequence[LoRA] = (), dtype: torch.dtype = torch.float32) -> Model:
        """Returns the model without memory if exactly its tensors are there, and what the LoRAs change, all of a shape.

        ``dtype`` is that in which matrices in 8 bits are unpacked, whose range they must not leave.
        """
        if self._problem is not None:
            raise InputError(f"weights: {self.path} is {self._problem}")
        model, tensors = self._build(), self._tensors
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"surplus {tensors[name].stored.key}" for name in tensors if name not in expected]
        for name, shape in expected.items():
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"missing {name} {shape}")
            elif tensor.shape != shape:
                problems.append(f"misshapen {tensor.stored.key}: {tensor.shape}, expected {shape}")
            elif not tensor.is_float:
                problems.append(f"{tensor.stored.key} is {tensor.stored.dtype}, expected floats")
        if problems:
            named = f"{len(problems)} tensors: {'; '.join(problems)}"
            raise InputError(f"weights: {self.path} does not fit {self.kind.__name__}: {named}")
        self._loras, self._dtype = LoRASet(loras, expected), dtype
        return model

    def _build(self) -> Model:
        """Builds the model without memory."""
        config, called = self.config, f"weights: {self.path}"
        layers = config.num_layers if self.kind is WanDiT else len(config.dim_mult) * config.num_res_blocks
        # A layer has tensors. A number far beyond theirs would be built for hours before they are missed.
        if layers > len(self._tensors):
            raise InputError(
                f"{called} does not fit {self.kind.__name__}: its configuration has {layers} layers, and it"
                f" holds {len(self._tensors)} tensors"
            )
        try:
            with torch.device("meta"), elsewhere():
                return self.kind(config)
        except (RuntimeError, OverflowError, TypeError) as error:
            # Without memory nothing can be too large but a size itself, for which torch has these three.
            raise InputError(f"{called}: sizes beyond what torch can count: {config}") from error

    def in_eight_bits(self) -> dict[str, str]:
        """Returns the dtypes of the matrices that are kept in 8 bits and that no LoRA changes."""
        return {
            name: tensor.stored.dtype
            for name, tensor in self._tensors.items()
            if len(tensor.shape) == 2 and tensor.stored.dtype in EIGHT_BITS and name not in self._loras
        }

    def plain(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Reads a tensor and adds its LoRAs, rounded once."""
        tensor = self._tensors[name]
        if name in self._loras:
            return self._loras.add_to(name, self._wide(name, torch.float64, device), dtype)
        if tensor.scale is not None:
            return self._wide(name, dtype, device).to(dtype)
        # As it is stored it is smallest, and on the host no check waits for a GPU.
        stored = tensor.stored.read()
        self._check(name, stored, dtype)
        return stored.to(device, dtype)

    def eight_bits(self, name: str, kind: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Reads a matrix in 8 bits: as it is stored if that is the same kind, else quantised."""
        tensor = self._tensors[name]
        if name in self._loras or str(kind).removeprefix("torch.") != tensor.stored.dtype:
            wide = self._wide(name, self._dtype, device)
            return quantize_rows(self._loras.add_to(name, wide, wide.dtype) if name in self._loras else wide, kind)
        values, scales = tensor.stored.read(), tensor.scales()
        if name not in self._checked:
            check_scaled(tensor, found := largest(values, tensor.name))
            # The largest number times the largest scale is seldom too much; if it is, all are multiplied out.
            if found * largest(scales, tensor.name) > torch.finfo(self._dtype).max:
                self._wide(name, self._dtype, "cpu")
            self._checked.add(name)
        return values.to(device), scales.to(device)

    def _wide(self, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Reads a tensor in float32; ``dtype`` is that which it will get and whose range it must not leave."""
        wide = self._tensors[name].wide(device)
        self._check(name, wide, dtype)
        return wide

    def _check(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Checks once, and not in every pass over layers that stay in files, that numbers are finite in ``dtype``."""
        if name not in self._checked:
            tensor = self._tensors[name]
            check_scaled(tensor, found := largest(value, tensor.name))
            check_holds(dtype, found, tensor.name)
            self._checked.add(name)
