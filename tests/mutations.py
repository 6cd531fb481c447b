"""Checks the tests: each of thirty seeded faults in kernels, model and planner has to make one of them fail.

Run it from the repository by ``python tests/mutations.py [NAME ...]``; it takes about six minutes on two cores. Every
fault is put into a copy of the repository, where the tests of its subject run until one fails. A fault that none of
them finds is told, and the exit status is 1: then a test is missing, or the fault changes nothing and has to be
replaced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WORKERS = 2
#: Seconds for the tests of one fault, after which it counts as not found.
LIMIT = 240


class Fault(NamedTuple):
    """A fault: in ``file``, the only place of ``right`` becomes ``wrong``; ``tests`` should find it."""

    file: str
    tests: str
    name: str
    right: str
    wrong: str


def faults(file: str, tests: str, *some: tuple[str, str, str]) -> list[Fault]:
    """Returns faults of one file, which the same tests should find, from their names and their texts."""
    return [Fault(file, tests, *each) for each in some]


FAULTS = [
    *faults(
        "swifti2v_kernels/norm/adaln_kernel.py", "tests/interpreter/norm/test_adaln.py",
        ("adaln: the modulation's 1 is missing", "scale = 1.0 + _row(", "scale = _row("),
        ("adaln: padded channels count in the variance",
         "x = tl.where(m_c, x - tl.sum(x, 0) / C, 0.0)", "x = x - tl.sum(x, 0) / C"),
        ("adaln: a row one past the last is read",
         "inside = (row >= 0) & (row < num_rows)", "inside = (row >= 0) & (row <= num_rows)"),
    ),
    *faults(
        "swifti2v_kernels/norm/qk_norm_rope_kernel.py", "tests/interpreter/norm/test_qk_norm_rope.py",
        ("rope: turned the other way",
         "first * cos - second * sin, first * sin + second * cos",
         "first * cos + second * sin, second * cos - first * sin"),
        ("rope: the first token's place is forgotten", "place = start + i\n", "place = i\n"),
    ),
    *faults(
        "swifti2v_kernels/attention/portable.py", "tests/interpreter/attention/test_segment_attention.py",
        ("attention: a window ends a block early",
         "(first_block + window[2] + 1) * window[0]", "(first_block + window[2]) * window[0]"),
        ("attention: the log-sum-exp is in base 2", "(m_i + tl.log2(l_i)) * 0.6931471805599453", "m_i + tl.log2(l_i)"),
    ),
    *faults(
        "swifti2v_kernels/attention/merge_attention_kernel.py", "tests/interpreter/attention/test_merge_attention.py",
        ("merge: what a part without keys holds is read",
         'm_part = m_out & (lse != float("-inf"))[:, None]', "m_part = m_out"),
    ),
    *faults(
        "swifti2v_kernels/window/embed_window_kernel.py", "tests/interpreter/window",
        ("embed_window: an index past the end is taken for a block",
         "bad = bad | (frame >= num_latents)", "bad = bad | (frame > num_latents)"),
    ),
    *faults(
        "swifti2v_kernels/window/project_step_kernel.py", "tests/interpreter/window",
        ("project_step: variances of parts of a row are not joined",
         "centred += tl.sum(x * x, 1) + delta * delta * share * start", "centred += tl.sum(x * x, 1)"),
    ),
    *faults(
        "swifti2v_kernels/conv/loop.py", "tests/interpreter/conv",
        ("conv: the frame before the last past one is taken twice",
         "tl.where(first < -1, p0 + past_strides[1], x1)", "tl.where(first < -1, p0, x1)"),
    ),
    *faults(
        "swifti2v_kernels/conv/upsample_conv2d_kernel.py", "tests/interpreter/conv",
        ("upsample: a phase begins at the other row and column",
         "(down + 1 + top) & 1, (right + 1 + left) & 1", "(down + top) & 1, (right + left) & 1"),
    ),
    *faults(
        "swifti2v_kernels/conv/frames_out_kernel.py", "tests/interpreter/conv",
        ("frames_out: bytes are cut off, not rounded", "acc * 127.5 + 128.0", "acc * 127.5 + 127.5"),
    ),
    *faults(
        "swifti2v_kernels/linear/scaled_linear_kernel.py", "tests/interpreter/linear/test_scaled_linear.py",
        ("scaled_linear: the cubic term of GELU is missing",
         "y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))", "y *= tl.sigmoid(1.5957691216057308 * y)"),
    ),
    *faults(
        "swifti2v_kernels/linear/quantize_rows_kernel.py", "tests/interpreter/linear/test_rows.py",
        ("rows: the scale of a row of zeros is 0", "tl.where(scale < 1.1754943508222875e-38, 1.0, scale)", "scale"),
    ),
    *faults(
        "swifti2v_kernels/csg/plan.py", "tests/kernels/csg tests/model/csg",
        ("segments: the neighbour is a block too early",
         "left = range(max(start - self.neighbours_left, int(self.anchor)), start)",
         "left = range(max(start - self.neighbours_left - 1, int(self.anchor)), start - 1)"),
        ("noise: both stages have the same",
         "np.random.SeedSequence((seed, stage, block))", "np.random.SeedSequence((seed, 2, block))"),
    ),
    *faults(
        "model/csg/schedule.py", "tests/model/csg",
        ("schedule: the shift is not taken off again",
         "shift * s / (1 + (shift - 1) * s)", "shift * s / (1 + shift * s)"),
    ),
    *faults(
        "model/csg/denoiser.py", "tests/model/csg",
        ("causal mode: remembered blocks carry the noise's timestep",
         "[0.0] * len(noisy), remembered=window.conditioning", "[1.0] * len(noisy), remembered=window.conditioning"),
    ),
    *faults(
        "model/vae/tiles.py", "tests/model/vae",
        ("tiles: an odd tile is covered by too few pixels",
         "Span(s.start // 2, -(-s.stop // 2), s.size // 2)", "Span(s.start // 2, s.stop // 2, s.size // 2)"),
        ("tiles: a halo is a pixel short at the bottom",
         "min(s.stop + pixels, s.size), s.size)", "min(s.stop + pixels - 1, s.size), s.size)"),
    ),
    *faults(
        "model/streaming/stream.py", "tests/model/streaming",
        ("streaming: a slot is not fetched again in the next pass", "else place % SLOTS", "else place"),
    ),
    *faults(
        "model/weights/scaled.py", "tests/model/weights/test_load.py tests/model/weights/test_numbers.py",
        ("weights: a scale a row multiplies columns",
         ".view(-1, *[1] * (wide.ndim - 1))", ".view(*[1] * (wide.ndim - 1), -1)"),
    ),
    *faults(
        "model/resume/job.py", "tests/model/resume/test_fingerprint.py",
        ("fingerprint: small tensors are sampled, not read whole", "_WHOLE = 1 << 16", "_WHOLE = 1 << 8"),
    ),
    *faults(
        "model/sizes.py", "tests/model/pipeline",
        ("sizes: Stage I may be larger than half of the target",
         "min(STAGE_ONE_SHORT_SIDE / min(width, height), 0.5)", "min(STAGE_ONE_SHORT_SIDE / min(width, height), 1.0)"),
    ),
    *faults(
        "model/memory/search.py", "tests/model/memory",
        ("plan: the reference is counted once, and is there twice for a moment",
         "self.reference_clip = picture + low_latents + 2 * latents",
         "self.reference_clip = picture + low_latents + latents"),
        ("plan: the decoder that waits beside the encoder takes nothing",
         "return sum(motion.idle.values()) + self.low_frames", "return self.low_frames"),
        ("plan: the last frames are not counted",
         "return self.segment if park else self.segment + waiting_bytes(self.decode)[1]", "return self.segment"),
        ("plan: Stage I's own VAE weighs nothing", "if r.motion_vae is not None:", "if r.motion_vae is None:"),
    ),
    *faults(
        "model/memory/request.py", "tests/model/memory",
        ("plan: all of the machine's memory is used", "int(HOST_USABLE * self.ram)", "int(self.ram)"),
    ),
]  # fmt: skip


def run(fault: Fault) -> tuple[bool, float, str]:
    """Returns whether a test fails in a copy with the fault, in how many seconds, and pytest's last line.

    Raises:
        ValueError: the right text is not in the file, or more than once.
        RuntimeError: pytest could not run the tests.
    """
    text, start = (ROOT / fault.file).read_text(), time.monotonic()
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: expected its text once in {fault.file}, found {text.count(fault.right)} times")
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in tracked.strip("\0").split("\0"):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, Path(folder) / name)
        (Path(folder) / fault.file).write_text(text.replace(fault.right, fault.wrong))
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if fault.tests.startswith("tests/interpreter") else {}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
        command += fault.tests.split()
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return False, time.monotonic() - start, f"not through after {LIMIT} s"
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 1, time.monotonic() - start, (done.stdout.strip().splitlines() or [""])[-1]


def main(names: list[str]) -> int:
    """Runs the faults whose names contain one of these texts (none: all) and returns the exit status."""
    chosen = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    if not chosen:
        print(f"mutations: expected a part of a fault's name, got {', '.join(names)}", file=sys.stderr)
        return 2
    missed = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for fault, (found, seconds, last) in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{'found ' if found else 'MISSED'} {seconds:5.1f} s  {fault.name}  [{last}]", flush=True)
            missed += not found
    print(f"{len(chosen) - missed} of {len(chosen)} faults were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
