"""The parts of the campaign, in order of value: what each answers, how it is called, and how long it may take."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One call of ``python -m bench``.

    Args:
        name: name of its section in the campaign's file.
        answers: the question that it answers, for people.
        seconds: time that it may take on an H200-class card; then it is interrupted, and what it has so far is kept.
        command: its command line on a card.
        toy: its command line at toy size, for ``--dry-run`` on a CPU.
    """

    name: str
    answers: str
    seconds: int
    command: str
    toy: str


WINDOW = "CSG window 2560x1408"
PARTS = (
    Part("operators", "is every kernel right against float64; the card's ceilings; each operator at real size", 75,
         "operators --milliseconds 20",
         "operators --cases 'merge_attention d64'"),
    Part("attention", "attention on the shapes of real models, against cuDNN and flash", 60,
         "attention --milliseconds 50 --only 'sdpa-cudnn|sdpa-flash'",
         "attention --quick --shapes '3 sources'"),
    Part("dit", "one layer of the DiT against diffusers', compiled", 75,
         f"dit --part layer --shapes '{WINDOW}' --timesteps one --only torch.compile --milliseconds 60",
         "dit --quick --part ops --ops norm_modulate"),
    Part("vae", "a whole 2K clip decoded, untiled and within 4 GB, against diffusers'", 85,
         "vae --part decode --shapes '2.1, 2K, 81' --repeats 1",
         "vae --quick --part encode --only swifti2v"),
    Part("csg", "end-to-end against CSG by stage, for two models at 2K; is the extrapolation true; the ablations", 125,
         "csg --models 1.3b,14b --sizes 2K --minutes 1.8",
         "csg --extrapolate --quick --models 1.3b --sizes 720p --no-ablations"),
    Part("clip", "the whole clip of 81 frames at 2K, 14B and 1.3B, four steps: time, memory and energy by stage", 150,
         "memory --preset 14b-1.3b --frames 81",
         "memory --measure --preset tiny --size 128x96 --frames 9"),
    Part("memory", "the clip's peak under 24, 16 and 12 GB", 70,
         "memory --limit 24GB,16GB,12GB",
         "memory --preset tiny --size 128x96 --limit 1GB --quick"),
    Part("layers", "every convolution of the 2K decoders, by our kernel and by cuDNN, for the table of choices", 50,
         "vae --part layers --directions decode --shapes '2K, 81' --milliseconds 20",
         "vae --part layers"),
    Part("tune", "a short search for better configurations", 50,
         "tune --minutes 0.6 --no-write",
         "tune --quick --kernels rms_norm_silu --most 1"),
    Part("tests", "the test suite's hardware tests", 120,
         "tests",
         "tests"),
    Part("sanitize", "compute-sanitizer's memcheck and racecheck over every kernel", 120,
         "sanitize",
         "sanitize"),
)  # fmt: skip
