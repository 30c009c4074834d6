"""Where a model that an engine shards is looked at as a whole."""

import pytest
import torch
from helpers.tiny import tiny_llama

from palu.models.root import roomy_device

CARD = torch.device("cuda", 0)


def test_a_model_without_room_on_the_card_is_looked_at_on_the_host(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model = tiny_llama()
    size = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.3 * size, 2 * size))
    assert roomy_device(model, CARD) == CARD
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.1 * size, 2 * size))
    assert roomy_device(model, CARD) == torch.device("cpu")
    assert "has no room on cuda:0" in capfd.readouterr().err
    assert roomy_device(model, torch.device("cpu")) == torch.device("cpu")
