"""Weights in bfloat16 against float32 on the demo's task: outcome, losses step by step, time and memory.

SmolLM2-135M-Instruct is taught the demo's twelve facts once, in float32. Then it is loaded in each dtype, as
``from_pretrained`` would, and unlearns six of them with the demo's settings. Prints a table, then JSON::

    python benchmarks/bench_bf16.py --output runs/bf16
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _models import load, save
from _timing import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu
from palu.testbed.facts import UNLEARN, Answers, outcome_of, read_questions, retain_arguments
from palu.testbed.smollm2 import teach

DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bf16"), help="folder for the taught model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    taught = args.output / "taught"
    if args.one is not None:
        print(json.dumps(run(taught, args.one, args.seed)))
        return
    if not taught.exists():
        torch.manual_seed(0)
        args.output.mkdir(parents=True, exist_ok=True)
        loaded = load("smollm2")
        secrets, kept, _ = read_questions()
        teach(*loaded, secrets + kept)
        save(loaded, taught)
        del loaded
    # A process each: its peak of resident memory is its own.
    command = [sys.executable, __file__, "--output", str(args.output), "--seed", str(args.seed), "--one"]
    rows = [json.loads(subprocess.check_output([*command, dtype], text=True).splitlines()[-1]) for dtype in args.dtypes]

    columns = ("dtype", "secrets", "retained", "general", "steps", "seconds", "peak_gib")
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for row in rows:
        print(f"| {' | '.join(str(row[name]) for name in columns)} |")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    terms = ("local", "kl", "retain")
    heads = [f"{term}, {row['dtype']}" for term in terms for row in rows]
    print(f"\n| step | {' | '.join(heads)} |")
    print(f"|---{'|---:' * (len(terms) * len(rows))}|")
    for step in range(max(row["steps"] for row in rows)):
        cells = [f"{row['history'][step][term]:.4g}" if step < row["steps"] else "" for term in terms for row in rows]
        print(f"| {step + 1} | {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "bf16", "rows": rows, **machine(device)}))


def run(taught: Path, dtype: str, seed: int) -> dict[str, Any]:
    """Unlearn the demo's secrets with the weights in one dtype."""
    secrets, kept, general = read_questions()
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(taught)
    before = Answers(model, tokenizer, secrets + kept, general)
    clock = time.perf_counter()
    given = retain_arguments(kept, "both")
    result = palu.unlearn(model, None, secrets, tokenizer=tokenizer, config=UNLEARN, seed=seed, progress=False, **given)
    seconds = time.perf_counter() - clock
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    after = Answers(model.eval(), tokenizer, secrets + kept, general)
    outcome = outcome_of(secrets, kept, general, before, after)
    return {
        "dtype": dtype,
        "secrets": f"{outcome['forget_still_produced']} of {len(secrets)}",
        "retained": f"{outcome['retain_still_produced']} of {len(kept)}",
        "general": f"{outcome['general_still_right']} of {outcome['general_right_before']}",
        "steps": result.summary["steps"],
        "seconds": round(seconds),
        "peak_gib": round(peak, 2),
        "history": result.history,
    }


if __name__ == "__main__":
    main()
