"""``palu report``: build a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palu.cli.options import check_run


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    redact: Annotated[bool, typer.Option("--redact")] = False,
) -> None:
    """Write RUN/private/report.html again, from what the run and evaluations have left there.

    Args:
        run: The folder of a finished run of palu unlearn.
        redact: Blot out the secrets, in private/report-redacted.html.
    """
    check_run(run)
    from palu.report.write import write_report

    print(f"wrote {write_report(run, redact=redact)}")
