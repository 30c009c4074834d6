"""Relearn: train a copy of the model for a few steps, and ask it for secrets that it was not trained on."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from palu.attacks.attack import Attack, Finding, Victim
from palu.attacks.secrets import AuditData
from palu.data.matching import stands_in
from palu.data.tokenize import IGNORE, Example
from palu.evaluate.scores import CHUNK_BYTES, check_lengths, raw_examples
from palu.models.generation import eval_mode
from palu.models.head import body_of, cross_entropy, head_of
from palu.models.lora import CausalLM, is_peft
from palu.models.quantized import quantized_by
from palu.models.root import share_weights

SHARE = 0.2  # of the forget rows that are trained on
BATCH = 4  # rows a step
LORA_RANK = 16
UNRELATED = Path(__file__).with_name("unrelated.txt")  # a passage a line
_ROWS = {
    "forget": f"{SHARE:.0%} of the forget rows",
    "retain": "the retain rows",
    "unrelated": "passages about other things",
}
_NAMES = {"weights": "all weights", "lora": "lora", "retain": "retain rows", "unrelated": "unrelated text"}


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
    def _kind(self) -> str:
        return self.trained if self.rows == "forget" else self.rows

    @property
    def key(self) -> str:
        return f"relearn-{self._kind}"

    @property
    def reads_retain(self) -> bool:  # type: ignore[override]
        return self.rows == "retain"

    @property
    def budget(self) -> str:
        how = "all weights" if self.trained == "weights" else f"LoRA of rank {LORA_RANK}"
        training = f"{self.steps} steps of AdamW at {self.learning_rate:g} on {_ROWS[self.rows]}, {BATCH} a step, {how}"
        return f"{training}; 1 greedy answer of {self.max_new_tokens} tokens after every {self.every}, the most told"

    def skip_reason(self, data: AuditData, model: CausalLM) -> str | None:
        if method := quantized_by(model):
            return f"the model is quantised, by {method}, and such weights are not trained"
        if is_peft(model):
            return "the model has a LoRA adapter; merge it into the weights, which are trained"
        if self.rows == "retain" and not data.retain:
            return "there are no retain rows to train on"
        if not self._lesson(data)[1]:
            return "no secret is left to ask for that the texts trained on do not tell; give more forget rows"
        return None

    def _lesson(self, data: AuditData) -> tuple[list[Example], list[int]]:
        """Return what is trained on, and the numbers of the secrets that are asked for."""
        chosen: list[int] = []
        if self.rows == "forget":
            chosen = random.Random(self.seed).sample(range(len(data.rows)), max(1, round(SHARE * len(data.rows))))
            texts = [text for i in chosen for text in (data.rows[i].question, data.rows[i].answer)]
            examples = [data.rows[i].example for i in chosen]
        elif self.rows == "retain":
            given = data.retain[: self.steps * BATCH]  # no further one is trained on
            texts = [str(value) for row in given for value in row.values()]
            examples = data.retain_examples(given)
        else:
            texts = unrelated_texts()[: self.steps * BATCH]
            examples = raw_examples(texts, data.tokenizer, "unrelated")
        asked = [
            i
            for i, secret in enumerate(data.secrets)
            if secret.row not in chosen and not any(stands_in(secret.text, text) for text in texts)
        ]
        return examples, asked

    def run(self, victim: Victim) -> list[Finding]:
        secrets, prompts = victim.data.secrets, victim.data.prompts
        examples, asked = self._lesson(victim.data)
        check_lengths(victim.model, examples, (f"{self.rows} row {example.row}" for example in examples))
        rows = sorted({secrets[i].row for i in asked})
        findings = []
        for step, model in self._train(victim.model, examples):
            answers = replace(victim, model=model).write([prompts[row] for row in rows], self.max_new_tokens)
            written = dict(zip(rows, answers, strict=True))
            of_secrets = [written[secret.row] if i in asked else None for i, secret in enumerate(secrets)]
            finding = victim.look_for_secrets(f"relearn: {_NAMES[self._kind]}", of_secrets)
            findings.append(replace(finding, figures={"step": float(step)}))
        best = max(findings, key=lambda finding: sum(value or 0 for value in finding.values))  # the first of equals
        by_step = zip(*(finding.evidence for finding in findings), strict=True)
        return [replace(best, evidence=[None if None in answers else list(answers) for answers in by_step])]

    def _train(self, model: PreTrainedModel, examples: Sequence[Example]) -> Iterator[tuple[int, PreTrainedModel]]:
        """Train a copy of the model; yield it after every ``every`` steps, and after the last one."""
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            model, trained = self._copy(model)
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
