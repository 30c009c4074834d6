"""What a GPU's properties say of its speed, and gather or dense by that, without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palu.ops import functional
from palu.ops.functional import use_gather
from palu.ops.gpu import A100, H100, gpu_at

HALF = torch.bfloat16


def test_peaks_and_balances_are_those_of_the_data_sheets() -> None:
    assert H100.products(HALF) == pytest.approx(989e12, rel=0.01)
    assert A100.products(HALF) == pytest.approx(312e12, rel=0.01)
    assert H100.products(torch.float32) == pytest.approx(62e12, rel=0.01)
    assert H100.balance(HALF) == pytest.approx(295, rel=0.01)
    assert A100.balance(HALF) == pytest.approx(153, rel=0.01)
    assert H100.balance(torch.float32) == pytest.approx(37, rel=0.01)
    later = H100._replace(capability=(9, 9))  # one that is not in the table counts as the one before
    assert later.products(HALF) == H100.products(HALF)
    assert A100._replace(capability=(6, 0)).products(HALF) > 0


def test_properties_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000)
    told.memory_clock_rate, told.memory_bus_width = 2_619_000, 5120
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    gpu_at.cache_clear()
    found = gpu_at(torch.device("cuda:0"))
    assert found.bandwidth == pytest.approx(3.35e12, rel=0.01) and found.capability == (9, 0)
    gpu_at.cache_clear()
    told.memory_clock_rate = 0
    assert gpu_at(torch.device("cuda:0")) == H100
    gpu_at.cache_clear()


@pytest.mark.parametrize(
    ("rows", "k", "beside_dense", "trained", "gathers"),
    [
        (36, 50, False, True, True),  # the default's onset rows alone
        (36, 5000, False, True, False),  # R K > V
        (2000, 1000, False, True, False),
        (2000, 100, False, True, True),  # the product of 2,000 rows takes seven times a reading of the head
        (36, 50, True, True, False),  # beside a product, of a head whose gradient would have two parts
        (36, 51, True, False, True),  # K < V / 295
        (36, 1000, True, False, False),
    ],
)
def test_gather_or_dense_on_an_h100(
    monkeypatch: pytest.MonkeyPatch, rows: int, k: int, beside_dense: bool, trained: bool, gathers: bool
) -> None:
    monkeypatch.setattr(functional, "NATIVE_DEVICES", {"cuda"})
    monkeypatch.setattr(functional, "gpu_at", lambda _: H100)
    weight: Any = SimpleNamespace(shape=(128256, 4096), dtype=HALF, device=torch.device("cuda"))
    index: Any = SimpleNamespace(shape=(rows, k))
    assert use_gather("auto", index, weight, beside_dense=beside_dense, trained=trained) is gathers
