"""Text and spans -> tokens and roles.

Each token has one label, aligned with `input_ids` (the loss shifts, not the labels):

| label       | forget                                | retain          |
|-------------|---------------------------------------|-----------------|
| IGNORE      | prompt, padding: nothing acts on it   | the same        |
| ORDINARY    | answer token outside every span: KL   | never           |
| token's id  | sensitive: the token overlaps a span  | an answer token |

A row of text is `question`/`answer`, `prompt`/`completion`, or `messages` (the last one the
assistant's). A forget row also has `spans`: [start, end) pairs in characters (Python string indices)
of the answer; `[]` if nothing in it is sensitive. For DPO it also has `alternate`: the answer to prefer.
A row that is tokenised already has `input_ids`, `labels` as above and perhaps an `attention_mask`, which strips its
padding.

A tokenizer with a chat template renders every row with it: question or prompt is the user's message,
answer or completion the assistant's. For plain text set `tokenizer.chat_template = None`; then a row
reads "Question: {question}\\nAnswer: {answer}", or {prompt}{completion}. The answer ends with an
end-of-sequence token, ORDINARY in forget: the template's own (such as <|eot_id|>), else the tokenizer's.

The whole text is tokenised at once, as the model will read it, so the border between prompt and
answer or the edge of a span may lie inside a token: a token belongs to the answer, or to a span, as
soon as it holds one character of it. Blanks at a span's edges do not count; those within it do, or
"June 30, 1975" would fall apart where a tokenizer makes " " and "30" two tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from palu.files import DataError, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
ORDINARY = -200

_TEXT_COLUMNS = (("question", "answer"), ("prompt", "completion"))
_COLUMNS = "question and answer, prompt and completion, or messages"
_MESSAGES = "a list of two or more {role, content}, the last one the assistant's"
_CHUNK = 1024  # rows tokenised in one call: enough to keep the tokenizer's threads busy
_Offsets: TypeAlias = list[tuple[int, int]]  # each token's [start, end) in characters of the text
_MARK = "\ue000answer\ue000"  # stands for the answer while a template is probed; private-use characters


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    row: position in the user's data, from 0 (blank lines of a file are not rows).
    input_ids: int64 [t].
    labels: int64 [t]: IGNORE, ORDINARY (forget only) or the token's own id.
    labels[0] is always IGNORE: no logits predict the first token.
    offsets: int64 [t, 2]: the [start, end) in characters of the answer that a token holds, [0, 0) where none;
        None where the row was tokenised already.
    """

    row: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor | None = None


@dataclass(frozen=True)
class Examples:
    """What was loaded, in the user's order.

    skipped: rows left out because max_length cut off their whole answer.
    without_span: forget examples with no sensitive token (none marked, or all cut off).
    """

    examples: list[Example]
    skipped: int
    without_span: int


def load_forget(source: Any, tokenizer: PreTrainedTokenizerBase | None, *, max_length: int) -> Examples:
    """Load the forget set: the answers to unlearn.

    source: a path to JSONL, CSV or Parquet (palu.files), an iterable of mappings (list of dicts, datasets.Dataset),
        or a mapping {"input_ids": [B, T], "labels": [B, T], "attention_mask": [B, T]} (the mask is optional).
    tokenizer: a fast tokenizer; None will do if the rows are tokenised already.
    max_length: tokens kept per example, counted from the left.

    A run of neighbouring sensitive tokens is one span to the losses, so spans parted only by a blank
    ("Ada", "Lovelace") act as one. A sensitive label that equals the end-of-sequence token stays
    here; palu.prefix_mask drops it.

    Raises DataError, before anything is returned, if any row is unusable, if max_length cuts off
    every answer, or if no sensitive token is left; FileNotFoundError for a missing file.
    """
    loaded = _load(source, tokenizer, max_length, forget=True)
    if not loaded.examples:
        raise DataError("forget set is empty; give at least one row")
    if loaded.without_span == len(loaded.examples):
        reach = f"the first {max_length} tokens of any row"
        raise DataError(f"forget set has no sensitive token in {reach}; mark spans or raise max_length")
    return loaded


def load_retain(source: Any, tokenizer: PreTrainedTokenizerBase | None, *, max_length: int) -> Examples:
    """Load the retain set: every answer token is labelled with its id; `spans` are ignored.

    Arguments and errors are load_forget's, but an empty set is returned as it is.
    """
    return _load(source, tokenizer, max_length, forget=False)


