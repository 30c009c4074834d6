"""A Llama of a few thousand parameters, and tokenised forget and retain sets for it."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCAB = 97

Row = dict[str, list[int]]


def tiny_llama(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **config: Any
) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, tied embeddings, logits far from uniform; in eval mode."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    } | config
    model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation=attention)).to(dtype)
    if dtype == torch.float64:  # transformers' norm rounds to float32
        for layer in (*model.model.layers, model.model):
            for name, norm in list(layer.named_children()):
                if isinstance(norm, LlamaRMSNorm):
                    setattr(layer, name, torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=dtype))
    return model.eval()


def forget_rows(count: int = 8, *, seed: int = 0, vocab: int = VOCAB) -> list[Row]:
    """A prompt, then an answer of ordinary and sensitive tokens; its length and its spans are random."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = rng.randint(2, 6), rng.randint(4, 12)
        ids = [rng.randrange(vocab) for _ in range(prompt + answer)]
        # The first two tell that every answer has a span and an ordinary token.
        sensitive = [True, False] + [rng.random() < 0.5 for _ in range(answer - 2)]
        labels = [-100] * prompt + [t if s else -200 for t, s in zip(ids[prompt:], sensitive, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def retain_rows(count: int = 12, *, seed: int = 1, vocab: int = VOCAB) -> list[Row]:
    """A prompt, then an answer."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = rng.randint(2, 6), rng.randint(3, 10)
        ids = [rng.randrange(vocab) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def overfit(model: LlamaForCausalLM, rows: list[Row], steps: int = 60, learning_rate: float = 1e-2) -> None:
    """Train a model until it knows every answer of the rows by heart."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding in a batch
    batches = [padded(rows[first : first + 12]) for first in range(0, len(rows), 12)]
    tokens = sum(int((answers[:, 1:] != -100).sum()) for _, answers in batches)
    for _ in range(steps):
        for inputs, answers in batches:
            inputs, answers = {k: v.to(model.device) for k, v in inputs.items()}, answers.to(model.device)
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers[:, 1:].flatten(), reduction="sum")
            (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def padded(rows: list[Row]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({input_ids, attention_mask}, answer ids and -100 elsewhere), each [B, T], padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    answers = [torch.where(torch.tensor(row["labels"]) == -100, -100, i) for row, i in zip(rows, ids, strict=True)]

    def stack(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    mask = stack([torch.ones_like(i) for i in ids], 0)
    return {"input_ids": stack(ids, 0), "attention_mask": mask}, stack(answers, -100)


@torch.no_grad()
def answer_probabilities(model: LlamaForCausalLM, rows: list[Row], *, sensitive_only: bool = False) -> torch.Tensor:
    """Probability of each answer token (or each sensitive one) of the rows."""
    inputs, answers = padded(rows)
    labels = [torch.tensor(row["labels"]) for row in rows]
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    logits = model(**{k: v.to(model.device) for k, v in inputs.items()}, use_cache=False).logits.cpu()
    probability = logits[:, :-1].softmax(-1).gather(2, answers[:, 1:, None].clamp(min=0))[..., 0]
    return probability[wanted[:, 1:] >= 0 if sensitive_only else wanted[:, 1:] != -100]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every weight, on the host."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The weights that are not what they were."""
    after = weights(model)
    return {name for name in before if not torch.equal(before[name], after[name])}


def same_weights(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether every bit of every weight is what it was (NaN included)."""
    after = weights(model)
    return after.keys() == before.keys() and all(
        torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before
    )
