"""PALU as a plain loop: a pass for each example, full logits of both models, torch's own operations; nothing of palu's.

What ``palu.unlearn`` does in packed rows, from hidden states and in chunks must come to the same weights.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.small_tokenizers import SPECIAL
from helpers.tiny import Row
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import palu
from palu.ref_model.anchors import ANSWER_TOKENS, PROMPTS

GAMMA, LAMBDA_KL, LAMBDA_RETAIN, MAX_GRAD_NORM = 1.3, 0.7, 0.5, 1.0
STEPS, LEARNING_RATE, N, TOP_K, PROBABILITY_FLOOR = 10, 1e-3, 2, 5, 0.01
ANCHORS = 4  # all of them in each step
END_IDS = {SPECIAL.index("<|end_of_text|>"), SPECIAL.index("<|eot_id|>")}  # of Llama 3's answers


class Doubled(TorchFunctionMode):
    """Within the block nothing asks for float32 and gets it: models of float64 that round on the way do not."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {name: torch.float64 if a is torch.float32 else a for name, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


def train(
    model: PreTrainedModel,
    forget: list[Row],
    retain: list[Row],
    *,
    kl_direction: str,
    local_loss: str = "topk_mse",
    ref_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, float]]:
    """Take steps of AdamW in place, each on all examples; return each step's figures as `palu.unlearn` names them.

    The loss is that of docs/maths.md, with the global mean as the target, normalised: GAMMA * local + ...

    Args:
        tokenizer: given, the KL is taken on the reference's answers to everyday prompts, too.
    """
    reference = copy.deepcopy(model) if ref_model is None else ref_model
    reference.requires_grad_(False).eval()
    anchors = [] if tokenizer is None else [anchor(reference, ids) for ids in everyday_prompts(tokenizer)]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history = []
    for _ in range(STEPS):
        local, kl, kept = [], [], []
        highest = 0.0
        for row in forget + anchors:
            z, ref = logits(model, row), logits(reference, row)
            place = 0  # in a span, from 1
            for t, label in enumerate(row["labels"]):
                place = place + 1 if label >= 0 else 0
                if 0 < place <= N:
                    p = z[t - 1].softmax(0)[label]
                    if local_loss == "topk_mse":
                        local.append(flatness(z[t - 1], ref[t - 1]) / flatness(ref[t - 1], ref[t - 1]))
                    else:
                        local.append(-torch.log1p(-p) * (p > PROBABILITY_FLOOR))
                    highest = max(highest, float(p.detach()))
                elif label == -200:
                    p, q = z[t - 1].log_softmax(0), ref[t - 1].log_softmax(0)
                    first, second = (q, p) if kl_direction == "forward" else (p, q)
                    kl.append((first.exp() * (first - second)).sum())
        for row in retain:
            answer = torch.tensor(row["labels"])[1:]
            kept += F.cross_entropy(logits(model, row)[:-1], answer, reduction="none")[answer >= 0].unbind()
        means = {name: torch.stack(x).mean() for name, x in (("local", local), ("kl", kl), ("retain", kept))}
        loss = GAMMA * means["local"] + LAMBDA_KL * means["kl"] + LAMBDA_RETAIN * means["retain"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        figures = {"loss": loss, "grad_norm": norm, **means}
        history.append({name: float(x.detach()) for name, x in figures.items()} | {"onset_probability": highest})
    return history


def logits(model: PreTrainedModel, row: Row) -> Tensor:
    """Compute the model's own logits [T, V] of one example alone."""
    return model(input_ids=torch.tensor(row["input_ids"])[None], use_cache=False).logits[0]


def everyday_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise the first prompts of palu's file, with the chat template of Llama 3."""
    texts = [[{"role": "user", "content": text}] for text in PROMPTS.read_text().splitlines()[:ANCHORS]]
    prompts = [tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True) for text in texts]
    return [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]


