"""Packed examples are kept apart, by transformers' attention and by palu's; test_packing_probe.py has the models."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import VOCAB, retain_rows, tiny_llama
from torch import Tensor

from palu.data.examples import load_retain
from palu.data.packing import Item, Packed, pack, retain_items
from palu.models.attention import FLOAT32_TOKENS, packed_attention, shares_prefix, use_packed_attention
from palu.models.head import body_of


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_example_does_not_see_the_others(device: torch.device, attention: str, dtype: torch.dtype) -> None:
    """Not approximately: not one bit of its hidden states changes with another's tokens."""
    model = tiny_llama(attention=attention, dtype=dtype).to(device)
    items = retain_items(load_retain(retain_rows(3), None, max_length=100).examples)
    before, middle, after = torch.tensor([len(item.input_ids) for item in items]).cumsum(0).tolist()

    def states(ids: list[Tensor]) -> Tensor:
        packed = pack([Item(i, item.rows) for i, item in zip(ids, items, strict=True)])
        with torch.no_grad(), use_packed_attention(model):
            return body_of(model)(**packed.to(device).inputs()).last_hidden_state[0]

    with use_packed_attention(model):
        served = attention == "sdpa" and (device.type == "cpu" or dtype == torch.bfloat16)
        assert model.config._attn_implementation == ("palu_packed" if served else attention)
    assert model.config._attn_implementation == attention
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


@pytest.mark.parametrize("served", [True, False], ids=["palu", "with a bias"])
@pytest.mark.parametrize("window", [None, 1, 8, 15])
def test_examples_go_on_from_a_shared_beginning(window: int | None, served: bool) -> None:
    """As if each had the tokens itself: output and gradients, in float64."""
    torch.manual_seed(0)
    system = torch.arange(100, 112)
    ids = [torch.arange(5), *(torch.cat([system[:n], torch.arange(m)]) for n, m in ((12, 6), (12, 2), (9, 4)))]
    ids[2][-1] = 50
    items = [Item(i, torch.arange(len(i))) for i in ids]
    shared, apart = pack(items, share_prefix=True), pack(items)
    assert shared.shared_lengths == (0, 0, 13, 9) and shared.leader == 1
    rows = torch.cat(shared.rows(items))
    module, length = torch.nn.Identity(), shared.input_ids.shape[1]
    q, k, v = (torch.randn(1, heads, length, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    upstream = torch.randn(1, len(rows), 4, 16, dtype=torch.float64)
    bias = torch.randn(1, 4, len(rows), len(rows), dtype=torch.float64)
    small = torch.zeros(1, 4, length, length, dtype=torch.float64)
    small[..., rows[:, None], rows] = bias
    # A score of two tokens that several examples share is one and the same.
    bias = small[..., rows[:, None], rows]

    def run(packed: Packed, where: Tensor | slice, **more: Tensor) -> list[Tensor]:
        given = [x[:, :, where] for x in (q, k, v)]
        if "position_bias" in more:  # transformers' attention repeats no heads for a bias
            module.num_key_value_groups = 2
        out, _ = packed_attention(module, *given, None, scaling=0.3, sliding_window=window, **packed.inputs(), **more)
        out = out[:, rows] if isinstance(where, slice) else out
        return [out, *torch.autograd.grad((out * upstream).sum(), (q, k, v))]

    ours = run(shared, slice(None), **({} if served else {"position_bias": small}))
    theirs = run(apart, rows, **({} if served else {"position_bias": bias}))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_which_models_share_a_beginning() -> None:
    assert shares_prefix(tiny_llama(attention="sdpa"))
    assert not shares_prefix(tiny_llama(attention="eager"))
    assert not shares_prefix(tiny_llama(attention_dropout=0.1))


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
        "shared_lengths": (0, 0),
        "leader": 0,
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
