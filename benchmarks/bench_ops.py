"""Time of each native op against its plain-torch twin, and against the bandwidth of the memory.

    python benchmarks/bench_ops.py [--device cuda] [--dtype bfloat16]

Every case runs the op, its plain-torch twin (palu/eager.py) and, on CUDA, some twins under
`torch.compile`, in turns on the same inputs. `x_eager` and `x_compile` say how many times faster the op is. On CUDA the
cache holds nothing of the inputs when a call begins. On a CPU the last four cases are twins themselves.

The floor is the least traffic over the bandwidth of a copy measured in the same run; `x_floor` is the op's time over
it. With s bytes an element the least traffic is

    topk_mse, forward and backward       2 R V s + 2 R K (index + slope): logits read, their gradient written
    linear_topk_mse, forward             D d s: each of the D distinct rows of the head that are kept is read once
    the same, weight_mean computed       V d s: the head is read once
    the same and backward, frozen head   D d s: the gradient for hidden is formed while a row is in the cache
    (on CUDA)                            2 D d s: its backward pass gathers the rows again
    linear_topk_unlikelihood, forward    D d s, as above
    the same and backward, frozen head   2 D d s: what a row of the head adds is known when all logits are
    topk_unlikelihood, forward+backward  R V s: the gradient of the logits written
    cross_entropy_                       2 R V s: logits read, their gradient written
    kl_div_                              3 R V s: the reference's logits read, too
    adamw_                               22 bytes a weight in bfloat16, 28 in float32 (csrc/adamw.h)

and what is smaller by a factor of K (hidden, its gradient, losses) is left out. A table, then one JSON line.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from _measure import copy_bandwidth, interleaved, report
from torch import Tensor

import palu
from palu import eager, ops


class Case(NamedTuple):
    """One call, as each candidate makes it, and the least bytes that it must move."""

    name: str
    floor_bytes: int
    candidates: dict[str, Callable[[], object]]


without_grad = torch.no_grad()  # of a function: the forward pass alone


def with_its_twin(op: str, *given: Any) -> dict[str, Callable[[], object]]:
    """Return an op that has no backward pass, and its twin."""
    modules = {"palu": ops, "eager": eager}
    return {name: without_grad(partial(getattr(module, op), *given)) for name, module in modules.items()}


def forward_backward(loss: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Return the forward and backward pass."""
    return lambda: torch.autograd.grad(loss().sum(), inputs)


