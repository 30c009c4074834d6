"""Precision and recall of the span finders of palu.annotate, against the spans that GPT-4o marked: TOFU, forget05.

    python benchmarks/bench_spans.py --data tofu
    python benchmarks/bench_spans.py --data tofu --fit     # the constants of palu/spans/contrast.py, again

SmolLM2 is taught the rows of forget05, and kept in --output; what it says of them is computed again each time. Rows are
plain text (`Question: ...`), which are shorter than with SmolLM2's chat template and its system prompt.

The table counts tokens of the answer, over all rows of forget05 together, without what a row's question tells. No
constant of `contrast` was chosen on them (--fit chooses them on the 200 other rows of forget10: a logistic regression
of whether a new word is in one of GPT-4o's spans, on all figures but `known`, since none of these rows is taught):

- precision, recall, F1: of the tokens in the finder's spans against those in GPT-4o's.
- onset precision: share of the onset tokens (the first 3 of each of the finder's spans) that are in one of GPT-4o's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _measure import DEVICE, report
from _models import Loaded, Row, for_raw_text, load, taught
from _stages import Stages, stages_parser
from transformers import PreTrainedTokenizerBase

import palu
from palu.data.examples import load_forget
from palu.data.tokenize import IGNORE
from palu.evaluate.rows import load_rows
from palu.spans.contrast import WEIGHTS, contrast_words

N = 3
SIZES = {"epochs": 8, "batch_size": 12, "learning_rate": 3e-4}  # of what is taught
PRECISION = 0.7  # of the words that `contrast` takes: what a span takes in by mistake is unlearned, too
QUOTES = "'\"\u2018\u2019\u201c\u201d"
# Titles in quotation marks; numbers and dates.
PATTERN = rf"(?<=[{QUOTES}])[A-Z][^{QUOTES}]*(?=[{QUOTES}])|\d(?:[\d/,.:-]*\d)?"
# Capitalised words but at the beginning of a sentence; words with a digit.
CAPITALS = r"(?<!^)(?<![.!?]\s)\b[A-Z][\w-]*|\b[\w-]*\d[\w/-]*"


def agreement(found: Sequence[Row], marked: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Compute precision, recall and F1 of tokens, and onset precision (see the module's docstring)."""
    counts = dict.fromkeys(("found", "marked", "both", "onset", "onset_both"), 0)
    pairs = (load_forget(rows, tokenizer, max_length=4096).examples for rows in (found, marked))
    for ours, theirs in zip(*pairs, strict=True):
        sensitive, gold = ours.labels >= 0, theirs.labels >= 0
        onset = palu.prefix_mask(ours.labels[None], N, tokenizer.eos_token_id)[0]
        for name, mask in (("found", sensitive), ("marked", gold), ("both", sensitive & gold), ("onset", onset)):
            counts[name] += int(mask.sum())
        counts["onset_both"] += int((onset & gold).sum())
    return {
        "precision": round(counts["both"] / counts["found"], 3),
        "recall": round(counts["both"] / counts["marked"], 3),
        "F1": round(2 * counts["both"] / (counts["found"] + counts["marked"]), 3),
        "onset_precision": round(counts["onset_both"] / counts["onset"], 3),
        "spans": sum(len(row["spans"]) for row in found),
    }


def fit(rows: Sequence[Row], loaded: Loaded) -> dict[str, Any]:
    """Fit the weights and the bias of palu.spans.contrast, but for the weight of `known`, by logistic regression.

    The bias is the one at which PRECISION of the words taken are marked.
    """
    from sklearn.linear_model import LogisticRegression

    names = [name for name in WEIGHTS if name != "known"]
    answers = contrast_words([(f"row {i}", row) for i, row in enumerate(rows)], *loaded)
    pairs = [(word, row["spans"]) for words, row in zip(answers, rows, strict=True) for word in words if word.new]
    figures = np.array([[word.figures[name] for name in names] for word, _ in pairs])
    marked = np.array([any(word.start < end and word.end > start for start, end in spans) for word, spans in pairs])
    scale = figures.std(0)  # so that the penalty treats all alike
    model = LogisticRegression(max_iter=1000).fit(figures / scale, marked)
    scores = model.decision_function(figures / scale)
    order = np.argsort(-scores)
    precision = np.cumsum(marked[order]) / np.arange(1, len(order) + 1)
    edge = scores[order][np.flatnonzero(precision >= PRECISION)[-1]]
    return {
        "WEIGHTS": dict(zip(names, (model.coef_[0] / scale).round(2).tolist(), strict=True)),
        "BIAS": round(float(model.intercept_[0] - edge), 2),
        "words": len(pairs),
    }


def main() -> None:
    parser = stages_parser(str(__doc__), "spans", "tofu", "forget05.jsonl")
    parser.add_argument("--fit", action="store_true", help="fit the constants of `contrast` on other rows, print them")
    arguments = parser.parse_args()

    forget = load_rows(arguments.data / "forget05.jsonl")
    questions = {row["question"] for row in forget}
    others = [row for row in load_rows(arguments.data / "forget10.jsonl") if row["question"] not in questions]
    unmarked = [{name: text for name, text in row.items() if name != "spans"} for row in forget]

    stages = Stages(arguments.output, SIZES | {"model": arguments.model})
    folder = taught(stages, "taught", arguments.model, forget, raw_text=True, **SIZES)
    model, tokenizer = for_raw_text(load(str(folder)))
    if arguments.fit:
        print(json.dumps(fit(others, (model, tokenizer))))
        return
    model.to(DEVICE, torch.bfloat16)  # type: ignore[arg-type]
    started = time.perf_counter()
    contrast = palu.annotate(unmarked, "contrast", model, tokenizer)
    seconds = round(time.perf_counter() - started, 1)
    found = {
        "whole": palu.annotate(unmarked, "whole"),
        "regex: titles in quotes, numbers": palu.annotate(unmarked, f"regex:{PATTERN}"),
        "regex: capitalised words, numbers": palu.annotate(unmarked, f"regex:{CAPITALS}"),
        "contrast": contrast,
    }
    table = [{"finder": name, **agreement(rows, forget, tokenizer)} for name, rows in found.items()]
    tokens = sum(int((e.labels != IGNORE).sum()) for e in load_forget(forget, tokenizer, max_length=4096).examples)
    details = {**SIZES, "model": arguments.model, "answer_tokens": tokens, "contrast_seconds": seconds}
    report("spans", table, DEVICE, details)


if __name__ == "__main__":
    main()
