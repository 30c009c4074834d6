"""The losses against the published implementation, and the fast form against a plain autograd one."""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import palu
from palu import eager
from palu.eager import softcap_
from palu.losses import CrossEntropyTerm, KLTerm, LocalTerm, Term, _chunks, fused_linear_losses
from palu.models.head import Head
from palu.ops import fused

GOLDEN = Path(__file__).with_name("golden") / "published_loss.npz"
TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5]
HEADS = [
    (0.0625, None),
    (0.3, None),
    (1.0, 3.0),
    (0.3, 2.0),
    (8.0, 30.0),
]  # (scale, softcap); logits are near 3 * scale


@pytest.fixture(params=["gather", "dense"])
def impl(request: pytest.FixtureRequest) -> str:
    """Both ways to the logits of onset rows, whichever is faster here."""
    return request.param


def assert_near(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-9) -> None:
    """Largest difference relative to the largest expected value; zeros must be zeros."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape
    if expected.numel():
        error, size = (actual.double() - expected.double()).abs().max(), expected.double().abs().max()
        assert error <= tolerance * size, f"{error:.2e} is more than {tolerance:.1e} of {size:.2e}"


# ---------------------------------------------------------------------------------------------------
# The published implementation


def published(case: int, device: torch.device) -> dict[str, Tensor]:
    with np.load(GOLDEN) as arrays:
        names = [name for name in arrays if name.startswith(f"{case}/")]
        return {name.split("/")[1]: torch.from_numpy(arrays[name]).to(device) for name in names}


def number_of_cases() -> int:
    with np.load(GOLDEN) as arrays:
        return len({name.split("/")[0] for name in arrays})


every_published_case = pytest.mark.parametrize(
    "case",
    range(number_of_cases())
    if GOLDEN.exists()
    else [pytest.param(0, marks=pytest.mark.skip(reason=f"the published values are not at {GOLDEN}"))],
)


@every_published_case
def test_palu_loss_is_the_published_one(case: int, device: torch.device) -> None:
    known = published(case, device)
    n, top_k, eos = known["meta"].tolist()
    logits = known["logits"].requires_grad_()
    loss = palu.palu_loss(
        logits,
        known["ref_logits"],
        known["labels"],
        n=n,
        top_k=top_k,
        eos_token_id=eos,
        kl_direction="reverse",
    )
    for name, value in zip(("local", "kl"), loss, strict=True):
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert_near(value, known[name])
        assert_near(gradient, known[f"grad_{name}"])


@every_published_case
def test_head_losses_are_the_published_ones(case: int, device: torch.device, impl: str) -> None:
    known = published(case, device)
    n, top_k, eos = known["meta"].tolist()
    vocab = known["logits"].shape[-1]
    onset = palu.prefix_mask(known["labels"], n, eos)[:, 1:]
    ordinary = known["labels"][:, 1:] == -200
    z, ref = known["logits"][:, :-1], known["ref_logits"][:, :-1]
    index = ref[onset].topk(min(top_k, vocab)).indices.int()

    # With an identity head, hidden states are logits.
    head = Head(torch.eye(vocab, dtype=torch.float64, device=device), None)
    terms = LocalTerm(index, "global_mean"), KLTerm(ref[ordinary], head, reverse=True)
    parts = torch.tensor([0] * len(terms[0]) + [1] * len(terms[1]), device=device)
    for part, (name, mask) in enumerate((("local", onset), ("kl", ordinary))):
        hidden = torch.cat([z[onset], z[ordinary]]).requires_grad_()
        weight = (parts == part).double() / max(int(mask.sum()), 1)
        total, _ = fused_linear_losses(hidden, head, terms, weight, chunk_bytes=5 * vocab * 8, impl=impl)
        total.backward()
        assert hidden.grad is not None
        gradient = torch.zeros_like(known["logits"])
        gradient[:, :-1][mask] = hidden.grad[parts == part]
        assert_near(total, known[name])
        assert_near(gradient, known[f"grad_{name}"])
        assert not hidden.grad[parts != part].any()


# ---------------------------------------------------------------------------------------------------
# palu_loss


def naive_palu_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    n: int,
    top_k: int,
    target: str | float,
    direction: str,
) -> tuple[Tensor, Tensor]:
    """One token at a time, as the method's table of roles reads."""
    local, kl = [], []
    for z_row, ref_row, label_row in zip(logits, ref_logits, labels.tolist(), strict=True):
        place = 0
        for t, label in enumerate(label_row):
            place = place + 1 if label >= 0 else 0
            if t == 0:
                continue
            z, ref = z_row[t - 1], ref_row[t - 1]
            if label >= 0 and (n == -1 or place <= n):
                kept = z[ref.argsort(descending=True)[:top_k]]
                c = {
                    "global_mean": z.mean(),
                    "global_mean_detached": z.mean().detach(),
                    "local_mean": kept.mean(),
                }
                local.append((kept - c.get(str(target), target)).square().mean())
            if label == -200:
                p, q = (ref, z) if direction == "forward" else (z, ref)
                kl.append((p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum())
    zero = 0 * logits.sum()
    return sum(local, zero) / max(len(local), 1), sum(kl, zero) / max(len(kl), 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("n", "top_k"), [(1, 1), (2, 4), (-1, 4), (2, 1000)])
def test_palu_loss_is_the_formula(
    device: torch.device, target: str | float, direction: str, n: int, top_k: int
) -> None:
    logits = torch.randn(2, 9, 13, dtype=torch.float64, device=device, requires_grad=True)
    ref_logits = torch.randn(2, 9, 13, dtype=torch.float64, device=device)
    labels = torch.tensor(
        [[-100, -100, 5, 6, 7, -200, 3, -200, -200], [-100, -200, -200, 1, -200, 2, 3, 4, -100]],
        device=device,
    )
    loss = palu.palu_loss(
        logits, ref_logits, labels, n=n, top_k=top_k, target=target, kl_direction=direction, eos_token_id=None
    )
    for value, expected in zip(
        loss, naive_palu_loss(logits, ref_logits, labels, n, top_k, target, direction), strict=True
    ):
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, expected)]
        assert_near(value, expected, 1e-12)
        assert_near(*gradients, 1e-12)
        if n == 2:  # rows that predict a redundant token, and the last one, which predicts nothing
            assert not gradients[0][0, 3].any()
            assert not gradients[0][1, 6].any()
            assert not gradients[0][:, -1].any()


