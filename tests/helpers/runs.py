"""Runs of palu.unlearn on tiny models, the textbook's losses beside them, and how two runs are compared."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import Row, forget_rows, padded, retain_rows, weights
from torch import Tensor
from transformers import LlamaForCausalLM

import palu
from palu import eager
from palu.config import UnlearnConfig
from palu.methods import METHODS

LOSSES = ("loss", "local", "kl", "retain", "grad_norm")


def unlearn(
    model: LlamaForCausalLM,
    ref_model: LlamaForCausalLM | None = None,
    forget: Any = None,
    retain: Any = None,
    **settings: Any,
) -> palu.UnlearnResult:
    """palu.unlearn with settings that suit tiny models; a device's own unless the test says otherwise."""
    onset: dict[str, Any] = {"local_loss": "topk_mse", "n": 3, "top_k": 20}
    if settings.get("objective", "palu") in METHODS.keys() - {"palu"} or settings.get("local_loss") == "unlikelihood":
        onset = {}
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "progress": False} | onset | settings
    forget = forget_rows() if forget is None else forget
    retain = retain_rows() if retain is None else retain
    return palu.unlearn(model, ref_model, forget, retain, **settings)


def assert_same_run(one: palu.UnlearnResult, other: palu.UnlearnResult, tolerance: float) -> None:
    """Losses of every step and final weights agree, relative to their size."""
    assert len(one.history) == len(other.history)
    for a, b in zip(one.history, other.history, strict=True):
        for name in LOSSES:
            # The history is float32; a KL that starts at 0 is noise.
            assert a[name] == pytest.approx(b[name], rel=max(tolerance, 1e-6), abs=max(tolerance, 1e-9)), (
                name,
                a,
                b,
            )
    theirs = weights(other.model)
    for name, ours in weights(one.model).items():
        assert (ours - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max(), name


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


def textbook(
    model: LlamaForCausalLM,
    ref_model: LlamaForCausalLM,
    forget: list[Row],
    retain: list[Row],
    config: UnlearnConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Local, KL and retain loss from padded batches and full logits of both models."""
    device = model.device
    inputs = {name: value.to(device) for name, value in padded(forget)[0].items()}
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["labels"]) for r in forget], True, -100).to(device)
    with torch.no_grad():
        ref_logits = ref_model(**inputs, use_cache=False).logits
    own_logits = model(**inputs, use_cache=False).logits
    loss = palu.palu_loss(
        own_logits,
        ref_logits,
        labels,
        n=config.method.n,
        top_k=config.method.top_k,
        target=config.method.target,
        kl_direction=config.method.kl_direction,
        eos_token_id=None,
    )
    local = loss.local
    if config.method.local_loss == "unlikelihood":
        onset = palu.prefix_mask(labels, config.method.n)[:, 1:]
        p = own_logits[:, :-1][onset].softmax(-1).gather(-1, labels[:, 1:][onset][:, None])
        local = (-torch.log1p(-p) * (p > config.method.probability_floor)).mean()
    elif config.method.normalize:
        onset = palu.prefix_mask(labels, config.method.n)[:, 1:]
        z, ref_z = own_logits[:, :-1][onset], ref_logits[:, :-1][onset]
        index = ref_z.topk(min(config.method.top_k, z.shape[1])).indices
        local = (
            eager.topk_mse(z, index, config.method.target) / eager.topk_mse(ref_z, index, config.method.target)
        ).mean()
    inputs, answers = padded(retain)
    logits = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits[:, :-1]
    return local, loss.kl, F.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten().to(device))


def live_tensors() -> list[Tensor]:
    """All tensors that Python holds, but for torch.func's wrappers, which have no storage."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
    return [t for t in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(t)]


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python holds."""
    found = [t.untyped_storage() for t in live_tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def weighted_sum(config: UnlearnConfig, terms: Sequence[Tensor]) -> Tensor:
    """The loss of PALU from its three terms."""
    own = config.method
    return sum(w * term for w, term in zip((own.gamma, own.lambda_kl, own.lambda_retain), terms, strict=True))
