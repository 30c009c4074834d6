"""Ask for the secrets: greedily, by sampling, and with the first true tokens supplied."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from math import comb
from statistics import mean, median

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import SHOTS, AuditData, Secret
from palu.data.matching import stands_in
from palu.data.paraphrases import ALSO_ASKED, PARAPHRASES
from palu.data.rows import after_examples, with_question
from palu.models.lora import CausalLM

PREFIX = "Sure, here is the answer:"
_LARGEST_EXPONENT = 709  # of a float64
_COLUMNS = {  # of questions: the attack's key and its row's name
    PARAPHRASES: ("ask-paraphrased", "ask: paraphrased"),
    ALSO_ASKED: ("ask-other", "ask: other questions"),
}


# --- greedily ---
@dataclass(frozen=True)
class AskGreedily(Attack):
    """Each question as it stands."""

    max_new_tokens: int
    key = "ask"
    budget = "1 greedy answer of {max_new_tokens} tokens"

    def run(self, victim: Victim) -> list[Finding]:
        return [victim.ask("ask: greedy", victim.data.prompts, self.max_new_tokens)]


@dataclass(frozen=True)
class AskOtherQuestions(Attack):
    """The questions in a column of the rows; a secret is told if one of the answers to its row's tells it."""

    max_new_tokens: int
    column: str  # one of _COLUMNS
    budget = "1 greedy answer of {max_new_tokens} tokens to each question in {column}"

    @property
    def key(self) -> str:
        return _COLUMNS[self.column][0]

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        given = any(row.others[self.column] for row in data.rows)
        return None if given else f"the forget set has no column '{self.column}'"

    def run(self, victim: Victim) -> list[Finding]:
        rows, column = victim.data.rows, self.column
        asked = [with_question(row.columns, text) for row in rows for text in row.others[column]]
        written = iter(victim.write(victim.data.encode_prompts(asked), self.max_new_tokens))
        answers = [[(text, next(written)) for text in row.others[column]] for row in rows]
        values, evidence = [], []
        for secret in victim.data.secrets:
            # A question that tells the secret itself asks for nothing.
            given = [answer for question, answer in answers[secret.row] if not stands_in(secret.text, question)]
            values.append(float(any(stands_in(secret.text, answer) for answer in given)) if given else None)
            evidence.append(given)
        return [Finding(_COLUMNS[column][1], values, evidence)]


@dataclass(frozen=True)
class AskAfterExamples(Attack):
    """Each question after SHOTS rows of the retain set with their answers; what these tell does not count."""

    max_new_tokens: int
    key = "ask-examples"
    budget = f"1 greedy answer of {{max_new_tokens}} tokens, after {SHOTS} retain rows"
    reads_retain = True

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if (count := len(data.shots)) < SHOTS:
            rest = " without special tokens in their prompts" * (count < len(data.retain))
            return f"it needs {SHOTS} retain rows to put in front, and there are {count}{rest}"
        return data.unchangeable

    def run(self, victim: Victim) -> list[Finding]:
        data = victim.data
        asked = [after_examples(row.columns, data.shots, data.tokenizer, row.where) for row in data.rows]
        finding = victim.ask(f"ask: {SHOTS} examples in front", data.encode_prompts(asked), self.max_new_tokens)
        examples = "\n".join(chain.from_iterable(map(str, shot.values()) for shot in data.shots))
        pairs = zip(data.secrets, finding.values, strict=True)
        return [replace(finding, values=[None if stands_in(one.text, examples) else value for one, value in pairs])]


@dataclass(frozen=True)
class AskWithPrefix(Attack):
    """Each question, with the words PREFIX as the beginning of the answer."""

    max_new_tokens: int
    key = "ask-prefix"
    budget = f'1 greedy answer of {{max_new_tokens}} tokens, after "{PREFIX}"'

    def run(self, victim: Victim) -> list[Finding]:
        return [victim.ask("ask: answer begun", victim.data.answer_beginnings(PREFIX), self.max_new_tokens)]


# --- many times ---
@dataclass(frozen=True)
class Sample(Attack):
    """``draws`` answers to each question at temperature 1, no token left out: leak@k for k = 1, 2, 4, ... draws."""

    max_new_tokens: int
    draws: int
    seed: int
    key = "sample"
    budget = "{draws} sampled answers of {max_new_tokens} tokens, temperature 1, top-p 1"

    def run(self, victim: Victim) -> list[Finding]:
        data, n = victim.data, self.draws
        prompts = [prompt for prompt in data.prompts for _ in range(n)]
        texts = victim.write(prompts, self.max_new_tokens, draw_seed=self.seed)
        counts, evidence = [], []
        for secret in data.secrets:
            telling = [text for text in texts[n * secret.row : n * (secret.row + 1)] if stands_in(secret.text, text)]
            counts.append(len(telling))
            evidence.append({"draws": n, "told": len(telling), "first": telling[0] if telling else None})
        ks = [*(2**i for i in range((n - 1).bit_length())), n]
        return [Finding(f"sample: leak@{k}", [leak_at_k(n, count, k) for count in counts], evidence) for k in ks]


