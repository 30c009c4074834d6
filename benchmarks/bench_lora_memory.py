"""Memory of unlearning SmolLM2-135M: all weights against LoRA, with and without gradient checkpointing.

Two steps on the demo's rows, six facts to forget and six to keep in one micro-batch; each mode in a process of its own.
Counted is the most that comes beside the loaded model: in tensors (on a CPU as torch's profiler sees them allocated and
freed), and on a CPU in resident memory, too, which also has libraries and what the allocator holds for later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from typing import Any

import torch
from _measure import DEVICE, peak, report, reset_peak, status
from torch.profiler import ProfilerActivity, profile

import palu
from palu.testbed.facts import UNLEARN, read_questions
from palu.testbed.real_models import load_packaged

MODES = ("full", "lora")
SIZES: dict[str, Any] = {
    "batch_size": 6,
    "retain_batch_size": 6,
    "max_steps": 2,
    "anchors": 0,
    "neighbours": 0,
    "variants": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args.checkpointing)))
        return
    rows = []
    for mode, flags in itertools.product(MODES, ([], ["--checkpointing"])):
        command = [sys.executable, __file__, "--mode", mode, *flags]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    report("lora_memory", rows, DEVICE)


def measure(mode: str, checkpointing: bool) -> dict[str, object]:
    """Unlearn for two steps in this process; returns its row of the table."""
    secrets, kept, _ = read_questions()
    model, tokenizer = load_packaged("smollm2")
    passes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: passes.append(given["input_ids"].numel()), with_kwargs=True
    )
    reset_peak()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else status("VmRSS")
    settings = SIZES | {"lora_rank": 8 if mode == "lora" else None, "gradient_checkpointing": checkpointing}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=DEVICE.type == "cpu") as seen:
        palu.unlearn(model, None, secrets, kept, tokenizer=tokenizer, config=UNLEARN, progress=False, **settings)
    highest = {"resident_gib": peak() - before, "tensors_gib": highest_allocated(seen)}
    if torch.cuda.is_available():
        highest = {"tensors_gib": peak() - before}
    row = {"mode": mode, "checkpointing": checkpointing, "tokens": passes[-1]}
    return row | {name: round(size / 2**30, 3) for name, size in highest.items()}


def highest_allocated(seen: Any) -> int:
    """Return the most bytes that were allocated at once while the profiler looked on."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


if __name__ == "__main__":
    main()
