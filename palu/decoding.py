"""Greedy decoding: what a model answers, in batches padded on the left."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from palu.data import IGNORE, Example, load_retain

DECODING = 8  # decoding holds keys and values instead of activations, so that so many times more tokens fit


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and set to greedy decoding; afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        for module, training in modes:
            module.training = training


def asked(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tensor], set[int]]:
    """Questions as the model is asked them, prompts [t], and the tokens that end an answer.

    Raises DataError where the tokenizer or its chat template will not do.
    """
    # The answer is a stand-in, a word that any tokenizer joins to the blank before it: what comes before is the
    # prompt, what comes after the template's terminator.
    rows = [{"question": question, "answer": "The"} for question in questions]
    examples = load_retain(rows, tokenizer, max_length=sys.maxsize).examples
    ends = {int(example.input_ids[-1]) for example in examples} | {int(tokenizer.eos_token_id)}
    return [prompt_of(example) for example in examples], ends


def prompt_of(example: Example) -> Tensor:
    """The tokens before the answer."""
    return example.input_ids[: int((example.labels != IGNORE).nonzero()[0])]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    stop_ids: set[int],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    bar: tqdm,
) -> list[str]:
    """:func:`continuations` as texts, without special tokens."""
    found = continuations(
        model,
        prompts,
        stop_ids,
        pad=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        bar=bar,
    )
    texts = [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in found]
    return [str(tokenizer.decode(text, skip_special_tokens=True)) for text in texts]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    stop_ids: set[int],
    *,
    pad: int | None,
    max_new_tokens: int,
    batch_tokens: int,
    bar: tqdm,
) -> list[list[int]]:
    """Greedy continuations of tokenised prompts [t], in their order.

    Within :func:`evaluating`, since it changes the model's generation settings.

    Args:
        stop_ids: a continuation ends with the first of these; one that was cut at ``max_new_tokens`` has none.
        pad: what fills a batch up; any token will do.
        batch_tokens: a batch's prompts and continuations hold DECODING times as many tokens at most.
    """
    pad = next(iter(stop_ids), 0) if pad is None else pad
    # The model's own settings would be defaults of these: sampling, penalties.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stop_ids) or None,
    )
    found: list[list[int]] = [[]] * len(prompts)
    for group in batches([len(prompt) + max_new_tokens for prompt in prompts], DECODING * batch_tokens):
        batch = [prompts[i] for i in group]
        width = max(len(prompt) for prompt in batch)
        ids = torch.stack([F.pad(prompt, (width - len(prompt), 0), value=pad) for prompt in batch])
        mask = torch.stack([F.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in batch])
        output: Any = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))  # type: ignore[operator]
        for i, tokens in zip(group, output[:, width:].tolist(), strict=True):
            end = next((at + 1 for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
            found[i] = tokens[:end]
        bar.update(len(group))
    return found


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Groups of indices, the longest texts first, of at most ``tokens`` tokens if padded (or one longer text)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(tokens // lengths[order[start]], 1)
        yield order[start : start + count]
        start += count