def topk_mse_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The local entropy loss from logits."""
    cases = []
    if device.type == "cpu":
        shapes = [(256, 32000, 1000)]
    else:
        shapes = [(rows, 128256, k) for rows in (1024, 36) for k in (50, 1000, 5000)]
    for rows, vocab_size, k in shapes:
        logits = torch.randn(rows, vocab_size, device=device, dtype=dtype, requires_grad=True)
        index = distinct(rows, vocab_size, k, device)
        candidates = {
            "palu": forward_backward(partial(palu.topk_mse, logits, index), [logits]),
            "eager": forward_backward(partial(eager.topk_mse, logits, index.long()), [logits]),
        }
        if device.type == "cuda":
            compiled = torch.compile(eager.topk_mse, dynamic=False)
            candidates["compile"] = forward_backward(partial(compiled, logits, index.long()), [logits])
        # The slope is float32, or float64 for float64 logits.
        small = 2 * rows * k * (index.element_size() + max(4, logits.element_size()))
        name = f"topk_mse [{rows}, {vocab_size}] K={k} forward+backward"
        cases.append(Case(name, 2 * logits.nbytes + small, candidates))
    return cases


def linear_cases(device: torch.device, dtype: torch.dtype, vocab_size: int) -> list[Case]:
    """The local losses from hidden states, without forming the logits."""
    cases = []
    rows, d = 36, 2048
    hidden = torch.randn(rows, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, d, device=device, dtype=dtype) / d**0.5
    mean = ops.weight_mean(weight)
    both = partial(forward_backward, inputs=[hidden])
    mse_passes = 1 if device.type == "cpu" else 2
    for op, k in (("mse", 1000), ("mse", 5000), ("unlikelihood", 50), ("unlikelihood", 1000)):
        index = distinct(rows, vocab_size, k, device)
        gathered = len(index.unique()) * d * weight.element_size()  # a row of the head is read once
        computed = partial(getattr(palu, f"linear_topk_{op}"), hidden, weight, index)
        twin = partial(getattr(eager, f"linear_topk_{op}"), hidden, weight, index.long())
        frozen = partial(computed, weight_mean=mean) if op == "mse" else computed
        passes = mse_passes if op == "mse" else 2
        runs: list[tuple[str, int, Callable[..., Callable[[], object]], Callable[[], Tensor]]] = [
            ("forward", gathered, without_grad, frozen),
            ("forward, weight_mean computed", weight.nbytes, without_grad, computed),
            ("forward+backward, frozen head", passes * gathered, both, frozen),
        ]
        for name, floor, run, call in runs if op == "mse" else runs[::2]:
            full_name = f"linear_topk_{op} rows={rows} d={d} V={vocab_size} K={k} {name}"
            cases.append(Case(full_name, floor, {"palu": run(call), "eager": run(twin)}))
    return cases


def step_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The kernels of the default's step, at the rows that one has, and its optimizer's."""
    (onset, others), vocab_size, weights = (
        ((50, 864), 128256, 2**26) if device.type == "cuda" else ((8, 32), 32000, 2**20)
    )
    logits = torch.randn(onset, vocab_size, device=device, dtype=dtype, requires_grad=True)
    index = distinct(onset, vocab_size, 51, device)
    both = partial(forward_backward, inputs=[logits])
    row_bytes = vocab_size * logits.element_size()
    found = {
        "palu": both(partial(palu.topk_unlikelihood, logits, index)),
        "eager": both(partial(eager.topk_unlikelihood, logits, index.long())),
    }
    cases = [Case(f"topk_unlikelihood [{onset}, {vocab_size}] K=51 forward+backward", onset * row_bytes, found)]
    z, reference = (torch.randn(others, vocab_size, device=device, dtype=dtype) for _ in range(2))
    acc = eager.acc_dtype(dtype)
    row_weight = torch.full((others,), 1e-3, device=device, dtype=acc)
    labels = torch.randint(0, vocab_size, (others,), device=device)
    for name, given, reads in (
        ("cross_entropy_", (labels, row_weight), 2),
        ("kl_div_", (reference, row_weight, True), 3),
    ):
        floor = reads * others * row_bytes
        cases.append(Case(f"{name} [{others}, {vocab_size}]", floor, with_its_twin(name, z, *given)))
    if dtype in (torch.float32, torch.bfloat16):
        half = dtype == torch.bfloat16
        of_dtype = [torch.randn(weights, device=device).to(dtype) for _ in range(3)]
        second, low = torch.rand(weights, device=device), torch.zeros_like(of_dtype[0]) if half else None
        calls = with_its_twin("adamw_", *of_dtype, second, low, None, 10, 1e-5, 0.0, 0.9, 0.999, 1e-8)
        cases.append(Case(f"adamw_ [{weights}]", (22 if half else 28) * weights, calls))
    return cases


def distinct(rows: int, vocab_size: int, k: int, device: torch.device) -> Tensor:
    """Draw int32 indices [rows, k], distinct within a row, as a top-k gives them."""
    return torch.rand(rows, vocab_size, device=device).topk(k).indices.int()


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vocab-size", type=int, default=128256, help="of the linear cases")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))

    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    of_logits, of_hidden = topk_mse_cases(device, dtype), linear_cases(device, dtype, arguments.vocab_size)
    for case in [*of_logits, *of_hidden, *step_cases(device, dtype)]:
        times = interleaved(case.candidates, device, warmup=3, repeats=arguments.repeats, cold_calls=10)
        row: dict[str, Any] = {"case": case.name, "dtype": str(dtype).removeprefix("torch.")}
        for candidate, values in times.items():
            row |= {f"{candidate}_{key}": value for key, value in values.items()}
        ours = times["palu"]["median_ms"]
        for other in list(case.candidates)[1:]:
            row[f"x_{other}"] = round(times[other]["median_ms"] / ours, 1)
        row["floor_ms"] = round(case.floor_bytes / bandwidth, 3)
        row["x_floor"] = round(ours / row["floor_ms"], 2)
        rows.append(row)
    report("kernels", rows, device, {"copy_gb_per_s": round(bandwidth / 1e6, 1)})


if __name__ == "__main__":
    main()
