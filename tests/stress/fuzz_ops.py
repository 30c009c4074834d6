"""Random calls of every op, built with AddressSanitizer and UBSan: `make sanitize` runs it, pytest does not.

Shapes, strides and dtypes are drawn. A call with good arguments must agree with plain torch in float64 and write
nothing outside its buffers. One with a bad argument must raise the right exception and change nothing.

The calls are those of tests/helpers/op_calls.py, as in tests/ops/test_ops.py.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path


def sanitized_environment() -> dict[str, str]:
    """What a process needs to load the sanitized ops: Python itself is not instrumented."""
    from torch.utils import cpp_extension

    def library(name: str) -> str:
        command = [cpp_extension.get_cxx_compiler(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    return {
        "PALU_SANITIZE": "1",
        # Without libstdc++ beside it, ASan finds no __cxa_throw to intercept, and the first exception aborts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        # Python and torch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def fuzz(first: int, cases: int, record: Path) -> int:
    """Make the calls, one after the other, each from a seed of its own. Returns the exit status.

    record: the file to which each call is written before it is made.
    """
    from helpers.op_calls import OPS, try_one  # here, where the ops can be loaded

    from palu import _build, ops

    if _build.jit_name() not in ops.extension_path():
        raise RuntimeError(f"{ops.extension_path()} is not the build that was asked for")
    start, failed = time.monotonic(), 0
    called: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for seed in range(first, first + cases):
        chosen = random.Random(seed)
        op, bad = chosen.choice(OPS), chosen.random() < 0.4
        record.write_text(f"seed {seed} (again: --seed {seed} --cases 1): drawing the arguments of {op}")
        try:
            name = try_one(seed, op, bad=bad, about=record.write_text)
        except Exception:
            failed += 1
            traceback.print_exc()
            if failed == 10:
                break
        else:
            called[name] += 1
            refused[name] += bad
    record.write_text("")  # it did not die
    counts = ", ".join(f"{name} {count} ({refused[name]})" for name, count in sorted(called.items()))
    print(
        f"{f'FAILED: {failed} of ' if failed else ''}{called.total() + failed} cases, {refused.total()} bad arguments "
        f"refused, in {time.monotonic() - start:.0f} s: {counts}"
    )
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next one has the next seed")
    parser.add_argument(
        "--record", type=Path, help=argparse.SUPPRESS
    )  # the child's: where it writes what it is about to do
    options = parser.parse_args()
    if options.record:
        os.environ.pop("LD_PRELOAD", None)  # not for the compilers that this process starts
        sys.modules["palu._C"] = None  # type: ignore[assignment]  # the ops built from these sources, nothing prebuilt
        sys.path.append(str(Path(__file__).resolve().parents[1]))  # for helpers
        return fuzz(options.seed, options.cases, options.record)
    with tempfile.NamedTemporaryFile("r") as record:
        environment = os.environ | sanitized_environment()
        command = [sys.executable, *sys.argv, "--record", record.name]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code and (last := record.read()):
            print(f"the process ended (exit status {code}) in\n{last}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
