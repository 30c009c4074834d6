"""The native ops against plain torch in float64, their autograd and tracing, and what none of them may lose."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_calls import CPU, OPS, SOFTMAX_LOSSES, try_one
from helpers.op_cases import Draw, prefix_mask
from helpers.peak import peak_bytes
from torch import Tensor

import palu
from palu import eager, ops
from palu.losses import LocalTerm, LocalUnlikelihoodTerm
from palu.models.head import Head
from palu.ops import functional
from palu.ops.library import NATIVE_DEVICES

TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5]
ROWS, VOCAB, KEPT, HIDDEN = 5, 301, 17, 37

raw = torch.ops.palu


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_random_calls(device: torch.device, op: str, bad: bool) -> None:
    """Any sizes, dtypes and memory layouts, the public functions and the raw gradients; and what they must refuse."""
    for seed in range(200):
        try_one(seed, op, device, bad)


def test_the_twin_of_prefix_mask() -> None:
    for seed in range(200):
        case = prefix_mask(Draw(seed))
        assert torch.equal(eager.prefix_mask(**case.inputs), case.outputs(case.inputs)["mask"]), case.text


def test_global_target_needs_the_mean(device: torch.device) -> None:
    h, w, index = torch.ones(2, 3, device=device), torch.ones(6, 3, device=device), indices(device, 6)[:2]
    with pytest.raises(ValueError, match="weight_mean"):
        raw.linear_topk_mse(h, w, index, None, None, "global_mean", 0.0)
    slope, mean = torch.ones(2, KEPT, device=device), None
    with pytest.raises(ValueError, match="weight_mean"):
        raw.linear_topk_backward(h[:, 0], slope, h, w, index, mean, True, h.clone(), None, None)


def indices(device: torch.device, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, (ROWS, KEPT), device=device)


def loss_and_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients, of an upstream gradient 1, 2, ..."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = function(*leaves)
    upstream = torch.arange(1, loss.shape[0] + 1, device=loss.device, dtype=loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def test_a_check_before_the_gpu_names_what_is_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """PALU_CHECK=1: without it labels are an error of torch's, and on a GPU both are an assertion."""
    monkeypatch.setattr(functional, "CHECK", True)
    logits, index = torch.zeros(2, 9), torch.tensor([[0, 1], [9, 2]])
    calls: list[Callable[[], Any]] = [
        lambda: palu.topk_mse(logits, index),
        lambda: palu.topk_unlikelihood(logits, index),
        lambda: palu.linear_topk_mse(torch.zeros(2, 4), torch.zeros(9, 4), index),
        lambda: palu.linear_topk_unlikelihood(torch.zeros(2, 4), torch.zeros(9, 4), index),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=r"^palu::\w+: index\[1, 0\] = 9 is out of range for a vocabulary of 9$"):
            call()
    with pytest.raises(IndexError, match=r"^palu::cross_entropy_: labels\[1\] = -1 is out of range"):
        ops.cross_entropy_(logits, torch.tensor([0, -1]), torch.ones(2))
    palu.topk_mse(logits, index.clamp(max=8))


