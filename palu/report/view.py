"""Choose what the report and the model card show of a run's folder, and blot the secrets out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from palu.data.matching import Span, find, letters, split_at
from palu.methods import METHODS
from palu.report import audited, words
from palu.report.plots import line_chart, number
from palu.report.reading import Json, asked_questions, evaluations, marked_texts, read_audit, read_ledger, read_run
from palu.report.token_roles import Token, count_roles, runs
from palu.settings import EVAL_PREFIX

INTACT = 0.8  # of the words of the model's own answers to general questions, at least so many are its likeliest still
KNOWN = 0.01  # a secret this probable is known, even where greedy decoding would not write it
FLOOR = 1e-8  # where the scale of probabilities ends
# Lower ends of the histogram's bins; the last one holds the rest.
BINS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)
TABLE_ROWS = 50  # of the history, at most
_WHEN = ("before", "after")


# --- the outcome ---
def known(score: Mapping[str, Any]) -> bool:
    """Whether an answer tells a secret, greedy decoding writes it, or its probability is at least KNOWN."""
    return any(score.get(how) for how in ("recalled", "asked", "paraphrased")) or score["probability"] >= KNOWN


def outcome(record: Json) -> Json:
    """Compute the figures that matter most, for the report's head and the model card."""
    secrets, retained = record["secrets"], record["retained"]
    before = [s for s in secrets if known(s["before"])]
    left = [s for s in before if known(s["after"])]
    of_request = [s.get("request", 1) for s in secrets]
    earlier = [s for s, number in zip(secrets, of_request, strict=True) if number < max(of_request)]
    again = [s for s in earlier if known(s["after"])]
    left += (new := [s for s in secrets if known(s["after"]) and not known(s["before"])])
    before += new
    total, forgotten = len(before), len(before) - len(left)
    general = record["general"]
    own = general["after"] / general["before"] if general["before"] else None
    damaged = own is not None and own < INTACT
    if not before:
        headline = "No secret was known before the run"
    elif not left:
        headline = "The secret is forgotten" if total == 1 else f"All {total:,} secrets are forgotten"
    else:
        headline = f"{forgotten:,} of {words.count(total, 'secret')} forgotten, {len(left):,} still known"
    if own is not None:
        headline += ", and the model is damaged" if damaged else ", and the model is intact" if not left else ""
    if earlier:
        verb = "is" if len(again) < 2 else "are"
        headline += f"; {len(again) or 'none'} of {words.count(len(earlier), 'earlier secret')} {verb} known"
    rows = sorted({s["row"] for s in left})
    return {
        "headline": headline,
        "advice": words.advice(bool(before), rows, damaged=damaged),
        "own": own,
        "secrets": len(secrets),
        "known": {when: sum(known(s[when]) for s in secrets) for when in _WHEN},
        "told": {how: counts for how in words.TOLD if (counts := _told(secrets, how))["of"]},
        "rows_left": rows,
        "forgotten": forgotten,
        "left": len(left),
        "median": {when: median(s[when]["probability"] for s in secrets) if secrets else None for when in _WHEN},
        "highest": max((s["after"]["probability"] for s in secrets), default=None),
        "retained": len(retained),
        "kept": {when: fmean(r[when]["probability"] for r in retained) if retained else None for when in _WHEN},
        "recalled": {when: fmean(r[when]["recalled"] for r in retained) if retained else None for when in _WHEN},
    }


def proven(requests: Sequence[Json], record: Json) -> list[Json]:
    """Add to each request of a ledger what its last run found of its secrets, and what this one does: proof, now."""
    found = []
    for one in requests:
        own = outcome(record | {"secrets": [s for s in record["secrets"] if s["request"] == one["number"]]})
        now = {name: own[name] for name in ("secrets", "known", "told", "highest")}
        found.append(one | {"proof": one.get("proof", now), "now": now})
    return found


def _told(secrets: Sequence[Json], how: str) -> dict[str, int]:
    """Count the secrets that were told in one way, before and after, of those that could be."""
    asked = [s for s in secrets if all(s[when].get(how) is not None for when in _WHEN)]
    return {when: sum(s[when][how] for s in asked) for when in _WHEN} | {"of": len(asked)}


def told_line(found: Json) -> str:
    """Say in a line how many secrets were told before and after, and how; "" where nobody asked."""
    return "; ".join(
        f"{words.TOLD[how]}: {one['before']} → {one['after']} of {one['of']}" for how, one in found["told"].items()
    )


def verdict(found: Json) -> str:
    """Say in a line whether the secrets are forgotten, whether the model is intact, and what to do."""
    own = "" if found["own"] is None else f" ({words.percent(min(found['own'], 1))} of its own answers' words are kept)"
    return f"{found['headline']}{own}" + (f": {found['advice']}" if found["advice"] else "")


