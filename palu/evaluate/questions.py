"""Evaluate on one's own questions: paraphrases, and facts that were to be forgotten or to be kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.files import DataError
from palu.data.matching import stands_in
from palu.data.rows import conversation_of, iterate_rows, text_before
from palu.data.secret import marked_spans, marked_texts
from palu.data.tokenize import check_tokenizer
from palu.evaluate import metrics
from palu.evaluate.rows import Results
from palu.evaluate.scores import BATCH_TOKENS, check_model, describe_model, memorisation, token_scores
from palu.evaluate.summarize import OTHERS, complete, entry, rouge_value
from palu.hashing import json_digest
from palu.models.generation import bound_on_answers, eval_mode, generate_answers
from palu.models.lora import CausalLM, base_of, separate

KINDS = ("forget", "retain")
# The entries of each kind, and which of their values is the figure.
METRICS = {"told": "score", "Q_A_Prob": "prob", "Q_A_ROUGE": "rougeL_recall", "extraction_strength": "score"}


@dataclass(frozen=True)
class Question:
    """A question with its true answer."""

    where: str  # its row's name in errors
    kind: str  # of KINDS
    question: str  # the last message before the answer
    answer: str
    marked: list[str]  # the texts that ``secret`` or ``spans`` mark
    secrets: list[str]  # of these spans those that the messages before the answer do not tell already


class QuestionRows:
    """Rows of questions with their true answers, checked and tokenised.

    Args:
        rows: rows of text, as :func:`palu.data.load_forget` takes them; ``secret`` or ``spans`` may be missing. The
            column ``kind`` says "forget" or "retain"; where it is missing, a row with a secret is of the first kind and
            one without of the second.
        tokenizer: of all models, a fast one.

    Raises:
        DataError: a row cannot be used (it is named), or there is none.
        ValueError: chat_template_kwargs are not valid.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer, self.chat_template_kwargs = tokenizer, chat_template_kwargs
        self.questions: list[Question] = []
        read: list[tuple[str, Mapping[str, Any]]] = []
        for _, where, columns in iterate_rows(rows, "evaluation"):
            if "input_ids" in columns:
                raise DataError(f"{where}: answers are compared as texts, and this row is tokenised; give it as text")
            conversation, _, answer = conversation_of(columns, where)
            marks = any(columns.get(name) is not None for name in ("secret", "spans"))
            spans = marked_spans(columns, answer, where) if marks else []
            marked = marked_texts(columns, answer, where) if marks else []
            kind = columns.get("kind") or ("forget" if spans else "retain")
            if kind not in KINDS:
                raise DataError(f"{where}: column 'kind' is {kind!r}; give {' or '.join(KINDS)}, or leave it out")
            secrets = dict.fromkeys(answer[start:end] for start, end in spans)
            untold = [secret for secret in secrets if not stands_in(secret, text_before(conversation))]
            self.questions.append(Question(where, kind, conversation[-2]["content"], answer, marked, untold))
            read.append((where, columns))
        if not read:
            raise DataError("evaluation set is empty; give at least one row")
        self.examples = answer_examples(read, tokenizer, chat_template_kwargs)


