"""What is forgotten and what is kept, with and without anchors and retained facts: the demo's task on SmolLM2-135M.

SmolLM2-135M-Instruct is taught the demo's twelve facts once; then each choice of ``python -m palu.demo --retain`` is
tried on these weights. To the demo's ten general questions come thirty of general.jsonl. Prints a table, then JSON::

    python benchmarks/bench_anchors.py --output runs/anchors
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from _models import load, save

import palu
from palu.testbed.facts import RETAIN, UNLEARN, Answers, outcome_of, read_jsonl, read_questions, retain_arguments
from palu.testbed.smollm2 import mixed_precision, teach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/anchors"), help="folder for the taught model")
    parser.add_argument("--retain", nargs="+", choices=RETAIN, default=list(RETAIN), help="which choices to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the demo's is 0")
    args = parser.parse_args()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", mixed_precision())
    transformers.logging.set_verbosity_error()
    secrets, kept, general = read_questions()
    general += read_jsonl(Path(__file__).with_name("general.jsonl"))
    taught = args.output / "taught"
    if not taught.exists():
        torch.manual_seed(0)
        args.output.mkdir(parents=True, exist_ok=True)
        loaded = load("smollm2")
        teach(*loaded, secrets + kept)
        save(loaded, taught)
        del loaded
    before = Answers(*load(str(taught)), secrets + kept, general)

    rows: list[dict[str, Any]] = []
    for choice, seed in itertools.product(args.retain, args.seeds):
        model, tokenizer = load(str(taught))
        wall, cpu = time.perf_counter(), time.process_time()
        given = retain_arguments(kept, choice)
        result = palu.unlearn(model, None, secrets, tokenizer=tokenizer, config=UNLEARN, seed=seed, **given)
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        after = Answers(model.eval(), tokenizer, secrets + kept, general)
        rows.append(
            {
                "retain": choice,
                "seed": seed,
                **outcome_of(secrets, kept, general, before, after),
                "neighbours": result.summary["neighbours"],
                "anchors": result.summary["anchors"],
                "steps": result.summary["steps"],
                **{name: round(value, 1) for name, value in seconds.items()},
                "lost": [item["question"] for item in general if before.right(item) and not after.right(item)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    columns = {
        "seed": "seed",
        "forget_still_produced": f"secrets produced, of {len(secrets)}",
        "retain_still_produced": f"retained facts, of {len(kept)}",
        "general_still_right": f"general facts, of {rows[0]['general_right_before']}",
        "neighbours": "neighbours",
        "anchors": "anchors",
        "steps": "steps",
        "cpu_seconds": "CPU seconds",
    }
    print(f"\n| held on to | {' | '.join(columns.values())} |\n|---{'|---:' * len(columns)}|")
    for row in rows:
        figures = " | ".join(str(row[name]) for name in columns)
        print(f"| {row['retain']}: {RETAIN[row['retain']]} | {figures} |")
    versions = {"palu": palu.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"benchmark": "anchors", "rows": rows, "threads": torch.get_num_threads(), "versions": versions}))


if __name__ == "__main__":
    main()
