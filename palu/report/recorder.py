"""Record what the model makes of the secrets, and of what it should keep, before and after a run.

A :class:`Recorder` looks at the model before :func:`palu.unlearn` and again when it is done, and writes both to
``record.json``; :mod:`palu.report` makes a page of it. A *secret* is a run of neighbouring sensitive tokens, as in the
losses. The record holds the text of the forget set, so it is as private as that.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import accumulate, chain
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
from palu.layout import FORGET, MODEL, PRIVATE, RECORD
from palu.models.checks import check_linear_head, check_models, check_packing
from palu.models.generation import bound_on_answers, eval_mode, generate_answers, generate_texts, prompt_of
from palu.models.lora import CausalLM, base_of
from palu.models.positions import fit_max_length, max_positions
from palu.models.root import on_device, roomy_device
from palu.ref_model.anchors import anchor_texts
from palu.ref_model.fingerprint import fingerprint_model
from palu.ref_model.shared import TokenPair
from palu.report import manifest
from palu.report.token_roles import token_roles
from palu.training.datasets import check_sets
from palu.training.requests import Request, lines_digest, read_earlier, row_lines
from palu.writable import private_folder, write_private

FORMAT = 3
RETAIN_ROWS = 100  # of the retain set, evenly spaced, whose probability is recorded
SHOWN_ROWS = 400  # of the forget set, the first ones, whose token roles are recorded
GENERAL = 24  # everyday prompts, the last ones, which no run holds the model to unless it asks for all
GENERAL_TOKENS = 24  # of the model's own answer to each
ASKED = 50  # rows of the forget set, evenly spaced, that the model is asked, also in the words of their paraphrases
SAMPLES = 8  # of each set, evenly spaced, of which greedy answers are recorded
MAX_NEW_TOKENS = 64  # of an answer, but at least twice the longest true one, up to 200

Span = tuple[int, int]  # [start, end) in tokens
Pair = tuple[str, str]  # (question, answer)


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
        model, forget, retain, tokenizer, config, after: as for :func:`palu.unlearn`, with its errors; no iterators,
            since both sets are read twice. Without a tokenizer, tokens are recorded by their ids and no answers are
            generated. ``after``: the rows of earlier requests are recorded, too, and numbered after those of this one.
    """

    def __init__(
        self,
        model: CausalLM,
        forget: Any,
        retain: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: UnlearnConfig | None = None,
        after: str | os.PathLike[str] | None = None,
    ):
        self.config, self.tokenizer = config or UnlearnConfig(), tokenizer
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
        self.template: dict[str, Any] = {"chat_template_kwargs": self.config.chat_template_kwargs}
        rendering = {"max_length": self.config.max_length, "positions": max_positions(model), **self.template}
        cut: dict[str, Any] = {"allow_cut_spans": self.config.allow_cut_spans}
        forget_set = own = load_forget(forget, tokenizer, **cut, **rendering)
        self.lines = row_lines(own.source)
        self.requests: list[Request] = []  # the earlier ones
        self.asked_now = len(self.lines)  # rows of this request, the first ones
        if after is not None:
            earlier = read_earlier(after)
            earlier.check(model, self.config)
            earlier.load(tokenizer, **cut, **rendering)  # with its errors
            self.lines, self.requests = self.lines + row_lines(earlier.rows), earlier.requests
            forget_set = load_forget([json.loads(line) for line in self.lines], tokenizer, **cut, **rendering)
        retain_set = load_retain([] if retain is None else retain, tokenizer, **rendering)
        # Whether it may do without a retain set is the run's to judge.
        check_sets(model, own, retain_set, self.config, anchored=True)
        check_linear_head(model, forget_set.examples[0].input_ids)
        longest = max(len(example.input_ids) for example in chain(forget_set.examples, retain_set.examples))
        check_packing("model", model, self.device, longest=longest)  # it looks without mixed precision
        self.forget, self.retain = forget_set.examples, _evenly(retain_set.examples, RETAIN_ROWS)
        eos = None if tokenizer is None else tokenizer.eos_token_id
        # Indices are those of self.forget and self.retain.
        self.secrets = [(i, span) for i, example in enumerate(self.forget) for span in token_spans(example, eos)]
        self.rows = {
            "forget": self._rows(self.forget, load_questions(forget_set.source, "forget")),
            "retain": self._rows(self.retain, load_questions(retain_set.source, "retain")),
        }
        self.prompts: dict[str, list[tuple[int, str, Example]]] = {"asked": [], "retain": [], "paraphrased": []}
        if tokenizer is not None:
            asked = _evenly(list(dict.fromkeys(i for i, _ in self.secrets)), ASKED)
            sampled = _evenly(range(len(self.retain)), SAMPLES)
            self.prompts = {
                "asked": [(i, self.rows["forget"][i]["question"], self.forget[i]) for i in asked],
                "retain": [(i, self.rows["retain"][i]["question"], self.retain[i]) for i in sampled],
                "paraphrased": self._paraphrases(forget_set.source, tokenizer, asked),
            }
        self.marked = load_marked_texts(forget_set.source)
        for i, span in self.secrets:
            if self.forget[i].offsets is None:
                self.marked.setdefault(self._text(i, span), f"forget row {self.forget[i].row}")
        self.general: Sequence[Example] = []  # the model's own answers before the run
        self.max_new_tokens = max(MAX_NEW_TOKENS, bound_on_answers(one.whole_answer() for one in self.forget))
        described = manifest.describe_model(model)
        if after is not None:  # where it came from in the first place
            first = json.loads((Path(after) / PRIVATE / RECORD).read_text(encoding="utf-8"))["model"]
            described |= {name: first[name] for name in ("name", "on_the_hub", "license")}
        self.about = {
            "format": FORMAT,
            "started": _now(),
            "model": described,
            "device": manifest.describe_device(self.device),
            "versions": manifest.versions(model),
            "data": {
                "forget": manifest.describe_data(own.source, own.examples),
                "retain": manifest.describe_data(retain_set.source, retain_set.examples),
            },
        }
        self.before = self._look(model, "before")

    def save(
        self,
        output: str | os.PathLike[str],
        model: CausalLM,
        shared: Iterable[TokenPair] = (),
        *,
        others: Iterable[str] = (),
    ) -> dict[str, Any] | None:
        """Look at the unlearned model (``result.model``), and write ``private/record.json`` into the run's folder.

        ``shared``: the run's ``summary["shared_beginnings"]``. The record holds the hashes of the files that are in
        ``model/`` by now, but for ``others``, which are not the run's. Returns what it holds; on processes that are not
        the main one nothing is done, and None returned.
        """
        if not self.active:
            return None
        before, after = self.before, self._look(model, "after")
        rows, is_text = self.rows, self.tokenizer is not None
        secrets = [
            rows["forget"][i]
            | {"text": self._text(i, span) if is_text else None, "tokens": span[1] - span[0]}
            | {"request": self._request_of(self.forget[i].row)}
            for i, span in self.secrets
        ]
        roles = token_roles(self.forget[:SHOWN_ROWS], self.tokenizer, self.config.onset_length, set(shared))
        record = self.about | {
            "finished": _now(),
            "hashes": {
                "weights_before": before["weights"],
                "weights_after": after["weights"],
                "config": json_digest(self.config.values()),
                "files": manifest.hash_files(Path(output) / MODEL, but={*others}),
            },
            "marked": self.marked,
            "shared_beginnings": list(shared),
            "secrets": _compared(secrets, before["secrets"], after["secrets"]),
            "retained": _compared(rows["retain"], before["retained"], after["retained"]),
            "general": {"questions": len(self.general), "before": before["general"], "after": after["general"]},
            "answers": {
                side: _compared([rows[side][i] for i in texts], texts.values(), after["answers"][side].values())
                for side, texts in before["answers"].items()
            },
            "examples": [
                row | {"tokens": tokens[example.answer_start :]}
                for row, tokens, example in zip(rows["forget"], roles, self.forget, strict=False)
            ],
        }
        private = private_folder(Path(output) / PRIVATE)
        write_private(private / RECORD, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        write_private(private / FORGET, "".join(f"{line}\n" for line in self.lines))
        return record

    def ledger(self, output: str | os.PathLike[str], record: dict[str, Any]) -> list[Request]:
        """Return the earlier requests and this one, as they stand in the ledger of the run whose record this is."""
        about = {
            "number": len(self.requests) + 1,
            "run": Path(output).resolve().name,
            "finished": record["finished"],
            "palu": record["versions"]["palu"],
            "rows": self.asked_now,
            "rows_sha256": lines_digest(self.lines[: self.asked_now]),
            "shared_beginnings": record["shared_beginnings"],
        }
        return [*self.requests, about | {name: record["hashes"][name] for name in ("weights_before", "weights_after")}]

    def _request_of(self, row: int) -> int:
        """Return the number, from 1, of the request that a row belongs to; those of the newest one come first."""
        ends = accumulate([self.asked_now, *(request["rows"] for request in reversed(self.requests))])
        return len(self.requests) + 1 - sum(end <= row for end in ends)

    def _rows(self, examples: Sequence[Example], asked: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return each row's number, and the user's question; of tokenised rows the prompt as the model reads it."""
        return [
            {"row": e.row, "question": asked[e.row] if e.row in asked else _decode(self.tokenizer, prompt_of(e))}
            for e in examples
        ]

    def _text(self, i: int, span: Span) -> str:
        return _decode(self.tokenizer, self.forget[i].input_ids[slice(*span)]).strip()

    def _look(self, model: CausalLM, when: str) -> dict[str, Any]:
        """Measure a model: {secrets, retained, general, answers by side and index, weights}."""
        base = base_of(model)
        scored = [*(example.whole_answer() for example in self.forget), *self.retain]
        names = [f"forget row {e.row}" for e in self.forget] + [f"retain row {e.row}" for e in self.retain]
        work = len(names) + (0 if self.tokenizer is None else GENERAL + sum(map(len, self.prompts.values())))
        with on_device(model, self.device):
            with tqdm(total=work, desc=f"record {when}", disable=not self.config.progress) as bar, eval_mode(base):
                scores = token_scores(base, scored, names, batch_tokens=BATCH_TOKENS, bar=bar)
                general, said = self._ask(base, bar)
            weights = fingerprint_model(model)
        return {
            "secrets": [
                span_score(self.forget[i], scores[i], span)
                | {how: told(self._text(i, span), said[how].get(i, [])) for how in ("asked", "paraphrased")}
                for i, span in self.secrets
            ],
            "retained": [
                {"probability": score.probability, "recalled": float(score.correct.float().mean())}
                for score in scores[len(self.forget) :]
            ],
            "general": general,
            "answers": {
                "forget": {i: pairs[0][1] for i, pairs in _evenly(list(said["asked"].items()), SAMPLES)},
                "retain": {i: pairs[0][1] for i, pairs in said["retain"].items()},
            },
            "weights": weights,
        }

    def _ask(self, base: PreTrainedModel, bar: tqdm) -> tuple[float | None, dict[str, dict[int, list[Pair]]]]:
        """Have a model answer: (how much of its own answers is left, what it said to each kind of prompt by index)."""
        said: dict[str, dict[int, list[Pair]]] = {how: defaultdict(list) for how in self.prompts}
        if self.tokenizer is None:
            return None, said
        self.general = self.general or self._own_answers(base, self.tokenizer)
        names = [f"general question {example.row}" for example in self.general]
        own = token_scores(base, self.general, names, batch_tokens=BATCH_TOKENS, bar=bar)
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_tokens": BATCH_TOKENS, "bar": bar}
        for how, prompts in self.prompts.items():
            answers = generate_answers(base, self.tokenizer, [example for _, _, example in prompts], **settings)
            for (i, question, _), answer in zip(prompts, answers, strict=True):
                said[how][i].append((question, answer.text))
        return mean(float(score.correct.float().mean()) for score in own) if own else None, said

    def _paraphrases(
        self, forget: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[int]
    ) -> list[tuple[int, str, Example]]:
        """Tokenise the paraphrases of the rows that are asked: (index, question, example)."""
        index = {self.forget[i].row: i for i in asked}
        rows = [one for one in paraphrased_rows(forget, "forget") if one[0] in index]
        examples = answer_examples(((where, columns) for _, where, columns in rows), tokenizer, **self.template)
        return [
            (index[row], conversation_of(columns, where)[0][-2]["content"], example)
            for (row, where, columns), example in zip(rows, examples, strict=True)
        ]

    def _own_answers(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
        """Have the model answer general questions; blank answers are left out."""
        questions = anchor_texts()[-GENERAL:]
        settings = {"max_new_tokens": GENERAL_TOKENS, "batch_tokens": BATCH_TOKENS, **self.template}
        texts = generate_texts(base, tokenizer, questions, chunk_bytes=self.config.chunk_bytes, **settings)
        rows = [{"question": q, "answer": text} for q, text in zip(questions, texts, strict=True) if text.strip()]
        return load_retain(rows, tokenizer, max_length=self.config.max_length, **self.template).examples if rows else []


def token_spans(example: Example, eos_token_id: int | None) -> list[Span]:
    """Find the runs of neighbouring sensitive tokens; the end of sequence is none, as in the losses."""
    sensitive = [label >= 0 and label != eos_token_id for label in example.labels.tolist()]
    edges = [i for i in range(1, len(sensitive)) if sensitive[i] != sensitive[i - 1]] + [len(sensitive)]
    # labels[0] is never sensitive, so edges come in pairs; the last one may close the last run.
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=False)]


def span_score(example: Example, score: TokenScores, span: Span) -> dict[str, Any]:
    """Score a span, given the question and the answer's own words before it; ``score`` is of the whole answer.

    probability: product of its tokens' probabilities. recalled: whether each of them is the likeliest, so that greedy
    decoding writes the span. rest: the same of all but the first token; None of a single token.
    """
    first = int((example.labels[: span[0]] != IGNORE).sum())
    tokens = slice(first, first + span[1] - span[0])
    return {
        "probability": float(score.log_prob[tokens].double().sum().exp()),
        "recalled": bool(score.correct[tokens].all()),
        "rest": bool(score.correct[tokens][1:].all()) if span[1] - span[0] > 1 else None,
    }


def told(text: str, asked: Sequence[Pair]) -> bool | None:
    """Whether an answer tells a text; None where there is none whose question does not."""
    answers = [answer for question, answer in asked if text and not stands_in(text, question)]
    return any(stands_in(text, answer) for answer in answers) if answers else None


def _compared(rows: Iterable[dict[str, Any]], before: Iterable[Any], after: Iterable[Any]) -> list[dict[str, Any]]:
    """Set beside each row what was found of it before and after."""
    return [row | {"before": b, "after": a} for row, b, a in zip(rows, before, after, strict=True)]


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Choose at most ``count`` values, evenly spaced."""
    return [values[i * len(values) // count] for i in range(count)] if len(values) > count else list(values)


def _decode(tokenizer: PreTrainedTokenizerBase | None, ids: Tensor) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
