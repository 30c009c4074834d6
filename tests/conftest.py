import signal
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that palu has kernels for."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as at a terminal: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
