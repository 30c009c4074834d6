"""Write a run's folder: the model, to be published or not, and apart from it the run's records (docs/report.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from palu.report.layout import HISTORY, MODEL, PRIVATE, SUMMARY, check_free, clear_run, hold_run
from palu.report.recorder import Recorder
from palu.report.render import write_card, write_report
from palu.report.view import outcome
from palu.training.loop import UnlearnResult


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

    Returns:
        The report's path.

    Raises:
        ValueError: the folder holds a run that has finished, and ``overwrite`` is off; or a run is writing to it; or it
            holds a model or records that no run has left there.
        OSError: the folder cannot be written.
    """
    check_free(output, overwrite=overwrite, subject=os.fspath(output), fix="overwrite=True")
    with hold_run(output, os.fspath(output)):
        if overwrite:
            settings = result.summary["config"]
            own = (settings[field] for field in ("cache_dir", "checkpoint_dir", "logging_dir"))
            clear_run(output, keep=[folder for folder in own if folder is not None])
        private, model = Path(output) / PRIVATE, Path(output) / MODEL
        result.model.save_pretrained(str(model))
        tokenizer.save_pretrained(model)
        with open(private / HISTORY, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in result.history)
        record = recorder.save(output, result.model)
        # Where it is, the run has finished: what comes after can be made again.
        about = {} if record is None else {"outcome": outcome(record)}
        summary = json.dumps({**result.summary, **about, **(extra or {})}, indent=2)
        (private / SUMMARY).write_text(summary + "\n", encoding="utf-8")

        write_card(output)
        return write_report(output)
