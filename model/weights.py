"""Loading checkpoints: diffusers directories and files of the Wan repositories, and seeded random weights.

Tensors are read one by one into a model that holds no memory yet, so the peak is the model itself. Files are
safetensors, or pickles read with ``weights_only=True``; nothing is ever unpickled into code.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.checkpoint_keys import dit_key_map, infer_dit_config, infer_vae_config, strip_prefix, vae_key_map
from model.config import DiTConfig, VAEConfig
from model.dit import FLOAT32_PARAMETERS, WanDiT
from model.errors import InputError, require
from model.vae import WanVAE

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Tensors that published checkpoints carry and no forward pass uses (diffusers ignores them too).
_UNUSED = ("norm_added_q",)

Model = TypeVar("Model", WanDiT, WanVAE)


def load_dit(
    path: str | Path,
    *,
    config: DiTConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> WanDiT:
    """Loads a Wan DiT (any variant of :class:`WanDiT`).

    Args:
        path: a diffusers directory (``config.json`` and one or several safetensors shards, or a pipeline directory
            with a ``transformer`` folder), or a file or directory of the Wan repositories (original key names).
        config: overrides what is read from ``config.json`` or inferred from the tensors.
        dtype: of the large products; the parameters in ``FLOAT32_PARAMETERS`` stay in float32.
        device: where the weights go.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        InputError: nothing loadable there, or tensors are missing, surplus or misshapen (all of them named).
    """
    checkpoint, config = _open_dit(Path(path), config)
    return checkpoint.load(WanDiT, config, lambda name: dit_parameter_dtype(name, dtype), device)


def inspect_dit(path: str | Path) -> DiTConfig:
    """The configuration of the checkpoint that :func:`load_dit` would load, checked without reading its tensors.

    Raises:
        InputError: as :func:`load_dit`.
    """
    checkpoint, config = _open_dit(Path(path), None)
    checkpoint.check(WanDiT, config)
    return config


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
    checkpoint = _Checkpoint(_part_of_pipeline(path, ("transformer",)), "WanTransformer3DModel", dit_key_map)
    if config is None and checkpoint.is_diffusers:
        config = DiTConfig.from_diffusers(checkpoint.config)
    return checkpoint, config or infer_dit_config(checkpoint.shapes, checkpoint.config)


def _open_vae(path: Path, config: VAEConfig | None) -> tuple[_Checkpoint, VAEConfig]:
    path = _part_of_pipeline(path, ("vae", "Wan2.1_VAE.pth", "Wan2.2_VAE.pth"))
    checkpoint = _Checkpoint(path, "AutoencoderKLWan", vae_key_map)
    if config is None and checkpoint.is_diffusers:
        config = VAEConfig.from_diffusers(checkpoint.config)
    return checkpoint, config or infer_vae_config(checkpoint.shapes)


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
    if path.is_dir() and not (path / "config.json").exists():
        return next((path / part for part in parts if (path / part).exists()), path)
    return path


class _Checkpoint:
    """The tensors of a directory or file under this project's names, read when they are asked for."""

    def __init__(self, path: Path, class_name: str, key_map: Callable[[Any], Callable[[str], str]]):
        if not path.exists():
            raise InputError(f"weights: {path} does not exist")
        self.path = path
        self.config = _read_config(path)
        given = self.config.get("_class_name")
        self.is_diffusers = given == class_name
        if given in {"WanTransformer3DModel", "AutoencoderKLWan"} - {class_name}:
            raise InputError(f"weights: {path} holds a {given}, not a {class_name}")
        readers: dict[str, Callable[[], Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(path):
            for key, (shape, reader) in _open(file).items():
                readers[key], shapes[key] = reader, shape
        stripped = strip_prefix(readers)
        rename = key_map(stripped)
        names = {rename(short): key for short, key in stripped.items() if not any(part in short for part in _UNUSED)}
        self.shapes = {name: shapes[key] for name, key in names.items()}
        self._readers = {name: readers[key] for name, key in names.items()}
        self._keys = names

    def load(
        self, kind: type[Model], config: Any, dtype_of: Callable[[str], torch.dtype], device: torch.device | str
    ) -> Model:
        """Builds the model and gives it the tensors, or says everything that does not fit."""
        model = self.check(kind, config)
        names = model.state_dict().keys()
        return _assign(model, {name: self._readers[name]().to(device, dtype_of(name)) for name in names})

    def check(self, kind: type[Model], config: Any) -> Model:
        """The model without memory, if every tensor of it is there with the right shape and no other."""
        with torch.device("meta"):
            model = kind(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in self.shapes]
        problems += [f"surplus {self._keys[name]}" for name in self.shapes if name not in expected]
        problems += [
            f"misshapen {self._keys[name]}: {self.shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in self.shapes and self.shapes[name] != shape
        ]
        if problems:
            listed = "; ".join(problems)
            raise InputError(f"weights: {self.path} does not fit {kind.__name__}: {len(problems)} tensors: {listed}")
        return model


def _read_config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"weights: {file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"weights: {file} holds {type(config).__name__}, expected an object")
    return config


def _weight_files(path: Path) -> list[Path]:
    """The files that together hold one model: a sharded index, one file, or all shards of one set."""
    if path.is_file():
        return [path]
    # The plain name comes first: a directory may hold it beside a variant such as "...fp16.safetensors".
    indices = sorted(path.glob("*.index.json"), key=lambda file: (file.name.count("."), file.name))
    plain = [path / f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
    for file in plain:
        if file.exists():
            return [file]
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"weights: {indices[0]} is not a readable index of shards: {error}") from error
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise InputError(f"weights: {path} lacks the shards {', '.join(missing)}")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors")) or sorted(f for f in path.iterdir() if f.suffix in _PICKLES)
    if not found:
        raise InputError(f"weights: no safetensors or {', '.join(_PICKLES)} file in {path}")
    if len(found) > 1 and not all("-of-" in file.name for file in found):
        raise InputError(f"weights: {path} holds several candidates, name one: {', '.join(f.name for f in found)}")
    return found


def _open(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """``{key: (shape, function that reads the tensor)}`` of one file."""
    if file.suffix == ".safetensors":
        safetensors = require("safetensors", "generate")
        try:
            handle = safetensors.safe_open(file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"weights: {file} is not a readable safetensors file: {error}") from error
        return {
            key: (tuple(handle.get_slice(key).get_shape()), lambda key=key: handle.get_tensor(key))
            for key in handle.keys()  # noqa: SIM118 (not a mapping)
        }
    if file.suffix not in _PICKLES:
        raise InputError(f"weights: {file} is neither .safetensors nor one of {', '.join(_PICKLES)}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"weights: {file} cannot be loaded with weights_only=True: {reason}") from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"weights: {file} does not hold a plain dictionary of tensors")
    return {key: (tuple(tensor.shape), lambda tensor=tensor: tensor) for key, tensor in tensors.items()}