def test_same_bits_every_time(device: torch.device) -> None:
    hidden, weight = torch.randn(36, 256, device=device), torch.randn(5003, 256, device=device)
    index = torch.randint(0, 5003, (36, 500), device=device)
    logits = hidden @ weight.t()
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda z: palu.topk_mse(z, index), (logits,)),
        (lambda h, w: palu.linear_topk_mse(h, w, index, impl="gather"), (hidden, weight)),
        (lambda h: palu.linear_topk_mse(h, weight, index, impl="gather"), (hidden,)),
        (lambda h, w: palu.linear_topk_unlikelihood(h, w, index, impl="gather"), (hidden, weight)),
    ]
    threads = torch.get_num_threads()
    runs = []
    for count in (threads, threads, 1):
        torch.set_num_threads(count)
        runs.append([t for function, leaves in calls for t in loss_and_gradients(function, *leaves)])
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("target", [*TARGETS, "unlikelihood"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_training_loops_call_is_the_op(
    device: torch.device, target: str | float, dtype: torch.dtype, frozen: bool
) -> None:
    """Of a frozen head: on a CPU the gradient is formed in the forward pass, in as many slices as K is long."""
    index, floor = torch.randint(0, VOCAB, (ROWS, 130), device=device), 0.01
    shapes = (ROWS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)
    hidden, weight, bias = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    term = LocalUnlikelihoodTerm(index, floor) if target == "unlikelihood" else LocalTerm(index, target)

    def op(h: Tensor, w: Tensor = weight, b: Tensor = bias) -> Tensor:
        if target == "unlikelihood":
            return palu.linear_topk_unlikelihood(h, w, index, floor, b, impl="gather")
        return palu.linear_topk_mse(h, w, index, target, b, impl="gather")

    leaves = (hidden,) if frozen else (hidden, weight, bias)
    expected = loss_and_gradients(op, *leaves)
    row_weight = torch.arange(1, ROWS + 1, device=device, dtype=expected[0].dtype)
    grads = tuple(torch.zeros_like(t) for t in leaves)
    loss = term.gather(hidden, Head(weight, bias), row_weight, None, (*grads, None, None)[:3])
    assert all(torch.equal(a, b) for a, b in zip((loss, *grads), expected, strict=True))
    logits = (hidden @ weight.t()).contiguous()
    function = palu.topk_unlikelihood if target == "unlikelihood" else palu.topk_mse
    expected = loss_and_gradients(lambda z: function(z, index, floor if target == "unlikelihood" else target), logits)
    loss = term.loss_and_grad_(logits, row_weight, slice(None))
    assert torch.equal(loss, expected[0]) and torch.equal(logits, expected[1])


# Logits of a row, its index (the true token first), and the floor.
HARD = {
    "p is 1": ([80.0, 0.0, 1.0, -1.0], [0, 1, 2, 3], 0.0),
    "p is tiny": ([-60.0, 0.0, 1.0, -1.0], [0, 1, 2, 3], 0.0),
    "far apart": ([1e4, -1e4, 9999.0, 1e4], [0, 1, 2, 3], 0.0),
    "far below": ([-1e4, 1e4, 9999.0, -1e4], [0, 1, 2, 3], 0.0),
    "the true token among the candidates": ([2.0, 1.0, 0.5, 0.0], [0, 1, 0, 2, 0], 0.0),
    "a candidate twice": ([2.0, 1.0, 0.5, 0.0], [0, 1, 2, 1], 0.0),
    "not above the floor": ([0.0, 3.0, 2.0, 0.0], [0, 1, 2], 0.1),
    "above the floor": ([0.0, 3.0, 2.0, 0.0], [0, 1, 2], 0.03),
    "no candidate": ([2.0, 1.0, 0.5, 0.0], [0, 0, 0], 0.0),
}


def unlikelihood_by_the_formula(z: list[float], index: list[int], floor: float) -> tuple[float, list[float], float]:
    """Loss, gradient and margin of a row in Python's floats, one candidate after the other."""
    true, candidates = index[0], [i for i in index[1:] if i != index[0]]
    gradient = [0.0] * len(z)
    if not candidates:
        return 0.0, gradient, 0.0
    largest = max(z[i] for i in candidates)
    mass = sum(math.exp(z[i] - largest) for i in candidates)
    margin = z[true] - largest - math.log(mass)
    p = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
    if p <= floor:
        return 0.0, gradient, 0.0
    gradient[true] = p
    for i in candidates:
        gradient[i] -= p * math.exp(z[i] - largest) / mass
    return max(margin, 0) + math.log1p(math.exp(-abs(margin))), gradient, margin


@pytest.mark.parametrize("name", list(HARD))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_unlikelihood_of_hard_rows(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """From logits, and from hidden states that are the logits of an identity head, with its two ways."""
    z, index, floor = HARD[name]
    logits = torch.tensor([z], device=device, dtype=dtype)
    head, at = torch.eye(len(z), device=device, dtype=dtype), torch.tensor([index], device=device)
    loss, gradient, margin = unlikelihood_by_the_formula(logits[0].tolist(), index, floor)
    tolerance = 8 * torch.finfo(dtype).eps * (1 + max(-margin, 0))  # an error of the margin is a relative one of p
    for function in (
        lambda t: palu.topk_unlikelihood(t, at, floor),
        lambda t: palu.linear_topk_unlikelihood(t, head, at, floor, impl="gather"),
        lambda t: palu.linear_topk_unlikelihood(t, head, at, floor, impl="dense"),
        lambda t: eager.topk_unlikelihood(t, at, floor),
    ):
        found, found_gradient = loss_and_gradients(function, logits)
        assert found.tolist() == pytest.approx([loss], rel=tolerance, abs=0)
        assert found_gradient[0].tolist() == pytest.approx(gradient, rel=tolerance, abs=1e-30)


def test_local_unlikelihood_of_nan_is_nan(device: torch.device) -> None:
    hidden, weight = torch.randn(ROWS, HIDDEN, device=device), torch.randn(VOCAB, HIDDEN, device=device)
    hidden[2, 5] = math.nan
    for impl in ("gather", "dense"):
        loss, gradient = loss_and_gradients(
            lambda h, impl=impl: palu.linear_topk_unlikelihood(h, weight, indices(device), 0.02, impl=impl), hidden
        )
        assert loss.isnan().nonzero().tolist() == [[2]] and gradient[2].isnan().all()
        assert gradient.isnan().any(1).nonzero().tolist() == [[2]]


@pytest.mark.skipif("cpu" not in NATIVE_DEVICES, reason="the twins form it in the backward pass")
def test_a_frozen_heads_rows_are_read_once() -> None:
    """The forward pass has formed the gradient: the backward pass needs neither head nor index."""
    hidden, weight = torch.randn(ROWS, HIDDEN, requires_grad=True), torch.randn(VOCAB, HIDDEN)
    index = indices(CPU)
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
    hidden = torch.randn(ROWS, HIDDEN, device=device, dtype=dtype)
    others = torch.float64 if dtype == torch.float64 else torch.float32  # which autocast leaves alone
    weight, bias = (torch.randn(shape, device=device, dtype=others) for shape in ((VOCAB, HIDDEN), (VOCAB,)))
    leaves = hidden, weight, bias
    cast = [t if others == torch.float64 else t.bfloat16() for t in leaves]
    index, given = indices(device), {"weight_mean": ops.weight_mean(cast[1])} if given_mean else {}

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return palu.linear_topk_mse(h, w, index, "global_mean", b, impl=impl, **given)

    with torch.autocast(device.type, torch.bfloat16):
        results = loss_and_gradients(function, *leaves)
    assert [t.dtype for t in results[1:]] == [t.dtype for t in leaves]
    expected = loss_and_gradients(function, *cast)
    assert all(torch.equal(ours, theirs.to(ours.dtype)) for ours, theirs in zip(results, expected, strict=True))


def test_neither_rows_nor_candidates(device: torch.device) -> None:
    index = torch.empty(0, 0, dtype=torch.int64, device=device)
    logits = torch.empty(0, VOCAB, device=device, requires_grad=True)
    hidden = torch.empty(0, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device=device, requires_grad=True)
    palu.topk_mse(logits, index).sum().backward()
    palu.linear_topk_mse(hidden, weight, index, impl="gather").sum().backward()
    assert logits.grad.shape == (0, VOCAB) and hidden.grad.shape == (0, HIDDEN) and not weight.grad.any()


# ----------------------------------------------------------------------------------------- autograd


def op_samples(device: torch.device, dtype: torch.dtype, grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    acc = eager.acc_dtype(dtype)

    def plain(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=of)

    def leaf(*shape: int) -> Tensor:
        return plain(*shape).requires_grad_(grad)

    index = torch.randint(0, 9, (3, 4), device=device)
    labels = torch.randint(0, 9, (3,), device=device)
    mean, row, slope = plain(5, of=acc), plain(3, of=acc), plain(3, 4, of=acc)
    samples: list[tuple[Any, tuple[Any, ...]]] = [
        (raw.prefix_mask, (torch.randint(-1, 3, (3, 7), device=device), 2, None)),
        (raw.prefix_mask, (torch.randint(-1, 3, (3, 7), device=device), 2, 1)),
        (raw.topk_backward, (row, slope, index, True, plain(3, 9))),
        (raw.topk_unlikelihood, (leaf(3, 9), index, 0.02)),
        (raw.linear_topk_unlikelihood, (leaf(3, 5), leaf(9, 5), index, leaf(9), 0.02)),
        (raw.linear_topk_unlikelihood, (leaf(3, 5), plain(9, 5), index, None, 0.0)),
        (raw.linear_topk_backward, (row, slope, leaf(3, 5), leaf(9, 5), index, mean, True, plain(3, 5), plain(9, 5), plain(9))),
        (raw.linear_topk_backward, (row, slope, leaf(3, 5), leaf(9, 5), index, None, True, None, plain(9, 5), None)),
        (raw.cross_entropy_, (plain(3, 9), labels, row)),
        (raw.kl_div_, (plain(3, 9), plain(3, 9), row, False)),
        (raw.kl_div_, (plain(3, 9), plain(3, 9), row, True)),
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


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, False), (torch.bfloat16, True)])
def test_opcheck(device: torch.device, dtype: torch.dtype, grad: bool) -> None:
    for op, arguments in op_samples(device, dtype, grad):
        torch.library.opcheck(op.default, arguments)


def test_compile_fullgraph(device: torch.device) -> None:
    hidden, weight = torch.randn(ROWS, HIDDEN, device=device), torch.randn(VOCAB, HIDDEN, device=device)
    index = indices(device)

    def function(h: Tensor, w: Tensor) -> Tensor:
        losses = palu.linear_topk_mse(h, w, index) + palu.topk_mse(h @ w.t(), index, "local_mean")
        return losses + palu.linear_topk_unlikelihood(h, w, index) + palu.topk_unlikelihood(h @ w.t(), index, 0.1)

    def frozen(h: Tensor) -> Tensor:
        return palu.linear_topk_mse(h, weight, index, impl="gather")

    def under_autocast(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return palu.linear_topk_mse(h, w, index)

    for of, leaves, backend in (
        (function, (hidden, weight), "inductor"),
        (frozen, (hidden,), "aot_eager"),
        (under_autocast, (hidden, weight), "aot_eager"),
    ):
        compiled = loss_and_gradients(torch.compile(of, fullgraph=True, backend=backend), *leaves)
        torch.testing.assert_close(compiled, loss_and_gradients(of, *leaves), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", SOFTMAX_LOSSES)
def test_losses_in_place_compiled_and_under_autocast(device: torch.device, op: str) -> None:
    """The caller's autocast has no say in a kernel's arithmetic."""
    logits, ref_logits = 2 * torch.randn(2, ROWS, VOCAB, device=device)
    row_weight, labels = torch.rand(ROWS, device=device), indices(device)[:, 0]

    def function(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z * 2
        given = (ref_logits, row_weight, True) if op == "kl_div_" else (labels, row_weight)
        return getattr(ops, op)(z, *given), z

    expected = function(logits)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(map(torch.equal, function(logits), expected))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), expected, rtol=1e-4, atol=1e-5)


def test_compile_when_the_first_use_is_inside() -> None:
    script = """
import sys
import palu
assert "torch" not in sys.modules
import torch
z, w, i = torch.randn(2, 5, requires_grad=True), torch.randn(9, 5), torch.arange(6).view(2, 3) % 5
of = lambda z: palu.topk_mse(z, i) + palu.linear_topk_unlikelihood(z, w, i)
compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
compiled(z).sum().backward()
assert z.grad.abs().sum() > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_loss_from_hidden_states_allocates_under_a_tenth_of_dense(device: torch.device) -> None:
    rows, vocab, d, k = 36, 128256, 64, 5000
    hidden = torch.randn(rows, d, device=device, requires_grad=True)
    weight = torch.randn(vocab, d, device=device)
    index = torch.randint(0, vocab, (rows, k), device=device)
    mean = ops.weight_mean(weight)
    dense = 2 * rows * vocab * hidden.element_size()  # logits and their gradient

    def run() -> None:
        palu.linear_topk_mse(hidden, weight, index, weight_mean=mean, impl="gather").sum().backward()

    run()
    assert 0 < peak_bytes(device, run) < dense / 10
