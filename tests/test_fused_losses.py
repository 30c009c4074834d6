"""`fused_linear_losses` against plain autograd with all logits at once."""

import functools
import random
from dataclasses import replace

import pytest
import torch
from helpers.loss_cases import TARGETS, Case, assert_near, make, textbook, textbook_logits, textbook_losses
from helpers.peak import peak_bytes
from torch import Tensor

from palu import eager, losses
from palu.eager import softcap_
from palu.models import head
from palu.models.head import Head

# (scale, softcap); logits are near 3 * scale
HEADS = [(1.0, None), (0.0625, None), (0.3, None), (1.0, 3.0), (0.3, 2.0), (8.0, 30.0)]
CPU = torch.device("cpu")


@pytest.fixture(params=["gather", "dense"])
def impl(request: pytest.FixtureRequest) -> str:
    """Both ways to the logits of onset rows, whichever is faster here."""
    return request.param


@pytest.mark.parametrize("trial", range(40))
def test_random_cases_equal_autograd(device: torch.device, impl: str, trial: int) -> None:
    """Terms of any length or none, heads with a scale or a cap, chunks of any size; a gradient only where asked for."""
    rng = random.Random(trial)
    torch.manual_seed(trial)
    case = make(
        device,
        [rng.choice([0, rng.randint(1, 9)]) for _ in range(3)],
        vocab=rng.randint(2, 60),
        hidden_size=rng.randint(1, 20),
        top_k=rng.randint(1, 20),
        target=rng.choice([*TARGETS, "unlikelihood"]),
        reverse=rng.random() < 0.5,
        bias=rng.random() < 0.5,
        trainable=[rng.random() < 0.7 for _ in range(3)],
        impl=impl,
        head=rng.choice(HEADS),
        ref_head=(rng.choice([1.0, 0.5]), rng.choice([None, 3.0])),
        floor=rng.choice([0.0, 0.1]),
    )
    kept = rng.randint(1, 3)
    rows = sum(len(term) for term in case.terms[:kept])
    hidden = case.hidden.detach()[:rows].requires_grad_(case.hidden.requires_grad)
    case = replace(case, terms=case.terms[:kept], hidden=hidden, row_weight=case.row_weight[:rows])
    rows_per_chunk, factor = rng.randint(0, 30), rng.choice([1.0, 3.0, -0.25, 0.0])
    plain = case.to(torch.float64)
    for ours, theirs in zip(case.run(rows_per_chunk, factor), textbook(plain, factor=factor), strict=True):
        assert_near(ours, theirs, 1e-12)
    for ours, theirs in zip(case.leaves, plain.leaves, strict=True):
        if ours is not None:
            assert_near(ours.grad, theirs.grad, 1e-12)


def test_no_terms_at_all(device: torch.device) -> None:
    total, losses = replace(make(device, (0, 0, 0)), terms=()).run()
    assert total == 0 and len(losses) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_per_chunk", [1, 10**6])
@pytest.mark.parametrize(("scale", "softcap"), HEADS)
def test_low_precision_loses_no_more_than_torch(
    device: torch.device, impl: str, dtype: torch.dtype, rows_per_chunk: int, scale: float, softcap: float | None
) -> None:
    heads = {"head": (scale, softcap), "ref_head": (scale, softcap)}
    for reverse, target in ((False, "global_mean"), (True, "unlikelihood")):
        case = make(device, (20, 24, 28), 211, 16, 30, dtype=dtype, impl=impl, target=target, reverse=reverse, **heads)
        truth, plain = case.to(torch.float64), case.to(dtype)
        results = case.run(rows_per_chunk), textbook(plain, rows_per_chunk), textbook(truth)
        gradients = [[leaf.grad for leaf in c.leaves if leaf is not None] for c in (case, plain, truth)]
        together = ([*result, *of] for result, of in zip(results, gradients, strict=True))
        for ours, theirs, true in zip(*together, strict=True):
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
    assert slope is not None and slope.shape == logits.shape
    exact = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(eager.acc_dtype(dtype)).eps
    assert ((logits - 30 * t).abs() <= exact * (30 * t).abs()).all()
    # 1 - t^2 itself cancels near the cap, in float32 as in torch's own.
    assert ((slope - (1 - t * t)).abs() <= exact * (1 - t * t) + 4 * torch.finfo(eager.acc_dtype(dtype)).eps).all()


