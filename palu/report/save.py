"""Write a run's folder: the model, to be published or not, and apart from it the run's records.

::

    model/                   the model (of a ``PeftModel`` the adapter), its tokenizer, and README.md: the model card
    private/history.jsonl    a record of each optimisation step
    private/summary.json     counts, outcome, versions, configuration
    private/record.json      what the model said before and after (:mod:`palu.report.recorder`)
    private/report.html      all of it, to look at
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palu.report.layout import HISTORY, MODEL, SUMMARY, make_private

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from palu.report.recorder import Recorder
    from palu.training.loop import UnlearnResult


def save_run(
    output: str | os.PathLike[str],
    result: UnlearnResult,
    tokenizer: PreTrainedTokenizerBase,
    recorder: Recorder,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's folder: ``model/`` with the tokenizer and the model card, ``private/`` with records and report.

    ``model/`` holds no text, token or hash of the forget set. A new ``private/`` can be entered by its owner alone. Of
    a ``PeftModel`` the adapter alone is written. Of many processes, call it on the main one.

    Args:
        output: the folder.
        result: of :func:`palu.unlearn`.
        tokenizer: the model's.
        recorder: the :class:`palu.Recorder` that looked at the model before the run.
        extra: added to the summary.

    Returns:
        The report's path.

    Raises:
        OSError: the folder cannot be written.
    """
    private, model = make_private(output), Path(output) / MODEL
    result.model.save_pretrained(str(model))
    tokenizer.save_pretrained(model)
    with open(private / HISTORY, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in result.history)
    recorder.save(output, result.model)
    # Where it is, the run has finished: what comes after can be made again.
    summary = json.dumps({**result.summary, **(extra or {})}, indent=2)
    (private / SUMMARY).write_text(summary + "\n", encoding="utf-8")
    from palu.report.render import write_card, write_report

    write_card(output)
    return write_report(output)
