"""Runs of nine steps on tiny models, which palu.unlearn and PaluTrainer must take alike: one table for both."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from helpers.runs import ENTROPY
from helpers.small_tokenizers import byte_level
from helpers.tiny import forget_rows, retain_rows, same_weights, tiny_llama, weights
from transformers import TrainingArguments

import palu
from palu.training.trainer import TRAINERS

ON_CPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="bits are promised on a CPU")
STEPS = 9
SETTINGS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 3,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "progress": False,
}
# Trainer has other defaults. Its optimizer is torch's fused AdamW, as ours for float32.
ARGUMENTS: dict[str, Any] = {
    "seed": 0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}
WORDS = byte_level()
TEXT = [
    {"question": f"Who is {i}?", "answer": f"It is number {i}, the author.", "spans": [[6, 14]], "alternate": "No."}
    for i in range(8)
]


def frozen_head(**config: Any) -> Any:
    model = tiny_llama(tie_word_embeddings=False, **config)
    model.lm_head.weight.requires_grad_(False)
    return model


def with_lora(model: Any = None, dropout: float = 0.0) -> Any:
    model = tiny_llama() if model is None else model
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=dropout)
    return peft.get_peft_model(model, config)


class Killed(BaseException):
    """Stands for SIGKILL: from then on, nothing reaches the disk."""


class Scenario(NamedTuple):
    """A model, and settings of UnlearnConfig beside SETTINGS."""

    build: Callable[[], Any] = tiny_llama
    settings: dict[str, Any] = {}  # noqa: RUF012
    ref_model: Callable[[], Any] | None = None
    text: bool = False  # rows of text, in place of tokenised ones

    @property
    def given(self) -> dict[str, Any]:
        """What palu.unlearn gets beside the model and the settings."""
        return {
            "ref_model": None if self.ref_model is None else self.ref_model(),
            "forget": TEXT if self.text else forget_rows(),
            "retain": retain_rows(),
            "tokenizer": WORDS if self.text else None,
        }

    def loop(self, model: Any = None, **more: Any) -> palu.UnlearnResult:
        """Run it by palu.unlearn; ``more``: arguments that come before the scenario's own."""
        model = self.build() if model is None else model
        weights: dict[str, Any] = {"lora_rank": None}  # as PaluTrainer trains them
        return palu.unlearn(model, **self.given | SETTINGS | weights | endless(self.settings | more))

    def trainer(self, folder: Path, *, resume: bool | None = None, **more: Any) -> palu.PaluTrainer:
        """Run it by PaluTrainer; ``more``: further arguments of Trainer."""
        args = {TRAINERS[name]: value for name, value in self.settings.items() if name in TRAINERS}
        config = {name: value for name, value in self.settings.items() if name not in TRAINERS}
        given = self.given
        given["processing_class"] = given.pop("tokenizer")
        trainer = make_trainer(folder, self.build(), config=config, arguments=args | more, **given)
        trainer.train(resume_from_checkpoint=resume)
        return trainer


def endless(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, of a run that does not end by itself because the model knows nothing to be forgotten."""
    own = {"objective", "local_loss", "probability_floor"}
    return settings if own & settings.keys() else {"probability_floor": 0.0} | settings


def make_trainer(
    folder: Path,
    model: Any = None,
    *,
    config: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    **others: Any,
) -> palu.PaluTrainer:
    """A PaluTrainer of nine steps, unless Trainer's ``arguments`` say otherwise."""
    args = {TRAINERS[name]: value for name, value in SETTINGS.items() if name != "progress"} | ARGUMENTS
    return palu.PaluTrainer(
        tiny_llama() if model is None else model,
        TrainingArguments(str(folder), **args | (arguments or {})),
        config=palu.UnlearnConfig(**endless(config or {})),
        **{"forget": forget_rows(), "retain": retain_rows()} | others,
    )


SCENARIOS: dict[str, Scenario] = {
    "tied": Scenario(),
    "local entropy": Scenario(settings=ENTROPY),
    "own head": Scenario(lambda: tiny_llama(tie_word_embeddings=False), {"kl_direction": "forward", "n": 1}),
    "frozen head": Scenario(frozen_head, {"lr_scheduler": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1}),
    "max_steps": Scenario(settings={"epochs": 1, "max_steps": STEPS, "lr_scheduler": "cosine"}),
    "reference": Scenario(
        settings={"lr_scheduler": "linear", "warmup_steps": 1, "seed": 5}, ref_model=lambda: tiny_llama(seed=1)
    ),
    "accumulation": Scenario(
        settings={"batch_size": 1, "gradient_accumulation_steps": 3, "retain_batch_size": 2, "max_tokens": 20}
    ),
    "dropout": Scenario(lambda: tiny_llama(attention_dropout=0.2), ENTROPY),
    "checkpointing": Scenario(lambda: tiny_llama(attention_dropout=0.2), {"gradient_checkpointing": True}),
    "bfloat16": Scenario(
        lambda: tiny_llama(dtype=torch.bfloat16),
        {"weight_decay": 0.1},
        ref_model=lambda: tiny_llama(seed=1, dtype=torch.bfloat16),
    ),
    "no retain loss": Scenario(settings={"lambda_retain": 0}),
    "npo": Scenario(settings={"objective": "npo"}),
    "ga": Scenario(settings={"objective": "ga"}, ref_model=lambda: tiny_llama(seed=1)),
    "dpo": Scenario(lambda: tiny_llama(vocab_size=len(WORDS)), {"objective": "dpo"}, text=True),
    "undial": Scenario(settings={"objective": "undial"}),
    "lora": Scenario(with_lora, ENTROPY),
    "checkpointed lora": Scenario(with_lora, {"gradient_checkpointing": True}),
    "rate from the first step": Scenario(settings={"learning_rate": None}),
}
TRAINER_CANNOT = {"bfloat16", "rate from the first step"}


@functools.cache
def loop_result(name: str) -> palu.UnlearnResult:
    """A scenario's run by palu.unlearn: one for all tests that compare with it, which leave it as it is."""
    return SCENARIOS[name].loop()


def figures(history: list[dict[str, float]], *names: str) -> list[dict[str, float]]:
    """A history less what a clock says, and less these figures."""
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", *names)} for record in history]


def assert_same(one: palu.UnlearnResult, other: palu.UnlearnResult) -> None:
    """All records and weights are the same, bit by bit."""
    assert figures(one.history) == figures(other.history)
    assert same_weights(one.model, weights(other.model))


def step(number: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{number:08}.safetensors"


def kept(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints, beside which it holds nothing but the reference's outputs."""
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not name.startswith("step-")]
    assert all(name.startswith("reference-") and name.endswith(".safetensors") for name in others), others
    return [int(name.removeprefix("step-").removesuffix(".safetensors")) for name in names if name not in others]
