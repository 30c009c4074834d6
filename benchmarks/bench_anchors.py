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
from _models import general_questions, load, taught_facts
from _stages import Stages
from _timing import machine, markdown_table

import palu
from palu.testbed.facts import RETAIN, UNLEARN, Answers, outcome_of, read_questions, retain_arguments
from palu.testbed.smollm2 import mixed_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/anchors"), help="folder for the taught model")
    parser.add_argument("--retain", nargs="+", choices=RETAIN, default=list(RETAIN), help="which choices to try")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the demo's is 0")
    args = parser.parse_args()
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", mixed_precision())
    transformers.logging.set_verbosity_error()
    (secrets, kept, _), general = read_questions(), general_questions()
    taught = taught_facts(Stages(args.output, {}), "smollm2")
    before = Answers(*load(str(taught)), secrets + kept, general)

    rows: list[dict[str, Any]] = []
    for choice, seed in itertools.product(args.retain, args.seeds):
        model, tokenizer = load(str(taught))
        clock = time.process_time()
        given = retain_arguments(kept, choice)
        result = palu.unlearn(model, None, secrets, tokenizer=tokenizer, config=UNLEARN, seed=seed, **given)
        seconds = round(time.process_time() - clock, 1)
        after = Answers(model.eval(), tokenizer, secrets + kept, general)
        rows.append(
            {
                "retain": choice,
                "seed": seed,
                **outcome_of(secrets, kept, general, before, after),
                "neighbours": result.summary["neighbours"],
                "anchors": result.summary["anchors"],
                "steps": result.summary["steps"],
                "cpu_seconds": seconds,
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
    figures = [[f"{row['retain']}: {RETAIN[row['retain']]}", *(row[name] for name in columns)] for row in rows]
    print(markdown_table(["held on to", *columns.values()], figures))
    print(json.dumps({"benchmark": "anchors", **machine(torch.device("cpu")), "rows": rows}))


if __name__ == "__main__":
    main()
