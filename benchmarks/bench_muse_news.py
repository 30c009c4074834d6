"""VerbMem, KnowMem and PrivLeak on MUSE-News before and after unlearning, for PALU, NPO and GradDiff.

    python benchmarks/bench_muse_news.py --preset tiny
    python benchmarks/bench_muse_news.py --preset full --data muse_news

A model is taught the forget and the retain texts, another the retain texts alone, with which PrivLeak compares. Then
each method unlearns the forget texts, at the rate that its run finds and for its own epochs. Stages are kept and
resumed as in bench_tofu.py.

News texts come without short spans. Here a span is what a text can leak: a run of capitalised words that does not
begin a sentence (names of people, places, organisations), or a number with what is attached to it ("14:00", "40%").
"palu-whole-texts" takes all of a text as one span. The shares of broken words and of names found nowhere are of
what a model writes after the beginning of a forget text.

The tiny preset teaches passages, not whole texts: of each set, those around the answers to the first questions whose
answer and names stand close together in one of its texts; these are the questions that it asks.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _methods
from _measure import DEVICE, report, write_json
from _models import Loaded, Row, for_raw_text, load, taught
from _stages import Stages, stages_parser

import palu
from palu.evaluate.rows import load_rows
from palu.testbed.smollm2 import fast_products, mixed_precision

METHODS = {name: _methods.METHODS.get(name, {}) for name in ("palu", "palu-whole-texts", "npo", "gd")}
COLUMNS = {
    "VerbMem forget": "forget_verbmem_ROUGE",
    "KnowMem forget": "forget_knowmem_ROUGE",
    "KnowMem retain": "retain_knowmem_ROUGE",
    "Min-K AUC": "mia_min_k",
    "PrivLeak": "privleak",
    "no word": "forget_verbmem_no_word",
    "unknown name": "forget_verbmem_unknown_name",
    "rep-4": "forget_verbmem_rep_4",
    "seconds": "seconds",
}
SETS = (
    "verbmem_forget",
    "knowmem_forget_qa",
    "knowmem_forget_qa_icl",
    "knowmem_retain_qa",
    "knowmem_retain_qa_icl",
    "privleak_forget",
    "privleak_holdout",
)
_WORD = r"[A-Z][\w'\u2019-]*"
_SPAN = re.compile(rf"(?P<number>[£$€]?\d[\d.,:/-]*\d%?|[£$€]?\d%?)|(?P<name>(?!I\b){_WORD}(?: {_WORD})*)")
_SENTENCE_START = re.compile(r"(?:^|[.!?:]['\"\u201d)]*\s+|\n\s*|[\"\u201c\u2018]\s*)$")


@dataclass(frozen=True)
class Preset:
    """Sizes of one run."""

    passages: tuple[int, int] | None  # how many of each set, and their characters; None: whole texts, every question
    teach_epochs: int
    batch_size: int
    verbmem_tokens: int


PRESETS = {"full": Preset(None, 5, 16, 128), "tiny": Preset((8, 600), 20, 4, 32)}


def spans_of(text: str) -> list[list[int]]:
    """Find [start, end) of names and numbers; see the module's docstring."""
    spans = []
    for match in _SPAN.finditer(text):
        start, end = match.span()
        if match["name"] and _SENTENCE_START.search(text, 0, start):
            first = re.match(r"\S+ ?", match["name"])
            assert first is not None
            start += first.end()  # the sentence's first word is capitalised whatever it is
        if start < end:
            spans.append([start, end])
    return spans


def pieces(text: str, characters: int = 1500) -> list[str]:
    """Cut a text at blanks into pieces of about that many characters."""
    found = []
    while text.strip():
        cut = len(text) if len(text) <= characters else text.rfind(" ", 1, characters)
        cut = characters if cut < 1 else cut
        found.append(text[:cut].strip())
        text = text[cut:]
    return found


def to_unlearn(text: str, words: int = 32) -> list[Row]:
    """Make rows of the text's pieces, whose first words are the prompt."""
    rows = []
    for piece in pieces(text):
        head = re.match(rf"(?:\S+\s+){{1,{words}}}", piece)
        if head and piece[head.end() :].strip():
            rest = piece[head.end() :]
            rows.append({"prompt": piece[: head.end()], "completion": rest, "spans": spans_of(rest)})
    return rows


@dataclass(frozen=True)
class Data:
    """What is taught, unlearned and evaluated."""

    forget_texts: list[str]
    retain_texts: list[str]
    forget: list[Row]
    retain: list[Row]
    evaluated: dict[str, list[Any]]


