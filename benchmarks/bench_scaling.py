"""Time and memory of the loss section against K, N, V and the batch size: `python benchmarks/bench_scaling.py`.

Head and losses, forward and backward pass, from given hidden states: palu and the published formulation
on the same examples. One panel per quantity, the others at the base sizes. Writes scaling_<device>.png
and scaling_<device>.json to --output. Needs matplotlib.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _candidates import Run, palu_section, published_section, published_states, states
from _published import collate
from _timing import interleaved, report, write_json
from _workload import DATA, make_batches
from bench_step import GIB, peak_bytes

from palu.config import UnlearnConfig
from palu.data.packing import forget_items, retain_items
from palu.models.head import Head
from palu.ref_model.cache import ReferenceCache
from palu.training.dataloader import UnlearnDataLoader

LABELS = {
    "top_k": "K, logits per onset token",
    "n": "N, onset tokens per span",
    "vocab_size": "V, vocabulary",
    "batch_size": "forget (and retain) examples",
}
# On a GPU, the head of Llama-3.2-1B.
BASE = {
    "cuda": {"hidden_size": 2048, "vocab_size": 128256, "top_k": 5000, "n": 3, "batch_size": 8},
    "cpu": {"hidden_size": 256, "vocab_size": 16384, "top_k": 1000, "n": 3, "batch_size": 4},
}
SWEEPS: dict[str, dict[str, list[int]]] = {
    "cuda": {
        "top_k": [50, 500, 5000, 50000, 128256],
        "n": [1, 2, 3, 5, 10, -1],
        "vocab_size": [16384, 32768, 65536, 128256, 262144],
        "batch_size": [1, 2, 4, 8, 16, 32],
    },
    "cpu": {
        "top_k": [10, 100, 1000, 16384],
        "n": [1, 3, 10, -1],
        "vocab_size": [4096, 16384, 65536],
        "batch_size": [1, 4, 16],
    },
}


def sections(size: dict[str, int], data: Path, device: torch.device) -> tuple[dict[str, Run], int]:
    """Make both candidates on one batch of random hidden states; returns them, and the bytes of the head's gradient."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vocab_size, batch_size = size["vocab_size"], size["batch_size"]
    k = min(size["top_k"], vocab_size)
    config = UnlearnConfig(local_loss="topk_mse", n=size["n"], top_k=k, normalize=False, batch_size=batch_size)
    weight, ref_weight = (
        torch.randn(vocab_size, size["hidden_size"], device=device, dtype=dtype).mul_(0.02) for _ in range(2)
    )
    weight.requires_grad_()
    [[[forget, retain]], _] = make_batches(data, vocab_size, 1, batch_size, batch_size, seed=0)

    items = forget_items(forget, config.method.n, vocab_size - 1)
    cache = ReferenceCache(
        [
            {
                "index": torch.rand(item.targets, vocab_size).topk(config.method.top_k, sorted=False).indices.int(),
                "scale": torch.ones(item.targets),
                "hidden": states(len(item.rows) - item.targets, like=weight).detach().cpu(),
            }
            for item in items
        ]
    )
    [[batch]] = UnlearnDataLoader(items, retain_items(retain), cache, config)
    hidden = states(len(batch.rows), like=weight)
    padded = collate(forget).to(device), collate(retain).to(device)
    given = published_states(*padded, weight)
    candidates: dict[str, Run] = {
        "palu": partial(
            palu_section, hidden, Head(weight, None), Head(ref_weight, None), None, batch.to(device), config
        ),
        "published": partial(published_section, given, weight, ref_weight, *padded, config, vocab_size - 1),
    }
    return candidates, weight.nbytes


def plot(rows: list[dict[str, Any]], base: dict[str, int], title: str, path: Path) -> None:
    """Plot each measure against each swept size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = {"median_ms": "milliseconds", "extra_gib": "GiB beyond the head's gradient"}
    measures = {key: label for key, label in measures.items() if rows[0][key] is not None}
    figure, axes = plt.subplots(
        len(measures), len(LABELS), figsize=(14, 3.4 * len(measures)), sharey="row", squeeze=False
    )
    for line, (measure, unit) in zip(axes, measures.items(), strict=True):
        for axis, (swept, label) in zip(line, LABELS.items(), strict=True):
            for impl, colour, marker in (("palu", "#0072b2", "o"), ("published", "#d55e00", "s")):
                chosen = [row for row in rows if row["swept"] == swept and row["impl"] == impl]
                values = [row[swept] for row in chosen]
                x = list(range(len(values))) if swept == "n" else values  # N = -1 is the whole span
                axis.plot(x, [row[measure] for row in chosen], marker=marker, color=colour, label=impl)
                if measure == "median_ms":
                    low, high = [row["q1_ms"] for row in chosen], [row["q3_ms"] for row in chosen]
                    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
                if swept != "n":
                    axis.set_xscale("log")
                axis.set_xticks(x, ["all" if value == -1 else str(value) for value in values], minor=False)
                axis.set_xticks([], minor=True)
                axis.tick_params(axis="x", labelsize=8)
            axis.set_yscale("log")
            axis.set_xlabel(f"{label} (base {base[swept]})")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(unit)
    axes[0][0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=None, help="default: 15, on a CPU 3")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with forget05.jsonl and retain90.jsonl")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    repeats = arguments.repeats or (3 if device.type == "cpu" else 15)
    base = BASE[device.type]

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for swept, values in SWEEPS[device.type].items():
        for value in values:
            size = base | {swept: value}
            candidates, head_bytes = sections(size, arguments.data, device)
            times = interleaved(candidates, device, warmup=1 if device.type == "cpu" else 3, repeats=repeats)
            for impl, run in candidates.items():
                extra = None
                if (peak := peak_bytes([run], device)) is not None:
                    extra = round((peak[1] - peak[0] - head_bytes) / GIB, 4)
                rows.append({"swept": swept, "impl": impl, **size, **times[impl], "extra_gib": extra})

    record = report("scaling", rows, device, {"base": base})
    path = arguments.output / f"scaling_{device.type}"
    write_json(path.with_suffix(".json"), record)
    title = f"Loss section, forward and backward: {record['device_name']}, d = {base['hidden_size']}"
    plot(rows, base, title, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
