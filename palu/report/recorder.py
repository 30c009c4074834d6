"""Record what the model makes of the secrets, and of what it should keep, before and after a run.

A :class:`Recorder` looks at the model before :func:`palu.unlearn` and again when it is done, and writes both to
``record.json``; :mod:`palu.report` makes a page of it. A *secret* is a run of neighbouring sensitive tokens, as in the
losses; beside them stands every marked text. The record holds the text of the forget set, so it is as private as that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.examples import answer_examples, load_forget, load_retain
from palu.data.matching import stands_in
from palu.data.paraphrases import paraphrased_rows
from palu.data.rows import conversation_of, load_marked_texts, load_questions
from palu.data.tokenize import IGNORE, Example
from palu.evaluate.scores import BATCH_TOKENS, TokenScores, token_scores
from palu.hashing import json_digest
from palu.models.checks import check_linear_head, check_models, check_packing
from palu.models.generation import encode_prompts, eval_mode, generate_answers, generate_texts, prompt_of
from palu.models.lora import CausalLM, base_of
from palu.models.positions import fit_max_length, max_positions
from palu.models.root import on_device, roomy_device
from palu.ref_model.anchors import anchor_texts
from palu.ref_model.fingerprint import fingerprint_model
from palu.report import manifest
from palu.report.layout import MODEL, RECORD, make_private
from palu.report.token_roles import token_roles
from palu.training.datasets import check_sets

FORMAT = 1
RETAIN_ROWS = 100  # of the retain set, evenly spaced, whose probability is recorded
SHOWN_ROWS = 400  # of the forget set, the first ones, whose token roles are recorded
GENERAL = 24  # everyday prompts, the last ones, which no run holds the model to unless it asks for all
GENERAL_TOKENS = 24  # of the model's own answer to each
ASKED = 50  # rows of the forget set, evenly spaced, that the model is asked, also in the words of their paraphrases
SAMPLES = 8  # of each set, evenly spaced, of which greedy answers are recorded
MAX_NEW_TOKENS = 64

Span = tuple[int, int]  # [start, end) in tokens


class Recorder:
    """Records the model now, and again in :meth:`save`.

    ::

        recorder = palu.Recorder(model, forget, retain, tokenizer=tokenizer, config=config)
        result = palu.unlearn(model, None, forget, retain, tokenizer=tokenizer, config=config)
        recorder.save("runs/forget", result.model)

    The main process looks while the others wait at the run's first exchange. It does so on the device that the run
    will use; where the run shards the model and it is too large for the device, on the host, which takes long. Neither
    weights nor random numbers are changed, and the model stays where it is.

    Args:
        model, forget, retain, tokenizer, config: as they are given to :func:`palu.unlearn`; ``forget`` and ``retain``
            are read twice, so they cannot be iterators. Without a tokenizer, tokens are recorded by their ids and no
            answers are generated.

    Raises:
        DataError: as :func:`palu.unlearn`.
        TypeError, ValueError: an iterator; a model that cannot be scored.
    """

    def __init__(
        self,
        model: CausalLM,
        forget: Any,
        retain: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: UnlearnConfig | None = None,
    ):
        self.config, self.tokenizer = config or UnlearnConfig(), tokenizer
        retain = [] if retain is None else retain
        accelerator = Accelerator()
        # A run that shards the model may have one that is larger than a device.
        sharding = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.device = roomy_device(model, accelerator.device) if sharding else accelerator.device
        self.active = accelerator.is_main_process
        for name, source in (("forget", forget), ("retain", retain)):
            if isinstance(source, Iterator):
                raise TypeError(f"{name} is an iterator, which the record would leave empty for the run; give a list")
        if not self.active:
            return
        check_models(model, None, tokenizer, self.device, accelerator.mixed_precision)
        self.config = self.config.replace(max_length=fit_max_length(self.config.max_length, model))
        rendering: dict[str, Any] = {
            "max_length": self.config.max_length,
            "chat_template_kwargs": self.config.chat_template_kwargs,
        }
        forget_set = load_forget(
            forget,
            tokenizer,
            allow_cut_spans=self.config.allow_cut_spans,
            positions=max_positions(model),
            **rendering,
        )
        retain_set = load_retain(retain, tokenizer, **rendering)
        # Whether it may do without a retain set is the run's to judge.
        check_sets(model, forget_set, retain_set, self.config, anchored=True)
        check_linear_head(model, forget_set.examples[0].input_ids)
        longest = max(len(example.input_ids) for example in chain(forget_set.examples, retain_set.examples))
        check_packing("model", model, self.device, longest=longest)  # it looks without mixed precision
        self.forget, self.retain = forget_set.examples, _evenly(retain_set.examples, RETAIN_ROWS)
        self.spans = [token_spans(example, self._eos) for example in self.forget]
        # By index in the forget set.
        self.asked = _evenly([i for i, spans in enumerate(self.spans) if spans], ASKED)
        self.samples = {"forget": _evenly(self.asked, SAMPLES), "retain": _evenly(range(len(self.retain)), SAMPLES)}
        forget_source, retain_source = forget_set.source, retain_set.source
        self.questions = {
            "forget": load_questions(forget_source, "forget"),
            "retain": load_questions(retain_source, "retain"),
        }
        self.paraphrases = self._paraphrases(forget_source)
        tokenised = [(e, spans) for e, spans in zip(self.forget, self.spans, strict=True) if e.offsets is None]
        self.marked = load_marked_texts(forget_source, "forget")
        self.marked += [self._text(example, span) for example, spans in tokenised for span in spans]
        self.general: Sequence[Example] = []  # the model's own answers before the run
        self.about = {
            "format": FORMAT,
            "started": _now(),
            "model": manifest.describe_model(model),
            "device": manifest.describe_device(self.device),
            "versions": manifest.versions(model),
            "data": {
                "forget": manifest.describe_data(forget_source, self.forget),
                "retain": manifest.describe_data(retain_source, retain_set.examples),
            },
        }
        self.before = self._look(model, "before")

    def save(self, output: str | os.PathLike[str], model: CausalLM) -> dict[str, Any] | None:
        """Look at the unlearned model, and write ``private/record.json`` into the run's folder; return what it holds.

        On processes that are not the main one nothing is done, and None returned.

        Args:
            output: the run's folder. The record holds the hashes of the files that are in its ``model/`` by now.
            model: ``result.model`` of the run.
        """
        if not self.active:
            return None
        before, after = self.before, self._look(model, "after")
        looked = {"before": before, "after": after}
        secrets = [
            {
                **self._row("forget", example),
                "text": None if self.tokenizer is None else self._text(example, span),
                "tokens": span[1] - span[0],
                "before": before["secrets"][i][k],
                "after": after["secrets"][i][k],
            }
            for i, example in enumerate(self.forget)
            for k, span in enumerate(self.spans[i])
        ]
        retained = [
            {**self._row("retain", example), "before": before["retained"][i], "after": after["retained"][i]}
            for i, example in enumerate(self.retain)
        ]
        answers = {
            side: [
                self._row(side, examples[i]) | {when: seen["answers"][side][i] for when, seen in looked.items()}
                for i in (self.samples[side] if self.tokenizer is not None else [])
            ]
            for side, examples in (("forget", self.forget), ("retain", self.retain))
        }
        shown_examples = self.forget[:SHOWN_ROWS]
        roles = token_roles(shown_examples, self.tokenizer, self.config.onset_length)
        shown = [
            {**self._row("forget", example), "tokens": tokens[example.answer_start :]}
            for example, tokens in zip(shown_examples, roles, strict=True)
        ]
        hashes = {
            "weights_before": before["weights"],
            "weights_after": after["weights"],
            "config": json_digest(self.config.values()),
            "files": manifest.hash_files(Path(output) / MODEL),
        }
        record = self.about | {
            "finished": _now(),
            "hashes": hashes,
            "marked": self.marked,
            "secrets": secrets,
            "retained": retained,
            "general": {"questions": len(self.general), "before": before["general"], "after": after["general"]},
            "answers": answers,
            "examples": shown,
        }
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        (make_private(output) / RECORD).write_text(text + "\n", encoding="utf-8")
        return record

    @property
    def _eos(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    def _row(self, side: str, example: Example) -> dict[str, Any]:
        """Return the row's number, and the user's question; for tokenised rows the prompt as the model reads it."""
        asked = self.questions[side].get(example.row)
        question = asked if asked is not None else _decode(self.tokenizer, prompt_of(example))
        return {"row": example.row, "question": question}

    def _text(self, example: Example, span: Span) -> str:
        return _decode(self.tokenizer, example.input_ids[slice(*span)]).strip()

    def _look(self, model: CausalLM, when: str) -> dict[str, Any]:
        """Measure a model: {secrets: per example and span, retained, answers, weights}."""
        with on_device(model, self.device):
            return self._measure(model, when)

    def _measure(self, model: CausalLM, when: str) -> dict[str, Any]:
        base = base_of(model)
        scored = [*(example.whole_answer() for example in self.forget), *self.retain]
        names = [f"forget row {e.row}" for e in self.forget] + [f"retain row {e.row}" for e in self.retain]
        answers: dict[str, dict[int, str]] = {"forget": {}, "retain": {}}  # by index in the set
        in_other_words: dict[int, list[tuple[str, str]]] = {}  # questions and answers
        asked: dict[str, list[Example]] = {
            "forget": [self.forget[i] for i in self.asked],
            "retain": [self.retain[i] for i in self.samples["retain"]],
            "paraphrases": [example for of_row in self.paraphrases.values() for _, example in of_row],
        }
        work = len(names) + (GENERAL + sum(map(len, asked.values())) if self.tokenizer is not None else 0)
        with tqdm(total=work, desc=f"record {when}", disable=not self.config.progress) as bar, eval_mode(base):
            scores = token_scores(base, scored, names, batch_tokens=BATCH_TOKENS, bar=bar)
            general = None
            if self.tokenizer is not None:
                self.general = self.general or self._own_answers(base, self.tokenizer)
                own = [f"general question {example.row}" for example in self.general]
                found = token_scores(base, self.general, own, batch_tokens=BATCH_TOKENS, bar=bar)
                general = mean(float(score.correct.float().mean()) for score in found) if found else None
                settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_tokens": BATCH_TOKENS, "bar": bar}
                texts = {
                    name: [one.text for one in generate_answers(base, self.tokenizer, examples, **settings)]
                    for name, examples in asked.items()
                    if examples
                }
                answers["forget"] = dict(zip(self.asked, texts.get("forget", []), strict=True))
                answers["retain"] = dict(zip(self.samples["retain"], texts.get("retain", []), strict=True))
                written = iter(texts.get("paraphrases", []))
                in_other_words = {
                    i: [(question, next(written)) for question, _ in of_row] for i, of_row in self.paraphrases.items()
                }
        count = len(self.forget)
        return {
            "secrets": [
                [
                    span_score(example, score, span)
                    | {
                        "asked": told(self._text(example, span), self._asked(i, answers["forget"])),
                        "paraphrased": told(self._text(example, span), in_other_words.get(i, [])),
                    }
                    for span in spans
                ]
                for i, (example, score, spans) in enumerate(zip(self.forget, scores[:count], self.spans, strict=True))
            ],
            "retained": [
                {"probability": score.probability, "recalled": float(score.correct.float().mean())}
                for score in scores[count:]
            ],
            "general": general,
            "answers": answers,
            "weights": fingerprint_model(model),
        }

    def _paraphrases(self, forget: Any) -> dict[int, list[tuple[str, Example]]]:
        """Tokenise the paraphrases of the rows that are asked: by index in the forget set, each with its question."""
        if self.tokenizer is None:
            return {}
        index = {self.forget[i].row: i for i in self.asked}
        rows = [
            (index[row], where, columns) for row, where, columns in paraphrased_rows(forget, "forget") if row in index
        ]
        named = ((where, columns) for _, where, columns in rows)
        examples = answer_examples(named, self.tokenizer, self.config.chat_template_kwargs)
        found: dict[int, list[tuple[str, Example]]] = {}
        for (i, where, columns), example in zip(rows, examples, strict=True):
            found.setdefault(i, []).append((conversation_of(columns, where)[0][-2]["content"], example))
        return found

    def _asked(self, i: int, answers: dict[int, str]) -> list[tuple[str, str]]:
        """Return a forget row's question and what was answered, if it was asked."""
        return [(self._row("forget", self.forget[i])["question"], answers[i])] if i in answers else []

    def _own_answers(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
        """Have the model answer general questions; blank answers are left out."""
        template: dict[str, Any] = {"chat_template_kwargs": self.config.chat_template_kwargs}
        questions = anchor_texts()[-GENERAL:]
        prompts, stop_ids = encode_prompts(questions, tokenizer, **template)
        with tqdm(disable=True) as bar:
            texts = generate_texts(
                base,
                tokenizer,
                prompts,
                stop_ids,
                max_new_tokens=GENERAL_TOKENS,
                batch_tokens=BATCH_TOKENS,
                bar=bar,
                chunk_bytes=self.config.chunk_bytes,
            )
        rows = [{"question": q, "answer": text} for q, text in zip(questions, texts, strict=True) if text.strip()]
        return load_retain(rows, tokenizer, max_length=self.config.max_length, **template).examples if rows else []


def token_spans(example: Example, eos_token_id: int | None) -> list[Span]:
    """Find the runs of neighbouring sensitive tokens; the end of sequence is none, as in the losses."""
    sensitive = [label >= 0 and label != eos_token_id for label in example.labels.tolist()]
    edges = [i for i in range(1, len(sensitive)) if sensitive[i] != sensitive[i - 1]] + [len(sensitive)]
    # labels[0] is never sensitive, so edges come in pairs; the last one may close the last run.
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=False)]


