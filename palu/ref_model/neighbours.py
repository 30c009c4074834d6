"""Neighbours: questions like those to be forgotten, about other things, which the reference writes itself.

What stands next to a secret is the first to go with it: a model that forgets who wrote one play forgets who wrote the
others. So before the first step the reference continues a list that begins with a forget question, after the first
words of that question ("Who wrote" ...). Any tokenizer will do, and no chat template is needed. The reference then
answers what it has written as it answers everyday prompts (:mod:`palu.ref_model.anchors`), and the KL keeps these
answers. Questions and answers that tell a secret are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from palu.data.matching import stands_in
from palu.models.generation import encode_prompts

QUESTION_TOKENS = 24  # of what the reference adds to the first words
TOP_P = 0.8  # drawn from are the likeliest tokens, of this probability together
MOST = 512  # questions that are written in all, but at least one a row
MOST_WORDS = 40  # of a forget question; a longer one is a document's beginning, or a task

_LIST = "Questions of one kind about different things:\n1. {question}\n2. {start}"
_PARAPHRASES = "The same question in other words:\n1. {question}\n2."


class Start(NamedTuple):
    """The beginning of a question that the reference is to write."""

    words: str
    end: str  # the mark that ends the question; "" where the line does
    prompt: Tensor  # int64 [t]: a list of questions, up to these words
    item: int  # of the forget set, with whose question the list begins


class Question(NamedTuple):
    """A question to ask the reference."""

    prompt: Tensor  # int64 [t]
    items: list[int]  # of the forget set: it is a neighbour or a paraphrase of their questions


class NeighbourPrompts(NamedTuple):
    """What the reference is to continue, and what must not be in it."""

    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: Mapping[str, object] | None  # for the questions, once they are written
    starts: Sequence[Start]
    questions: Mapping[int, str]  # of the forget set's items
    secrets: Sequence[str]  # texts that no neighbour may tell
    variants: int = 0  # candidates a place from which the reference goes on; see :mod:`palu.ref_model.variants`
    paraphrases: Sequence[Start] = ()  # of the questions, for the reference to write
    given_paraphrases: Sequence[Question] = ()  # the rows' own

    def encode(self, starts: Sequence[Start], written: Sequence[Sequence[int]]) -> list[Question]:
        """Tokenise what was written after each start: each question once, without secrets."""
        found: dict[str, list[int]] = {}
        known = {*self.questions.values()}
        for start, ids in zip(starts, written, strict=True):
            before = start.prompt.tolist()  # decoded, too, since some tokenizers drop a text's first blank
            line = (start.words + self.decode([*before, *ids])[len(self.decode(before)) :]).partition("\n")[0]
            question, end, _ = line.partition(start.end) if start.end else (line, "", "")
            if end == start.end and question.strip() != start.words and not self.tells(question):
                found.setdefault(question.strip() + end, []).append(start.item)
        new = {question: items for question, items in found.items() if question not in known}
        prompts = encode_prompts(list(new), self.tokenizer, self.chat_template_kwargs)[0] if new else []
        return [Question(*both) for both in zip(prompts, new.values(), strict=True)]

    def tells(self, text: str) -> bool:
        """Whether a text tells a secret."""
        return any(stands_in(secret, text) for secret in self.secrets)

    def encode_text(self, text: str) -> Tensor:
        """Tokenise the beginning of a text: int64 [t]."""
        return _encode(text, self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def neighbour_prompts(
    questions: Mapping[int, str],
    secrets: Sequence[str],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, object] | None,
    *,
    variants: int = 0,
    paraphrases: Sequence[Question] = (),
) -> NeighbourPrompts:
    """Prepare ``count`` neighbours and ``variants`` paraphrases of each question of two to MOST_WORDS words.

    There are fewer of a question if they were more than MOST of all. ``questions``: of the forget set's items, by
    index. ``paraphrases``: the rows' own.
    """
    starts = _starts(questions, count, tokenizer)
    own = _starts(questions, variants, tokenizer, paraphrases=True)
    return NeighbourPrompts(tokenizer, chat_template_kwargs, starts, questions, secrets, variants, own, paraphrases)


def _starts(
    questions: Mapping[int, str], count: int, tokenizer: PreTrainedTokenizerBase, *, paraphrases: bool = False
) -> list[Start]:
    count = min(count, max(MOST // max(len(questions), 1), 1))
    found = []
    for item, question in questions.items():
        beginnings, template = _beginnings(question), _LIST
        if paraphrases:
            beginnings, template = [("", end) for _, end in beginnings[:1]], _PARAPHRASES
        for words, end in islice(cycle(beginnings), count):
            prompt = _encode(template.format(question=question, start=words), tokenizer)
            found.append(Start(words, end, prompt, item))
    return found


def _beginnings(question: str) -> list[tuple[str, str]]:
    """List (first words, closing mark) from which another question can go on: all but its last word, down to half."""
    words = question.split()
    if not 2 <= len(words) <= MOST_WORDS:
        return []
    end = "" if words[-1][-1].isalnum() else words[-1][-1]
    return [(" ".join(words[:count]), end) for count in range(len(words) - 1, -(-len(words) // 2) - 1, -1)]


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    ids = tokenizer(text).input_ids
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id  # some tokenizers end every text
    return torch.tensor(ids[:-1] if ends else ids, dtype=torch.int64)
