"""Forward mode and torch.func, against the plain-torch twins in float64."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import palu
from palu import eager
from palu.losses import CrossEntropyTerm, fused_linear_losses
from palu.models.head import Head

TARGETS = ["global_mean", "global_mean_detached", "local_mean", 0.5]
BATCH, ROWS, VOCAB, HIDDEN, K = 3, 4, 11, 5, 6

Losses = Callable[..., Tensor]


# torch warns where it has no batching rule of ours and calls the op in a loop.
pytestmark = pytest.mark.filterwarnings("error:.*batching rule")


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def index(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, dtype=torch.int32)


def losses(module: ModuleType, op: str, target: str | float) -> tuple[Losses, tuple[Tensor, ...]]:
    """An op of one row's index, as a function of its differentiable arguments; and these."""
    i = torch.arange(ROWS * K, dtype=torch.int32).view(ROWS, K) % VOCAB
    if op == "topk_mse":
        return lambda z: module.topk_mse(z, i, target), (leaf(ROWS, VOCAB),)
    if op == "frozen head":
        weight = torch.sin(torch.arange(VOCAB * HIDDEN, dtype=torch.float64)).view(VOCAB, HIDDEN)
        options = {"impl": "gather"} if module is palu else {}
        return lambda h: module.linear_topk_mse(h, weight, i, target, weight[:, 0], **options), (leaf(ROWS, HIDDEN),)
    options = {"impl": op} if module is palu else {}
    function = module.linear_topk_mse
    leaves = leaf(ROWS, HIDDEN), leaf(VOCAB, HIDDEN), leaf(VOCAB)
    return lambda h, w, b: function(h, w, i, target, b, **options), leaves


def close(ours: Any, twins: Any) -> None:
    torch.testing.assert_close(ours, twins, rtol=1e-11, atol=1e-11)


OPS = pytest.mark.parametrize("op", ["topk_mse", "gather", "dense", "frozen head"])


@OPS
@pytest.mark.parametrize("target", TARGETS)
def test_forward_mode(op: str, target: str | float) -> None:
    (ours, leaves), (twin, _) = losses(palu, op, target), losses(eager, op, target)
    tangents = tuple(map(torch.randn_like, leaves))
    close(jvp(ours, leaves, tangents), jvp(twin, leaves, tangents))
    for position in range(len(leaves)):  # a tangent of one argument alone
        close(jacfwd(ours, argnums=position)(*leaves), jacfwd(twin, argnums=position)(*leaves))
        for wants_grad in (False, True):
            results = []
            for function in (ours, twin):
                with forward_ad.dual_level():
                    duals = [t.clone().requires_grad_(wants_grad) for t in leaves]
                    duals[position] = forward_ad.make_dual(duals[position], tangents[position])
                    results.append(forward_ad.unpack_dual(function(*duals)))
            close(results[0].primal, results[1].primal)
            close(results[0].tangent, results[1].tangent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_in_lower_precision(dtype: torch.dtype) -> None:
    h, w, i = leaf(ROWS, HIDDEN).to(dtype), leaf(VOCAB, HIDDEN).to(dtype), index(ROWS, K)
    tangent = torch.randn_like(h)
    _, ours = jvp(lambda h: palu.linear_topk_mse(h, w, i, impl="gather"), (h,), (tangent,))
    _, exact = jvp(lambda h: eager.linear_topk_mse(h, w.double(), i), (h.double(),), (tangent.double(),))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


@OPS
@pytest.mark.parametrize("target", TARGETS)
def test_gradients(op: str, target: str | float) -> None:
    (ours, leaves), (twin, _) = losses(palu, op, target), losses(eager, op, target)
    positions = tuple(range(len(leaves)))
    sums = [lambda *args, f=f: f(*args).square().sum() for f in (ours, twin)]
    close(*(grad(f, positions)(*leaves) for f in sums))
    close(*(vjp(f, *leaves)[1](torch.arange(ROWS, dtype=torch.float64)) for f in (ours, twin)))
    close(*(jacrev(f, positions)(*leaves) for f in (ours, twin)))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0), (0, 1)])
def test_vmap_topk_mse(in_dims: tuple[int | None, int | None]) -> None:
    z, i = leaf(ROWS, VOCAB), index(ROWS, K)
    z = z if in_dims[0] is None else torch.stack([leaf(ROWS, VOCAB) for _ in range(BATCH)], in_dims[0])
    i = i if in_dims[1] is None else torch.stack([index(ROWS, K) for _ in range(BATCH)], in_dims[1])
    for transform in (lambda f: f, lambda f: grad(lambda z, i: f(z, i).sum())):
        close(*(vmap(transform(m.topk_mse), in_dims)(z, i) for m in (palu, eager)))


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("in_dims", [(0, None, 0, None), (0, 0, None, None), (None, None, 0, 0), (None, 1, None, 0)])
def test_vmap_linear_topk_mse(in_dims: tuple[int | None, ...], argnums: tuple[int, ...]) -> None:
    def batched(make: Callable[..., Tensor], dim: int | None, *shape: int) -> Tensor:
        return make(*shape) if dim is None else torch.stack([make(*shape) for _ in range(BATCH)], dim)

    makers = (leaf, (ROWS, HIDDEN)), (leaf, (VOCAB, HIDDEN)), (index, (ROWS, K)), (leaf, (VOCAB,))
    arguments = [batched(make, dim, *shape) for (make, shape), dim in zip(makers, in_dims, strict=True)]

    def total(h: Tensor, w: Tensor, b: Tensor, i: Tensor, *, function: Losses) -> Tensor:
        return function(h, w, i, "global_mean", b).sum()

    h, w, i, b = arguments
    dims = in_dims[0], in_dims[1], in_dims[3], in_dims[2]
    functions = partial(palu.linear_topk_mse, impl="gather"), eager.linear_topk_mse
    close(*(vmap(partial(total, function=f), dims)(h, w, b, i) for f in functions))
    close(*(vmap(grad(partial(total, function=f), argnums), dims)(h, w, b, i) for f in functions))


