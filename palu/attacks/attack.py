"""What every attack is: a budget, what it needs, and a result for each secret; and the model that it asks."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from palu.attacks.secrets import AuditData
from palu.data.matching import stands_in
from palu.data.tokenize import Example
from palu.evaluate.scores import TokenScores, check_lengths, token_scores
from palu.models.generation import Generation, answer_ends, eval_mode, generate
from palu.models.lora import CausalLM


@dataclass(frozen=True)
class Finding:
    """What an attack gets out of one model: a row of the audit's table."""

    name: str  # of the row, such as "ask: greedy"
    values: list[float | None]  # each secret's success in [0, 1]; None where the attack cannot be made on it
    evidence: list[Any]  # for each secret what a person wants to look at; JSON
    figures: dict[str, float] = field(default_factory=dict)  # other numbers of the model, by name


Outcome: TypeAlias = "list[Finding] | str"  # of an attack on a model; or why it was not made


class Attack(ABC):
    """An attack; its settings, the fields of a frozen dataclass, are its budget in numbers."""

    reads_retain = False  # whether its results depend on the retain set

    @property
    @abstractmethod
    def key(self) -> str:
        """Name of its kept results; with the settings it tells one attack from another."""

    @property
    @abstractmethod
    def budget(self) -> str:
        """What it spends, in words, with settings by name in braces."""

    @property
    def described(self) -> dict[str, Any]:
        """What stands of it in the results: its key, its budget in words, and its settings as JSON has them."""
        settings = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return {"attack": self.key, "budget": self.budget.format(**settings), "settings": settings}

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        """Say what it lacks; None: it can be made."""
        return None

    @abstractmethod
    def run(self, victim: Victim) -> list[Finding]:
        """Attack the model; DataError where a text does not fit it, so that the attack cannot be made."""


@dataclass
class Victim:
    """A model under attack, with the questions that it is asked."""

    model: PreTrainedModel  # on its device
    data: AuditData
    batch_tokens: int  # per scoring pass; decoding takes eight times as many
    bar: tqdm  # counts answers and scored texts

    def generate(
        self, prompts: Sequence[Tensor], max_new_tokens: int, *, draw_seed: int | None = None
    ) -> list[Generation]:
        """Have the model answer prompts [t], greedily; with a seed, draw the answers, the same to the same prompts."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with eval_mode(self.model), torch.random.fork_rng(devices):
            torch.manual_seed(draw_seed or 0)
            return generate(
                self.model,
                self.data.tokenizer,
                prompts,
                answer_ends([row.example for row in self.data.rows], self.data.tokenizer),
                max_new_tokens=max_new_tokens,
                batch_tokens=self.batch_tokens,
                bar=self.bar,
                sample=draw_seed is not None,
            )

    def write(self, prompts: Sequence[Tensor], max_new_tokens: int, *, draw_seed: int | None = None) -> list[str]:
        """Generate, the texts alone."""
        return [one.text for one in self.generate(prompts, max_new_tokens, draw_seed=draw_seed)]

    def ask(self, name: str, prompts: Sequence[Tensor], max_new_tokens: int) -> Finding:
        """Ask for each row's secrets by its prompt [t], greedily."""
        answers = self.write(prompts, max_new_tokens)
        return self.look_for_secrets(name, [answers[secret.row] for secret in self.data.secrets])

    def look_for_secrets(self, name: str, answers: Sequence[str | None]) -> Finding:
        """Look for each secret in the answer to the question for it; None: it was not asked for."""
        pairs = zip(self.data.secrets, answers, strict=True)
        values = [None if answer is None else float(stands_in(secret.text, answer)) for secret, answer in pairs]
        return Finding(name, values, list(answers))

    def scores(self, examples: Sequence[Example], names: Sequence[str]) -> list[TokenScores]:
        """Score every labelled token; DataError names a text with more tokens than the model has positions."""
        check_lengths(self.model, examples, names)
        with eval_mode(self.model):
            return token_scores(self.model, examples, names, batch_tokens=self.batch_tokens, bar=self.bar)

    def secret_scores(self) -> list[tuple[Tensor, Tensor]]:
        """Score each secret's tokens, each after the true ones before it.

        Returns their log-probabilities [t] in float64, and whether each is the likeliest [t].
        """
        rows = self.data.rows
        scores = self.scores([row.example for row in rows], [row.where for row in rows])
        found = []
        for secret in self.data.secrets:
            score = scores[secret.row]
            begin = len(rows[secret.row].example.input_ids) - len(score.log_prob)  # the answer runs to the end
            part = slice(secret.first - begin, secret.stop - begin)
            found.append((score.log_prob[part].double(), score.correct[part]))
        return found