def last_lines(found: Json) -> str:
    """Say a run's outcome in its last lines: how many secrets were told, where that is known, and the verdict."""
    return "\n".join(filter(None, (told_line(found), verdict(found))))


# --- secrets blotted out ---
class Redaction:
    """Blots secrets out of texts, wherever :func:`palu.data.matching.find` finds one; without secrets a text stays."""

    def __init__(self, secrets: Iterable[str]):
        self.secrets = [(letters(secret)[0], secret) for secret in sorted(set(secrets))]
        self.spans = cache(self._spans)

    def __call__(self, value: Any) -> Any:
        """Redact a text, or every text in a value of JSON."""
        if isinstance(value, str):
            return blot(value, self.spans(value))
        if isinstance(value, list):
            return [self(one) for one in value]
        return {self(name): self(one) for name, one in value.items()} if isinstance(value, dict) else value

    def _spans(self, text: str) -> list[Span]:
        there = " ".join(letters(text))  # looked at first, for speed
        return [span for own, secret in self.secrets if own in there for span in find(secret, text, whole=False)]


def blot(text: str, spans: Iterable[Span]) -> str:
    """Put a mask in place of each span."""
    return "".join(words.MASK if held else part for part, held in split_at(text, spans))


# --- the page ---
def page(folder: Path, *, redact: bool) -> Json:
    """Collect what the templates of report and card show; they pass the user's texts through ``hide``."""
    record, summary, history = read_run(folder)
    requests = read_ledger(folder)
    audit, asked, evaluated = read_audit(folder), asked_questions(folder), evaluations(folder)
    hidden: Mapping[str, str] = {}
    if redact:
        hidden = marked_texts(record, audit, asked)
        # With the question beside it, a hash is enough to guess a short secret.
        record["data"]["forget"] |= {"file": None, "tokens_sha256": None}
    hide = Redaction(hidden)
    found, config, model = outcome(record), summary["config"], record["model"]
    objective, titles = config["objective"], words.SERIES
    if "local_loss" in config:
        titles = titles | {"local": words.LOCAL[config["local_loss"]]}
    secrets = sorted(record["secrets"], key=lambda s: (not known(s["after"]), -s["after"]["probability"]))
    retained = sorted(record["retained"], key=lambda r: r["after"]["probability"] - r["before"]["probability"])
    # What a model makes of a secret may give it away in other words.
    forget = [] if redact else [_answer(one, record["secrets"]) for one in record["answers"]["forget"]]
    return {
        "hide": hide,
        "redact": redact,
        "record": record,
        "summary": summary,
        "title": model["name"] or model["type"],
        "finished": datetime.fromisoformat(record["finished"]),
        "outcome": found,
        "told": told_line(found),
        "words_told": words.TOLD,
        "known": KNOWN,
        "method": METHODS[objective].title if objective in METHODS else objective,
        # Texts are in mappings alone; JSON would escape one that is JSON itself again, and hide its secrets.
        "settings": words.settings({n: hide(one) if isinstance(one, dict) else one for n, one in config.items()}),
        "secrets": [_secret(one, redact) for one in secrets],
        "requests": [one | ({"rows_sha256": None} if redact else {}) for one in requests],
        "histogram": histogram(secrets),
        "retained": [_bar(one, decades=False) for one in retained],
        "answers": {"forget": forget, "retain": [_answer(one, ()) for one in record["answers"]["retain"]]},
        "examples": [_example(one, hide, redact) for one in record["examples"]],
        "audit": audit and audited.summary(audit, record),
        "leaked": audited.leaks(audit, known=KNOWN, redact=redact) if audit else [],
        "evaluations": evaluated,
        "metrics": _metric_table(evaluated, hide),
        "questions": asked,
        "charts": charts(history, summary["evaluation_before"], titles, hide),
        "history": _table(history),
    }


def _answer(one: Json, secrets: Sequence[Json]) -> Json:
    """Mark a row's secrets in what the model wrote: (part, whether it is of a secret)."""
    own = [secret["text"] for secret in secrets if secret["row"] == one["row"] and secret["text"]]
    parts = {when: audited.marked(one[when], *own) or [("(nothing)", False)] for when in _WHEN}
    return {"question": one["question"], **parts}


def _secret(one: Json, redact: bool) -> Json:
    text = words.MASK if redact else one["text"] or words.count(one["tokens"], "token")
    return _bar(one, decades=True) | {"text": text, "known": {when: known(one[when]) for when in _WHEN}}


