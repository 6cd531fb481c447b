"""The request of a command, resolved: models, sizes, segments, noise levels, and what tells one run from another."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.cli.options import (
    LORA_OPTIONS,
    build_components,
    chosen_loras,
    memory_limits,
    parse_size,
    pick_device,
    pick_dtype,
    segment_plan,
)
from model.config import get_preset
from model.csg.sampler import SegmentPlan, plan_for
from model.csg.schedule import flow_sigmas
from model.errors import InputError, one_line
from model.machine.measure import parse_bytes
from model.memory.cost.gpus import GPU, chosen_gpu
from model.memory.report import MemoryPlan, describe_placement
from model.memory.request import DiTRequest, MemoryRequest
from model.memory.vae_places import USABLE, Card
from model.pipeline.components import Components
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
#: Options that say how a machine does it, not what is made: a resumed run may be given others.
MACHINE_OPTIONS = ("device", "vram", "ram", "vae_memory", "cuda_graph")
#: Options that say where things are. What they are is told by fingerprints, so that a run can go on elsewhere.
PLACES = (
    "photo", "out", "weights", "text_embeddings", "stage1_loras", "stage1_low_noise_loras", "stage2_loras",
)  # fmt: skip
#: Options that are about the state of a run.
RUN_OPTIONS = ("resume", "state", "keep_state", "restart")
_PATHS = ("photo", "out", "weights", "text_embeddings")


@dataclass(frozen=True)
class ClipRequest:
    """The request of one command; ``arguments`` are its options, every default resolved and every path absolute."""

    arguments: dict[str, Any]
    components: Components
    device: torch.device
    dtype: torch.dtype
    loras: Mapping[str, list[LoRA]]
    size: tuple[int, int]
    motion_size: tuple[int, int]
    num_frames: int
    fps: int
    plan: SegmentPlan
    sigmas_one: list[float]
    sigmas_two: list[float]
    #: Bytes by ``vram`` (None: as the card has), ``ram`` and ``vae_limit``.
    limits: Mapping[str, int | None]

    @classmethod
    def resolve(cls, args: argparse.Namespace, photo_size: tuple[int, int] | None) -> ClipRequest:
        """Checks all that can be checked before anything runs: first the options, then the headers of weights.

        Args:
            args: the options of ``model.generate``.
            photo_size: (width, height) of the photograph, for the default size.

        Raises:
            InputError: something does not fit.
        """
        defaults = get_preset(args.preset if args.preset is not None else "tiny" if args.weights is None else "1.3b")
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        limits = memory_limits(args)
        limits["vram"] = None if args.vram == "auto" else parse_bytes("vram", args.vram)
        size = None if args.size is None else parse_size(args.size)
        loras = chosen_loras(args)
        components = build_components(args, device, dtype, loras)
        multiple = size_multiple(components.vae_config, components.stage_two_config)
        if size is None:
            if photo_size is None:
                raise InputError("size: expected WIDTHxHEIGHT where there is no photograph")
            size = area_size(photo_size, defaults.width * defaults.height, multiple)
        check_size(*size, multiple)
        num_frames = defaults.num_frames if args.frames is None else args.frames
        num_blocks = check_frames(num_frames, components.vae_config.temporal_stride)
        motion_multiple = size_multiple(components.stage_one_vae_config, components.stage_one_config)
        fps = args.fps or defaults.fps
        resolved = vars(args) | {"size": f"{size[0]}x{size[1]}", "frames": num_frames, "fps": fps}
        return cls(
            arguments=_absolute(resolved),
            components=components,
            device=device,
            dtype=dtype,
            loras=loras,
            size=size,
            motion_size=stage_one_size(*size, motion_multiple),
            num_frames=num_frames,
            fps=fps,
            plan=plan_for(args.mode, segment_plan(args, num_blocks)),
            sigmas_one=flow_sigmas(args.stage1_steps, args.shift),
            sigmas_two=flow_sigmas(args.steps, args.shift),
            limits=limits,
        )

    @property
    def window_blocks(self) -> int:
        """The number of latent frames of the largest window."""
        return max(len(window.blocks) for window in self.plan)

    def memory(self) -> MemoryRequest:
        """Returns the request to the memory planner, from the models, ``--vram``, ``--ram``, ``--vae-memory`` and the
        machine."""
        given = self.arguments
        card = Card.of(self.device)
        # What others hold of the card is not there to be planned with.
        free = None if card is None else min(card.memory, int(torch.cuda.mem_get_info(self.device)[0] / USABLE))
        limits = self.limits | {"vram": self.limits["vram"] or free}
        weights = self.components.weights
        return request_for(
            self.components,
            size=self.size,
            num_frames=self.num_frames,
            plan=self.plan,
            gpu=chosen_gpu(None, limits["vram"] or 0),
            text_encoder=given["text_embeddings"] is None
            and weights is not None
            and (weights / "text_encoder").is_dir(),
            mode=given["mode"],
            steps=given["steps"],
            stage_one_steps=given["stage1_steps"],
            dtype=self.dtype,
            **limits,
            capability=None if card is None else card.capability,
            quantize=given["quantize"],
            matmul=given["matmul"],
        )

    def description(self, memory: MemoryPlan, photo: str | None = None) -> dict[str, Any]:
        """Returns the job of this request, as :class:`model.resume.state.RunState` keeps it.

        Args:
            memory: the plan by which it runs.
            photo: fingerprint of the photograph, if it is not there to be read any more.
        """
        given = self.arguments
        weights = {
            "preset": f"{fingerprint_random(given['preset'] or 'tiny', given['seed'])}, drawn on {self.device.type}"
        }
        if self.components.weights is not None:
            weights = {
                part: fingerprint(part_of_pipeline(path, VAE_PARTS if part.endswith("vae") else DIT_PARTS))
                for part, path in self.components.parts.items()
            }
        text = given["text_embeddings"]
        stages = {"stage1": memory.stage_one, "stage2": memory.stage_two}
        return {
            "inputs": {
                "photo": photo or fingerprint_file(given["photo"], "image"),
                "prompt": given["prompt"],
                "text_embeddings": None if text is None else fingerprint_file(text, "text-embeddings"),
                "weights": weights,
                "loras": {
                    part: [[_fingerprint_lora(lora), lora.strength, lora.expert] for lora in chosen]
                    for part, chosen in self.loras.items()
                },
            },
            "request": {
                "size": list(self.size),
                "frames": self.num_frames,
                "fps": self.fps,
                "mode": given["mode"],
                "windows": [[list(window.conditioning), list(window.noisy)] for window in self.plan],
                "stage1_sigmas": self.sigmas_one,
                "stage2_sigmas": self.sigmas_two,
                "seed": given["seed"],
                "dtype": str(self.dtype).removeprefix("torch."),
                "matmul": given["matmul"],
            },
            "machine": {
                "device": device_name(self.device),
                "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
                "libraries": {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
                "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
                "backend": os.environ.get("SWIFTI2V_BACKEND", "auto"),
                "cuda_graph": given["cuda_graph"],
                "plan": {part: describe_placement(stage.config, stage.placement) for part, stage in stages.items()},
                "vae": memory.to_json()["vae"],
            },
            "arguments": given,
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
    num_frames: int,
    plan: SegmentPlan,
    gpu: GPU,
    from_files: bool | None = None,
    text_encoder: bool = False,
    **options: Any,
) -> MemoryRequest:
    """Returns the memory request for the models of a command.

    Args:
        components: the models.
        size: (width, height) of the clip.
        num_frames, plan, gpu: as for :class:`~model.memory.request.MemoryRequest`.
        from_files: whether layers can be read from files in every pass; None: where there are checkpoints.
        text_encoder: whether the run has UMT5.
        options: other fields of the request.

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
        num_frames=num_frames,
        plan=plan,
        gpu=gpu,
        from_files=components.weights is not None if from_files is None else from_files,
        text_encoder_bytes=_encoder_bytes(components, options.get("capability", 90)) if text_encoder else 0,
        **options,
    )


