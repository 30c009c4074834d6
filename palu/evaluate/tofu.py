"""The TOFU benchmark (arXiv 2401.06121), with memorisation and membership metrics of open-unlearning."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.files import DataError
from palu.evaluate import metrics
from palu.evaluate.language import LANGUAGE, WordList, add_language_figures
from palu.evaluate.rows import Results, Row, hub_rows, load_rows, require
from palu.evaluate.scores import BATCH_TOKENS, TokenScores, check_model, describe_model, memorisation, token_scores
from palu.evaluate.summarize import (
    NO_RETAIN,
    NO_RETAIN_AUC,
    NORMALISED,
    TRUTH_RATIOS,
    Source,
    complete,
    entry,
    load_retain_results,
    membership_entry,
    normalised_probabilities,
    rouge_value,
    truth_ratios,
)
from palu.hashing import json_digest
from palu.models.generation import eval_mode, generate_answers
from palu.models.lora import CausalLM, base_of

NAME = "locuslab/TOFU"
SPLITS = ("forget01", "forget05", "forget10")
# The sets, and how the names of their entries begin.
PREFIX = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
COLUMNS = {
    "forget": ("question", "answer", "paraphrased_answer", "perturbed_answer"),
    "retain": ("question", "answer", "paraphrased_answer", "perturbed_answer"),
    "real_authors": ("question", "answer", "perturbed_answer"),
    "world_facts": ("question", "answer", "perturbed_answer"),
    "holdout": ("question", "answer"),
}
_FIX = "fill it in, or use TOFU's perturbed sets, which have it"

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus")
_SUFFIX = {"answer": "Prob", "paraphrased_answer": "PARA_Prob", "perturbed_answer": "PERT_Prob"}
_WRITTEN = ("forget", "retain")  # whose generations the language figures are of

T = TypeVar("T")
Key: TypeAlias = tuple[str, str]  # of a set and one of its columns of answers


@dataclass(frozen=True)
class TofuData:
    """TOFU's sets, each a list of rows.

    Every row has ``question``, ``answer`` and ``perturbed_answer`` (a list of wrong answers), in ``forget`` and
    ``retain`` also ``paraphrased_answer``. Rows of ``holdout``, which no model has seen, need the first two only.
    Any set but ``forget`` may be empty; what depends on it is then null.
    """

    forget: list[dict[str, Any]]
    retain: list[dict[str, Any]] = field(default_factory=list)
    real_authors: list[dict[str, Any]] = field(default_factory=list)
    world_facts: list[dict[str, Any]] = field(default_factory=list)
    holdout: list[dict[str, Any]] = field(default_factory=list)


def load_tofu(forget: str = "forget05", data: str | os.PathLike[str] | TofuData | None = None) -> TofuData:
    """Load TOFU's sets for one forget split.

    Args:
        forget: ``"forget01"``, ``"forget05"`` or ``"forget10"``, or another ``forget*.jsonl`` of the folder.
        data: a folder with ``{forget}.jsonl``, ``retain_perturbed.jsonl``, ``real_authors.jsonl``,
            ``world_facts.jsonl`` and perhaps ``holdout*.jsonl`` of the same number; None: ``locuslab/TOFU`` by name.

    Raises:
        ValueError: there is no such split.
        DataError: a row lacks a column, or the forget set is empty.
        FileNotFoundError: a file is missing.
    """
    holdout = forget.replace("forget", "holdout")
    if isinstance(data, TofuData):
        loaded = data
    elif data is None:
        if forget not in SPLITS:
            raise ValueError(f"there is no forget split {forget!r}; {NAME} has {', '.join(SPLITS)}")
        configs = (*(f"{name}_perturbed" for name in (forget, "retain", "real_authors", "world_facts")), holdout)
        loaded = TofuData(*(hub_rows(NAME, config, "train") for config in configs))
    else:
        folder = Path(data)
        known = sorted(path.stem for path in folder.glob("forget*.jsonl"))
        if not known:
            raise FileNotFoundError(f"{folder} holds no forget*.jsonl; give TOFU's folder, or None to load it by name")
        if forget not in known:
            raise ValueError(f"there is no forget split {forget!r}; {folder} has {', '.join(known)}")
        files = [forget, "retain_perturbed", "real_authors", "world_facts"]
        files += [holdout] if (folder / f"{holdout}.jsonl").exists() else []
        loaded = TofuData(*(load_rows(folder / f"{name}.jsonl") for name in files))
    if not loaded.forget:
        raise DataError("forget set is empty; give at least one row")
    for name, columns in COLUMNS.items():
        require(getattr(loaded, name), name, columns, _FIX)
    return loaded


def tofu(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    forget: str = "forget05",
    data: str | os.PathLike[str] | TofuData | None = None,
    *,
    retain_results: Source | None = None,
    language: str | None = LANGUAGE,
    max_new_tokens: int = 200,
    batch_tokens: int = BATCH_TOKENS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Evaluate a model on TOFU.

    Every answer is scored teacher-forced in packed passes without padding, so no number depends on the batch size but
    for rounding; generations are greedy. Formulas and papers: :mod:`palu.evaluate.metrics`.

    Args:
        model: a causal language model with a linear head, or a ``peft.PeftModel`` of one with LoRA, on its device;
            afterwards as it was.
        tokenizer: its fast tokenizer; a chat template is used where there is one (see :mod:`palu.data`).
        forget, data: see :func:`load_tofu`. With TofuData given, ``forget`` is not used.
        retain_results: this function's results, or open-unlearning's log, for the model trained without the forget
            set (dict, or path to .json or .json.gz). Without them forget quality is null.
        language: of the word list for the share of broken words, such as "de" (:mod:`palu.evaluate.language`); None
            leaves it out.
        batch_tokens: tokens per forward pass; decoding takes eight times as many.
        chat_template_kwargs: what the chat template is given beside the messages.

    Returns:
        Metric -> ``{"agg_value", "value_by_index": {"0": {...}, ...}}`` as in open-unlearning's logs, ready for JSON;
        where ``agg_value`` is None, ``reason`` tells why. ``forget_quality_ks`` is the distance D behind the p-value
        ``forget_quality``. The language figures (``forget_no_word``, ...) hold the retain model's beside them, as
        ``retain_model``. ``palu`` holds benchmark, split, sizes, model, seconds and versions.

    Raises:
        ValueError: an unknown split or language; retain results that do not fit; a tokenizer that does not;
            log-probabilities that are not finite.
        DataError: a row without a needed column.
        TypeError: a model without a linear head.
    """
    metrics.require_packages()
    started = time.perf_counter()
    words = None if language is None else WordList(language)
    sets: Mapping[str, Sequence[Row]] = vars(load_tofu(forget, data))
    pairs = _pairs(sets)
    examples = {key: answer_examples(of_key, tokenizer, chat_template_kwargs) for key, of_key in pairs.items()}
    scored = list(chain.from_iterable(examples.values()))
    names = [where for of_key in pairs.values() for where, _ in of_key]
    check_model(model, tokenizer, scored, names)
    model = base_of(model)

    metadata = {
        "benchmark": "TOFU",
        "split": None if isinstance(data, TofuData) else forget,
        "examples": {name: len(of_set) for name, of_set in sets.items()},
        "data_sha256": json_digest([[row[column] for column in COLUMNS["forget"]] for row in sets["forget"]])[:16],
        "max_new_tokens": max_new_tokens,
        "word_list": None if words is None else words.source,
        **describe_model(model, tokenizer, chat_template_kwargs),
    }
    compared = {"forget_truth_ratio": "forget", "mia_min_k of the holdout set": "holdout"}
    indices = {one: set(map(str, range(len(sets[name])))) for one, name in compared.items()}
    retain = load_retain_results(retain_results, metadata, indices)

    answered = {name: examples[name, "answer"] for name in PREFIX}
    asked = list(chain.from_iterable(answered.values()))
    # All columns together, so that texts of one length share a batch.
    with tqdm(total=len(scored) + len(asked), desc="TOFU", disable=not progress) as bar, eval_mode(model):
        settings: dict[str, Any] = {"batch_tokens": batch_tokens, "bar": bar}
        scores = _parted(token_scores(model, scored, names, **settings), examples)
        written = generate_answers(model, tokenizer, asked, max_new_tokens=max_new_tokens, **settings)

    results = _of_answers(sets, scores)
    for name, generations in _parted(written, answered).items():
        each = zip(generations, sets[name], strict=True)
        results[f"{PREFIX[name]}_Q_A_ROUGE"] = entry(rouge_value(one, row["answer"]) for one, row in each)
    in_words = {f"{name}_Q_A_ROUGE": [(row["question"], row["answer"]) for row in sets[name]] for name in _WRITTEN}
    reasons = add_language_figures(results, retain, in_words, words) | _reasons(sets, results)
    return complete(results, retain, reasons) | {
        "palu": metadata | {"seconds": round(time.perf_counter() - started, 2)}
    }


