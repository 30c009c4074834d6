"""Weights and products in bfloat16 against float32: outcomes, losses step by step, and memory, on SmolLM2-135M.

Two tasks: ``demo``, the demo's six secrets among twelve facts, with the demo's settings; ``tofu``, the twenty rows of
one author of TOFU's forget05 beside twenty rows to retain, with the sizes of ``bench_tofu.py --preset tiny`` and
defaults for everything else. SmolLM2 is taught the task once, in float32. Then, for each seed and choice, it is loaded
and unlearns in a process of its own. Finished runs are kept in --output: the same command goes on where it stopped.
Writes bf16_<task>.json, with every step's losses, to --results, and prints a table::

    python benchmarks/bench_bf16.py --seeds 0 1 2
    python benchmarks/bench_bf16.py --task tofu --choices float32 bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from _memory import peak, reset_peak
from _models import Row, general_questions, taught, taught_facts
from _stages import Stages, check_data, stages_parser
from _timing import DEVICE, alone, machine, markdown_table, write_json
from _tofu import PRESETS, load_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import palu
from palu.testbed.facts import UNLEARN, is_told, read_questions, retain_arguments
from palu.testbed.smollm2 import answer_questions


@dataclass(frozen=True)
class Choice:
    """In what the weights are held and multiplied, and what steps them."""

    label: str
    dtype: torch.dtype
    mixed_precision: str = "no"
    optimizer: str = "adamw"


CHOICES = {
    "float32": Choice("float32", torch.float32),
    "mixed": Choice("float32, bfloat16 products", torch.float32, mixed_precision="bf16"),
    "bfloat16": Choice("bfloat16", torch.bfloat16),
    "bfloat16_8bit": Choice("bfloat16, 8-bit AdamW", torch.bfloat16, optimizer="adamw_8bit"),
}
TERMS = ("local", "kl", "retain")


@dataclass(frozen=True)
class Task:
    """What is taught, unlearned and asked. What is asked: rows of a question and its right answers, any of them."""

    teach: Callable[[Stages, str], Path]  # the model of this name; returns the taught one's folder
    forget: list[Row]
    settings: dict[str, Any]  # what palu.unlearn gets beside the forget set
    asked: dict[str, list[Row]]  # "secrets", "retained" and "general"
    max_new_tokens: int


def demo(_: Path) -> Task:
    """Make the demo's task; thirty general questions are added to its ten."""
    secrets, kept = read_questions()[:2]
    settings = {"config": UNLEARN, **retain_arguments(kept, "both")}
    asked = {"secrets": secrets, "retained": kept}
    rows = {kind: [fact | {"answers": [fact["secret"]]} for fact in facts] for kind, facts in asked.items()}
    return Task(taught_facts, secrets, settings, rows | {"general": general_questions()}, max_new_tokens=32)


def tofu(folder: Path) -> Task:
    """Make the task on TOFU: each span is a secret, unless its question tells it; a retained row is a whole answer."""
    preset = PRESETS["tiny"]
    data = load_data(folder, preset)

    def teach(stages: Stages, model: str) -> Path:
        sizes: dict[str, Any] = {"epochs": preset.teach_epochs, "batch_size": preset.teach_batch}
        return taught(stages, "taught", model, data.forget + data.retain, **sizes)

    def whole(rows: list[Row]) -> list[Row]:
        return [{"question": row["question"], "answers": [row["answer"]]} for row in rows]

    secrets = [
        {"question": row["question"], "answers": [row["answer"][start:end]]}
        for row in data.forget
        for start, end in row["spans"]
    ]
    (learning_rate,) = preset.learning_rates
    sizes = {"epochs": preset.epochs, "batch_size": preset.batch_size, "learning_rate": learning_rate}
    asked = {
        "secrets": [row for row in secrets if not is_told(row["question"], row["answers"])],
        "retained": whole(data.retain),
        "general": whole(data.evaluated.real_authors + data.evaluated.world_facts),
    }
    # TOFU's longest answer has 95 tokens, the longest of these rows 70.
    return Task(teach, data.forget, {"retain": data.retain, **sizes}, asked, max_new_tokens=80)


