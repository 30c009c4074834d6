"""Losses on hidden states and a head from other libraries, for bench_ops.py.

Each is called as its documentation says, with the library's defaults. `load` imports what it needs; whatever that or
the first call raises is the reason why a peer is missing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]
"""(hidden [R, d], weight [V, d], *own) -> mean loss; own are labels [R], or hidden states and head of a reference."""


class Peer(NamedTuple):
    """A candidate for one op."""

    name: str
    op: str
    load: Callable[[torch.device], Loss]


def _torch_cross_entropy(_: torch.device) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks; without, it forms all logits, as the twin does
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def _cut_cross_entropy(device: torch.device) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if device.type == "cuda" else "torch_compile"
    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, impl=impl)


def _liger_cross_entropy(_: torch.device) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def _liger_kl(_: torch.device) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)  # 0: KL(reference || model)
    return lambda *hidden_and_heads: loss(*hidden_and_heads, None)


def _liger_chunked_kl(compiled: bool, _: torch.device) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled)

    def run(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)  # they say which rows count
        return loss(hidden, weight, ref_hidden, ref_weight, labels)

    return run


PEERS = [
    Peer("torch", "linear_cross_entropy", _torch_cross_entropy),
    Peer("cut_cross_entropy", "linear_cross_entropy", _cut_cross_entropy),
    Peer("liger", "linear_cross_entropy", _liger_cross_entropy),
    Peer("liger", "linear_kl", _liger_kl),
    Peer("liger_chunked", "linear_kl", partial(_liger_chunked_kl, False)),
    Peer("liger_chunked_compiled", "linear_kl", partial(_liger_chunked_kl, True)),
]


def agreeing(
    op: str, ours: Loss, hidden: Tensor, weight: Tensor, own: Sequence[Tensor], missing: dict[str, str]
) -> dict[str, Loss]:
    """Return the peers of an op that run here and agree with it; say of each other one in `missing` why not.

    Compared are the loss and the gradients of hidden states and head, by the largest difference as a share of the
    largest value: 1e-4 may be lost, and in half precision 5 %.
    """
    allowed = 1e-4 if hidden.dtype in (torch.float32, torch.float64) else 0.05
    candidates = [peer for peer in PEERS if peer.op == op]
    if not candidates:
        return {}
    truth = [t.double() for t in _with_gradients(ours, hidden, weight, own)]
    found = {}
    for peer in candidates:
        try:
            loss = peer.load(hidden.device)
            theirs = _with_gradients(loss, hidden, weight, own)
            differences = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(theirs, truth, strict=True)]
            off = float(torch.stack(differences).max())
        except Exception as error:
            told = str(error).strip().split("\n")[0]
            missing[f"{peer.name}, {op}"] = f"{type(error).__name__}: {told}"
            continue
        if off <= allowed:  # False for NaN
            found[peer.name] = loss
        else:
            missing[f"{peer.name}, {op}"] = f"differs from palu by {off:.1e} of the largest value"
    return found


def _with_gradients(loss: Loss, hidden: Tensor, weight: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    value = loss(*leaves, *own)
    return value.detach(), *torch.autograd.grad(value, leaves)
