"""Read rows of text: their columns, spans and chat template, checked so that an error names the row and the fix."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.data.files import DataError, read_rows
from palu.data.matching import find, stands_in, whole_places
from palu.data.secret import marked_spans, marked_texts
from palu.settings import template_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = ("input_ids", "labels", "attention_mask")
_TEXT_COLUMNS = (("question", "answer"), ("prompt", "completion"))
_COLUMNS = "question and answer, prompt and completion, or messages"
_MESSAGES = "a list of two or more {role, content}, the last one the assistant's"
_OF_TRANSFORMERS = ("chat_template", "documents", "tools")  # arguments of apply_chat_template itself
_SHOWN = 60  # characters of a prompt in a warning
_MARK = "\ue000answer\ue000"  # stands for the answer while a template is probed; private-use characters


def iterate_rows(source: Any, name: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Yield (row number, its name in errors, its columns) for each row of the source."""
    pandas: Any = sys.modules.get("pandas")  # whoever holds a DataFrame has imported it
    if isinstance(source, str | os.PathLike):
        numbered: Iterable[tuple[str, Any]] = read_rows(Path(source), name)
    elif pandas is not None and isinstance(source, pandas.DataFrame):
        numbered = (("", columns) for columns in _records(source))
    elif isinstance(source, Mapping):
        numbered = (("", columns) for columns in _transposed(source, name))
    elif isinstance(source, Iterable):
        numbered = (("", columns) for columns in source)
    else:
        raise DataError(
            f"{name} set is of type {type(source).__name__}; give a file's path, a list of dicts, "
            "a datasets.Dataset, a pandas.DataFrame, or a mapping with input_ids and labels"
        )
    for row, (line, columns) in enumerate(numbered):
        where = f"{name} row {row}{line}"
        if not isinstance(columns, Mapping):
            raise DataError(f"{where}: a row must map column names to values, got {type(columns).__name__}")
        if any(columns.get(name, ()) is None for name in _TOKENS):  # in a table of tokens and text a row of text
            columns = {name: value for name, value in columns.items() if name not in _TOKENS or value is not None}
        yield row, where, _with_messages(columns, where)


def _records(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pandas.DataFrame, with None in the cells that hold nothing (None, NaN)."""
    for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
        yield {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}


def _with_messages(columns: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the row with one list ``messages`` where prompt and completion are lists of messages, as in TRL."""
    prompt: Any = columns.get("prompt")
    completion: Any = columns.get("completion")
    in_messages = isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping)
    if not in_messages or columns.get("messages") is not None:
        return columns
    if not isinstance(completion, list | tuple) or len(completion) != 1:
        fix = "make 'completion' a list of one, the answer, and put what comes before it into 'prompt'"
        raise DataError(f"{where}: column 'prompt' is a list of messages; {fix}")
    others = {name: value for name, value in columns.items() if name not in ("prompt", "completion")}
    return {**others, "messages": [*prompt, *completion]}