def text_rows(source: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """(how to name it in an error, its columns, its answer) for each row; the answer of a tokenised row is None.

    source, errors: load_forget's, which checks the rows further.
    """
    for _, where, columns in _rows(source, name):
        yield where, columns, None if "input_ids" in columns else _conversation(columns, where)[2]


def load_alternates(
    source: Any, tokenizer: PreTrainedTokenizerBase | None, examples: Sequence[Example], *, max_length: int
) -> list[Example]:
    """Load, for each example of a forget set, its question with the answer that the column `alternate` prefers.

    Arguments and errors are load_retain's; `examples` are what load_forget made of the same source, which is read
    again. Rows that load_forget skipped need no alternate answer that max_length leaves.
    """
    kept = {example.row for example in examples}
    texts = []
    for row, where, columns in _rows(source, "forget"):
        if "input_ids" in columns:
            raise DataError(f"{where}: a tokenised row has no alternate answer; give text with a column 'alternate'")
        alternate = columns.get("alternate")
        if alternate is None:
            raise DataError(f"{where}: column 'alternate' is missing; give the answer to prefer")
        _check_string(alternate, f"{where}: column 'alternate'")
        if not alternate.strip():
            raise DataError(f"{where}: column 'alternate' is blank; give the answer to prefer")
        if row in kept:
            replaced = _with_answer(columns, alternate)
            texts.append(_render(row, f"alternate answer of {where}", replaced, tokenizer, forget=False))
    encoded = _encode(texts, tokenizer, forget=False) if tokenizer is not None else iter(())
    alternates = []
    for text, full in zip(texts, encoded, strict=True):
        alternates.append(Example(full.row, full.input_ids[:max_length], full.labels[:max_length]))
        if bool((alternates[-1].labels == IGNORE).all()):
            problem = f"no token of it is among the first {max_length} of its row"
            raise DataError(f"{text.where}: {problem}; raise max_length")
    return alternates


def load_questions(source: Any, name: str) -> dict[int, str]:
    """Row -> what its answer answers: the last message before it, or the prompt. Tokenised rows have none.

    source, errors: as load_forget's (name: "forget") or load_retain's ("retain"), which check the rows further.
    """
    asked = {}
    for row, where, columns in _rows(source, name):
        if "input_ids" not in columns:
            conversation, _, _ = _conversation(columns, where)
            asked[row] = conversation[-2]["content"]
    return asked


def _with_answer(columns: Mapping[str, Any], answer: str) -> dict[str, Any]:
    """The row, which _conversation takes, with another answer."""
    if columns.get("messages") is not None:
        *before, last = columns["messages"]
        return {**columns, "messages": [*before, {**last, "content": answer}]}
    _, column = next(pair for pair in _TEXT_COLUMNS if all(one in columns for one in pair))
    return {**columns, column: answer}


def _load(source: Any, tokenizer: PreTrainedTokenizerBase | None, max_length: int, forget: bool) -> Examples:
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and the one before it), got {max_length}")
    check_tokenizer(tokenizer)
    name = "forget" if forget else "retain"
    vocab_size = None if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1

    # Tokenised rows are examples at once; texts wait, to be tokenised together.
    items: list[Example | _Text] = []
    for row, where, columns in _rows(source, name):
        if "input_ids" in columns:
            items.append(_from_tokens(row, where, columns, vocab_size, forget))
        else:
            items.append(_render(row, where, columns, tokenizer, forget))
    texts = [item for item in items if isinstance(item, _Text)]
    encoded = _encode(texts, tokenizer, forget) if tokenizer is not None else iter(())

    examples: list[Example] = []
    without_span = 0
    for item in items:
        full = next(encoded) if isinstance(item, _Text) else item
        offsets = None if full.offsets is None else full.offsets[:max_length]
        example = Example(full.row, full.input_ids[:max_length], full.labels[:max_length], offsets)
        if bool((example.labels != IGNORE).any()):
            examples.append(example)
            without_span += forget and not bool((example.labels >= 0).any())
    if items and not examples:
        reach = f"the first {max_length} tokens of any row"
        raise DataError(f"{name} set has no answer token in {reach}; raise max_length")
    return Examples(examples, skipped=len(items) - len(examples), without_span=without_span)


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError where this is neither a tokenizer of transformers nor None."""
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained")


# --- rows ---
def _rows(source: Any, name: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(row, how to name it in an error, its columns) for each row of the source."""
    if isinstance(source, str | os.PathLike):
        numbered: Iterable[tuple[str, Any]] = read_rows(Path(source), name)
    elif isinstance(source, Mapping):
        numbered = (("", columns) for columns in _transposed(source, name))
    elif isinstance(source, Iterable):
        numbered = (("", columns) for columns in source)
    else:
        raise DataError(
            f"{name} set is of type {type(source).__name__}; give a file's path, a list of dicts, "
            "a datasets.Dataset, or a mapping with input_ids and labels"
        )
    for row, (line, columns) in enumerate(numbered):
        where = f"{name} row {row}{line}"
        if not isinstance(columns, Mapping):
            raise DataError(f"{where}: a row must map column names to values, got {type(columns).__name__}")
        yield row, where, columns


