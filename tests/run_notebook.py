"""Run `docs/first_hour.ipynb` in an empty folder, one thread; it asserts what it claims.

With ``--write`` the outputs go into the file, without progress bars.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "first_hour.ipynb"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the outputs into the notebook")
    args = parser.parse_args()
    # The kernel's: `!palu` is this environment's.
    os.environ |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    since = time.perf_counter()
    with TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=None, startup_timeout=600, coalesce_streams=True, resources=place).execute()
    print(f"{NOTEBOOK.name}: {time.perf_counter() - since:.0f} s")
    if args.write:
        for cell in notebook.cells:
            cell.metadata = {}
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if of_palu(output)]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, NOTEBOOK)


def of_palu(output: nbformat.NotebookNode) -> bool:
    """Whether something is left of an output without the progress bars and warnings of stderr, which are taken out."""
    if output.get("name") == "stderr":
        output.text = "".join(f"{line}\n" for line in re.split(r"[\r\n]", output.text) if line.startswith("palu:"))
        return bool(output.text)
    return True


if __name__ == "__main__":
    main()