def _bar(one: Json, *, decades: bool) -> Json:
    """Format a row's two probabilities as text, and as places in percent on a scale (by decades, or 0 to 1)."""
    values = {when: one[when]["probability"] for when in _WHEN}
    along = {w: 1 - math.log10(max(v, FLOOR)) / math.log10(FLOOR) if decades else v for w, v in values.items()}
    return {
        "question": one["question"],
        **{when: words.probability(values[when]) for when in _WHEN},
        "place": {when: f"{100 * share:.1f}" for when, share in along.items()},
        "way": [f"{100 * share:.1f}" for share in sorted(along.values())],
    }


def histogram(secrets: Sequence[Json]) -> list[Json]:
    """Count the secrets by size of their probability: {label, count before and after, and both in percent}."""
    rows = []
    for high, low in zip((math.inf, *BINS), BINS, strict=False):
        counts = {when: sum(low <= s[when]["probability"] < high for s in secrets) for when in _WHEN}
        shares = {when: 100 * n / max(len(secrets), 1) for when, n in counts.items()}
        label = f"below {number(high)}" if not low else f"at least {number(low)}"
        rows.append({"label": label, "count": counts, "share": shares})
    return rows


def _example(one: Json, hide: Redaction, redact: bool) -> Json:
    """Split a forget row's answer into runs of one role: (role, its pieces), a token each where it is sensitive."""
    tokens, start = [Token(*token) for token in one["tokens"]], 0
    shown: list[tuple[str, list[str]]] = []
    spans = hide.spans("".join(token.piece for token in tokens))  # one may begin in one run, and end in another
    for role, pieces in runs(tokens):
        text = "".join(pieces)
        if role in ("onset", "redundant"):
            shown.append((role, [words.MASK if redact else piece for piece in pieces]))
        else:
            shown.append((role, [blot(text, [(first - start, end - start) for first, end in spans])]))
        start += len(text)
    return {"row": one["row"], "question": one["question"], "runs": shown, "counts": count_roles([tokens])}


def _metric_table(evaluated: Sequence[Json], hide: Redaction) -> list[Json]:
    """Make a row per metric of any evaluation: {label, name, better, values, reason}, the known ones first."""
    names = list(dict.fromkeys(name for one in evaluated for name in one["entries"]))
    rows = []
    for name in sorted(names, key=[*words.METRICS, *names].index):
        entries = [one["entries"].get(name, {}) for one in evaluated]
        shown = name if name in words.METRICS else hide(name)
        label, better = words.METRICS.get(name, (shown, ""))
        reason = hide(next((entry["reason"] for entry in entries if entry.get("reason")), ""))
        values = [_figure(entry) for entry in entries]
        rows.append({"label": label, "better": better, "name": shown, "values": values, "reason": reason})
    return rows


def _figure(entry: Json) -> str:
    """Format a metric, with the retain model's where that stands beside it."""
    shown = number(entry.get("agg_value"))
    return f"{shown} (retain model {number(entry['retain_model']['agg_value'])})" if "retain_model" in entry else shown


def charts(
    history: Sequence[Json],
    before: Json,
    titles: Mapping[str, str] = words.SERIES,
    hide: Callable[[str], str] = str,
) -> list[Json]:
    """Lay out a chart for each figure of the history, terms of the loss first: {title, ends, label, gaps, drawing}.

    One of an evaluation begins before step 1, with what it was ``before``.
    """
    names = dict.fromkeys(name for record in history for name in record if name not in words.NOT_PLOTTED)
    result = []
    for name in names:
        records = history
        if name.startswith(EVAL_PREFIX):  # an evaluation has figures at some steps only
            records = [record for record in ({"step": 0} | before, *history) if name in record]
        steps, values = [record["step"] for record in records], [_float(record.get(name)) for record in records]
        finite = [value for value in values if math.isfinite(value)]
        if name == "learning_rate" and len(set(finite)) < 2:
            continue  # a constant is said in words
        title = titles[name] if name in titles else hide(name)
        label = f"{title}: no finite value"
        if finite:
            label = (
                f"{title}: {number(values[0])} at step {steps[0]}, {number(values[-1])} at step {steps[-1]}; "
                f"lowest {number(min(finite))}, highest {number(max(finite))}"
            )
        result.append(
            {
                "title": title,
                "ends": " → ".join(map(number, values[:1] + values[1:][-1:])),
                "label": label,
                "gaps": len(values) - len(finite),
                "drawing": line_chart(steps, values),
            }
        )
    return result


def _table(history: Sequence[Json]) -> Json:
    """Make a table of the history, of at most TABLE_ROWS steps, evenly spaced, the last one among them."""
    names = list(dict.fromkeys(name for record in history for name in record))
    every = -(-len(history) // TABLE_ROWS) or 1
    rows = [[number(_float(record.get(name))) for name in names] for record in history[::-every][::-1]]
    return {"names": names, "rows": rows, "every": every}


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
