"""Peers of bench_ops.py are timed only where they agree with the op; the others are named with the reason."""

import _peers
import pytest
import torch
from _peers import Loss, Peer, agreeing

from palu import eager, ops


def not_installed(_: torch.device) -> Loss:
    import no_such_library

    return no_such_library.loss


def test_only_what_agrees_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_gradient(factor: float) -> Loss:
        def loss(hidden: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            hidden.register_hook(lambda gradient: factor * gradient)
            return eager.linear_cross_entropy(hidden, *others)

        return loss

    peers = {
        "right": lambda _: eager.linear_cross_entropy,
        "wrong": lambda _: with_gradient(1.001),
        "not a number": lambda _: with_gradient(torch.nan),
        "absent": not_installed,
        "broken": lambda _: lambda *_: torch.zeros(2).view(3),
    }
    known = [Peer(name, "linear_cross_entropy", load) for name, load in peers.items()]
    monkeypatch.setattr(_peers, "PEERS", [*known, Peer("of another op", "linear_kl", not_installed)])
    hidden, weight, labels = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    missing: dict[str, str] = {}
    found = agreeing("linear_cross_entropy", ops.linear_cross_entropy, hidden, weight, (labels,), missing)
    assert list(found) == ["right"]
    assert {name.split(",")[0]: reason.split(" ")[0] for name, reason in missing.items()} == {
        "wrong": "differs",
        "not a number": "differs",
        "absent": "ModuleNotFoundError:",
        "broken": "RuntimeError:",
    }
    assert agreeing("linear_topk_kl", ops.linear_topk_kl, hidden, weight, (), missing) == {}


def test_those_of_torch_agree() -> None:
    given = torch.randn(64, 8), torch.randn(50, 8)
    missing: dict[str, str] = {}
    found = agreeing("linear_cross_entropy", ops.linear_cross_entropy, *given, (torch.arange(64) % 50,), missing)
    assert ("torch" in found) == hasattr(torch.nn, "LinearCrossEntropyOptions"), missing
