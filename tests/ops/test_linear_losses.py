"""The general ops on hidden states and a head against their plain-torch twins: values, gradients, edges, errors."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from palu import eager, ops

raw = torch.ops.palu
ROWS, VOCAB, HIDDEN, KEPT = 6, 83, 13, 7
HEADS = [{}, {"softcap": 3.0, "scale": 0.3}]
KL = [{"direction": d, "tail": t} for d in ("forward", "reverse") for t in ("ignore", "bucket")]
Case = tuple[str, dict[str, Any]]
# What each op is asked for beside hidden states, head and chunks.
LOSSES: list[Case] = [("linear_topk_kl", options) for options in KL]
LOSSES += [("linear_kl", {"direction": d, "ref_softcap": 5.0, "ref_scale": 0.5}) for d in ("forward", "reverse")]
LOSSES += [("linear_cross_entropy", {})]
VALUES: list[Case] = [("linear_topk_log_probs", {})]
VALUES += [("linear_topk_logits", {"impl": impl}) for impl in ("gather", "dense")]


def name(case: Any) -> str:
    op, options = case
    return "-".join([op, *map(str, options.values())])


def sliced(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random values in a slice of a larger tensor whose other values are NaN (for bfloat16 2**100: see test_ops.py)."""
    others = 2.0**100 if dtype == torch.bfloat16 else math.nan
    whole = torch.full([size + 6 for size in shape], others, device=device, dtype=dtype)
    return whole[tuple(slice(3, 3 + size) for size in shape)].copy_(torch.randn(shape, device=device, dtype=dtype))


class Inputs:
    """Slices of larger tensors; with a row that is ignored, and an entry that is not there where K allows it."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
        *,
        rows: int = ROWS,
        vocab: int = VOCAB,
        k: int = KEPT,
        ignored: bool = True,
    ):
        self.hidden = sliced((rows, HIDDEN), device, dtype)
        self.weight = sliced((vocab, HIDDEN), device, dtype)
        self.bias = sliced((1, vocab), device, dtype)[0]
        self.ref_hidden, self.ref_weight = sliced((rows, 5), device, dtype), sliced((vocab, 5), device, dtype)
        distinct = torch.rand(rows, vocab, device=device).argsort(1)
        self.index = torch.nn.functional.pad(distinct[:, :k], (1, 2))[:, 1 : 1 + k]
        teacher = 2 * torch.randn(rows, vocab, device=device, dtype=torch.float64)
        self.teacher = teacher.log_softmax(1).gather(1, self.index).to(eager.acc_dtype(dtype))
        self.labels = distinct[:, 0].clone()
        if ignored and rows > 3:
            self.index[1], self.labels[1], self.teacher[1] = -100, -100, math.nan
            if k > 1:
                self.index[3, k // 2], self.teacher[3, k // 2] = -100, math.nan

    def own(self, op: str) -> dict[str, Tensor]:
        if op == "linear_topk_kl":
            return {"index": self.index, "teacher_log_probs": self.teacher}
        if op == "linear_kl":
            return {"ref_hidden": self.ref_hidden, "ref_weight": self.ref_weight, "labels": self.labels}
        if op == "linear_cross_entropy":
            return {"labels": self.labels}
        return {"index": self.index.clamp(min=0)}  # with duplicates

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        given = (self.hidden, self.weight, self.bias)
        return tuple((t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in given)

    def run(
        self,
        module: Any,
        op: str,
        dtype: torch.dtype | None = None,
        trained: tuple[int, ...] = (0, 1, 2),
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Result and gradients for upstream gradients 1, 2, ..., those of hidden, weight and bias that are trained."""
        leaves = [t.requires_grad_(i in trained) for i, t in enumerate(self.leaves(dtype))]
        own = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in self.own(op).items()}
        hidden, weight, bias = leaves
        result = getattr(module, op)(hidden, weight, **own, bias=bias, **options)
        upstream = torch.arange(1, result.numel() + 1, device=result.device, dtype=result.dtype).view(result.shape)
        return result.detach(), *torch.autograd.grad(result, [leaves[i] for i in trained], upstream)


