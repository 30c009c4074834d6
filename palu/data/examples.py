"""Load forget and retain sets as tokenised examples, from a file, rows or tensors."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any

from palu.data.duplicates import NAMED, RowHashes, warn_of_repeats
from palu.data.files import DataError
from palu.data.ragged import Ragged, RaggedSequence
from palu.data.rows import RenderedRow, Renderer, check_string, iterate_rows, with_answer
from palu.data.tokenize import IGNORE, Example, check_tokenizer, encode, from_tokens
from palu.settings import template_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ExampleRows(RaggedSequence[Example]):
    """Many examples, of which each is made when it is asked for: 16 bytes for each token (8 of these its offsets)."""

    def __init__(self) -> None:
        self.rows, self.input_ids, self.labels, self.offsets = array("q"), Ragged(), Ragged(), Ragged()

    def append(self, example: Example) -> None:
        """Add an example; only while the sequence is built."""
        self.rows.append(example.row)
        self.input_ids.append(example.input_ids)
        self.labels.append(example.labels)
        self.offsets.append(() if example.offsets is None else example.offsets.flatten())

    def make(self, i: int) -> Example:
        offsets = self.offsets[i].view(-1, 2)
        return Example(self.rows[i], self.input_ids[i], self.labels[i], offsets if len(offsets) else None)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Examples:
    """A loaded set, in the user's order."""

    examples: Sequence[Example]
    source: Any  # what it was loaded from, to be read again; of an iterator, its rows
    loaded_with: dict[str, Any]  # ``set`` ("forget" or "retain"), ``max_length`` and ``chat_template_kwargs``
    skipped: int  # rows left out because max_length cut off their whole answer
    without_span: int  # forget examples in which no token is sensitive, cut off or not
    cut_rows: tuple[int, ...]  # forget rows of which max_length cuts off a sensitive token, skipped ones among them
    all_spans_cut: int  # forget examples that have lost every sensitive token
    told_by_question: int  # spans left out because their text stands in the question
    spans_length: int  # the max_length that would cut off no sensitive token of these rows; 0 where there are none
    hashes: RowHashes  # of all rows, those left out among them


def load_forget(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    allow_cut_spans: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    warn: bool = False,
    positions: int | None = None,
) -> Examples:
    """Load the forget set: the answers to unlearn.

    source: a path to JSONL, JSON, CSV, TSV or Parquet (palu.data.files), an iterable of mappings (list of dicts,
        datasets.Dataset), a pandas.DataFrame, or a mapping {"input_ids": [B, T], "labels": [B, T],
        "attention_mask": [B, T]} (the mask is optional); or what an earlier call returned, which is not read again.
    tokenizer: a fast tokenizer; None will do if the rows are tokenised already.
    max_length, allow_cut_spans, chat_template_kwargs: see palu.settings.RunSettings.
    warn: of rows that repeat an earlier one or have nothing to forget, of spans that the question tells or that stand
        in the answer again, and, once, of a prompt that is not as generation gives it (palu.data.rows.Renderer).
    positions: how many the model has, if they are limited: a larger max_length would not help.

    A run of neighbouring sensitive tokens is one span to the losses, so spans parted only by a blank act as one. A
    sensitive label that equals the end-of-sequence token stays here; palu.prefix_mask drops it.

    Raises DataError if any row is unusable, if max_length cuts off every answer, if no sensitive token is left, or if
    one is cut off and allow_cut_spans is False; FileNotFoundError for a missing file; ValueError where source was
    loaded with other settings, or as the retain set.
    """
    loaded = _load(source, tokenizer, max_length, chat_template_kwargs, warn, positions, forget=True)
    if not loaded.examples:
        raise DataError("forget set is empty; give at least one row")
    fix = _room_for(loaded.spans_length, positions)
    if loaded.cut_rows and not allow_cut_spans:
        raise DataError(
            f"forget set: max_length = {max_length} cuts off spans of {_named(loaded.cut_rows)}, which would not be "
            f"forgotten; {fix}, or allow_cut_spans = True to go on without them"
        )
    if loaded.without_span + loaded.all_spans_cut == len(loaded.examples):
        reach = f" in the first {max_length} tokens of any row" if loaded.cut_rows else ""
        mark = "mark spans" + " that the question does not tell" * (loaded.told_by_question > 0)
        raise DataError(f"forget set has no sensitive token{reach}; {fix if loaded.cut_rows else mark}")
    return loaded


def load_retain(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    warn: bool = False,
    positions: int | None = None,
) -> Examples:
    """Load the retain set: every answer token is labelled with its id; `spans` are ignored.

    Arguments and errors are load_forget's, but for spans, and an empty set is returned as it is.
    """
    return _load(source, tokenizer, max_length, chat_template_kwargs, warn, positions, forget=False)


def answer_examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Example]:
    """Tokenise rows of text, each with its name in errors: whole, every answer token labelled with its id.

    Raises DataError where a row or the tokenizer cannot be used.
    """
    check_tokenizer(tokenizer)
    renderer = Renderer(tokenizer, chat_template_kwargs)
    texts = (renderer.render(i, where, columns, forget=False) for i, (where, columns) in enumerate(rows))
    return list(encode(texts, tokenizer, forget=False))