def test_palu_loss_without_a_role_is_zero_and_trains_nothing(device: torch.device) -> None:
    logits = torch.randn(2, 4, 7, device=device, requires_grad=True)
    loss = palu.palu_loss(logits, torch.randn_like(logits), torch.full((2, 4), -100, device=device))
    assert loss.local == 0
    assert loss.kl == 0
    (loss.local + loss.kl).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_palu_loss_drops_a_sensitive_end_of_sequence(device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 1, 5, 11, device=device)
    labels = torch.tensor([[-100, 4, 2, 5, -200]], device=device)
    # With n = 1 the dropped label, 2, parts the span: 5 begins another.
    dropped = palu.palu_loss(logits, ref_logits, labels, n=1, top_k=3, eos_token_id=2)
    same = palu.palu_loss(
        logits,
        ref_logits,
        torch.tensor([[-100, 4, -100, 5, -200]], device=device),
        n=1,
        top_k=3,
        eos_token_id=None,
    )
    other = palu.palu_loss(logits, ref_logits, labels, n=1, top_k=3, eos_token_id=None)
    assert dropped.local == same.local
    assert dropped.local != other.local


def test_palu_loss_gives_the_reference_no_gradient() -> None:
    logits, ref_logits = (torch.randn(1, 3, 5, requires_grad=True) for _ in range(2))
    loss = palu.palu_loss(logits, ref_logits, torch.tensor([[-100, 1, -200]]))
    (loss.local + loss.kl).backward()
    assert logits.grad is not None
    assert ref_logits.grad is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, ValueError, r"needs logits and ref_logits \[B, T, V\].*got \[2, 3\]"),
        ({"ref_logits": torch.zeros(1, 3, 6)}, ValueError, r"got \[1, 3, 5\], \[1, 3, 6\] and \[1, 3\]"),
        ({"labels": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, r"and \[1, 4\]"),
        ({"labels": torch.zeros(1, 3)}, TypeError, "int64"),
        ({"labels": torch.zeros(1, 3, dtype=torch.int32)}, TypeError, "int64"),
        ({"kl_direction": "backward"}, ValueError, "kl_direction = 'backward': give one of forward, reverse"),
        ({"target": "median"}, ValueError, "unknown target 'median'"),
        ({"top_k": 0}, ValueError, "top_k = 0: give a positive integer"),
        ({"n": -2}, ValueError, "n"),
    ],
)
def test_palu_loss_refuses(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(1, 3, 5), "ref_logits": torch.zeros(1, 3, 5)}
    arguments |= {"labels": torch.tensor([[-100, 1, -200]])}
    with pytest.raises(error, match=message):
        palu.palu_loss(**(arguments | changes))