@torch.no_grad()
def anchor(reference: PreTrainedModel, prompt: list[int]) -> Row:
    """Answer a prompt greedily, a pass of the whole text for each token; all tokens of the answer are ordinary."""
    ids = list(prompt)
    while len(ids) < len(prompt) + ANSWER_TOKENS and (len(ids) == len(prompt) or ids[-1] not in END_IDS):
        ids.append(int(logits(reference, {"input_ids": ids, "labels": []})[-1].argmax()))
    assert ids[len(prompt)] not in END_IDS, "a blank answer would be left out"
    return {"input_ids": ids, "labels": [-100] * len(prompt) + [-200] * (len(ids) - len(prompt))}


def flatness(z: Tensor, ref: Tensor) -> Tensor:
    """Compute the local entropy loss of one position, from logits [V]."""
    return (z[ref.topk(TOP_K).indices] - z.mean()).square().mean()


def rows(vocab: int, *, sensitive: bool) -> list[Row]:
    """A prompt of 4 tokens, then an answer; of a forget set, with ordinary and sensitive tokens."""
    rng = random.Random(vocab + sensitive)
    made = []
    for length in (14, 19, 16, 12):
        ids = [rng.randrange(len(SPECIAL), vocab) for _ in range(length)]
        labels = [-100] * 4 + [
            i if not sensitive or t == 0 or (t > 1 and rng.random() < 0.5) else -200 for t, i in enumerate(ids[4:])
        ]
        made.append({"input_ids": ids, "labels": labels})
    return made


def assert_unlearn_equals(
    model: PreTrainedModel,
    *,
    tolerance: float,
    ref_model: PreTrainedModel | None = None,
    kl_direction: str = "reverse",
    local_loss: str = "topk_mse",
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> None:
    """Assert that ``palu.unlearn`` and :func:`train` take a model to the same weights, and report the same figures.

    Args:
        tolerance: of the difference, relative to how far all weights have moved.
        tokenizer: one with Llama 3's chat template: the run has anchors, too.
        settings: for ``palu.unlearn`` alone.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    forget, retain = rows(vocab, sensitive=True), rows(vocab, sensitive=False)
    before, expected = flat(model), copy.deepcopy(model)
    # Two micro-batches a step, which hold all examples, in an order that palu draws.
    history = palu.unlearn(
        model,
        ref_model,
        forget,
        retain,
        **{"epochs": STEPS, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": LEARNING_RATE}
        | {
            "local_loss": local_loss,
            "n": N,
            "kl_direction": kl_direction,
            "max_grad_norm": MAX_GRAD_NORM,
            "tokenizer": tokenizer,
            "anchors": 0 if tokenizer is None else ANCHORS,
        }
        | ({"top_k": TOP_K} if local_loss == "topk_mse" else {"probability_floor": PROBABILITY_FLOOR})
        | {"gamma": GAMMA, "lambda_kl": LAMBDA_KL, "lambda_retain": LAMBDA_RETAIN}
        | {"stop_probability": 1e-9, "progress": False}
        | settings,
    ).history
    options = {"kl_direction": kl_direction, "local_loss": local_loss, "ref_model": ref_model, "tokenizer": tokenizer}
    figures = train(expected, forget, retain, **options)
    moved = (flat(expected) - before).norm()
    assert (flat(model) - flat(expected)).norm() <= tolerance * moved
    assert moved >= 0.3 * LEARNING_RATE * STEPS * len(before) ** 0.5
    assert len(history) == STEPS
    for record, step in zip(history, figures, strict=True):
        # The history is float32; a KL that starts at 0 is noise.
        assert {name: record[name] for name in step} == pytest.approx(step, rel=max(tolerance, 2e-6), abs=1e-6)


def flat(model: PreTrainedModel) -> Tensor:
    """All parameters that are trained, one after the other."""
    return torch.cat([p.detach().double().flatten() for p in model.parameters() if p.requires_grad])
