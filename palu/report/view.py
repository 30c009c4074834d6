"""Choose what the report and the model card show of a run's folder."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from palu.report import audited, words
from palu.report.plots import line_chart, number
from palu.report.reading import Json, asked_questions, evaluations, read_audit, read_run
from palu.settings import EVAL_PREFIX

KNOWN = 0.01  # a secret this probable is known, even where greedy decoding would not write it
FLOOR = 1e-8  # where the scale of probabilities ends
# Lower ends of the histogram's bins; the last one holds the rest.
BINS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)
OPEN_ROWS = 12  # of a table, before the rest is folded away
OPEN_EXAMPLES = 6
MASK = "███"


# --- the outcome ---
def known(score: Mapping[str, Any]) -> bool:
    """Whether a secret is known: greedy decoding writes it, or its probability is at least KNOWN."""
    return bool(score["recalled"]) or score["probability"] >= KNOWN


def outcome(record: Json) -> Json:
    """Compute the figures that matter most, for the report's head and the model card."""
    secrets, retained = record["secrets"], record["retained"]
    before = [s for s in secrets if known(s["before"])]
    left = [s for s in before if known(s["after"])]
    total, forgotten = len(before), len(before) - len(left)
    if not before:
        headline = "No secret was known before the run"
    elif not left:
        headline = "The secret is forgotten" if total == 1 else f"All {total:,} secrets are forgotten"
    else:
        headline = f"{forgotten:,} of {words.count(total, 'secret')} forgotten, {len(left):,} still known"
    return {
        "headline": headline,
        "secrets": len(secrets),
        "known": {when: sum(known(s[when]) for s in secrets) for when in ("before", "after")},
        "forgotten": forgotten,
        "left": len(left),
        "median": {when: _median([s[when]["probability"] for s in secrets]) for when in ("before", "after")},
        "highest": max((s["after"]["probability"] for s in secrets), default=None),
        "retained": len(retained),
        "kept": {when: _mean([r[when]["probability"] for r in retained]) for when in ("before", "after")},
        "recalled": {when: _mean([r[when]["recalled"] for r in retained]) for when in ("before", "after")},
    }


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def metric_table(found: Sequence[Json]) -> list[Json]:
    """Make a row per metric of any evaluation: {label, name, better, values, reason}, the known ones first."""
    names = list(dict.fromkeys(name for one in found for name in one["values"]))
    names = [name for name in words.METRICS if name in names] + [name for name in names if name not in words.METRICS]
    return [
        {
            "label": words.METRICS[name].label if name in words.METRICS else name,
            "better": words.METRICS[name].better if name in words.METRICS else "",
            "name": name,
            "values": [_figure(one, name) for one in found],
            "reason": next((one["reasons"][name] for one in found if name in one["reasons"]), ""),
        }
        for name in names
    ]


def _figure(one: Json, name: str) -> str:
    """Format a metric of an evaluation, with the retain model's where that stands beside it."""
    beside = one["retain_model"].get(name)
    shown = number(one["values"].get(name))
    return shown if beside is None else f"{shown} (retain model {number(beside)})"


# --- the page ---
def page(folder: Path, *, redact: bool) -> Json:
    """Collect everything that the report's template shows. ``folder``: of the run's records."""
    record, summary, history = read_run(folder)
    if redact:  # with the question beside it, a hash is enough to guess a short secret
        record["data"]["forget"] = {**record["data"]["forget"], "file": None, "tokens_sha256": None}
    audit, asked = read_audit(folder), asked_questions(folder)
    also = [{"text": text} for text in asked["secrets"]] if asked else []
    hide = masker([*record["secrets"], *also, *(audit["secrets"] if audit else [])]) if redact else str
    secrets = sorted(record["secrets"], key=lambda s: (not known(s["after"]), -s["after"]["probability"]))
    found = evaluations(folder)
    answers = {
        side: [
            {
                "row": one["row"],
                "question": hide(one["question"]),
                **{when: marked(hide(one[when]), [] if redact else _texts(record, one["row"], side)) for when in _WHEN},
            }
            for one in record["answers"][side]
            # What a model makes of a secret may give it away in other words.
            if not (redact and side == "forget")
        ]
        for side in ("forget", "retain")
    }
    return {
        "title": record["model"]["name"] or record["model"]["type"],
        "redact": redact,
        "outcome": outcome(record),
        "known": KNOWN,
        "record": record,
        "summary": summary,
        "finished": datetime.fromisoformat(record["finished"]),
        "asked": words.asked(summary),
        "method": words.method(summary["config"]),
        "settings": words.settings(summary["config"]),
        "secrets": [_secret(one, hide, redact) for one in secrets],
        "audit": audit and audited.summary(audit, record),
        "leaked": audited.leaks(audit, hide, known=KNOWN, redact=redact) if audit else [],
        "histogram": histogram(record["secrets"]) if len(secrets) > OPEN_ROWS else [],
        "retained": [
            _bar(one, decades=False) | {"question": hide(one["question"])} for one in _by_loss(record["retained"])
        ],
        "answers": answers,
        "examples": [_example(one, hide, redact) for one in record["examples"]],
        "charts": charts(history, summary.get("evaluation_before", {}), words.series(summary["config"])),
        "history": _table(history),
        "evaluations": found,
        "metrics": metric_table(found),
        "questions": asked and {**asked, "rows": [{**r, "question": hide(r["question"])} for r in asked["rows"]]},
        "open_rows": OPEN_ROWS,
        "open_examples": OPEN_EXAMPLES,
    }


