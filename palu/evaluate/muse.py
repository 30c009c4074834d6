"""The MUSE benchmark (arXiv 2407.06460): MUSE-News and MUSE-Books, two corpora in one form."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.files import DataError
from palu.data.rows import after_examples
from palu.data.tokenize import Example
from palu.evaluate import metrics
from palu.evaluate.language import LANGUAGE, WordList, add_language_figures
from palu.evaluate.rows import Results, Row, hub_rows, load_rows, require
from palu.evaluate.scores import BATCH_TOKENS, check_model, describe_model, memorisation, raw_examples, token_scores
from palu.evaluate.summarize import (
    NO_RETAIN_AUC,
    SIDES,
    Source,
    complete,
    entry,
    load_retain_results,
    membership_entry,
    rouge_value,
)
from palu.hashing import json_digest
from palu.models.checks import check_causal
from palu.models.generation import Generation, answer_ends, eval_mode, generate, generate_answers
from palu.models.lora import CausalLM, base_of
from palu.models.positions import fit_max_length

CORPORA = ("news", "books")
_SETS = {
    "verbmem_forget": ("prompt", "gt"),
    "knowmem_forget_qa": ("question", "answer"),
    "knowmem_forget_qa_icl": ("question", "answer"),
    "knowmem_retain_qa": ("question", "answer"),
    "knowmem_retain_qa_icl": ("question", "answer"),
    "privleak_forget": ("text",),
    "privleak_holdout": ("text",),
}
_KNOWMEM = ("knowmem_forget_qa", "knowmem_retain_qa")
# The sets that the model continues or answers, and the entries of what it writes.
_WRITTEN = {
    "verbmem_forget": "forget_verbmem_ROUGE",
    "knowmem_forget_qa": "forget_knowmem_ROUGE",
    "knowmem_retain_qa": "retain_knowmem_ROUGE",
}
_FIX = "use the sets of MUSE"


def load_muse(
    corpus: str = "news", data: str | os.PathLike[str] | Mapping[str, Sequence[Any]] | None = None
) -> dict[str, list[Row]]:
    """Load MUSE's evaluation sets for one corpus.

    Args:
        corpus: ``"news"`` or ``"books"``.
        data: a folder with ``{set}.json`` for the sets verbmem_forget (rows of prompt and gt), knowmem_forget_qa,
            knowmem_retain_qa, each with its _icl (question and answer), privleak_forget and privleak_holdout (texts);
            the same in memory; or None: ``muse-bench/MUSE-News`` or ``muse-bench/MUSE-Books`` by name.

    Raises:
        ValueError: there is no such corpus.
        DataError: a set is missing or empty, or a row lacks a column.
        FileNotFoundError: a file is missing.
    """
    if corpus not in CORPORA:
        raise ValueError(f"there is no corpus {corpus!r}; MUSE has {', '.join(CORPORA)}")
    sets: dict[str, list[Row]] = {}
    for name, columns in _SETS.items():
        if data is None:
            config, split = name.split("_", 1)
            rows: Sequence[Any] = hub_rows(f"muse-bench/{_title(corpus)}", config, split)
        elif isinstance(data, Mapping):
            rows = data.get(name, ())
        else:
            rows = load_rows(Path(data) / f"{name}.json")
        if not rows:
            raise DataError(f"{name} set is missing or empty; {_FIX}")
        sets[name] = [{"text": row} if isinstance(row, str) else row for row in rows]
        require(sets[name], name, columns, _FIX)
    return sets


def muse(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str = "news",
    data: str | os.PathLike[str] | Mapping[str, Sequence[Any]] | None = None,
    *,
    retain_results: Source | None = None,
    language: str | None = LANGUAGE,
    verbmem_tokens: int = 128,
    knowmem_tokens: int = 32,
    max_length: int = 2048,
    batch_tokens: int = BATCH_TOKENS,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Evaluate a model on MUSE-News or MUSE-Books: verbatim memorisation, knowledge memorisation and privacy leakage.

    VerbMem and KnowMem are the mean ROUGE-L F1 of greedy continuations of raw text, and of answers to questions after
    in-context examples, cut at the first newline. PrivLeak compares Min-K of forget and holdout texts with the retain
    model's. Raw texts are never put into a chat template; questions are where there is one.

    Args:
        corpus, data: see :func:`load_muse`.
        retain_results: this function's results for the model trained without the forget set; without them PrivLeak
            takes 0.5 for its AUC.
        verbmem_tokens, knowmem_tokens: bounds on a continuation and an answer.
        max_length: tokens of a PrivLeak text that are looked at, fewer where the model has fewer positions.

    Returns:
        As :func:`palu.evaluate.tofu`: forget_verbmem_ROUGE, forget_knowmem_ROUGE, retain_knowmem_ROUGE, the language
        figures of each (forget_verbmem_no_word, ...), mia_min_k, privleak and ``palu``.

    Other arguments, and errors, are those of :func:`palu.evaluate.tofu`; DataError, too, for a text that is too short.
    """
    metrics.require_packages()
    started = time.perf_counter()
    words = None if language is None else WordList(language)
    sets = load_muse(corpus, data)

    check_causal("model", model)
    fitting = fit_max_length(max_length, model)

    def raw(name: str, column: str, length: int) -> list[Example]:
        return raw_examples([row[column] for row in sets[name]], tokenizer, name, max_length=length)

    texts = {side: raw(f"privleak_{side}", "text", fitting) for side in SIDES}
    recited = raw("verbmem_forget", "prompt", max_length)  # cut to the positions, none would be left to continue it
    asked = {}
    for name in _KNOWMEM:
        rows, shots = (
            [{column: row[column] for column in _SETS[name]} for row in sets[which]] for which in (name, f"{name}_icl")
        )
        named = ((f"{name} row {i}", after_examples(row, shots, tokenizer, name)) for i, row in enumerate(rows))
        asked[name] = answer_examples(named, tokenizer, chat_template_kwargs)
    used = {f"privleak_{side}": examples for side, examples in texts.items()} | {"verbmem_forget": recited} | asked
    names = {name: [f"{name} row {row}" for row in range(len(examples))] for name, examples in used.items()}
    check_model(model, tokenizer, list(chain(*used.values())), list(chain(*names.values())))
    model = base_of(model)

    metadata = {
        "benchmark": _title(corpus),
        "split": None,
        "examples": {name: len(rows) for name, rows in sets.items()},
        "data_sha256": json_digest([sets[f"privleak_{side}"] for side in SIDES])[:16],
        "max_length": fitting,
        "word_list": None if words is None else words.source,
        **describe_model(model, tokenizer, chat_template_kwargs),
    }
    indices = {f"mia_min_k of the {side} set": set(map(str, range(len(texts[side])))) for side in SIDES}
    retain = load_retain_results(retain_results, metadata, indices)

    results: Results = {}
    work = sum(map(len, (*texts.values(), recited, *asked.values())))
    with tqdm(total=work, desc=_title(corpus), disable=not progress) as bar, eval_mode(model):
        settings: dict[str, Any] = {"batch_tokens": batch_tokens, "bar": bar}
        min_k = []
        for side, examples in texts.items():
            scores = token_scores(model, examples, names[f"privleak_{side}"], **settings)
            min_k.append([memorisation(score)["min_k"] for score in scores])
        results["mia_min_k"] = membership_entry(*min_k)

        prompts, ends = [example.input_ids for example in recited], answer_ends((), tokenizer)
        written = {
            "verbmem_forget": generate(model, tokenizer, prompts, ends, max_new_tokens=verbmem_tokens, **settings)
        }
        for name, examples in asked.items():
            answers = generate_answers(model, tokenizer, examples, max_new_tokens=knowmem_tokens, **settings)
            written[name] = list(map(_first_line, answers))

    in_words: dict[str, list[tuple[str, str]]] = {}
    for name, of_set in _WRITTEN.items():
        asking, truth = _SETS[name]
        in_words[of_set] = [(row[asking], row[truth]) for row in sets[name]]
        each = zip(written[name], sets[name], strict=True)
        results[of_set] = entry(rouge_value(one, row[truth]) for one, row in each)
    reasons = add_language_figures(results, retain, in_words, words) | {"privleak": NO_RETAIN_AUC}
    seconds = round(time.perf_counter() - started, 2)
    return complete(results, retain, reasons) | {"palu": metadata | {"seconds": seconds}}


def _title(corpus: str) -> str:
    return f"MUSE-{corpus.title()}"


def _first_line(answer: Generation) -> Generation:
    line, newline, _ = answer.text.partition("\n")
    return Generation(line, answer.cut_off and not newline)
