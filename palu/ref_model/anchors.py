"""Anchors: the reference's own answers to everyday prompts and to neighbours, to which the KL holds the model.

With a few facts to forget and nothing else to hold on to, the gradient is free to damage all other answers. So before
the first step the reference answers the prompts of ``anchor_prompts.txt``, and questions like those to be forgotten,
which it writes itself (:mod:`palu.ref_model.neighbours`). Each answer is an example without a target: all its tokens
are ordinary. Both kinds are drawn beside the forget examples and those of a retain set, which seldom holds what a
model is asked every day.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from palu.config import UnlearnConfig
from palu.data.examples import Examples, answer_examples
from palu.data.files import DataError
from palu.data.packing import Item, anchor_item
from palu.data.paraphrases import paraphrased_rows
from palu.data.rows import load_questions
from palu.distributed import gather_values
from palu.models.generation import encode_prompts, eval_mode, generate_ids, generation_batches, prompt_of
from palu.models.lora import base_of, without_adapter
from palu.models.root import ModelRoot
from palu.ref_model.neighbours import QUESTION_TOKENS, TOP_P, NeighbourPrompts, Question, Start, neighbour_prompts
from palu.ref_model.variants import (
    CONTINUATION,
    PER_PLACE,
    Beginning,
    answers_without_questions,
    other_candidates,
    questions,
    secrets_of_targets,
    span_targets,
    target_runs,
    variant_item,
)

PROMPTS = Path(__file__).with_name("anchor_prompts.txt")  # a prompt a line, kinds mixed: any beginning is varied
MOST = 64  # everyday prompts, where the settings do not say how many
ANSWER_TOKENS = 32
BATCH_TOKENS = 1024


class AnchorPrompts(NamedTuple):
    """What the reference is asked before training: everyday prompts, and questions that it writes itself."""

    prompts: list[Tensor]  # int64 [t]: everyday prompts, as the model is asked them
    stop_ids: set[int]  # tokens that end an answer
    max_length: int  # tokens of a prompt and its answer
    neighbours: NeighbourPrompts | None = None  # None: none are wanted


def anchor_texts() -> list[str]:
    return PROMPTS.read_text(encoding="utf-8").splitlines()


def encode_anchor_prompts(
    forget: Examples,
    retain: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    config: UnlearnConfig,
    processes: int,
    *,
    secrets: Sequence[str],
) -> AnchorPrompts:
    """Choose and tokenise the prompts to which a run wants anchors: as many as the settings say.

    Everyday prompts are never more than the run draws. ``retain``: how many examples are to be kept; ``None``: the user
    gave ``None``, and anchors must stand in for them. ``secrets``: the texts that the forget set and earlier
    requests mark and their questions do not tell. Raises DataError where there is no tokenizer for them, or it will
    not do; ValueError where there are fewer prompts, or the KL has no weight.
    """
    texts, asked = anchor_texts(), config.reference.anchors
    holds = config.reference.head  # else there is no KL to keep the answers
    # With retain examples, anchors are optional: there are none without a tokenizer or without the KL.
    possible = retain is None or (retain > 0 and tokenizer is not None and holds)
    count = (MOST if possible else 0) if asked is None else asked
    neighbours = None
    wanted = config.reference.neighbours if possible and holds else 0
    if tokenizer is not None and (wanted or config.reference.variants):
        index = {example.row: i for i, example in enumerate(forget.examples)}
        asked_of = load_questions(forget.source, "forget").items()
        questions = {index[row]: question for row, question in asked_of if row in index}
        variants = config.reference.variants if secrets else 0
        rows = [one for one in paraphrased_rows(forget.source, "forget") if one[0] in index] if variants else []
        named = ((where, columns) for _, where, columns in rows)
        examples = answer_examples(named, tokenizer, config.chat_template_kwargs)
        given = [Question(prompt_of(one), [index[row]]) for one, (row, _, _) in zip(examples, rows, strict=True)]
        neighbours = neighbour_prompts(
            questions, secrets, wanted, tokenizer, config.chat_template_kwargs, variants=variants, paraphrases=given
        )
    if count == 0 and neighbours is None:
        return AnchorPrompts([], set(), config.max_length)
    name = "retain = None" if asked is None else f"anchors = {count}"
    fix = "give retain examples, or retain=[] with lambda_retain=0" if asked is None else "set anchors=0"
    if count > len(texts):
        raise ValueError(f"{name}: there are {len(texts)} everyday prompts; give no more than these")
    if count and not holds:
        raise ValueError(f"{name}: the model's own answers are kept by the KL, and lambda_kl = 0; raise it, or {fix}")
    if tokenizer is None:
        raise DataError(
            f"{name}: for the model to answer everyday prompts there must be a tokenizer; pass it, or {fix}"
        )
    per_step = processes * config.gradient_accumulation_steps
    steps = config.total_steps(-(-len(forget.examples) // (config.batch_size * per_step)))
    drawn = steps * -(-per_step * (config.retain_batch_size or config.batch_size) // 2)
    asked_for = [*texts[: min(count, drawn)], "Why?"]  # the last one tells what ends an answer, if there is no other
    prompts, stop_ids = encode_prompts(asked_for, tokenizer, config.chat_template_kwargs)
    return AnchorPrompts(prompts[:-1], stop_ids, config.max_length, neighbours)


@dataclass(frozen=True)
class Writer:
    """Has the reference write: each process writes its share, and all get every text."""

    reference: ModelRoot  # on the accelerator's device, whole or sharded
    accelerator: Accelerator
    adapter: bool  # whether a ``PeftModel`` writes with its adapter
    chunk_bytes: int = UnlearnConfig.chunk_bytes
    progress: bool = False

    @contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """Have the reference's model, which is yielded, ready to run within the block."""
        model = self.reference.model
        base = base_of(model)
        with eval_mode(base), self.accelerator.autocast(), nullcontext() if self.adapter else without_adapter(model):
            yield base

    def write(
        self, prompts: Sequence[Tensor], stop_ids: set[int], name: str, max_new_tokens: int, **settings: Any
    ) -> list[list[int]]:
        """Have it continue prompts [t], in their order; ``settings``: more of :func:`generate_ids`'s."""
        if not prompts:
            return []
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        share = -(-len(prompts) // processes)
        shares = [prompts[share * i : share * (i + 1)] for i in range(processes)]
        own = shares[rank]
        with self.running() as base, tqdm(total=len(own), desc=name, disable=not self.progress, leave=False) as bar:
            bounds = max_new_tokens, BATCH_TOKENS, self.chunk_bytes
            batches = max(len(generation_batches(base, part, *bounds)) for part in shares)
            written = self.reference.run(
                lambda: generate_ids(
                    base,
                    own,
                    stop_ids,
                    pad=None,
                    max_new_tokens=max_new_tokens,
                    batch_tokens=BATCH_TOKENS,
                    bar=bar,
                    batches=batches if self.reference.sharded else None,
                    chunk_bytes=self.chunk_bytes,
                    **settings,
                )
            )
        return list(chain.from_iterable(gather_values(written, self.accelerator)))

    def write_questions(
        self, prompts: NeighbourPrompts, starts: Sequence[Start], name: str, seed: int
    ) -> list[Question]:
        """Have it write questions, drawn by ``seed``."""
        device = self.accelerator.device
        ends = {int(prompts.tokenizer.eos_token_id)}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.accelerator.process_index)
            lists = [start.prompt for start in starts]
            written = self.write(lists, ends, name, QUESTION_TOKENS, sample=True, top_p=TOP_P)
        return prompts.encode(starts, written)


