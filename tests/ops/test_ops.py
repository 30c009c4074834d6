"""The native ops against their plain-torch twins in float64, and their autograd and tracing."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import palu
from palu import eager, ops
from palu.ops import fused
from palu.ops.library import NATIVE_DEVICES

TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5]
INDEX_DTYPES = [torch.int32, torch.int64]
ROWS, VOCAB, KEPT, HIDDEN = 5, 301, 17, 37

raw = torch.ops.palu


def float_dtypes(device: torch.device) -> list[torch.dtype]:
    half = [torch.float16] if device.type == "cuda" else []
    return [torch.float64, torch.float32, torch.bfloat16, *half]


def sliced(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random values in a slice of a larger tensor whose other values are NaN, or for bfloat16 2**100.

    On CPUs with AMX torch multiplies what lies behind a row of bfloat16 by zero (oneDNN issue 5717), which NaN survives.
    """
    others = 2.0**100 if dtype == torch.bfloat16 else math.nan
    whole = torch.full([size + 6 for size in shape], others, device=device, dtype=dtype)
    part = whole[tuple(slice(3, 3 + size) for size in shape)]
    return part.copy_(torch.randn(shape, device=device, dtype=dtype))


def layouts(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "slice": sliced(shape, device, dtype),
        "transposed": sliced(shape[::-1], device, dtype).t(),
        "strided": sliced((shape[0], 2 * shape[1]), device, dtype)[:, ::2],
        "one row, expanded": sliced((1, shape[1]), device, dtype).expand(shape),
        "one column, expanded": sliced((shape[0], 1), device, dtype).expand(shape),
    }


def indices(device: torch.device, dtype: torch.dtype = torch.int64, vocab: int = VOCAB) -> Tensor:
    """With duplicates, within a row and across rows, and both ends of the vocabulary."""
    index = torch.randint(0, vocab, (ROWS + 2, KEPT + 3), device=device, dtype=dtype)[1 : 1 + ROWS, 2 : 2 + KEPT]
    index[:, 4] = index[:, 1]
    index[2, 5] = index[3, 5]
    index[0, 0], index[0, 1] = 0, vocab - 1
    return index