def questions(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Any,
    *,
    original: CausalLM | None = None,
    retain_model: CausalLM | None = None,
    max_new_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Evaluate a model on questions of one's own, beside the model before unlearning and one that never saw the facts.

    Args:
        rows: see :class:`QuestionRows`.
        original: the model before unlearning; given as the base of a ``PeftModel``, it runs without the adapter.
        retain_model: a model that never saw what was to be forgotten.
        max_new_tokens: bound on an answer's length; None: twice the longest true one, at most 200.

    Returns:
        For each kind of rows ("forget", "retain") the entries ``{kind}_told`` (share of the row's secrets that are in
        the greedy answer, :func:`palu.data.matching.stands_in`), ``{kind}_Q_A_Prob`` (exp(-NLL) of the true answer),
        ``{kind}_Q_A_ROUGE`` (ROUGE-L recall of the greedy answer) and ``{kind}_extraction_strength``. Each has
        ``value_by_index``, by the row's number, and ``agg_value``, the mean. Under ``original`` and ``retain_model``
        are the same entries of these models; under ``palu`` stand the rows and what was evaluated how.

    Other arguments, and errors, are those of :func:`palu.evaluate.tofu` and :class:`QuestionRows`.
    """
    given = separate(model=model, original=original, retain_model=retain_model)
    loaders = {name: partial(given.__getitem__, name) for name in given}
    asked = QuestionRows(rows, tokenizer, chat_template_kwargs)
    settings: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    return evaluate_models(loaders, asked, max_new_tokens=max_new_tokens, **settings)


def evaluate_models(
    loaders: Mapping[str, Callable[[], CausalLM]],
    rows: QuestionRows,
    *,
    max_new_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> Results:
    """Evaluate models that are loaded one at a time, "model" and perhaps OTHERS; the rest is :func:`questions`."""
    metrics.require_packages()
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: it must be at least 1")
    tokens = max_new_tokens or bound_on_answers(rows.examples)
    started = time.perf_counter()
    found: dict[str, Results] = {}
    metadata: dict[str, Any] = {}
    for name, load in loaders.items():
        model = load()
        check_model(model, rows.tokenizer, rows.examples, [one.where for one in rows.questions], name=name)
        if name == "model":
            metadata = describe_model(base_of(model), rows.tokenizer, rows.chat_template_kwargs)
        found[name] = _evaluate(model, rows, tokens, batch_tokens, title=name, progress=progress)
        del model
    asked = [asdict(one) for one in rows.questions]
    hashed = [[one[name] for one in asked] for name in ("question", "answer", "marked", "kind")]
    about = {
        "benchmark": "questions",
        "examples": {kind: [one["kind"] for one in asked].count(kind) for kind in KINDS},
        "rows": [{name: one[name] for name in ("kind", "question", "marked", "secrets")} for one in asked],
        "data_sha256": json_digest(hashed)[:16],
        "max_new_tokens": tokens,
        **metadata,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return found.pop("model") | found | {"palu": about}


def question_metrics(rows: QuestionRows) -> Callable[[CausalLM], dict[str, float]]:
    """Return a function for ``palu.unlearn(evaluate=...)``: of a model it gives the means of :func:`questions` by name.

    Raises ImportError where a package of the metrics is missing.
    """
    metrics.require_packages()

    def evaluate(model: CausalLM) -> dict[str, float]:
        results = evaluate_models({"model": lambda: model}, rows, progress=False)
        means = {name: one["agg_value"] for name, one in results.items() if name != "palu"}
        return {name: value for name, value in means.items() if value is not None}

    return evaluate


def _evaluate(
    model: CausalLM, rows: QuestionRows, max_new_tokens: int, batch_tokens: int, *, title: str, progress: bool
) -> Results:
    """Evaluate one model: the entries of all kinds that have rows."""
    base = base_of(model)
    with tqdm(total=2 * len(rows.examples), desc=title, disable=not progress) as bar, eval_mode(base):
        settings: dict[str, Any] = {"batch_tokens": batch_tokens, "bar": bar}
        scores = token_scores(base, rows.examples, [one.where for one in rows.questions], **settings)
        answers = generate_answers(base, rows.tokenizer, rows.examples, max_new_tokens=max_new_tokens, **settings)
    values: list[dict[str, dict[str, Any]]] = []
    for asked, score, answer in zip(rows.questions, scores, answers, strict=True):
        told = [secret for secret in asked.secrets if stands_in(secret, answer.text)]
        values.append(
            {
                "told": {"score": len(told) / len(asked.secrets) if asked.secrets else None, "told": told},
                "Q_A_Prob": {"prob": score.probability, "avg_loss": score.nll},
                "Q_A_ROUGE": rouge_value(answer, asked.answer, any_script=True),
                "extraction_strength": {"score": memorisation(score)["extraction_strength"]},
            }
        )
    results: Results = {}
    for kind in KINDS:
        chosen = [i for i, one in enumerate(rows.questions) if one.kind == kind]
        for metric in METRICS if chosen else ():
            results[f"{kind}_{metric}"] = entry((values[i][metric] for i in chosen), chosen)
    reasons = {f"{kind}_told": "no row has a secret that its question does not tell" for kind in KINDS}
    return complete(results, None, reasons)


def table_of(results: Results) -> dict[str, Any]:
    """Make a table of the results of :func:`questions`.

    Returns:
        models: the names of "model" and the OTHERS that were evaluated. rows: {number, kind, question, cells} each,
        means: {kind, count, cells} of each kind that has rows; a cell for each of METRICS has the figures of all
        models, such as "0.00 / 1.00".
    """
    names = [name for name in OTHERS if name in results]
    models = [results, *(results[name] for name in names)]

    def cells(kind: str, row: str | None) -> list[str]:
        found = []
        for metric, figure in METRICS.items():
            entries = [of_model[f"{kind}_{metric}"] for of_model in models]
            values = [one["agg_value"] if row is None else one["value_by_index"][row][figure] for one in entries]
            found.append(" / ".join("-" if value is None else f"{value:.2f}" for value in values))
        return found

    about = results["palu"]
    return {
        "models": ["model", *(name.replace("_", " ") for name in names)],
        "rows": [
            {"number": i, "kind": row["kind"], "question": row["question"], "cells": cells(row["kind"], str(i))}
            for i, row in enumerate(about["rows"])
        ],
        "means": [
            {"kind": kind, "count": about["examples"][kind], "cells": cells(kind, None)}
            for kind in KINDS
            if about["examples"][kind]
        ],
    }
