"""What every attack is: a budget, what it needs, and a result for each secret; and the model that it asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from palu.attacks.secrets import AuditData
from palu.data.matching import told
from palu.evaluate.scores import TokenScores, token_scores
from palu.models.generation import eval_mode, generate_ids, generate_texts
from palu.models.lora import CausalLM, base_of


@dataclass(frozen=True)
class Finding:
    """What an attack gets out of one model: a row of the audit's table.

    name: of the row, such as "ask: greedy".
    values: each secret's success in [0, 1]; None where the attack cannot be made on it.
    evidence: for each secret what a person wants to look at; JSON.
    figures: other numbers of the model, by name.
    """

    name: str
    values: list[float | None]
    evidence: list[Any]
    figures: dict[str, float] = field(default_factory=dict)


class Attack(Protocol):
    """An attack; its settings, the fields of a frozen dataclass, are its budget in numbers."""

    @property
    def key(self) -> str:
        """Name of its kept results; with the settings it tells one attack from another."""

    @property
    def budget(self) -> str:
        """What it spends, in words."""

    @property
    def reads_retain(self) -> bool:
        """Whether its results depend on the retain set."""

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        """Say what it lacks; None: it can be made."""

    def run(self, victim: Victim) -> list[Finding]:
        """Attack the model."""


class Victim:
    """A model under attack, in evaluation mode, with the questions that it is asked.

    Args:
        model: on its device.
        data: of the audit.
        max_new_tokens: bound on an answer.
        batch_tokens: tokens per scoring pass; decoding takes eight times as many.
        seed: of sampling.
        bar: counts answers and scored texts.
    """

    def __init__(
        self, model: CausalLM, data: AuditData, *, max_new_tokens: int, batch_tokens: int, seed: int, bar: tqdm
    ):
        self.given: CausalLM = model
        self.model: PreTrainedModel = base_of(model)
        self.data, self.max_new_tokens, self.batch_tokens = data, max_new_tokens, batch_tokens
        self.seed, self.bar = seed, bar

    def of(self, model: CausalLM) -> Victim:
        """Return another model that is asked the same."""
        return Victim(
            model,
            self.data,
            max_new_tokens=self.max_new_tokens,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            bar=self.bar,
        )

    def write(self, prompts: Sequence[Tensor], *, sample: bool = False) -> list[str]:
        """Have the model answer prompts [t]: texts. The same seed draws the same answers to the same prompts."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with eval_mode(self.model), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return generate_texts(
                self.model,
                self.data.tokenizer,
                prompts,
                self.data.stop_ids,
                max_new_tokens=self.max_new_tokens,
                batch_tokens=self.batch_tokens,
                bar=self.bar,
                sample=sample,
            )

    def write_ids(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[list[int]]:
        """Have the model answer prompts [t] greedily: tokens."""
        with eval_mode(self.model):
            return generate_ids(
                self.model,
                prompts,
                self.data.stop_ids,
                pad=self.data.tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                batch_tokens=self.batch_tokens,
                bar=self.bar,
            )

    @cached_property
    def answer_scores(self) -> list[TokenScores]:
        """The true answers' tokens, each after the true ones before it."""
        return self.scores([row.example for row in self.data.rows], [row.where for row in self.data.rows])

    def scores(self, examples: Sequence[Any], names: Sequence[str]) -> list[TokenScores]:
        """Score the labelled tokens of examples."""
        with eval_mode(self.model):
            return token_scores(self.model, examples, names, batch_tokens=self.batch_tokens, bar=self.bar)

    def secret_scores(self) -> list[tuple[Tensor, Tensor]]:
        """Score each secret's tokens: their log-probabilities [t] in float64, and whether each is the likeliest."""
        found = []
        for secret in self.data.secrets:
            example, score = self.data.rows[secret.row].example, self.answer_scores[secret.row]
            begin = len(example.input_ids) - len(score.log_prob)  # the answer runs to the end
            part = slice(secret.first - begin, secret.stop - begin)
            found.append((score.log_prob[part].double(), score.correct[part]))
        return found


def asked_once(name: str, data: AuditData, texts: Sequence[str | None]) -> Finding:
    """Make a finding of each row's answer; None: the row was not asked."""
    answers = [texts[secret.row] for secret in data.secrets]
    values = [
        None if answer is None else float(told(secret.text, answer))
        for secret, answer in zip(data.secrets, answers, strict=True)
    ]
    return Finding(name, values, answers)