def _transposed(source: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if "input_ids" not in source or "labels" not in source:
        raise DataError(
            f"{name} set is a mapping with {', '.join(map(str, source)) or 'nothing'}; give one split, "
            "a list of rows, or a mapping with input_ids and labels"
        )
    keys = [key for key in ("input_ids", "labels", "attention_mask") if source.get(key) is not None]
    columns = {key: source[key] for key in keys}
    sizes = {key: len(values) for key, values in columns.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise DataError(f"{name} set: columns differ in rows ({told}); give each the same number of rows")
    for row in range(sizes["input_ids"]):
        yield {key: values[row] for key, values in columns.items()}


# --- rows that are tokenised already ---
def _from_tokens(row: int, where: str, columns: Mapping[str, Any], vocab_size: int | None, forget: bool) -> Example:
    ids, labels = _integers(columns, "input_ids", where), _integers(columns, "labels", where)
    if len(labels) != len(ids):
        lengths = f"labels have {len(labels)} tokens, input_ids {len(ids)}"
        raise DataError(f"{where}: {lengths}; give one label per token")
    if columns.get("attention_mask") is not None:
        mask = _integers(columns, "attention_mask", where, any_dtype=True).bool()
        kept = mask.nonzero().flatten()
        if len(mask) != len(ids) or len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
            problem = f"attention_mask must be one run of ones in {len(ids)} tokens"
            raise DataError(f"{where}: {problem}; mask only padding")
        ids, labels = ids[mask], labels[mask]

    sentinels, known = ((IGNORE, ORDINARY), "-100, -200") if forget else ((IGNORE,), "-100")
    size = float("inf") if vocab_size is None else vocab_size
    mend = "use this tokenizer's ids"
    for position, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
        at = f"at token {position}"
        if label < 0 and label not in sentinels:
            raise DataError(f"{where}: label {label} {at} has no meaning; use {known} or the token's id")
        if label >= size:
            raise DataError(f"{where}: label {label} {at} is outside the vocabulary; {mend}")
        if not 0 <= token < size:
            raise DataError(f"{where}: input id {token} {at} is outside the vocabulary; {mend}")
        if label >= 0 and label != token:
            raise DataError(f"{where}: label {label} {at} is not its id ({token}); do not shift the labels")
    labels[0] = IGNORE  # nothing predicts the first token
    if bool((labels == IGNORE).all()):
        problem = "every label after the first token is -100"
        raise DataError(f"{where}: {problem}; label the answer or remove the row")
    return Example(row, ids, labels)


def _integers(columns: Mapping[str, Any], column: str, where: str, any_dtype: bool = False) -> torch.Tensor:
    """A private copy [t] of a column, int64 unless any_dtype."""
    if columns.get(column) is None:
        raise DataError(f"{where}: column '{column}' is missing; give input_ids and labels")
    try:
        tensor = torch.as_tensor(columns[column]).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError):  # strings, ragged lists, numbers beyond 64 bits
        problem = f"{column} must be int64, got other values"
        raise DataError(f"{where}: {problem}; give a flat list of integers") from None
    if tensor.dim() != 1 or len(tensor) == 0:
        problem = f"{column} must be one row of tokens, got shape {list(tensor.shape)}"
        raise DataError(f"{where}: {problem}; give [tokens]")
    if tensor.dtype != torch.int64 and not any_dtype:
        got = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{where}: {column} must be int64, got {got}; convert them")
    return tensor


# --- rows of text ---
@dataclass(frozen=True)
class _Text:
    """A rendered row: the answer is text[start:stop], spans are [start, end) in text.

    shift: from characters of the answer to those of text.
    """

    row: int
    where: str
    text: str
    start: int
    stop: int
    shift: int
    spans: list[tuple[int, int]]


def _render(
    row: int, where: str, columns: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, forget: bool
) -> _Text:
    if tokenizer is None:
        raise DataError(f"{where}: text needs a tokenizer; pass one, or give input_ids and labels")
    if not tokenizer.is_fast:
        mend = "load a fast one (one with a tokenizer.json)"
        raise DataError(f"{where}: a slow tokenizer gives no offsets; {mend}")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{where}: the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    conversation, prompt, answer = _conversation(columns, where)
    spans = _spans(columns, answer, where) if forget else []
    if tokenizer.chat_template is not None:
        text, start, stop, shift = _apply_template(conversation, answer, tokenizer, where)
    elif prompt is None:
        raise DataError(f"{where}: 'messages' need a chat template; set tokenizer.chat_template")
    else:
        text, start, stop, shift = prompt + answer, len(prompt), len(prompt + answer), len(prompt)
    return _Text(row, where, text, start, stop, shift, [(first + shift, end + shift) for first, end in spans])


def _conversation(columns: Mapping[str, Any], where: str) -> tuple[list[dict[str, Any]], str | None, str]:
    """The row as chat messages, as a plain prompt (None: the row has none), and its answer."""
    messages = columns.get("messages")
    pair = next((pair for pair in _TEXT_COLUMNS if all(column in columns for column in pair)), None)
    if messages is not None:
        if not (
            isinstance(messages, list | tuple)
            and len(messages) > 1
            and all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in messages)
            and messages[-1]["role"] == "assistant"
        ):
            raise DataError(f"{where}: column 'messages' must be {_MESSAGES}; put the answer there")
        for number, message in enumerate(messages):
            _check_string(message.get("content"), f"{where}: content of message {number}")
        conversation, prompt = [dict(message) for message in messages], None
        told = "content of the last message"
    elif pair is not None:
        for column in pair:
            _check_string(columns[column], f"{where}: column '{column}'")
        first, answer = columns[pair[0]], columns[pair[1]]
        prompt = f"Question: {first}\nAnswer: " if pair[0] == "question" else first
        told = f"column '{pair[1]}'"
        conversation = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    else:
        raise DataError(f"{where}: columns are {', '.join(map(str, columns)) or 'none'}; give {_COLUMNS}")
    if not conversation[-1]["content"].strip():
        raise DataError(f"{where}: {told} is blank; give an answer or remove the row")
    return conversation, prompt, conversation[-1]["content"]


