import pytest
from helpers.report_runs import Run, perform


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that ended, recorded; its folder is to be copied."""
    return perform(tmp_path_factory.mktemp("run"))