def span_score(example: Example, score: TokenScores, span: Span) -> dict[str, Any]:
    """Score a span, given the question and the answer's own words before it: {probability, recalled, rest}.

    probability: product of its tokens' probabilities. recalled: whether each of them is the likeliest, so that greedy
    decoding writes the span. rest: the same of all but the first token; None of a single token. ``score`` is of all of
    the answer's tokens.
    """
    first = int((example.labels[: span[0]] != IGNORE).sum())
    tokens = slice(first, first + span[1] - span[0])
    return {
        "probability": float(score.log_prob[tokens].double().sum().exp()),
        "recalled": bool(score.correct[tokens].all()),
        "rest": bool(score.correct[tokens][1:].all()) if span[1] - span[0] > 1 else None,
    }


def told(text: str, asked: Sequence[tuple[str, str]]) -> bool | None:
    """Whether one of (question, answer) pairs tells a text; None where there is none whose question does not."""
    answers = [answer for question, answer in asked if text and not stands_in(text, question)]
    return any(stands_in(text, answer) for answer in answers) if answers else None


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Choose at most ``count`` values, evenly spaced."""
    return [values[i * len(values) // count] for i in range(count)] if len(values) > count else list(values)


def _decode(tokenizer: PreTrainedTokenizerBase | None, ids: Tensor | Sequence[int]) -> str:
    ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if tokenizer is None:
        return " ".join(map(str, ids))
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
