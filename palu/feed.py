"""The feed: which forget and retain examples meet in which optimisation step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from palu.cache import ReferenceCache
from palu.config import UnlearnConfig
from palu.packing import Batch, Item, pack


class Feed:
    """Iterating once is one epoch: for each optimisation step, this process's micro-batches.

    An epoch sees every forget example once, in random order. Retain examples come beside them, as many per
    micro-batch as ``config.retain_batch_size`` says; none repeats before all were seen. All processes draw
    the same order from ``config.seed`` and each takes its own part.
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
        self.batch_size = config.batch_size
        self.retain_batch_size = (config.retain_batch_size or config.batch_size) if retain else 0
        self.examples_per_step = config.batch_size * num_processes * config.gradient_accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes
        self.pin_memory = pin_memory
        self.generator = torch.Generator().manual_seed(config.seed)
        self.retain_order = _shuffled(len(retain), torch.Generator().manual_seed(config.seed + 1))

    def __len__(self) -> int:
        """Optimisation steps per epoch."""
        return -(-len(self.forget) // self.examples_per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        order = torch.randperm(len(self.forget), generator=self.generator)
        for step in order.split(self.examples_per_step):
            rounds = -(-len(step) // (self.batch_size * self.num_processes))
            parts = [
                (chosen.tolist(), [next(self.retain_order) for _ in range(self.retain_batch_size)])
                for chosen in step.tensor_split(rounds * self.num_processes)
            ]
            yield [self._batch(*part) for part in parts[self.process_index :: self.num_processes]]

    def _batch(self, forget: list[int], retain: list[int]) -> Batch:
        items = [self.forget[i] for i in forget]
        kept = [self.retain[i] for i in retain]
        if not items:  # fewer examples were left than processes: this one runs an example without rows
            idle = self.forget[0]
            items = [Item(idle.input_ids, idle.rows[:0], idle.labels[:0])]
        packed = pack(items + kept)
        starts = packed.cu_seq_lens.tolist()[:-1]
        shifted = [item.rows + start for item, start in zip(items + kept, starts, strict=True)]
        forget_rows, retain_rows = shifted[: len(items)], shifted[len(items) :]
        empty = torch.empty(0, dtype=torch.int64)
        batch = Batch(
            packed,
            rows=torch.cat(
                [rows[: item.onset] for rows, item in zip(forget_rows, items, strict=True)]
                + [rows[item.onset :] for rows, item in zip(forget_rows, items, strict=True)]
                + retain_rows
            ),
            onset_labels=torch.cat([item.labels for item in items] or [empty]),
            retain_labels=torch.cat([item.labels for item in kept] or [empty]),
            index=torch.cat([self.cache.index[i] for i in forget] or [self.cache.index[0][:0]]),
            ref_hidden=torch.cat([self.cache.hidden[i] for i in forget] or [self.cache.hidden[0][:0]]),
        )
        return batch.pin_memory() if self.pin_memory else batch


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