def in_float64(function: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Loss and gradients of `function` on float64 copies of the tensors, upstream gradient 1, 2, ..."""
    return loss_and_gradients(function, *(None if t is None else t.double() for t in tensors))


def loss_and_gradients(function: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves)
    upstream = torch.arange(1, loss.shape[0] + 1, device=loss.device, dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream)


def assert_no_worse(
    ours: tuple[Tensor, ...], torchs: tuple[Tensor, ...], exact: tuple[Tensor, ...], terms: int = 1
) -> None:
    """Our error against float64 is within a small factor of what torch loses in the same dtype.

    The allowance on top of torch's own error is one rounding of the result to its dtype, and more where many `terms`
    are added up one by one: their errors grow as the root. Errors are relative to the largest value, or to 1 where all
    are smaller: expanded columns give a loss of zero.
    """
    for mine, twin, truth in zip(ours, torchs, exact, strict=True):
        scale = truth.abs().max().clamp(min=1)
        lost = (twin.double() - truth).abs().max() / scale
        error = (mine.double() - truth).abs().max() / scale
        # In float64 the eager twin is the truth itself, and tells nothing about rounding.
        allowed = (
            1e-13 if twin.dtype == torch.float64 else 2 * lost + max(2, terms**0.5 / 2) * torch.finfo(mine.dtype).eps
        )
        assert error <= allowed, (error, lost)


# -------------------------------------------------------------------------------------- correctness


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_topk_mse(device: torch.device, target: str | float, index_dtype: torch.dtype) -> None:
    index = indices(device, index_dtype)
    for dtype in float_dtypes(device):
        for name, logits in layouts((ROWS, VOCAB), device, dtype).items():
            ours = loss_and_gradients(lambda z: palu.topk_mse(z, index, target), logits)
            torchs = loss_and_gradients(lambda z: eager.topk_mse(z, index, target), logits)
            exact = in_float64(lambda z: eager.topk_mse(z, index, target), logits)
            assert ours[0].dtype == eager.acc_dtype(dtype), name
            assert ours[1].dtype == dtype, name
            assert_no_worse(ours, torchs, exact)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("impl", ["gather", "dense"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_topk_mse(
    device: torch.device,
    target: str | float,
    index_dtype: torch.dtype,
    impl: str,
    with_bias: bool,
) -> None:
    index = indices(device, index_dtype)
    for dtype in float_dtypes(device):
        weights = layouts((VOCAB, HIDDEN), device, dtype)
        for name, hidden in layouts((ROWS, HIDDEN), device, dtype).items():
            # Equal rows give equal logits, whose distance from their mean is nothing but rounding.
            degenerate = name == "one row, expanded" and isinstance(target, str)
            weight = weights["slice" if degenerate else name]
            bias = sliced((VOCAB,), device, dtype) if with_bias else None

            def twin(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
                return eager.linear_topk_mse(h, w, index, target, b)

            ours = loss_and_gradients(
                lambda h, w, b=None: palu.linear_topk_mse(h, w, index, target, b, impl=impl), hidden, weight, bias
            )
            torchs = loss_and_gradients(twin, hidden, weight, bias)
            exact = in_float64(twin, hidden, weight, bias)
            assert ours[0].dtype == eager.acc_dtype(dtype)
            assert_no_worse(ours, torchs, exact)


def test_long_rows_lose_no_more_than_torch(device: torch.device) -> None:
    """A mean over a whole vocabulary, far from zero, where a naive running sum would drift."""
    logits = torch.randn(3, 150_001, device=device) + 20
    index = torch.randint(0, logits.shape[1], (3, 5000), device=device)
    ours = loss_and_gradients(lambda z: palu.topk_mse(z, index), logits)
    torchs = loss_and_gradients(lambda z: eager.topk_mse(z, index), logits)
    exact = in_float64(lambda z: eager.topk_mse(z, index), logits)
    assert_no_worse(ours, torchs, exact)


@pytest.mark.parametrize("target", TARGETS)
def test_chosen_path_and_given_mean(device: torch.device, target: str | float) -> None:
    hidden = torch.randn(ROWS, HIDDEN, device=device, dtype=torch.float64)
    weight = torch.randn(VOCAB, HIDDEN, device=device, dtype=torch.float64)
    index = indices(device)
    expected = loss_and_gradients(lambda h, w: eager.linear_topk_mse(h, w, index, target), hidden, weight)
    mean = ops.weight_mean(weight)
    for given in (None, mean):
        ours = loss_and_gradients(
            lambda h, w, m=given: palu.linear_topk_mse(h, w, index, target, weight_mean=m), hidden, weight
        )
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_k_larger_than_the_vocabulary(device: torch.device) -> None:
    logits = torch.randn(2, 3, device=device, dtype=torch.float64)
    index = torch.randint(0, 3, (2, 11), device=device)
    ours = loss_and_gradients(lambda z: palu.topk_mse(z, index), logits)
    torch.testing.assert_close(ours, in_float64(lambda z: eager.topk_mse(z, index), logits))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_gradients_only_where_asked_for(device: torch.device, wanted: tuple[int, ...]) -> None:
    shapes = [(ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    tensors = [torch.randn(s, device=device, dtype=torch.float64) for s in shapes]
    index = indices(device)
    for i in wanted:
        tensors[i].requires_grad_()
    hidden, weight, bias = tensors
    asked = [tensors[i] for i in wanted]
    ours = torch.autograd.grad(
        palu.linear_topk_mse(hidden, weight, index, "global_mean", bias, impl="gather").sum(), asked
    )
    twin = eager.linear_topk_mse(hidden, weight, index, "global_mean", bias)
    torch.testing.assert_close(ours, torch.autograd.grad(twin.sum(), asked), rtol=1e-12, atol=1e-12)


def test_no_graph_without_a_gradient(device: torch.device) -> None:
    logits, index = torch.randn(ROWS, VOCAB, device=device), indices(device)
    assert not palu.topk_mse(logits, index).requires_grad
    _, residual = raw.topk_mse(logits.requires_grad_(), index, "global_mean", 0.0)
    assert not residual.requires_grad


def test_same_bits_every_time(device: torch.device) -> None:
    hidden, weight = torch.randn(36, 256, device=device), torch.randn(5003, 256, device=device)
    index = torch.randint(0, 5003, (36, 500), device=device)
    logits = hidden @ weight.t()
    threads = torch.get_num_threads()
    runs = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        runs.append(
            [
                *loss_and_gradients(lambda z: palu.topk_mse(z, index), logits),
                *loss_and_gradients(
                    lambda h, w: palu.linear_topk_mse(h, w, index, "global_mean", None, impl="gather"), hidden, weight
                ),
                *loss_and_gradients(lambda h: palu.linear_topk_mse(h, weight, index, impl="gather"), hidden),
            ]
        )
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("k", [KEPT, 130])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_topk_mse_of_a_frozen_head(device: torch.device, target: str | float, k: int, with_bias: bool) -> None:
    """On a CPU the gradient is formed in the forward pass, in as many slices as K is long."""
    index = torch.randint(0, VOCAB, (ROWS, k), device=device)
    for dtype in float_dtypes(device):
        weights = layouts((VOCAB, HIDDEN), device, dtype)
        for name, hidden in layouts((ROWS, HIDDEN), device, dtype).items():
            degenerate = name == "one row, expanded" and isinstance(target, str)
            weight = weights["slice" if degenerate else name]
            bias = sliced((VOCAB,), device, dtype) if with_bias else None
            ours = loss_and_gradients(
                lambda h, w=weight, b=bias: palu.linear_topk_mse(h, w, index, target, b, impl="gather"), hidden
            )
            torchs = loss_and_gradients(
                lambda h, w=weight, b=bias: eager.linear_topk_mse(h, w, index, target, b), hidden
            )
            w, b = weight.double(), None if bias is None else bias.double()
            exact = in_float64(lambda h, w=w, b=b: eager.linear_topk_mse(h, w, index, target, b), hidden)
            assert ours[1].dtype == dtype
            assert_no_worse(ours, torchs, exact, terms=k)
            # The training loop's call adds to a buffer.
            grad = torch.zeros_like(ours[1])
            row_weight = torch.arange(1, ROWS + 1, device=device, dtype=ours[0].dtype)
            loss = fused.linear_topk_mse_fwd_bwd(
                hidden, weight, index, row_weight, target, bias, None, (grad, None, None)
            )
            assert torch.equal(loss, ours[0]) and torch.equal(grad, ours[1])


@pytest.mark.skipif("cpu" not in NATIVE_DEVICES, reason="the twins form it in the backward pass")
def test_a_frozen_heads_rows_are_read_once() -> None:
    """The forward pass has formed the gradient: the backward pass needs neither head nor index."""
    hidden, weight = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    index = indices(torch.device("cpu"))
    for target in ("global_mean", "global_mean_detached", 0.5):
        with torch.profiler.profile() as profile:
            palu.linear_topk_mse(hidden, weight, index, target).sum().backward()
        called = {event.name for event in profile.events() if event.name.startswith("palu::")}
        assert called == {"palu::linear_topk_mse_frozen"}
    with pytest.raises(ValueError, match="target 'local_mean' is known too late"):
        raw.linear_topk_mse_frozen(hidden, weight, index, None, None, "local_mean", 0.0)


@pytest.mark.parametrize("impl", ["gather", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given_mean", [False, True])
def test_linear_topk_mse_under_autocast(device: torch.device, impl: str, dtype: torch.dtype, given_mean: bool) -> None:
    """It casts as F.linear does, whatever the mix of dtypes; leaves get their own dtype's gradient."""
    hidden = sliced((ROWS, HIDDEN), device, dtype)
    others = torch.float64 if dtype == torch.float64 else torch.float32  # which autocast leaves alone
    weight, bias = sliced((VOCAB, HIDDEN), device, others), sliced((VOCAB,), device, others)
    index, mean = indices(device), ops.weight_mean(weight.bfloat16() if others == torch.float32 else weight)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        given = {"weight_mean": mean} if given_mean else {}
        return palu.linear_topk_mse(h, w, index, "global_mean", b, impl=impl, **given)

    with torch.autocast(device.type, torch.bfloat16):
        results = loss_and_gradients(ours, hidden, weight, bias)
        torchs = loss_and_gradients(lambda h, w, b: eager.linear_topk_mse(h, w, index, "global_mean", b), hidden, weight, bias)  # fmt: skip
    assert [t.dtype for t in results] == [t.dtype for t in torchs]
    cast = [t if others == torch.float64 else t.bfloat16() for t in (hidden, weight, bias)]
    assert torch.equal(results[0], ours(*cast))
    exact = in_float64(lambda h, w, b: eager.linear_topk_mse(h, w, index, "global_mean", b), *cast)
    for mine, twin, truth in zip(results, torchs, exact, strict=True):
        scale = truth.abs().max()
        error, lost = ((t.double() - truth).abs().max() / scale for t in (mine, twin))
        # A leaf of float32 gets a gradient that was rounded to bfloat16, as torch's own does.
        assert error <= 2 * lost + (1e-12 if others == torch.float64 else 2 * torch.finfo(torch.bfloat16).eps)


# ------------------------------------------------------------------------------------- raw backwards


@pytest.mark.parametrize("through_mean", [False, True])
def test_topk_mse_backward_overwrites_every_element(device: torch.device, through_mean: bool) -> None:
    index, residual = indices(device), torch.randn(ROWS, KEPT, device=device, dtype=torch.float64)
    grad = torch.randn(ROWS, device=device, dtype=torch.float64)
    whole = torch.full((ROWS + 2, VOCAB + 5), math.nan, device=device, dtype=torch.float64)
    view = whole[1 : 1 + ROWS, 2 : 2 + VOCAB]
    raw.topk_mse_backward(grad, residual, index, through_mean, view)
    g = 2 / KEPT * grad[:, None] * residual
    expected = torch.zeros(ROWS, VOCAB, device=device, dtype=torch.float64).scatter_add_(1, index, g)
    if through_mean:
        expected -= g.sum(1, keepdim=True) / VOCAB
    torch.testing.assert_close(view, expected, rtol=1e-12, atol=1e-12)
    assert whole.isnan().sum() == whole.numel() - view.numel()  # and nothing outside it


@pytest.mark.parametrize("through_mean", [False, True])
def test_linear_topk_mse_backward_adds(device: torch.device, through_mean: bool) -> None:
    shapes = [(ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    hidden, weight, bias = (sliced(s, device, torch.float64) for s in shapes)
    index = indices(device)
    target = "global_mean" if through_mean else "global_mean_detached"
    mean = weight.mean(0)
    _, residual = raw.linear_topk_mse(hidden, weight, index, bias, mean, target, 0.0)
    grad = torch.arange(1, ROWS + 1, device=device, dtype=torch.float64)
    _, *gradients = in_float64(lambda h, w, b: eager.linear_topk_mse(h, w, index, target, b), hidden, weight, bias)
    buffers = [
        sliced(s, device, torch.float64) if len(s) == 2 else torch.randn(s, device=device, dtype=torch.float64)
        for s in shapes
    ]
    before = [b.clone() for b in buffers]
    raw.linear_topk_mse_backward(grad, residual, hidden, weight, index, mean, through_mean, *buffers)
    for buffer, start, gradient in zip(buffers, before, gradients, strict=True):
        torch.testing.assert_close(buffer, start + gradient, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------- in-place losses


def rowwise(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = 4 * sliced((ROWS, VOCAB), device, dtype)
    ref_logits = 4 * sliced((ROWS, VOCAB), device, dtype)
    labels = torch.randint(0, VOCAB, (ROWS,), device=device)
    weight = torch.rand(ROWS, device=device, dtype=eager.acc_dtype(dtype))
    weight[1] = 0
    return logits, ref_logits, labels, weight


def padded_copy(logits: Tensor) -> Tensor:
    """A copy whose rows are not neighbours in memory."""
    return torch.nn.functional.pad(logits, (0, 7), value=math.nan)[:, : logits.shape[1]]


def test_cross_entropy_(device: torch.device) -> None:
    for dtype in float_dtypes(device):
        logits, _, labels, weight = rowwise(dtype, device)
        z = logits.double().detach().requires_grad_()
        truth = torch.nn.functional.cross_entropy(z, labels, reduction="none")
        (gradient,) = torch.autograd.grad(truth, z, weight.double())
        ours = padded_copy(logits)
        loss = raw.cross_entropy_(ours, labels, weight)
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=2 * torch.finfo(dtype).eps)
        assert ours[1].abs().max() == 0


@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_unlikelihood_(device: torch.device, floor: float) -> None:
    for dtype in float_dtypes(device):
        logits, _, labels, weight = rowwise(dtype, device)
        labels[::2] = logits.argmax(1)[::2]
        z = logits.double().detach().requires_grad_()
        p = z.softmax(1).gather(1, labels[:, None])[:, 0]
        truth = -torch.log1p(-p) * (p > floor)
        (gradient,) = torch.autograd.grad(truth, z, weight.double())
        assert (p > floor).sum() > 0 and (floor == 0 or (p <= floor).any())
        ours = padded_copy(logits)
        loss = raw.unlikelihood_(ours, labels, weight, floor)
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=2 * torch.finfo(dtype).eps)
        assert ours[1].abs().max() == 0 and not ours[p <= floor].any()


def test_unlikelihood_of_nan_is_nan(device: torch.device) -> None:
    for dtype in float_dtypes(device):
        logits, _, labels, weight = rowwise(dtype, device)
        logits[2, 5] = math.nan
        loss = raw.unlikelihood_(logits, labels, weight, 0.02)
        assert loss.isnan().nonzero().tolist() == [[2]] and logits[2].isnan().all()
        assert logits.isnan().any(1).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0, 80.0])
def test_unlikelihood_pushes_a_certain_token(device: torch.device, margin: float) -> None:
    """Where p is 1 in float32 there is still a whole gradient: 1 at the token, and the others' shares of -1."""
    for dtype in float_dtypes(device):
        logits = torch.zeros(1, 5, device=device, dtype=dtype)
        logits[0, 3] = margin
        label, weight = torch.tensor([3], device=device), torch.ones(1, device=device, dtype=eager.acc_dtype(dtype))
        loss = raw.unlikelihood_(logits, label, weight, 0.02)
        apart = margin - math.log(4)
        p = 1 / (1 + math.exp(-apart))
        assert loss.item() == pytest.approx(math.log1p(math.exp(apart)), rel=1e-6)
        assert logits[0].tolist() == pytest.approx([-p / 4, -p / 4, -p / 4, p, -p / 4], rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_div_(device: torch.device, reverse: bool) -> None:
    for dtype in float_dtypes(device):
        logits, ref_logits, _, weight = rowwise(dtype, device)
        z = logits.double().detach().requires_grad_()
        log_p, log_q = z.log_softmax(1), ref_logits.double().log_softmax(1)
        inputs = (log_q, log_p) if reverse else (log_p, log_q)
        truth = torch.nn.functional.kl_div(*inputs, log_target=True, reduction="none").sum(1)
        (gradient,) = torch.autograd.grad(truth, z, weight.double())
        ours, kept = padded_copy(logits), ref_logits.clone()
        loss = raw.kl_div_(ours, ref_logits, weight, reverse)
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=8 * torch.finfo(dtype).eps)
        assert torch.equal(ref_logits, kept)


def test_in_place_losses_survive_large_logits(device: torch.device) -> None:
    logits = torch.zeros(2, VOCAB, device=device)
    logits[:, 7] = 1e4
    labels, weight = torch.tensor([7, 8], device=device), torch.ones(2, device=device)
    loss = raw.cross_entropy_(logits.clone(), labels, weight)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e4], device=device))
    loss = raw.unlikelihood_(logits.clone(), labels, weight, 0.0)
    torch.testing.assert_close(loss, torch.tensor([1e4 - math.log(VOCAB - 1), 0.0], device=device))
    for reverse in (False, True):
        same = raw.kl_div_(logits.clone(), logits, weight, reverse)
        torch.testing.assert_close(same, torch.zeros(2, device=device))


