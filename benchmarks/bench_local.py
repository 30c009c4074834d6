"""Time of the local loss against K and n, forward and backward, from hidden states and a head that is trained.

    python benchmarks/bench_local.py --device cpu --plot benchmarks/results/local_cost.png

The rows are those of 8 forget examples of TOFU's lengths: the first n tokens of their spans. ``gather`` and ``dense``
are the two ways to their logits, ``auto`` the one that is taken (palu.ops.functional.use_gather); K = V is the whole
vocabulary. The candidates run in turns. A table, then one JSON line.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import DEVICE, interleaved, report
from _workload import MODELS, make_batches
from torch import Tensor

import palu
from palu.data.packing import forget_items
from palu.ops.functional import IMPLEMENTATIONS

CANDIDATES = (5, 20, 50, 200, 1000, 5000)
ONSETS = (1, 3, -1)  # -1: whole spans


def step(hidden: Tensor, weight: Tensor, index: Tensor, impl: str) -> None:
    """Run forward and backward."""
    loss = palu.linear_topk_unlikelihood(hidden, weight, index, impl=impl)
    torch.autograd.grad(loss.sum(), [hidden, weight])


def measure(model: str, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time every K and n."""
    vocab_size, width = MODELS[model]["vocab_size"], MODELS[model]["hidden_size"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    weight = (torch.randn(vocab_size, width, device=device, dtype=dtype) / width**0.5).requires_grad_()
    [(forget, _)] = make_batches(vocab_size, 1, 8, 0, 0)
    found = []
    for n in ONSETS:
        rows = int(forget_items(forget, n, vocab_size - 1).targets.sum())
        hidden = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
        for k in (*CANDIDATES, vocab_size - 1):
            index = torch.rand(rows, vocab_size, device=device).topk(k + 1).indices.int()
            runs = {impl: partial(step, hidden, weight, index, impl) for impl in IMPLEMENTATIONS}
            times = interleaved(runs, device, warmup=2, repeats=repeats, cold=True)
            row: dict[str, Any] = {"n": "all" if n == -1 else n, "rows": rows, "K": "V" if k == vocab_size - 1 else k}
            found.append(row | {f"{impl}_ms": of["median_ms"] for impl, of in times.items()})
    return found


def plot(found: list[dict[str, Any]], vocab_size: int, path: Path) -> None:
    """Draw the time that is taken, and that of the dense product, over K."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for number, n in enumerate(dict.fromkeys(row["n"] for row in found)):
        rows = [row for row in found if row["n"] == n]
        places = [vocab_size if row["K"] == "V" else row["K"] for row in rows]
        label = f"n = {n} ({rows[0]['rows']} rows)"
        axis.plot(places, [row["auto_ms"] for row in rows], "o-", color=f"C{number}", label=label)
        axis.plot(places, [row["dense_ms"] for row in rows], ":", color=f"C{number}")
    axis.set(xscale="log", yscale="log", xlabel="K", ylabel="ms, forward and backward")
    axis.set_title("The local loss; dotted: by the dense product")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m", help="whose head's shape")
    parser.add_argument("--device", type=torch.device, default=DEVICE)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--plot", type=Path, help="a file to draw them into")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = measure(arguments.model, arguments.device, arguments.repeats)
    if arguments.plot is not None:
        plot(found, MODELS[arguments.model]["vocab_size"], arguments.plot)
    report("local_cost", found, arguments.device, {"model": arguments.model})


if __name__ == "__main__":
    main()
