"""The TOFU benchmark (arXiv 2401.06121), with the memorisation and membership metrics of open-unlearning."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeAlias

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.tokenize import Example
from palu.evaluate import metrics
from palu.evaluate.fluency import LABEL, FluencyClassifier
from palu.evaluate.language import FIGURES, LANGUAGE, LanguageFigures, WordList
from palu.evaluate.rows import Results, Row, require
from palu.evaluate.scores import (
    BATCH_TOKENS,
    TokenScores,
    check_model,
    fingerprint,
    gradient_norms,
    min_k_scores,
    token_scores,
)
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
from palu.evaluate.tofu_data import COLUMNS, FIX, PREFIX, TofuData, load_tofu
from palu.hashing import json_digest
from palu.models.generation import Generation, eval_mode, generate_answers
from palu.models.lora import CausalLM, base_of, separate

ATTACKS = ("loss", "zlib", "reference", "gradnorm", "min_k", "min_k_plus_plus")
_SUFFIX = {"answer": "Prob", "paraphrased_answer": "PARA_Prob", "perturbed_answer": "PERT_Prob"}
# What the attacks tell apart: an entry of the forget set, one of texts that the model has not seen.
_MEMBERS = {"forget": "forget_Q_A_Prob", "holdout": "holdout"}
_WRITTEN = ("forget", "retain")  # the sets whose generations the language figures are of


def tofu(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    forget: str = "forget05",
    data: str | os.PathLike[str] | TofuData | None = None,
    *,
    retain_results: Source | None = None,
    holdout: Sequence[Row] | None = None,
    reference_model: CausalLM | None = None,
    fluency_model: Any = None,
    fluency_label: str = LABEL,
    language: str | None = LANGUAGE,
    reference_results: Source | None = None,
    mia: Sequence[str] = ATTACKS,
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
        holdout: question-answer rows that neither model has seen, in place of the data's own. Without any, membership
            inference and PrivLeak are null.
        reference_model: for the reference attack, with the same tokenizer.
        fluency_model: name, path or text-classification pipeline; adds ``forget_fluency``, the share of forget
            generations that it labels ``fluency_label``.
        language: of the word list that the share of broken words is measured with, such as "de"; None leaves
            it out. What counts as a word: :mod:`palu.evaluate.language`.
        reference_results: this function's results for the model before unlearning; what it writes on other rows then
            counts as words, too.
        mia: which attacks to run; gradnorm costs a backward pass for each example.
        max_new_tokens: bound on a generation.
        batch_tokens: tokens per forward pass; decoding takes eight times as many.
        chat_template_kwargs: what the chat template is given beside the messages.
        progress: show a progress bar.

    Returns:
        Metric -> ``{"agg_value", "value_by_index": {"0": {...}, ...}}`` as in open-unlearning's logs, ready for JSON;
        where ``agg_value`` is None, ``reason`` tells why. ``forget_quality_ks`` is the distance D behind the p-value
        ``forget_quality``. The figures of :mod:`palu.evaluate.language` (``forget_no_word``, ...) hold the retain
        model's beside them, as ``retain_model``. ``palu`` holds benchmark, split, sizes, model, seconds and versions.

    Raises:
        ValueError: an unknown split, attack or language; retain or reference results that do not fit; a tokenizer that
            does not; log-probabilities that are not finite.
        DataError: a row without a needed column.
        TypeError: a model without a linear head.
    """
    metrics.require_packages()
    started = time.perf_counter()
    if unknown := [name for name in mia if name not in ATTACKS]:
        raise ValueError(f"there is no attack {unknown[0]!r}; mia may hold {', '.join(ATTACKS)}")
    words = None if language is None else WordList(language)
    rows = load_tofu(forget, data)
    if holdout is not None:
        require(holdout, "holdout", COLUMNS["holdout"], FIX)
        rows = replace(rows, holdout=[dict(row) for row in holdout])
    sets: _Sets = {name: getattr(rows, name) for name in COLUMNS}
    answers = {name: _tokenise(texts, tokenizer, chat_template_kwargs) for name, texts in _texts(sets).items()}
    examples = [example for texts in answers.values() for example in texts.examples]
    given = separate(model=model, reference_model=reference_model)
    for name, candidate in given.items():
        check_model(candidate, tokenizer, examples, name)
    model, reference_model = base_of(given["model"]), base_of(given.get("reference_model"))

    metadata = {
        "benchmark": "TOFU",
        "split": None if isinstance(data, TofuData) else forget,
        "examples": {name: len(of_set) for name, of_set in sets.items()},
        "data_sha256": json_digest([[row[column] for column in COLUMNS["forget"]] for row in rows.forget])[:16],
        "max_new_tokens": max_new_tokens,
        "word_list": None if words is None else words.source,
        **fingerprint(model, tokenizer, chat_template_kwargs),
    }
    compared = {"forget_truth_ratio": rows.forget}
    if "min_k" in mia:
        compared["mia_min_k of the holdout set"] = rows.holdout
    indices = {name: {str(i) for i in range(len(of_set))} for name, of_set in compared.items()}
    retain = load_retain_results(retain_results, metadata, indices)
    language_figures = LanguageFigures(
        words,
        {_rouge_name(name): [(row["question"], row["answer"]) for row in sets[name]] for name in _WRITTEN},
        retain=retain,
        reference=reference_results,
    )
    classifier = None if fluency_model is None else FluencyClassifier(fluency_model, fluency_label, model.device)

    attacks = [name for name in mia if rows.holdout and (name != "reference" or reference_model is not None)]
    members = {name: answers[name] for name in _MEMBERS.values()} if attacks else {}
    asked = {name: answers[f"{prefix}_Q_A_Prob"] for name, prefix in PREFIX.items()}
    work = _count(answers) + _count(asked) + len(rows.forget) * (classifier is not None)
    work += _count(members) * len({"reference", "gradnorm"}.intersection(attacks))

    with tqdm(total=work, desc="TOFU", disable=not progress) as bar, eval_mode(model):
        scores = _score(model, answers, batch_tokens, bar)
        generations = _generate(model, tokenizer, asked, max_new_tokens, batch_tokens, bar)
        results = _of_answers(sets, scores) | _of_generations(sets, generations)
        found: dict[str, list[list[float]]] = {
            name: [_membership(name, scores[m], answers[m].texts) for m in members]
            for name in attacks
            if name not in ("reference", "gradnorm")
        }
        if "gradnorm" in attacks:
            found["gradnorm"] = [gradient_norms(model, of_set.examples, bar=bar) for of_set in members.values()]
        if "reference" in attacks and reference_model is not None:
            with eval_mode(reference_model):
                theirs = _score(reference_model, members, batch_tokens, bar)
            found["reference"] = [
                [ours.nll - other.nll for ours, other in zip(scores[m], theirs[m], strict=True)] for m in members
            ]
        verdicts = [] if classifier is None else classifier([one.text for one in generations["forget"]], bar=bar)

    results |= {f"mia_{name}": membership_entry(*found.get(name, ([], []))) for name in mia}
    results |= {"privleak": {}, "forget_fluency": entry(verdicts)}
    for name in _WRITTEN:
        results |= language_figures.entries(_rouge_name(name), generations[name])
    results["palu"] = metadata | {"seconds": round(time.perf_counter() - started, 2)}
    return complete(results, retain, language_figures.reasons() | _reasons(sets, mia))


