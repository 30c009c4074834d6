"""Say what an audit found: a row for each attack, and the secrets that it got, for the report, card and command."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from palu.attacks.estimators import LEVEL, LIMIT, Verdict
from palu.attacks.run import ROLES
from palu.data.matching import find, split_at, stands_in
from palu.report import words
from palu.report.plots import number
from palu.report.reading import Json
from palu.report.redact import MASK

MEANING = (
    "rho is the part of the original’s leak that is left: 0 is as good as a model that never saw the secrets, 1 is no "
    f"better than before. Held: its {100 * LEVEL:.0f} % interval ends at {LIMIT:g} or below. Open: it begins above "
    f"{LIMIT:g}. Not told: anything else."
)
HALF = 0.5  # of what an attack can get, where it reads neither an answer nor a probability
OTHER_MODEL = (
    "The audited model’s fingerprint is not the one that this run recorded. The audit may be of another model, older "
    "than the run, or of this model in another precision."
)


# --- the table ---
def rows(audit: Json, show: Callable[[float], str] = "{:.3g}".format) -> list[Json]:
    """Format each attack: {name, shares by role, rho, verdict, reason, budget, remark}, and its place in a chart.

    show: formats what is no share.
    """
    secrets, last, found = len(audit["secrets"]), None, []
    for row in audit["attacks"]:
        models, fewer = row["models"], row.get("secrets", secrets) < secrets
        told_by = {role: of["told"] for role, of in models.items() if of.get("told") is not None}
        # Rows of one attack share its budget; one that was not made spends none.
        budget = "" if row["attack"] == last or not models else row["budget"]
        last = row["attack"]
        reason = row.get("reason") or ""
        found.append(
            {
                "name": f"{row['name']} (of {row['secrets']})" if fewer else row["name"],
                "family": row["name"].partition(":")[0],
                "shares": {role: _share(models[role], show) for role in ROLES if role in models},
                "rho": _rho(row["rho"]),
                "verdict": row["verdict"],
                "reason": reason,
                "budget": budget,
                "remark": "; ".join(text for text in (reason, budget) if text),
                "places": {role: f"{100 * share:.1f}" for role, share in told_by.items()},
                "interval": _interval(row),
            }
        )
    return found


def _share(of_model: Json, show: Callable[[float], str]) -> str:
    """Write the share of secrets told, where there is one, with the model's other figures."""
    figures = of_model.get("figures", {})
    others = [
        f"utility {value:.2f}, before {figures['utility unrounded']:.2f}"
        if name == "utility" and "utility unrounded" in figures
        else f"{name} {show(value)}"
        for name, value in figures.items()
        if name != "utility unrounded"
    ]
    if of_model.get("told") is None:
        return ", ".join(others)
    return " ".join([f"{of_model['told']:.2f}", *(f"({other})" for other in others)])


def _rho(found: Mapping[str, float | None]) -> str:
    if found["value"] is None:
        return ""
    low, high = ("..." if bound is None else f"{bound:.2f}" for bound in (found["low"], found["high"]))
    return f"{found['value']:.2f} ({low} to {high})"


def _interval(row: Json) -> list[str] | None:
    """Lay rho's interval between the shares of the retain model and of the original, in percent of the scale."""
    found, models = row["rho"], row["models"]
    low, high = (models.get(role, {"told": 0.0}).get("told") for role in ("retain", "original"))
    if None in (found["value"], low, high):
        return None
    ends = (-math.inf if found["low"] is None else found["low"], math.inf if found["high"] is None else found["high"])
    return [f"{100 * min(max(low + end * (high - low), 0.0), 1.0):.1f}" for end in ends]


def summary(audit: Json, record: Json) -> Json:
    """Collect what report and model card show of an audit: nothing of the sets' texts, and no hash of theirs."""
    shown = rows(audit, number)
    by_verdict = {kind: [row["name"] for row in shown if row["verdict"] == kind] for kind in get_args(Verdict)}
    return {
        "rows": shown,
        "roles": [role for role in ROLES if role in audit["models"]],
        "held": by_verdict["held"],
        "open": by_verdict["open"],
        "untold": by_verdict["not told"],
        "secrets": len(audit["secrets"]),
        "left_out": audit["left_out"],
        "quick": audit.get("quick", False),
        "notes": audit["notes"],
        "meaning": MEANING,
        "warning": OTHER_MODEL if is_of_another(audit, record) else "",
    }


def is_of_another(audit: Json, record: Json) -> bool:
    """Whether the audited model's fingerprint is another than the one that the run recorded."""
    fingerprint = audit["models"].get("unlearned", {}).get("fingerprint")
    return fingerprint is not None and fingerprint != record["hashes"]["weights_after"]


# --- the secrets ---
def leaks(audit: Json, hide: Callable[[str], str], *, known: float, redact: bool) -> list[Json]:
    """List the secrets that the unlearned model told, those that most attacks got first: {text, question, ways}.

    A way is an answer and the names of the attacks that got it; where ``parts`` is None, of those that saw no text.
    A secret was got if an answer tells it; where an attack reads no answer, if its probability is at least ``known``,
    or the attack's value, of another kind, at least HALF. hide: blots the secrets out of a text, or leaves it.
    """
    found = []
    for i, secret in enumerate(audit["secrets"]):
        ways: dict[str | None, list[str]] = {}
        attacks = set()
        for row in audit["attacks"]:
            value = _value(row, "unlearned", i)
            # Of an attack's rows, the first that got it: the fewest draws, or the shortest hint.
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
            text, question = MASK if redact else secret["text"], hide(secret["question"])
            found.append({"text": text, "question": question, "attacks": len(attacks), "ways": shown})
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