TASKS = {"demo": demo, "tofu": tofu}


def told(model: Any, tokenizer: Any, task: Task) -> dict[str, list[bool]]:
    """Ask everything: of each row, whether the greedy answer holds one of the right ones."""
    questions = list(dict.fromkeys(row["question"] for rows in task.asked.values() for row in rows))
    texts = dict(zip(questions, answer_questions(model, tokenizer, questions, tokens=task.max_new_tokens), strict=True))
    return {
        kind: [is_told(texts[row["question"]], row["answers"]) for row in rows] for kind, rows in task.asked.items()
    }


def run(stages: Stages, folder: Path, task: Task, name: str, seed: int) -> dict[str, Any]:
    """Unlearn the task in one of the choices, in this process."""
    choice = CHOICES[name]
    os.environ["ACCELERATE_MIXED_PRECISION"] = choice.mixed_precision
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=choice.dtype)
    model.to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = stages.results(f"told-{choice.dtype}", lambda: told(model, tokenizer, task))
    reset_peak()
    clock = time.perf_counter()
    settings = task.settings | {"optimizer": choice.optimizer, "seed": seed, "progress": False}
    result = palu.unlearn(model, None, task.forget, tokenizer=tokenizer, **settings)
    seconds = time.perf_counter() - clock
    highest = peak()
    after = told(model.eval(), tokenizer, task)
    # Of what was told before, by its place in task.asked.
    still = {kind: {i: after[kind][i] for i, known in enumerate(before[kind]) if known} for kind in before}
    return {
        "choice": name,
        "seed": seed,
        **{kind: sum(answers.values()) for kind, answers in still.items()},
        **{f"{kind}_before": len(answers) for kind, answers in still.items()},
        "lost": {kind: [i for i, right in answers.items() if not right] for kind, answers in still.items()},
        "steps": result.summary["steps"],
        "peak_gib": round(highest / 2**30, 2),
        "seconds": round(seconds),
        "history": [{term: record[term] for term in TERMS} for record in result.history],
    }


def outcomes(rows: Sequence[dict[str, Any]]) -> str:
    """Format each run's outcome as Markdown."""
    figures = ("steps", "peak_gib", "seconds")
    cells = [
        [CHOICES[row["choice"]].label, row["seed"]]
        + [f"{row[kind]} of {row[f'{kind}_before']}" for kind in ("secrets", "retained", "general")]
        + [row[name] for name in figures]
        for row in rows
    ]
    return markdown_table(["weights", "seed", "secrets", "retained", "general", *figures], cells)


def main() -> None:
    parser = stages_parser(str(__doc__), "bf16", "tofu", "retain90, forget10 and idk.txt")
    parser.add_argument("--task", choices=TASKS, default="demo")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--one", nargs=2, metavar=("CHOICE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "tofu":
        check_data(parser, args.data, "forget05.jsonl")
    transformers.logging.set_verbosity_error()
    task = TASKS[args.task](args.data)
    stages = Stages(args.output / args.task, {"task": args.task, "model": args.model})
    folder = task.teach(stages, args.model)
    if args.one is not None:
        print(json.dumps(run(stages, folder, task, args.one[0], int(args.one[1]))))
        return

    def kept(choice: str, seed: int) -> dict[str, Any]:
        options = ["--task", args.task, "--data", args.data, "--model", args.model, "--output", args.output]
        # Freed tensors go back to the system at once, so that the peak is of what is held; in huge pages, for speed.
        memory = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "1"}
        make = partial(alone, __file__, *options, "--one", choice, seed, **memory)
        print(f"{choice}, seed {seed}", flush=True)
        return stages.results(f"{choice}-seed{seed}", make)

    rows = [kept(choice, seed) for seed in args.seeds for choice in args.choices]
    print(outcomes(rows))
    record = {"benchmark": "bf16", **machine(DEVICE), "date": time.strftime("%Y-%m-%d"), "task": args.task}
    write_json(args.results / f"bf16_{args.task}.json", record | {"runs": rows})


if __name__ == "__main__":
    main()
