"""The public ops: onset mask, losses from logits or from hidden states, and a step of AdamW."""

import math
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from palu.eager import acc_dtype
from palu.ops.gpu import gpu_at
from palu.ops.library import CHECK, NATIVE_DEVICES, check_tensors, check_values
from palu.settings import TARGETS

_ops = torch.ops.palu

IMPLEMENTATIONS = ("auto", "gather", "dense")


def prefix_mask(labels: Tensor, n: int, eos_token_id: int | None = None) -> Tensor:
    """Mark the onset tokens: the first `n` of every sensitive span; True in the result [B, T], bool.

    A label is sensitive if it is a token id (not negative) other than `eos_token_id`; a span is a
    maximal run of neighbouring sensitive labels in a row (PALU, arXiv 2601.03190, temporal sparsity).

    Args:
        labels: [B, T] int64.
        n: tokens to mark per span; -1 marks all of them, 0 none.
        eos_token_id: a label that is never sensitive.

    Raises:
        TypeError: `labels` are not int64, or `n` or `eos_token_id` is no integer.
        ValueError: `labels` have not two dimensions, or `n` is below -1.
    """
    check_tensors("palu::prefix_mask", labels=labels)
    for name, value in (("n", n), ("eos_token_id", -1 if eos_token_id is None else eos_token_id)):
        if not isinstance(value, Integral) or not -(2**63) <= value < 2**63:
            raise TypeError(f"palu::prefix_mask: {name} must be one integer of 64 bits, got {value!r}")
    return _ops.prefix_mask(labels, n, eos_token_id)


def topk_mse(logits: Tensor, index: Tensor, target: str | float = "global_mean") -> Tensor:
    """Compute the local entropy loss: the mean squared distance of the kept logits from a common target.

    `loss[r] = (1/K) sum_k (logits[r, index[r, k]] - c[r])^2` (PALU, arXiv 2601.03190, L_local).

    Args:
        logits: [R, V] float32, float64, bfloat16, or (not on a CPU) float16; any strides.
        index: [R, K] int32 or int64, each in [0, V); one that occurs twice counts twice.
        target: what chooses c: "global_mean" (the row's mean over the vocabulary, gradient flows through it),
            "global_mean_detached", "local_mean" (the mean of the kept logits) or a number.

    Returns:
        [R], float64 for float64 logits and float32 otherwise; differentiable once, in reverse mode.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: shapes that do not fit, K = 0, V = 0, different devices, or an unknown target.
        IndexError: an index out of range (CPU; on CUDA a device-side assertion, unless PALU_CHECK=1 is in the
            environment: then each call waits for the GPU, and the error names the index).
    """
    check_tensors("palu::topk_mse", logits=logits, index=index)
    _check("palu::topk_mse", index, logits, 1)
    loss, _ = _ops.topk_mse(logits, index, *split_target(target))
    return loss


