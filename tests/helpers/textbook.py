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
from palu.config import UnlearnConfig
from palu.ref_model.anchors import ANSWER_TOKENS, PROMPTS

STEPS, LEARNING_RATE = 10, 1e-3
# Two micro-batches a step, which hold all examples, in an order that palu draws.
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "retain_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": LEARNING_RATE,
}
SETTINGS |= {"epochs": STEPS, "n": 2, "gamma": 1.3, "lambda_kl": 0.7, "lambda_retain": 0.5}
SETTINGS |= {"progress": False, "lora_rank": None}
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
    config: UnlearnConfig,
    ref_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, float]]:
    """Take steps of AdamW in place, each on all examples; return each step's figures as `palu.unlearn` names them.

    Args:
        config: of it the method's settings, those of AdamW, and the epochs.
        tokenizer: given, the KL is taken on the reference's answers to everyday prompts, too.
    """
    own: Any = config.method
    reference = copy.deepcopy(model) if ref_model is None else ref_model
    reference.requires_grad_(False).eval()
    anchors = [] if tokenizer is None else [anchor(reference, ids) for ids in everyday_prompts(tokenizer)]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    parameters = [p for p in model.parameters() if p.requires_grad]
    history = []
    asked = [(row, logits(reference, row)) for row in forget + anchors]
    for _ in range(config.epochs):
        local, kl, kept = [], [], []
        for row, ref in asked:
            z = logits(model, row)
            place = 0  # in a span, from 1
            for t, label in enumerate(row["labels"]):
                place = place + 1 if label >= 0 else 0
                if 0 < place <= (own.n if own.n > 0 else place):
                    candidates = ref[t - 1].topk(min(own.top_k, len(z[t - 1]))).indices
                    term = flatness if own.local_loss == "topk_mse" else unlikelihood
                    local.append(term(z[t - 1], candidates, label, own))
                elif label == -200:
                    p, q = z[t - 1].log_softmax(0), ref[t - 1].log_softmax(0)
                    first, second = (q, p) if own.kl_direction == "forward" else (p, q)
                    kl.append((first.exp() * (first - second)).sum())
        for row in retain:
            answer = torch.tensor(row["labels"])[1:]
            kept += F.cross_entropy(logits(model, row)[:-1], answer, reduction="none")[answer >= 0].unbind()
        weights = {"local": own.gamma, "kl": own.lambda_kl, "retain": own.lambda_retain}
        values = {"local": local, "kl": kl, "retain": kept}
        means = {name: torch.stack(values[name]).mean() if w else torch.zeros(()) for name, w in weights.items()}
        loss = torch.stack([w * means[name] for name, w in weights.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        figures = {"loss": loss, "grad_norm": norm, **means}
        if own.ends_below is not None:
            figures["onset_probability"] = -torch.expm1(-max(local))
        history.append({name: float(x.detach()) for name, x in figures.items()})
    return history


def logits(model: PreTrainedModel, row: Row) -> Tensor:
    """Compute the model's own logits [T, V] of one example alone."""
    ids = torch.tensor(row["input_ids"], device=model.device)
    return model(input_ids=ids[None], use_cache=False).logits[0].cpu()


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


def unlikelihood(z: Tensor, candidates: Tensor, label: int, own: Any) -> Tensor:
    """Compute the unlikelihood of a token among the candidates and itself, from logits [V]."""
    among = candidates[candidates != label]
    p = z[torch.cat([torch.tensor([label]), among])].softmax(0)[0]
    return -torch.log1p(-p) * (p > own.probability_floor)


def flatness(z: Tensor, candidates: Tensor, label: int, own: Any) -> Tensor:
    """Compute the local entropy loss of one position, from logits [V]."""
    kept = z[candidates]
    targets = {"global_mean": z.mean(), "global_mean_detached": z.mean().detach(), "local_mean": kept.mean()}
    return (kept - targets.get(own.target, own.target)).square().mean()


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
    reference: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> list[dict[str, float]]:
    """Assert that ``palu.unlearn`` and :func:`train` take a model to the same weights, and report the same figures.

    Args:
        tolerance: of the difference, relative to how far all weights have moved.
        reference: what :func:`train` takes for the reference where ``palu.unlearn`` is given none.
        tokenizer: one with Llama 3's chat template: the run has anchors, too.
        settings: of UnlearnConfig, in place of SETTINGS.

    Returns the history.
    """
    vocab = model.get_output_embeddings().weight.shape[0]
    forget, retain = rows(vocab, sensitive=True), rows(vocab, sensitive=False)
    before, expected = flat(model), copy.deepcopy(model)
    config = UnlearnConfig(**SETTINGS | settings, anchors=0 if tokenizer is None else ANCHORS)
    history = palu.unlearn(model, ref_model, forget, retain, tokenizer=tokenizer, config=config).history
    # On the device that palu chose: rotary embeddings are float32, and a CPU and a GPU round them apart.
    reference = ref_model or reference
    for other in filter(None, (expected, reference)):
        other.to(model.device)
    figures = train(expected, forget, retain, config, reference, tokenizer)
    moved = (flat(expected) - before).norm()
    assert (flat(model) - flat(expected)).norm() <= tolerance * moved
    assert moved >= 0.3 * LEARNING_RATE * config.epochs * len(before) ** 0.5
    assert len(history) == len(figures) == config.epochs
    for record, step in zip(history, figures, strict=True):
        # The history is float32; a KL that starts at 0 is noise.
        assert {name: record[name] for name in step} == pytest.approx(step, rel=max(tolerance, 2e-6), abs=1e-6)
    return history


def flat(model: PreTrainedModel) -> Tensor:
    """All parameters that are trained, one after the other."""
    return torch.cat([p.detach().cpu().double().flatten() for p in model.parameters() if p.requires_grad])