# --- texts ---
_Sets: TypeAlias = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class _Answers:
    """The answers of one entry, tokenised with their questions."""

    names: list[str]  # for errors
    texts: list[str]
    examples: Sequence[Example]


def _texts(sets: _Sets) -> dict[str, list[tuple[str, str, str]]]:
    """List every answer to score, by entry: (its name in errors, question, answer)."""
    texts: dict[str, list[tuple[str, str, str]]] = {}
    for name, prefix in PREFIX.items():
        for column in COLUMNS[name][1:]:
            texts[f"{prefix}_Q_A_{_SUFFIX[column]}"] = [
                (f"{name} row {number} ({column})", row["question"], answer)
                for number, row in enumerate(sets[name])
                for answer in ([row[column]] if isinstance(row[column], str) else row[column])
            ]
    texts["holdout"] = [
        (f"holdout row {number}", row["question"], row["answer"]) for number, row in enumerate(sets["holdout"])
    ]
    return texts


def _tokenise(
    texts: Sequence[tuple[str, str, str]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> _Answers:
    rows = ((name, {"question": question, "answer": answer}) for name, question, answer in texts)
    examples = answer_examples(rows, tokenizer, chat_template_kwargs)
    return _Answers([name for name, _, _ in texts], [answer for _, _, answer in texts], examples)


def _count(answers: Mapping[str, _Answers]) -> int:
    return sum(len(of_entry.examples) for of_entry in answers.values())


# --- the model's part ---
def _score(
    model: PreTrainedModel, answers: Mapping[str, _Answers], batch_tokens: int, bar: tqdm
) -> dict[str, list[TokenScores]]:
    """Score the answers of all entries together, so that texts of one length share a batch."""
    examples = [example for of_entry in answers.values() for example in of_entry.examples]
    names = [name for of_entry in answers.values() for name in of_entry.names]
    scores = iter(token_scores(model, examples, names, batch_tokens=batch_tokens, bar=bar))
    return {name: list(islice(scores, len(of_entry.examples))) for name, of_entry in answers.items()}


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[str, _Answers],
    max_new_tokens: int,
    batch_tokens: int,
    bar: tqdm,
) -> dict[str, list[Generation]]:
    """Generate the model's answers to the questions of each set."""
    examples = [example for of_set in asked.values() for example in of_set.examples]
    found = iter(
        generate_answers(model, tokenizer, examples, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, bar=bar)
    )
    return {
        name: [replace(one, text=one.text.strip()) for one in islice(found, len(of_set.examples))]
        for name, of_set in asked.items()
    }


# --- values ---
def _of_answers(sets: _Sets, scores: Mapping[str, list[TokenScores]]) -> Results:
    """Compute probabilities, truth ratios, exact memorisation and extraction strength of each example."""
    results: Results = {}
    for name in scores:
        if name.endswith("_Prob"):
            each = [{"prob": score.probability, "avg_loss": score.nll} for score in scores[name]]
            if name.endswith("_PERT_Prob"):
                of_set = next(sets[s] for s, prefix in PREFIX.items() if name.startswith(f"{prefix}_"))
                wrong = iter(each)
                groups = [list(islice(wrong, len(row["perturbed_answer"]))) for row in of_set]
                results[name] = entry(
                    {key: [one[key] for one in group] for key in ("prob", "avg_loss")} for group in groups
                )
            else:
                results[name] = entry(each)
    for name in TRUTH_RATIOS:
        results[name] = entry({"score": ratio} for ratio in truth_ratios(results, name).values())
    for name in NORMALISED:
        results[name] = entry({"prob": p} for p in normalised_probabilities(results, name).values())
    # The end of sequence is no part of what was memorised.
    correct = [score.correct[:-1].numpy() for score in scores["forget_Q_A_Prob"]]
    results["exact_memorization"] = entry({"score": metrics.exact_memorization(one)} for one in correct)
    results["extraction_strength"] = entry({"score": metrics.extraction_strength(one)} for one in correct)
    return results


def _rouge_name(name: str) -> str:
    """Name the entry that holds the generations of a set."""
    return f"{PREFIX[name]}_Q_A_ROUGE"


def _of_generations(sets: _Sets, generations: Mapping[str, list[Generation]]) -> Results:
    return {
        _rouge_name(name): entry(rouge_value(one, row["answer"]) for row, one in zip(sets[name], of_set, strict=True))
        for name, of_set in generations.items()
    }


def _membership(attack: str, scores: Sequence[TokenScores], texts: Sequence[str]) -> list[float]:
    """Compute an attack's score of each text, higher for a text that the model has not seen."""
    if attack == "loss":
        return [score.nll for score in scores]
    if attack == "zlib":
        return [metrics.zlib_score(score.nll, text) for score, text in zip(scores, texts, strict=True)]
    return [min_k_scores(score)[attack] for score in scores]


def _reasons(sets: _Sets, mia: Sequence[str]) -> dict[str, str]:
    """Say for each metric why it is null, if it is."""
    reasons = {
        "forget_quality": NO_RETAIN,
        "forget_quality_ks": NO_RETAIN,
        "forget_fluency": "no fluency_model was given",
        "privleak": NO_RETAIN_AUC,
    }
    for name, prefix in PREFIX.items():
        if not sets[name]:
            entries = (
                "Q_A_Prob",
                "Q_A_PARA_Prob",
                "Q_A_PERT_Prob",
                "Q_A_Prob_normalised",
                "Q_A_ROUGE",
                "Truth_Ratio",
                *FIGURES,
            )
            reasons |= {f"{prefix}_{suffix}": f"there are no {name} rows" for suffix in entries}
            reasons["model_utility"] = f"there are no {name} rows"
    for name in ATTACKS:
        reasons[f"mia_{name}"] = "no holdout rows were given" if not sets["holdout"] else "no reference_model was given"
    if "min_k" not in mia:
        reasons["privleak"] = "mia does not hold min_k"
    elif not sets["holdout"]:
        reasons["privleak"] = "no holdout rows were given"
    return reasons