def test_in_place_losses_under_autocast(device: torch.device) -> None:
    """The caller's autocast has no say in a kernel's arithmetic."""
    logits, ref_logits, labels, weight = rowwise(torch.float32, device)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda z: raw.cross_entropy_(z, labels, weight),
        lambda z: raw.unlikelihood_(z, labels, weight, 0.02),
        lambda z: raw.kl_div_(z, ref_logits, weight, False),
        lambda z: raw.kl_div_(z, ref_logits, weight, True),
    ]
    for call in calls:
        plain, cast = logits.clone(), logits.clone()
        loss = call(plain)
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(call(cast), loss)
        assert torch.equal(cast, plain)


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_scale_(device: torch.device, factor: float) -> None:
    for dtype in float_dtypes(device):
        for of_factor in (torch.float32, torch.float64):
            tensor = torch.randn(3, 5, device=device, dtype=dtype)
            expected = tensor * factor
            raw.scale_(tensor, torch.tensor(factor, device=device, dtype=of_factor))
            assert torch.equal(tensor, expected)


# -------------------------------------------------------------------------------------------- empty


@pytest.mark.parametrize("k", [0, 4])
def test_no_rows(device: torch.device, k: int) -> None:
    index = torch.empty(0, k, dtype=torch.int64, device=device)
    logits = torch.empty(0, VOCAB, device=device, requires_grad=True)
    hidden = torch.empty(0, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=True)
    palu.topk_mse(logits, index).sum().backward()
    palu.linear_topk_mse(hidden, weight, index, "global_mean", None, impl="gather").sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, VOCAB)
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None and not weight.grad.any()
    none = torch.empty(0, device=device)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    assert raw.cross_entropy_(logits.detach().clone(), labels, none).shape == (0,)
    assert raw.unlikelihood_(logits.detach().clone(), labels, none, 0.02).shape == (0,)
    assert raw.kl_div_(logits.detach().clone(), logits.detach(), none, True).shape == (0,)


