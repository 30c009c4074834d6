"""Tasks for EleutherAI's lm-evaluation-harness (lm-eval) that measure what :mod:`palu.evaluate` does.

:func:`write_question_tasks` and :func:`write_tofu_tasks` write a folder of tasks. The other public functions are called
by lm-eval, through the folder's ``utils.py``; the figures' formulas are thus palu's own.

lm-eval is given texts and makes the tokens itself. So the texts here are those of palu's tokens, with all special
tokens in them, and each is tried: with ``add_bos_token=False`` and without ``--apply_chat_template`` its tokens are
palu's.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.files import DataError
from palu.data.matching import stands_in
from palu.data.tokenize import Example
from palu.evaluate import metrics
from palu.evaluate.questions import KINDS, QuestionRows
from palu.evaluate.rows import load_rows
from palu.evaluate.summarize import rouge_value
from palu.evaluate.tofu import COLUMNS, PREFIX, TofuData
from palu.models.generation import Generation, answer_ends, bound_on_answers, prompt_of
from palu.writable import private_folder, write_private

_UTILS = '''\
"""What these tasks call: palu's own functions, so that the figures are those of `palu eval`. Needs palu-unlearn."""

from pathlib import Path

from palu.evaluate import harness
from palu.evaluate.harness import answer_figures, closer_to_one, extraction_strength, probability  # noqa: F401
from palu.evaluate.harness import token_written, true_better, truth_ratio  # noqa: F401


def load(file, **_):
    return harness.load(Path(__file__).parent / file)
