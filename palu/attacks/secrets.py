"""What is attacked: the secrets of a forget set, and the rows that are asked for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palu.data.duplicates import RowHashes, check_disjoint, warn_of_repeats, warn_of_told_secrets
from palu.data.examples import answer_examples
from palu.data.files import DataError, json_lines
from palu.data.matching import stands_in
from palu.data.paraphrases import ALSO_ASKED, PARAPHRASES, questions_of
from palu.data.rows import RenderedRow, Renderer, conversation_of, iterate_rows, text_rows, with_answer
from palu.data.secret import marked_texts
from palu.data.tokenize import IGNORE, Example, check_tokenizer, encode
from palu.hashing import digest
from palu.models.generation import prompt_of

SHOTS = 5  # rows of the retain set that are put in front of a question
_STAND_IN = "The"  # an answer that any tokenizer joins to the blank before it


@dataclass(frozen=True)
class AuditRow:
    """A row of the forget set with at least one secret."""

    columns: Mapping[str, Any]  # as the user gave them
    where: str
    question: str  # the last message before the answer
    answer: str  # the true one
    example: Example  # prompt and true answer, every answer token labelled with its id
    others: Mapping[str, tuple[str, ...]]  # questions in the columns PARAPHRASES and ALSO_ASKED, by column


@dataclass(frozen=True)
class Secret:
    """A marked span that the question does not already tell; its tokens are input_ids[first:stop] of the example."""

    row: int  # index in AuditData.rows
    text: str
    start: int  # and end: in characters of the answer
    end: int
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first


class AuditData:
    """The rows of the forget set that hold secrets, these secrets, and a retain set for the attacks that need one.

    A marked span that the messages before the answer tell already is no secret: nobody could know whether the model
    gave it away. A text that is marked twice in one answer is one secret, at its first place.

    Arguments are :func:`palu.audit`'s. Raises DataError where a row cannot be used or is in both sets (it is named),
    or there is no secret, ValueError for chat_template_kwargs that are not valid.
    """

    def __init__(
        self,
        forget: Any,
        retain: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        check_tokenizer(tokenizer)
        self.tokenizer, self.chat_template_kwargs = tokenizer, chat_template_kwargs
        self.rows: list[AuditRow] = []
        self.secrets: list[Secret] = []
        self.marked: list[str] = []
        self.repeated = 0
        self.unchangeable: str | None = None  # which row's prompt allows nothing in front of it or in its question
        self.retain: list[Mapping[str, Any]] = []
        self.shots: list[Mapping[str, Any]] = []  # SHOTS retain rows, or fewer, whose prompts can be put in front
        asked, kept = RowHashes(), RowHashes()
        renderer, given, rendered = Renderer(tokenizer, chat_template_kwargs), [], []
        for number, where, columns in iterate_rows(forget, "forget"):
            if "input_ids" in columns:
                raise DataError(f"{where}: the audit compares texts, and this row is tokenised; give it as text")
            given.append(columns)
            rendered.append(renderer.render(number, where, columns, forget=True))
        self.told_by_question = len(renderer.told_by_question)
        if not rendered:
            raise DataError("forget set is empty; give at least one row")
        for columns, text, example in zip(given, rendered, encode(rendered, tokenizer, forget=True), strict=True):
            asked.append(example)
            self._add(text, example, columns, rendered=renderer.is_rendered(columns))
        if not self.secrets:
            left_out = f" ({self.told_by_question} spans are in their questions)" * bool(self.told_by_question)
            raise DataError(f"forget set has no secret{left_out}; mark spans that the question does not tell")
        answers: list[tuple[str, str]] = []
        for where, columns, answer in () if retain is None else text_rows(retain, "retain"):
            if answer is None:
                raise DataError(f"{where}: the audit puts retain rows into prompts, and this one is tokenised")
            self.retain.append(columns)
            answers.append((answer, where))
            if len(self.shots) < SHOTS and not renderer.is_rendered(columns):
                self.shots.append(columns)
        for example in self.retain_examples(self.retain):  # complaints come before a model is touched
            kept.append(example)
        warn_of_repeats(asked, "forget")
        warn_of_repeats(kept, "retain")
        check_disjoint(asked, kept)
        warn_of_told_secrets(((one.text, self.rows[one.row].where) for one in self.secrets), answers)

    def _add(self, text: RenderedRow, example: Example, columns: Mapping[str, Any], *, rendered: bool) -> None:
        conversation, _, answer = conversation_of(columns, text.where)
        self.marked += marked_texts(columns, answer, text.where)
        assert example.offsets is not None
        secrets: list[Secret] = []
        for start, end in ((first - text.shift, end - text.shift) for first, end in text.spans):
            secret = answer[start:end]
            if any(stands_in(secret, other.text) and stands_in(other.text, secret) for other in secrets):
                self.repeated += 1
            else:
                held = (example.offsets[:, 0] < end) & (example.offsets[:, 1] > start) & (example.labels >= 0)
                tokens = held.nonzero().flatten().tolist()
                secrets.append(Secret(len(self.rows), secret, start, end, tokens[0], tokens[-1] + 1))
        if not secrets:
            return
        self.secrets += secrets
        if rendered and self.unchangeable is None:
            self.unchangeable = f"the prompt of {text.where} has special tokens in it, and cannot be changed"
        others = {name: questions_of(columns, name, text.where) for name in (PARAPHRASES, ALSO_ASKED)}
        question = conversation[-2]["content"]
        self.rows.append(AuditRow(columns, text.where, question, answer, example.whole_answer(), others))

    @property
    def prompts(self) -> list[Tensor]:
        """Each row's prompt [t]."""
        return [prompt_of(row.example) for row in self.rows]

    @cached_property
    def forget_digest(self) -> str:
        """Hash what is asked and what is looked for."""
        places = [[s.row, s.text, s.first, s.stop] for s in self.secrets]
        return digest([places, [[row.example.input_ids, *row.others.values()] for row in self.rows]])

    @cached_property
    def retain_digest(self) -> str:
        """Hash the retain set."""
        return digest(json_lines(self.retain))

    def encode_prompts(self, rows: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Tokenise the prompts [t] of rows, whose answers do not matter."""
        named = ((f"prompt {i}", with_answer(row, _STAND_IN)) for i, row in enumerate(rows))
        return [prompt_of(example) for example in self._examples(named)]

    def retain_examples(self, rows: Iterable[Mapping[str, Any]]) -> list[Example]:
        """Tokenise rows with their answers, every answer token labelled."""
        return self._examples((f"retain row {i}", row) for i, row in enumerate(rows))

    def _examples(self, named: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Example]:
        return answer_examples(named, self.tokenizer, self.chat_template_kwargs)

    def answer_beginnings(self, beginning: str) -> list[Tensor]:
        """Tokenise each row's prompt with the beginning of an answer after it: [t] each."""
        found = []
        # After the true answer's blanks, which part it from a prompt that ends without one.
        begun = [row.answer[: len(row.answer) - len(row.answer.lstrip())] + beginning for row in self.rows]
        named = (
            (row.where, with_answer(row.columns, f"{text} {_STAND_IN}"))
            for row, text in zip(self.rows, begun, strict=True)
        )
        for example, text in zip(self._examples(named), begun, strict=True):
            assert example.offsets is not None
            beyond = (example.labels != IGNORE) & (example.offsets[:, 1] > len(text))
            found.append(example.input_ids[: int(beyond.nonzero()[0])])
        return found
