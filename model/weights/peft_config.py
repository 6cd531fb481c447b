"""PEFT's description of a LoRA: alphas and ranks, for all modules or by patterns of their names."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.weights.files import read_json

_METADATA = "lora_adapter_metadata"
#: Seconds that all patterns of a PEFT configuration may take.
_PATTERN_SECONDS = 5.0


class AdapterConfig:
    """PEFT's description of an adapter, from which the scale comes if the file has no alphas."""

    def __init__(self, path: Path, source: str, values: Mapping[str, Any]):
        self._path, self._source, self._values = path, source, values
        self._spent = 0.0
        kind = values.get("peft_type")
        if kind not in (None, "LORA"):
            raise InputError(f"lora: {path} is {kind} ({source}), which cannot be merged as a LoRA; expected LORA")
        if values.get("use_dora"):
            raise InputError(f"lora: {path} is DoRA ({source}), which cannot be merged as a LoRA; expected a LoRA")
        try:
            given = {name: values.get(name) for name in ("r", "lora_alpha")}
            self._numbers = {name: None if value is None else finite(value) for name, value in given.items()}
            self._patterns = {
                name: [
                    (re.compile(rf"(.*\.)?({_bounded(pattern)})$"), finite(value))
                    for pattern, value in (values.get(name) or {}).items()
                ]
                for name in ("rank_pattern", "alpha_pattern")
            }
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
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        if alpha is None:
            return 1.0
        said = self._of(module, "rank_pattern", "r")
        if said not in (None, rank):
            raise InputError(
                f"lora: {self._path}: {module} has rank {rank}, but {self._source} says {said:g}:"
                " it describes another file"
            )
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, default: str) -> float | None:
        start = time.perf_counter()
        found = next((value for pattern, value in self._patterns[patterns] if pattern.match(module)), None)
        self._spent += time.perf_counter() - start
        if self._spent > _PATTERN_SECONDS:
            raise InputError(f"lora: {self._path}: {self._source}: its patterns take too long to match")
        return self._numbers[default] if found is None else found


def _bounded(pattern: str) -> str:
    """Returns a pattern of PEFT if it is matched against a module's name in a moment.

    Python tries every way to divide the name, so that the time doubles with each choice, and with a repetition grows by
    the length of the name. Numbers do not count, since those in names have few digits.

    Raises:
        ValueError: the pattern allows too many ways.
    """
    plain = re.sub(r"\\[^\w\s]|(?:\\d|\[0-9\])(?:[*+]\??|\{[\d,]*\})?", "", pattern)
    repeated = len(re.findall(r"[*+{]\??", plain))
    choices = plain.count("|") + len(re.findall(r"(?<![*+(])\?", plain))
    if 5 * repeated + choices > 20 or re.search(r"\)[*+{]|\\\d", plain):
        raise ValueError(
            f"the pattern {pattern[:80]!r}: allowed are 4 repetitions, or 20 choices, 5 fewer for each repetition, and"
            " none of a group"
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