def test_vmap_per_example_gradients_of_a_shared_head() -> None:
    """As in differential privacy, or influence functions: examples of one row each."""
    h, w, i = leaf(BATCH, HIDDEN), leaf(VOCAB, HIDDEN), index(BATCH, K)
    ours, twins = (
        vmap(grad(lambda w, h, i, m=m: m.linear_topk_mse(h[None], w, i[None])[0]), (None, 0, 0))(w, h, i)
        for m in (palu, eager)
    )
    assert ours.shape == (BATCH, VOCAB, HIDDEN)
    close(ours, twins)


def test_vmap_prefix_mask() -> None:
    labels = torch.randint(-1, 3, (BATCH, 2, 9))
    mask = vmap(lambda labels: palu.prefix_mask(labels, 2))(labels)
    assert torch.equal(mask, torch.stack([palu.prefix_mask(part, 2) for part in labels]))


@pytest.mark.parametrize("op", ["cross_entropy_", "unlikelihood_"])
def test_vmap_of_what_is_overwritten(op: str) -> None:
    def call(z: Tensor, labels: Tensor) -> Tensor:
        return getattr(palu.ops, op)(z, labels, weight, *([0.02] if op == "unlikelihood_" else []))

    z, labels, weight = leaf(BATCH, ROWS, VOCAB), torch.randint(VOCAB, (ROWS,)), torch.ones(ROWS, dtype=torch.float64)
    expected = [t.clone() for t in z]
    each = torch.stack([call(t, labels) for t in expected])
    close(vmap(lambda z: call(z, labels))(z), each)
    close(z, torch.stack(expected))
    with pytest.raises(RuntimeError, match=f"palu::{op} under torch.func.vmap: logits would be overwritten"):
        vmap(lambda labels: call(z[0], labels))(labels.expand(BATCH, -1))


@pytest.mark.parametrize("op", ["topk_mse", "gather", "dense"])
def test_batched_gradients_are_refused(op: str) -> None:
    function, leaves = losses(palu, op, "global_mean")
    leaves = tuple(t.requires_grad_() for t in leaves)
    with pytest.raises(RuntimeError, match=r"palu::\w*topk_mse: is_grads_batched=True is not supported; take"):
        torch.autograd.grad(function(*leaves), leaves, torch.eye(ROWS, dtype=torch.float64), is_grads_batched=True)


@OPS
@pytest.mark.parametrize("target", TARGETS)
def test_second_derivatives_raise(op: str, target: str | float) -> None:
    function, leaves = losses(palu, op, target)
    first, others = leaves[0], leaves[1:]

    def total(x: Tensor) -> Tensor:
        return function(x, *others).sum()

    def directional(x: Tensor) -> Tensor:
        return jvp(total, (x,), (torch.ones_like(x),))[1]

    for second in (
        lambda: grad(lambda x: grad(total)(x).sum())(first),
        lambda: hessian(total)(first),
        lambda: jvp(grad(total), (first,), (first,)),
        lambda: grad(directional)(first),
    ):
        with pytest.raises(RuntimeError, match=r"palu::\w+ has first derivatives only; for a second, use"):
            second()


def test_compiled(device: torch.device) -> None:
    """torch.compile traces the transforms, too."""
    function, leaves = losses(palu, "gather", "global_mean")
    tangents = tuple(map(torch.randn_like, leaves))

    def both(*leaves: Tensor) -> tuple[Any, ...]:
        return jvp(function, leaves, tangents)[1], *grad(lambda *args: function(*args).sum(), (0, 1, 2))(*leaves)

    close(torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves), both(*leaves))


def test_fused_linear_losses_say_what_they_cannot() -> None:
    head = Head(leaf(VOCAB, HIDDEN), None)
    terms = (CrossEntropyTerm(torch.zeros(ROWS, dtype=torch.int64)),)
    weight = torch.ones(ROWS, dtype=torch.float64)

    def total(hidden: Tensor) -> Tensor:
        return fused_linear_losses(hidden, head, terms, weight, chunk_bytes=2**20)[0]

    hidden = leaf(ROWS, HIDDEN)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return total(forward_ad.make_dual(hidden, hidden))

    for call in (lambda: jvp(total, (hidden,), (hidden,)), lambda: grad(total)(hidden), dual):
        with pytest.raises(RuntimeError, match="fused_linear_losses has first derivatives in reverse mode only"):
            call()
    x = hidden.requires_grad_()
    with pytest.raises(RuntimeError, match=r"palu::scale_: is_grads_batched=True is not supported"):
        torch.autograd.grad(total(x), x, torch.ones(2, dtype=torch.float64), is_grads_batched=True)