def _check_string(value: Any, told: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{told} must be a string, got {type(value).__name__}; give text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can smuggle in half of a UTF-16 pair
        problem = f"has half a surrogate pair at character {error.start}"
        raise DataError(f"{told} {problem}; repair the text") from None


def _spans(columns: Mapping[str, Any], answer: str, where: str) -> list[tuple[int, int]]:
    """The row's spans, checked, narrowed to their outermost non-blank characters, in order."""
    spans = columns.get("spans")
    if spans is None:
        mend = "give [[start, end], ...], or [] if nothing is sensitive"
        raise DataError(f"{where}: column 'spans' is missing; {mend}")
    mend = "give [start, end) in characters of the answer"
    spans = spans.tolist() if hasattr(spans, "tolist") else spans
    if not isinstance(spans, list | tuple):
        got = type(spans).__name__
        raise DataError(f"{where}: column 'spans' must be a list of pairs, got {got}; {mend}")
    checked: list[tuple[int, int]] = []
    for span in spans:
        pair = span.tolist() if hasattr(span, "tolist") else span
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(isinstance(edge, Integral) and not isinstance(edge, bool) for edge in pair)
        ):
            raise DataError(f"{where}: span {pair!r} is not two integers; {mend}")
        start, end = int(pair[0]), int(pair[1])
        told = f"{where}: span [{start}, {end}]"
        if start >= end:
            raise DataError(f"{told} is empty or reversed; {mend}")
        if start < 0:
            raise DataError(f"{told} starts before the answer; {mend}")
        if end > len(answer):
            raise DataError(f"{told} ends after the answer ({len(answer)} characters); {mend}")
        if not answer[start:end].strip():
            raise DataError(f"{told} holds only whitespace; move it onto the words or remove it")
        checked.append((start, end))
    # A span within another repeats it (TOFU's annotations do) and changes no role. Two that cross are
    # a slip in somebody's arithmetic.
    checked.sort(key=lambda span: (span[0], -span[1]))
    outer = (0, 0)
    for span in checked:
        if span[0] < outer[1] < span[1]:
            raise DataError(f"{where}: spans {list(outer)} and {list(span)} overlap; merge or part them")
        outer = max(outer, span, key=lambda one: one[1])
    return [(end - len(answer[start:end].lstrip()), start + len(answer[start:end].rstrip())) for start, end in checked]