_WHEN = ("before", "after")


def _texts(record: Json, row: int, side: str) -> list[str]:
    """Return the texts of a forget row's secrets."""
    return [s["text"] for s in record["secrets"] if side == "forget" and s["row"] == row and s["text"]]


def masker(secrets: Iterable[Mapping[str, Any]]) -> Callable[[str], str]:
    """Return a function that blots the secrets out of a text, whatever their case."""
    texts = {s["text"].strip() for s in secrets if s["text"] and s["text"].strip()}
    if not texts:
        return str
    pattern = re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)), re.IGNORECASE)
    return lambda text: pattern.sub(MASK, text)


def marked(text: str, secrets: Sequence[str]) -> list[tuple[str, bool]]:
    """Split a text at the secrets: (part, whether it is one of them); "(nothing)" for an empty text."""
    wanted = [re.escape(secret.strip()) for secret in sorted(secrets, key=len, reverse=True) if secret.strip()]
    parts = re.split(f"({'|'.join(wanted)})", text, flags=re.IGNORECASE) if wanted else [text]
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part] or [("(nothing)", False)]


def _secret(one: Json, hide: Callable[[str], str], redact: bool) -> Json:
    return _bar(one, decades=True) | {
        "question": hide(one["question"]),
        "text": MASK if redact else one["text"] or words.count(one["tokens"], "token"),
        "left": known(one["after"]),
        "known": {when: known(one[when]) for when in _WHEN},
    }


def _bar(one: Json, *, decades: bool) -> Json:
    """Format a row's two probabilities as text, and as places in percent on a scale (by decades, or 0 to 1)."""
    values = {when: one[when]["probability"] for when in _WHEN}
    along = {w: 1 - math.log10(max(v, FLOOR)) / math.log10(FLOOR) if decades else v for w, v in values.items()}
    place = {when: 100 * share for when, share in along.items()}
    return {
        "row": one["row"],
        **{when: words.probability(values[when]) for when in _WHEN},
        "place": {when: f"{place[when]:.1f}" for when in _WHEN},
        "way": [f"{edge:.1f}" for edge in sorted(place.values())],
    }


def _by_loss(retained: Sequence[Json]) -> list[Json]:
    """Sort answers, those that lost most first."""
    return sorted(retained, key=lambda r: r["after"]["probability"] - r["before"]["probability"])


def histogram(secrets: Sequence[Json]) -> list[Json]:
    """Count the secrets by size of their probability: {label, count before and after, and both in percent}."""
    rows = []
    for high, low in zip((math.inf, *BINS), BINS, strict=False):
        counts = {when: sum(low <= s[when]["probability"] < high for s in secrets) for when in _WHEN}
        label = f"below {number(high)}" if not low else f"at least {number(low)}"
        rows.append({"label": label, "count": counts, "share": {w: 100 * n / len(secrets) for w, n in counts.items()}})
    return rows


def _example(one: Json, hide: Callable[[str], str], redact: bool) -> Json:
    """Split a forget row's answer into runs of one role, one token each where it is sensitive."""
    runs = []
    for role, tokens in groupby(one["tokens"], key=lambda token: token[1]):
        pieces = [piece for piece, _ in tokens]
        if role in ("onset", "redundant"):
            runs += [(MASK if redact else piece, role) for piece in pieces if piece]
        else:
            runs.append((hide("".join(pieces)), role))
    roles = [role for _, role in one["tokens"]]
    return {
        "row": one["row"],
        "question": hide(one["question"]),
        "runs": runs,
        "counts": {role: roles.count(role) for role in ("onset", "redundant", "ordinary")},
    }


def charts(history: Sequence[Json], before: Json, titles: Mapping[str, str] = words.SERIES) -> list[Json]:
    """Draw a chart for each figure of the history, terms of the loss first; an evaluation's begins before step 1."""
    names = list(dict.fromkeys(name for record in history for name in record if name not in words.NOT_PLOTTED))
    result = []
    for name in names:
        # An evaluation has figures at some steps only.
        sparse = name.startswith(EVAL_PREFIX)
        records = enumerate([{"step": 0} | before, *history])
        held = [(i, record) for i, record in records if (name in record if sparse else i)]
        values = [_float(record.get(name)) for _, record in held]
        finite = [value for value in values if math.isfinite(value)]
        if name == "learning_rate" and len(set(finite)) < 2:
            continue  # a constant is told in words
        steps = [int(record.get("step", i)) for i, record in held]
        title = titles.get(name, name)
        ends = " → ".join(map(number, values[:1] + values[1:][-1:]))
        if finite:
            label = (
                f"{title}: {number(values[0])} at step {steps[0]}, {number(values[-1])} at step {steps[-1]}; "
                f"lowest {number(min(finite))}, highest {number(max(finite))}"
            )
        else:
            label = f"{title}: no finite value"
        gaps = len(values) - len(finite)
        svg = line_chart(steps, values, label=label)
        result.append({"title": title, "ends": ends, "svg": svg, "gaps": gaps})
    return result


def _table(history: Sequence[Json], limit: int = 50) -> Json:
    """Make a table of the history, of at most ``limit`` steps, evenly spaced, the last one among them."""
    names = list(dict.fromkeys(name for record in history for name in record))
    every = -(-len(history) // limit) or 1
    kept = history[::-every][::-1]
    return {"names": names, "rows": [[number(_float(r.get(name))) for name in names] for r in kept], "every": every}


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