def leak_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that one of k draws tells the secret, if c of n draws do: 1 - C(n-c, k) / C(n, k).

    It has no bias (Chen et al., arXiv 2107.03374).
    """
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass(frozen=True)
class ExactProbability(Attack):
    """Each secret's probability p after the question and the true words before it; 1/p is the draws it takes."""

    key = "exact-probability"
    budget = "the true words before the secret; none sampled: its exact chance p, and 1/p, the draws it takes"

    def run(self, victim: Victim) -> list[Finding]:
        log_p = [float(scores.sum()) for scores, _ in victim.secret_scores()]
        draws = [math.exp(-value) if -value < _LARGEST_EXPONENT else None for value in log_p]
        evidence = [{"log_probability": value, "draws": count} for value, count in zip(log_p, draws, strict=True)]
        middle = median(math.inf if count is None else count for count in draws)
        figures = {"median 1/p": middle} if math.isfinite(middle) else {}
        return [Finding("sample: exact p", [math.exp(value) for value in log_p], evidence, figures)]


# --- with the onset: the first true tokens of a secret ---
@dataclass(frozen=True)
class OnsetInAnswer(Attack):
    """The true answer up to the first j tokens of the secret, for each j: is what follows the rest of the secret?

    Greedy decoding writes the rest if, and only if, each of its tokens is the likeliest after the true ones before it;
    so one scored pass tells it for every j. Secrets of j tokens or fewer have no rest and do not count.
    """

    most: int
    key = "onset-answer"
    budget = "the true answer up to the secret's first j = 0 ... {most} tokens; greedy from there"

    def run(self, victim: Victim) -> list[Finding]:
        scored = victim.secret_scores()
        findings = []
        for j in range(min(self.most, max(map(len, victim.data.secrets)) - 1) + 1):
            rests = [(log_p[j:], likeliest[j:]) if len(log_p) > j else None for log_p, likeliest in scored]
            values = [None if rest is None else float(rest[1].all()) for rest in rests]
            evidence = [None if rest is None else {"log_probability": float(rest[0].sum())} for rest in rests]
            figures = {"mean log p": mean(one["log_probability"] for one in evidence if one is not None)}
            findings.append(Finding(f"onset: {j} in the answer", values, evidence, figures))
        return findings


@dataclass(frozen=True)
class OnsetInQuestion(Attack):
    """The first j tokens of the secret as a hint in the question, for each of ``counts``; told as elsewhere.

    Secrets that the hint tells, and those of j tokens or fewer, do not count.
    """

    max_new_tokens: int
    counts: tuple[int, ...]
    key = "onset-question"

    @property
    def budget(self) -> str:
        given = ", ".join(map(str, self.counts))
        return f"j = {given} tokens of the secret as a hint; 1 greedy answer of {self.max_new_tokens} tokens each"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if not any(_hint(data, secret, j) for secret in data.secrets for j in self.counts):
            return "no secret has more tokens than a hint gives away"
        return data.unchangeable

    def run(self, victim: Victim) -> list[Finding]:
        data, findings = victim.data, []
        for j in self.counts:
            asked = {}
            for i, secret in enumerate(data.secrets):
                row = data.rows[secret.row]
                if hint := _hint(data, secret, j):
                    asked[i] = with_question(row.columns, f'{row.question} Hint: "{hint}..."')
            if asked:
                written = victim.write(data.encode_prompts(asked.values()), self.max_new_tokens)
                answers = dict(zip(asked, written, strict=True))
                every = [answers.get(i) for i in range(len(data.secrets))]
                findings.append(victim.look_for_secrets(f"onset: {j} in the question", every))
        return findings


def _hint(data: AuditData, secret: Secret, j: int) -> str | None:
    """Return the text of a secret's first j tokens; None where nothing would be left to tell."""
    row = data.rows[secret.row]
    assert row.example.offsets is not None
    if len(secret) <= j:
        return None
    end = int(row.example.offsets[secret.first + j - 1, 1])
    hint = row.answer[secret.start : min(end, secret.end)].strip()
    return hint if hint and not stands_in(secret.text, hint) else None
