"""The data loader: which forget and retain examples meet in which optimisation step, packed into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, zip_longest

import torch
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Counts, Item, Items, pack, split_roles
from palu.ref_model.shared import drop_shared_targets
from palu.ref_model.storage import ReferenceCache

TOKENS_PER_CHECK = 4096  # of the rows of earlier requests that are looked at together

# What is in a micro-batch, by number: forget items and (after all of them) extra items of the cache; retain items.
Part = tuple[list[int], list[int]]


class UnlearnDataLoader:
    """Draws forget, retain and anchor examples: iterating once is one epoch, a list of micro-batches per step.

    An epoch sees every forget example and every variant once, in random order. Retain examples come beside them, as
    many per micro-batch as ``config.retain_batch_size`` says; none repeats before all were seen. So do the cache's
    neighbours, and half as many everyday answers (of a step, rounded up), but none twice in a step. All processes draw
    the same order from ``config.seed`` and each takes its own part: what N processes see together in a step is what
    one process sees with ``batch_size`` and ``retain_batch_size`` N times as large. The seed and the number of steps
    taken are all that decides what comes next, but for what is ``watched``, rows of earlier requests and answers that
    came later (:meth:`watch`): those that are ``returned`` (by number; they are chosen between two epochs) come beside
    the others, each once in an epoch.

    A micro-batch of more than ``config.max_tokens`` tokens is cut into several, of all processes in as many, some of
    which may be idle. Only how a step is cut changes, not what is in it.
    """

    def __init__(
        self,
        forget: Sequence[Item],
        retain: Sequence[Item],
        cache: ReferenceCache,
        config: UnlearnConfig,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        pin_memory: bool = False,
        share_prefix: bool = False,
    ):
        forget = drop_shared_targets(forget, cache.shared)
        self.forget, self.retain, self.cache = forget, retain, cache
        self.max_tokens = config.max_tokens
        self.tokens = [*Items.of(forget).tokens.tolist(), *(len(item.input_ids) for item in cache.extra)]
        self.retain_tokens = Items.of(retain).tokens.tolist()
        self.batch_size = config.batch_size
        self.retain_batch_size = config.retain_batch_size or config.batch_size
        self.examples_per_step = config.batch_size * num_processes * config.gradient_accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes
        self.pin_memory, self.share_prefix = pin_memory, share_prefix
        self.generator = torch.Generator().manual_seed(config.seed)
        self.retain_order = _shuffled(len(retain), torch.Generator().manual_seed(config.seed + 1))
        # In the cache's order: neighbours, variants, everyday answers, rows of earlier requests.
        neighbours, everyday = cache.neighbours, cache.neighbours + cache.variants
        earlier = len(cache.extra) - cache.earlier
        self.forgotten = torch.tensor([*range(len(forget)), *range(len(forget) + neighbours, len(forget) + everyday)])
        # (an endless order, how many there are, beside how many retain examples one comes)
        self.anchor_orders = [
            (_shuffled(end - first, torch.Generator().manual_seed(config.seed + seed), first), end - first, every)
            for first, end, seed, every in ((0, neighbours, 3, 1), (everyday, earlier, 2, 2))
            if end > first
        ]
        self.earlier = range(len(forget) + earlier, len(forget) + len(cache.extra))
        self.later: list[tuple[Item, dict[str, Tensor]]] = []  # what was added after the cache, and its outputs
        self.returned: list[int] = []
        self.of_targets = {field.name for field in config.reference.fields if field.rows == "targets"}
        self.skipped = 0  # steps that the next iteration leaves out

    def __len__(self) -> int:
        """Optimisation steps per epoch."""
        return -(-len(self.forgotten) // self.examples_per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        for step in self.rounds():
            yield [part for parts in step for part in parts]

    def rounds(self) -> Iterator[list[list[Batch]]]:
        """Yield an epoch's steps: for each micro-batch the parts that it is cut into, as many on every process."""
        skipped, self.skipped = self.skipped, 0
        for parts in islice(self._draw(), skipped, None):
            rounds = [parts[i : i + self.num_processes] for i in range(0, len(parts), self.num_processes)]
            yield [[self._load(*part) for part in self._cut(beside)] for beside in rounds]

    def skip(self, steps: int) -> int:
        """Draw what the first steps of a new loader draw, without making batches of it.

        Returns the epoch, from 1, of the last of these steps; the next iteration yields what is left of that epoch,
        which may be nothing.
        """
        epochs = max(steps - 1, 0) // len(self)
        self.skip_epochs(epochs)
        self.skipped = steps - epochs * len(self)
        return epochs + 1

    def skip_epochs(self, epochs: int) -> None:
        """Draw what the first epochs of a new loader draw, without making batches of it."""
        for _ in range(epochs):
            for _ in self._draw():
                pass

    def watch(self, items: Sequence[Item], outputs: Sequence[dict[str, Tensor]]) -> None:
        """Watch more items without ordinary rows; ``outputs``: the reference fields of each."""
        self.later += zip(items, outputs, strict=True)
        self.tokens += [len(item.input_ids) for item in items]

    @property
    def watched(self) -> list[int]:
        """What may come back, by number: rows of earlier requests, and what was added."""
        return [*self.earlier, *range(self.earlier.stop, self.earlier.stop + len(self.later))]

    def watched_batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Yield this process's share of what is watched, by number and packed, with its targets alone.

        Of all processes there are as many batches, some of which may be idle.
        """
        parts = cut((self.watched, []), self.tokens, [], self.max_tokens or TOKENS_PER_CHECK)
        for first in range(0, len(parts), self.num_processes):
            chosen = next((chosen for chosen, _ in parts[first : first + self.num_processes][self.process_index :]), [])
            yield chosen, self._load(chosen, [], targets_alone=True)

    def _cut(self, beside: Sequence[Part]) -> list[Part]:
        """Cut the micro-batches of all processes in a round into parts of max_tokens; return this process's."""
        if self.max_tokens is None:
            return [beside[self.process_index]]
        cuts = [cut(part, self.tokens, self.retain_tokens, self.max_tokens) for part in beside]
        idle: Part = ([], [])
        return [parts[self.process_index] for parts in zip_longest(*cuts, fillvalue=idle)]

    def _draw(self) -> Iterator[list[Part]]:
        """Draw an epoch: for each step, (forget and extra items, retain items) of all micro-batches, by number."""
        order = torch.randperm(len(self.forgotten), generator=self.generator)
        returned = torch.tensor(self.returned, dtype=torch.int64).tensor_split(len(self))
        for forgotten, earlier in zip(self.forgotten[order].split(self.examples_per_step), returned, strict=True):
            parts = -(-len(forgotten) // (self.batch_size * self.num_processes)) * self.num_processes
            beside = parts * self.retain_batch_size
            anchors = [
                len(self.forget) + torch.tensor([*islice(order, min(-(-beside // every), count))])
                for order, count, every in self.anchor_orders
            ]
            chosen = [numbers.tensor_split(parts) for numbers in (forgotten, earlier, *anchors)]
            kept = self.retain_batch_size if self.retain else 0
            yield [(torch.cat(own).tolist(), [*islice(self.retain_order, kept)]) for own in zip(*chosen, strict=True)]

    def _load(self, chosen: list[int], retain: list[int], *, targets_alone: bool = False) -> Batch:
        found = [self._find(number) for number in chosen]
        items, outputs = [item for item, _ in found], [output for _, output in found]
        kept = [self.retain[i] for i in retain]
        if targets_alone:
            items = [replace(item, rows=item.rows[: item.targets]) for item in items]
            outputs = [{n: one if n in self.of_targets else one[:0] for n, one in out.items()} for out in outputs]
        if items:
            batch = collate(items, kept, outputs, share_prefix=self.share_prefix)
        else:  # nothing is left for this process, or for this part: it runs one token, which has no part in the loss
            idle = self.forget[0]
            token = Item(idle.input_ids[:1], idle.rows[:0])
            none = {name: output[:0] for name, output in self.cache.outputs[0].items()}
            batch = collate([token], kept, [none], examples=0)
        return batch.pin_memory() if self.pin_memory else batch

    def _find(self, number: int) -> tuple[Item, dict[str, Tensor]]:
        """Return a forget or extra item, or one that came later, and its reference fields."""
        forget = len(self.forget)
        if number >= self.earlier.stop:
            return self.later[number - self.earlier.stop]
        item = self.forget[number] if number < forget else self.cache.extra[number - forget]
        return item, self.cache.outputs[number]


def cut(part: Part, tokens: Sequence[int], retain_tokens: Sequence[int], most: int) -> list[Part]:
    """Cut a micro-batch into parts of at most ``most`` tokens, or of one longer example; at least one part.

    The longest come first, each into the first part with room for it; in its part an example keeps its place.
    ``tokens``: of each forget and extra item. An idle part's one token is not counted.
    """
    sizes = [*(tokens[i] for i in part[0]), *(retain_tokens[i] for i in part[1])]
    bins: list[list[int]] = []
    free: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        fits = next((number for number, room in enumerate(free) if room >= sizes[place]), len(bins))
        if fits == len(bins):
            bins.append([])
            free.append(most)
        bins[fits].append(place)
        free[fits] -= sizes[place]
    chosen = len(part[0])
    return [
        (
            [part[0][p] for p in sorted(places) if p < chosen],
            [part[1][p - chosen] for p in sorted(places) if p >= chosen],
        )
        for places in bins or [[]]
    ]


def collate(
    items: Sequence[Item],
    retain: Sequence[Item],
    outputs: Sequence[dict[str, Tensor]],
    *,
    examples: int | None = None,
    share_prefix: bool = False,
) -> Batch:
    """Pack forget items (or extra ones) and retain items into one sequence, with the rows of one role side by side.

    ``outputs``: the reference fields of each of ``items``; ``examples``: how many of these count; ``None``: all.
    ``share_prefix``: see :func:`palu.data.packing.pack`.
    """
    packed = pack([*items, *retain], share_prefix=share_prefix)
    rows = packed.rows([*items, *retain])
    own, whose = rows[: len(items)], [torch.full_like(item.rows, i) for i, item in enumerate(items)]

    def targets_first(parts: Sequence[Tensor]) -> list[Tensor]:
        targets, others = split_roles(parts, items)
        return targets + others

    return Batch(
        packed,
        rows=torch.cat(targets_first(own) + rows[len(items) :]),
        labels=torch.cat(targets_first([item.labels for item in items]) + [item.labels for item in retain]),
        item=torch.cat(targets_first(whose)),
        reference={name: torch.cat([output[name] for output in outputs]) for name in outputs[0]},
        counts=Counts(
            targets=sum(item.targets for item in items),
            others=sum(len(item.rows) - item.targets for item in items),
            retain=sum(len(item.rows) for item in retain),
            examples=len(items) if examples is None else examples,
        ),
    )


def _shuffled(count: int, generator: torch.Generator, first: int = 0) -> Iterator[int]:
    while True:
        yield from (first + torch.randperm(count, generator=generator)).tolist()
