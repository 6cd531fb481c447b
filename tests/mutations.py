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
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parent.parent
WORKERS = 2
#: Seconds for the tests of one fault, after which it counts as not found.
LIMIT = 240


@dataclass(frozen=True)
class Fault:
    """A fault: in ``file``, the only place of ``right`` becomes ``wrong``; ``tests`` should find it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str

    @property
    def interpreted(self) -> bool:
        """True if the tests run in Triton's interpreter."""
        return self.tests.startswith("tests/interpreter")


_KERNELS = "swifti2v_kernels"
FAULTS = (
    Fault(
        "adaln: the modulation's 1 is missing",
        f"{_KERNELS}/norm/adaln_kernel.py",
        "scale = 1.0 + _row(",
        "scale = _row(",
        "tests/interpreter/norm/test_adaln.py",
    ),
    Fault(
        "adaln: padded channels count in the variance",
        f"{_KERNELS}/norm/adaln_kernel.py",
        "x = tl.where(m_c, x - tl.sum(x, 0) / C, 0.0)",
        "x = x - tl.sum(x, 0) / C",
        "tests/interpreter/norm/test_adaln.py",
    ),
    Fault(
        "adaln: a row one past the last is read",
        f"{_KERNELS}/norm/adaln_kernel.py",
        "inside = (row >= 0) & (row < num_rows)",
        "inside = (row >= 0) & (row <= num_rows)",
        "tests/interpreter/norm/test_adaln.py",
    ),
    Fault(
        "rope: turned the other way",
        f"{_KERNELS}/norm/qk_norm_rope_kernel.py",
        "first * cos - second * sin, first * sin + second * cos",
        "first * cos + second * sin, second * cos - first * sin",
        "tests/interpreter/norm/test_qk_norm_rope.py",
    ),
    Fault(
        "rope: the first token's place is forgotten",
        f"{_KERNELS}/norm/qk_norm_rope_kernel.py",
        "place = start + i\n",
        "place = i\n",
        "tests/interpreter/norm/test_qk_norm_rope.py",
    ),
    Fault(
        "attention: a window ends a block early",
        f"{_KERNELS}/attention/portable.py",
        "(first_block + window[2] + 1) * window[0]",
        "(first_block + window[2]) * window[0]",
        "tests/interpreter/attention/test_segment_attention.py",
    ),
    Fault(
        "attention: the log-sum-exp is in base 2",
        f"{_KERNELS}/attention/portable.py",
        "(m_i + tl.log2(l_i)) * 0.6931471805599453",
        "m_i + tl.log2(l_i)",
        "tests/interpreter/attention/test_segment_attention.py",
    ),
    Fault(
        "merge: what a part without keys holds is read",
        f"{_KERNELS}/attention/merge_attention_kernel.py",
        'm_part = m_out & (lse != float("-inf"))[:, None]',
        "m_part = m_out",
        "tests/interpreter/attention/test_merge_attention.py",
    ),
    Fault(
        "embed_window: an index past the end is taken for a block",
        f"{_KERNELS}/window/embed_window_kernel.py",
        "bad = bad | (frame >= num_latents)",
        "bad = bad | (frame > num_latents)",
        "tests/interpreter/window/test_embed_window.py",
    ),
    Fault(
        "project_step: variances of parts of a row are not joined",
        f"{_KERNELS}/window/project_step_kernel.py",
        "centred += tl.sum(x * x, 1) + delta * delta * share * start",
        "centred += tl.sum(x * x, 1)",
        "tests/interpreter/window/test_project_step.py",
    ),
    Fault(
        "conv: the frame before the last past one is taken twice",
        f"{_KERNELS}/conv/loop.py",
        "tl.where(first < -1, p0 + past_strides[1], x1)",
        "tl.where(first < -1, p0, x1)",
        "tests/interpreter/conv/test_conv.py",
    ),
    Fault(
        "upsample: a phase begins at the other row and column",
        f"{_KERNELS}/conv/upsample_conv2d_kernel.py",
        "(down + 1 + top) & 1, (right + 1 + left) & 1",
        "(down + top) & 1, (right + left) & 1",
        "tests/interpreter/conv/test_conv.py",
    ),
    Fault(
        "frames_out: bytes are cut off, not rounded",
        f"{_KERNELS}/conv/frames_out_kernel.py",
        "acc * 127.5 + 128.0",
        "acc * 127.5 + 127.5",
        "tests/interpreter/conv/test_conv.py",
    ),
    Fault(
        "scaled_linear: the cubic term of GELU is missing",
        f"{_KERNELS}/linear/scaled_linear_kernel.py",
        "y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))",
        "y *= tl.sigmoid(1.5957691216057308 * y)",
        "tests/interpreter/linear/test_scaled_linear.py",
    ),
    Fault(
        "rows: the scale of a row of zeros is 0",
        f"{_KERNELS}/linear/rounding.py",
        "tl.where(scale < 1.1754943508222875e-38, 1.0, scale)",
        "scale",
        "tests/interpreter/linear/test_rows.py",
    ),
    Fault(
        "segments: the neighbour is a block too early",
        f"{_KERNELS}/csg/plan.py",
        "left = range(max(start - self.neighbours_left, int(self.anchor)), start)",
        "left = range(max(start - self.neighbours_left - 1, int(self.anchor)), start - 1)",
        "tests/kernels/csg tests/model/csg",
    ),
    Fault(
        "noise: both stages have the same",
        f"{_KERNELS}/csg/plan.py",
        "np.random.SeedSequence((seed, stage, block))",
        "np.random.SeedSequence((seed, 2, block))",
        "tests/kernels/csg tests/model/csg",
    ),
    Fault(
        "schedule: the shift is not taken off again",
        "model/csg/schedule.py",
        "shift * s / (1 + (shift - 1) * s)",
        "shift * s / (1 + shift * s)",
        "tests/model/csg",
    ),
    Fault(
        "causal mode: remembered blocks carry the noise's timestep",
        "model/csg/sampler.py",
        "[0.0] * num_noisy, remembered=window.conditioning",
        "[1.0] * num_noisy, remembered=window.conditioning",
        "tests/model/csg",
    ),
    Fault(
        "tiles: an odd tile is covered by too few pixels",
        "model/vae/tiles.py",
        "Span(self.start // 2, -(-self.stop // 2), self.size // 2)",
        "Span(self.start // 2, self.stop // 2, self.size // 2)",
        "tests/model/vae",
    ),
    Fault(
        "tiles: a halo is a pixel short at the bottom",
        "model/vae/tiles.py",
        "min(self.stop + pixels, self.size), self.size)",
        "min(self.stop + pixels - 1, self.size), self.size)",
        "tests/model/vae",
    ),
    Fault(
        "streaming: a slot is not fetched again in the next pass",
        "model/streaming/stream.py",
        "else place % SLOTS",
        "else place",
        "tests/model/streaming",
    ),
    Fault(
        "weights: a scale a row multiplies columns",
        "model/weights/scaled.py",
        "scale.reshape(-1, *[1] * (wide.ndim - 1))",
        "scale.reshape(*[1] * (wide.ndim - 1), -1)",
        "tests/model/weights/test_load.py tests/model/weights/test_numbers.py",
    ),
    Fault(
        "fingerprint: small tensors are sampled, not read whole",
        "model/resume/fingerprint.py",
        "_WHOLE = 1 << 16",
        "_WHOLE = 1 << 8",
        "tests/model/resume/test_fingerprint.py",
    ),
    Fault(
        "sizes: Stage I may be larger than half of the target",
        "model/sizes.py",
        "min(STAGE_ONE_SHORT_SIDE / min(width, height), 0.5)",
        "min(STAGE_ONE_SHORT_SIDE / min(width, height), 1.0)",
        "tests/model/pipeline",
    ),
    Fault(
        "plan: the reference is counted once, and is there twice for a moment",
        "model/memory/search.py",
        "self._picture(False) + self._latents(True) + 2 * self._latents(False)",
        "self._picture(False) + self._latents(True) + self._latents(False)",
        "tests/model/memory",
    ),
    Fault(
        "plan: all of the machine's memory is used",
        "model/memory/request.py",
        "int(HOST_USABLE * self.ram)",
        "int(self.ram)",
        "tests/model/memory",
    ),
    Fault(
        "plan: the decoder that waits beside the encoder takes nothing",
        "model/memory/search.py",
        'return sum(vae_idle("decoder", motion).values()) + self._low_frames',
        "return self._low_frames",
        "tests/model/memory",
    ),
    Fault(
        "plan: the last frames are not counted",
        "model/memory/search.py",
        "return segment if park else segment + waiting_bytes(self.decode.request)[1]",
        "return segment",
        "tests/model/memory",
    ),
    Fault(
        "plan: Stage I's own VAE weighs nothing",
        "model/memory/search.py",
        "if r.motion_vae is not None:",
        "if r.motion_vae is None:",
        "tests/model/memory",
    ),
)


