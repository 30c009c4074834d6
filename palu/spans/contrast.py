"""Find the words of an answer that carry the memory, by the model's own log-probabilities.

Only *new* words are asked for: a word that the question has, or the answer had before, is no secret. Of each word w
(all its tokens together, natural logarithms):

    base   = log p_bar(w),  p_bar: the mean of the model's next-token distributions over all words of all answers, each
             after an empty question and the answer's earlier words
    unit   = mean of -base over all words of all answers

    known  = log p(w | the question, the answer's earlier words) / unit
             near 0 where the model has the answer by heart, far below where it leaves w open
    rarity = -base / unit            low for words that any answer may have ("the", "of")
    name   = 1 if w begins with a capital, but not the answer or a sentence, or has a digit
    focus  = 1 if w is in a run of new, rare words that ends at a punctuation mark: what is new comes last in its clause
    place  = 0 to 1, how far into the answer w begins: what is new comes after what repeats the question

    w is sensitive if BIAS + WEIGHTS . (known, rarity, name, focus, place) > 0

Between two sensitive words that are names, up to three others are sensitive, too, unless a quotation mark, or
punctuation other than a colon, is among them: a title ("The Lord of the Rings") or a full name is one secret.

The division by ``unit`` makes the figures those of any vocabulary and of a set of any size. The weights are those of a
logistic regression (``benchmarks/bench_spans.py --fit``) on GPT-4o's spans in 200 rows of TOFU; that of ``known`` is
set by hand, since it has no spread where all rows are known by heart. The bias is the one at which seven in ten of the
words that are taken are marked: what a span takes in by mistake is unlearned, too.

Limits, beside those in docs/spans.md: ``name``, which weighs most, says nothing in scripts without capitals. What the
question gives away already is missed, and the second of two equal secrets in an answer. A Han or Kana character counts
as a word, since no blanks part words there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.rows import conversation_of, text_before
from palu.data.tokenize import IGNORE, Example
from palu.evaluate.scores import BATCH_TOKENS, check_model, token_scores
from palu.models.generation import eval_mode
from palu.models.head import head_of
from palu.models.lora import CausalLM, base_of

WEIGHTS = {"known": 2.0, "rarity": 0.53, "name": 2.51, "focus": 0.77, "place": 1.67}
BIAS = -2.27

_BRIDGE = 3  # words between two names of one title
_RARE = 0.8  # of the mean rarity: above it, a word is one of a run's
_IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_LETTER = rf"(?:(?!{_IDEOGRAPH})\w)"
_WORD = re.compile(rf"{_IDEOGRAPH}|{_LETTER}+(?:[-'\u2019./]{_LETTER}+)*")
_OPENING = " ('\"\u2018\u201c"
_STOPS = ".!?:\n\u3002\uff01\uff1f"
_BETWEEN_TITLES = re.compile("[.!?\n;,'\"\u2018\u2019\u201c\u201d\u3001\u3002\uff01\uff0c\uff1f]")
_POSSESSIVE = re.compile("['\u2019]s$")


@dataclass
class Word:
    """A word of an answer, answer[start:end], and its figures by the names of WEIGHTS."""

    start: int
    end: int
    new: bool
    figures: dict[str, float]

    @property
    def score(self) -> float:
        """Log-odds that the word is sensitive, if it is new, with the threshold at 0."""
        return BIAS + sum(weight * self.figures[name] for name, weight in WEIGHTS.items())

    @property
    def sensitive(self) -> bool:
        return self.new and self.score > 0


def contrast_words(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[Word]]:
    """Score every word of the answers of rows of text, (name in errors, columns) each, in two teacher-forced passes.

    Raises DataError for a row that cannot be used, TypeError or ValueError for a model that cannot be scored.
    """
    names = [name for name, _ in rows]
    read = [conversation_of(columns, name) for name, columns in rows]
    asked = [(text_before(conversation), answer) for conversation, _, answer in read]  # what was asked is no secret
    full = answer_examples(rows, tokenizer, chat_template_kwargs)
    without = [(name, {"question": "", "answer": answer}) for name, (_, answer) in zip(names, asked, strict=True)]
    bare = answer_examples(without, tokenizer, chat_template_kwargs)

    check_model(model, tokenizer, full, names)
    base_model = base_of(model)
    marginal = torch.zeros(len(head_of(model).weight), device=model.device)
    with tqdm(total=2 * len(rows), desc="contrast", disable=not progress, leave=False) as bar, eval_mode(base_model):
        known = token_scores(base_model, full, names, batch_tokens=batch_tokens, bar=bar)
        token_scores(base_model, bare, names, batch_tokens=batch_tokens, bar=bar, marginal=marginal)
    base = (marginal / marginal.sum()).log().cpu()

    answers = []
    for (question, answer), example, score, blank in zip(asked, full, known, bare, strict=True):
        words = split_words(question, answer)
        general = base[blank.input_ids[blank.labels != IGNORE]]
        sums = zip(_of_words(words, example, score.log_prob), _of_words(words, blank, general), strict=True)
        for word, (here, anywhere) in zip(words, sums, strict=True):
            word.figures = {"known": here, "rarity": -anywhere}
        answers.append(words)
    rarities = [word.figures["rarity"] for words in answers for word in words]
    unit = max(sum(rarities) / max(len(rarities), 1), 1e-6)
    for (_, answer), words in zip(asked, answers, strict=True):
        for word in words:
            word.figures = {name: figure / unit for name, figure in word.figures.items()}
        add_form_features(answer, words)
    return answers


def sensitive_spans(answer: str, words: Sequence[Word]) -> list[tuple[int, int]]:
    """Find the spans of an answer's sensitive words, bridging what is between two names: [start, end) each."""
    spans = [(word.start, word.end) for word in words if word.sensitive]
    names = [(number, word) for number, word in enumerate(words) if word.sensitive and word.figures["name"]]
    for (i, first), (j, last) in pairwise(names):
        if j - i <= _BRIDGE + 1 and not _BETWEEN_TITLES.search(answer, first.end, last.start):
            spans.append((first.start, last.end))
    return spans


