"""Packed rows give what separate passes give, and every position has the role that its label says."""

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.tiny import VOCAB, forget_rows, retain_rows, tiny_llama
from torch import Tensor

from palu.config import UnlearnConfig
from palu.data.examples import load_forget, load_retain
from palu.data.packing import Batch, Item, answer_items, forget_items, pack, pair_items, retain_items
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.models.attention import FLOAT32_TOKENS, packed_attention, use_packed_attention
from palu.models.head import body_of
from palu.ref_model.cache import ReferenceCache
from palu.ref_model.precompute import compute_outputs
from palu.training.dataloader import UnlearnDataLoader, cut

EOS = 7


def examples(count: int, seed: int = 0, *, forget: bool = True) -> list[Example]:
    load, rows = (load_forget, forget_rows) if forget else (load_retain, retain_rows)
    return load(rows(count, seed=seed), None, max_length=100).examples


# --- The packed pass ---
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_pass_equals_separate_passes(device: torch.device, attention: str, dtype: torch.dtype) -> None:
    model = tiny_llama(attention=attention, dtype=dtype).to(device)
    body = body_of(model)
    items = forget_items(examples(5), 3, None)
    packed = pack(items)
    upstream = torch.randn(packed.input_ids.shape[1], model.config.hidden_size, device=device, dtype=dtype)

    def states_and_gradients(states: Tensor) -> tuple[Tensor, list[Tensor]]:
        return states.detach(), list(torch.autograd.grad((states * upstream).sum(), list(body.parameters())))

    apart = torch.cat([body(input_ids=i.input_ids[None].to(device)).last_hidden_state[0] for i in items])
    expected = states_and_gradients(apart)
    with use_packed_attention(model):
        served = attention == "sdpa" and (device.type == "cpu" or dtype == torch.bfloat16)
        assert model.config._attn_implementation == ("palu_packed" if served else attention)
        together = body(**packed.to(device).inputs()).last_hidden_state[0]
    actual = states_and_gradients(together)

    # transformers' eager attention takes its softmax in float32.
    inner = torch.float32 if attention == "eager" and dtype == torch.float64 else dtype
    tolerance = (8 if dtype == torch.bfloat16 else 200) * torch.finfo(inner).eps
    for ours, theirs in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_example_does_not_see_the_others(device: torch.device, attention: str, dtype: torch.dtype) -> None:
    """Not approximately: not one bit of its hidden states changes with another's tokens."""
    model = tiny_llama(attention=attention, dtype=dtype).to(device)
    items = retain_items(examples(3, forget=False))
    before, middle, after = torch.tensor([len(item.input_ids) for item in items]).cumsum(0).tolist()

    def states(ids: list[Tensor]) -> Tensor:
        packed = pack([Item(i, item.rows) for i, item in zip(ids, items, strict=True)])
        with torch.no_grad(), use_packed_attention(model):
            return body_of(model)(**packed.to(device).inputs()).last_hidden_state[0]

    ids = [item.input_ids for item in items]
    original, changed = states(ids), states([ids[0], (ids[1] + 1) % VOCAB, ids[2]])
    assert torch.equal(changed[:before], original[:before])
    assert torch.equal(changed[middle:after], original[middle:after])
    assert (changed[before:middle] != original[before:middle]).any(dim=1).all()


def band(length: int, window: int) -> Tensor:
    """Which tokens (columns) each token sees: itself and the window - 1 before it."""
    place = torch.arange(length)
    back = place[:, None] - place
    return (back >= 0) & (back < window)


