"""PEFT's description of a LoRA: alphas and ranks, for all modules or by patterns of their names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.weights.files import read_json

_METADATA = "lora_adapter_metadata"


class AdapterConfig:
    """PEFT's description of an adapter, from which the scale comes if the file has no alphas."""

    def __init__(self, path: Path, source: str, values: Mapping[str, Any]):
        self._path, self._source, self._values = path, source, values
        kind = "DoRA" if values.get("use_dora") else values.get("peft_type") or "LORA"
        if kind != "LORA":
            raise InputError(f"lora: {path} is {kind} ({source}), which cannot be merged as a LoRA; expected LORA")
        try:
            rank, alpha = (values.get(name) for name in ("r", "lora_alpha"))
            # Ranks by patterns are seen in the factors; one for all tells whether this is about another file.
            self._rank = None if rank is None or values.get("rank_pattern") else finite(rank)
            self._alpha = None if alpha is None else finite(alpha)
            self._alphas = [
                (re.compile(rf"(.*\.)?({_bounded(pattern)})$"), finite(value))
                for pattern, value in (values.get("alpha_pattern") or {}).items()
            ]
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError, re.error) as error:
            raise InputError(f"lora: {path}: {source} is not understood: {error}") from error

    @classmethod
    def find(cls, path: Path, metadata: Mapping[str, str], expert: str) -> AdapterConfig:
        """Reads the header, where diffusers may put the expert's name before every entry, or a file beside the LoRA."""
        if _METADATA not in metadata:
            return cls(path, "adapter_config.json", read_json(path.parent, "adapter_config.json"))
        try:
            values = json.loads(metadata[_METADATA])
            named = {key.removeprefix(f"{expert}."): entry for key, entry in values.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"lora: {path}: its {_METADATA} is not readable JSON: {error}") from error
        return cls(path, _METADATA, named)

    def scale(self, module: str, rank: int) -> float:
        """Returns the scale of a module's ``up @ down``, 1 where nothing is said.

        Raises:
            InputError: the module has another rank than this says, so that it describes another file.
        """
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.match(module)), self._alpha)
        if alpha is None:
            return 1.0
        if self._rank not in (None, rank):
            raise InputError(
                f"lora: {self._path}: {module} has rank {rank}, but {self._source} says {self._rank:g}:"
                " it describes another file"
            )
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)


def _bounded(pattern: str) -> str:
    """Returns a pattern of PEFT if it is matched against a module's name in a moment.

    Python tries every way to divide the name, so that with each repetition the time grows by the length of the name,
    and with a repeated group without bounds.

    Raises:
        ValueError: the pattern allows too many ways.
    """
    if len(re.findall(r"[*+{?|]", pattern)) > 4 or re.search(r"\)[*+{]", pattern):
        raise ValueError(
            f"the pattern {pattern[:80]!r}: expected at most 4 repetitions and choices, and none of a group"
        )
    return pattern


def finite(value: Any) -> float:
    """Returns a value as a number.

    Raises:
        ValueError: it is none, or is not finite.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {value}")
    return number
