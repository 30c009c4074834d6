"""Turn rendered rows into tokens with labels: which tokens belong to the answer, and which of these to a span."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from palu.data.files import DataError
from palu.data.rows import RenderedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
ORDINARY = -200

CHUNK = 1024  # rows tokenised in one call: enough to keep the tokenizer's threads busy
_Offsets: TypeAlias = list[tuple[int, int]]  # each token's [start, end) in characters of the text


@dataclass(frozen=True)
class Example:
    """One tokenised row. labels[0] is always IGNORE: no logits predict the first token."""

    row: int  # position in the user's data, from 0 (blank lines of a file are not rows)
    input_ids: torch.Tensor  # int64 [t]
    labels: torch.Tensor  # int64 [t]: IGNORE, ORDINARY (forget only) or the token's own id
    # int64 [t, 2]: the [start, end) in characters of the answer that a token holds, [0, 0) where none; None where the
    # row was tokenised already
    offsets: torch.Tensor | None = None

    @property
    def answer_start(self) -> int:
        """Index of the answer's first token."""
        return int((self.labels != IGNORE).nonzero()[0])

    def cut(self, max_length: int) -> Example:
        """Return the first ``max_length`` tokens."""
        offsets = None if self.offsets is None else self.offsets[:max_length]
        return Example(self.row, self.input_ids[:max_length], self.labels[:max_length], offsets)

    def whole_answer(self) -> Example:
        """Return it with every token of the answer labelled with its id."""
        return replace(self, labels=self.input_ids.where(self.labels != IGNORE, IGNORE))


def check_tokenizer(tokenizer: Any) -> None:
    """Raise TypeError where this is neither a tokenizer of transformers nor None."""
    from transformers import PreTrainedTokenizerBase

    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained")


def from_tokens(row: int, where: str, columns: Mapping[str, Any], vocab_size: int | None, forget: bool) -> Example:
    ids, labels = _integers(columns, "input_ids", where), _integers(columns, "labels", where)
    if len(labels) != len(ids):
        raise DataError(f"{where}: labels have {len(labels)} tokens, input_ids {len(ids)}; give one label per token")
    begin = 0  # of what is not padding
    if columns.get("attention_mask") is not None:
        mask = _integers(columns, "attention_mask", where, any_dtype=True).bool()
        kept = mask.nonzero().flatten()
        if len(mask) != len(ids) or len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
            raise DataError(f"{where}: attention_mask must be one run of ones in {len(ids)} tokens; mask only padding")
        ids, labels, begin = ids[mask], labels[mask], int(kept[0])

    sentinels, known = ((IGNORE, ORDINARY), "-100, -200") if forget else ((IGNORE,), "-100")
    size = 2**31 if vocab_size is None else vocab_size  # int32 holds them
    fix = "use this tokenizer's ids"
    for position, (token, label) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True), begin):
        at = f"at token {position}"
        if label < 0 and label not in sentinels:
            raise DataError(f"{where}: label {label} {at} has no meaning; use {known} or the token's id")
        if label >= size:
            raise DataError(f"{where}: label {label} {at} is outside the vocabulary; {fix}")
        if not 0 <= token < size:
            raise DataError(f"{where}: input id {token} {at} is outside the vocabulary; {fix}")
        if label >= 0 and label != token:
            raise DataError(f"{where}: label {label} {at} is not its id ({token}); do not shift the labels")
    first, labels[0] = int(labels[0]), IGNORE  # nothing predicts the first token
    if bool((labels == IGNORE).all()):
        raise DataError(f"{where}: every label after the first token is -100; label the answer or remove the row")
    if forget and first >= 0 and labels[1] < 0:  # a span of this token alone
        problem = "nothing stands before token 0, so nothing predicts it"
        raise DataError(f"{where}: {problem}; label it -100, or give the tokens before it")
    return Example(row, ids, labels)


def _integers(columns: Mapping[str, Any], column: str, where: str, any_dtype: bool = False) -> torch.Tensor:
    """Copy a column as a tensor [t], int64 unless any_dtype."""
    if columns.get(column) is None:
        raise DataError(f"{where}: column '{column}' is missing; give input_ids and labels")
    try:
        tensor = torch.as_tensor(columns[column]).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError):  # strings, ragged lists, numbers beyond 64 bits
        raise DataError(f"{where}: {column} must be int64, got other values; give a flat list of integers") from None
    if tensor.dim() != 1 or len(tensor) == 0:
        raise DataError(f"{where}: {column} must be one row of tokens, got shape {list(tensor.shape)}; give [tokens]")
    if tensor.dtype != torch.int64 and not any_dtype:
        got = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{where}: {column} must be int64, got {got}; convert them")
    return tensor


