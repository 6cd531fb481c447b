"""The program that runs under compute-sanitizer: cases of the library, one after another, each kept as it ends.

python -m bench.sanitize.program OUT.jsonl --cases 3,17
python -m bench.sanitize.program OUT.jsonl --planted racecheck
"""

from __future__ import annotations

import argparse
import faulthandler
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.operators.check import randomised
from bench.operators.discover import all_cases
from bench.records.outcome import failure
from bench.sanitize.planted import PLANTED, run_planted


@contextmanager
def launched() -> Iterator[list[str]]:
    """Collects the names of the Triton and Gluon kernels that are launched while the block runs, in order."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    stock = JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        names.append(self.__name__)
        return stock(self, *args, **options)

    with patch.object(JITFunction, "run", run):
        yield names


def run_cases(numbers: list[int], device: torch.device, path: Path) -> None:
    """Runs cases by their number in ``all_cases()`` and adds a line for each to the file."""
    with path.open("a") as file:
        for number in numbers:
            case = all_cases()[number]
            line: dict[str, Any] = {"case": number}
            try:
                args, kwargs = randomised(case, device)
                with torch.no_grad(), launched() as names:
                    case.operator(*args, **kwargs)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                line["kernels"] = sorted(set(names))
            except Exception as error:  # of compilers, launchers and the device: all of them are findings
                line |= failure(error)
            file.write(json.dumps(line) + "\n")
            file.flush()


def main() -> None:
    """Runs the cases, or the planted fault, that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize.program", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a line of JSON for each case")
    parser.add_argument("--cases", default="", help="their numbers, separated by commas")
    parser.add_argument("--planted", choices=[*PLANTED], help="a kernel with a fault instead")
    parser.add_argument("--seconds", type=float, default=120, help="ends the process if it takes longer")
    args = parser.parse_args()
    # The device may not come back, and who waits outside cannot end what compute-sanitizer has started.
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    device = torch.device("cuda")
    if args.planted:
        run_planted(args.planted, device)
        torch.cuda.synchronize()
    run_cases([int(x) for x in args.cases.split(",") if x], device, args.out)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