def linear_topk_mse(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    target: str | float = "global_mean",
    bias: Tensor | None = None,
    *,
    weight_mean: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute `topk_mse` of the logits `hidden @ weight.T + bias`, without forming them.

    Only the kept logits are computed. The mean over the vocabulary needs none:
    `mean_v z_v = hidden . weight.mean(0) + bias.mean()`.

    Under `torch.autocast` it casts hidden, weight and bias as `F.linear` does. That copies the whole head at each call:
    give it in autocast's dtype if it is frozen.

    Args:
        hidden: [R, d], of a dtype as `topk_mse`'s logits; weight: [V, d] and bias: [V], of the same dtype.
        index, target: as in `topk_mse`.
        weight_mean: [d], what `palu.ops.weight_mean(weight)` returns, computed here if not given. Pass
            it when the head is frozen, to save a pass over it. It must be the mean of `weight`:
            gradients through it go to `weight`, and none to this argument.
        impl: "gather" reads the K rows of `weight` that each row needs; "dense" forms the logits [R, V];
            "auto" takes the faster one (`palu.ops.functional.use_gather`).

    Returns and raises what `topk_mse` does; also for different dtypes and an unknown `impl`.
    """
    hidden, weight, bias = _as_linear("palu::linear_topk_mse", hidden, weight, index, bias, weight_mean)
    name, constant = split_target(target)
    if not _gathers(impl, hidden, weight, index):
        with torch.no_grad():  # the op's checks, on no rows: linear() would say less of what is wrong
            _ops.linear_topk_mse(hidden[:0], weight, index[:0], bias, weight_mean, "constant", 0.0)
        return topk_mse(F.linear(hidden, weight, bias), index, target)
    mean = needed_mean(weight, weight_mean, name)
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad
    op = _ops.linear_topk_mse_frozen if with_grad and frozen and has_frozen(hidden, name) else _ops.linear_topk_mse
    loss, _ = op(hidden, weight, index, bias, mean, name, constant)
    return loss


def topk_unlikelihood(logits: Tensor, index: Tensor, floor: float = 0.0) -> Tensor:
    """Compute the local unlikelihood: `-log(1 - p)` of the true token, with p its probability among the candidates.

    `p[r] = exp(z_y) / (exp(z_y) + sum of exp(z_i) over the candidates i)`, with z the logits of row r (arXiv 1908.04319
    within the vocabulary of arXiv 2601.03190). A row whose p is not above `floor` has the loss 0 and the gradient 0. So
    has a row without a candidate: there is nothing to which the true token's mass could go.

    Args:
        logits: as in `topk_mse`.
        index: [R, K] int32 or int64, each in [0, V), K > 1. Column 0 holds the true tokens y, the others the
            candidates, such as those that the reference ranks highest. A candidate that is the true token is left out;
            another one that occurs twice counts twice.
        floor: in [0, 1).

    Returns and raises what `topk_mse` does; also for K < 2, and for a `floor` out of range (ValueError) or that is no
    number (TypeError).
    """
    check_tensors("palu::topk_unlikelihood", logits=logits, index=index)
    _check("palu::topk_unlikelihood", index, logits, 1)
    loss, _ = _ops.topk_unlikelihood(logits, index, _floor("palu::topk_unlikelihood", floor))
    return loss


def linear_topk_unlikelihood(
    hidden: Tensor,
    weight: Tensor,
    index: Tensor,
    floor: float = 0.0,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute `topk_unlikelihood` of the logits `hidden @ weight.T + bias`: K dot products a row, instead of V.

    `index` and `floor`, result and errors are as in `topk_unlikelihood`; the rest, and what `torch.autocast` does, as
    in `linear_topk_mse`.
    """
    hidden, weight, bias = _as_linear("palu::linear_topk_unlikelihood", hidden, weight, index, bias)
    floor = _floor("palu::linear_topk_unlikelihood", floor)
    if not _gathers(impl, hidden, weight, index):
        with torch.no_grad():  # as in linear_topk_mse
            _ops.linear_topk_unlikelihood(hidden[:0], weight, index[:0], bias, floor)
        return topk_unlikelihood(F.linear(hidden, weight, bias), index, floor)
    loss, _ = _ops.linear_topk_unlikelihood(hidden, weight, index, bias, floor)
    return loss


def cross_entropy_(logits: Tensor, labels: Tensor, row_weight: Tensor) -> Tensor:
    """Compute the cross-entropy of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    `labels`: [R] int64. `row_weight` and the result: float64 for float64 logits, else float32.
    """
    _check("palu::cross_entropy_", labels, logits, 1, "labels")
    return _ops.cross_entropy_(logits, labels, row_weight)


def kl_div_(logits: Tensor, ref_logits: Tensor, row_weight: Tensor, reverse: bool) -> Tensor:
    """Compute the KL divergence of each row [R]; `logits` [R, V] become its gradient times `row_weight` [R].

    With P = softmax(logits) and Q = softmax(ref_logits): KL(Q || P), or with `reverse` KL(P || Q).
    `ref_logits`: [R, V], the dtype of `logits`. `row_weight` and the result: as in `cross_entropy_`.
    """
    return _ops.kl_div_(logits, ref_logits, row_weight, reverse)


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_bits: Tensor | None,
    clip_factor: Tensor | None,
    step: int,
    rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Take a step of AdamW (arXiv 1711.05101, algorithm 2) on one parameter, in place; the gradient is only read.

    Args:
        weight: float32 or bfloat16, contiguous. With `low_bits` it is the upper half of a float32 weight, rounded.
        grad, exp_avg: gradient and first moment, in the shape and dtype of `weight`.
        exp_avg_sq: float32, the second moment.
        low_bits: the lower halves of a bfloat16 `weight`, as int16 viewed as bfloat16; None for a float32 one.
        clip_factor: float32, one number on the device: what `grad` is multiplied by; None: nothing.
        step: the number of this step, from 1.
        rate, weight_decay, beta1, beta2, eps: the settings of AdamW; `rate` is the learning rate.
    """
    _ops.adamw_(weight, grad, exp_avg, exp_avg_sq, low_bits, clip_factor, step, rate, weight_decay, beta1, beta2, eps)


@torch.library.custom_op("palu::checked_labels", mutates_args=())
def checked_labels(labels: Tensor, vocab_size: int, sentinels: list[int]) -> Tensor:
    """Return a copy of labels [B, T] int64, each of which is a token id in [0, `vocab_size`) or one of the sentinels.

    Raises ValueError for another label; on CUDA it is a device-side assertion.
    """
    good = (labels >= 0) & (labels < vocab_size)
    for sentinel in sentinels:
        good |= labels == sentinel
    known = f"a token id below V = {vocab_size}, {' or '.join(map(str, sentinels))}"
    if labels.device.type == "cuda":
        torch._assert_async(good.all(), f"palu_loss: each label must be {known}")
    elif len(bad := (~good).nonzero()):
        row, token = bad[0].tolist()
        raise ValueError(f"palu_loss: labels[{row}, {token}] = {int(labels[row, token])}: a label must be {known}")
    return labels.clone()  # used, so that no compiler drops the check


checked_labels.register_fake(lambda labels, vocab_size, sentinels: torch.empty_like(labels))


def _as_linear(
    who: str, hidden: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check all tensors of a call, and cast those of the head as `F.linear` does under autocast."""
    given = {"hidden": hidden, "weight": weight, "index": index, "weight_mean": mean, "bias": bias}
    check_tensors(who, **{name: tensor for name, tensor in given.items() if tensor is not None})
    _check(who, index, weight, 0)
    return _autocast(hidden), _autocast(weight), None if bias is None else _autocast(bias)


def _check(who: str, index: Tensor, sized: Tensor, dim: int, name: str = "index") -> None:
    """With PALU_CHECK=1, look at the values of an index, or of labels, into a dimension of a matrix."""
    if CHECK and sized.dim() == 2:
        check_values(who, name, index, sized.shape[dim])


def _gathers(impl: str, hidden: Tensor, weight: Tensor, index: Tensor) -> bool:
    """Decide as `use_gather`; True, too, where the op is to report tensors of another rank."""
    return not hidden.dim() == index.dim() == weight.dim() == 2 or use_gather(impl, index, weight)


def weight_mean(weight: Tensor) -> Tensor:
    """Compute the mean row of a head, `weight.mean(0)`: [d] from [V, d], float64 for float64 and else float32."""
    return weight.detach().mean(0, dtype=acc_dtype(weight.dtype))


def needed_mean(weight: Tensor, mean: Tensor | None, target: str) -> Tensor | None:
    """Return the mean row that a target needs: the given one, or computed here."""
    return weight_mean(weight) if mean is None and target.startswith("global_mean") else mean


def use_gather(impl: str, index: Tensor, weight: Tensor, *, beside_dense: bool = False, trained: bool = True) -> bool:
    """Decide whether to gather the kept rows of the head (True) or to take the dense product (False).

    "auto" follows measurements on a CPU, where the dense product is bound by its arithmetic: with 2 cores both are even
    near R K = 5 V. On a GPU it compares the bytes of R K rows of the head with what the product takes: the bytes of
    the head, or more than :meth:`palu.ops.gpu.Gpu.balance` rows' operations. That is arithmetic, not yet measured.

    `index`: [R, K]; `weight`: [V, d], on its device and in the product's dtype. `beside_dense`: other rows go through a
    dense product anyway. On a GPU a few more cost their operations alone. `trained`: whether the head has a gradient,
    which would then have two parts.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl != "auto":
        return impl == "gather"
    (rows, k), vocab_size, kind = index.shape, weight.shape[0], weight.device.type
    if kind not in NATIVE_DEVICES:  # the twin of the gather forms all logits, too
        return False
    if kind == "cpu":
        return rows * k < 5 * vocab_size
    balance = gpu_at(weight.device).balance(weight.dtype)
    if beside_dense:
        return not trained and k < vocab_size / balance
    return rows * k < vocab_size * max(1, rows / balance)


def has_frozen(hidden: Tensor, target: str) -> bool:
    """Whether the gradient for hidden can be formed with the loss: its target is known first, and there is a kernel."""
    return hidden.device.type == "cpu" and "cpu" in NATIVE_DEVICES and target != "local_mean"


def _autocast(tensor: Tensor) -> Tensor:
    """Cast a tensor as torch's autocast casts what a matrix product takes: all floating dtypes but float64."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def split_target(target: str | float) -> tuple[str, float]:
    """Split a target into the ops' two arguments, its name and a constant; ValueError if it is no target."""
    if isinstance(target, str) and target in TARGETS:
        return target, 0.0
    if isinstance(target, bool) or not isinstance(target, Real) or not math.isfinite(target):
        raise ValueError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}, or a finite number")
    return "constant", float(target)


def _floor(who: str, floor: float) -> float:
    """Return a floor as the ops take it; TypeError if it is no number. They look at its range themselves."""
    if isinstance(floor, bool) or not isinstance(floor, Real):
        raise TypeError(f"{who}: floor must be a number in [0, 1), got {floor!r}")
    return float(floor)
