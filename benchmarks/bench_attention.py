"""Attention of packed examples on a CPU: bfloat16 against float32, by the length of the examples.

Both passes of what palu's packed attention does, one causal call per example, with the heads of SmolLM2-135M. Under
autocast examples of up to FLOAT32_TOKENS tokens (palu/models/attention.py) attend in float32, by these figures.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from _timing import interleaved, report
from torch import Tensor

from palu.models.attention import packed_attention

HEADS, KV_HEADS, WIDTH = 9, 3, 64  # SmolLM2-135M's
SHAPES = ((11, 60), (8, 120), (8, 200), (4, 300), (4, 400), (4, 600))  # examples, tokens of the longest


def attend(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, lengths: tuple[int, ...]) -> None:
    """Run both passes; query, key, value: [1, heads, T, WIDTH], gradient: [1, T, HEADS, WIDTH]."""
    out, _ = packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=torch.tensor((0, *accumulate(lengths)), dtype=torch.int32),
        max_length_q=max(lengths),
        sequence_lengths=lengths,
    )
    torch.autograd.grad(out, (query, key, value), gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timings of each")
    arguments = parser.parse_args()
    rows = []
    for examples, longest in SHAPES:
        draw = random.Random(0)
        lengths = (longest, *(draw.randint(longest // 2, longest) for _ in range(examples - 1)))
        candidates: dict[str, Callable[[], object]] = {}
        for dtype in (torch.bfloat16, torch.float32):
            query, key, value = (
                torch.randn(1, heads, sum(lengths), WIDTH, dtype=dtype, requires_grad=True)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            gradient = torch.randn(1, sum(lengths), HEADS, WIDTH, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            candidates[name] = partial(attend, query, key, value, gradient, lengths)
        times = interleaved(candidates, torch.device("cpu"), warmup=2, repeats=arguments.repeats)
        medians = {f"{name}_ms": found["median_ms"] for name, found in times.items()}
        ratio = round(medians["bfloat16_ms"] / medians["float32_ms"], 2)
        rows.append({"examples": examples, "longest": longest, **medians, "ratio": ratio})
    report("attention", rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
