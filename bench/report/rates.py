"""The measured rates that plans estimate their time with, made of result files: ``model/memory/rates.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.records.read import SHIPPED
from model.config import get_preset
from model.memory.estimate import RATES, vae_operations
from model.memory.vae_plan import PlannedVAE, Request
from model.sizes import size_multiple, stage_one_size
from model.vae.tiles import VAEPlan
from swifti2v_kernels.common.cards import card_named

#: The clip whose stages are timed: 21 latent frames at 2560x1408.
_PRESET, _SIZE, _BLOCKS = "1.3b", (2560, 1408), 21


def measured_rates(documents: Mapping[Path, Mapping[str, Any]]) -> str:
    """Returns the text of the table, of the newest file of each card that has a part.

    ``dit`` is whole layers of this project in bfloat16 (``dit/layer``); ``decode`` and ``encode`` are the decoding of a
    2K clip, and its reference in float32 less the decoding of the motion (``csg/stages``).
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path, document in sorted(documents.items(), key=lambda item: item[1]["environment"]["date"]):
        card = card_named(str(document["environment"]["device"]))
        for part, flops, seconds in () if card is None else _parts(document):
            source = path.resolve().relative_to(SHIPPED.resolve()).as_posix()
            row = {"card": card.name, "part": part, "tflops": round(flops / seconds / 1e12, 1), "results": source}
            found[card.name, part] = row
    return json.dumps({"rates": list(found.values())}, indent=2) + "\n"


def _parts(document: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yields the parts that a file has measured: name, operations, seconds."""
    layers = [row for row in _rows(document, "dit", "layer") if row.get("ours") and row["status"] == "ok"]
    if layers:
        yield "dit", sum(row["flops"] for row in layers), sum(row["seconds"] for row in layers)
    stages = {
        row["stage"]: row["seconds"]
        for row in _rows(document, "csg", "stages")
        if (row["model"], row["size"]) == (_PRESET, "2K")
    }
    if stages:
        preset = get_preset(_PRESET)
        low = stage_one_size(*_SIZE, size_multiple(preset.vae, preset.stage_one))
        decode, motion = _operations("decode", _SIZE), _operations("decode", low)
        yield "decode", decode, stages["decode"]
        yield "encode", _operations("encode", _SIZE), stages["reference"] - motion / decode * stages["decode"]


def _operations(part: str, size: tuple[int, int]) -> int:
    """Returns the operations of half of the VAE over the whole clip."""
    dtype = torch.float32 if part == "encode" else torch.bfloat16
    request = Request(get_preset(_PRESET).vae, part, *size, dtype, 90, 1)
    return vae_operations(PlannedVAE(VAEPlan(), request), _BLOCKS)


def _rows(document: Mapping[str, Any], section: str, name: str) -> list[Mapping[str, Any]]:
    tables = document["sections"].get(section, {}).get("tables", [])
    return [row for table in tables if table["name"] == name for row in table["rows"]]


def rates_file() -> Path:
    """Returns where the table is."""
    return Path(str(RATES))