def generate_anchors(writer: Writer, items: Sequence[Item], anchor_prompts: AnchorPrompts) -> list[Item]:
    """Have the reference answer the everyday prompts. Raises DataError where no answer is left."""
    anchors = _answer(writer, items, anchor_prompts)
    if anchor_prompts.prompts and not anchors:
        raise DataError(
            f"the reference answers none of {len(anchor_prompts.prompts)} everyday prompts within max_length = "
            f"{anchor_prompts.max_length} tokens, so there is nothing to hold on to; raise max_length, or give retain "
            "examples and anchors=0"
        )
    return anchors


def generate_neighbours(writer: Writer, items: Sequence[Item], anchor_prompts: AnchorPrompts, seed: int) -> list[Item]:
    """Have the reference write questions like those of the forget set, drawn by ``seed``, and answer them.

    There may be none: a small model writes none that can be used.
    """
    known = anchor_prompts.neighbours
    if known is None or not known.starts:
        return []
    written = [question.prompt for question in writer.write_questions(known, known.starts, "neighbours", seed)]
    return _answer(writer, items, anchor_prompts._replace(prompts=written))


def _answer(writer: Writer, items: Sequence[Item], anchor_prompts: AnchorPrompts) -> list[Item]:
    """Have the reference answer the prompts greedily.

    An answer ends with its end of sequence; one that ANSWER_TOKENS or ``max_length`` cuts has none. Left out are blank
    answers, those to prompts of ``max_length`` tokens or more, and those that tell a secret, or more than half of a
    span's targets in a row: the model may have taken "739" for another door from the "7391" that it is to forget, and
    the KL would keep it.
    """
    prompts, stop_ids, max_length, neighbours = anchor_prompts
    runs = target_runs(items, ANSWER_TOKENS) if prompts else set()
    lengths = {len(run) for run in runs}
    found = []
    for prompt, answer in zip(prompts, writer.write(prompts, stop_ids, "anchors", ANSWER_TOKENS), strict=True):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)])[:max_length]
        tells = neighbours is not None and neighbours.tells(neighbours.decode(answer))
        tells |= any(tuple(answer[i : i + n]) in runs for n in lengths for i in range(len(answer) - n + 1))
        if answer[0] not in stop_ids and len(ids) > len(prompt) and not tells:
            found.append(anchor_item(ids, len(prompt)))
    return found


