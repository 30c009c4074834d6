"""Time and memory of a training step: palu against the published formulation, on random weights of the true shape.

    python benchmarks/bench_step.py --model llama-3.1-8b
    python benchmarks/bench_step.py --model llama-3.2-1b --loss paper --impl palu,published --no-checkpointing
    python benchmarks/bench_step.py --model tiny --loss paper --check

Candidates (--impl; forward and backward pass, gradients freed, no optimizer step):

    palu            what palu.unlearn does: load a batch, copy it to the device, packed body, losses from hidden states
    published       three padded passes with full logits (benchmarks/_published.py)
    body            the packed body alone with a random gradient at its end: no step can be faster
    loss-palu       head and losses alone, from given hidden states
    loss-published  the same of the published formulation

All candidates see the same examples, in turns: palu by its default loss, which keeps the retain examples by the KL, or
by the paper's (`--loss`). `peak_gib` is the peak of allocated memory (CUDA) with
nothing alive that the candidate does not need: palu and body are measured before the reference model
exists. `extra_gib` is what a loss section adds to its inputs, the head's gradient left out. `floor_ms` (CUDA) is the
least time of what palu's parts move and multiply (gpu_budget.py). A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from _candidates import CANDIDATES, Run, Setup, prepare
from _measure import interleaved, report, synchronize
from _workload import MODELS
from gpu_budget import budget
from gpu_budget import rows as budget_rows
from torch import Tensor

from palu.models.attention import use_packed_attention
from palu.models.head import head_of
from palu.ops.gpu import gpu_at

GIB = 2**30


def check(arguments: argparse.Namespace) -> dict[str, float]:
    """Compare the two formulations: relative differences of the loss, and of the worst parameter's gradient."""
    setup = prepare(arguments, perturbed=True)

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad for name, p in setup.model.named_parameters() if p.grad is not None}
        setup.model.zero_grad(set_to_none=True)
        return found

    with use_packed_attention(setup.model):
        palu_total = setup.palu_step(setup.loaders[0])
    palu_grads = gradients()
    total, grads = setup.published_step(setup.padded[0]), gradients()
    if palu_grads.keys() != grads.keys():
        raise AssertionError(f"gradients of different parameters: {palu_grads.keys() ^ grads.keys()}")
    errors = [((palu_grads[name] - grads[name]).norm() / grads[name].norm()).item() for name in grads]
    return {"loss": abs(palu_total / total - 1).item(), "gradient": max(errors)}


def peak_bytes(run: Run, times: int, device: torch.device) -> tuple[int, int] | None:
    """Measure the memory allocated before some runs and at their peak; None on a CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(times):
        run()
    synchronize(device)
    return before, torch.cuda.max_memory_allocated(device)


def floors(setup: Setup) -> dict[str, float]:
    """Compute the least time of palu's candidates, in ms, mean of the batches; none on a CPU."""
    if setup.device.type != "cuda":
        return {}
    gpu, dtype, found = gpu_at(setup.device), head_of(setup.model).weight.dtype, []
    for loader in setup.loaders:
        [[batch]] = loader
        tensors = [
            batch.packed.input_ids,
            batch.packed.position_ids,
            batch.rows,
            batch.labels,
            *batch.reference.values(),
        ]
        copied = sum(tensor.nbytes for tensor in tensors)
        parts = budget(setup.model, batch.packed.tokens, batch.counts, copied, dtype)
        found.append({row["part"]: row["floor_ms"] for row in budget_rows(parts, gpu, dtype)})
    mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    section = mean["head: products"] + mean["head: reference of the KL"] + mean["losses"]
    whole = mean["copies from the host"] + mean["body"] + section
    return {name: round(ms, 3) for name, ms in (("body", mean["body"]), ("loss-palu", section), ("palu", whole))}