# ------------------------------------------------------------------------------------------- errors


def op_arguments(device: torch.device) -> dict[str, Any]:
    return {
        "logits": torch.randn(2, 6, device=device),
        "hidden": torch.randn(2, 3, device=device),
        "weight": torch.randn(6, 3, device=device),
        "bias": torch.randn(6, device=device),
        "index": torch.randint(0, 6, (2, 4), device=device),
        "labels": torch.randint(0, 6, (2,), device=device),
        "row_weight": torch.ones(2, device=device),
        "factor": torch.tensor(2.0, device=device),
    }


CALLS: dict[str, Callable[..., Any]] = {
    "topk_mse": lambda a, **o: palu.topk_mse(a["logits"], a["index"], **o),
    "linear_topk_mse": lambda a, **o: palu.linear_topk_mse(a["hidden"], a["weight"], a["index"], bias=a["bias"], **o),
    "cross_entropy_": lambda a: raw.cross_entropy_(a["logits"], a["labels"], a["row_weight"]),
    "unlikelihood_": lambda a, floor=0.02: raw.unlikelihood_(a["logits"], a["labels"], a["row_weight"], floor),
    "kl_div_": lambda a: raw.kl_div_(a["logits"], a["ref_logits"], a["row_weight"], False),
    "scale_": lambda a: raw.scale_(a["logits"], a["factor"]),
}

