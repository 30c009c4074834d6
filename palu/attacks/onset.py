"""Supply the onset: the first true tokens of a secret, put into the answer or into the question."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from palu.attacks.attack import Attack, Finding, Victim, found_in
from palu.attacks.secrets import AuditData, Secret
from palu.data.matching import stands_in
from palu.data.rows import with_question
from palu.models.lora import CausalLM


@dataclass(frozen=True)
class OnsetInAnswer(Attack):
    """The true answer up to the first j tokens of the secret, for each j: is what follows the rest of the secret?

    Greedy decoding writes the rest if, and only if, each of its tokens is the likeliest after the true ones before it;
    so one scored pass tells it for every j. Secrets of j tokens or fewer have no rest and do not count.
    """

    most: int
    key = "onset-answer"

    @property
    def budget(self) -> str:
        return f"the true answer up to the secret's first j = 0 ... {self.most} tokens; greedy from there"

    def run(self, victim: Victim) -> list[Finding]:
        scored = victim.secret_scores()
        findings = []
        for j in range(min(self.most, max(map(len, victim.data.secrets)) - 1) + 1):
            rests = [(log_p[j:], likeliest[j:]) if len(log_p) > j else None for log_p, likeliest in scored]
            sums = [None if rest is None else float(rest[0].sum()) for rest in rests]
            findings.append(
                Finding(
                    f"onset: {j} in the answer",
                    [None if rest is None else float(rest[1].all()) for rest in rests],
                    [None if value is None else {"log_probability": value} for value in sums],
                    {"mean log p": mean(value for value in sums if value is not None)},
                )
            )
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
        data = victim.data
        hints = [(j, i, hint) for j in self.counts for i, s in enumerate(data.secrets) if (hint := _hint(data, s, j))]
        asked = []
        for _, i, hint in hints:
            row = data.rows[data.secrets[i].row]
            asked.append(with_question(row.columns, f'{row.question} Hint: "{hint}..."'))
        written = victim.write(data.encode_prompts(asked))
        texts = {(j, i): text for (j, i, _), text in zip(hints, written, strict=True)}
        findings = []
        for j in sorted({j for j, _, _ in hints}):
            answers = [texts.get((j, i)) for i in range(len(data.secrets))]
            findings.append(found_in(f"onset: {j} in the question", data, answers))
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