def _pairs(sets: Mapping[str, Sequence[Row]]) -> dict[Key, list[tuple[str, Row]]]:
    """List every question with each answer to score, and how to call it in an error."""
    return {
        (name, column): [
            (f"{name} row {number} ({column})", {"question": row["question"], "answer": answer})
            for number, row in enumerate(sets[name])
            for answer in ([row[column]] if isinstance(row[column], str) else row[column])
        ]
        for name, columns in COLUMNS.items()
        for column in columns[1:]
    }


def _parted(values: Iterable[T], parts: Mapping[Any, Sequence[Any]]) -> dict[Any, list[T]]:
    """Part what was computed for all parts together."""
    each = iter(values)
    return {key: list(islice(each, len(part))) for key, part in parts.items()}


def _of_answers(sets: Mapping[str, Sequence[Row]], scores: Mapping[Key, list[TokenScores]]) -> Results:
    """Make the entries of what was scored: probabilities, truth ratios, memorisation and membership."""
    results: Results = {}
    for (name, column), of_column in scores.items():
        values: list[dict[str, Any]] = [{"prob": score.probability, "avg_loss": score.nll} for score in of_column]
        if column == "perturbed_answer":
            wrong = iter(values)
            groups = [list(islice(wrong, len(row[column]))) for row in sets[name]]
            values = [{key: [one[key] for one in group] for key in ("prob", "avg_loss")} for group in groups]
        if name in PREFIX:
            results[f"{PREFIX[name]}_Q_A_{_SUFFIX[column]}"] = entry(values)
    for name in TRUTH_RATIOS:
        results[name] = entry({"score": ratio} for ratio in truth_ratios(results, name).values())
    for name in NORMALISED:
        results[name] = entry({"prob": p} for p in normalised_probabilities(results, name).values())
    forget, holdout = (
        [
            {"loss": score.nll, "zlib": metrics.zlib_score(score.nll, row["answer"]), **memorisation(score)}
            for score, row in zip(scores[name, "answer"], sets[name], strict=True)
        ]
        for name in ("forget", "holdout")
    )
    for name in ("exact_memorization", "extraction_strength"):
        results[name] = entry({"score": one[name]} for one in forget)
    for attack in ATTACKS:
        results[f"mia_{attack}"] = membership_entry(*([one[attack] for one in texts] for texts in (forget, holdout)))
    return results | {"privleak": {}}


def _reasons(sets: Mapping[str, Sequence[Row]], results: Results) -> dict[str, str]:
    """Say for each metric why it is null, if it is."""
    reasons = {"forget_quality": NO_RETAIN, "forget_quality_ks": NO_RETAIN, "privleak": NO_RETAIN_AUC}
    for name, prefix in PREFIX.items():
        if not sets[name]:
            empty = ["model_utility", *(one for one in results if one.startswith(f"{prefix}_"))]
            reasons |= dict.fromkeys(empty, f"there are no {name} rows")
    if not sets["holdout"]:
        reasons |= dict.fromkeys(("privleak", *(f"mia_{name}" for name in ATTACKS)), "no holdout rows were given")
    return reasons