'''
# The rows are loaded by a function: lm-eval's own way would leave a copy of the secrets in the cache of `datasets`, and
# look for them from the folder that it is started in.
_TASK = """\
task: {name}
tag: {tag}
custom_dataset: !function utils.load
dataset_kwargs: {{file: {name}.jsonl}}
test_split: test
output_type: {output_type}
{more}doc_to_text: prompt
doc_to_target: target
target_delimiter: ""
num_fewshot: 0
process_results: !function utils.{process}
metric_list:
{metrics}metadata: {{version: 1}}
"""
_METRIC = "  - {{metric: {name}, aggregation: {aggregation}, higher_is_better: {higher}}}\n"


@dataclass(frozen=True)
class _Task:
    """A task: its rows have ``prompt`` and ``target``, and ``choices`` where it generates nothing."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    process: str  # the function that makes a row's figures
    metrics: Mapping[str, str]  # the figures, each with what makes one of all rows' (a function, or lm-eval's "mean")
    higher_is_better: bool
    generation: Mapping[str, Any] | None = None  # settings; None: the choices are scored

    def yaml(self, tag: str) -> str:
        more, kind = "doc_to_choice: choices\n", "multiple_choice"
        if self.generation is not None:
            more, kind = f"generation_kwargs: {json.dumps(self.generation)}\n", "generate_until"
        listed = ""
        for name, one in self.metrics.items():
            aggregation = one if one == "mean" else f"!function utils.{one}"
            listed += _METRIC.format(name=name, aggregation=aggregation, higher=str(self.higher_is_better).lower())
        names = {"name": self.name, "tag": tag, "process": self.process}
        return _TASK.format(**names, output_type=kind, more=more, metrics=listed)


def write_question_tasks(
    rows: QuestionRows, folder: str | os.PathLike[str], *, max_new_tokens: int | None = None
) -> list[str]:
    """Write the tasks of :func:`palu.evaluate.questions` to a folder; return what was left out and why.

    For each kind of rows there are ``palu_{kind}_answers`` (``told``, ``rouge_l``), ``palu_{kind}_probability`` and
    ``palu_{kind}_extraction`` (``extraction_strength``), all with the tag ``palu_questions``. The folder is created for
    its owner alone: it holds the rows.

    Args:
        max_new_tokens: bound on an answer's length; None: twice the longest true one, at most 200.

    Raises:
        DataError: a row's text does not give its tokens again.
    """
    tokenizer = rows.tokenizer
    greedy: dict[str, Any] = {"until": [], "do_sample": False, "repetition_penalty": 1.0}
    greedy["eos_token_id"] = sorted(answer_ends(rows.examples, tokenizer))
    bound = {"max_gen_toks": max_new_tokens or bound_on_answers(rows.examples)}
    tasks, left_out = [], []
    for kind in KINDS:
        pairs = [pair for pair in zip(rows.questions, rows.examples, strict=True) if pair[0].kind == kind]
        asked = [
            {
                "prompt": _checked_text(prompt_of(example).tolist(), tokenizer, one.where),
                "target": one.answer,
                "secrets": one.secrets,
            }
            for one, example in pairs
        ]
        scored = [_choices([example], tokenizer, one.where) for one, example in pairs]
        name, better = f"palu_{kind}", kind == "retain"
        figures = {"told": "mean"} if any(one["secrets"] for one in asked) else {}
        figures |= {"rouge_l": "mean"}
        tasks.append(_Task(f"{name}_answers", asked, "answer_figures", figures, better, greedy | bound))
        tasks.append(_Task(f"{name}_probability", scored, "probability", {"probability": "mean"}, better))
        figures = {"extraction_strength": "extraction_strength"}
        try:
            places = [place for one, example in pairs for place in _places(example, tokenizer, one.where)]
        except DataError as error:
            left_out.append(f"{name}_extraction: {error}")
        else:
            settings = greedy | {"max_gen_toks": 1}
            tasks.append(_Task(f"{name}_extraction", places, "token_written", figures, better, settings))
    _write(Path(folder), "palu_questions", tasks)
    return left_out


def write_tofu_tasks(
    data: TofuData,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a task for the truth ratio of each of TOFU's sets that has rows to a folder, as its owner's alone.

    They are ``palu_tofu_{set}``, with the tag ``palu_tofu``. Raises DataError where a row's text does not give its
    tokens again.
    """
    tasks = []
    for name in PREFIX:
        true = "paraphrased_answer" if "paraphrased_answer" in COLUMNS[name] else "answer"
        rows = []
        for number, row in enumerate(getattr(data, name)):
            where = f"{name} row {number}"
            answers = [row[true], *row["perturbed_answer"]]
            columns = [(where, {"question": row["question"], "answer": answer}) for answer in answers]
            rows.append(_choices(answer_examples(columns, tokenizer, chat_template_kwargs), tokenizer, where))
        aggregation = "closer_to_one" if name == "forget" else "true_better"
        tasks.append(_Task(f"palu_tofu_{name}", rows, "truth_ratio", {"truth_ratio": aggregation}, True))
    _write(Path(folder), "palu_tofu", tasks)


def _write(folder: Path, tag: str, tasks: Iterable[_Task]) -> None:
    private_folder(folder)
    write_private(folder / "utils.py", _UTILS)
    for task in tasks:
        if task.rows:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in task.rows)
            write_private(folder / f"{task.name}.jsonl", "".join(lines))
            write_private(folder / f"{task.name}.yaml", task.yaml(tag))


# --- texts that give palu's tokens ---
def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text of which these are the tokens, special ones included; None: none was found."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if tokenizer.encode(text, add_special_tokens=False) == ids:
        return text
    # Some tokenizers (Llama 2's) put a blank after each special token, and write it when they decode.
    special = "|".join(re.escape(one.content) for one in tokenizer.added_tokens_decoder.values() if one.special)
    text = re.sub(rf"({special}) ", r"\1", text)
    return text if tokenizer.encode(text, add_special_tokens=False) == ids else None


def _checked_text(ids: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if text := _text(ids, tokenizer):
        return text
    written = str(tokenizer.decode(ids[-10:]))
    problem = f"the tokenizer does not read the tokens before and in {written!r} back from their text"
    raise DataError(f"{where}: {problem}, and lm-eval is given texts; reword the row or leave it out")


def _choices(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    """Make a row of which lm-eval scores the answers, one for each example of the same question.

    lm-eval takes blanks and line breaks from the end of a prompt and scores them with the answer. They are therefore a
    choice of their own, whose log-likelihood is subtracted.

    Returns prompt, choices, and ``answers``: for each example the index of the choice to subtract (-1: none), that of
    the answer, and how many tokens the answer has, its end included.
    """
    whole = [(example.input_ids.tolist(), example.answer_start) for example in examples]
    texts = [_checked_text(ids, tokenizer, where) for ids, _ in whole]
    prompts = zip(*(ids[:start] for ids, start in whole), strict=False)
    common = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, prompts)))
    first = whole[0][0]
    for length in range(common, 0, -1):
        prompt = _text(first[:length], tokenizer)
        if prompt and prompt == prompt.rstrip() and all(text.startswith(prompt) for text in texts):
            break
    else:
        raise DataError(f"{where}: nothing but blanks stands before the answer; lm-eval needs a prompt")
    choices: list[str] = []
    answers = []
    for (ids, start), text in zip(whole, texts, strict=True):
        before = -1
        if start > length:
            choices.append(_checked_text(ids[:start], tokenizer, where)[len(prompt) :])
            before = len(choices) - 1
        choices.append(text[len(prompt) :])
        answers.append([before, len(choices) - 1, len(ids) - start])
    return {"prompt": prompt, "choices": choices, "target": answers[0][1], "answers": answers}


def _places(example: Example, tokenizer: PreTrainedTokenizerBase, where: str) -> list[dict[str, Any]]:
    """List the tokens of an answer but for its end, each as the target after all tokens before it."""
    ids, start = example.input_ids.tolist(), example.answer_start
    return [
        {
            "prompt": _checked_text(ids[:i], tokenizer, where),
            "target": str(tokenizer.decode(ids[i], skip_special_tokens=True)),
            "row": example.row,
            "place": i - start,
        }
        for i in range(start, len(ids) - 1)
    ]


# --- what lm-eval calls ---
def load(file: Path) -> dict[str, Any]:
    """Load a task's rows, as the split "test"."""
    from datasets import Dataset

    return {"test": Dataset.from_list(load_rows(file))}


def answer_figures(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Compute ``rouge_l`` of an answer, and ``told`` where there are secrets."""
    (text,) = results
    figures = {"rouge_l": rouge_value(Generation(text), row["target"], any_script=True)["rougeL_recall"]}
    if secrets := row["secrets"]:
        figures["told"] = sum(stands_in(secret, text) for secret in secrets) / len(secrets)
    return figures


def probability(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Compute exp(-NLL) of the true answer."""
    return {"probability": math.exp(-_losses(row, results)[0])}


def truth_ratio(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Compute a row's truth ratio."""
    true, *wrong = _losses(row, results)
    return {"truth_ratio": metrics.truth_ratio(true, wrong)}


def token_written(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, tuple[int, int, bool]]:
    """Tell of a token of an answer whether it was generated: (row, place, whether it was)."""
    (text,) = results
    return {"extraction_strength": (row["row"], row["place"], text == row["target"])}


def extraction_strength(tokens: Iterable[tuple[int, int, bool]]) -> float:
    """Compute the mean extraction strength of all rows from :func:`token_written`'s values."""
    by_row = groupby(sorted(tokens), key=lambda token: token[0])
    strengths = [metrics.extraction_strength([right for *_, right in of_row]) for _, of_row in by_row]
    return sum(strengths) / len(strengths)


closer_to_one, true_better = metrics.closer_to_one, metrics.true_better


def _losses(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> list[float]:
    """Compute each answer's mean NLL from the log-likelihoods of the choices."""
    sums = [log_likelihood for log_likelihood, _ in results]
    return [
        -(sums[answer] - (sums[before] if before >= 0 else 0.0)) / tokens for before, answer, tokens in row["answers"]
    ]