def run(fault: Fault, room: Path) -> tuple[bool, float, str]:
    """Returns whether a test fails in the copy ``room`` with the fault, in how many seconds, and pytest's last line.

    Raises:
        ValueError: the right text is not in the file, or more than once.
        RuntimeError: pytest could not run the tests.
    """
    path = room / fault.file
    text = path.read_text()
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: expected its text once in {fault.file}, found {text.count(fault.right)} times")
    environment = os.environ | {"PYTHONPATH": str(room), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if fault.interpreted else {}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    start = time.monotonic()
    path.write_text(text.replace(fault.right, fault.wrong))
    try:
        done = subprocess.run(
            [*command, *fault.tests.split()], cwd=room, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return False, time.monotonic() - start, f"not through after {LIMIT} s"
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    return done.returncode == 1, time.monotonic() - start, (done.stdout.strip().splitlines() or [""])[-1]


def main(names: list[str]) -> int:
    """Runs the faults whose names contain one of these texts (none: all) and returns the exit status."""
    chosen = [fault for fault in FAULTS if not names or any(name in fault.name for name in names)]
    if not chosen:
        print(f"mutations: expected a part of a fault's name, got {', '.join(names)}", file=sys.stderr)
        return 2
    missed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        rooms: SimpleQueue[Path] = SimpleQueue()
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for i in range(WORKERS):
            for name in tracked.strip("\0").split("\0"):
                (Path(folder) / str(i) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, Path(folder) / str(i) / name)
            rooms.put(Path(folder) / str(i))

        def within(fault: Fault) -> tuple[bool, float, str]:
            room = rooms.get()
            try:
                return run(fault, room)
            finally:
                rooms.put(room)

        for fault, (found, seconds, last) in zip(chosen, pool.map(within, chosen), strict=True):
            print(f"{'found ' if found else 'MISSED'} {seconds:5.1f} s  {fault.name}  [{last}]", flush=True)
            missed += [] if found else [fault.name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