def test_gathering_is_refused_for_a_capped_head(device: torch.device) -> None:
    case = make(device, head=(1.0, 2.0))
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


def test_gradient_flows_into_a_larger_graph(device: torch.device) -> None:
    """Tied embeddings, accumulation: the head's weight has other gradients too."""
    case = make(device)
    plain = case.to(torch.float64)

    def doubled(of: Case) -> Case:
        return replace(of, hidden=2 * of.hidden, head=of.head._replace(weight=3 * of.head.weight))

    for _ in range(2):
        (doubled(case).losses(0)[0] + case.head.weight.square().sum()).backward()
        ((plain.row_weight * textbook_losses(doubled(plain))).sum() + plain.head.weight.square().sum()).backward()
    for ours, theirs in zip(case.leaves, plain.leaves, strict=True):
        assert_near(ours.grad, theirs.grad, 1e-12)


def test_no_gradient_is_formed_under_no_grad(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    with torch.no_grad():
        assert not case.losses()[0].requires_grad


def test_a_second_backward_or_derivative_is_refused(device: torch.device, impl: str) -> None:
    case = make(device, impl=impl)
    total, _ = case.losses(0)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"fused_linear_losses were already used: call it again"):
        total.backward()
    for function in (torch.square, torch.clone):  # with a history of the incoming gradient, and without
        with pytest.raises(RuntimeError, match=r"fused_linear_losses has first derivatives only.*; use .*palu\.eager"):
            torch.autograd.grad(function(case.losses(0)[0]), case.hidden, create_graph=True)


def test_inputs_in_any_layout_are_left_as_they_were(device: torch.device, impl: str) -> None:
    """Slices of larger tensors and transposed ones; what lies around them is NaN and must not be read."""
    case = make(device, impl=impl)

    def transposed(t: Tensor) -> Tensor:
        whole = torch.full([size + 4 for size in t.shape[::-1]], float("nan"), dtype=t.dtype, device=device)
        part = whole[tuple(slice(2, 2 + size) for size in t.shape[::-1])].permute(*range(t.dim() - 1, -1, -1))
        return part.copy_(t.detach())

    def dense(t: Tensor) -> Tensor:
        return t.detach().t().contiguous().t()

    expected, (local, kl, _) = textbook(case), case.terms
    for layout in (transposed, dense):
        hidden, weight = (layout(t).requires_grad_() for t in (case.hidden, case.head.weight))
        head = Head(weight, transposed(case.head.bias).requires_grad_())
        placed = replace(case, hidden=hidden, head=head, row_weight=transposed(case.row_weight))
        tensors = [*placed.leaves, placed.row_weight, local.index, *kl.head[:2], kl.hidden]
        before = [t.detach().clone() for t in tensors]
        for ours, theirs in zip(placed.run(5), expected, strict=True):
            assert_near(ours, theirs, 1e-12)
        assert all(map(torch.equal, tensors, before))
        for ours, theirs in zip(placed.leaves, case.leaves, strict=True):
            assert_near(ours.grad, theirs.grad, 1e-12)


def test_a_known_mean_row_is_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(device, bias=False, impl="gather")
    mean = case.head.weight.detach().mean(0)
    expected, _ = case.losses(0)
    monkeypatch.setattr(losses, "needed_mean", lambda weight, given, name: given)
    assert case.losses(0, weight_mean=mean)[0] == expected
    with pytest.raises(ValueError, match="weight_mean"):
        case.losses(0)