def generate_variants(
    writer: Writer, items: Sequence[Item], anchor_prompts: AnchorPrompts, n: int, seed: int
) -> list[Item]:
    """Find other ways in which the reference tells the secrets of items (:mod:`palu.ref_model.variants`).

    ``n``: the onset length. ``seed``: draws the paraphrases that the reference writes.
    """
    known = anchor_prompts.neighbours
    if known is None or not known.variants:
        return []
    beginnings = _other_candidates(writer, items, known.variants, own_answer=True)
    beginnings += answers_without_questions(items, known.decode, known.encode_text)
    starts = [start for start in known.paraphrases if items[start.item].targets]
    paraphrases = [*known.given_paraphrases, *writer.write_questions(known, starts, "paraphrases", seed + 1)]
    for prompt, of in paraphrases:
        targets = [target for i in of for target in span_targets(items[i])]
        beginnings.append(Beginning(prompt, targets, None))
    variants = _continue(writer, beginnings, anchor_prompts, n)
    # What is told in other words has other candidates in its turn: "Sydney, Australia", "Sydney, New South Wales, ...".
    return variants + _continue(writer, _other_candidates(writer, variants, 1), anchor_prompts, n)


def generate_answers_that_tell(
    writer: Writer, items: Sequence[Item], anchor_prompts: AnchorPrompts, n: int
) -> list[Item]:
    """Ask the model of a writer the items' questions; return its answers that tell a secret of the question's own."""
    known = anchor_prompts.neighbours
    if known is None or not known.variants:
        return []
    return _continue(writer, questions(items), anchor_prompts, n, ANSWER_TOKENS)


def _other_candidates(writer: Writer, items: Sequence[Item], count: int, **settings: Any) -> list[Beginning]:
    model = writer.reference.model
    with writer.running():
        return writer.reference.run(lambda: other_candidates(model, items, count, **settings))


def _continue(
    writer: Writer,
    beginnings: Sequence[Beginning],
    anchor_prompts: AnchorPrompts,
    n: int,
    max_new_tokens: int = CONTINUATION,
) -> list[Item]:
    """Have the writer's model go on from beginnings; return items that tell a secret, at most PER_PLACE a place."""
    known, ends = anchor_prompts.neighbours, anchor_prompts.stop_ids
    assert known is not None
    wanted = [one for one in beginnings if one.row is None or int(one.prompt[-1]) not in ends]
    written = writer.write([one.prompt for one in wanted], ends, "variants", max_new_tokens)
    variants: dict[tuple[bool, bytes], list[Item]] = {}  # by the question, or by what precedes a place
    for (prompt, targets, row), continuation in zip(wanted, written, strict=True):
        secrets = secrets_of_targets(targets, known.secrets, known.decode)
        item = variant_item(prompt, continuation, secrets, known.decode, n, targets)
        if item is None or len(item.input_ids) > anchor_prompts.max_length:
            continue
        if row is None or not torch.equal(item.input_ids, row[: len(item.input_ids)]):
            place = prompt if row is None else prompt[:-1]
            variants.setdefault((row is None, place.numpy().tobytes()), []).append(item)
    return [item for of_place in variants.values() for item in of_place[:PER_PLACE]]