def encode(
    rows: Iterable[Example | RenderedRow], tokenizer: PreTrainedTokenizerBase | None, *, forget: bool
) -> Iterator[Example]:
    """Tokenise and label rendered rows: one Example per row, not yet truncated. Examples stay as they are."""
    rows = iter(rows)
    eos: Any = getattr(tokenizer, "eos_token_id", None)
    special: set[int] = set()
    if tokenizer is not None:
        # all_special_ids lacks tokens such as <|eot_id|> that have no role name; an unknown token is special by name
        # only.
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special = (special | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id} | {eos}
    while chunk := list(islice(rows, CHUNK)):
        encodings: dict[int, tuple[list[int], list[str], _Offsets]] = {}
        for complete in (False, True):
            texts = {i: row for i, row in enumerate(chunk) if isinstance(row, RenderedRow) and row.complete is complete}
            if not texts:
                continue
            assert tokenizer is not None  # else nothing would have been rendered
            batch = tokenizer(
                [text.text for text in texts.values()], add_special_tokens=not complete,
                return_offsets_mapping=True, padding=False, truncation=False, verbose=False,
            )  # fmt: skip
            for place, i in enumerate(texts):
                encodings[i] = batch["input_ids"][place], batch.tokens(place), batch["offset_mapping"][place]
        for i, text in enumerate(chunk):
            if isinstance(text, Example):
                yield text
                continue
            ids, pieces, trimmed = encodings[i]
            offsets = _untrimmed(trimmed, text.text)
            inside = _answer_tokens(text, ids, offsets, special)
            # The answer's terminator is the first special token after it (blanks may come between).
            terminators = special if text.complete else {eos}
            after = inside[-1] + 1
            end = next((i for i in range(after, len(ids)) if ids[i] in terminators), None)
            ids = [*ids[:after], eos] if end is None else ids[: end + 1]

            labels = torch.tensor(ids, dtype=torch.int64)
            if forget:
                ordinary = torch.ones(len(ids), dtype=torch.bool)
                ordinary[_sensitive_tokens(text, inside, offsets, pieces)] = False
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


def _answer_tokens(text: RenderedRow, ids: list[int], offsets: _Offsets, special: set[int]) -> list[int]:
    """Find the tokens that hold a character of the answer: their indices, never empty.

    Some special tokens swallow neighbouring blanks (lstrip, rstrip): these still are no answer tokens.
    """
    inside = [
        i
        for i, (start, end) in enumerate(offsets)
        if start < end and start < text.stop and end > text.start
        and (ids[i] not in special or text.text[max(start, text.start) : min(end, text.stop)].strip())
    ]  # fmt: skip
    if not inside:
        raise DataError(f"{text.where}: the tokenizer gives the answer no token; correct the answer or remove the row")
    return inside


def _sensitive_tokens(text: RenderedRow, inside: list[int], offsets: _Offsets, pieces: list[str]) -> list[int]:
    """Find the answer's tokens that hold a character of a span: their indices."""
    found: set[int] = set()
    for first, end in text.spans:
        held = {i for i in inside if offsets[i][0] < end and offsets[i][1] > first}
        # Some tokenizers put a space ("▁" or "Ġ") before a text. It is not in the text, so it borrows
        # the offsets of the word that follows, but says nothing of it.
        blanks = {i for i in held if pieces[i] in ("▁", "Ġ")}
        held -= {i for i in blanks if text.text[slice(*offsets[i])].strip(f" {pieces[i]}")}
        if held == {0}:
            problem = f"nothing stands before {text.text[first:end]!r}, so nothing predicts its only token"
            raise DataError(f"{text.where}: {problem}; give a prompt, or a tokenizer that adds a BOS")
        if not held:
            problem = f"the tokenizer gives {text.text[first:end]!r} in the answer no token"
            raise DataError(f"{text.where}: {problem}; move or remove its span")
        found |= held
    return sorted(found)
