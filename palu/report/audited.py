"""Say what an audit found: a row for each attack, and the secrets that it got, for the report, card and command."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from palu.attacks.estimators import LEVEL, LIMIT, Verdict
from palu.attacks.run import ROLES
from palu.data.matching import find, split_at, stands_in
from palu.report import words
from palu.report.plots import number
from palu.report.reading import Json

MEANING = (
    "rho is the part of the original’s leak that is left: 0 is as good as a model that never saw the secrets, 1 is no "
    f"better than before. Held: its {100 * LEVEL:.0f} % interval ends at {LIMIT:g} or below. Open: it begins above "
    f"{LIMIT:g}. Undecided: anything else."
)
HALF = 0.5  # of what an attack can get, where it reads neither an answer nor a probability
OTHER_MODEL = (
    "The audited model’s fingerprint is not the one that this run recorded. The audit may be of another model, older "
    "than the run, or of this model in another precision."
)


def rows(audit: Json) -> list[Json]:
    """Format each attack, and its place in a chart."""
    secrets, last, found = len(audit["secrets"]), None, []
    for row in audit["attacks"]:
        models, fewer = row["models"], row.get("secrets", secrets) < secrets
        # Rows of one attack share its budget; one that was not made spends none.
        budget = "" if row["attack"] == last or not models else row["budget"]
        reason = row.get("reason") or ""
        last = row["attack"]
        found.append(
            {
                "name": f"{row['name']} (of {row['secrets']})" if fewer else row["name"],
                "family": row["name"].partition(":")[0],
                "shares": {role: _share(models[role]) for role in ROLES if role in models},
                "rho": _rho(**row["rho"]),
                "verdict": row["verdict"],
                "reason": reason,
                "budget": budget,
                "remark": "; ".join(filter(None, (reason, budget))),
                "places": {role: _place(one["told"]) for role, one in models.items() if one.get("told") is not None},
                "interval": _interval(row),
            }
        )
    return found


def _share(of_model: Json) -> str:
    """Write the share of secrets told, where there is one, with the model's other figures."""
    figures = dict(of_model.get("figures", {}))
    unrounded = figures.pop("utility unrounded", None)
    others = [
        f"utility {value:.2f}, before {unrounded:.2f}"
        if name == "utility" and unrounded is not None
        else f"{name} {number(value)}"
        for name, value in figures.items()
    ]
    if of_model.get("told") is None:
        return ", ".join(others)
    return " ".join([f"{of_model['told']:.2f}", *(f"({other})" for other in others)])


def _rho(value: float | None, low: float | None, high: float | None) -> str:
    ends = " to ".join("..." if bound is None else f"{bound:.2f}" for bound in (low, high))
    return "" if value is None else f"{value:.2f} ({ends})"


def _place(share: float) -> str:
    """Write where a share lies on a scale from 0 to 1, in percent."""
    return f"{100 * min(max(share, 0.0), 1.0):.1f}"


def _interval(row: Json) -> list[str] | None:
    """Lay rho's interval between the shares of the retain model and of the original."""
    rho, models = row["rho"], row["models"]
    low, high = (models.get(role, {"told": 0.0}).get("told") for role in ("retain", "original"))
    if None in (rho["value"], low, high):
        return None
    ends = (-math.inf if rho["low"] is None else rho["low"], math.inf if rho["high"] is None else rho["high"])
    return [_place(low + end * (high - low)) for end in ends]


def summary(audit: Json, record: Json) -> Json:
    """Collect what report and model card show of an audit: nothing of the sets' texts, and no hash of theirs."""
    shown = rows(audit)
    named = {verdict: [row["name"] for row in shown if row["verdict"] == verdict] for verdict in get_args(Verdict)}
    fingerprint = audit["models"].get("unlearned", {}).get("fingerprint")
    return {
        "rows": shown,
        "roles": [role for role in ROLES if role in audit["models"]],
        "held": named["held"],
        "open": named["open"],
        "undecided": named["undecided"],
        "secrets": len(audit["secrets"]),
        "left_out": audit["left_out"],
        "quick": audit.get("quick", False),
        "notes": audit["notes"],
        "meaning": MEANING,
        "warning": OTHER_MODEL if fingerprint not in (None, record["hashes"]["weights_after"]) else "",
    }


# --- the secrets ---
def leaks(audit: Json, *, known: float, redact: bool) -> list[Json]:
    """List the secrets that the unlearned model told, those that most attacks got first.

    ``ways``: each answer that tells it, and the attacks that got it; where ``parts`` is None, those that saw no text.
    Where an attack reads no answer, it got a secret if its probability is at least ``known``, or the attack's value,
    of another kind, at least HALF.
    """
    found = []
    for i, secret in enumerate(audit["secrets"]):
        ways: dict[str | None, list[str]] = {}
        attacks = set()
        for row in audit["attacks"]:
            value = _value(row, "unlearned", i)
            # Of an attack's rows, the first that got it: the fewest draws, the shortest hint, or one format.
            if not value or row["attack"] in attacks:
                continue
            evidence = (row["models"]["unlearned"].get("evidence") or [None] * (i + 1))[i]
            answer = next((text for text in _texts(evidence) if stands_in(secret["text"], text)), None)
            if answer is None and value < (known if "log_probability" in (evidence or ()) else HALF):
                continue
            attacks.add(row["attack"])
            name = _name(row, evidence)
            if (retained := _value(row, "retain", i)) is not None and retained >= value:
                name += ", from the retain model, too"
            ways.setdefault(None if redact else answer, []).append(name)
        if ways:
            shown = [
                {"names": names, "parts": None if answer is None else marked(answer, secret["text"])}
                for answer, names in sorted(ways.items(), key=lambda way: way[0] is None)
            ]
            text = words.MASK if redact else secret["text"]
            found.append({"text": text, "question": secret["question"], "attacks": len(attacks), "ways": shown})
    return sorted(found, key=lambda leak: -leak["attacks"])


def _value(row: Json, role: str, i: int) -> float | None:
    values = row["models"].get(role, {}).get("values")
    return values[i] if values else None


def _texts(evidence: Any) -> Iterator[str]:
    """Yield what a model wrote."""
    if isinstance(evidence, str):
        yield evidence
    elif isinstance(evidence, list | dict):
        for one in evidence.values() if isinstance(evidence, dict) else evidence:
            yield from _texts(one)


def _name(row: Json, evidence: Any) -> str:
    """Name an attack with the numbers that it saw."""
    seen = {k: v for k, v in evidence.items() if isinstance(v, int | float)} if isinstance(evidence, dict) else {}
    if "told" in seen and "draws" in seen:
        return f"{row['attack']}: {seen['told']} of {words.count(int(seen['draws']), 'draw')}"
    if "log_probability" in seen:
        return f"{row['name']} (probability {words.probability(math.exp(seen['log_probability']))})"
    details = ", ".join(f"{name} {number(value)}" for name, value in seen.items())
    return f"{row['name']} ({details})" if details else row["name"]


def marked(text: str, *secrets: str) -> list[tuple[str, bool]]:
    """Split a text at secrets, as whole words where it has them so: (part, whether it is of a secret)."""
    spans = [list(find(one, text, whole=True)) or list(find(one, text, whole=False)) for one in secrets]
    return split_at(text, [span for of_secret in spans for span in of_secret])
