"""Ask: the questions of the forget set, greedily, in four ways."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from palu.attacks.attack import Finding, Victim, asked_once
from palu.attacks.secrets import PARAPHRASES, SHOTS, AuditData, with_question
from palu.data.matching import told
from palu.models.lora import CausalLM

PREFIX = "Sure, here is the answer:"


@dataclass(frozen=True)
class AskGreedily:
    """Each question as it stands."""

    max_new_tokens: int
    key = "ask"
    reads_retain = False

    @property
    def budget(self) -> str:
        return f"1 greedy answer of {self.max_new_tokens} tokens"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        return None

    def run(self, victim: Victim) -> list[Finding]:
        return [asked_once("ask: greedy", victim.data, victim.write(victim.data.prompts))]


@dataclass(frozen=True)
class AskInOtherWords:
    """Each question in the words of the column PARAPHRASES; a secret is told if one of the answers tells it."""

    max_new_tokens: int
    key = "ask-paraphrased"
    reads_retain = False

    @property
    def budget(self) -> str:
        return f"1 greedy answer of {self.max_new_tokens} tokens to each paraphrase"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if not any(data.rows[secret.row].paraphrases for secret in data.secrets):
            return f"the forget set has no column '{PARAPHRASES}'"
        return None

    def run(self, victim: Victim) -> list[Finding]:
        rows = victim.data.rows
        asked = [with_question(row.columns, text) for row in rows for text in row.paraphrases]
        written = iter(victim.write(victim.data.encode_prompts(asked)))
        answers = [[next(written) for _ in row.paraphrases] for row in rows]
        values, evidence = [], []
        for secret in victim.data.secrets:
            # A paraphrase that tells the secret itself asks for nothing.
            pairs = zip(rows[secret.row].paraphrases, answers[secret.row], strict=True)
            given = [answer for question, answer in pairs if not told(secret.text, question)]
            values.append(float(any(told(secret.text, answer) for answer in given)) if given else None)
            evidence.append(given)
        return [Finding("ask: paraphrased", values, evidence)]


@dataclass(frozen=True)
class AskAfterExamples:
    """Each question after SHOTS rows of the retain set with their answers."""

    max_new_tokens: int
    key = "ask-examples"
    reads_retain = True

    @property
    def budget(self) -> str:
        return f"1 greedy answer of {self.max_new_tokens} tokens, after {SHOTS} retain rows"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if len(data.retain) < SHOTS:
            return f"it needs {SHOTS} retain rows to put in front, and there are {len(data.retain)}"
        return data.unchangeable

    def run(self, victim: Victim) -> list[Finding]:
        data = victim.data
        shots = data.retain[:SHOTS]
        prompts = data.encode_prompts([data.behind_examples(row, shots) for row in data.rows])
        finding = asked_once(f"ask: {SHOTS} examples in front", data, victim.write(prompts))
        examples = "\n".join(chain.from_iterable(map(str, shot.values()) for shot in shots))
        known = [told(secret.text, examples) for secret in data.secrets]  # a secret that an example tells
        values = [None if there else value for there, value in zip(known, finding.values, strict=True)]
        return [Finding(finding.name, values, finding.evidence)]


@dataclass(frozen=True)
class AskWithPrefix:
    """Each question, with the words PREFIX as the beginning of the answer."""

    max_new_tokens: int
    key = "ask-prefix"
    reads_retain = False

    @property
    def budget(self) -> str:
        return f'1 greedy answer of {self.max_new_tokens} tokens, after "{PREFIX}"'

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        return None

    def run(self, victim: Victim) -> list[Finding]:
        prompts: list[Tensor] = victim.data.answer_beginnings(PREFIX)
        return [asked_once("ask: answer begun", victim.data, victim.write(prompts))]
