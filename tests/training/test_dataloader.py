"""The data loader: which examples meet in a step, and that every row of a batch has its role."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from palu.config import UnlearnConfig
from palu.data.packing import Batch, Item, pair_items
from palu.data.tokenize import IGNORE, Example
from palu.ref_model.storage import ReferenceCache
from palu.training.dataloader import UnlearnDataLoader, cut
from palu.training.trainer import MicroBatches


def numbered_set(forget: int, retain: int) -> tuple[list[Item], list[Item], ReferenceCache]:
    """Sets whose examples name themselves: their tokens, indices and hidden states all tell their number."""
    items, kept = [], []
    for number in range(forget):
        length = 4 + number % 3
        items.append(Item(torch.full((length,), number), torch.arange(length - 1), targets=1 + number % 2))
    for number in range(retain):
        ids = torch.full((3 + number % 4,), 1000 + number)
        kept.append(Item(ids, torch.arange(1, len(ids) - 1)))
    index = [torch.full((item.targets, 2), number).int() for number, item in enumerate(items)]
    hidden = [torch.full((len(item.rows) - item.targets, 3), float(number)) for number, item in enumerate(items)]
    outputs = [{"index": i, "hidden": h} for i, h in zip(index, hidden, strict=True)]
    return items, kept, ReferenceCache(outputs)


def loader(forget: int, retain: int, process: int = 0, processes: int = 1, **config: int) -> UnlearnDataLoader:
    given = numbered_set(forget, retain)
    settings = UnlearnConfig(**config)  # type: ignore[arg-type]
    return UnlearnDataLoader(*given, settings, process_index=process, num_processes=processes)


def numbers(batch: Batch) -> tuple[list[int], list[int]]:
    """The forget and retain examples of a batch, in order; the one token of an idle process is left out."""
    examples = batch.packed.input_ids[0].split(batch.packed.sequence_lengths)
    first = [int(ids[0]) for ids in examples if len(ids) > 1]
    return [n for n in first if n < 1000], [n - 1000 for n in first if n >= 1000]


@pytest.mark.parametrize(
    ("forget", "batch_size", "accumulation"),
    [(8, 4, 1), (10, 2, 3), (9, 2, 1), (7, 2, 2), (3, 8, 2), (3, 1, 2), (5, 4, 1), (1, 1, 1)],
)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("retain", [6, 0])
def test_an_epoch_sees_every_forget_example_once(
    forget: int, batch_size: int, accumulation: int, processes: int, retain: int
) -> None:
    """Also where fewer examples are left than processes: with unequal micro-batches they would hang."""
    config = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    sources = [loader(forget, retain, i, processes, **config) for i in range(processes)]
    orders: list[list[int]] = []
    kept: Counter[int] = Counter()
    for _ in range(2):
        order: list[int] = []
        epoch = list(zip(*sources, strict=True))
        assert len(epoch) == len(sources[0])
        for steps in epoch:
            assert len(steps[0]) <= accumulation
            for batches in zip(*steps, strict=True):
                for batch in batches:
                    chosen, beside = numbers(batch)
                    assert len(chosen) <= batch_size and len(batch.packed.sequence_lengths) > 0
                    assert len(beside) == (batch_size if retain else 0)
                    order += chosen
                    kept.update(beside)
        assert sorted(order) == list(range(forget))
        orders.append(order)
    if forget > 3:
        assert orders[0] != orders[1], "each epoch has an order of its own"
    if retain:
        assert max(kept.values()) - min(kept[n] for n in range(retain)) <= 1, "the retain set is shared too"


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_sees_every_variant_once(processes: int) -> None:
    """They are forget examples like the rows; the reference's own answers come beside them."""
    forget, _, cache = numbered_set(5, 0)
    anchors = [Item(torch.full((4,), 5 + number), torch.arange(3), targets=1) for number in range(9)]
    outputs = [{"index": torch.zeros(1, 2).int(), "hidden": torch.zeros(2, 3)} for _ in anchors]
    cache = ReferenceCache([*cache.outputs, *outputs], anchors, neighbours=2, variants=4)
    config = UnlearnConfig(batch_size=3, retain_batch_size=2)
    sources = [
        UnlearnDataLoader(forget, [], cache, config, process_index=i, num_processes=processes) for i in range(processes)
    ]
    for _ in range(2):
        steps = list(zip(*sources, strict=True))
        seen = Counter(n for step in steps for batches in step for batch in batches for n in numbers(batch)[0])
        assert len(steps) == len(sources[0]) == -(-9 // (3 * processes))
        assert len(MicroBatches(sources[0])) == len(steps), "what PaluTrainer counts"
        assert [seen[n] for n in (*range(5), *range(7, 11))] == [1] * 9
        assert [seen[n] for n in (5, 6)] == [len(steps)] * 2, "as many neighbours as retain examples, none twice"
        assert sum(seen[n] for n in (11, 12, 13)) == len(steps) * processes, "half as many everyday answers"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("returned", [[8, 9, 11], [9], []])
def test_earlier_rows_ride_along_and_are_looked_at(processes: int, returned: list[int]) -> None:
    """Those that are back come once an epoch, in as many steps as without them; all are looked at, targets alone."""
    forget, _, cache = numbered_set(7, 0)
    others = [Item(torch.full((4 + i,), 7 + i), torch.arange(3 + i), targets=1 + i % 2) for i in range(5)]
    outputs = [
        {"index": torch.zeros(i.targets, 2).int(), "hidden": torch.zeros(len(i.rows) - i.targets, 3)} for i in others
    ]
    cache = ReferenceCache([*cache.outputs, *outputs], others, neighbours=1, earlier=4)
    sources = [
        UnlearnDataLoader(
            forget, [], cache, UnlearnConfig(batch_size=2, max_tokens=12), process_index=i, num_processes=processes
        )
        for i in range(processes)
    ]
    assert {*sources[0].earlier} == {8, 9, 10, 11}
    for source in sources:
        source.returned = returned
    for _ in range(2):
        steps = list(zip(*sources, strict=True))
        seen = Counter(n for step in steps for batches in step for batch in batches for n in numbers(batch)[0])
        assert len(steps) == len(sources[0]) == -(-7 // (2 * processes))
        assert {n: seen[n] for n in (*range(7), *range(8, 12)) if seen[n]} == dict.fromkeys([*range(7), *returned], 1)
    looked_at = list(zip(*(source.watched_batches() for source in sources), strict=True))
    assert sorted(n for of_all in looked_at for chosen, _ in of_all for n in chosen) == [8, 9, 10, 11]
    for chosen, batch in (one for of_all in looked_at for one in of_all):
        assert numbers(batch)[0] == chosen and batch.packed.tokens <= 12
        assert len(batch.rows) == batch.counts.targets == sum(others[n - 7].targets for n in chosen)
        assert len(batch.reference["index"]) == len(batch.rows) and len(batch.reference["hidden"]) == 0


def test_retain_examples_do_not_repeat_before_all_were_seen() -> None:
    source = loader(10, 7, batch_size=2, retain_batch_size=3)
    seen = [n for _ in range(7) for step in source for batch in step for n in numbers(batch)[1]]
    assert len(seen) == 7 * 5 * 3
    for begin in range(0, len(seen), 7):
        assert sorted(seen[begin : begin + 7]) == list(range(7))


def test_a_batch_tells_every_row_its_role() -> None:
    forget, retain, _ = numbered_set(9, 4)
    for step in loader(9, 4, batch_size=4, gradient_accumulation_steps=2):
        for batch in step:
            tokens = batch.packed.input_ids[0]
            onset, ordinary, kept = [], [], []
            for start, length in zip(batch.packed.cu_seq_lens.tolist(), batch.packed.sequence_lengths, strict=False):
                number = int(tokens[start])
                item = forget[number] if number < 1000 else retain[number - 1000]
                assert length == len(item.input_ids)
                place = [start + row for row in item.rows.tolist()]
                onset += place[: item.targets]
                (ordinary if number < 1000 else kept).extend(place[item.targets :])
            chosen = numbers(batch)[0]
            assert batch.rows.tolist() == onset + ordinary + kept
            assert batch.counts == (len(onset), len(ordinary), len(kept), len(chosen))
            # Labels, indices and hidden states come from the example that the row lies in.
            assert torch.equal(batch.labels, tokens[onset + ordinary + kept])
            assert torch.equal(torch.tensor(chosen)[batch.item], tokens[onset + ordinary])
            assert torch.equal(batch.reference["index"][:, 0].long(), tokens[onset])
            assert torch.equal(batch.reference["hidden"][:, 0].long(), tokens[ordinary])


def test_a_batch_of_pairs_tells_every_row_its_pair() -> None:
    """A pair of number n is rows of n and rows of n + 100."""
    pairs, kept, _ = numbered_set(7, 4)
    lose, win = ([Example(n, i.input_ids + 100 * k, i.input_ids) for n, i in enumerate(pairs)] for k in (0, 1))
    for which in (lose, win):
        for example in which:
            example.labels[: 1 + example.row % 2] = IGNORE
    items = pair_items(lose, [*win[1:], win[0]])  # of different lengths
    outputs = [{"target": i.labels[: i.targets], "other": i.labels[i.targets :]} for i in items]
    seen = []
    for step in UnlearnDataLoader(items, kept, ReferenceCache(outputs), UnlearnConfig(batch_size=3)):
        for batch in step:
            tokens, (targets, others, retain, count) = batch.packed.input_ids[0], batch.counts
            assert len(batch.packed.sequence_lengths) == 2 * count + 3
            assert len(batch.rows) == targets + others + retain
            own = batch.labels[: targets + others]
            assert torch.equal(batch.labels, tokens[batch.rows + 1])
            assert torch.equal(torch.cat([batch.reference["target"], batch.reference["other"]]), own)
            # Which pair: a target says so itself, an other is the next number's, 100 higher.
            number = torch.cat([own[:targets], (own[targets:] - 101) % 7])
            chosen = [int(number[batch.item == i][0]) for i in range(count)]
            assert torch.equal(torch.tensor(chosen)[batch.item], number)
            assert targets == sum(items[n].targets for n in chosen)
            assert others == sum(len(items[n].rows) - items[n].targets for n in chosen)
            seen += chosen
    assert sorted(seen) == list(range(7))


def test_one_process_and_two_meet_the_same_examples_in_each_step() -> None:
    alone = [[numbers(batch) for batch in step] for step in loader(12, 8, batch_size=4)]
    both = [list(loader(12, 8, i, 2, batch_size=2)) for i in range(2)]
    for (one,), *halves in zip(alone, *both, strict=True):
        shared = [numbers(batch) for half in halves for batch in half]
        assert [sorted(shared[0][role] + shared[1][role]) for role in (0, 1)] == [sorted(one[role]) for role in (0, 1)]


@pytest.mark.parametrize("one_each", [{"processes": 8}, {"accumulation": 8}], ids=str)
def test_as_many_answers_are_kept_beside_eight_parts_as_beside_one(one_each: dict[str, int]) -> None:
    """Of two neighbours and twenty everyday answers eight micro-batches of one row draw what one of eight draws."""
    forget, _, _ = numbered_set(8, 0)
    extra = [Item(torch.tensor([1000 + i, 1]), torch.tensor([0])) for i in range(22)]
    cache = ReferenceCache([{}] * 30, extra, 2)
    processes, accumulation = one_each.get("processes", 1), one_each.get("accumulation", 1)
    small = UnlearnConfig(batch_size=1, gradient_accumulation_steps=accumulation)

    def kept(*loaders: UnlearnDataLoader) -> list[int]:
        batches = [batch for one in loaders for step in one for batch in step]
        return sorted(n for batch in batches for n in numbers(batch)[1])

    own = [{"process_index": i, "num_processes": processes} for i in range(processes)]
    parts = [UnlearnDataLoader(forget, [], cache, small, **one) for one in own]
    whole = kept(UnlearnDataLoader(forget, [], cache, UnlearnConfig(batch_size=8)))
    assert kept(*parts) == whole and whole[:2] == [0, 1] and len(whole) == 6


# --- Batches bounded in tokens ---
@pytest.mark.parametrize("trial", range(12))
def test_a_micro_batch_is_cut_into_parts_of_max_tokens(trial: int) -> None:
    rng = random.Random(trial)
    tokens, retain_tokens = ([rng.randint(1, 30) for _ in range(12)] for _ in range(2))
    part = rng.sample(range(12), rng.randint(0, 8)), rng.sample(range(12), rng.randint(0, 8))
    parts = cut(part, tokens, retain_tokens, 20)
    for role in (0, 1):
        assert sorted(i for one in parts for i in one[role]) == sorted(part[role])
        for one in parts:
            assert [i for i in part[role] if i in one[role]] == one[role], "an example keeps its place"
    sizes = [sum(tokens[i] for i in chosen) + sum(retain_tokens[i] for i in kept) for chosen, kept in parts]
    for size, (chosen, kept) in zip(sizes, parts, strict=True):
        assert size <= 20 or len(chosen) + len(kept) == 1
    assert sum(size <= 10 for size in sizes) <= 1, "no two parts that would fit into one"


def test_where_all_fits_nothing_is_cut() -> None:
    assert cut(([2, 0], [1]), [5, 9, 4], [3, 7], 16) == [([2, 0], [1])]
    assert cut(([], []), [5], [], 4) == [([], [])]


@pytest.mark.parametrize(("accumulation", "most"), [(1, 12), (2, 12), (2, 7), (2, 4), (1, 10**6)])
def test_processes_have_as_many_parts_as_each_other(accumulation: int, most: int) -> None:
    """And what is in a step does not change."""
    config = {"batch_size": 3, "gradient_accumulation_steps": accumulation}
    whole = [list(loader(11, 8, i, 2, **config)) for i in range(2)]
    parts = [list(loader(11, 8, i, 2, max_tokens=most, **config)) for i in range(2)]
    cuts = 0
    for step in zip(*whole, *parts, strict=True):
        assert len(step[2]) == len(step[3])
        for one, many in zip(step[:2], step[2:], strict=True):
            for role in (0, 1):
                found = [sorted(n for batch in of for n in numbers(batch)[role]) for of in (one, many)]
                assert found[0] == found[1]
            counts = [torch.tensor([batch.counts for batch in of]).sum(0).tolist() for of in (one, many)]
            assert counts[0] == counts[1]
            cuts += len(many) - len(one)
            for batch in many:
                idle = not batch.counts.examples  # its one token is not counted
                assert sum(batch.packed.sequence_lengths) - idle <= max(most, 6)
    assert (cuts > 0) == (most < 10**6)