def _encoder_bytes(components: Components, capability: int | None) -> int:
    """Returns the bytes of the text encoder that there is, or of UMT5-XXL's.

    Without a GPU it runs in float32 (model/pipeline/encoders.py).
    """
    itemsize, folder = 2 if capability else 4, None
    if components.weights is not None and (components.weights / "text_encoder").is_dir():
        folder = components.weights / "text_encoder"
    if folder is None:
        return TEXT_ENCODER_BYTES // 2 * itemsize
    return itemsize * sum(tensor.numel for tensor in open_weights(folder).tensors.values())


def resumed_arguments(args: argparse.Namespace, job: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Gives ``args`` what a stored job was asked for; of its own options it keeps those about machine and places.

    Args:
        args: the options that were given with ``--resume``.
        job: as :meth:`ClipRequest.description` returns it, but read from a file that anybody may have written.
        parser: has made ``args``, and says which options there are and what each may be.

    Raises:
        InputError: another option was given, which would be another run, or the job is none of this program.
    """
    own = (*MACHINE_OPTIONS, *PLACES)
    actions = {action.dest: action for action in parser._actions if action.default is not argparse.SUPPRESS}
    given = [name for name in actions if name not in (*own, *RUN_OPTIONS) and _was_given(args, actions[name])]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"resume: the run has its options; got {named} too. New may be those of the machine and of places: PHOTO,"
            " --out, --weights, --text-embeddings, LoRAs, --device, --vram, --ram, --vae-memory"
        )
    stored = job.get("arguments", {})
    different = stored.keys() ^ (actions.keys() - set(RUN_OPTIONS))
    if different:
        raise InputError(
            f"resume: the stored run and this program differ in options: {', '.join(map(one_line, sorted(different)))}"
        )
    if not isinstance(job.get("inputs", {}).get("photo"), str):
        raise InputError("resume: the stored run has no fingerprint of its photograph")
    found = {name: _stored_option(actions[name], value) for name, value in stored.items()}
    for name, value in found.items():
        if name not in own or not _was_given(args, actions[name]):
            setattr(args, name, value)


def _was_given(args: argparse.Namespace, action: argparse.Action) -> bool:
    return getattr(args, action.dest) != action.default


def _stored_option(action: argparse.Action, stored: Any) -> Any:
    """Returns an option of a stored run as the parser gives it.

    Raises:
        InputError: the parser would give no such value.
    """
    if isinstance(action.default, bool):
        fits, value = isinstance(stored, bool), stored
    elif isinstance(action.default, list):
        fits, value = isinstance(stored, list) and all(isinstance(text, str) for text in stored), stored
    elif stored is None:
        fits, value = action.default is None and action.dest not in ("photo", "out"), None
    else:
        try:
            value = (action.type or str)(str(stored))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise InputError(f"resume: {action.dest} of the stored run: {error}") from error
        # In JSON a path is text, and every other value is what it is: 7 is neither 7.0 nor true.
        written = str(value) if isinstance(value, Path) else value
        fits = written == stored and type(written) is type(stored) and stored in (action.choices or [stored])
    if not fits:
        raise InputError(f"resume: {action.dest} of the stored run: expected what the option gives, got {stored!r}")
    return value


def _absolute(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with paths as text that means the same from any folder."""
    found = {name: value for name, value in arguments.items() if name not in RUN_OPTIONS}
    for name in _PATHS:
        if found[name] is not None:
            found[name] = str(Path(found[name]).absolute())
    for part in LORA_OPTIONS.values():
        found[f"{part}_loras"] = [_absolute_lora(text) for text in found[f"{part}_loras"]]
    return found


def _absolute_lora(text: str) -> str:
    path, colon, strength = text.rpartition(":")
    if not colon or os.path.exists(text):
        return str(Path(text).absolute())
    return f"{Path(path).absolute()}:{strength}"
