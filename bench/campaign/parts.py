"""The parts of the campaign, in order of value: what each answers, how it is called, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass

from model.errors import InputError


@dataclass(frozen=True)
class Part:
    """One call of ``python -m bench``.

    Args:
        name: name of its section in the campaign's file.
        answers: the question that it answers, for people.
        arguments: its command line on a card.
        toy: its command line at toy size, for ``--dry-run`` on a CPU.
        seconds: time that it may take on an H200-class card; then it is interrupted, and what it has so far is kept.
    """

    name: str
    answers: str
    arguments: tuple[str, ...]
    toy: tuple[str, ...]
    seconds: int


WINDOW = "CSG window 2560x1408"
PARTS = (
    Part(
        "operators",
        "is every kernel right against float64, unwritten memory poisoned; the ceilings; each operator at real size",
        ("operators", "--milliseconds", "20"),
        ("operators", "--cases", "merge_attention d64"),
        75,
    ),
    Part(
        "attention",
        "attention on the shapes of real models, against cuDNN and flash",
        ("attention", "--milliseconds", "50", "--only", "sdpa-cudnn|sdpa-flash"),
        ("attention", "--quick", "--shapes", "3 sources"),
        60,
    ),
    Part(
        "dit",
        "one layer of the DiT against diffusers', compiled",
        ("dit", "--part", "layer", "--shapes", WINDOW, "--timesteps", "one", "--only", "torch.compile",
         "--milliseconds", "60"),
        ("dit", "--quick", "--part", "ops", "--ops", "norm_modulate"),
        75,
    ),
    Part(
        "vae",
        "a whole 2K clip decoded, untiled and within 4 GB, against diffusers'",
        ("vae", "--part", "decode", "--shapes", "2.1, 2K, 81", "--repeats", "1"),
        ("vae", "--quick", "--part", "encode", "--only", "swifti2v"),
        85,
    ),
    Part(
        "csg",
        "end-to-end against CSG by stage, for two models at 2K; is the extrapolation true; the ablations",
        ("csg", "--models", "1.3b,14b", "--sizes", "2K", "--minutes", "1.8"),
        ("csg", "--extrapolate", "--quick", "--models", "1.3b", "--sizes", "720p", "--no-ablations"),
        125,
    ),
    Part(
        "clip",
        "the whole clip of 81 frames at 2K, 14B and 1.3B, four steps: time, memory and energy by stage",
        ("memory", "--preset", "14b-1.3b", "--frames", "81"),
        ("memory", "--measure", "--preset", "tiny", "--size", "128x96", "--frames", "9"),
        150,
    ),
    Part(
        "memory",
        "the clip's peak under 24, 16 and 12 GB",
        ("memory", "--limit", "24GB,16GB,12GB"),
        ("memory", "--preset", "tiny", "--size", "128x96", "--limit", "1GB", "--quick"),
        70,
    ),
    Part(
        "layers",
        "every convolution of the 2K decoders, by our kernel and by cuDNN, for the table of choices",
        ("vae", "--part", "layers", "--directions", "decode", "--shapes", "2K, 81", "--milliseconds", "20"),
        ("vae", "--part", "layers"),
        50,
    ),
    Part(
        "tune",
        "a short search for better configurations",
        ("tune", "--minutes", "0.6", "--no-write"),
        ("tune", "--quick", "--kernels", "rms_norm_silu", "--most", "1"),
        50,
    ),
    Part(
        "tests",
        "the test suite's hardware tests",
        ("tests",),
        ("tests",),
        120,
    ),
    Part(
        "sanitize",
        "compute-sanitizer's memcheck and racecheck over every kernel",
        ("sanitize",),
        ("sanitize",),
        120,
    ),
)  # fmt: skip

#: The parts that ``--quick`` runs.
QUICK = ("operators", "attention", "dit")


def chosen(text: str | None) -> list[Part]:
    """Returns parts by name, in the campaign's order; all parts where no text is given.

    Raises:
        InputError: no part has that name.
    """
    if text is None:
        return list(PARTS)
    names = [name.strip() for name in text.split(",")]
    known = [part.name for part in PARTS]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise InputError(f"parts: expected some of {', '.join(known)}, got {', '.join(wrong)}")
    return [part for part in PARTS if part.name in names]