def assert_near(ours: tuple[Tensor, ...], truths: tuple[Tensor, ...], tolerance: float) -> None:
    """Largest difference as a share of the largest value."""
    for mine, truth in zip(ours, truths, strict=True):
        assert mine.shape == truth.shape
        if truth.numel():
            error, size = (mine.double() - truth.double()).abs().max(), truth.double().abs().max()
            assert error <= tolerance * size, f"{error:.2e} is more than {tolerance:.0e} of {size:.2e}"


# ---------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize("case", LOSSES, ids=name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head", HEADS, ids=["plain", "capped"])
def test_losses(device: torch.device, case: Case, reduction: str, head: dict[str, float]) -> None:
    op, options = case
    inputs = Inputs(device)
    options = options | head | {"reduction": reduction}
    expected = inputs.run(eager, op, **options)
    for chunk_bytes in (1, 4 * 8 * VOCAB, 2**20):
        ours = inputs.run(ops, op, chunk_bytes=chunk_bytes, **options)
        assert_near(ours, expected, 1e-12)
        assert not ours[1][1].any()  # of the ignored row


@pytest.mark.parametrize("case", VALUES, ids=name)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "capped"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_chosen_values(device: torch.device, case: Case, head: dict[str, float], index_dtype: torch.dtype) -> None:
    op, options = case
    inputs = Inputs(device)
    inputs.index = inputs.index.to(index_dtype)
    expected = inputs.run(eager, op, **head)
    for chunk_bytes in (1, 4 * 8 * VOCAB, 2**20):
        assert_near(inputs.run(ops, op, chunk_bytes=chunk_bytes, **options, **head), expected, 1e-12)


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_lose_no_more_than_torch(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    op, options = case
    inputs = Inputs(device, dtype)
    asked = {n: v for n, v in options.items() if n != "impl"}
    given = {"chunk_bytes": 2 * 4 * VOCAB} | options
    exact = inputs.run(eager, op, torch.float64, **asked) * 2
    torchs = inputs.run(eager, op, **asked) * 2
    ours = inputs.run(ops, op, **given) + inputs.run(ops, op, trained=(0,), **given)
    assert ours[0].dtype == torch.float32
    for mine, twin, truth in zip(ours, torchs, exact, strict=False):  # all gradients, then that of a frozen head
        size = truth.abs().max()
        lost, error = ((t.double() - truth).abs().max() / size for t in (twin, mine))
        # On top of torch's own: in bfloat16 a rounding of the result; in float32 what logits of 15 are rounded by.
        allowed = 1 if dtype == torch.bfloat16 else 30
        assert error <= 2 * lost + allowed * torch.finfo(dtype).eps, (error, lost)


@pytest.mark.parametrize("case", [*LOSSES, *VALUES[:1]], ids=name)
@pytest.mark.parametrize("trained", [(0, 1), (0,)], ids=["trained head", "frozen head"])
def test_rows_whose_gradient_is_small(device: torch.device, case: Case, trained: tuple[int, ...]) -> None:
    """Where the model is nearly sure, or nearly its teacher, 1 - p and p - q are no differences of rounded numbers."""
    op, options = case
    inputs = Inputs(device, torch.bfloat16, ignored=False, vocab=32)
    inputs.weight, inputs.bias = torch.eye(32, device=device).bfloat16(), torch.zeros(32, device=device).bfloat16()
    inputs.hidden = torch.randn(ROWS, 32, device=device).scatter(1, inputs.labels[:, None], 11.0).bfloat16()
    nearly = inputs.hidden.double() + 0.1 * torch.randn(ROWS, 32, device=device)
    inputs.teacher = nearly.log_softmax(1).gather(1, inputs.index).float()
    inputs.ref_hidden, inputs.ref_weight = nearly.bfloat16(), inputs.weight
    if op == "linear_topk_log_probs":  # of the likely token, which stands twice
        inputs.index = inputs.labels[:, None].expand(ROWS, 2)
    options = {n: v for n, v in options.items() if not n.startswith("ref_")}
    _, ours, *_ = inputs.run(ops, op, trained=trained, **options)
    _, truth, *_ = inputs.run(eager, op, torch.float64, trained=trained, **options)
    error, size = (ours.double() - truth).abs().amax(1), truth.abs().amax(1)
    assert (error <= 4 * torch.finfo(torch.bfloat16).eps * size).all(), error / size


@pytest.mark.parametrize("case", LOSSES, ids=name)
@pytest.mark.parametrize(("vocab", "k"), [(VOCAB, 1), (9, 9), (1, 1)])
def test_smallest_and_largest_k(device: torch.device, case: Case, vocab: int, k: int) -> None:
    op, options = case
    inputs = Inputs(device, vocab=vocab, k=k)
    ours = inputs.run(ops, op, **options)
    assert all(t.isfinite().all() for t in ours)
    for mine, truth in zip(ours, inputs.run(eager, op, **options), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
def test_no_rows(device: torch.device, case: Case) -> None:
    op, options = case
    result, *gradients = Inputs(device, rows=0).run(ops, op, **options)
    assert result.shape == (() if case in LOSSES else (0, KEPT))
    assert not result.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("case", LOSSES, ids=name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(device: torch.device, case: Case, reduction: str) -> None:
    op, options = case
    inputs = Inputs(device)
    inputs.hidden.fill_(math.nan)  # they are not looked at
    inputs.index.fill_(-100)
    inputs.labels.fill_(-100)
    for result in inputs.run(ops, op, reduction=reduction, **options):
        assert not result.any()


def test_kl_without_labels_counts_every_row(device: torch.device) -> None:
    inputs = Inputs(device, ignored=False)
    hidden, weight, bias = inputs.leaves()
    given = hidden, weight, inputs.ref_hidden, inputs.ref_weight, bias
    for reduction in ("mean", "none"):
        ours, twin = (module.linear_kl(*given, reduction=reduction) for module in (ops, eager))
        torch.testing.assert_close(ours, twin, rtol=1e-12, atol=0)
    assert not ops.linear_kl(hidden, weight, hidden, weight, bias, bias).abs() > 1e-15


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
def test_leading_dimensions(device: torch.device, case: Case) -> None:
    op, options = case
    inputs = Inputs(device)
    reduction = {"reduction": "none"} if case in LOSSES else {}
    flat = inputs.run(ops, op, **options, **reduction)
    for field in ("hidden", "index", "teacher", "labels", "ref_hidden"):
        setattr(inputs, field, getattr(inputs, field).unflatten(0, (2, 3)))
    result, of_hidden, *of_head = inputs.run(ops, op, **options, **reduction)
    assert_near((result.flatten(0, 1), of_hidden.flatten(0, 1), *of_head), flat, 1e-12)


def test_shifted_labels(device: torch.device) -> None:
    inputs = Inputs(device, ignored=False)
    hidden, labels = inputs.hidden.unflatten(0, (2, 3)), inputs.labels.unflatten(0, (2, 3))
    logits = (hidden @ inputs.weight.t())[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none").view(2, 2)
    ours = ops.linear_cross_entropy(hidden, inputs.weight, labels, shift=True, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
@pytest.mark.parametrize("head", HEADS, ids=["plain", "capped"])
def test_gradients_only_where_asked_for(device: torch.device, case: Case, head: dict[str, float]) -> None:
    op, options = case
    inputs = Inputs(device)
    expected, *every = inputs.run(ops, op, **options, **head)
    for trained in [(0,), (1,), (2,), (0, 2)]:
        ours = inputs.run(ops, op, trained=trained, chunk_bytes=4 * 8 * VOCAB, **options, **head)
        assert_near(ours, (expected, *(every[i] for i in trained)), 1e-12)
    result = getattr(ops, op)(inputs.hidden, inputs.weight, **inputs.own(op), **options, **head)
    assert not result.requires_grad


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
def test_gradcheck(device: torch.device, case: Case) -> None:
    op, options = case
    inputs = Inputs(device, rows=4, vocab=9, k=3)
    if case in LOSSES:
        options = options | {"reduction": "none"}
    for head in HEADS:
        given = inputs.own(op) | options | head

        def function(h: Tensor, w: Tensor, b: Tensor, given: dict[str, Any] = given) -> Tensor:
            return getattr(ops, op)(h, w, **given, bias=b)

        assert torch.autograd.gradcheck(function, inputs.leaves())


@pytest.mark.filterwarnings("error")
def test_an_index_with_strides_is_no_cause_for_a_warning(device: torch.device, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_warn_always, torch.is_warn_always_enabled()))
    torch.set_warn_always(True)
    inputs = Inputs(device)
    inputs.index = inputs.index.clamp(min=0).t().contiguous().t()
    expected = inputs.run(eager, "linear_topk_log_probs")
    for trained in [(0, 1, 2), (0,)]:
        ours = inputs.run(ops, "linear_topk_log_probs", trained=trained)
        assert_near(ours, expected[: len(trained) + 1], 1e-12)


# ---------------------------------------------------------------------------------------------------
# The bucket


def bucket_case(gap: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, as hidden states of an identity head, whose rest has exp(-gap) of the probability; a teacher with 0.3."""
    logits = torch.randn(3, 40, device=device, dtype=dtype)
    logits[:, 8:] -= gap
    index = torch.arange(8, device=device).expand(3, 8).contiguous()
    teacher = torch.randn(3, 8, device=device, dtype=torch.float64).softmax(1).mul(0.7).log()
    return logits, torch.eye(40, device=device, dtype=dtype), index, teacher


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("gap", [0.0, 10.0, 90.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_rest_of_nearly_nothing(device: torch.device, direction: str, gap: float, dtype: torch.dtype) -> None:
    """The model's rest underflows in float32 from 90 on; its logarithm does not."""
    logits, eye, index, teacher = bucket_case(gap, dtype, device)
    for log_q in (teacher, teacher - math.log(0.7)):  # the teacher has 0.3 there, or nothing but rounding
        log_q = log_q.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        leaf = logits.clone().requires_grad_()
        loss = ops.linear_topk_kl(leaf, eye, index, log_q, direction=direction, tail="bucket", reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isfinite().all() and gradient.isfinite().all()

        # By hand, in float64.
        z = logits.double()
        p = z.log_softmax(1)[:, :8]
        p_rest = z[:, 8:].logsumexp(1) - z.logsumexp(1)
        q = log_q.double()
        q_rest = (1 - q.exp().sum(1)).clamp(min=0)
        if direction == "forward":
            truth = (q.exp() * (q - p)).sum(1) + torch.where(q_rest > 0, q_rest * (q_rest.log() - p_rest), 0)
        else:
            q_rest = q_rest.clamp(min=torch.finfo(loss.dtype).eps)
            truth = (p.exp() * (p - q)).sum(1) + p_rest.exp() * (p_rest - q_rest.log())
        # What the teacher's rest is known to: three units of float32 or float64, times the distance of the logarithms.
        known = 3 * torch.finfo(loss.dtype).eps * (gap + 20)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=known)
        # A softmax's gradient sums to 0; float32 knows a logit of -3000 to 2e-4 of a nat.
        assert gradient.double().sum(1).abs().max() <= (40 + gap / 10) * torch.finfo(dtype).eps


def test_a_teacher_that_rounds_to_more_than_one(device: torch.device) -> None:
    logits, eye, index, teacher = bucket_case(5.0, torch.float32, device)
    log_q = (teacher - math.log(0.7)).bfloat16()
    log_q[0] = (teacher[0] - math.log(0.69)).bfloat16()
    for direction in ("forward", "reverse"):
        leaf = logits.clone().requires_grad_()
        loss = ops.linear_topk_kl(leaf, eye, index, log_q, direction=direction, tail="bucket")
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite() and gradient.isfinite().all()


def test_the_bucket_is_zero_where_both_agree(device: torch.device) -> None:
    logits, eye, index, _ = bucket_case(1.0, torch.float64, device)
    teacher = logits.log_softmax(1).gather(1, index)
    for direction in ("forward", "reverse"):
        leaf = logits.clone().requires_grad_()
        loss = ops.linear_topk_kl(leaf, eye, index, teacher, direction=direction, tail="bucket")
        assert loss.abs() < 1e-15
        assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-15


def test_entries_without_probability(device: torch.device) -> None:
    """-inf of the teacher, in its cache, and of the model, whose bias masks what is no token."""
    inputs = Inputs(device, ignored=False)
    inputs.teacher[2, 3] = -math.inf
    masked = [v for v in range(VOCAB) if v not in set(inputs.index.flatten().tolist())]
    inputs.bias[masked] = -math.inf
    for tail in ("ignore", "bucket"):
        ours, *gradients = inputs.run(ops, "linear_topk_kl", tail=tail)
        expected = inputs.run(eager, "linear_topk_kl", tail=tail)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        assert all(g.isfinite().all() for g in gradients)
    assert all(t.isfinite().all() for t in inputs.run(ops, "linear_topk_log_probs"))


# ---------------------------------------------------------------------------------------------------
# Autocast, tracing, graphs


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
def test_autocast(device: torch.device, case: Case) -> None:
    op, options = case
    inputs = Inputs(device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        ours = inputs.run(ops, op, **options)
    for field in ("hidden", "weight", "bias", "ref_hidden", "ref_weight"):
        setattr(inputs, field, getattr(inputs, field).bfloat16())
    expected = inputs.run(ops, op, **options)
    assert all(t.dtype == torch.float32 for t in ours)
    assert_near(ours, expected, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(device: torch.device, dynamic: bool) -> None:
    inputs = Inputs(device)
    cases = [LOSSES[1], VALUES[0]] if dynamic else [*LOSSES[::2], *VALUES]

    def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        results = []
        for op, options in cases:
            for reduction in [{"reduction": "mean"}, {"reduction": "none"}] if (op, options) in LOSSES else [{}]:
                given = inputs.own(op) | options | reduction
                results.append(getattr(ops, op)(2 * h, w, **given, bias=b, softcap=5.0, scale=0.5).flatten())
        return torch.cat(results)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    found = []
    for run in (function, compiled):
        leaves = inputs.leaves()
        results = run(*leaves)
        upstream = torch.arange(1, len(results) + 1, device=device, dtype=results.dtype)
        found.append((results.detach(), *torch.autograd.grad(results, leaves, upstream)))
    assert_near(*found, 1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device: torch.device, grad: bool) -> None:
    inputs = Inputs(device, torch.bfloat16, vocab=11, k=3, ignored=False)
    head = [t.detach().requires_grad_(grad) for t in inputs.leaves()]
    keep = inputs.labels.to(inputs.teacher.dtype)
    samples: list[tuple[Any, tuple[Any, ...]]] = []
    for per_row in (False, True):
        rest = keep, per_row, 2.0, 100, [grad and not per_row] * 3
        samples += [
            (raw.linear_topk_kl_fwd_bwd, (*head, inputs.index, inputs.teacher, False, True, -100, *rest)),
            (raw.linear_kl_fwd_bwd, (*head, inputs.ref_hidden, inputs.ref_weight, None, None, True, *rest)),
            (raw.linear_cross_entropy_fwd_bwd, (*head, inputs.labels, -100, *rest)),
        ]
    grad_of_kept = torch.randn_like(inputs.teacher)
    plain = [t.detach() for t in head]
    samples += [
        (raw.linear_topk_log_probs, (*head, inputs.index, 2.0, False, 100)),
        (raw.linear_topk_log_probs, (head[0], *plain[1:], inputs.index, 2.0, True, 100)),
        (raw.linear_topk_logits, (*head, inputs.index, True, 100)),
        (raw.linear_topk_logits, (head[0], head[1], None, inputs.index, False, 100)),
        (raw.linear_topk_log_probs_backward, (grad_of_kept, *plain, inputs.index, 2.0, 100, [True, False, True])),
        (raw.linear_topk_logits_backward, (grad_of_kept, *plain, inputs.index, True, 100, [False, True, True])),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("case", [*LOSSES, *VALUES], ids=name)
def test_second_derivative_raises(device: torch.device, case: Case) -> None:
    op, options = case
    inputs = Inputs(device)
    hidden, weight, bias = inputs.leaves()
    result = getattr(ops, op)(hidden, weight, **inputs.own(op), bias=bias, **options)
    with pytest.raises(RuntimeError, match=rf"palu::{op}\w* has first derivatives only; create_graph=True"):
        torch.autograd.grad(result.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass(device: torch.device, reduction: str) -> None:
    inputs = Inputs(device)
    hidden, weight, _ = inputs.leaves()
    loss = ops.linear_cross_entropy(hidden, weight, inputs.labels, reduction=reduction).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Most bytes held at once beyond those held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    held = peak = 0
    allocations = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("case", [*LOSSES, *VALUES[:1], *VALUES[2:]], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_a_chunk(device: torch.device, case: Case, dtype: torch.dtype) -> None:
    op, options = case
    rows, vocab = 128, 2048
    inputs = Inputs(device, dtype, rows=rows, vocab=vocab, k=20)
    chunk = 8 * vocab * dtype.itemsize
    hidden = inputs.hidden.detach().requires_grad_()

    def run() -> None:
        result = getattr(ops, op)(hidden, inputs.weight, **inputs.own(op), chunk_bytes=chunk, **options)
        torch.autograd.grad(result.sum(), hidden)

    run()
    # A half type's softmax on a CPU is computed in float32, and once more for the reference.
    copies = 1 if dtype == torch.float32 or device.type == "cuda" else 5
    small = 40 * rows * (20 + HIDDEN)  # what is [R, K], and hidden states with their gradients
    assert peak_bytes(device, run) < chunk * (1 + copies) + small < rows * vocab * dtype.itemsize


# ---------------------------------------------------------------------------------------------------
# Errors


def changed(op: str, **values: Any) -> Any:
    return op, values


BAD: list[tuple[Any, type[Exception], str]] = [
    (changed("linear_topk_logits", hidden=torch.zeros(3)), ValueError, "hidden must have 2 dimensions or more, got shape [3]"),
    (changed("linear_topk_logits", hidden=torch.zeros(2, 3).int()), TypeError, "hidden must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    (changed("linear_topk_logits", hidden=torch.zeros(2, 3).int(), scale=0.5), TypeError, "hidden must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    (changed("linear_topk_logits", hidden=torch.zeros(2, 3).half(), weight=torch.zeros(6, 3).half()), TypeError, "hidden is float16, which the CPU kernels do not support; use bfloat16 or float32"),
    (changed("linear_topk_logits", weight=torch.zeros(6)), ValueError, "weight must have 2 dimensions, got shape [6]"),
    (changed("linear_topk_logits", weight=torch.zeros(6, 4)), ValueError, "hidden has 3 columns but weight has 4"),
    (changed("linear_topk_logits", weight=torch.zeros(6, 3).double()), TypeError, "weight must be float32, got float64"),
    (changed("linear_topk_logits", weight=torch.zeros(0, 3)), ValueError, "the vocabulary is empty: weight has no rows"),
    (changed("linear_cross_entropy", hidden=torch.zeros(2, 0), weight=torch.zeros(0, 0)), ValueError, "the vocabulary is empty: weight has no rows"),
    (changed("linear_topk_logits", weight=torch.zeros(6, 3, device="meta")), ValueError, "weight is on meta but hidden is on cpu; move it there"),
    (changed("linear_topk_logits", bias=torch.zeros(5)), ValueError, "bias must have shape [6], got [5]"),
    (changed("linear_topk_logits", bias=torch.zeros(6).int(), scale=0.5), TypeError, "bias must be float32, got int32"),
    (changed("linear_topk_logits", bias=torch.zeros(6).double()), TypeError, "bias must be float32, got float64"),
    (changed("linear_topk_logits", index=torch.zeros(2, 2)), TypeError, "index must be int32 or int64, got float32"),
    (changed("linear_topk_logits", index=torch.zeros(1, 2).long()), ValueError, "index must have shape [2, K], got [1, 2]"),
    (changed("linear_topk_logits", index=torch.zeros(2, 0).long()), ValueError, "needs at least one index per row, got K = 0"),
    (changed("linear_topk_logits", scale=0.0), ValueError, "scale must be a positive number, got 0.0"),
    (changed("linear_topk_logits", softcap=-30), ValueError, "softcap must be a positive number, got -30"),
    (changed("linear_topk_logits", chunk_bytes=0), ValueError, "chunk_bytes must be a positive integer, got 0"),
    (changed("linear_topk_logits", index=torch.tensor([[0, 1], [2, 6]]), impl="dense"), IndexError, "index[1, 1] = 6 is out of range for a vocabulary of 6"),
    (changed("linear_topk_log_probs", index=torch.tensor([[0, 1], [-1, 2]])), IndexError, "index[1, 0] = -1 is out of range for a vocabulary of 6"),
    (changed("linear_topk_kl", index=torch.tensor([[0, 1], [-1, 2]])), IndexError, "index[1, 0] = -1 is out of range for a vocabulary of 6"),
    (changed("linear_topk_kl", teacher_log_probs=torch.zeros(2, 2).long()), TypeError, "teacher_log_probs must be floating point, got int64"),
    (changed("linear_topk_kl", teacher_log_probs=torch.zeros(2, 3)), ValueError, "teacher_log_probs must have shape [2, 2], got [2, 3]"),
    (changed("linear_topk_kl", teacher_log_probs=torch.tensor([[-1.0, -1.0], [0.6, 0.3]])), ValueError, "the probabilities of teacher_log_probs[1] sum to 3.172, and no distribution's do: give log-probabilities, neither logits nor probabilities"),
    (changed("linear_topk_kl", index=torch.tensor([[0, 1], [3, 3]])), ValueError, "index[1] has 3 twice; give distinct entries in a row"),
    (changed("linear_topk_kl", direction="backward"), ValueError, "unknown direction 'backward'; choose one of forward, reverse"),
    (changed("linear_topk_kl", tail="drop"), ValueError, "unknown tail 'drop'; choose one of ignore, bucket"),
    (changed("linear_topk_kl", reduction="batchmean"), ValueError, "unknown reduction 'batchmean'; choose one of mean, sum, none"),
    (changed("linear_topk_kl", index=torch.tensor([[0, 1], [2, 3]]).int(), ignore_index=2**32), ValueError, "ignore_index must be an integer that int32 holds, got 4294967296"),
    (changed("linear_kl", ref_hidden=torch.zeros(2, 3).int(), ref_scale=0.5), TypeError, "ref_hidden must be float32, float64, bfloat16 or (not on a CPU) float16, got int32"),
    (changed("linear_kl", ignore_index=None), ValueError, "ignore_index must be an integer that int64 holds, got None"),
    (changed("linear_kl", ref_hidden=torch.zeros(3, 3)), ValueError, "hidden and ref_hidden must have the same leading dimensions, got [2] and [3]"),
    (changed("linear_kl", ref_weight=torch.zeros(5, 3)), ValueError, "weight and ref_weight must have the same vocabulary, got 6 and 5 rows"),
    (changed("linear_kl", ref_weight=torch.zeros(6, 3).double()), TypeError, "ref_weight must be float32, got float64"),
    (changed("linear_kl", labels=torch.zeros(2)), TypeError, "labels must be int64, got float32"),
    (changed("linear_kl", ref_scale=-1), ValueError, "ref_scale must be a positive number, got -1"),
    (changed("linear_cross_entropy", labels=torch.tensor([0, 6])), IndexError, "labels[1] = 6 is out of range for a vocabulary of 6"),
    (changed("linear_cross_entropy", ignore_index=-100.0), ValueError, "ignore_index must be an integer that int64 holds, got -100.0"),
    (changed("linear_cross_entropy", labels=torch.tensor([[0, 1]])), ValueError, "labels must have shape [2], got [1, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments(call: tuple[str, dict[str, Any]], error: type[Exception], message: str) -> None:
    op, values = call
    given: dict[str, Any] = {"hidden": torch.randn(2, 3), "weight": torch.randn(6, 3)}
    if op.startswith("linear_topk"):
        given["index"] = torch.tensor([[0, 1], [2, 3]])
    if op == "linear_topk_kl":
        given["teacher_log_probs"] = torch.full((2, 2), -1.0)
    if op == "linear_kl":
        given |= {"ref_hidden": torch.randn(2, 3), "ref_weight": torch.randn(6, 3)}
    if op == "linear_cross_entropy":
        given["labels"] = torch.tensor([0, 1])
    getattr(ops, op)(**given)
    with pytest.raises(error) as caught:
        getattr(ops, op)(**(given | values))
    assert str(caught.value) == f"palu::{op}: {message}"