def measure(arguments: argparse.Namespace) -> None:
    """Time the candidates in turns, take their peaks of memory, and report both."""
    setup = prepare(arguments)
    device, weight = setup.device, head_of(setup.model).weight
    candidates: dict[str, Run] = {}
    peaks: dict[str, tuple[int, int] | None] = {}

    def next_run(turns: Iterator[Run]) -> None:
        next(turns)()
        setup.model.zero_grad(set_to_none=True)

    with use_packed_attention(setup.model):
        for name, make in CANDIDATES.items():  # in this order, so that each finds only what it needs in memory
            if name in arguments.impl:
                candidates[name] = partial(next_run, itertools.cycle(make(setup)))
                peaks[name] = peak_bytes(candidates[name], len(setup.loaders), device)
        times = interleaved(candidates, device, warmup=len(setup.loaders), repeats=arguments.repeats)

    rows: list[dict[str, Any]] = []
    least = floors(setup)
    for name in times:
        base = times.get("loss-palu" if name.startswith("loss") else "palu")
        row: dict[str, Any] = {"impl": name, **times[name]}
        row["ratio_to_palu"] = round(times[name]["median_ms"] / base["median_ms"], 2) if base else None
        row["floor_ms"] = least.get(name)
        row["peak_gib"] = row["extra_gib"] = None
        if (peak := peaks[name]) is not None:
            before, highest = peak
            if name.startswith("loss"):
                gradient = weight.nbytes if weight.requires_grad else 0
                row["extra_gib"] = round((highest - before - gradient) / GIB, 3)
            else:
                row["peak_gib"] = round(highest / GIB, 2)
        rows.append(row)
    details = {"arguments": vars(arguments), "transformers": version("transformers")}
    report("step", rows, device, details)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command's options."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="llama-3.2-1b")
    add("--impl", default=",".join(CANDIDATES), help="some of the candidates, separated by commas")
    add("--batch-size", type=int, default=8, help="forget examples")
    add("--retain-batch-size", type=int, default=None, help="default: --batch-size")
    add("--system", type=int, default=0, help="tokens of a system prompt, with which all examples begin")
    add("--loss", choices=("default", "paper"), default="default", help="of palu; the published one is the paper's")
    add("--top-k", type=int, default=5000, help="of the paper's loss")
    add("--n", type=int, default=3, help="of the paper's loss")
    add("--no-checkpointing", dest="checkpointing", action="store_false", help="of the published step")
    add("--frozen-head", action="store_true", help="with the embeddings, where they are tied")
    add("--batches", type=int, default=None, help="distinct batches; default: 4, on a CPU 2")
    add("--repeats", type=int, default=None, help="runs of each candidate; default: 20, on a CPU 4")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default=None, help="default: bfloat16, on a CPU float32, with --check float64")
    add("--seed", type=int, default=0)
    add("--check", action="store_true", help="compare loss and gradients instead of times")
    arguments = parser.parse_args(argv)
    on_cpu = torch.device(arguments.device).type == "cpu"
    arguments.impl = arguments.impl.split(",")
    if arguments.check and arguments.loss != "paper":
        parser.error("--check compares the paper's loss; give --loss paper")
    if unknown := set(arguments.impl) - set(CANDIDATES):
        parser.error(f"--impl: {', '.join(sorted(unknown))}: choose from {', '.join(CANDIDATES)}")
    default = "float64" if arguments.check else "float32" if on_cpu else "bfloat16"
    arguments.dtype = arguments.dtype or default
    arguments.batches = arguments.batches or (2 if on_cpu else 4)
    arguments.repeats = arguments.repeats or (4 if on_cpu else 20)
    return arguments


def main() -> None:
    arguments = parse()
    if not arguments.check:
        measure(arguments)
        return
    differences = check(arguments)
    tolerance = {"float64": 1e-9, "float32": 1e-3}.get(arguments.dtype, 0.1)
    print(f"relative differences, palu to published: {differences}, tolerance {tolerance}")
    if not max(differences.values()) < tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
