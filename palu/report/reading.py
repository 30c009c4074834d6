"""Read the files of a run's folder from which reports are made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palu.attacks.run import FORMAT as AUDIT_FORMAT
from palu.attacks.run import RESULTS
from palu.evaluate.questions import OTHERS, table_of
from palu.evaluate.rows import Results, load_results
from palu.layout import HISTORY, LEDGER, RECORD, SUMMARY
from palu.report.recorder import FORMAT

Json = dict[str, Any]
_RESTORE = "restore it, or run again"


class RecordError(ValueError):
    """A folder's records are missing or damaged; the message names the file and the fix."""


def read_run(folder: Path) -> tuple[Json, Json, list[Json]]:
    """Read (record, summary, history) from the folder of a run's records."""
    record = _parse(folder / RECORD, _text(folder / RECORD, "save one with palu.Recorder"))
    summary = _parse(folder / SUMMARY, _text(folder / SUMMARY, "write the run's summary beside its record"))
    if record.get("format") != FORMAT:
        raise RecordError(
            f"{folder / RECORD} has format {record.get('format')}, and this palu reads {FORMAT}; "
            "report with the palu that wrote it"
        )
    lines = _text(folder / HISTORY, "write the run's history beside its record").split("\n")
    return record, summary, [_parse(folder / HISTORY, line) for line in lines if line.strip()]


def read_ledger(folder: Path) -> list[Json]:
    """Read the requests that the run in this folder and those before it have met, the oldest first."""
    path = folder / LEDGER
    return _parse(path, _text(path, _RESTORE))["requests"] if path.exists() else []


def _text(path: Path, create: str, fix: str = _RESTORE) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(f"{path} is missing, so this is no folder of a recorded run; {create}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path} is damaged ({error}); {fix}") from error


def _parse(path: Path, text: str, fix: str = _RESTORE) -> Json:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is damaged ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} does not hold what palu wrote; {fix}")
    return value


_AGAIN = "run palu audit again, or delete it"


def read_audit(folder: Path) -> Json | None:
    """Read the folder's audit; None where there is none."""
    path = folder / RESULTS
    if not path.exists():
        return None
    audit = _parse(path, _text(path, _AGAIN, _AGAIN), _AGAIN)
    if audit.get("format") != AUDIT_FORMAT:
        raise RecordError(f"{path} has format {audit.get('format')}, and this palu reads {AUDIT_FORMAT}; {_AGAIN}")
    return audit


def _results(folder: Path) -> Iterator[tuple[Path, Results]]:
    """Read each evaluation in the folder, those from before the run first."""
    paths = [*folder.glob("evaluation*.json"), *folder.glob("evaluation*.json.gz")]
    for path in sorted(paths, key=lambda path: ("before" not in path.name, path.name)):
        try:
            yield path, load_results(path)
        except ValueError as error:
            raise RecordError(f"{path}: {error}") from error


def evaluations(folder: Path) -> list[Json]:
    """Read the evaluations in the folder, each of one model.

    Each is {file, column, about, entries}, with the entries that have an aggregate by name.
    """
    found = []
    for path, results in _results(folder):
        about = results.get("palu", {})
        subject = " ".join(str(about[key]) for key in ("benchmark", "split") if about.get(key))
        column = path.name.removesuffix(".gz").removesuffix(".json")
        # Others than the unlearned model: of an evaluation on one's own questions.
        for name, part in {"": results, **{name: results[name] for name in OTHERS if name in results}}.items():
            other = name.replace("_", " ")
            found.append(
                {
                    "file": path.name,
                    "column": f"{column}, {other}" if other else column,
                    "about": f"{subject} ({other})" if other else subject,
                    "entries": {n: one for n, one in part.items() if isinstance(one, Mapping) and "agg_value" in one},
                }
            )
    return found


def asked_questions(folder: Path) -> list[Json]:
    """Read the table of each evaluation on one's own questions, with its file and the row of each marked text."""
    found = []
    for path, results in _results(folder):
        about = results.get("palu", {})
        if about.get("benchmark") != "questions":
            continue
        try:
            marked = {text: f"row {i} of {path.name}" for i, row in enumerate(about["rows"]) for text in row["marked"]}
            found.append(table_of(results) | {"file": path.name, "marked": marked})
        except KeyError as error:
            raise RecordError(
                f"{path}: it does not hold what palu eval --rows wrote ({error} is missing); evaluate again"
            ) from error
    return found


def marked_texts(record: Json, audit: Json | None, asked: Sequence[Json]) -> dict[str, str]:
    """Return every text that a run's sets, its audit's and its evaluations' mark, with the row or file it is in."""
    of_audit = [] if audit is None else [*audit["marked"], *(secret["text"] for secret in audit["secrets"])]
    found = dict.fromkeys(of_audit, RESULTS)
    for one in asked:
        found |= one["marked"]
    return found | record["marked"]
