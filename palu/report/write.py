"""Write a run's folder: the model, to be published or not, and apart from it the run's records, report and model card.

Report and card are made from the files in ``private/`` alone (docs/report.md), so they can be made again after an
evaluation or an audit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from palu.hashing import json_digest
from palu.layout import (
    CARD,
    HISTORY,
    LEDGER,
    MODEL,
    MODEL_FILES,
    PRIVATE,
    SUMMARY,
    check_free,
    clear_run,
    delete_files,
    files_of_run,
    hold_run,
)
from palu.report import view, words
from palu.report.manifest import files_in
from palu.report.plots import number
from palu.report.recorder import Recorder
from palu.report.token_roles import MEANING, Token, runs
from palu.training.loop import UnlearnResult
from palu.writable import write_private

HERE = Path(__file__).parent
_SEAL = "<!-- palu audit writes this card again unless it was edited, as it sees by this SHA-256 of it: "


def save_run(
    output: str | os.PathLike[str],
    result: UnlearnResult,
    tokenizer: PreTrainedTokenizerBase,
    recorder: Recorder,
    extra: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a run's folder: ``model/`` with the tokenizer and the model card, ``private/`` with records and report.

    ``model/`` holds no text, token or hash of the forget set. A new ``private/`` can be entered by its owner alone. Of
    a ``PeftModel`` the adapter alone is written. Of many processes, call it on the main one.

    Args:
        output: the folder.
        result: of :func:`palu.unlearn`.
        recorder: the one that looked at the model before the run.
        extra: added to the summary.
        overwrite: whether to replace a finished run in the folder: what palu wrote is deleted and named on stderr, with
            audits, evaluations and reports; other files stay.

    Returns the report's path. Raises ValueError where the folder holds a run that has finished, and ``overwrite`` is
    off; where a run is writing to it; and where it holds a model or records that no run has left there.
    """
    check_free(output, overwrite=overwrite, subject=os.fspath(output), fix="overwrite=True")
    with hold_run(output, os.fspath(output)):
        if overwrite:
            settings = result.summary["config"]
            own = (settings[field] for field in ("cache_dir", "checkpoint_dir", "logging_dir"))
            clear_run(output, keep=[folder for folder in own if folder is not None])
        private, model = Path(output) / PRIVATE, Path(output) / MODEL
        delete_files(output, files_of_run(output, [f"{MODEL}/{name}" for name in MODEL_FILES]))  # of one cut short
        others = files_in(model)
        result.model.save_pretrained(str(model))
        tokenizer.save_pretrained(model)
        (model / CARD).unlink(missing_ok=True)  # PEFT's, which says nothing of the run
        write_private(private / HISTORY, "".join(json.dumps(record) + "\n" for record in result.history))
        record = recorder.save(output, result.model, result.summary["shared_beginnings"], others=others)
        about = {}
        if record is not None:
            about["outcome"] = view.outcome(record)
            requests = view.proven(recorder.ledger(output, record), record)
            write_private(private / LEDGER, json.dumps({"format": 1, "requests": requests}, indent=2) + "\n")
        summary = json.dumps({**result.summary, **about, **(extra or {})}, indent=2)
        # Where it is, the run has finished: what comes after can be made again.
        write_private(private / SUMMARY, summary + "\n")
        write_card(output)
        return write_report(output)


def write_report(run_dir: str | os.PathLike[str], *, redact: bool = False) -> Path:
    """Write ``private/report.html``: one file that asks for nothing else, runs no script and opens offline.

    It shows the forgotten text, so it is as private as the forget set. With ``redact`` each marked text is blotted out
    wherever its words stand, the model's answers to the forget set and its hashes are left out, and the file is
    ``report-redacted.html``; a secret told in other words, in a question for example, would still be there.

    Returns the file's path. Raises RecordError where the folder's records are missing or damaged.
    """
    folder = Path(run_dir) / PRIVATE
    shown = view.page(folder, redact=redact)
    path = folder / ("report-redacted.html" if redact else "report.html")
    path.write_bytes(_page("report.html.jinja", **shown))
    return path


def write_card(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``model/README.md``, the hub's model card: what was done and how it came out, and no text of the sets.

    The base model is named where it came from the hub, the licence where the base model's card names one. A card that
    is there is replaced, also where you have edited it. Raises RecordError as :func:`write_report`.
    """
    folder = Path(run_dir) / MODEL
    shown = view.page(Path(run_dir) / PRIVATE, redact=True)
    model = shown["record"]["model"]
    metadata = ModelCardData(
        base_model=model["name"] if model["on_the_hub"] else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        license=model["license"],
        pipeline_tag="text-generation",
        tags=["unlearning", "machine-unlearning", "palu"],
    )
    text = _rendered("card.md.jinja", autoescape=False, metadata=metadata.to_yaml(), **shown)
    path, partial = folder / CARD, folder / f"{CARD}.partial"
    partial.write_bytes(f"{text}{_SEAL}{json_digest(text)} -->\n".encode())
    os.replace(partial, path)  # a part of one would be sent as it is
    return path


def is_edited(card: Path) -> bool:
    """Whether a model card is there and not as :func:`write_card` has left it, by the hash in its last line."""
    if not card.exists():
        return False
    text, _, rest = card.read_bytes().decode(errors="replace").rpartition(_SEAL)
    return rest != f"{json_digest(text)} -->\n"


def write_roles(path: Path, title: str, rows: Iterable[tuple[int, Sequence[Token]]], summary: str) -> None:
    """Write one HTML file with the roles of the tokens of rows, each with its number, under a title and a summary."""
    path.write_bytes(_page("roles.html.jinja", title=title, rows=rows, summary=summary, runs=runs))


def _page(template: str, **values: Any) -> bytes:
    """Fill in a template of HTML; as bytes, so that a checksum of the file is the same on every system."""
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    return _rendered(template, autoescape=True, style=style, meanings=MEANING, **values).encode()


def _rendered(template: str, *, autoescape: bool, **values: Any) -> str:
    return _template(template, autoescape).render(values).rstrip() + "\n"


@cache
def _template(name: str, autoescape: bool) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, words.probability, words.count, words.percent, words.duration)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)
