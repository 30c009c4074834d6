"""The data loader: which forget and retain examples meet in which optimisation step, packed into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Counts, Item, pack
from palu.ref_model.cache import ReferenceCache


class UnlearnDataLoader:
    """Draws forget, retain and anchor examples: iterating once is one epoch, a list of micro-batches per step.

    An epoch sees every forget example once, in random order. Retain examples come beside them, as many per
    micro-batch as ``config.retain_batch_size`` says; none repeats before all were seen. So do the cache's anchors. All
    processes draw the same order from ``config.seed`` and each takes its own part: what N processes see together in a
    step is what one process sees with ``batch_size`` and ``retain_batch_size`` N times as large. The seed and the
    number of steps taken are all that decides what comes next.
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
    ):
        self.forget, self.retain, self.cache = forget, retain, cache
        self.with_outputs = [*forget, *cache.anchors]  # the items for which the cache holds the reference's outputs
        self.batch_size = config.batch_size
        beside = config.retain_batch_size or config.batch_size
        self.retain_batch_size, self.anchor_batch_size = beside if retain else 0, beside if cache.anchors else 0
        self.examples_per_step = config.batch_size * num_processes * config.gradient_accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes
        self.pin_memory = pin_memory
        self.generator = torch.Generator().manual_seed(config.seed)
        self.retain_order = _shuffled(len(retain), torch.Generator().manual_seed(config.seed + 1))
        self.anchor_order = _shuffled(len(cache.anchors), torch.Generator().manual_seed(config.seed + 2))
        self.skipped = 0  # steps that the next iteration leaves out

    def __len__(self) -> int:
        """Optimisation steps per epoch."""
        return -(-len(self.forget) // self.examples_per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        skipped, self.skipped = self.skipped, 0
        for parts in islice(self._draw(), skipped, None):
            yield [self._load(*part) for part in parts[self.process_index :: self.num_processes]]

    def skip(self, steps: int) -> int:
        """Draw what the first steps of a new loader draw, without making batches of it.

        Returns the epoch, from 1, of the last of these steps; the next iteration yields what is left of that epoch,
        which may be nothing.
        """
        epochs = max(steps - 1, 0) // len(self)
        for _ in range(epochs):
            for _ in self._draw():
                pass
        self.skipped = steps - epochs * len(self)
        return epochs + 1

    def _draw(self) -> Iterator[list[tuple[list[int], list[int]]]]:
        """Draw an epoch: for each step, (forget items and anchors, retain items) of all micro-batches, by number."""
        order = torch.randperm(len(self.forget), generator=self.generator)
        for step in order.split(self.examples_per_step):
            rounds = -(-len(step) // (self.batch_size * self.num_processes))
            yield [
                (
                    chosen.tolist()
                    + [len(self.forget) + next(self.anchor_order) for _ in range(self.anchor_batch_size)],
                    [next(self.retain_order) for _ in range(self.retain_batch_size)],
                )
                for chosen in step.tensor_split(rounds * self.num_processes)
            ]

    def _load(self, chosen: list[int], retain: list[int]) -> Batch:
        items, outputs = [self.with_outputs[i] for i in chosen], [self.cache.outputs[i] for i in chosen]
        kept = [self.retain[i] for i in retain]
        if items:
            batch = collate(items, kept, outputs)
        else:  # fewer examples were left than processes: this one runs a token without a row
            idle = self.forget[0]
            token = Item(idle.input_ids[:1], idle.rows[:0], idle.labels[:0])
            none = {name: output[:0] for name, output in self.cache.outputs[0].items()}
            batch = collate([token], kept, [none], examples=0)
        return batch.pin_memory() if self.pin_memory else batch


def collate(
    items: Sequence[Item],
    retain: Sequence[Item],
    outputs: Sequence[dict[str, Tensor]],
    *,
    examples: int | None = None,
) -> Batch:
    """Pack forget items (or anchors) and retain items into one row, with the rows of one role side by side.

    Args:
        items: forget items and anchors, at least one.
        retain: retain items.
        outputs: the reference fields of each of the items.
        examples: how many of the items count as examples; ``None``: all.
    """
    packed = pack([*items, *retain])
    starts = accumulate((len(item.input_ids) for item in (*items, *retain)), initial=0)
    rows = [item.rows + start for item, start in zip((*items, *retain), starts, strict=False)]  # a start too many
    own, whose = rows[: len(items)], [torch.full_like(item.rows, i) for i, item in enumerate(items)]

    def targets_first(parts: Sequence[Tensor]) -> list[Tensor]:
        by_item = list(zip(parts, items, strict=True))
        return [part[: item.targets] for part, item in by_item] + [part[item.targets :] for part, item in by_item]

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


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
