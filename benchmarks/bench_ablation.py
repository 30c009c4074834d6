"""Forgetting and utility on TOFU with one setting of PALU changed at a time, on the models and data of bench_tofu.py.

The variants of ONSET change the recipe "onset", the others the default.

    python benchmarks/bench_ablation.py --preset tiny
    python benchmarks/bench_ablation.py --preset full --data tofu --minutes 9 --variants "K=5000,N=1"

Stages are kept beside those of bench_tofu.py and resumed in the same way.
"""

from __future__ import annotations

from typing import Any

from _stages import resumable
from _tofu import Bench, markdown, mean_of, parser_of, prepare, summary, write

from palu.config import RECIPES

# Of the paper's local loss, on the first tokens of each span.
ONSET: dict[str, dict[str, Any]] = {
    "onset": {},
    "another seed": {"seed": 1},
    "a third seed": {"seed": 2},
    "no anchors": {"anchors": 0},
    "K=1": {"top_k": 1},
    "K=50": {"top_k": 50},
    "K=1000": {"top_k": 1000},
    "K=5000": {"top_k": 5000},
    "K=V": {"top_k": 10**9},
    "N=1": {"n": 1},
    "N=2": {"n": 2},
    "N=5": {"n": 5},
    "N=all": {"n": -1},
    "target detached": {"target": "global_mean_detached"},
    "target local mean": {"target": "local_mean"},
    "KL forward": {"kl_direction": "forward"},
    "KL times 2": {"lambda_kl": 2.0},
    "KL times 4": {"lambda_kl": 4.0},
    "not normalized": {"normalize": False},
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: RECIPES["onset"] | changed for name, changed in ONSET.items()},
    "default": {},
    "floor .1": {"probability_floor": 0.1},
    "floor .005": {"probability_floor": 0.005},
    "N=3": {"n": 3},
    "published loss": RECIPES["paper"],
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, separated by commas")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: the preset's last")
    arguments = parser.parse_args()
    variants = arguments.variants.split(",")
    if unknown := set(variants) - VARIANTS.keys():
        parser.error(f"--variants: {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")

    rows: list[dict[str, Any]] = []
    prepare(parser, arguments)
    with resumable():
        bench = Bench(arguments)
        rate = arguments.learning_rate or bench.preset.learning_rates[-1]
        for variant in variants:
            runs = []
            for seed in bench.preset.seeds:
                # The default is one of the table's own runs.
                name = "palu" if variant == "default" else variant.replace(" ", "-")
                settings = {"learning_rate": rate, "seed": seed} | VARIANTS[variant]
                results = bench.unlearned(f"{name}-lr{rate:g}-seed{seed}", **settings)
                runs.append(summary(results))
            rows.append({"method": variant, "learning_rate": rate} | mean_of(runs))
    rows = [summary(bench.original, method="original"), summary(bench.retain, method="retain"), *rows]
    write(arguments, "ablation", markdown(rows, bench.original["model_utility"]["agg_value"]), {"runs": rows})


if __name__ == "__main__":
    main()
