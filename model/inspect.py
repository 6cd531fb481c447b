"""``python -m model.inspect PATH``: what a checkpoint is, and whether it loads here.

Only headers are read, never the tensors' data, except for the few bytes in which a file describes itself: formats of
quantised layers, alphas of LoRAs. (A pickle of the old kind, not zipped, must be read whole.)
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from model.cli.options import CommandParser, parse_path, run_command
from model.dit.model import WanDiT
from model.errors import InputError, printable
from model.machine.measure import format_bytes
from model.vae.model import WanVAE
from model.weights.files import WeightFiles, looking_at, open_weights, weight_files
from model.weights.formats import PICKLES
from model.weights.keys import PARTS, is_original, strip_prefix
from model.weights.load import Checkpoint
from model.weights.lora import LoRAFit, listed
from model.weights.lora_files import LoRAFile, open_lora
from model.weights.recognise import Kind, describe_dit, describe_vae, recognise
from model.weights.scaled import ScaledTensor, plain_weights, quantisation_problem

EXAMPLES = """\
examples:
  python -m model.inspect wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors
      one file: what it is, how it is written, whether it loads
  python -m model.inspect few_step_lora.safetensors --for DIR/stage1
      a LoRA, and whether it fits that DiT; if not, which keys do not
  python -m model.inspect DIR --json
      every checkpoint in a directory, for programs

exit code: 0 it loads (all of them do), 1 known but does not load, 2 unreadable or unknown
"""
_PIPELINE = (
    *("stage1", "stage1_low_noise", "stage2", "vae", "stage1_vae", "text_encoder", "image_encoder"),
    *("transformer", "transformer_2"),
)
_COMFYUI = ("model.diffusion_model.", "first_stage_model.")
_LOADED_BY = {
    "DiT": "load_dit",
    "VAE": "load_vae",
    "text encoder": "encode_prompt, as text_encoder of a weights directory",
    "image encoder": "encode_image, as image_encoder of a weights directory",
}


@dataclass(frozen=True)
class Report:
    """A report on one checkpoint; ``problem`` says why it does not load."""

    path: str
    problem: str | None = None
    kind: str = "unknown"
    description: str = ""
    #: The configuration of a model; ranks and targets of a LoRA.
    details: dict[str, Any] = field(default_factory=dict)
    layout: tuple[str, ...] = ()
    files: int = 0
    tensors: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    loaded_by: str | None = None
    #: What of a LoRA that loads is left out.
    warning: str | None = None

    @property
    def loads(self) -> bool:
        """True if it loads."""
        return self.problem is None

    @property
    def exit_code(self) -> int:
        """The command's exit code for it alone."""
        return 0 if self.loads else 2 if self.kind == "unknown" else 1

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return asdict(self) | {"loads": self.loads, "exit_code": self.exit_code}

    def __str__(self) -> str:
        """Returns the report as a few aligned lines."""
        rows = {
            "what": f"{self.kind}{', ' if self.description else ''}{self.description}",
            "layout": "; ".join(self.layout),
            "tensors": ", ".join(f"{count:,} {name}" for name, count in self.dtypes.items()),
            "size": f"{self.parameters:,} parameters, {format_bytes(self.bytes)}" if self.tensors else "",
            "loads": f"yes, by {self.loaded_by}" if self.loads else f"NO: {self.problem}",
            "warning": self.warning or "",
        }
        return printable("\n".join([self.path, *(f"  {name:<8}{text}" for name, text in rows.items() if text)]))


def inspect_checkpoint(path: Path, dit: Path | None = None) -> Report:
    """Returns a report on one checkpoint, faults included.

    Args:
        path: a file, or a directory that holds one checkpoint.
        dit: for a LoRA: the DiT that it is to fit.

    Raises:
        InputError: ``dit`` is given and does not load.
    """
    model = None if dit is None else Checkpoint(dit, WanDiT).check()
    shapes = None if model is None else {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        files = open_weights(path)
        plain = plain_weights(files)
    except InputError as error:
        return Report(str(path), str(error))
    # A file that holds both is its DiT.
    for part in ("DiT", "VAE"):
        keys = strip_prefix(plain, part)
        kind = recognise(keys, files.config)
        if kind is not None:
            break
    report = Report(
        str(path),
        files=len(files.files),
        tensors=len(files.tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in files.tensors.values()).most_common()),
        parameters=sum(tensor.stored.numel for tensor in plain.values()),
        bytes=sum(tensor.nbytes for tensor in files.tensors.values()),
        layout=tuple(_layout(files, plain, keys, kind)),
    )
    if dit is not None and (kind is None or kind.part != "LoRA"):
        name = "unknown" if kind is None else kind.name
        return replace(report, problem=f"for: expected a LoRA to hold against a DiT, got {path}: {name}")
    if kind is None:
        return replace(report, problem=f"unknown: its tensors are named like {next(iter(keys), 'nothing')}")
    report = replace(report, kind=kind.name, problem=kind.lacks)
    if not report.loads:
        return report
    try:
        if kind.part == "LoRA":
            return _lora_report(report, open_lora(path), dit, shapes)
        if kind.part in ("DiT", "VAE"):
            model, describe = (WanDiT, describe_dit) if kind.part == "DiT" else (WanVAE, describe_vae)
            checkpoint = Checkpoint(path, model)
            config = checkpoint.config
            report = replace(report, description=describe(config), details=asdict(config))
            checkpoint.check()
        elif (problem := quantisation_problem(plain.values())) is not None:
            raise InputError(problem)
    except InputError as error:
        problem = listed(str(error).split("; "))  # it may name all tensors
        if path.is_file() and "-of-" in path.name:
            problem = "one shard of several; name their directory or .index.json"
        return replace(report, problem=problem)
    return replace(report, loaded_by=_LOADED_BY[kind.part])


