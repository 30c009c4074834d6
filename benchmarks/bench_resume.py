"""Time to resume a run from its checkpoint, once the model is loaded: SmolLM2-135M and the demo's facts, on a CPU.

A run of two steps has ended; it is resumed from its last checkpoint with no step left to take, so that the time of
`palu.unlearn` is that of resuming: the model and the data compared with the checkpoint's, weights and optimizer put
back. `cpu_seconds` is what a machine without other work would need; `dropped` has the files out of the page cache
first, as after a restart of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _timing import report

import palu
from palu.testbed.facts import UNLEARN, read_questions
from palu.testbed.smollm2 import load_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    secrets, kept, _ = read_questions()
    model, tokenizer = load_smollm2()
    untrained = {name: p.detach().clone() for name, p in model.named_parameters()}

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        sizes = {"epochs": 1, "batch_size": 3, "retain_batch_size": 3, "gradient_accumulation_steps": 1}

        def run(resume: bool) -> dict[str, float]:
            """Time the call of ``palu.unlearn``, from the untrained weights."""
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(untrained[name])
            clock, cpu = time.perf_counter(), time.process_time()
            result = palu.unlearn(
                model,
                None,
                secrets,
                kept,
                tokenizer=tokenizer,
                config=UNLEARN.replace(**sizes, stop_probability=None, anchors=0, progress=False),
                checkpoint_dir=folder,
                resume=resume,
            )
            assert len(result.history) == 2
            return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}

        run(resume=False)
        checkpoint_gib = sum(path.stat().st_size for path in Path(folder).glob("step-*")) / 2**30
        rows: list[dict[str, Any]] = []
        for files in ("in the page cache", "dropped"):
            times = []
            for _ in range(args.repeats):
                if files == "dropped":
                    drop(Path(folder))
                times.append(run(resume=True))
            medians = {name: statistics.median(one[name] for one in times) for name in times[0]}
            rows.append({"files": files} | {name: round(value, 2) for name, value in medians.items()})
    report("resume", rows, torch.device("cpu"), {"repeats": args.repeats, "checkpoint_gib": round(checkpoint_gib, 2)})


def drop(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