@pytest.mark.parametrize("window", [1, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_attention_keeps_the_window(device: torch.device, dtype: torch.dtype, window: int) -> None:
    """Against a dense mask; some examples are longer than the window, some are not."""
    if device.type == "cuda" and dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("float32 on CUDA stays with transformers' attention")
    torch.manual_seed(0)
    lengths = (5, 12, 8)
    packed = pack([Item(torch.arange(n), torch.arange(0)) for n in lengths]).to(device)
    heads = (4, 2, 2)
    tensors = [torch.randn(1, h, 25, 16, device=device, dtype=dtype, requires_grad=True) for h in heads]
    module = torch.nn.Module()
    inputs = packed.inputs()
    ours, _ = packed_attention(module, *tensors, None, scaling=0.3, sliding_window=window, **inputs)
    mask = torch.block_diag(*(band(n, window) for n in lengths)).bool().to(device)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    theirs = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    upstream = torch.randn_like(theirs)
    gradients = torch.autograd.grad((ours * upstream).sum(), tensors)
    expected = torch.autograd.grad((theirs * upstream).sum(), exact)
    largest = max(gradient.norm() for gradient in expected)  # a window of 1 gives the scores no gradient
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= tolerance * largest


@pytest.mark.parametrize("window", [None, 3])
def test_what_palus_attention_does_not_know_is_left_to_transformers(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = (5, 12)
    inputs = pack([Item(torch.arange(n), torch.arange(0)) for n in lengths]).inputs()
    tensors = [torch.randn(1, 4, 17, 16) for _ in range(3)]
    module = torch.nn.Module()
    mask = torch.block_diag(*(band(n, window or 17) for n in lengths)).bool()
    bias = torch.randn(1, 4, 17, 17)

    def expected(scores: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, attn_mask=scores).transpose(1, 2)

    ours, _ = packed_attention(module, *tensors, None, sliding_window=window, position_bias=bias, **inputs)
    torch.testing.assert_close(ours, expected(bias.masked_fill(~mask, -torch.inf)))
    # A mask without a window: chunks, or a window that the layer does not tell.
    odd = mask & (torch.rand(17, 17) < 0.5) | torch.eye(17, dtype=torch.bool)
    ours, _ = packed_attention(module, *tensors, odd[None, None], **inputs)
    torch.testing.assert_close(ours, expected(odd))
    torch.manual_seed(1)
    ours, _ = packed_attention(module, *tensors, None, sliding_window=window, dropout=0.5, **inputs)
    torch.manual_seed(1)
    dropped = F.scaled_dot_product_attention(*tensors, attn_mask=mask, dropout_p=0.5).transpose(1, 2)
    torch.testing.assert_close(ours, dropped)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(module, *tensors, None, sliding_window=window, softcap=30.0, **inputs)


def test_dropout_stays_transformers_own() -> None:
    model = tiny_llama(attention_dropout=0.1)
    with use_packed_attention(model):
        assert model.config._attn_implementation == "sdpa"


def test_pack_restarts_positions() -> None:
    packed = pack(retain_items(examples(4, forget=False)))
    lengths = packed.sequence_lengths
    assert packed.position_ids[0].tolist() == [t for length in lengths for t in range(length)]
    assert packed.cu_seq_lens.tolist() == [sum(lengths[:i]) for i in range(5)]
    assert packed.cu_seq_lens.dtype == torch.int32
    assert packed.inputs()["use_cache"] is False
    assert packed.inputs()["max_length_q"] == max(lengths)


# --- Roles ---
def naive_roles(labels: list[int], n: int, eos: int | None) -> tuple[list[int], list[int]]:
    """(onset, ordinary) rows: position t - 1 predicts token t."""
    onset, ordinary, place = [], [], 0
    for t, label in enumerate(labels):
        if label == ORDINARY:
            ordinary.append(t - 1)
        place = place + 1 if label >= 0 and label != eos else 0
        if place > 0 and (n == -1 or place <= n):
            onset.append(t - 1)
    return onset, ordinary


def random_example(rng: random.Random, row: int) -> Example:
    length = rng.randint(2, 20)
    ids = [rng.randrange(12) for _ in range(length)]  # few tokens, so that many are EOS
    labels = [IGNORE] + [rng.choice([IGNORE, ORDINARY, token, token]) for token in ids[1:]]
    return Example(row, torch.tensor(ids), torch.tensor(labels))


@pytest.mark.parametrize("trial", range(12))
def test_roles_of_forget_items(trial: int) -> None:
    rng = random.Random(trial)
    given = [random_example(rng, row) for row in range(6)]
    n, eos = rng.choice([-1, 1, 2, 3, 5]), rng.choice([None, EOS])
    for example, item in zip(given, forget_items(given, n, eos), strict=True):
        onset, ordinary = naive_roles(example.labels.tolist(), n, eos)
        assert item.rows.tolist() == onset + ordinary
        assert item.targets == len(onset)
        assert item.labels.tolist() == [example.input_ids[row + 1] for row in onset + ordinary]
        assert torch.equal(item.input_ids, example.input_ids)


def test_roles_of_retain_items() -> None:
    for example, item in zip(given := examples(10, forget=False), retain_items(given), strict=True):
        answer = [t for t, label in enumerate(example.labels.tolist()) if label != IGNORE]
        assert item.rows.tolist() == [t - 1 for t in answer]
        assert item.labels.tolist() == [example.input_ids[t] for t in answer]
        assert item.targets == 0


def answer_rows(example: Example) -> list[int]:
    return [t - 1 for t, label in enumerate(example.labels.tolist()) if label != IGNORE]


@pytest.mark.parametrize("forget", [True, False])
def test_roles_of_answer_items(forget: bool) -> None:
    """Every answer token is a target, whether it is sensitive or ordinary."""
    for example, item in zip(given := examples(10, forget=forget), answer_items(given), strict=True):
        assert item.rows.tolist() == answer_rows(example)
        assert item.labels.tolist() == [example.input_ids[row + 1] for row in answer_rows(example)]
        assert item.targets == len(item.rows)
        assert torch.equal(item.input_ids, example.input_ids)


def test_roles_of_pair_items() -> None:
    """One row after the other: the first one's answer tokens are targets, the second one's are others."""
    lose, win = examples(6), examples(6, seed=9, forget=False)
    for one, other, item in zip(lose, win, pair_items(lose, win), strict=True):
        length = len(one.input_ids)
        assert item.input_ids.tolist() == [*one.input_ids.tolist(), *other.input_ids.tolist()]
        assert item.lengths == (length, len(other.input_ids))
        assert item.rows.tolist() == answer_rows(one) + [length + row for row in answer_rows(other)]
        assert item.labels.tolist() == item.input_ids[item.rows + 1].tolist()
        assert item.targets == len(answer_rows(one))
    with pytest.raises(ValueError, match="zip"):
        pair_items(lose, win[:5])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_two_of_a_pair_do_not_see_each_other(device: torch.device, attention: str) -> None:
    """Nor do they see other pairs; the bits are those of the same examples packed one by one."""
    model = tiny_llama(attention=attention).to(device)
    lose, win = examples(3), examples(3, seed=9, forget=False)

    def states(items: list[Item]) -> Tensor:
        with torch.no_grad(), use_packed_attention(model):
            return body_of(model)(**pack(items).to(device).inputs()).last_hidden_state[0]

    one_by_one = [example for both in zip(lose, win, strict=True) for example in both]
    packed = pack(pairs := pair_items(lose, win))
    assert packed.sequence_lengths == tuple(len(example.input_ids) for example in one_by_one)
    assert packed.position_ids[0].tolist() == [t for example in one_by_one for t in range(len(example.input_ids))]
    original = states(pairs)
    assert torch.equal(original, states(answer_items(one_by_one)))
    changed = pair_items(lose, [Example(0, (e.input_ids + 1) % VOCAB, e.labels) for e in win])
    same = (states(changed) == original).all(1).cpu().split(packed.sequence_lengths)
    assert all(part.all() for part in same[::2]), "the first of each pair"
    assert not any(part.any() for part in same[1::2])


# --- The reference cache ---
@pytest.mark.parametrize(("top_k", "chunk_bytes"), [(5, 2**20), (5, 1), (10**6, 2**20)])
def test_cache_holds_what_the_reference_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, top_k: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr("palu.ref_model.precompute.TOKENS_PER_PASS", 30)  # two or so examples a pass
    model = tiny_llama(dtype=torch.float64).to(device)
    items = forget_items(examples(7), 2, None)
    with use_packed_attention(model):
        config = UnlearnConfig(local_loss="topk_mse", top_k=top_k, chunk_bytes=chunk_bytes)
        cache = compute_outputs(model, items, config, Accelerator())
    assert len(cache.outputs) == len(items)
    for item, fields in zip(items, cache.outputs, strict=True):
        index, hidden = fields["index"], fields["hidden"]
        with torch.no_grad():
            output = model(input_ids=item.input_ids[None].to(device), output_hidden_states=True)
        onset, ordinary = item.rows.split([item.targets, len(item.rows) - item.targets])
        highest = output.logits[0].cpu()[onset].argsort(descending=True)[:, :top_k]
        assert index.dtype == torch.int32
        assert torch.equal(index.sort().values, highest.int().sort().values)
        torch.testing.assert_close(hidden, output.hidden_states[-1][0].cpu()[ordinary])
        assert not hidden.requires_grad


# --- The data loader ---
def numbered_set(forget: int, retain: int) -> tuple[list[Item], list[Item], ReferenceCache]:
    """Sets whose examples name themselves: their tokens, indices and hidden states all tell their number."""
    items, kept = [], []
    for number in range(forget):
        length = 4 + number % 3
        ids = torch.full((length,), number)
        items.append(Item(ids, torch.arange(length - 1), targets=1 + number % 2))
    for number in range(retain):
        ids = torch.full((3 + number % 4,), 1000 + number)
        kept.append(Item(ids, torch.arange(1, len(ids) - 1)))
    index = [torch.full((item.targets, 2), number).int() for number, item in enumerate(items)]
    hidden = [torch.full((len(item.rows) - item.targets, 3), float(number)) for number, item in enumerate(items)]
    outputs = [{"index": i, "hidden": h} for i, h in zip(index, hidden, strict=True)]
    return items, kept, ReferenceCache(outputs)


def loader(
    forget: int, retain: int, *, process_index: int = 0, num_processes: int = 1, **config: int
) -> UnlearnDataLoader:
    return UnlearnDataLoader(
        *numbered_set(forget, retain),
        UnlearnConfig(**config),  # type: ignore[arg-type]
        process_index=process_index,
        num_processes=num_processes,
    )


def numbers(batch: Batch) -> tuple[list[int], list[int]]:
    """The forget and retain examples that have rows in a batch, in order."""
    starts = batch.packed.cu_seq_lens.tolist()[:-1]
    rows = batch.rows.tolist()
    ends = batch.packed.cu_seq_lens.tolist()[1:]
    first = [
        int(batch.packed.input_ids[0, start])
        for start, end in zip(starts, ends, strict=True)
        if any(start <= row < end for row in rows)
    ]
    return [n for n in first if n < 1000], [n - 1000 for n in first if n >= 1000]


@pytest.mark.parametrize(
    ("forget", "batch_size", "accumulation"), [(8, 4, 1), (9, 4, 1), (10, 2, 3), (3, 8, 2), (1, 1, 1)]
)
def test_an_epoch_sees_every_forget_example_once(forget: int, batch_size: int, accumulation: int) -> None:
    source = loader(forget, 5, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    orders = []
    for _ in range(2):
        steps = list(source)
        assert len(steps) == len(source)
        order = []
        for step in steps:
            assert len(step) <= accumulation
            for batch in step:
                chosen, kept = numbers(batch)
                assert len(chosen) <= batch_size
                assert len(kept) == batch_size
                order += chosen
        assert sorted(order) == list(range(forget))
        orders.append(order)
    if forget > 3:
        assert orders[0] != orders[1], "each epoch has an order of its own"


def test_retain_examples_do_not_repeat_before_all_were_seen() -> None:
    source = loader(10, 7, batch_size=2, retain_batch_size=3)
    seen = [n for _ in range(7) for step in source for batch in step for n in numbers_with_repeats(batch)]
    assert len(seen) == 7 * 5 * 3
    for begin in range(0, len(seen), 7):
        assert sorted(seen[begin : begin + 7]) == list(range(7))


def numbers_with_repeats(batch: Batch) -> list[int]:
    starts = batch.packed.cu_seq_lens.tolist()[:-1]
    return [int(t) - 1000 for t in batch.packed.input_ids[0, starts] if t >= 1000]


def test_a_batch_tells_every_row_its_role() -> None:
    forget, retain, _ = numbered_set(9, 4)
    for step in loader(9, 4, batch_size=4, gradient_accumulation_steps=2):
        for batch in step:
            tokens = batch.packed.input_ids[0]
            lengths, starts = batch.packed.sequence_lengths, batch.packed.cu_seq_lens.tolist()
            onset, ordinary, kept = [], [], []
            for start, length in zip(starts, lengths, strict=False):
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
    cache = ReferenceCache(outputs)
    seen = []
    for step in UnlearnDataLoader(items, kept, cache, UnlearnConfig(batch_size=3)):
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


@pytest.mark.parametrize(
    ("forget", "batch_size", "accumulation"), [(8, 2, 2), (9, 2, 1), (7, 2, 2), (3, 1, 2), (5, 4, 1), (1, 4, 1)]
)
@pytest.mark.parametrize("retain", [6, 0])
def test_processes_share_the_work(forget: int, batch_size: int, accumulation: int, retain: int) -> None:
    """Also where fewer examples are left than processes: with unequal micro-batches they would hang."""
    config = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    both = [list(loader(forget, retain, process_index=p, num_processes=2, **config)) for p in range(2)]
    order, kept = [], []
    for steps in zip(*both, strict=True):
        for batches in zip(*steps, strict=True):
            assert all(len(batch.packed.sequence_lengths) > 0 for batch in batches)
            parts = [numbers(batch) for batch in batches]
            order += parts[0][0] + parts[1][0]
            kept += numbers_with_repeats(batches[0]) + numbers_with_repeats(batches[1])
    assert sorted(order) == list(range(forget))
    if retain:
        times = Counter(kept)
        assert max(times.values()) - min(times.get(n, 0) for n in range(retain)) <= 1, "the retain set is shared too"


def test_one_process_and_two_meet_the_same_examples_in_each_step() -> None:
    alone = [[numbers(batch) for batch in step] for step in loader(12, 8, batch_size=4)]
    both = [list(loader(12, 8, process_index=p, num_processes=2, batch_size=2)) for p in range(2)]
    for (one,), *halves in zip(alone, *both, strict=True):
        shared = [numbers(batch) for half in halves for batch in half]
        assert [sorted(shared[0][role] + shared[1][role]) for role in (0, 1)] == [sorted(one[role]) for role in (0, 1)]


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
    whole = [list(loader(11, 8, process_index=p, num_processes=2, **config)) for p in range(2)]
    parts = [list(loader(11, 8, process_index=p, num_processes=2, max_tokens=most, **config)) for p in range(2)]
    assert len(whole[0]) == len(parts[0])
    cuts = 0
    for step in range(len(whole[0])):
        assert len(parts[0][step]) == len(parts[1][step])
        for p in range(2):
            one, many = ([numbers(batch) for batch in of[p][step]] for of in (whole, parts))
            for role in (0, 1):
                assert sorted(n for part in many for n in part[role]) == sorted(n for part in one for n in part[role])
            counts = [torch.tensor([batch.counts for batch in of[p][step]]).sum(0).tolist() for of in (whole, parts)]
            assert counts[0] == counts[1]
            cuts += len(many) - len(one)
            for batch in parts[p][step]:
                idle = not batch.counts.examples  # its one token is not counted
                assert sum(batch.packed.sequence_lengths) - idle <= max(most, 6)
    assert (cuts > 0) == (most < 10**6)


# --- Autocast ---
@pytest.mark.parametrize(("longest", "in_float32"), [(FLOAT32_TOKENS, True), (FLOAT32_TOKENS + 1, False)])
def test_short_examples_attend_in_float32_under_autocast(longest: int, in_float32: bool) -> None:
    """With gradient; as the layer gives them: query and key in float32, value in bfloat16."""
    lengths = (longest, 5)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(lengths), 8, generator=generator, dtype=dtype).requires_grad_()
        for heads, dtype in ((4, torch.float32), (2, torch.float32), (2, torch.bfloat16))
    )
    given = {
        "cu_seq_lens_q": torch.tensor([0, longest, longest + 5], dtype=torch.int32),
        "max_length_q": longest,
        "sequence_lengths": lengths,
    }

    def run(autocast: bool) -> list[Tensor]:
        v = value if autocast else value.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, _ = packed_attention(torch.nn.Identity(), query, key, v, None, **given)
        return [out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))]

    ours, plain = run(True), run(False)
    assert ours[0].dtype == (torch.float32 if in_float32 else torch.bfloat16)
    assert all(map(torch.equal, ours, plain)) == in_float32
    for one, other in zip(ours, plain, strict=True):
        assert (one.float() - other.float()).norm() <= 0.03 * other.float().norm()

    doubles = [x.detach().double() for x in (query, key, value)]
    exact, _ = packed_attention(torch.nn.Identity(), *doubles, None, **given)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        found, _ = packed_attention(torch.nn.Identity(), *doubles, None, **given)
    assert found.dtype == torch.float64 and torch.equal(found, exact)