def test_autocast(device: torch.device, impl: str) -> None:
    """float32 hidden states and head, bfloat16 products: no worse than torch's own autocast."""
    case = make(device, (20, 24, 28), vocab=211, hidden_size=16, top_k=30, dtype=torch.float32, impl=impl)
    truth, plain = case.to(torch.float64), case.to(torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        case.run(rows_per_chunk=32)
        textbook(plain)
    textbook(truth)
    for ours, theirs, true in zip(case.leaves, plain.leaves, truth.leaves, strict=True):
        assert ours.grad.dtype == torch.float32
        lost, torch_lost = ((x.grad.double() - true.grad).norm() for x in (ours, theirs))
        assert lost <= 1.5 * torch_lost + 4 * torch.finfo(torch.bfloat16).eps * true.grad.norm()
        assert lost > 1e-5 * true.grad.norm(), "autocast had no effect"


# --- Memory ---
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_memory_is_bounded_by_the_chunk(device: torch.device, impl: str, reverse: bool) -> None:
    sizes = {"vocab": 4096, "hidden_size": 16, "top_k": 50, "dtype": torch.float32, "bias": False}
    case = make(device, (64, 256, 256), **sizes, reverse=reverse, impl=impl)
    case.run()  # what is allocated once, such as cuBLAS's workspace
    case.head.weight.grad = case.hidden.grad = None
    row, gradients = case.row_bytes(), 4 * (case.head.weight.numel() + case.hidden.numel())
    chunk = 16 * row
    peak = peak_bytes(device, functools.partial(case.run, 16))
    # The logits, the CPU's two copies for the KL, each no larger than half a chunk, and small change.
    assert gradients + row < peak < gradients + 2 * chunk + 2**18
    whole = peak_bytes(device, case.run)
    assert whole > gradients + 512 * row > gradients + 2 * chunk + 2**18, "the bound would hold without chunks"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(0, 0, 512), (512, 0, 0), (0, 512, 0)], ids=["retain", "local", "kl"])
def test_memory_of_a_capped_head_is_bounded_by_the_chunk(
    device: torch.device, dtype: torch.dtype, rows: tuple[int, int, int]
) -> None:
    """Slopes and float32 values count, so that it holds no more than a head without a cap."""
    peaks = []
    for softcap in (None, 2.0):
        sizes = {"vocab": 4096, "hidden_size": 16, "dtype": dtype, "bias": False, "trainable": (True, False, False)}
        case = make(device, rows, **sizes, impl="dense", head=(1.0, softcap), ref_head=(1.0, softcap))
        case.run()
        case.hidden.grad = None
        peaks.append(peak_bytes(device, functools.partial(case.run, 64)))
    assert 32 * case.row_bytes() < peaks[1] <= peaks[0] + 2**14, peaks


@pytest.mark.parametrize(
    ("dtype", "others", "rows_per_chunk", "per_weight"),
    [
        (torch.bfloat16, 600, 16, 6),
        (torch.bfloat16, 24, 1, 2),  # all rows take no more than the float32 sum would
        (torch.bfloat16, 24, 10**6, 2),
        (torch.float32, 24, 1, 4),
        (torch.float32, 24, 10**6, 4),
    ],
    ids=str,
)
def test_memory_of_a_heads_gradient(
    device: torch.device, dtype: torch.dtype, others: int, rows_per_chunk: int, per_weight: int
) -> None:
    """No copy; in bfloat16, where there are several chunks, the sum in float32 beside it, as the docstring says."""
    case = make(device, (8, 0, others), vocab=8192, hidden_size=256, dtype=dtype, bias=False, impl="dense")
    case.run(rows_per_chunk)
    case.head.weight.grad = case.hidden.grad = None
    gradient = per_weight * case.head.weight.numel()
    peak = peak_bytes(device, functools.partial(case.run, rows_per_chunk))
    assert gradient <= peak < gradient + 3 * 2**20  # a copy would have 4 MiB or more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_any_vocabulary_begin_at_16_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: here the CPU is taken for one. The losses and gradients are those of rows without a gap."""
    seen: list[Tensor] = []

    def watched(name: str) -> None:
        op = getattr(losses, name)
        monkeypatch.setattr(
            losses, name, lambda logits, *given: (seen.extend([logits, *given[:1]]), op(logits, *given))[1]
        )

    torch.manual_seed(0)
    plain = make(CPU, (6, 5, 7), vocab=211, dtype=dtype, impl="dense")
    expected = [*plain.run(10), *(leaf.grad for leaf in plain.leaves if leaf is not None)]
    monkeypatch.setattr(head, "ALIGNED", ("cpu",))
    watched("kl_div_")
    watched("cross_entropy_")
    torch.manual_seed(0)
    case = make(CPU, (6, 5, 7), vocab=211, dtype=dtype, impl="dense")
    found = [*case.run(10), *(leaf.grad for leaf in case.leaves if leaf is not None)]
    logits = [t for t in seen if t.dim() == 2]
    assert len(logits) >= 3
    for t in logits:
        assert t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        assert t.shape[1] == 211 and t.stride(0) < 211 + 16
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
