"""The losses against the published implementation, and the textbook form against its formula."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.loss_cases import TARGETS, assert_near
from torch import Tensor

import palu
from palu.losses import KLTerm, LocalTerm, fused_linear_losses
from palu.models.head import Head

GOLDEN = Path(__file__).with_name("golden") / "published_loss.npz"


# --- The published implementation ---
PUBLISHED: dict[str, dict[str, Tensor]] = {}
with np.load(GOLDEN) as arrays:
    for name in arrays:
        number, field = name.split("/")
        PUBLISHED.setdefault(number, {})[field] = torch.from_numpy(arrays[name])
every_published_case = pytest.mark.parametrize("case", PUBLISHED)


@every_published_case
def test_palu_loss_is_the_published_one(case: str, device: torch.device) -> None:
    known = {name: values.to(device, copy=True) for name, values in PUBLISHED[case].items()}
    n, top_k, eos = known["meta"].tolist()
    logits = known["logits"].requires_grad_()
    given = {"n": n, "top_k": top_k, "eos_token_id": eos, "kl_direction": "reverse"}
    loss = palu.palu_loss(logits, known["ref_logits"], known["labels"], **given)
    for name, value in zip(("local", "kl"), loss, strict=True):
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert_near(value, known[name])
        assert_near(gradient, known[f"grad_{name}"])


@every_published_case
@pytest.mark.parametrize("impl", ["gather", "dense"])
def test_head_losses_are_the_published_ones(case: str, device: torch.device, impl: str) -> None:
    known = {name: values.to(device, copy=True) for name, values in PUBLISHED[case].items()}
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
        gradient = torch.zeros_like(known["logits"])
        gradient[:, :-1][mask] = hidden.grad[parts == part]
        assert_near(total, known[name])
        assert_near(gradient, known[f"grad_{name}"])
        assert not hidden.grad[parts != part].any()


# --- palu_loss ---
def naive_palu_loss(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, n: int, top_k: int, target: str | float, direction: str
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
                c = {"global_mean": z.mean(), "global_mean_detached": z.mean().detach(), "local_mean": kept.mean()}
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
        [[-100, -100, 5, 6, 7, -200, 3, -200, -200], [-100, -200, -200, 1, -200, 2, 3, 4, -100]], device=device
    )
    loss = palu.palu_loss(logits, ref_logits, labels, n=n, top_k=top_k, target=target, kl_direction=direction)
    naive = naive_palu_loss(logits, ref_logits, labels, n, top_k, target, direction)
    for value, expected in zip(loss, naive, strict=True):
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
    assert loss == (0, 0)
    (loss.local + loss.kl).backward()
    assert not logits.grad.any()


def test_palu_loss_drops_a_sensitive_end_of_sequence(device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 1, 5, 11, device=device)
    labels = torch.tensor([[-100, 4, 2, 5, -200]], device=device)
    # With n = 1 the dropped label, 2, parts the span: 5 begins another.
    dropped = palu.palu_loss(logits, ref_logits, labels, n=1, top_k=3, eos_token_id=2)
    parted = torch.tensor([[-100, 4, -100, 5, -200]], device=device)
    same = palu.palu_loss(logits, ref_logits, parted, n=1, top_k=3, eos_token_id=None)
    other = palu.palu_loss(logits, ref_logits, labels, n=1, top_k=3, eos_token_id=None)
    assert dropped.local == same.local
    assert dropped.local != other.local


def test_palu_loss_gives_the_reference_no_gradient() -> None:
    logits, ref_logits = (torch.randn(1, 3, 5, requires_grad=True) for _ in range(2))
    loss = palu.palu_loss(logits, ref_logits, torch.tensor([[-100, 1, -200]]))
    (loss.local + loss.kl).backward()
    assert logits.grad is not None and ref_logits.grad is None


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
