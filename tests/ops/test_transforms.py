"""Derivatives that no op has: each is an error that names the twin, and none is lost without a word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

import palu
from palu import ops
from palu.losses import CrossEntropyTerm, fused_linear_losses
from palu.models.head import Head

INDEX, LABELS = torch.tensor([[0, 1], [1, 2], [3, 3]]), torch.tensor([1, 4, 0])
Z, HEAD, WEIGHT = torch.arange(15.0).view(3, 5).cos(), torch.eye(5), torch.ones(3)
# Of logits, which are hidden states, too: (twin, losses [R]).
AUTOGRAD: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "logits": ("topk_mse", lambda z: palu.topk_mse(z, INDEX)),
    "gather": ("linear_topk_mse", lambda z: palu.linear_topk_mse(z, HEAD, INDEX, bias=z[0], impl="gather")),
    "dense": ("(linear_)?topk_mse", lambda z: palu.linear_topk_mse(z, HEAD, INDEX, impl="dense")),
    "unlikelihood of logits": ("topk_unlikelihood", lambda z: palu.topk_unlikelihood(z, INDEX)),
    "unlikelihood": (
        "linear_topk_unlikelihood",
        lambda z: palu.linear_topk_unlikelihood(z, HEAD, INDEX, impl="gather"),
    ),
    "frozen head": ("linear_topk_mse", lambda z: palu.linear_topk_mse(z, HEAD, INDEX, impl="gather")),
}
IN_PLACE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "cross_entropy_": ("cross_entropy_", lambda z: ops.cross_entropy_(z * 1, LABELS, WEIGHT)),
    "kl_div_": ("kl_div_", lambda z: ops.kl_div_(z * 1, HEAD[:3], WEIGHT, True)),
}


def fused(z: Tensor) -> Tensor:
    return fused_linear_losses(z, Head(HEAD, None), (CrossEntropyTerm(LABELS),), WEIGHT, chunk_bytes=2**20)[0]


def forward_mode(losses: Callable[[Tensor], Tensor], z: Tensor) -> Any:
    with forward_ad.dual_level():
        return losses(forward_ad.make_dual(z, torch.ones_like(z)))


def total(losses: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: losses(z).sum()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "jvp": lambda f: jvp(f, (Z,), (Z,)),
    "forward_ad": lambda f: forward_mode(f, Z),
    "forward_ad of a leaf": lambda f: forward_mode(f, Z.clone().requires_grad_()),
    "grad": lambda f: grad(total(f))(Z),
    "vjp": lambda f: vjp(f, Z),
    "vmap": lambda f: vmap(f)(Z.expand(2, 3, 5)),
    "hessian": lambda f: hessian(total(f))(Z),
    "compiled jvp": lambda f: torch.compile(lambda z: jvp(f, (z,), (z,))[1], fullgraph=True, backend="eager")(Z),
    "compiled grad": lambda f: torch.compile(grad(total(f)), fullgraph=True, backend="eager")(Z),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_raise(transform: str) -> None:
    for twin, losses in (AUTOGRAD | IN_PLACE).values():
        told = rf"palu::{twin}(_frozen)? has reverse mode alone.*; use its twin in palu\.eager"
        with pytest.raises(RuntimeError, match=told):
            TRANSFORMS[transform](losses)
    if transform != "vmap":
        with pytest.raises(RuntimeError, match=r"fused_linear_losses has first derivatives in reverse mode only"):
            TRANSFORMS[transform](fused)


@pytest.mark.parametrize("name", AUTOGRAD)
def test_second_and_batched_derivatives_raise(name: str) -> None:
    twin, losses = AUTOGRAD[name]
    leaf = Z.clone().requires_grad_()
    for upstream in (torch.ones(3), torch.ones(3, requires_grad=True)):
        with pytest.raises(RuntimeError, match=rf"palu::{twin} has first derivatives only.*; use palu\.eager\.{twin}"):
            torch.autograd.grad(losses(leaf), leaf, upstream, create_graph=True)
    if name != "frozen head":
        told = r"palu::(linear_)?topk_backward has reverse mode alone.*is_grads_batched"
        with pytest.raises(RuntimeError, match=told):
            torch.autograd.grad(losses(leaf), leaf, torch.eye(3), is_grads_batched=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(fused(leaf), leaf, torch.ones(2), is_grads_batched=True)


def test_a_mask_has_no_derivative_to_lose() -> None:
    labels = torch.randint(-1, 3, (2, 2, 9))
    masks = torch.stack([palu.prefix_mask(part, 2) for part in labels])
    assert torch.equal(vmap(lambda part: palu.prefix_mask(part, 2))(labels), masks)
    chosen = grad(lambda z: (z * palu.prefix_mask(labels[0], 2)).sum())(torch.ones(2, 9))
    assert torch.equal(chosen == 1, masks[0])
