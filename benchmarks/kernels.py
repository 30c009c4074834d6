"""Kernels against eager PyTorch: `python benchmarks/kernels.py [--device cuda] [--dtype bfloat16]`.

Every case runs the op and its plain-torch twin (palu/reference.py) in turns on the same inputs; the
ratio is twin over op. A table, then one JSON line.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _timing import interleaved, report
from torch import Tensor

import palu
from palu import ops, reference

Case = tuple[str, dict[str, Callable[[], object]]]


def without_grad(loss: Callable[[], Tensor]) -> Callable[[], object]:
    return torch.no_grad()(loss)


def forward_backward(loss: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss().sum(), inputs)


def topk_mse_cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    cases = []
    shapes = [(256, 32000, 1000)] if device.type == "cpu" else [(1024, 128256, k) for k in (50, 1000, 5000)]
    for rows, vocab_size, k in shapes:
        logits = torch.randn(rows, vocab_size, device=device, dtype=dtype, requires_grad=True)
        index = distinct(rows, vocab_size, k, device)
        both = {
            "palu": forward_backward(partial(palu.topk_mse, logits, index), [logits]),
            "eager": forward_backward(partial(reference.topk_mse, logits, index), [logits]),
        }
        cases.append((f"topk_mse [{rows}, {vocab_size}] K={k} forward+backward", both))
    return cases


def linear_topk_mse_cases(device: torch.device, dtype: torch.dtype, vocab_size: int) -> list[Case]:
    cases: list[Case] = []
    rows, d = 36, 2048
    hidden = torch.randn(rows, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, d, device=device, dtype=dtype) / d**0.5
    mean = ops.weight_mean(weight)
    for k in (1000, 5000):
        index = distinct(rows, vocab_size, k, device)
        shape = f"linear_topk_mse rows={rows} d={d} V={vocab_size} K={k}"

        frozen = partial(palu.linear_topk_mse, hidden, weight, index, weight_mean=mean)
        computed = partial(palu.linear_topk_mse, hidden, weight, index)
        eager = partial(reference.linear_topk_mse, hidden, weight, index)

        cases += [
            (f"{shape} forward", {"palu": without_grad(frozen), "eager": without_grad(eager)}),
            (
                f"{shape} forward, weight_mean computed",
                {"palu": without_grad(computed), "eager": without_grad(eager)},
            ),
            (
                f"{shape} forward+backward, frozen head",
                {
                    "palu": forward_backward(frozen, [hidden]),
                    "eager": forward_backward(eager, [hidden]),
                },
            ),
        ]
    return cases


def distinct(rows: int, vocab_size: int, k: int, device: torch.device) -> Tensor:
    """[rows, k] int32 indices, distinct within a row, as a top-k gives them."""
    return torch.rand(rows, vocab_size, device=device).topk(k).indices.int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--vocab-size", type=int, default=128256, help="of the linear cases")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float32" if device.type == "cpu" else "bfloat16"))

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, candidates in [
        *topk_mse_cases(device, dtype),
        *linear_topk_mse_cases(device, dtype, arguments.vocab_size),
    ]:
        times = interleaved(candidates, device, warmup=3, repeats=arguments.repeats)
        row: dict[str, Any] = {"case": name, "dtype": str(dtype).removeprefix("torch.")}
        for candidate, values in times.items():
            row |= {f"{candidate}_{key}": value for key, value in values.items()}
        row["ratio"] = round(times["eager"]["median_ms"] / times["palu"]["median_ms"], 1)
        rows.append(row)
    report("kernels", rows, device)


if __name__ == "__main__":
    main()
