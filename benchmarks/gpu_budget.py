"""What a step must cost on a GPU: bytes, operations and least time of each of its parts, from the GPU's own figures.

    python benchmarks/gpu_budget.py --model llama-3.1-8b --gpu h100
    python benchmarks/gpu_budget.py --model llama-3.2-1b --frozen-head      # the GPU that is here, else an H100

Needs no GPU. The step has the default's loss, with every weight trained: bfloat16, packed examples of TOFU's lengths;
``forget`` examples with their onset and ordinary rows, and ``kept`` others, whose rows the KL takes. The floor of a
part is the longer of its bytes over the bandwidth and its operations over the peak of dense products (palu/ops/gpu.py,
which the choice of gather or dense reads, too). "expected" assumes BYTES_SHARE of the bandwidth and
PRODUCTS_SHARE of the peak, neither measured here. ``bench_step.py`` prints the floor beside what it measures.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
from _measure import report
from _workload import MODELS, make_batches, make_model

from palu.data.packing import Counts, forget_items, retain_items
from palu.methods.palu import PaluSettings
from palu.ops.gpu import A100, H100, Gpu, gpu_at

BYTES_SHARE = 0.78  # 2.6 of an H100's 3.35 TB/s
PRODUCTS_SHARE = 0.6  # of products of some hundred rows
HOST_LINK = 25e9  # bytes a second from pinned memory, PCIe 4
GPUS = {"h100": H100, "a100": A100}


class Part(NamedTuple):
    """A part of a step."""

    name: str
    bytes: float  # that device memory must move
    operations: float = 0.0  # of dense products
    launches: int | None = None  # of kernels, where they are ours

    def floor(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """Return the least time, in ms."""
        return 1e3 * max(self.bytes / gpu.bandwidth, self.operations / gpu.products(dtype))

    def expected(self, gpu: Gpu, dtype: torch.dtype) -> float:
        """Return the time at the usual shares of bandwidth and peak, in ms."""
        by_bytes = self.bytes / gpu.bandwidth / BYTES_SHARE
        return 1e3 * max(by_bytes, self.operations / gpu.products(dtype) / PRODUCTS_SHARE)


def body(model: torch.nn.Module, tokens: int, size: int) -> Part:
    """The body, forward and backward: each weight is read twice and its gradient written."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    return Part("body", 3 * size * weights, 6.0 * weights * tokens)


def losses(vocab_size: int, width: int, counts: Counts, size: int, *, trained: bool) -> list[Part]:
    """The head and the losses of all rows by one dense product, and the reference's product for the KL.

    Bytes of the logits: written by the product and read twice by those of the gradients, which are counted there;
    a loss reads and writes them once, and the KL reads the reference's, too. (What it looks at again is in the cache.)
    """
    rows, head = sum(counts[:3]), vocab_size * width * size
    logits = rows * vocab_size * size
    product = 2.0 * vocab_size * width
    products = 2 + trained
    of_losses = (counts.targets + 2 * counts.retain + 3 * counts.others) * vocab_size * size
    kernels = 2 * (counts.targets > 0) + (counts.others > 0) + (counts.retain > 0)
    return [
        Part("head: products", products * (head + logits), products * rows * product, products),
        Part("head: reference of the KL", head + counts.others * vocab_size * size, counts.others * product, 1),
        Part("losses", of_losses, 0.0, kernels),
    ]


def optimizer(model: torch.nn.Module, size: int) -> list[Part]:
    """The gradient's norm, and AdamW's step (csrc/adamw.h), into which clipping goes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    weights, a_weight = sum(p.numel() for p in trained), 22 if size == 2 else 28
    return [Part("gradient norm", size * weights), Part("AdamW", a_weight * weights, 0.0, len(trained))]


def budget(model: torch.nn.Module, tokens: int, counts: Counts, copied: int, dtype: torch.dtype) -> list[Part]:
    """List the parts of a step of a model, whose weights may be on the meta device."""
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    size = dtype.itemsize
    of_losses = losses(config.vocab_size, config.hidden_size, counts, size, trained=head.weight.requires_grad)
    return [
        Part("copies from the host", copied),
        body(model, tokens, size),
        *of_losses,
        *optimizer(model, size),
    ]


def rows(parts: list[Part], gpu: Gpu, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Make a table of parts, and a last line of the whole."""
    found: list[dict[str, Any]] = []
    for part in parts:
        of_link = 1e3 * part.bytes / HOST_LINK if part.name.startswith("copies") else None
        floor, expected = of_link or part.floor(gpu, dtype), of_link or part.expected(gpu, dtype)
        found.append(
            {
                "part": part.name,
                "gb": round(part.bytes / 1e9, 3),
                "tflop": round(part.operations / 1e12, 3),
                "launches": part.launches,
                "floor_ms": round(floor, 3),
                "expected_ms": round(expected, 3),
            }
        )
    sums = {name: round(sum(row[name] for row in found), 3) for name in ("gb", "tflop", "floor_ms", "expected_ms")}
    return [*found, {"part": "step", **sums}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--gpu", choices=GPUS, help="default: the one that is here, else an H100")
    parser.add_argument("--forget", type=int, default=8, help="examples a step")
    parser.add_argument("--kept", type=int, default=12, help="examples whose rows the KL takes")
    parser.add_argument("--frozen-head", action="store_true")
    arguments = parser.parse_args()
    here = torch.cuda.is_available() and arguments.gpu is None
    gpu = gpu_at(torch.device("cuda")) if here else GPUS[arguments.gpu or "h100"]
    dtype = torch.bfloat16
    model = make_model(arguments.model, torch.device("meta"), dtype)
    model.get_output_embeddings().weight.requires_grad_(not arguments.frozen_head)
    vocab_size, width = model.config.vocab_size, model.config.hidden_size
    [(forget, kept)] = make_batches(vocab_size, 1, arguments.forget, arguments.kept, 0)
    items, beside = forget_items(forget, -1, vocab_size - 1), retain_items(kept)
    targets, others = int(items.targets.sum()), int(items.others.sum() + beside.others.sum())
    tokens = int(items.tokens.sum() + beside.tokens.sum())
    counts = Counts(targets, others, 0, len(items) + len(beside))
    k = PaluSettings().top_k
    copied = 8 * 2 * tokens + 8 * (targets + others) + 4 * (1 + k) * targets + dtype.itemsize * width * others
    told = {"model": arguments.model, "gpu": gpu._asdict(), "balance_rows": round(gpu.balance(dtype))}
    told |= {"tokens": tokens, "onset_rows": targets, "kl_rows": others, "k": k}
    report("gpu_budget", rows(budget(model, tokens, counts, copied, dtype), gpu, dtype), torch.device("cpu"), told)


if __name__ == "__main__":
    main()
