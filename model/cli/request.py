"""The settings of a clip, checked: models, sizes, segments, noise levels, and what tells one run from another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from model.cli.options import PATHS, STORED, Settings, build_components, parse_size, pick_device, pick_dtype
from model.config import get_preset
from model.csg.sampler import SegmentPlan, plan_for, plan_segments
from model.csg.schedule import flow_sigmas
from model.errors import InputError
from model.machine.cards import chosen_gpu, device_options
from model.machine.host import machine_memory
from model.machine.measure import parse_bytes
from model.memory.report import MemoryPlan, describe_placement
from model.memory.request import USABLE, DiTRequest, MemoryRequest
from model.pipeline.components import LORA_PARTS, Components
from model.resume.job import device_name, fingerprint, fingerprint_file
from model.sizes import area_size, check_frames, check_size, size_multiple, stage_one_size
from model.streaming.placement import NO_TENSORS
from model.weights.files import open_weights
from model.weights.load import DIT_PARTS, VAE_PARTS, part_of_pipeline
from model.weights.lora import LoRA
from model.weights.lora_files import open_lora
from model.weights.scaled import largest

#: UMT5-XXL's encoder: 5.68 billion parameters in bfloat16.
TEXT_ENCODER_BYTES = 11_360_000_000


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
    #: (width, height) of the clip.
    pixels: tuple[int, int] = field(init=False)
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
            "ram": None if self.ram == "none" else _bytes_of("ram", self.ram, machine_memory()),
            "vae_limit": _bytes_of("vae-memory", self.vae_memory, None),
            "vram": _bytes_of("vram", self.vram, None),
        }
        size = None if self.size is None else parse_size(self.size)
        loras = self._chosen_loras()
        models = build_components(self, device, dtype, loras)
        multiple = size_multiple(models.vae_config, models.stage_two_config)
        if size is None:
            if self.photo_size is None:
                raise InputError("size: expected WIDTHxHEIGHT where there is no photograph")
            size = area_size(self.photo_size, defaults.width * defaults.height, multiple)
        check_size(*size, multiple)
        frames = defaults.num_frames if self.frames is None else self.frames
        blocks = check_frames(frames, models.vae_config.temporal_stride)
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
            plan=plan_for(self.mode, plan_segments(blocks, self.blocks, self.left, self.right, self.anchor)),
            sigmas_one=flow_sigmas(self.stage1_steps, self.shift),
            sigmas_two=flow_sigmas(self.steps, self.shift),
            limits=limits,
        )

    def _chosen_loras(self) -> dict[str, list[LoRA]]:
        chosen = {
            part: [replace(lora, expert=1 + (part == "stage1_low_noise")) for lora in getattr(self, f"{part}_lora")]
            for part in LORA_PARTS
        }
        if self.weights is None and any(chosen.values()):
            raise InputError("lora: expected --weights too, since random weights are nothing that a LoRA was made for")
        return chosen

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

        Beside the options it has what options and this program make of them, and what they only name.

        Args:
            memory: the plan by which it runs.
            photo: fingerprint of the photograph, if it is not there to be read any more.
        """
        weights = {
            "preset": f"random weights of {self.preset or 'tiny'}, seed {self.seed}, drawn on {self.torch_device.type}"
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
                "text_embeddings": None if text is None else fingerprint_file(text, "text-embeddings"),
                "weights": weights,
                "loras": {
                    part: [[_fingerprint_lora(lora), lora.strength, lora.expert] for lora in chosen]
                    for part, chosen in self.loras.items()
                },
            },
            "request": {
                "size": list(self.pixels),
                "windows": [[list(window.conditioning), list(window.noisy)] for window in self.plan],
                "stage1_sigmas": self.sigmas_one,
                "stage2_sigmas": self.sigmas_two,
                "dtype": str(self.torch_dtype).removeprefix("torch."),
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
        """Returns the options as ``resumed`` reads them: paths are text that means the same from any folder."""
        found = {name: getattr(self, name) for name in STORED}
        for name in PATHS:
            found[name] = None if found[name] is None else str(found[name].absolute())
        return found | {
            f"{part}_lora": [f"{lora.path.absolute()}:{lora.strength!r}" for lora in chosen]
            for part, chosen in self.loras.items()
        }


def _bytes_of(name: str, text: str, auto: int | None) -> int | None:
    return auto if text == "auto" else parse_bytes(name, text)


def _fingerprint_lora(lora: LoRA) -> str:
    """Returns the fingerprint of a LoRA and its scales, whose numbers are found to be finite."""
    file = open_lora(Path(lora.path), lora.expert)
    for factor in (factor for deltas in file.deltas.values() for delta in deltas for factor in delta.factors):
        largest(factor.read(), f"lora: {file.path}: {factor.key}")
    # PEFT's scales are in a file beside it.
    scales = sorted((delta.keys[0], delta.scale) for deltas in file.deltas.values() for delta in deltas)
    return hashlib.sha256(json.dumps([fingerprint_file(file.path, "lora"), scales]).encode()).hexdigest()


def request_for(
    components: Components, *, size: tuple[int, int], text_encoder: bool = False, **options: Any
) -> MemoryRequest:
    """Returns the memory request for the models of a command, and a clip of ``size`` (width, height).

    ``text_encoder`` says whether the run has UMT5, and ``options`` are the other fields of the request. Layers can be
    read from files in every pass where there are checkpoints, unless ``from_files`` among the options says otherwise.

    Raises:
        InputError: something does not fit.
    """
    check_size(*size, size_multiple(components.vae_config, components.stage_two_config))
    multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)
    one, two, stored = components.stage_one_config, components.stage_two_config, components.stored
    parts, low = components.parts, DiTRequest(one, stored.get("stage1_low_noise", NO_TENSORS))
    return MemoryRequest(
        stage_one=DiTRequest(one, stored.get("stage1", NO_TENSORS)),
        stage_two=DiTRequest(two, stored.get("stage2", NO_TENSORS)),
        low_noise=low if "stage1_low_noise" in parts else None,
        vae=components.vae_config,
        motion_vae=components.stage_one_vae_config if "stage1_vae" in parts else None,
        size=size,
        motion_size=stage_one_size(*size, multiple),
        text_encoder_bytes=_encoder_bytes(components, options.get("capability", 90)) if text_encoder else 0,
        **{"from_files": components.weights is not None, **options},
    )


def _encoder_bytes(components: Components, capability: int | None) -> int:
    """Returns the bytes of the text encoder that there is, or of UMT5-XXL's."""
    itemsize = 2 if capability else 4  # without a GPU it runs in float32
    if components.text_encoder is None:
        return TEXT_ENCODER_BYTES // 2 * itemsize
    return itemsize * sum(tensor.numel for tensor in open_weights(components.text_encoder).tensors.values())