def _lora_report(
    report: Report, file: LoRAFile, dit: Path | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> Report:
    fit = LoRAFit(file, shapes, str(dit or "any Wan DiT"))
    deltas = [(name, delta) for name, deltas in file.deltas.items() for delta in deltas]
    targets = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in file.deltas)
    details = {
        "ranks": dict(sorted(Counter(delta.rank for _, delta in deltas if delta.rank).items())),
        "differences": sum(delta.rank is None for _, delta in deltas),
        "targets": dict(sorted(targets.items())),
        # Of the models that it is for.
        "widths": sorted({d.factors[0].shape[0] for name, d in deltas if d.rank and re.search(r"attn[12]\.to_", name)}),
        "left_out": file.left_out,
    }
    parts = [
        ", ".join(f"rank {rank} x{count}" for rank, count in details["ranks"].items()),
        f"{details['differences']} whole differences" if details["differences"] else "",
        f"for width {', '.join(map(str, details['widths']))}" if details["widths"] else "",
        f"{file.left_out} tensors of the other expert left out" if file.left_out else "",
        "on " + ", ".join(f"{n.removesuffix('.weight')} x{count}" for n, count in details["targets"].items()),
    ]
    report = replace(report, description="; ".join(filter(None, parts)), details=details, problem=fit.problem)
    loaded_by = f"load_dit(loras=...) and merge_loras{'' if dit is None else f'; it fits {dit}'}"
    return replace(report, loaded_by=loaded_by, warning=fit.warning) if report.loads else report


def _layout(
    files: WeightFiles, plain: Mapping[str, ScaledTensor], keys: Mapping[str, str], kind: Kind | None
) -> list[str]:
    """Returns how the checkpoint is written: names, prefix, precision, files."""
    naming = []
    if kind is not None and kind.part in ("DiT", "VAE"):
        naming.append("names of the Wan repositories" if is_original(keys) else "names of diffusers")
    if files.config.get("_class_name"):
        naming.append(f"config.json of {files.config['_class_name']}")
    prefix = {full.removesuffix(short) for short, full in keys.items() if full.endswith(short)} - {""}
    others = [name for name, known in PARTS.items() if any(key.startswith(known) for key in plain)]
    if len(keys) < len(plain):
        naming.append(f"a whole pipeline in one file: {', '.join(others)}")
    naming += [f"prefix {name}{' (as ComfyUI)' if name in _COMFYUI else ''}" for name in sorted(prefix)]
    if forms := Counter(tensor.form for tensor in plain.values() if tensor.form):
        counts = ", ".join(f"{count} x {name}" for name, count in forms.items())
        naming.append(f"{'quantised' if quantisation_problem(plain.values()) else '8 bits with scales'}: {counts}")
    elif any(tensor.stored.dtype.startswith("float8") for tensor in plain.values()):
        naming.append("float8 without scales")
    return [*naming, f"sharded in {len(files.files)} files" if len(files.files) > 1 else "one file"]


def checkpoints_in(path: Path) -> list[Path]:
    """Returns the checkpoints of a directory: its own, those of a pipeline's parts, and single files; or the path.

    Raises:
        InputError: there is none.
    """
    with looking_at(path):
        if not path.is_dir():
            return [path]
        parts = [path / name for name in _PIPELINE if (path / name).is_dir()]
        singles = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf", *PICKLES))
        try:
            own = weight_files(path)
        except InputError:
            if not parts and not singles:
                raise
            # With an index it is one checkpoint, and what is wrong with it is the first thing to say.
            whole = [path] if any(path.glob("*.index.json")) else []
            return [*whole, *singles, *parts]
        return [path, *(file for file in singles if file not in own and "-of-" not in file.name), *parts]


def build_parser() -> argparse.ArgumentParser:
    """Returns the command line of ``python -m model.inspect``."""
    parser = CommandParser(
        prog="python -m model.inspect",
        description="Says what a checkpoint or a LoRA is, how it is written, and whether it loads here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=parse_path, metavar="PATH", help="a checkpoint, a LoRA, or a directory of them")
    parser.add_argument("--for", dest="dit", type=parse_path, metavar="DIT", help="the DiT that a LoRA is to fit")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def run(path: Path, dit: Path | None, as_json: bool) -> int:
    """Prints the reports and returns the exit code, the largest of all checkpoints.

    Raises:
        InputError: there is nothing to tell, or ``dit`` does not load.
    """
    reports = [inspect_checkpoint(checkpoint, dit) for checkpoint in checkpoints_in(path)]
    if as_json:
        print(json.dumps({"path": str(path), "checkpoints": [report.to_json() for report in reports]}, indent=2))
    else:
        print("\n\n".join(map(str, reports)))
    return max(report.exit_code for report in reports)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_command(lambda: run(args.path, args.dit, args.json))


if __name__ == "__main__":
    raise SystemExit(main())
