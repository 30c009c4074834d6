"""Makes the calls one after the other, each from a seed of its own, and checks what comes of them."""

import os
import random
import time
import traceback
from collections import Counter

from helpers.op_calls import OPS, try_one

from palu import _build, ops


def fuzz(first: int, cases: int, record: str) -> int:
    """Make the calls. `record`: the file to which each is written before it is made. Returns the exit status."""
    if _build.jit_name() not in ops.extension_path():
        raise RuntimeError(f"{ops.extension_path()} is not the build that was asked for")
    file = os.open(record, os.O_WRONLY)

    def about(told: str) -> None:
        line = told.encode() + b"\n"
        os.pwrite(file, line, 0)
        os.ftruncate(file, len(line))

    start, failed = time.monotonic(), 0
    called: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for seed in range(first, first + cases):
        chosen = random.Random(seed)
        op, bad = chosen.choice(OPS), chosen.random() < 0.4
        about(f"seed {seed} (again: --seed {seed} --cases 1): drawing the arguments of {op}")
        try:
            name = try_one(seed, op, bad=bad, about=about)
        except Exception:
            failed += 1
            traceback.print_exc()
            if failed == 10:
                break
        else:
            called[name] += 1
            refused[name] += bad
    os.ftruncate(file, 0)  # it did not die
    counts = ", ".join(f"{name} {count} ({refused[name]})" for name, count in sorted(called.items()))
    print(
        f"{f'FAILED: {failed} of ' if failed else ''}{called.total() + failed} cases, {refused.total()} bad arguments "
        f"refused, in {time.monotonic() - start:.0f} s, {'with' if _build.SANITIZED else 'without'} sanitizers: "
        f"{counts}"
    )
    return int(failed > 0)
