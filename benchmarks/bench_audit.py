"""What attackers get out of unlearned models: the audit of PALU, as published, too, NPO and TPO on TOFU.

    python benchmarks/bench_audit.py --preset tiny                     # CPU; hours

The models are those of bench_tofu.py with the same --preset and --output: the original, taught all rows, the retain
model, taught all but the forget set, and the original unlearned by each method with --learning-rate and the preset's
first seed. Each is audited (--quick, 8 draws), its weights in bfloat16 where the device multiplies that fast, as such
models are served. Under the attacks stand the shares of broken words in the greedy answers. Finished models and
attacks are kept in --output, with what each model wrote: the same command goes on where it stopped. Writes
audit_<preset>.json and .md to --results.
"""

from __future__ import annotations

from typing import Any

import torch
from _measure import markdown_table
from _methods import LABELS, named
from _models import Row
from _tofu import Bench, parse, parser_of, rate_text, read_rate, write

from palu.evaluate.language import WordList, keys, measure
from palu.models.generation import Generation
from palu.testbed.smollm2 import mixed_precision

KNOWN = ("original", "retain")
DTYPE = torch.bfloat16 if mixed_precision() == "bf16" else torch.float32  # in which models are served
AUDITED = "palu,npo,tpo,palu-paper"
LANGUAGE = {"no_word": "broken words", "unknown_name": "names found nowhere"}
SHOWN = {"held": "held", "open": "**open**", "undecided": "?"}


def language(audit: dict[str, Any], forget: list[Row]) -> dict[str, dict[str, float]]:
    """Compute the shares of broken words, and of unknown names, in each model's greedy answers."""
    true = {row["question"]: row["answer"] for row in forget}
    questions = [secret["question"] for secret in audit["secrets"]]
    greedy = next(row for row in audit["attacks"] if row["name"] == "ask: greedy")["models"]
    words, shares = WordList(), {}
    for role, of_model in greedy.items():
        answers = dict(zip(questions, of_model["evidence"], strict=True))  # several secrets have one question
        measured = []
        for question, answer in answers.items():
            # Some end in the middle of a word; which, the audit does not say.
            measured.append(measure(Generation(answer, cut_off=True), keys(question, true[question]), words))
        count = sum(one["no_word"]["words"] for one in measured)
        shares[role] = {name: sum(len(one[name]["found"]) for one in measured) / count for name in LANGUAGE}
    return shares


def shortened(audit: dict[str, Any]) -> dict[str, Any]:
    """Reduce an audit to the share of secrets that each model tells, rho with its interval, and the verdict."""
    rows = {
        row["name"]: {
            "secrets": row.get("secrets", 0),
            **{role: one["told"] for role, one in row["models"].items()},
            "rho": [row["rho"][bound] for bound in ("value", "low", "high")],
            "verdict": row["verdict"],
        }
        for row in audit["attacks"]
    }
    return {"models": audit["models"], "secrets": len(audit["secrets"]), "attacks": rows}


def markdown(results: dict[str, dict[str, Any]], languages: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format a table: a row an attack, the share of secrets told by each model, and the verdict on it."""
    columns = ["attack (share of secrets told)", *KNOWN, *(LABELS.get(name, name) for name in results)]
    secrets = len(next(iter(results.values()))["secrets"])
    table = []
    for rows in zip(*(one["attacks"] for one in results.values()), strict=True):
        first = rows[0]
        count = first.get("secrets", 0)
        cells = [""] * (len(columns) - 1)
        if first["models"]:
            cells = [f"{first['models'][role]['told']:.2f}" for role in KNOWN]
            cells += [f"{row['models']['unlearned']['told']:.2f} {SHOWN[row['verdict']]}" for row in rows]
        table.append([first["name"] + (f" (of {count})" if count < secrets else ""), *cells])
    first = next(iter(languages.values()))
    for name, told in LANGUAGE.items():
        shares = [*(first[role][name] for role in KNOWN), *(one["unlearned"][name] for one in languages.values())]
        table.append([f"*{told}, in the greedy answers*", *(f"{share:.3f}" for share in shares)])
    return markdown_table(columns, table)


def main() -> None:
    parser = parser_of(str(__doc__))
    parser.add_argument("--methods", type=named, default=AUDITED, help=f"as of bench_tofu.py; default: {AUDITED}")
    parser.add_argument("--learning-rate", type=read_rate, help="default: own, as of bench_tofu.py")
    arguments = parse(parser)
    bench = Bench(arguments)
    rate, seed = arguments.learning_rate, bench.preset.seeds[0]
    results = {method: bench.audited(method, rate, seed, dtype=DTYPE) for method in arguments.methods}
    languages = {method: language(one, bench.data.forget) for method, one in results.items()}
    dtype = str(DTYPE).removeprefix("torch.")
    details = {
        "dtype": dtype,
        "learning_rate": rate_text(rate),
        "language": languages,
        "audits": {name: shortened(one) for name, one in results.items()},
    }
    write(arguments, "audit", markdown(results, languages), details)


if __name__ == "__main__":
    main()
