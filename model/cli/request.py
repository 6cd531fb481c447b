"""The settings of a clip, checked: models, sizes, segments, noise levels, and what tells one run from another."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.cli.options import (
    OPTIONS,
    RUNS,
    Settings,
    build_components,
    chosen_loras,
    flag_of,
    parse_ram,
    parse_size,
    pick_device,
    pick_dtype,
    segment_plan,
)
from model.config import get_preset
from model.csg.sampler import SegmentPlan, plan_for
from model.csg.schedule import flow_sigmas
from model.errors import InputError, one_line
from model.machine.cards import chosen_gpu, device_options
from model.machine.measure import parse_bytes
from model.memory.report import MemoryPlan, describe_placement
from model.memory.request import USABLE, DiTRequest, MemoryRequest
from model.pipeline.components import LORA_PARTS, Components
from model.resume.fingerprint import fingerprint, fingerprint_file, fingerprint_random
from model.resume.state import device_name
from model.sizes import area_size, check_frames, check_size, size_multiple, stage_one_size
from model.streaming.placement import NO_TENSORS
from model.weights.files import open_weights
from model.weights.load import DIT_PARTS, VAE_PARTS, part_of_pipeline
from model.weights.lora import LoRA
from model.weights.lora_files import open_lora

#: UMT5-XXL's encoder: 5.68 billion parameters in bfloat16.
TEXT_ENCODER_BYTES = 11_360_000_000
#: Options that a resumed run may be given anew: those that say how a machine does it, not what is made, and those that
#: say where things are. What these are is told by fingerprints, so that a run can go on elsewhere.
_PATHS = ("photo", "out", "weights", "text_embeddings")
CHANGEABLE = (*_PATHS, *(f"{part}_loras" for part in LORA_PARTS), "device", "vram", "ram", "vae_memory", "cuda_graph")
#: The options that a run is kept with: all but those about the state of a run.
_STORED = {name: one for name, one in OPTIONS.items() if one.metadata["group"] != RUNS}


@dataclass(frozen=True)
class ClipSettings(Settings):
    """The settings of one clip, all checked before anything runs: first the options, then the headers of weights.

    ``frames``, ``fps`` and ``size`` are never None here. What is found out of the options has fields of its own.

    Raises:
        InputError: something does not fit.
    """

    #: (width, height) of the photograph, for the default size; None: there is no photograph.
    photo_size: tuple[int, int] | None = None
    components: Components = field(init=False)
    torch_device: torch.device = field(init=False)
    torch_dtype: torch.dtype = field(init=False)
    loras: Mapping[str, list[LoRA]] = field(init=False)
    #: (width, height) of the clip and of Stage I.
    pixels: tuple[int, int] = field(init=False)
    motion_pixels: tuple[int, int] = field(init=False)
    plan: SegmentPlan = field(init=False)
    sigmas_one: list[float] = field(init=False)
    sigmas_two: list[float] = field(init=False)
    #: Bytes by ``vram`` (None: as the card has), ``ram`` and ``vae_limit``.
    limits: Mapping[str, int | None] = field(init=False)

    def __post_init__(self) -> None:
        defaults = get_preset(self.preset if self.preset is not None else "tiny" if self.weights is None else "1.3b")
        device = pick_device(self.device)
        dtype = pick_dtype(self.dtype, device)
        limits = {
            "ram": parse_ram(self.ram),
            "vae_limit": None if self.vae_memory == "auto" else parse_bytes("vae-memory", self.vae_memory),
            "vram": None if self.vram == "auto" else parse_bytes("vram", self.vram),
        }
        size = None if self.size is None else parse_size(self.size)
        loras = chosen_loras(self)
        models = build_components(self, device, dtype, loras)
        multiple = size_multiple(models.vae_config, models.stage_two_config)
        if size is None:
            if self.photo_size is None:
                raise InputError("size: expected WIDTHxHEIGHT where there is no photograph")
            size = area_size(self.photo_size, defaults.width * defaults.height, multiple)
        check_size(*size, multiple)
        frames = defaults.num_frames if self.frames is None else self.frames
        blocks = check_frames(frames, models.vae_config.temporal_stride)
        motion_multiple = size_multiple(models.stage_one_vae_config, models.stage_one_config)
        # The fields of a frozen object, for which dataclasses have no other way.
        vars(self).update(
            size=f"{size[0]}x{size[1]}",
            frames=frames,
            fps=self.fps or defaults.fps,
            components=models,
            torch_device=device,
            torch_dtype=dtype,
            loras=loras,
            pixels=size,
            motion_pixels=stage_one_size(*size, motion_multiple),
            plan=plan_for(self.mode, segment_plan(self, blocks)),
            sigmas_one=flow_sigmas(self.stage1_steps, self.shift),
            sigmas_two=flow_sigmas(self.steps, self.shift),
            limits=limits,
        )

    def memory(self, **machine: Any) -> MemoryRequest:
        """Returns the request to the memory planner, from models, options and the machine, or from another ``machine``
        that is given as options of :func:`request_for`."""
        if not machine:
            machine = device_options(self.torch_device)
            if machine["vram"] is not None:
                # What others hold of the card is not there to be planned with.
                free = int(torch.cuda.mem_get_info(self.torch_device)[0] / USABLE)
                machine["vram"] = min(machine["vram"], free)
            vram = self.limits["vram"] or machine["vram"]
            machine |= {"vram": vram, "gpu": chosen_gpu(None, vram or 0)}
        text = self.text_embeddings is None and self.components.text_encoder is not None
        clip = {"size": self.pixels, "num_frames": self.frames, "plan": self.plan, "mode": self.mode}
        work = {"steps": self.steps, "stage_one_steps": self.stage1_steps, "dtype": self.torch_dtype}
        forms = {"quantize": self.quantize, "matmul": self.matmul, "text_encoder": text}
        return request_for(self.components, **{**clip, **work, **forms, **self.limits, **machine})

    def description(self, memory: MemoryPlan, photo: str | None = None) -> dict[str, Any]:
        """Returns the job of these settings, as :class:`model.resume.state.RunState` keeps it.

        Args:
            memory: the plan by which it runs.
            photo: fingerprint of the photograph, if it is not there to be read any more.
        """
        weights = {
            "preset": f"{fingerprint_random(self.preset or 'tiny', self.seed)}, drawn on {self.torch_device.type}"
        }
        if self.components.weights is not None:
            weights = {
                part: fingerprint(part_of_pipeline(path, VAE_PARTS if part.endswith("vae") else DIT_PARTS))
                for part, path in self.components.parts.items()
            }
        text = self.text_embeddings
        stages = {"stage1": memory.stage_one, "stage2": memory.stage_two}
        return {
            "inputs": {
                "photo": photo or fingerprint_file(self.photo, "image"),
                "prompt": self.prompt,
                "text_embeddings": None if text is None else fingerprint_file(text, "text-embeddings"),
                "weights": weights,
                "loras": {
                    part: [[_fingerprint_lora(lora), lora.strength, lora.expert] for lora in chosen]
                    for part, chosen in self.loras.items()
                },
            },
            "request": {
                "size": list(self.pixels),
                "frames": self.frames,
                "fps": self.fps,
                "mode": self.mode,
                "windows": [[list(window.conditioning), list(window.noisy)] for window in self.plan],
                "stage1_sigmas": self.sigmas_one,
                "stage2_sigmas": self.sigmas_two,
                "seed": self.seed,
                "dtype": str(self.torch_dtype).removeprefix("torch."),
                "matmul": self.matmul,
            },
            "machine": {
                "device": device_name(self.torch_device),
                "threads": torch.get_num_threads() if self.torch_device.type == "cpu" else None,
                "libraries": {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
                "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
                "backend": os.environ.get("SWIFTI2V_BACKEND", "auto"),
                "cuda_graph": self.cuda_graph,
                "plan": {part: describe_placement(stage) for part, stage in stages.items()},
                "vae": memory.vae_plans.to_json(),
            },
            "arguments": self._arguments(),
        }

    def _arguments(self) -> dict[str, Any]:
        """Returns the options as :func:`resumed` reads them: paths are text that means the same from any folder."""
        found = {name: getattr(self, name) for name in _STORED}
        for name in _PATHS:
            found[name] = None if found[name] is None else str(found[name].absolute())
        return found | {
            f"{part}_loras": [f"{lora.path.absolute()}:{lora.strength!r}" for lora in chosen]
            for part, chosen in self.loras.items()
        }


def _fingerprint_lora(lora: LoRA) -> str:
    """Returns the fingerprint of a LoRA and its scales, whose numbers are found to be finite."""
    file = open_lora(Path(lora.path), lora.expert)
    file.check_finite()
    # PEFT's scales are in a file beside it.
    scales = sorted((delta.keys[0], delta.scale) for deltas in file.deltas.values() for delta in deltas)
    return hashlib.sha256(json.dumps([fingerprint_file(file.path, "lora"), scales]).encode()).hexdigest()


def request_for(
    components: Components,
    *,
    size: tuple[int, int],
    from_files: bool | None = None,
    text_encoder: bool = False,
    **options: Any,
) -> MemoryRequest:
    """Returns the memory request for the models of a command.

    Args:
        components: the models.
        size: (width, height) of the clip.
        from_files: whether layers can be read from files in every pass; None: where there are checkpoints.
        text_encoder: whether the run has UMT5.
        options: the other fields of the request.

    Raises:
        InputError: something does not fit.
    """
    check_size(*size, size_multiple(components.vae_config, components.stage_two_config))
    multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)

    def dit(part: str) -> DiTRequest:
        config = components.stage_two_config if part == "stage2" else components.stage_one_config
        return DiTRequest(config, components.stored.get(part, NO_TENSORS))

    return MemoryRequest(
        stage_one=dit("stage1"),
        stage_two=dit("stage2"),
        low_noise=None if components.low_noise is None else dit("stage1_low_noise"),
        vae=components.vae_config,
        motion_vae=None if components.stage_one_vae is None else components.stage_one_vae_config,
        size=size,
        motion_size=stage_one_size(*size, multiple),
        from_files=components.weights is not None if from_files is None else from_files,
        text_encoder_bytes=_encoder_bytes(components, options.get("capability", 90)) if text_encoder else 0,
        **options,
    )


def _encoder_bytes(components: Components, capability: int | None) -> int:
    """Returns the bytes of the text encoder that there is, or of UMT5-XXL's.

    Without a GPU it runs in float32 (model/pipeline/encoders.py).
    """
    itemsize = 2 if capability else 4
    if components.text_encoder is None:
        return TEXT_ENCODER_BYTES // 2 * itemsize
    return itemsize * sum(tensor.numel for tensor in open_weights(components.text_encoder).tensors.values())


def resumed(given: Settings, job: Mapping[str, Any]) -> Settings:
    """Returns what a stored job was asked for; of ``given`` it has what is about machine, places and the run's state.

    Args:
        given: the options that were given with ``--resume``.
        job: as :meth:`ClipSettings.description` returns it, but read from a file that anybody may have written.

    Raises:
        InputError: another option was given, which would be another run, or the job is none of this program.
    """
    new = {name: getattr(given, name) for name, one in _STORED.items() if getattr(given, name) not in (one.default, [])}
    other = [flag_of(name) for name in new if name not in CHANGEABLE]
    if other:
        raise InputError(
            f"resume: the run has its options; got {', '.join(other)} too. New may be those of the machine and of"
            " places: PHOTO, --out, --weights, --text-embeddings, LoRAs, --device, --vram, --ram, --vae-memory"
        )
    stored = job.get("arguments", {})
    different = stored.keys() ^ _STORED.keys()
    if different:
        raise InputError(
            f"resume: the stored run and this program differ in options: {', '.join(map(one_line, sorted(different)))}"
        )
    if not isinstance(job.get("inputs", {}).get("photo"), str):
        raise InputError("resume: the stored run has no fingerprint of its photograph")
    return replace(given, **{name: _stored_option(_STORED[name], value) for name, value in stored.items()} | new)


def _stored_option(option: Field[Any], stored: Any) -> Any:
    """Returns an option of a stored run as the parser gives it.

    Raises:
        InputError: the parser would give no such value.
    """
    how, value = option.metadata["how"], stored
    if isinstance(option.default, bool):
        fits = isinstance(stored, bool)
    elif option.default == ():
        fits = isinstance(stored, list) and all(isinstance(text, str) for text in stored)
    elif stored is None:
        fits = option.default is None and option.name not in ("photo", "out")
    else:
        try:
            value = how.get("type", str)(str(stored))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise InputError(f"resume: {option.name} of the stored run: {error}") from error
        # In JSON a path is text, and every other value is what it is: 7 is neither 7.0 nor true.
        written = str(value) if isinstance(value, Path) else value
        fits = written == stored and type(written) is type(stored) and stored in how.get("choices", [stored])
    if not fits:
        raise InputError(f"resume: {option.name} of the stored run: expected what the option gives, got {stored!r}")
    return value