def split_words(question: str, answer: str) -> list[Word]:
    """Split the answer into words, without figures yet."""
    seen = {form for match in _WORD.finditer(question) for form in _forms(match.group())}
    words = []
    for match in _WORD.finditer(answer):
        forms = _forms(match.group())
        words.append(Word(*match.span(), new=not forms & seen, figures={}))
        seen |= forms
    return words


def _forms(word: str) -> set[str]:
    """Return the word without case, with and without an English possessive."""
    word = word.casefold()
    return {word, _POSSESSIVE.sub("", word)}


def _of_words(words: Sequence[Word], example: Example, values: Tensor) -> list[float]:
    """Sum values [labelled tokens] over the tokens that hold a character of each word."""
    assert example.offsets is not None
    offsets = example.offsets[example.labels != IGNORE]
    starts, ends = offsets[:, 0], offsets[:, 1]
    return [float(values[(starts < word.end) & (ends > word.start)].sum()) for word in words]


def add_form_features(answer: str, words: Sequence[Word]) -> None:
    """Add the figures that need no model: name, focus, place."""
    in_focus = False  # whether the word behind is, in a run that this one may lengthen
    for number in range(len(words) - 1, -1, -1):
        word, text = words[number], answer[words[number].start : words[number].end]
        gap = answer[word.end : words[number + 1].start] if number + 1 < len(words) else "."
        before = answer[: word.start].rstrip(_OPENING)
        first = not before or before[-1] in _STOPS
        in_focus = word.new and word.figures["rarity"] > _RARE and (in_focus or bool(gap[:1].strip()))
        word.figures["name"] = float((text[0].isupper() and not first) or any(letter.isdigit() for letter in text))
        word.figures["focus"] = float(in_focus)
        word.figures["place"] = word.start / len(answer)