BAD: list[tuple[str, dict[str, Callable[[Tensor], Tensor]], type[Exception], str]] = [
    ("topk_mse", {"logits": lambda t: t.int()}, TypeError, "logits must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    ("topk_mse", {"logits": lambda t: t[0]}, ValueError, "logits must have 2 dimensions, got shape [6]"),
    ("topk_mse", {"index": lambda t: t.short()}, TypeError, "index must be int32 or int64, got int16"),
    ("topk_mse", {"index": lambda t: t[0]}, ValueError, "index must have 2 dimensions, got shape [4]"),
    ("topk_mse", {"index": lambda t: t[:1]}, ValueError, "index must have one row for each of the 2 rows, got 1"),
    ("topk_mse", {"index": lambda t: t[:, :0]}, ValueError, "needs at least one index per row and a vocabulary that is not empty, got K = 0 and V = 6"),
    ("topk_mse", {"logits": lambda t: t[:, :0]}, ValueError, "needs at least one index per row and a vocabulary that is not empty, got K = 4 and V = 0"),
    ("linear_topk_mse", {"hidden": lambda t: t.int()}, TypeError, "hidden must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    ("linear_topk_mse", {"weight": lambda t: t.double()}, TypeError, "weight must be float32, got float64"),
    ("linear_topk_mse", {"weight": lambda t: t[:, :2]}, ValueError, "hidden has 3 columns but weight has 2"),
    ("linear_topk_mse", {"bias": lambda t: t.double()}, TypeError, "bias must be float32, got float64"),
    ("linear_topk_mse", {"bias": lambda t: t[:5]}, ValueError, "bias must have shape [6], got [5]"),
    ("cross_entropy_", {"labels": lambda t: t.int()}, TypeError, "labels must be int64, got int32"),
    ("cross_entropy_", {"labels": lambda t: t[:1]}, ValueError, "labels must have shape [2], got [1]"),
    ("cross_entropy_", {"row_weight": lambda t: t.double()}, TypeError, "row_weight must be float32, got float64"),
    ("cross_entropy_", {"row_weight": lambda t: t[:1]}, ValueError, "row_weight must have shape [2], got [1]"),
    ("cross_entropy_", {"logits": lambda t: t[:, :0]}, ValueError, "the vocabulary is empty"),
    ("unlikelihood_", {"labels": lambda t: t.int()}, TypeError, "labels must be int64, got int32"),
    ("unlikelihood_", {"labels": lambda t: t[:1]}, ValueError, "labels must have shape [2], got [1]"),
    ("unlikelihood_", {"row_weight": lambda t: t.double()}, TypeError, "row_weight must be float32, got float64"),
    ("unlikelihood_", {"logits": lambda t: t[:, :1]}, ValueError, "a vocabulary of one entry has no other to choose"),
    ("kl_div_", {"ref_logits": lambda t: t.double()}, TypeError, "ref_logits must be float32, got float64"),
    ("kl_div_", {"ref_logits": lambda t: t[:, :5]}, ValueError, "ref_logits must have shape [2, 6], got [2, 5]"),
    ("scale_", {"logits": lambda t: t.int()}, TypeError, "tensor must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    ("scale_", {"logits": lambda t: t[:, :5]}, ValueError, "tensor must be contiguous, got strides [6, 1]"),
    ("scale_", {"logits": lambda t: t.requires_grad_()}, RuntimeError, "tensor requires grad and would be overwritten"),
    ("scale_", {"factor": lambda t: t[None]}, ValueError, "factor must have 0 dimensions, got shape [1]"),
    ("scale_", {"factor": lambda t: t.bfloat16()}, TypeError, "factor must be float32 or float64, got bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "spoil", "error", "message"), BAD)
def test_bad_arguments(
    device: torch.device,
    op: str,
    spoil: dict[str, Callable[[Tensor], Tensor]],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = op_arguments(device)
    arguments["ref_logits"] = arguments["logits"].clone()
    for name, change in spoil.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(error) as caught:
        CALLS[op](arguments)
    assert str(caught.value).startswith(f"palu::{op}: {message}")


DENSE = [case[1:] for case in BAD if case[0] == "linear_topk_mse"]
DENSE += [
    ({"hidden": lambda t: t[:, :2]}, ValueError, "hidden has 2 columns but weight has 3"),
    ({"weight": lambda t: t.to("meta")}, ValueError, "weight is on meta but hidden is on"),
    ({"bias": lambda t: t.to("meta")}, ValueError, "bias is on meta but hidden is on"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), DENSE)
def test_bad_arguments_of_the_dense_product(
    device: torch.device, spoil: dict[str, Callable[[Tensor], Tensor]], error: type[Exception], message: str
) -> None:
    """torch's linear() would say it in other words, and compute nonsense beside a meta tensor."""
    a = op_arguments(device)
    for name, change in spoil.items():
        a[name] = change(a[name])
    with pytest.raises(error) as caught:
        palu.linear_topk_mse(a["hidden"], a["weight"], a["index"], "global_mean", a["bias"], impl="dense")
    assert str(caught.value).startswith(f"palu::linear_topk_mse: {message}")


@pytest.mark.parametrize("op", ["topk_mse", "linear_topk_mse"])
def test_unknown_target(device: torch.device, op: str) -> None:
    with pytest.raises(ValueError, match="unknown target 'mean'; choose one of global_mean, global_mean_detached, "):
        CALLS[op](op_arguments(device), target="mean")


@pytest.mark.parametrize("floor", [1.0, -0.5, math.nan])
def test_floor_of_unlikelihood(device: torch.device, floor: float) -> None:
    message = rf"palu::unlikelihood_: floor must be in \[0, 1\), got {floor:g}$"
    with pytest.raises(ValueError, match=message):
        CALLS["unlikelihood_"](op_arguments(device), floor=floor)


@pytest.mark.parametrize("op", ["topk_mse", "linear_topk_mse"])
@pytest.mark.parametrize("bad", [6, -1, 2**31 - 1])
@pytest.mark.parametrize("dtype", INDEX_DTYPES)
def test_index_out_of_range(op: str, bad: int, dtype: torch.dtype) -> None:
    arguments = op_arguments(torch.device("cpu"))  # on CUDA a device-side assertion ends the process
    arguments["index"] = arguments["index"].to(dtype)
    arguments["index"][1, 2] = bad
    message = rf"palu::{op}: index\[1, 2\] = {bad} is out of range for a vocabulary of 6$"
    with pytest.raises(IndexError, match=message):
        CALLS[op](arguments)


def test_backward_index_out_of_range() -> None:
    index = torch.tensor([[0, 6]])
    grad, residual, buffer = torch.ones(1), torch.ones(1, 2), torch.empty(1, 6)
    with pytest.raises(IndexError, match=r"palu::topk_mse_backward: index\[0, 1\] = 6 is out of range"):
        raw.topk_mse_backward(grad, residual, index, True, buffer)
    hidden, weight = torch.ones(1, 3), torch.ones(6, 3)
    with pytest.raises(IndexError, match=r"palu::linear_topk_mse_backward: index\[0, 1\] = 6 is out of range"):
        raw.linear_topk_mse_backward(grad, residual, hidden, weight, index, None, False, torch.zeros(1, 3), None, None)


def test_bad_backward_arguments(device: torch.device) -> None:
    index = torch.zeros(2, 4, dtype=torch.int64, device=device)
    grad, residual = torch.ones(2, device=device), torch.ones(2, 4, device=device)
    buffer = torch.empty(2, 6, device=device)

    def call(**changed: Any) -> None:
        given = {"grad": grad, "residual": residual, "index": index, "buffer": buffer} | changed
        raw.topk_mse_backward(given["grad"], given["residual"], given["index"], True, given["buffer"])

    for changed, error, message in [
        ({"grad": grad[:1]}, ValueError, r"grad must have shape \[2\], got \[1\]"),
        ({"grad": grad.double()}, TypeError, "grad must be float32, got float64"),
        ({"residual": residual[:, :3]}, ValueError, r"residual must have shape \[2, 4\], got \[2, 3\]"),
        ({"residual": residual.bfloat16()}, TypeError, "residual must be float32, got bfloat16"),
        (
            {"buffer": buffer.t().contiguous().t()},
            ValueError,
            "grad_logits must have unit stride in its last",
        ),
    ]:
        with pytest.raises(error, match=message):
            call(**changed)

    hidden, weight = torch.ones(2, 3, device=device), torch.ones(6, 3, device=device)
    mean = weight.mean(0)
    for changed, error, message in [
        ({"grad_hidden": hidden.double()}, TypeError, "grad_hidden must be float32, got float64"),
        ({"grad_hidden": hidden[:1]}, ValueError, r"grad_hidden must have shape \[2, 3\], got \[1, 3\]"),
        ({"grad_weight": weight[:1]}, ValueError, r"grad_weight must have shape \[6, 3\], got \[1, 3\]"),
        ({"grad_bias": weight[:, 0]}, ValueError, "grad_bias must have unit stride in its last dimension"),
        ({"mean": None, "grad_hidden": hidden}, ValueError, "grad_hidden through the mean needs weight_mean"),
        ({"mean": mean.double()}, TypeError, "weight_mean must be float32, got float64"),
    ]:
        given = {"mean": mean, "grad_hidden": None, "grad_weight": None, "grad_bias": None} | changed
        with pytest.raises(error, match=f"palu::linear_topk_mse_backward: {message}"):
            raw.linear_topk_mse_backward(grad, residual, hidden, weight, index, given["mean"], True, given["grad_hidden"], given["grad_weight"], given["grad_bias"])  # fmt: skip


WRITTEN: dict[str, Callable[[Tensor, dict[str, Any]], Any]] = {
    "topk_mse_backward": lambda t, a: raw.topk_mse_backward(a["row_weight"], a["residual"], a["index"], True, t),
    "linear_topk_mse_backward": lambda t, a: raw.linear_topk_mse_backward(a["row_weight"], a["residual"], a["logits"], a["head"], a["index"], None, False, t, None, None),
    "cross_entropy_": lambda t, a: raw.cross_entropy_(t, a["labels"], a["row_weight"]),
    "unlikelihood_": lambda t, a: raw.unlikelihood_(t, a["labels"], a["row_weight"], 0.02),
    "kl_div_": lambda t, a: raw.kl_div_(t, a["logits"], a["row_weight"], True),
}  # fmt: skip


@pytest.mark.parametrize("op", list(WRITTEN))
def test_what_no_written_tensor_may_be(device: torch.device, op: str) -> None:
    arguments = op_arguments(device) | {"residual": torch.ones(2, 4, device=device)}
    arguments["head"] = torch.ones(6, 6, device=device)
    storage = torch.zeros(12, device=device)
    for strides, message in [
        ((0, 1), "must not have rows that overlap, got shape"),
        ((5, 1), "must not have rows that overlap, got shape"),
        ((1, 2), "must have unit stride in its last dimension"),
    ]:
        with pytest.raises(ValueError, match=rf"palu::{op}: \w+ {message}"):
            WRITTEN[op](storage.as_strided((2, 6), strides), arguments)
    for written in (storage.view(2, 6).requires_grad_(), storage.view(2, 6).requires_grad_() * 1):
        with pytest.raises(RuntimeError, match=rf"palu::{op}: \w+ requires grad and would be overwritten"):
            WRITTEN[op](written, arguments)
    assert not storage.any()
    with torch.no_grad():
        WRITTEN[op](storage.view(2, 6), arguments)
    assert storage.any()


@pytest.mark.parametrize("op", sorted({*CALLS, *WRITTEN}))
def test_meta_tensor_beside_others(device: torch.device, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls the fake then, whose results and buffers nobody would fill."""
    arguments = op_arguments(device) | {"residual": torch.ones(2, 4, device=device)}
    arguments |= {"ref_logits": arguments["logits"].clone(), "head": torch.ones(6, 6, device=device)}
    spoiled = "factor" if op == "scale_" else "row_weight" if op in WRITTEN else "index"
    arguments[spoiled] = arguments[spoiled].to("meta")
    message = rf"palu::{op}: \w+ is on \S+ but \w+ is on \S+; move it there$"
    with pytest.raises(ValueError, match=message):
        WRITTEN[op](arguments["logits"], arguments) if op in WRITTEN else CALLS[op](arguments)


def test_global_target_needs_the_mean(device: torch.device) -> None:
    a = op_arguments(device)
    with pytest.raises(ValueError, match=r"target 'global_mean' needs weight_mean = weight.mean\(0\)"):
        raw.linear_topk_mse(a["hidden"], a["weight"], a["index"], None, None, "global_mean", 0.0)


@pytest.mark.parametrize("op", list(CALLS))
def test_float16_on_the_cpu(op: str) -> None:
    arguments = op_arguments(torch.device("cpu"))
    arguments["ref_logits"] = arguments["logits"]
    arguments = {name: t.half() if t.is_floating_point() else t for name, t in arguments.items()}
    with pytest.raises(TypeError, match=f"palu::{op}: .*float16"):
        CALLS[op](arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices with kernels")
@pytest.mark.parametrize("op", ["topk_mse", "linear_topk_mse"])
def test_mixed_devices(op: str) -> None:
    arguments = op_arguments(torch.device("cuda:0"))
    arguments["index"] = arguments["index"].cpu()
    with pytest.raises(ValueError, match=rf"palu::{op}: index is on cpu but \w+ is on cuda:0; move it there"):
        CALLS[op](arguments)


# ----------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(device: torch.device, target: str | float) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)

    index = torch.randint(0, 9, (3, 4), device=device)
    hidden, weight, bias = leaf(3, 5), leaf(9, 5), leaf(9)
    if target != "global_mean_detached":  # whose gradient is by definition not the loss's derivative
        assert torch.autograd.gradcheck(lambda z: palu.topk_mse(z, index, target), leaf(3, 9))
        assert torch.autograd.gradcheck(
            lambda h, w, b: palu.linear_topk_mse(h, w, index, target, b, impl="gather"), (hidden, weight, bias)
        )


def test_second_derivative_raises(device: torch.device) -> None:
    logits = torch.randn(ROWS, VOCAB, device=device, requires_grad=True)
    hidden = torch.randn(ROWS, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=True)
    index = indices(device)
    upstream = torch.ones(ROWS, device=device, requires_grad=True)
    for loss, leaf in [
        (palu.topk_mse(logits, index), logits),
        (palu.linear_topk_mse(hidden, weight, index, "global_mean", None, impl="gather"), hidden),
    ]:
        (first,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
        for asked in (leaf, upstream):
            with pytest.raises(RuntimeError, match=r"palu::\w+ has first derivatives only; for a second, use its twin"):
                torch.autograd.grad(first.sum(), asked, retain_graph=True)
    loss, _ = raw.topk_mse(logits, index, "global_mean", 0.0)
    with pytest.raises(RuntimeError, match="palu::topk_mse has first derivatives only"):
        torch.autograd.grad(loss.sum(), logits, create_graph=True)


def op_samples(device: torch.device, dtype: torch.dtype, grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    acc = eager.acc_dtype(dtype)

    def leaf(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=of, requires_grad=grad)

    def plain(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=of)

    index = torch.randint(0, 9, (3, 4), device=device)
    labels = torch.randint(0, 9, (3,), device=device)
    mean = plain(5, of=acc)
    samples: list[tuple[Any, tuple[Any, ...]]] = [
        (raw.topk_mse_backward, (plain(3, of=acc), plain(3, 4, of=acc), index, True, plain(3, 9))),
        (
            raw.linear_topk_mse_backward,
            (plain(3, of=acc), plain(3, 4, of=acc), leaf(3, 5), leaf(9, 5), index, mean, True, plain(3, 5), plain(9, 5), plain(9)),
        ),
        (
            raw.linear_topk_mse_backward,
            (plain(3, of=acc), plain(3, 4, of=acc), leaf(3, 5), leaf(9, 5), index, None, True, None, plain(9, 5), None),
        ),
        (raw.cross_entropy_, (plain(3, 9), labels, plain(3, of=acc))),
        (raw.unlikelihood_, (plain(3, 9), labels, plain(3, of=acc), 0.02)),
        (raw.kl_div_, (plain(3, 9), plain(3, 9), plain(3, of=acc), False)),
        (raw.kl_div_, (plain(3, 9), plain(3, 9), plain(3, of=acc), True)),
        (raw.scale_, (plain(3, 9), torch.tensor(2.0, device=device))),
    ]  # fmt: skip
    for target in ("global_mean", "global_mean_detached", "local_mean", "constant"):
        samples += [
            (raw.topk_mse, (leaf(3, 9), index, target, 0.5)),
            (raw.linear_topk_mse, (leaf(3, 5), leaf(9, 5), index, leaf(9), mean, target, 0.5)),
        ]
    samples.append((raw.linear_topk_mse, (leaf(3, 5), leaf(9, 5), index, None, None, "local_mean", 0.5)))
    if device.type == "cpu" and "cpu" in NATIVE_DEVICES:
        for target in ("global_mean", "constant"):
            arguments = (leaf(3, 5), plain(9, 5), index, plain(9), mean, target, 0.5)
            samples.append((raw.linear_topk_mse_frozen, arguments))
    return samples


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device: torch.device, dtype: torch.dtype, grad: bool) -> None:
    for op, arguments in op_samples(device, dtype, grad):
        torch.library.opcheck(op.default, arguments)


# ---------------------------------------------------------------------------------------- compiling


def test_compile_fullgraph(device: torch.device) -> None:
    hidden, weight = torch.randn(ROWS, HIDDEN, device=device), torch.randn(VOCAB, HIDDEN, device=device)
    index = indices(device)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return palu.linear_topk_mse(h, w, index) + palu.topk_mse(h @ w.t(), index, "local_mean")

    expected = loss_and_gradients(function, hidden, weight)
    compiled = loss_and_gradients(torch.compile(function, fullgraph=True), hidden, weight)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)

    def frozen(h: Tensor) -> Tensor:
        return palu.linear_topk_mse(h, weight, index, impl="gather")

    compiled = loss_and_gradients(torch.compile(frozen, fullgraph=True, backend="aot_eager"), hidden)
    torch.testing.assert_close(compiled, loss_and_gradients(frozen, hidden), rtol=1e-4, atol=1e-4)


def test_compile_fullgraph_in_place_losses(device: torch.device) -> None:
    logits, ref_logits, labels, weight = rowwise(torch.float32, device)

    def function(z: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        a, b = z * 2, z * 3
        return raw.cross_entropy_(a, labels, weight), a, raw.kl_div_(b, q, weight, True), b

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ref_logits), function(logits, ref_logits), rtol=1e-4, atol=1e-5)


def test_compile_fullgraph_under_autocast(device: torch.device) -> None:
    hidden, weight = torch.randn(ROWS, HIDDEN, device=device), torch.randn(VOCAB, HIDDEN, device=device)
    index = indices(device)

    def function(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return palu.linear_topk_mse(h, w, index)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(function, hidden, weight)
    torch.testing.assert_close(loss_and_gradients(compiled, hidden, weight), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first_use", ["palu.topk_mse(z, i)", "palu.linear_topk_mse(z, w, i)"])
def test_compile_when_the_first_use_is_inside(first_use: str) -> None:
    script = f"""
import sys
import palu
assert "torch" not in sys.modules
import torch
z, w, i = torch.randn(2, 5, requires_grad=True), torch.randn(9, 5), torch.zeros(2, 3, dtype=torch.long)
compiled = torch.compile(lambda z: {first_use}, fullgraph=True, backend="aot_eager")
compiled(z).sum().backward()
assert z.grad.abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("k", [1000, 5000])
def test_loss_from_hidden_states_allocates_under_a_tenth_of_dense(device: torch.device, k: int) -> None:
    rows, vocab, d = 36, 128256, 64
    hidden = torch.randn(rows, d, device=device, requires_grad=True)
    weight = torch.randn(vocab, d, device=device)
    index = torch.randint(0, vocab, (rows, k), device=device)
    mean = ops.weight_mean(weight)
    dense = 2 * rows * vocab * hidden.element_size()  # logits and their gradient

    def run() -> None:
        palu.linear_topk_mse(
            hidden, weight, index, "global_mean", None, weight_mean=mean, impl="gather"
        ).sum().backward()

    run()
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0 < peak < dense / 10
