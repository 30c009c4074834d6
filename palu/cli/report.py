"""``palu report``: a run's report, built again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(help="The folder that palu unlearn wrote.", metavar="DIR")]) -> None:
    """Write DIR/report.html again, from what the run left in its folder."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {run_dir}")
    from palu.report import write_report

    print(f"wrote {write_report(run_dir) or run_dir / 'report.html'}")
