"""Peak memory of unlearning SmolLM2-135M: full fine-tuning against LoRA, with and without gradient checkpointing.

A few steps, each run in a process of its own. The data is the demo's: six facts to forget and six to keep, in one
micro-batch. The peak is counted from the call of `palu.unlearn` on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time

import torch
from _measure import DEVICE, peak, report, reset_peak, status

import palu
from palu.testbed.facts import UNLEARN, read_questions
from palu.testbed.real_models import load_packaged

MODES = ("full", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8, help="LoRA's, on every linear layer but the head")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args.checkpointing, args.steps, args.rank)))
        return
    rows = []
    for mode, flags in itertools.product(MODES, ([], ["--checkpointing"])):
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode, *flags]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    report("lora_memory", rows, DEVICE, {"steps": args.steps, "rank": args.rank})


def measure(mode: str, checkpointing: bool, steps: int, rank: int) -> dict[str, object]:
    """Unlearn for a few steps in this process; returns its row of the table."""
    secrets, kept, _ = read_questions()
    model, tokenizer = load_packaged("smollm2")
    reset_peak()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else status("VmRSS")
    clock = time.perf_counter()
    result = palu.unlearn(
        model,
        None,
        secrets,
        kept,
        tokenizer=tokenizer,
        config=UNLEARN,
        epochs=steps,
        batch_size=6,
        retain_batch_size=6,
        gradient_accumulation_steps=1,
        anchors=0,
        lora_rank=rank if mode == "lora" else None,
        gradient_checkpointing=checkpointing,
        progress=False,
    )
    return {
        "mode": mode,
        "checkpointing": checkpointing,
        "tokens": result.history[-1]["tokens"],
        "before_gib": round(before / 2**30, 3),
        "peak_gib": round(peak() / 2**30, 3),
        "seconds": round(time.perf_counter() - clock, 1),
    }


if __name__ == "__main__":
    main()
