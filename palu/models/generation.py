"""Generation, greedy or sampled, in batches padded on the left."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from palu.data.examples import answer_examples
from palu.data.files import DataError
from palu.data.tokenize import Example
from palu.models.positions import max_positions
from palu.settings import RunSettings

LIKELIEST = 256  # tokens that top_p sorts first: on a CPU, sorting a vocabulary takes longer than the forward pass
DECODING_FACTOR = 8  # generation holds keys and values, not activations: this many times more tokens fit


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode within the block.

    Restore that, and its generation settings, which the block may change, afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        for module, training in modes:
            module.training = training


def encode_prompts(
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Tensor], set[int]]:
    """Tokenise questions as prompts: ([t] each, the tokens that end an answer); DataError where that fails."""
    # The answer is a stand-in, a word that any tokenizer joins to the blank before it: what comes before is the
    # prompt, what comes after the template's terminator.
    rows = ((f"prompt {i}", {"question": question, "answer": "The"}) for i, question in enumerate(questions))
    examples = answer_examples(rows, tokenizer, chat_template_kwargs)
    return [prompt_of(example) for example in examples], answer_ends(examples, tokenizer)


def bound_on_answers(examples: Iterable[Example]) -> int:
    """Choose how many tokens may be generated for an answer: twice the longest true one's, 200 at most."""
    return min(2 * max(int((example.labels >= 0).sum()) for example in examples), 200)


def answer_ends(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Find the tokens that end these answers: end of sequence, and special ones such as a template's <|eot_id|>."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ends = {int(example.input_ids[-1]) for example in examples} & special
    return ends if tokenizer.eos_token_id is None else ends | {int(tokenizer.eos_token_id)}


def prompt_of(example: Example) -> Tensor:
    """Return the tokens before the answer."""
    return example.input_ids[: example.answer_start]


@dataclass(frozen=True)
class Generation:
    """A generated text."""

    text: str
    cut_off: bool = False  # at max_new_tokens, perhaps inside a word
    ids: Sequence[int] = field(default=(), compare=False)  # as they were generated


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> list[str]:
    """Generate answers to questions, as :func:`generate` does without a progress bar; the texts alone."""
    prompts, stop_ids = encode_prompts(questions, tokenizer, chat_template_kwargs)
    return [one.text for one in generate(model, tokenizer, prompts, stop_ids, bar=tqdm(disable=True), **settings)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tensor],
    stop_ids: set[int],
    **settings: Any,
) -> list[Generation]:
    """Generate as :func:`generate_ids` does, with its settings, and decode, without special tokens."""
    found = generate_ids(model, prompts, stop_ids, pad=tokenizer.pad_token_id, **settings)
    ended = [bool(ids) and ids[-1] in stop_ids for ids in found]
    return [
        Generation(str(tokenizer.decode(ids[:-1] if end else ids, skip_special_tokens=True)), not end, ids)
        for ids, end in zip(found, ended, strict=True)
    ]


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], **settings: Any
) -> list[Generation]:
    """Generate answers to the questions of examples, as :func:`generate` does."""
    return generate(model, tokenizer, list(map(prompt_of, examples)), answer_ends(examples, tokenizer), **settings)


class TopP(LogitsProcessor):
    """Leave the likeliest tokens, of this probability together: transformers' ``TopPLogitsWarper``, but faster."""

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p, found = scores.softmax(-1), torch.full_like(scores, -torch.inf)
        rows = torch.arange(len(p), device=p.device)
        for count in (min(LIKELIEST, p.shape[-1]), p.shape[-1]):
            highest, tokens = p[rows].topk(count)
            likelier = highest.cumsum(-1) - highest
            kept = scores[rows].gather(-1, tokens).masked_fill(likelier >= self.top_p, -torch.inf)
            found[rows] = found[rows].scatter(-1, tokens, kept)
            rows = rows[likelier[:, -1] < self.top_p]  # which may need more tokens
            if not len(rows):
                break
        return found


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    stop_ids: set[int],
    *,
    pad: int | None,
    max_new_tokens: int,
    batch_tokens: int,
    bar: tqdm,
    batches: int | None = None,
    sample: bool = False,
    top_p: float = 1.0,
    chunk_bytes: int = RunSettings.chunk_bytes,
) -> list[list[int]]:
    """Generate greedy or sampled continuations of tokenised prompts [t], in their order.

    Call it within :func:`eval_mode`, since it changes the model's generation settings. Raises DataError where a prompt
    has more tokens than the model positions.

    Args:
        stop_ids: a continuation ends with the first of these; one that was cut at ``max_new_tokens`` has none.
        pad: what fills a batch up; any token will do.
        batch_tokens: a batch's prompts and continuations hold DECODING_FACTOR times as many tokens at most.
        batches: for a sharded model, which all processes run in step: how many batches each of them generates, at
            least as many as its prompts make (:func:`generation_batches`).
        sample: draw each token from the model's own distribution (temperature 1), by torch's global random numbers;
            False: take the likeliest.
        top_p: where tokens are drawn: from the likeliest alone, of this probability together.
        chunk_bytes: bound on a batch's logits in float32, of its last position alone; one text is the least.
    """
    pad = next(iter(stop_ids), 0) if pad is None else pad
    # The model's own settings would be defaults of these: sampling, penalties.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=sorted(stop_ids) or None,
    )
    positions = max_positions(model)
    found: list[list[int]] = [[]] * len(prompts)
    groups = generation_batches(model, prompts, max_new_tokens, batch_tokens, chunk_bytes)
    groups += [[] for _ in range(len(groups), batches or 0)]  # while other processes still have some
    # The last positions' states are a slice [B, 1, d], which torch multiplies with a frozen head one text at a time;
    # in bfloat16 on a CPU it copies the head for each of them.
    head: Any = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda module, given: tuple(hidden.contiguous() for hidden in given)):
        for group in groups:
            batch = [prompts[i] for i in group] or [torch.tensor([pad])]
            width = max(len(prompt) for prompt in batch)
            if positions is not None and width > positions:
                raise DataError(f"a prompt has {width} tokens and the model {positions} positions; shorten it")
            ids = pad_sequence(batch, batch_first=True, padding_value=pad, padding_side="left")
            mask = pad_sequence([torch.ones_like(p) for p in batch], batch_first=True, padding_side="left")
            room = max_new_tokens if positions is None else max(min(max_new_tokens, positions - width), 1)
            output: Any = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=room,
                logits_processor=[TopP(top_p)] if top_p < 1 else None,
                synced_gpus=batches is not None,
            )
            for i, tokens in zip(group, output[:, width:].tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
                found[i] = tokens[:end]
            bar.update(len(group))
    return found


def generation_batches(
    model: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, batch_tokens: int, chunk_bytes: int
) -> list[list[int]]:
    """Group prompts [t], by index, into the batches of :func:`generate_ids`."""
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    head: Any = model.get_output_embeddings()
    rows = max(chunk_bytes // (4 * head.out_features), 1)
    return list(batches_by_length(lengths, DECODING_FACTOR * batch_tokens, rows))


def batches_by_length(lengths: Sequence[int], tokens: int, most: int = sys.maxsize) -> Iterator[list[int]]:
    """Group indices of texts, the longest first: ``most`` texts and, padded, ``tokens`` tokens at most, or one text."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = min(max(tokens // lengths[order[start]], 1), most)
        yield order[start : start + count]
        start += count
