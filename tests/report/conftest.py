from pathlib import Path

import pytest
from helpers.report_runs import Run, copy_of, perform


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that ended, recorded; its folder is to be copied."""
    return perform(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return copy_of(run, tmp_path / "run")
