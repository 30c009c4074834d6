"""``palu report``: build a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(help="The folder that palu unlearn wrote.", metavar="DIR")],
    redact: Annotated[
        bool, typer.Option("--redact", help="Blot out the secrets, in private/report-redacted.html.")
    ] = False,
) -> None:
    """Write DIR/private/report.html again, from what the run and evaluations have left there."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {run_dir}")
    from palu.report.write import write_report

    print(f"wrote {write_report(run_dir, redact=redact)}")