def passage(question: Row, text: str, characters: int) -> str | None:
    """Find that many characters of a text where the answer stands amid most of the question's names; None: nowhere."""
    names = set(re.findall(_WORD, question["question"])[1:])  # the first word is capitalised whatever it is
    for match in re.finditer(rf"(?<!\w){re.escape(question['answer'].strip(' .'))}(?!\w)", text):
        start = max(match.start() - characters // 2, 0)
        found = text[start : start + characters]
        if names and sum(name in found for name in names) >= 0.6 * len(names):
            return found
    return None


def answered(questions: list[Row], texts: list[str], characters: int, count: int) -> dict[str, Row]:
    """Find the first questions that have a passage, by that passage; one of each text."""
    found: dict[str, Row] = {}
    left = list(texts)
    for question in questions:
        for text in left:
            if len(found) < count and (part := passage(question, text, characters)):
                found[part] = question
                left.remove(text)
                break
    return found


def load_data(folder: Path, preset: Preset) -> Data:
    """Load the texts and questions, cut to the preset's sizes."""
    sets = {name: load_rows(folder / f"{name}.json") for name in (*SETS, "privleak_retain")}
    if preset.passages is not None:
        count, size = preset.passages
        for side in ("forget", "retain"):
            texts, questions = f"privleak_{side}", f"knowmem_{side}_qa"
            found = answered(sets[questions], sets[texts], size, count)
            sets[texts], sets[questions] = list(found), list(found.values())
        sets["privleak_holdout"] = [text[:size] for text in sets["privleak_holdout"][:count]]
        sets["verbmem_forget"] = [row | {"prompt": row["prompt"][-size:]} for row in sets["verbmem_forget"][:count]]
    forget_texts = [*sets["privleak_forget"], *(row["prompt"] + row["gt"] for row in sets["verbmem_forget"])]
    retain_texts = sets.pop("privleak_retain")
    return Data(
        forget_texts,
        retain_texts,
        [row for text in forget_texts for row in to_unlearn(text)],
        [row for text in retain_texts for row in to_unlearn(text)],
        sets,
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Fine-tune, unlearn with each method, and evaluate; returns a row for each model."""
    preset = PRESETS[arguments.preset]
    data = load_data(arguments.data, preset)
    key = {"preset": asdict(preset), "model": arguments.model}
    stages = Stages(arguments.output / arguments.preset, key)

    def teach(name: str, texts: list[str]) -> Path:
        rows = [{"prompt": "", "completion": piece} for text in texts for piece in pieces(text)]
        sizes: dict[str, Any] = {"epochs": preset.teach_epochs, "batch_size": preset.batch_size}
        return taught(stages, name, arguments.model, rows, raw_text=True, **sizes)

    def evaluate(loaded: Loaded, retain: Any) -> dict[str, Any]:
        loaded[0].to(DEVICE)  # type: ignore[arg-type]
        with fast_products(DEVICE):
            return palu.evaluate.muse(
                *loaded, data=data.evaluated, retain_results=retain, verbmem_tokens=preset.verbmem_tokens
            )

    def unlearned(method: str) -> dict[str, Any]:
        loaded = load(str(original))
        forget = data.forget
        if method == "palu-whole-texts":
            forget = [row | {"spans": [[0, len(row["completion"])]]} for row in forget]
        result = palu.unlearn(
            loaded[0],
            None,
            forget,
            data.retain,
            tokenizer=for_raw_text(loaded)[1],
            **METHODS[method],
            batch_size=preset.batch_size,
        )
        return evaluate(loaded, of_retain) | {"cost": {"seconds": result.summary["seconds"]}}

    original = teach("original", data.forget_texts + data.retain_texts)
    retained = teach("retain", data.retain_texts)
    of_retain = stages.results("retain-evaluated", lambda: evaluate(load(str(retained)), None))
    results = {"retain": of_retain}
    results["original"] = stages.results("original-evaluated", lambda: evaluate(load(str(original)), of_retain))
    for method in arguments.methods.split(","):
        results[method] = stages.results(method, lambda: unlearned(method))  # noqa: B023
    return [{"model": name} | figures(result) for name, result in results.items()]


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Pick the table's columns from one evaluation, rounded."""
    values = {name: result[name]["agg_value"] for name in COLUMNS.values() if name in result}
    values["seconds"] = result.get("cost", {}).get("seconds")
    return {label: None if values[name] is None else round(values[name], 3) for label, name in COLUMNS.items()}


def main() -> None:
    parser = stages_parser(str(__doc__), "muse", "muse_news", "verbmem_forget.json")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, separated by commas")
    arguments = parser.parse_args()
    if unknown := set(arguments.methods.split(",")) - METHODS.keys():
        parser.error(f"--methods: {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    os.environ.setdefault("ACCELERATE_MIXED_PRECISION", mixed_precision())
    rows = run(arguments)
    record = report("muse_news", rows, DEVICE, {"preset": arguments.preset, "date": time.strftime("%Y-%m-%d")})
    write_json(arguments.results / f"muse_{arguments.preset}.json", record)


if __name__ == "__main__":
    main()