def _apply_template(
    conversation: list[dict[str, Any]], answer: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, int, int, int]:
    """(rendered text, start and stop of the answer in it, shift from answer to text characters).

    The answer's place is what changes when a mark takes its place. To search for the answer would go
    wrong where the template's own words contain it ("assistant", "user").
    """
    *before, last = conversation
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
        marked = str(tokenizer.apply_chat_template([*before, {**last, "content": _MARK}], tokenize=False))
    except Exception as error:  # a template is a program: it raises what it likes
        problem = f"the chat template fails ({error})"
        raise DataError(f"{where}: {problem}; mend the messages or the template") from error
    head, _, tail = marked.partition(_MARK)
    body = text[len(head) : len(text) - len(tail)]
    if head + body + tail != text or body.strip() != answer.strip():
        raise DataError(f"{where}: the chat template alters the answer; mend the answer or the template")
    shift = len(head) + (len(body) - len(body.lstrip())) - (len(answer) - len(answer.lstrip()))
    return text, len(head), len(head) + len(body), shift


# --- text to tokens ---
def _encode(texts: list[_Text], tokenizer: PreTrainedTokenizerBase, forget: bool) -> Iterator[Example]:
    """One Example, not yet truncated, per text."""
    templated = tokenizer.chat_template is not None
    eos = tokenizer.eos_token_id
    # all_special_ids lacks tokens such as <|eot_id|> that have no role name; an unknown token is
    # special by name only.
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id} | {eos}
    for begin in range(0, len(texts), _CHUNK):
        chunk = texts[begin : begin + _CHUNK]
        batch = tokenizer(
            [text.text for text in chunk], add_special_tokens=not templated,  # a template writes its own
            return_offsets_mapping=True, padding=False, truncation=False, verbose=False,
        )  # fmt: skip
        for number, text in enumerate(chunk):
            ids, pieces = batch["input_ids"][number], batch.tokens(number)
            offsets = _untrimmed(batch["offset_mapping"][number], text.text)
            inside = _answer_tokens(text, ids, offsets, special)
            # The answer's terminator is the first special token after it (blanks may come between).
            terminators = special if templated else {eos}
            after = inside[-1] + 1
            end = next((i for i in range(after, len(ids)) if ids[i] in terminators), None)
            ids = [*ids[:after], eos] if end is None else ids[: end + 1]

            labels = torch.tensor(ids, dtype=torch.int64)
            if forget:
                sensitive = _sensitive_tokens(text, inside, offsets, pieces)
                ordinary = torch.ones(len(ids), dtype=torch.bool)
                ordinary[sensitive] = False
                labels[ordinary] = ORDINARY
            labels[: max(inside[0], 1)] = IGNORE  # nothing predicts the first token
            held = torch.zeros(len(ids), 2, dtype=torch.int64)
            held[inside] = (torch.tensor([offsets[i] for i in inside]) - text.shift).clamp(min=0)
            yield Example(text.row, torch.tensor(ids, dtype=torch.int64), labels, held)


def _untrimmed(offsets: _Offsets, text: str) -> _Offsets:
    """Give the blanks that a tokenizer with trim_offsets=True (SmolLM2's) leaves out back to their tokens."""
    whole, reached = [], 0
    for start, end in offsets:
        whole.append((reached if text[reached:start].isspace() else start, end))
        reached = max(reached, end)
    return whole


def _answer_tokens(text: _Text, ids: list[int], offsets: _Offsets, special: set[int]) -> list[int]:
    """Indices of the tokens that hold a character of the answer, never empty.

    Some special tokens swallow neighbouring blanks (lstrip, rstrip): these still are no answer tokens.
    """
    inside = [
        i
        for i, (start, end) in enumerate(offsets)
        if start < end and start < text.stop and end > text.start
        and (ids[i] not in special or text.text[max(start, text.start) : min(end, text.stop)].strip())
    ]  # fmt: skip
    if not inside:
        problem = "the tokenizer gives the answer no token"
        raise DataError(f"{text.where}: {problem}; mend the answer or remove the row")
    return inside


def _sensitive_tokens(text: _Text, inside: list[int], offsets: _Offsets, pieces: list[str]) -> list[int]:
    """Indices of the answer's tokens that hold a character of a span."""
    found: set[int] = set()
    for first, end in text.spans:
        held = {i for i in inside if offsets[i][0] < end and offsets[i][1] > first}
        # Some tokenizers put a space ("▁" or "Ġ") before a text. It is not in the text, so it borrows
        # the offsets of the word that follows, but says nothing of it.
        blanks = {i for i in held if pieces[i] in ("▁", "Ġ")}
        held -= {i for i in blanks if text.text[slice(*offsets[i])].strip(f" {pieces[i]}")}
        if not held:
            problem = f"the tokenizer gives {text.text[first:end]!r} in the answer no token"
            raise DataError(f"{text.where}: {problem}; move or remove its span")
        found |= held
    return sorted(found)