def _transposed(source: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if "input_ids" not in source or "labels" not in source:
        raise DataError(
            f"{name} set is a mapping with {', '.join(map(str, source)) or 'nothing'}; give one split, "
            "a list of rows, or a mapping with input_ids and labels"
        )
    columns = {key: source[key] for key in _TOKENS if source.get(key) is not None}
    sizes = {key: len(values) for key, values in columns.items()}
    if len(set(sizes.values())) > 1:
        subject = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise DataError(f"{name} set: columns differ in rows ({subject}); give each the same number of rows")
    for row in range(sizes["input_ids"]):
        yield {key: values[row] for key, values in columns.items()}


def text_rows(source: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Yield (its name in errors, its columns, its answer) for each row; the answer of a tokenised row is None."""
    for _, where, columns in iterate_rows(source, name):
        yield where, columns, None if "input_ids" in columns else conversation_of(columns, where)[2]


def load_questions(source: Any, name: str) -> dict[int, str]:
    """Read each row's question, by row number: the last message before the answer. Tokenised rows have none."""
    return {
        row: conversation_of(columns, where)[0][-2]["content"]
        for row, where, columns in iterate_rows(source, name)
        if "input_ids" not in columns
    }


def load_marked_texts(source: Any, *, told_by_question: bool = True) -> dict[str, str]:
    """Read the texts that a forget set marks, each with the name of the first row that does.

    ``told_by_question``: also those that stand in their own row's question, so that no loss acts on them
    (:class:`Renderer`).
    """
    texts: dict[str, str] = {}
    for where, columns, answer in text_rows(source, "forget"):
        if answer is None:
            continue
        before = "" if told_by_question else text_before(conversation_of(columns, where)[0])
        for text in marked_texts(columns, answer, where):
            if not stands_in(text, before):
                texts.setdefault(text, where)
    return texts


def after_examples(
    columns: Mapping[str, Any], examples: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> dict[str, Any]:
    """Return a row that asks the same question after other rows with their answers.

    It is one conversation where the tokenizer has a chat template, else one prompt.
    """
    shown = [conversation_of(example, where) for example in examples]
    conversation, prompt, answer = conversation_of(columns, where)
    if tokenizer.chat_template is None:
        before = "".join(f"{asked}{answered}\n\n" for _, asked, answered in shown)
        return {"prompt": f"{before}{prompt}", "completion": answer}
    system = [message for message in conversation if message["role"] == "system"]
    others = [message for message in conversation if message["role"] != "system"]
    turns = [message for turn, _, _ in shown for message in turn if message["role"] != "system"]
    return {"messages": [*system, *turns, *others]}


def with_answer(columns: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """Return the row, one that `conversation_of` accepts, with another answer."""
    return _with_text(columns, answer, -1)


def with_question(columns: Mapping[str, Any], question: str) -> dict[str, Any]:
    """Return the row, one that `conversation_of` accepts, with another last message before the answer."""
    return _with_text(columns, question, -2)


def _with_text(columns: Mapping[str, Any], text: str, place: int) -> dict[str, Any]:
    if columns.get("messages") is not None:
        messages = list(columns["messages"])
        messages[place] = {**messages[place], "content": text}
        return {**columns, "messages": messages}
    pair = text_columns(columns) or _TEXT_COLUMNS[0]
    return {**columns, pair[place]: text}


def with_spans(columns: Mapping[str, Any], answer: str | None, where: str) -> dict[str, Any]:
    """Return the row with ``spans`` in place of ``secret``, where it has one; ``answer`` None: it is tokenised."""
    row = {name: value for name, value in columns.items() if name != "secret" or answer is None}
    if answer is not None and columns.get("secret") is not None:
        row["spans"] = [list(span) for span in marked_spans(columns, answer, where)]
    return row


def text_columns(columns: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the names of the row's columns of prompt and answer; None: it has no such pair."""
    there = [pair for pair in _TEXT_COLUMNS if all(one in columns for one in pair)]
    return next(iter(_filled(columns) + there), None)


def _filled(columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the pairs that hold something: in a table of both forms a row has nothing in the other's columns."""
    there = [pair for pair in _TEXT_COLUMNS if all(one in columns for one in pair)]
    return [pair for pair in there if any(columns[one] is not None and columns[one] != "" for one in pair)]


@dataclass(frozen=True)
class RenderedRow:
    """A rendered row."""

    row: int
    where: str
    text: str
    start: int  # the answer is text[start:stop]
    stop: int
    shift: int  # from characters of the answer to those of text
    spans: list[tuple[int, int]]  # [start, end) in text, none within another
    complete: bool  # whether special tokens are in the text, as a chat template writes them: the tokenizer adds none


class Renderer:
    """Renders rows of text as the model is to read them: by the tokenizer's chat template, if it has one.

    check_prompts: warn of the first row whose prompt is not the one that the template gives for generation, or,
        without a template, whose completion continues the prompt's last word.

    A span whose text stands in the question, or elsewhere before the answer, is left out: who asks so knows it already.
    ``told_by_question`` lists these spans, ``repeated_unmarked`` those whose text the answer has at another place, too,
    that is not marked: (the row's name in errors, the text) each.

    Raises ValueError where chat_template_kwargs is not valid, or the template does not know a name in it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        check_prompts: bool = False,
    ):
        self.tokenizer: Any = tokenizer
        self.kwargs = template_kwargs(chat_template_kwargs) or {}
        self.check_prompts = check_prompts
        self.told_by_question: list[tuple[str, str]] = []
        self.repeated_unmarked: list[tuple[str, str]] = []
        template = None if tokenizer is None else tokenizer.chat_template
        if self.kwargs and template is None:
            raise ValueError(f"chat_template_kwargs = {self.kwargs!r}: there is no chat template; leave it out")
        for name in self.kwargs:  # a template would pass over it
            if name not in _OF_TRANSFORMERS and not re.search(rf"\b{re.escape(name)}\b", str(template)):
                subject = f"chat_template_kwargs = {self.kwargs!r}: the chat template knows no {name}"
                raise ValueError(f"{subject}; correct the name or leave it out")

    def render(self, row: int, where: str, columns: Mapping[str, Any], forget: bool) -> RenderedRow:
        """Render a row. Raises DataError where it or the tokenizer cannot be used."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise DataError(f"{where}: text needs a tokenizer; pass one, or give input_ids and labels")
        if not tokenizer.is_fast:
            raise DataError(f"{where}: a slow tokenizer gives no offsets; load a fast one (one with a tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise DataError(f"{where}: the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        conversation, prompt, answer = conversation_of(columns, where)
        spans = self._secret_spans(conversation, marked_spans(columns, answer, where), where) if forget else []
        rendered = self.is_rendered(columns)
        if prompt is not None and (rendered or tokenizer.chat_template is None):
            text, start, stop, shift = prompt + answer, len(prompt), len(prompt + answer), len(prompt)
            if rendered:  # what ends the answer is no part of it
                stop -= len(answer) - len(self._special_end.sub("", answer))
            elif self.check_prompts:
                self._check_border(prompt, answer, where)
        elif tokenizer.chat_template is not None:
            text, start, stop, shift = self._place_answer(conversation, answer, where)
            if self.check_prompts:
                self._compare_prompts(conversation[:-1], text[:start], where)
        else:
            raise DataError(f"{where}: 'messages' need a chat template; set tokenizer.chat_template")
        complete = rendered or tokenizer.chat_template is not None
        in_text = [(first + shift, end + shift) for first, end in spans]
        return RenderedRow(row, where, text, start, stop, shift, in_text, complete)

    def _secret_spans(
        self, conversation: list[dict[str, Any]], spans: list[tuple[int, int]], where: str
    ) -> list[tuple[int, int]]:
        """Leave out spans within another, and those that the question tells."""
        before, answer, secret, reached = text_before(conversation), conversation[-1]["content"], [], 0
        of_text: dict[str, list[tuple[int, int]]] = {}  # a text may be marked in many places
        for start, end in spans:
            if end <= reached:
                continue
            reached, text = end, answer[start:end]
            if stands_in(text, before):
                self.told_by_question.append((where, text))
                continue
            secret.append((start, end))
            places = of_text.get(text) or of_text.setdefault(text, [*find(text, answer, whole=True)])
            if any(all(end <= first or last <= start for first, last in spans) for start, end in places):
                self.repeated_unmarked.append((where, text))
        return secret

    def is_rendered(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row's prompt has special tokens in it, so that it needs no chat template and no BOS.

        A question is wrapped, whatever is in it. The row is one that `conversation_of` accepts.
        """
        if columns.get("messages") is not None or text_columns(columns) == _TEXT_COLUMNS[0]:
            return False
        prompt, bos = columns["prompt"], self.tokenizer.bos_token
        return bool((bos and prompt.startswith(bos)) or self._special.search(prompt))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches a special token; an unknown token is special by name only."""
        names = {added.content for added in self.tokenizer.added_tokens_decoder.values() if added.special}
        names = (names | set(self.tokenizer.all_special_tokens)) - {self.tokenizer.unk_token, ""}
        return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")

    @cached_property
    def _special_end(self) -> re.Pattern[str]:
        """Matches the special tokens at the end of a text, and blanks around them."""
        return re.compile(rf"(?:\s*(?:{self._special.pattern}))+\s*\Z")

    def _check_border(self, prompt: str, answer: str, where: str) -> None:
        """Warn, once, where an answer continues the last word or sentence of its prompt without a blank."""
        joined = re.sub(r"[.,:;?!]\Z", "a", prompt) + answer
        if not prompt or len(prompt) in {start for start, _ in whole_places(answer, joined)}:
            return
        self.check_prompts = False
        border = f"{prompt[-_SHOWN // 2 :]}{answer[: _SHOWN // 2]}"
        fix = f"write the blank into the rows, as in {' ' + answer[: _SHOWN // 2]!r}"
        subject = f"the prompt and the completion are joined to {border!r}, without a blank between them; {fix}"
        warnings.warn(f"{where}: {subject}", stacklevel=2)

    def _apply_template(self, messages: list[dict[str, Any]], **more: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, **self.kwargs, tokenize=False, **more))

    def _place_answer(self, conversation: list[dict[str, Any]], answer: str, where: str) -> tuple[str, int, int, int]:
        """Render the template: (text, start and stop of the answer in it, shift from answer to text characters).

        The answer's place is what changes when a mark takes its place. To search for the answer would go
        wrong where the template's own words contain it ("assistant", "user").
        """
        *before, last = conversation
        try:
            text = self._apply_template(conversation)
            marked = self._apply_template([*before, {**last, "content": _MARK}])
        except Exception as error:  # a template is a program: it raises what it likes
            problem = f"the chat template fails ({error})"
            raise DataError(f"{where}: {problem}; correct the messages or the template") from error
        head, _, tail = marked.partition(_MARK)
        body = text[len(head) : len(text) - len(tail)]
        if head + body + tail != text or body.strip() != answer.strip():
            raise DataError(f"{where}: the chat template alters the answer; correct the answer or the template")
        shift = len(head) + (len(body) - len(body.lstrip())) - (len(answer) - len(answer.lstrip()))
        return text, len(head), len(head) + len(body), shift

    def _compare_prompts(self, before: list[dict[str, Any]], trained: str, where: str) -> None:
        """Warn, once, where the text before the answer is not the prompt that the model is asked with.

        Blanks at the end are not compared: they are in the answer's first token.
        """
        try:
            asked = self._apply_template(before, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it raises what it likes
            problem = f"the chat template gives no prompt for generation ({error})"
        else:
            if asked.rstrip(" ") == trained.rstrip(" "):
                return
            pairs = enumerate(zip(asked, trained, strict=False))
            common = next((i for i, (one, other) in pairs if one != other), min(len(asked), len(trained)))
            there, here = (text[common : common + _SHOWN] for text in (asked, trained))
            problem = (
                f"the prompt that is trained on has {here!r} where the chat template's prompt for generation "
                f"(add_generation_prompt=True) has {there!r}"
            )
        self.check_prompts = False
        fix = "set chat_template_kwargs, such as {'enable_thinking': False}, or correct the template"
        warnings.warn(f"{where}: {problem}, so the model is not trained as it is asked; {fix}", stacklevel=2)


def conversation_of(columns: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], str | None, str]:
    """Return the row as chat messages, as a plain prompt (None where it has none), and its answer."""
    messages, pair = columns.get("messages"), text_columns(columns)
    forms = ["messages"] * (messages is not None) + [" and ".join(one) for one in _filled(columns)]
    if len(forms) > 1:
        raise DataError(f"{where}: it has {forms[0]}, and also {forms[1]}; leave one of them out")
    if messages is not None:
        if not (
            isinstance(messages, list | tuple)
            and len(messages) > 1
            and all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in messages)
            and messages[-1]["role"] == "assistant"
        ):
            raise DataError(f"{where}: column 'messages' must be {_MESSAGES}; put the answer there")
        for number, message in enumerate(messages):
            check_string(message.get("content"), f"{where}: content of message {number}")
        conversation, prompt = [dict(message) for message in messages], None
        subject = "content of the last message"
    elif pair is not None:
        for column in pair:
            check_string(columns[column], f"{where}: column '{column}'")
        first, answer = columns[pair[0]], columns[pair[1]]
        prompt = f"Question: {first}\nAnswer: " if pair[0] == "question" else first
        subject = f"column '{pair[1]}'"
        conversation = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    else:
        raise DataError(f"{where}: columns are {', '.join(map(str, columns)) or 'none'}; give {_COLUMNS}")
    if not conversation[-1]["content"].strip():
        raise DataError(f"{where}: {subject} is blank; give an answer or remove the row")
    return conversation, prompt, conversation[-1]["content"]


def text_before(conversation: Sequence[Mapping[str, Any]]) -> str:
    """Return all text before the answer of a row's :func:`conversation_of`."""
    return "\n".join(message["content"] for message in conversation[:-1])


def check_string(value: Any, subject: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{subject} must be a string, got {type(value).__name__}; give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can smuggle in half of a UTF-16 pair
        raise DataError(f"{subject} has half a surrogate pair at character {error.start}; repair the text") from None
