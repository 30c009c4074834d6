"""Relearn: train a copy of the model for a few steps, and ask it for secrets that it was not trained on."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import AuditData
from palu.data.matching import stands_in
from palu.data.tokenize import IGNORE, Example
from palu.evaluate.scores import CHUNK_BYTES, raw_examples
from palu.models.generation import eval_mode
from palu.models.head import body_of, cross_entropy, head_of
from palu.models.lora import CausalLM, is_peft
from palu.models.quantized import quantized_by
from palu.models.root import share_weights

SHARE = 0.2  # of the forget rows that are trained on
BATCH = 4  # rows a step
LORA_RANK = 16
UNRELATED = Path(__file__).with_name("unrelated.txt")  # a passage a line


@dataclass(frozen=True)
class Relearn(Attack):
    """Train with AdamW, ask greedily after every ``every`` steps, and take the step after which most is told.

    trained: all weights, in float32, or a new LoRA adapter on all linear layers of the body.
    rows: a fifth of the forget set, the retain set (questions of the same kind about others), or the passages of
        ``unrelated.txt``. Secrets of rows that are trained on, and those that such a text tells, do not count.
    seed: of the choice of rows, and of the adapter.
    """

    max_new_tokens: int
    trained: Literal["weights", "lora"]
    rows: Literal["forget", "retain", "unrelated"]
    steps: int
    every: int
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"relearn-{self.trained if self.rows == 'forget' else self.rows}"

    @property
    def _name(self) -> str:
        of_forget = {"weights": "all weights", "lora": "lora"}[self.trained]
        return {"forget": of_forget, "retain": "retain rows", "unrelated": "unrelated text"}[self.rows]

    @property
    def reads_retain(self) -> bool:
        return self.rows == "retain"

    @property
    def budget(self) -> str:
        rows = {
            "forget": f"{SHARE:.0%} of the forget rows",
            "retain": "the retain rows",
            "unrelated": "passages about other things",
        }[self.rows]
        how = "all weights" if self.trained == "weights" else f"LoRA of rank {LORA_RANK}"
        training = f"{self.steps} steps of AdamW at {self.learning_rate:g} on {rows}, {BATCH} a step, {how}"
        return f"{training}; 1 greedy answer of {self.max_new_tokens} tokens after every {self.every}, the most told"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if method := quantized_by(model):
            return f"the model is quantised, by {method}, and such weights are not trained"
        if is_peft(model):
            return "the model has a LoRA adapter; merge it into the weights, which are trained"
        if self.trained == "lora" and find_spec("peft") is None:
            return "it needs peft; pip install 'palu-unlearn[lora]'"
        if self.rows == "retain" and not data.retain:
            return "there are no retain rows to train on"
        if not self._asked(data):
            return "no secret is left to ask for that the texts trained on do not tell; give more forget rows"
        return None

    def _trained_rows(self, data: AuditData) -> list[int]:
        """Choose the forget rows to train on."""
        count = max(1, round(SHARE * len(data.rows))) if self.rows == "forget" else 0
        return random.Random(self.seed).sample(range(len(data.rows)), count)

    def _asked(self, data: AuditData) -> list[int]:
        """List the secrets that are asked for."""
        chosen = self._trained_rows(data)
        if self.rows == "forget":
            texts = [text for i in chosen for text in (data.rows[i].question, data.rows[i].answer)]
        elif self.rows == "retain":
            texts = [str(value) for row in data.retain for value in row.values()]
        else:
            texts = unrelated_texts()
        return [
            i
            for i, secret in enumerate(data.secrets)
            if secret.row not in chosen and not any(stands_in(secret.text, text) for text in texts)
        ]

    def run(self, victim: Victim) -> list[Finding]:
        data = victim.data
        asked = self._asked(data)
        rows = sorted({data.secrets[i].row for i in asked})
        prompts = [data.prompts[row] for row in rows]
        if self.rows == "forget":
            examples = [data.rows[i].example for i in self._trained_rows(data)]
        elif self.rows == "retain":
            examples = data.retain_examples(data.retain)
        else:
            examples = raw_examples(unrelated_texts(), data.tokenizer, "unrelated", max_length=sys.maxsize)
        answers: dict[int, list[str]] = {i: [] for i in asked}
        best: dict[int, float] = {}
        best_step = 0
        for step, model in self._train(victim, examples):
            written = dict(zip(rows, replace(victim, model=model).write(prompts), strict=True))
            for i in asked:
                answers[i].append(written[data.secrets[i].row])
            values = {i: float(stands_in(data.secrets[i].text, answers[i][-1])) for i in asked}
            if not best or sum(values.values()) > sum(best.values()):
                best, best_step = values, step
        every = range(len(data.secrets))
        found, evidence = [best.get(i) for i in every], [answers.get(i) for i in every]
        return [Finding(f"relearn: {self._name}", found, evidence, {"step": float(best_step)})]

    def _train(self, victim: Victim, examples: Sequence[Example]) -> Iterator[tuple[int, PreTrainedModel]]:
        """Train a copy of the victim's model; yield it after every ``every`` steps, and after the last one."""
        devices = [victim.model.device] if victim.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            model, trained = self._copy(victim.model)
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=0.0)
        for step in range(1, self.steps + 1):
            batch = [examples[i % len(examples)] for i in range((step - 1) * BATCH, step * BATCH)]
            batch = list({example.row: example for example in batch}.values())
            with eval_mode(model):  # no dropout: the steps are the same for each model
                _loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % self.every == 0 or step == self.steps:
                yield step, model

    def _copy(self, model: PreTrainedModel) -> tuple[PreTrainedModel, torch.nn.Module]:
        """Copy a model to be trained: (what is asked, whose parameters are trained)."""
        if self.trained == "weights":
            whole = copy.deepcopy(model).float()
            return whole, whole.requires_grad_(True)
        import peft

        shared = share_weights(model, frozen=True)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"
        )
        adapted = peft.get_peft_model(shared, config)
        return adapted.get_base_model(), adapted  # type: ignore[return-value]


def unrelated_texts() -> list[str]:
    """Read the passages of ``unrelated.txt``: general knowledge without names, numbers and dates."""
    return UNRELATED.read_text(encoding="utf-8").splitlines()


def _loss(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Compute the mean cross-entropy of the answers' tokens."""
    ids = pad_sequence([example.input_ids for example in examples], batch_first=True)
    labels = pad_sequence([example.labels for example in examples], batch_first=True, padding_value=IGNORE)
    mask = pad_sequence([torch.ones_like(example.input_ids) for example in examples], batch_first=True)
    ids, labels, mask = (tensor.to(model.device) for tensor in (ids, labels[:, 1:], mask))
    hidden = body_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    answer = labels != IGNORE
    return cross_entropy(hidden[answer], head_of(model), labels[answer], CHUNK_BYTES)
