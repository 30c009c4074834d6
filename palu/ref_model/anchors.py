"""Anchors: the reference's own answers to everyday prompts, to which the KL holds the model.

With a few facts to forget and nothing else to hold on to, the gradient is free to damage all other answers. So before
the first step the reference answers the prompts of ``anchor_prompts.txt``. Each answer is an example without a target:
all its tokens are ordinary. Anchors are drawn beside the forget examples and those of a retain set, which seldom holds
what a model is asked every day.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.files import DataError
from palu.data.packing import Item, anchor_item
from palu.distributed import gather_values
from palu.models.generation import encode_prompts, eval_mode, generate_ids, generation_batches
from palu.models.lora import base_of, without_adapter
from palu.models.root import ModelRoot

PROMPTS = Path(__file__).with_name("anchor_prompts.txt")  # a prompt a line, kinds mixed: any beginning is varied
ANSWER_TOKENS = 32
BATCH_TOKENS = 1024


class AnchorPrompts(NamedTuple):
    """Everyday prompts, tokenised as the model is asked them."""

    prompts: list[Tensor]  # int64 [t]
    stop_ids: set[int]  # tokens that end an answer
    max_length: int  # tokens of a prompt and its answer


def anchor_texts() -> list[str]:
    """Read the prompts of ``anchor_prompts.txt``."""
    return PROMPTS.read_text(encoding="utf-8").splitlines()


def encode_anchor_prompts(
    forget: int,
    retain: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: UnlearnConfig,
    processes: int,
) -> AnchorPrompts:
    """Choose and tokenise the prompts to which a run wants anchors: as many as the settings say.

    They are never more than the run draws, and none for a method that keeps none.

    Args:
        forget: how many examples are to be forgotten.
        retain: how many are to be kept; ``None``: the user gave ``None``, and anchors must stand in for them.
        processes: how many take part in the run.

    Raises:
        DataError: there is no tokenizer for them, or it will not do.
        ValueError: there are fewer prompts, or the KL has no weight.
    """
    texts, asked = anchor_texts(), config.reference.anchors
    holds = config.reference.head  # else there is no KL to keep the answers
    # Beside retain examples, tokenised rows without a tokenizer or a run without the KL do without them.
    possible = retain is None or (retain > 0 and tokenizer is not None and holds)
    count = (len(texts) if possible else 0) if asked is None else asked
    if count == 0:
        return AnchorPrompts([], set(), config.max_length)
    wish = "retain = None" if asked is None else f"anchors = {count}"
    fix = "give retain examples, or retain=[] with lambda_retain=0" if asked is None else "set anchors=0"
    if count > len(texts):
        raise ValueError(f"{wish}: there are {len(texts)} everyday prompts; give no more than these")
    if not holds:
        raise ValueError(f"{wish}: the model's own answers are kept by the KL, and lambda_kl = 0; raise it, or {fix}")
    if tokenizer is None:
        raise DataError(
            f"{wish}: for the model to answer everyday prompts there must be a tokenizer; pass it, or {fix}"
        )
    per_step = processes * config.gradient_accumulation_steps
    steps = config.total_steps(-(-forget // (config.batch_size * per_step)))
    drawn = steps * per_step * (config.retain_batch_size or config.batch_size)
    prompts, stop_ids = encode_prompts(texts[: min(count, drawn)], tokenizer, config.chat_template_kwargs)
    return AnchorPrompts(prompts, stop_ids, config.max_length)


def generate_anchors(
    reference: ModelRoot,
    anchor_prompts: AnchorPrompts,
    accelerator: Accelerator,
    *,
    adapter: bool,
    chunk_bytes: int = UnlearnConfig.chunk_bytes,
    progress: bool = False,
) -> list[Item]:
    """Have the reference answer the prompts greedily: each process answers its share, all get every answer.

    An answer ends with its end of sequence; one that was cut at ANSWER_TOKENS has none, since the reference wrote
    none. Blank answers are left out, and those that ``max_length`` cuts off.

    Args:
        reference: on the accelerator's device, whole or sharded.
        adapter: whether a ``PeftModel`` answers with its adapter.
        chunk_bytes: bound on the logits held at once.

    Raises:
        DataError: no answer is left.
    """
    prompts, stop_ids, max_length = anchor_prompts
    if not prompts:
        return []
    base = base_of(reference.model)
    share = -(-len(prompts) // accelerator.num_processes)
    shares = [prompts[share * rank : share * (rank + 1)] for rank in range(accelerator.num_processes)]
    own = shares[accelerator.process_index]
    batches = max(len(generation_batches(base, part, ANSWER_TOKENS, BATCH_TOKENS, chunk_bytes)) for part in shares)
    with (
        tqdm(total=len(own), desc="anchors", disable=not progress, leave=False) as bar,
        eval_mode(base),
        accelerator.autocast(),
        nullcontext() if adapter else without_adapter(reference.model),
    ):
        answers = reference.run(
            lambda: generate_ids(
                base,
                own,
                stop_ids,
                pad=None,
                max_new_tokens=ANSWER_TOKENS,
                batch_tokens=BATCH_TOKENS,
                bar=bar,
                batches=batches if reference.sharded else None,
                chunk_bytes=chunk_bytes,
            )
        )

    anchors = []
    answers = list(chain.from_iterable(gather_values(answers, accelerator)))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])[:max_length]
        if answer[0] not in stop_ids and len(ids) > len(prompt):
            anchors.append(anchor_item(ids, len(prompt)))
    if not anchors:
        raise DataError(
            f"the reference answers none of {len(prompts)} everyday prompts within max_length = {max_length} "
            "tokens, so there is nothing to hold on to; raise max_length, or give retain examples and anchors=0"
        )
    return anchors
