"""What every attack is: a budget, what it needs, and a result for each secret; and the model that it asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from palu.attacks.secrets import AuditData
from palu.data.matching import stands_in
from palu.evaluate.scores import TokenScores, token_scores
from palu.models.generation import Generation, eval_mode, generate
from palu.models.lora import CausalLM


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


class Attack(ABC):
    """An attack; its settings, the fields of a frozen dataclass, are its budget in numbers."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of its kept results; with the settings it tells one attack from another."""

    @property
    @abstractmethod
    def budget(self) -> str:
        """What it spends, in words."""

    @property
    def reads_retain(self) -> bool:
        """Whether its results depend on the retain set."""
        return False

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        """Say what it lacks; None: it can be made."""
        return None

    @abstractmethod
    def run(self, victim: Victim) -> list[Finding]:
        """Attack the model."""


@dataclass
class Victim:
    """A model under attack, in evaluation mode, with the questions that it is asked."""

    model: PreTrainedModel  # on its device
    data: AuditData
    _: KW_ONLY
    max_new_tokens: int  # bound on an answer
    batch_tokens: int  # per scoring pass; decoding takes eight times as many
    seed: int  # of sampling
    bar: tqdm  # counts answers and scored texts

    def generate(
        self, prompts: Sequence[Tensor], max_new_tokens: int | None = None, *, sample: bool = False
    ) -> list[Generation]:
        """Have the model answer prompts [t]. The same seed draws the same answers to the same prompts."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with eval_mode(self.model), torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return generate(
                self.model,
                self.data.tokenizer,
                prompts,
                self.data.stop_ids,
                max_new_tokens=max_new_tokens or self.max_new_tokens,
                batch_tokens=self.batch_tokens,
                bar=self.bar,
                sample=sample,
            )

    def write(self, prompts: Sequence[Tensor], *, sample: bool = False) -> list[str]:
        """Generate, the texts alone."""
        return [one.text for one in self.generate(prompts, sample=sample)]

    def ask(self, name: str, prompts: Sequence[Tensor]) -> Finding:
        """Ask for each row's secrets by its prompt [t], greedily."""
        answers = self.write(prompts)
        return found_in(name, self.data, [answers[secret.row] for secret in self.data.secrets])

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


def found_in(name: str, data: AuditData, answers: Sequence[str | None]) -> Finding:
    """Look for each secret in the answer to the question for it; None: it was not asked for."""
    pairs = zip(data.secrets, answers, strict=True)
    values = [None if answer is None else float(stands_in(secret.text, answer)) for secret, answer in pairs]
    return Finding(name, values, list(answers))