@pytest.mark.parametrize("label", [-300, -1, -101, 5, 2**40, -(2**63)])
def test_palu_loss_names_a_label_that_is_none(label: int) -> None:
    logits = torch.zeros(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[-100, 1, -200], [-100, 4, 0]])
    palu.palu_loss(logits, logits, labels)
    labels[1, 2] = label
    told = re.escape(f"palu_loss: labels[1, 2] = {label}: a label must be a token id below V = 5, -100 or -200")
    with pytest.raises(ValueError, match=told):
        palu.palu_loss(logits, logits, labels)


def test_palu_loss_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph, if dynamo may trace the choice of rows; the labels are checked there, too."""
    monkeypatch.setattr(torch._dynamo.config, "capture_dynamic_output_shape_ops", True)
    compiled = torch.compile(palu.palu_loss, fullgraph=True, backend="aot_eager")
    ref_logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 1, 2, -200], [-100, -200, 6, 3]])
    results = []
    for function in (compiled, palu.palu_loss):
        logits = torch.arange(56.0).view(2, 4, 7).cos().requires_grad_()
        loss = function(logits, ref_logits, labels, n=1, top_k=3)
        results.append((*loss, *torch.autograd.grad(loss.local + loss.kl, logits)))
    torch.testing.assert_close(*results)
    labels[0, 1] = 7
    with pytest.raises(ValueError, match=r"palu_loss: labels\[0, 1\] = 7: a label must be"):
        compiled(logits, ref_logits, labels, n=1, top_k=3)


# ---------------------------------------------------------------------------------------------------
# fused_linear_losses against plain autograd


@dataclass
class Case:
    """Arguments of fused_linear_losses; the head's weight and bias are leaves of their own."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    terms: tuple[Term, ...]
    row_weight: Tensor
    impl: str = "auto"
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def row_bytes(self) -> int:
        return self.weight.shape[0] * self.weight.element_size()

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype, as new leaves."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        def cast_head(head: Head) -> Head:
            return head._replace(weight=cast(head.weight), bias=None if head.bias is None else cast(head.bias))

        terms = tuple(
            replace(term, hidden=cast(term.hidden), head=cast_head(term.head)) if isinstance(term, KLTerm) else term
            for term in self.terms
        )
        head = cast_head(self.head)
        row_weight = self.row_weight.to(eager.acc_dtype(dtype))
        return replace(
            self, hidden=cast(self.hidden), weight=head.weight, bias=head.bias, terms=terms, row_weight=row_weight
        )

    def run(self, rows_per_chunk: int = 10**6, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """fused_linear_losses, forward and backward."""
        total, losses = fused_linear_losses(
            self.hidden,
            self.head,
            self.terms,
            self.row_weight,
            chunk_bytes=rows_per_chunk * self.row_bytes(),
            impl=self.impl,
        )
        if total.requires_grad:
            (factor * total).backward()
        return total.detach(), losses


def make(
    device: torch.device,
    rows: Sequence[int] = (5, 6, 7),
    vocab: int = 29,
    hidden_size: int = 8,
    top_k: int = 6,
    *,
    target: str | float = "global_mean",
    reverse: bool = False,
    bias: bool = True,
    trainable: Sequence[bool] = (True, True, True),
    dtype: torch.dtype = torch.float64,
    impl: str = "auto",
    scale: float = 1.0,
    softcap: float | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> Case:
    """Random values; `rows` are those of each term, `trainable` speaks of hidden, weight and bias.

    A capped head has no gathered rows.
    """

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    local, kl, retain = rows
    ref_head = Head(values(vocab, hidden_size), values(vocab) if bias else None, ref_scale, ref_softcap)
    # Not the reference's own: an index may name a logit twice.
    index = torch.randint(vocab, (local, top_k), device=device, dtype=torch.int32)
    terms = (
        LocalTerm(index, target),
        KLTerm(values(kl, hidden_size), ref_head, reverse),
        CrossEntropyTerm(torch.randint(vocab, (retain,), device=device)),
    )
    case = Case(
        values(sum(rows), hidden_size),
        values(vocab, hidden_size),
        values(vocab) if bias else None,
        terms,
        torch.rand(sum(rows), device=device, dtype=eager.acc_dtype(dtype)),
        impl if softcap is None else "auto",
        scale,
        softcap,
    )
    for leaf, wanted in zip(case.leaves, trainable, strict=True):
        if leaf is not None:
            leaf.requires_grad_(wanted)
    return case


def textbook_logits(hidden: Tensor, head: Head) -> Tensor:
    """As transformers forms them: each operation rounds to the dtype."""
    logits = head.scale * F.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def textbook_losses(case: Case) -> Tensor:
    """Losses [R] with all logits at once, by torch's own operations."""
    losses = []
    sizes = [len(term) for term in case.terms]
    for logits, term in zip(textbook_logits(case.hidden, case.head).split(sizes), case.terms, strict=True):
        if isinstance(term, LocalTerm):
            losses.append(eager.topk_mse(logits, term.index, term.target))
        elif isinstance(term, KLTerm):
            log_p = logits.log_softmax(-1)
            log_q = textbook_logits(term.hidden, term.head).detach().log_softmax(-1)
            if term.reverse:
                losses.append((log_p.exp() * (log_p - log_q)).sum(-1))
            else:
                losses.append((log_q.exp() * (log_q - log_p)).sum(-1))
        else:
            losses.append(F.cross_entropy(logits, term.labels, reduction="none"))
    return torch.cat([loss.to(case.row_weight.dtype) for loss in losses])


def textbook(case: Case, rows_per_chunk: int = 10**6, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Total and losses; the gradients of several chunks add up in the leaves, in their dtype."""
    losses = textbook_losses(case)
    for chunk in torch.arange(len(losses), device=losses.device).split(rows_per_chunk) if len(losses) else ():
        part = factor * (case.row_weight[chunk] * losses[chunk]).sum()
        if part.requires_grad:
            part.backward(retain_graph=True)
    return (case.row_weight * losses).sum().detach(), losses.detach()


def assert_equal_textbook(case: Case, rows_per_chunk: int = 10**6, factor: float = 1.0) -> None:
    """In float64, where both err by no more than rounding."""
    expected = case.to(torch.float64)
    for actual_value, expected_value in zip(
        case.run(rows_per_chunk, factor), textbook(expected, factor=factor), strict=True
    ):
        assert_near(actual_value, expected_value, 1e-12)
    for actual_leaf, expected_leaf in zip(case.leaves, expected.leaves, strict=True):
        if actual_leaf is not None and expected_leaf is not None:
            assert_near(actual_leaf.grad, expected_leaf.grad, 1e-12)


@pytest.mark.parametrize("trial", range(20))
def test_random_cases_equal_autograd(device: torch.device, impl: str, trial: int) -> None:
    rng = random.Random(trial)
    torch.manual_seed(trial)
    rows = [rng.randint(1, 9) for _ in range(3)]
    case = make(
        device,
        rows,
        vocab=rng.randint(2, 60),
        hidden_size=rng.randint(1, 20),
        top_k=rng.randint(1, 20),
        target=rng.choice(TARGETS),
        reverse=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        trainable=[True, rng.random() < 0.7, rng.random() < 0.7],
        impl=impl,
        scale=rng.choice([1.0, 0.0625, 0.3]),
        softcap=rng.choice([None, None, 2.0]),
        ref_scale=rng.choice([1.0, 0.5]),
        ref_softcap=rng.choice([None, 3.0]),
    )
    assert_equal_textbook(case, rows_per_chunk=rng.randint(1, 30), factor=rng.choice([1.0, 3.0]))


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 10**6])
def test_scaled_and_capped_heads_equal_autograd(
    device: torch.device, impl: str, scale: float, softcap: float | None, target: str | float, rows_per_chunk: int
) -> None:
    """All three terms; the reference's head has a scale and a cap of its own."""
    for frozen in (False, True):
        for bias in (False, True):
            case = make(
                device,
                target=target,
                reverse=frozen,
                bias=bias,
                trainable=(True, not frozen, not frozen),
                impl=impl,
                scale=scale,
                softcap=softcap,
                ref_scale=0.5,
                ref_softcap=4.0,
            )
            assert_equal_textbook(case, rows_per_chunk, factor=3.0)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("rows", "choice"),
    [((6, 0, 0), {"target": target}) for target in TARGETS]
    + [((0, 6, 0), {"reverse": reverse}) for reverse in (False, True)]
    + [((0, 0, 6), {})],
)
def test_each_term_alone_equals_autograd(
    device: torch.device, impl: str, bias: bool, rows: tuple[int, int, int], choice: dict
) -> None:
    assert_equal_textbook(make(device, rows, bias=bias, **choice, impl=impl), rows_per_chunk=4)


@pytest.mark.parametrize("rows", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 4, 4), (4, 0, 4), (4, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_roles_may_be_missing(device: torch.device, impl: str, rows: tuple[int, int, int], kept: int) -> None:
    """Terms without rows, or not there at all, change nothing; where no row is left gradients are 0."""
    case = make(device, rows, impl=impl)
    case.terms = case.terms[:kept]
    total_rows = sum(len(term) for term in case.terms)
    case.hidden = case.hidden.detach()[:total_rows].requires_grad_()
    case.row_weight = case.row_weight[:total_rows]
    if total_rows:
        return assert_equal_textbook(case, rows_per_chunk=3)
    total, losses = case.run()
    assert total == 0
    assert losses.shape == (0,)
    assert case.weight.grad is not None
    assert case.bias is not None
    assert case.bias.grad is not None
    assert not case.weight.grad.any()
    assert not case.bias.grad.any()


def test_no_terms_at_all(device: torch.device) -> None:
    case = make(device, (0, 0, 0))
    case.terms = ()
    total, losses = case.run()
    assert total == 0
    assert len(losses) == 0


@pytest.mark.parametrize("rows_per_chunk", [0, 1, 2, 3, 7, 17, 18, 10**6])
def test_chunks_of_any_size_equal_autograd(device: torch.device, impl: str, rows_per_chunk: int) -> None:
    assert_equal_textbook(make(device, impl=impl), rows_per_chunk)


@pytest.mark.parametrize("trial", range(100))
def test_chunks_hold_every_row_once_and_keep_the_budget(trial: int) -> None:
    rng = random.Random(trial)
    rows = [rng.choice([0, rng.randint(1, 12)]) for _ in range(3)]
    terms = make(torch.device("cpu"), rows).terms
    start, budget, copies = rng.choice([0, rows[0]]), rng.randint(0, 20), rng.randint(1, 2)
    seen: list[tuple[Term, int, int]] = []
    for chunk, parts in _chunks(terms, start, budget, copies=copies):
        assert chunk.start == parts[0][1].start
        assert chunk.stop == parts[-1][1].stop
        cost = 0
        for term, of_hidden, of_term in parts:
            hidden_rows, term_rows = (
                range(of_hidden.start, of_hidden.stop),
                range(of_term.start, of_term.stop),
            )
            seen += [(term, *pair) for pair in zip(hidden_rows, term_rows, strict=True)]
            cost += len(term_rows) * (copies + 1 if isinstance(term, KLTerm) else copies)
        assert cost <= budget or chunk.stop - chunk.start == 1
    every = [(term, row) for term in terms for row in range(len(term))]
    expected = [(term, number, row) for number, (term, row) in enumerate(every)][start:]
    assert [pair[1:] for pair in seen] == [pair[1:] for pair in expected]
    assert all(a[0] is b[0] for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_per_chunk", [1, 8, 10**6])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), *HEADS])
def test_low_precision_loses_no_more_than_torch(
    device: torch.device,
    impl: str,
    dtype: torch.dtype,
    rows_per_chunk: int,
    reverse: bool,
    scale: float,
    softcap: float | None,
) -> None:
    case = make(
        device,
        (20, 24, 28),
        vocab=211,
        hidden_size=16,
        top_k=30,
        reverse=reverse,
        dtype=dtype,
        impl=impl,
        scale=scale,
        softcap=softcap,
        ref_scale=scale,
        ref_softcap=softcap,
    )
    truth, plain = case.to(torch.float64), case.to(dtype)
    results = case.run(rows_per_chunk), textbook(plain, rows_per_chunk), textbook(truth)
    gradients = [[leaf.grad for leaf in c.leaves if leaf is not None] for c in (case, plain, truth)]
    for ours, theirs, true in zip(
        [*results[0], *gradients[0]], [*results[1], *gradients[1]], [*results[2], *gradients[2]], strict=True
    ):
        assert ours is not None
        assert theirs is not None
        assert true is not None
        lost, torch_lost = ((x.double() - true).norm() for x in (ours, theirs))
        # A little is allowed where torch is right by luck, as it is for a scalar.
        assert lost <= 1.5 * torch_lost + 4 * torch.finfo(dtype).eps * true.norm()
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_logits_of_a_head_lose_no_more_than_torch(dtype: torch.dtype, scale: float, softcap: float | None) -> None:
    hidden, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((64, 32), (300, 32), (300,)))
    head = Head(weight, bias, scale, softcap)
    truth = textbook_logits(hidden.double(), head._replace(weight=weight.double(), bias=bias.double()))
    lost, torch_lost = ((z - truth).norm() for z in (head.logits(hidden), textbook_logits(hidden, head)))
    assert head.logits(hidden).dtype == torch.float32
    assert lost <= 1.1 * torch_lost


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 5), (17, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_cap_and_its_slope_are_rounded_once(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = 60 * torch.randn(shape, dtype=dtype)
    t = (logits.double() / 30).tanh()
    slope = softcap_(logits, 30.0, slope=True)
    assert slope is not None
    assert slope.shape == logits.shape
    exact = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(eager.acc_dtype(dtype)).eps
    assert ((logits - 30 * t).abs() <= exact * (30 * t).abs()).all()
    # 1 - t^2 itself cancels near the cap, in float32 as in torch's own.
    assert ((slope - (1 - t * t)).abs() <= exact * (1 - t * t) + 4 * torch.finfo(eager.acc_dtype(dtype)).eps).all()


def test_gathering_is_refused_for_a_capped_head(device: torch.device) -> None:
    case = make(device, softcap=2.0)
    with pytest.raises(ValueError, match=r'^impl = "gather" needs logits that are not capped; give "auto" or "dense"$'):
        replace(case, impl="gather").run()
    with pytest.raises(ValueError, match=r"^unknown impl 'fast'"):
        replace(case, impl="fast").run()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_many_chunks_lose_no_more_than_one(
    device: torch.device, impl: str, weight_dtype: torch.dtype, bias: bool
) -> None:
    """The head's gradient is added up in float32: in bfloat16 a sum of 400 chunks would stand still."""
    case = make(device, (40, 0, 360), vocab=61, hidden_size=16, bias=bias, dtype=weight_dtype, impl=impl)
    with torch.no_grad():
        case.hidden.add_(1)  # so that the chunks' parts do not cancel each other
    one, truth = case.to(weight_dtype), case.to(torch.float64)
    with torch.autocast(device.type, torch.bfloat16, enabled=weight_dtype == torch.float32):
        case.run(rows_per_chunk=1)
        one.run()
    truth.run()
    for ours, theirs, true in list(zip(case.leaves, one.leaves, truth.leaves, strict=True))[1:]:
        if true is None:
            continue
        assert ours.grad.dtype == weight_dtype
        lost, lost_by_one = ((x.grad.double() - true.grad).norm() / true.grad.norm() for x in (ours, theirs))
        assert lost <= 1.1 * lost_by_one + torch.finfo(torch.bfloat16).eps / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sum_of_full_precision_keeps_its_bits(device: torch.device, dtype: torch.dtype) -> None:
    """Chunk after chunk is added to the buffer, the gathered rows last."""
    case = make(device, (5, 6, 7), dtype=dtype, impl="gather", bias=False)
    case.run(rows_per_chunk=4)
    local = case.terms[0]
    weight, hidden = case.weight.detach(), case.hidden.detach()
    expected = torch.zeros_like(weight)
    for chunk, parts in _chunks(case.terms, 5, 4):
        logits = hidden[chunk] @ weight.t()
        for term, of_hidden, of_term in parts:
            at = slice(of_hidden.start - chunk.start, of_hidden.stop - chunk.start)
            term.loss_and_grad_(logits[at], case.row_weight[of_hidden], of_term)
        expected.addmm_(logits.t(), hidden[chunk])
    gathered = None, expected, None
    fused.linear_topk_mse_fwd_bwd(
        hidden[:5], weight, local.index, case.row_weight[:5], local.target, None, None, gathered
    )
    assert torch.equal(case.weight.grad, expected)


@pytest.mark.parametrize("factor", [3.0, -0.25, 0.0])
def test_upstream_gradient_scales(device: torch.device, impl: str, factor: float) -> None:
    assert_equal_textbook(make(device, impl=impl), rows_per_chunk=5, factor=factor)


def test_gradient_flows_into_a_larger_graph(device: torch.device) -> None:
    """Tied embeddings, accumulation: the head's weight has other gradients too."""
    case = make(device)
    plain = case.to(torch.float64)
    for _ in range(2):
        total, _ = fused_linear_losses(
            2 * case.hidden, Head(3 * case.weight, case.bias), case.terms, case.row_weight, chunk_bytes=0
        )
        (total + case.weight.square().sum()).backward()
        scaled = replace(plain, hidden=2 * plain.hidden, weight=3 * plain.weight)
        ((scaled.row_weight * textbook_losses(scaled)).sum() + plain.weight.square().sum()).backward()
    for ours, theirs in zip(case.leaves, plain.leaves, strict=True):
        assert ours is not None
        assert theirs is not None
        assert_near(ours.grad, theirs.grad, 1e-12)


@pytest.mark.parametrize("trainable", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_only_what_needs_a_gradient_gets_one(device: torch.device, impl: str, trainable: tuple[int, int, int]) -> None:
    case = make(device, trainable=[bool(flag) for flag in trainable], impl=impl)
    total, losses = fused_linear_losses(case.hidden, case.head, case.terms, case.row_weight, chunk_bytes=0, impl=impl)
    assert total.requires_grad == any(trainable)
    assert not losses.requires_grad
    assert_equal_textbook(case, rows_per_chunk=5)
    for leaf, wanted in zip(case.leaves, trainable, strict=True):
        assert leaf is not None
        assert (leaf.grad is not None) == bool(wanted)


def test_no_gradient_is_formed_under_no_grad(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    with torch.no_grad():
        total, losses = case.run()
    assert not total.requires_grad
    expected = textbook(case.to(torch.float64))
    assert_near(total, expected[0], 1e-12)
    assert_near(losses, expected[1], 1e-12)


def test_a_second_backward_is_refused(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    total, _ = fused_linear_losses(case.hidden, case.head, case.terms, case.row_weight, chunk_bytes=0, impl=impl)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"fused_linear_losses were already used: call it again"):
        total.backward()


def test_a_second_derivative_is_refused(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    total, _ = fused_linear_losses(case.hidden, case.head, case.terms, case.row_weight, chunk_bytes=0, impl=impl)
    (gradient,) = torch.autograd.grad(total.square(), case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inputs_in_any_layout(device: torch.device, impl: str) -> None:
    """Slices of larger tensors and transposed ones; what lies around them is NaN and must not be read."""
    case = make(device, dtype=torch.float64, impl=impl)

    def transposed(t: Tensor) -> Tensor:
        whole = torch.full([size + 4 for size in t.shape[::-1]], float("nan"), dtype=t.dtype, device=device)
        part = whole[tuple(slice(2, 2 + size) for size in t.shape[::-1])].permute(*range(t.dim() - 1, -1, -1))
        return part.copy_(t.detach())

    def dense(t: Tensor) -> Tensor:
        return t.detach().t().contiguous().t()

    expected = textbook(case)
    for layout in (transposed, dense):
        leaves = [layout(t).requires_grad_() for t in (case.hidden, case.weight)]
        bias = transposed(case.bias).requires_grad_()
        total, losses = fused_linear_losses(
            leaves[0],
            Head(leaves[1], bias),
            case.terms,
            transposed(case.row_weight),
            chunk_bytes=5 * case.row_bytes(),
            impl=impl,
        )
        total.backward()
        assert_near(total, expected[0], 1e-12)
        assert_near(losses, expected[1], 1e-12)
        for ours, theirs in zip((*leaves, bias), case.leaves, strict=True):
            assert_near(ours.grad, theirs.grad, 1e-12)


def test_inputs_are_left_as_they_were(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    tensors = [*case.leaves, case.row_weight, case.terms[0].index, *case.terms[1].head[:2], case.terms[1].hidden]
    before = [t.detach().clone() for t in tensors]
    case.run(rows_per_chunk=4, factor=2.0)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_a_known_mean_row_is_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(device, bias=False, impl="gather")
    mean = case.weight.detach().mean(0)
    call = functools.partial(
        fused_linear_losses, case.hidden, case.head, case.terms, case.row_weight, chunk_bytes=0, impl="gather"
    )
    expected, _ = call()
    monkeypatch.setattr(fused, "weight_mean", None)  # it would be called otherwise
    total, _ = call(weight_mean=mean)
    assert total == expected
    with pytest.raises(TypeError):
        call()


def test_autocast(device: torch.device, impl: str) -> None:
    """float32 hidden states and head, bfloat16 products: no worse than torch's own autocast."""
    case = make(device, (20, 24, 28), vocab=211, hidden_size=16, top_k=30, dtype=torch.float32, impl=impl)
    truth, plain = case.to(torch.float64), case.to(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        case.run(rows_per_chunk=32)
        textbook(plain)
    textbook(truth)
    for ours, theirs, true in zip(case.leaves, plain.leaves, truth.leaves, strict=True):
        assert ours is not None
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        lost, torch_lost = ((x.grad.double() - true.grad).norm() for x in (ours, theirs))
        assert lost <= 1.5 * torch_lost + 4 * torch.finfo(torch.bfloat16).eps * true.grad.norm()
        assert lost > 1e-5 * true.grad.norm(), "autocast had no effect"


# ---------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(device: torch.device, run: functools.partial) -> int:
    """The most bytes that were allocated at once during a call, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    held = peak = 0
    allocations = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_memory_is_bounded_by_the_chunk(device: torch.device, impl: str, reverse: bool) -> None:
    case = make(
        device,
        (64, 256, 256),
        vocab=4096,
        hidden_size=16,
        top_k=50,
        dtype=torch.float32,
        bias=False,
        reverse=reverse,
        impl=impl,
    )
    case.run()  # what is allocated once, such as cuBLAS's workspace
    case.weight.grad = case.hidden.grad = None
    row, gradients = case.row_bytes(), 4 * (case.weight.numel() + case.hidden.numel())
    chunk = 16 * row
    peak = peak_bytes(device, functools.partial(case.run, 16))
    # The logits, the CPU's two copies for the KL, each no larger than half a chunk, and small change.
    assert gradients + row < peak < gradients + 2 * chunk + 2**18
    whole = peak_bytes(device, functools.partial(case.run))
    assert whole > gradients + 512 * row > gradients + 2 * chunk + 2**18, "the bound would hold without chunks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(0, 0, 512), (512, 0, 0), (0, 512, 0)], ids=["retain", "local", "kl"])
def test_memory_of_a_capped_head_is_bounded_by_the_chunk(
    device: torch.device, dtype: torch.dtype, rows: tuple[int, int, int]
) -> None:
    """Slopes and float32 values count, so that it holds no more than a head without a cap."""
    peaks = []
    for softcap in (None, 2.0):
        case = make(
            device,
            rows,
            vocab=4096,
            hidden_size=16,
            dtype=dtype,
            bias=False,
            trainable=(True, False, False),
            impl="dense",
            softcap=softcap,
            ref_softcap=softcap,
        )
        case.run()
        case.hidden.grad = None
        peaks.append(peak_bytes(device, functools.partial(case.run, 64)))
    assert 32 * case.row_bytes() < peaks[1] <= peaks[0] + 2**14, peaks


@pytest.mark.parametrize("rows_per_chunk", [1, 10**6])
def test_memory_of_a_head_in_bfloat16(device: torch.device, rows_per_chunk: int) -> None:
    """As the docstring says: the sum in float32 beside the gradient where there are several chunks."""
    case = make(device, (8, 0, 24), vocab=8192, hidden_size=256, dtype=torch.bfloat16, bias=False, impl="dense")
    case.run(rows_per_chunk)
    case.weight.grad = case.hidden.grad = None
    gradient = (6 if rows_per_chunk == 1 else 2) * case.weight.numel()
    peak = peak_bytes(device, functools.partial(case.run, rows_per_chunk))
    assert gradient <= peak < gradient + 2 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_not_copied(device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """weight.grad is the very buffer that the forward pass filled: a head's gradient can be a gigabyte."""
    buffers = []

    def spy(*args: object) -> Tensor:
        buffers.append([t.data_ptr() for t in args[-1] if t is not None])  # type: ignore[attr-defined]
        return linear_topk_mse_fwd_bwd(*args)  # type: ignore[arg-type]

    linear_topk_mse_fwd_bwd = fused.linear_topk_mse_fwd_bwd
    monkeypatch.setattr(fused, "linear_topk_mse_fwd_bwd", spy)
    case = make(device, dtype=dtype, impl="gather")
    case.run(rows_per_chunk=4)
    assert buffers == [[leaf.grad.data_ptr() for leaf in case.leaves]]