def load_alternates(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Example],
    *,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    positions: int | None = None,
) -> Sequence[Example]:
    """Load the preferred answers of a forget set: each question with the text of its column `alternate`.

    Arguments and errors are load_retain's; `examples` are what load_forget made of the same source, which is read
    again. Rows that load_forget skipped need no alternate answer that max_length leaves.
    """
    check_tokenizer(tokenizer)
    renderer = Renderer(tokenizer, chat_template_kwargs)
    kept = {example.row for example in examples}

    def rendered() -> Iterator[RenderedRow]:
        for row, where, columns in iterate_rows(source, "forget"):
            if "input_ids" in columns:
                fix = "give text with a column 'alternate'"
                raise DataError(f"{where}: a tokenised row has no alternate answer; {fix}")
            alternate = columns.get("alternate")
            if alternate is None:
                raise DataError(f"{where}: column 'alternate' is missing; give the answer to prefer")
            check_string(alternate, f"{where}: column 'alternate'")
            if not alternate.strip():
                raise DataError(f"{where}: column 'alternate' is blank; give the answer to prefer")
            if row in kept:
                replaced = with_answer(columns, alternate)
                yield renderer.render(row, f"alternate answer of {where}", replaced, forget=False)

    alternates = ExampleRows()
    named, texts = tee(rendered())
    for text, full in zip(named, encode(texts, tokenizer, forget=False), strict=True):
        example = full.cut(max_length)
        if bool((example.labels == IGNORE).all()):
            problem = f"no token of it is among the first {max_length} of its row"
            raise DataError(f"{text.where}: {problem}; {_room_for(len(full.input_ids), positions)}")
        alternates.append(example)
    return alternates


def _load(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    warn: bool,
    positions: int | None,
    forget: bool,
) -> Examples:
    check_tokenizer(tokenizer)
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 (a token and the one before it), got {max_length}")
    name = "forget" if forget else "retain"
    kwargs = template_kwargs(chat_template_kwargs)
    loaded_with = {"set": name, "max_length": max_length, "chat_template_kwargs": kwargs}
    if isinstance(source, Examples):
        for setting, value in loaded_with.items():
            if (was := source.loaded_with[setting]) != value:
                raise ValueError(f"{name} set was loaded with {setting} = {was!r}, not {value!r}; load it again")
        return source

    renderer = Renderer(tokenizer, chat_template_kwargs, check_prompts=warn)
    examples, hashes = ExampleRows(), RowHashes()
    cut_rows: list[int] = []
    unmarked: list[int] = []  # rows in which nothing is sensitive
    all_spans_cut = spans_length = skipped = longest = 0
    rows, source = tee(source) if isinstance(source, Iterator) else (source, source)  # to be read again
    for full in _tokenised(rows, renderer, name):
        hashes.append(full)
        longest = max(longest, len(full.input_ids))
        if answered := full.answer_start < max_length:
            examples.append(full.cut(max_length))
        skipped += not answered
        if not forget:
            continue
        sensitive = (full.labels >= 0).nonzero().flatten().tolist()
        if not sensitive:
            unmarked += [full.row] * answered
        elif sensitive[-1] >= max_length:
            cut_rows.append(full.row)
            all_spans_cut += answered and sensitive[0] >= max_length
            spans_length = max(spans_length, sensitive[-1] + 1)
    if skipped and not examples:
        reach = f"the first {max_length} tokens of any row"
        raise DataError(f"{name} set has no answer token in {reach}; {_room_for(longest, positions)}")
    if warn:
        warn_of_repeats(hashes, name)
        _warn_of_spans(renderer.told_by_question, "in the question already, so kept like other words")
        again = "in the answer again, unmarked, so kept; give each way in which it is written as a secret"
        _warn_of_spans(renderer.repeated_unmarked, again)
        if 0 < len(unmarked) < len(examples):
            problem = f"no token is to be forgotten in {_named(unmarked)}, so a loss on spans keeps what is said there"
            warnings.warn(f"forget set: {problem}; mark what is to go, or leave such rows out", stacklevel=2)
    source = list(source) if isinstance(source, Iterator) else source
    return Examples(
        examples,
        source,
        loaded_with,
        skipped,
        len(unmarked),
        tuple(cut_rows),
        all_spans_cut,
        len(renderer.told_by_question),
        spans_length,
        hashes,
    )


def _warn_of_spans(found: Sequence[tuple[str, str]], what: str) -> None:
    if found:
        spans = "a marked span stands" if len(found) == 1 else f"{len(found)} marked spans stand"
        named = "; ".join(f"{where}: {text!r}" for where, text in found[:NAMED]) + "; ..." * (len(found) > NAMED)
        warnings.warn(f"{spans} {what} ({named})", stacklevel=2)


def _named(rows: Sequence[int]) -> str:
    """Return how many rows these are, and the first of them."""
    first = ", ".join(map(str, rows[:NAMED])) + ", ..." * (len(rows) > NAMED)
    return f"{len(rows)} row{'s' * (len(rows) > 1)} ({first})"


def _room_for(tokens: int, positions: int | None) -> str:
    """Say how rows of so many tokens are not cut off, by a model of so many positions."""
    if positions is None or tokens <= positions:
        return f"set max_length = {tokens}"
    return f"the model has {positions} positions, so shorten the rows"


def _tokenised(source: Any, renderer: Renderer, name: str) -> Iterator[Example]:
    """Yield each row as an example, not yet truncated."""
    tokenizer, forget = renderer.tokenizer, name == "forget"
    vocab_size = None if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    rows = (
        from_tokens(row, where, columns, vocab_size, forget)
        if "input_ids" in columns
        else renderer.render(row, where, columns, forget)
        for row, where, columns in iterate_rows(source, name)
    )
    return encode(rows, tokenizer, forget=forget)
