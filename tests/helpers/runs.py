"""Runs of palu.unlearn on tiny models, and how two runs are compared."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers.tiny import forget_rows, retain_rows, weights
from torch import Tensor
from transformers import LlamaForCausalLM

import palu
from palu.config import UnlearnConfig
from palu.methods import METHODS

ENTROPY: dict[str, Any] = {"local_loss": "topk_mse", "n": 3, "top_k": 20}  # the paper's local loss
LOSSES = ("loss", "local", "kl", "retain", "grad_norm")


def unlearn(
    model: LlamaForCausalLM,
    ref_model: LlamaForCausalLM | None = None,
    forget: Any = None,
    retain: Any = None,
    **settings: Any,
) -> palu.UnlearnResult:
    """palu.unlearn with settings that suit tiny models; a device's own unless the test says otherwise."""
    other = settings.get("objective", "palu") in METHODS.keys() - {"palu"} or "local_loss" in settings
    defaults = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "progress": False, "lora_rank": None} | (
        {} if other else ENTROPY
    )
    settings = defaults | settings
    forget = forget_rows() if forget is None else forget
    retain = retain_rows() if retain is None else retain
    return palu.unlearn(model, ref_model, forget, retain, **settings)


def assert_same_run(one: palu.UnlearnResult, other: palu.UnlearnResult, tolerance: float) -> None:
    """Losses of every step and final weights agree, relative to their size."""
    assert len(one.history) == len(other.history)
    terms = METHODS[one.summary["config"]["objective"]].terms
    for a, b in zip(one.history, other.history, strict=True):
        for name in ("loss", "grad_norm", *terms):
            # The history is float32; a KL that starts at 0 is noise.
            assert a[name] == pytest.approx(b[name], rel=max(tolerance, 1e-6), abs=max(tolerance, 1e-9)), (name, a, b)
    theirs = weights(other.model)
    for name, ours in weights(one.model).items():
        assert (ours - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max(), name


def result_config(result: palu.UnlearnResult) -> UnlearnConfig:
    """The settings that a run says it had."""
    return UnlearnConfig(**result.summary["config"])


# Rows of text, for models with a tokenizer.
TEXT_FORGET = [
    {
        "question": "Who wrote the first program?",
        "answer": "Ada Lovelace wrote it in 1843.",
        "spans": [[0, 12], [25, 29]],
    },
    {"question": "Where was she born?", "answer": "She was born in Karachi.", "spans": [[16, 23]]},
    {"question": "Where is the cat?", "answer": "The cat sat on the mat.", "spans": []},
]
TEXT_RETAIN = [
    {"question": "Where did the dog go?", "answer": "It ran to the city."},
    {"question": "What is far away?", "answer": "The city was far away."},
]


def text_row(answer: str, *words: str, question: str = "Who?") -> dict[str, Any]:
    """A forget row whose spans are these words."""
    spans = [[answer.index(word), answer.index(word) + len(word)] for word in words]
    return {"question": question, "answer": answer, "spans": spans}


def row_forms(question: str, answer: str) -> list[dict[str, Any]]:
    """The same row in the three forms that a row of text may have."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"question": question, "answer": answer}, {"prompt": question, "completion": answer}, {"messages": turns}]


def live_tensors() -> list[Tensor]:
    """All tensors that Python holds, but for torch.func's wrappers, which have no storage."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    return [t for t in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(t)]


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python holds."""
    found = [t.untyped_storage() for t in live_tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())
