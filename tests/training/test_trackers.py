"""palu.trackers: each step's record reaches TensorBoard and W&B; a missing package is told before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.small_tokenizers import DATED, byte_level
from helpers.tiny import forget_rows, retain_rows, same_weights, tiny_llama, weights

import palu
from palu.training import trackers

SETTINGS: dict[str, Any] = {"epochs": 2, "batch_size": 4, "progress": False, "learning_rate": 1e-2}


def unlearn(model: Any = None, **overrides: Any) -> palu.UnlearnResult:
    return palu.unlearn(model or tiny_llama(), None, forget_rows(8), retain_rows(8), **SETTINGS | overrides)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dated = {
        "tokenizer": byte_level(DATED),
        "model": tiny_llama(vocab_size=len(byte_level(DATED))),
        "anchors": 0,
        "neighbours": 0,
        "variants": 0,
    }
    values = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    result = unlearn(report_to="tensorboard", logging_dir=str(tmp_path / "logs"), **dated, **values)
    events = EventAccumulator(str(tmp_path / "logs" / "palu"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == result.history[0].keys()
    for name in ("loss", "local", "kl", "retain", "grad_norm", "learning_rate"):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3, 4]
        assert [event.value for event in logged] == pytest.approx([record[name] for record in result.history])
    (settings,) = (tmp_path / "logs").rglob("hparams.yml")
    assert "26 Jul 2024" in settings.read_text(), "the configuration is there"


class Wandb:
    """What accelerate uses of the module ``wandb``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.config = self

    def init(self, **kwargs: Any) -> Wandb:
        self.calls.append(("init", kwargs))
        return self

    def update(self, values: dict[str, Any], **_: Any) -> None:
        self.calls.append(("config", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    """A stand-in: no account, no network."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", tracking.WandBTracker)
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, LoggerType.WANDB])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb(wandb: Wandb, tmp_path: Path) -> None:
    result = unlearn(report_to="wandb", logging_dir=str(tmp_path / "logs"), seed=3)
    (init, config, *logs, finish) = wandb.calls
    assert init == ("init", {"project": "palu", "dir": str(tmp_path / "logs")})
    assert (tmp_path / "logs").is_dir(), "else wandb writes to a folder of its own"
    assert config == ("config", result.summary["config"])
    assert logs == [("log", (record["step"], record)) for record in result.history]
    assert finish == ("finish", None)


def test_both_and_another_project(wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("WANDB_PROJECT", "secrets")
    unlearn(report_to="tensorboard, wandb", logging_dir=str(tmp_path), epochs=1)
    assert wandb.calls[0][1]["project"] == "secrets"
    assert [kind for kind, _ in wandb.calls] == ["init", "config", "log", "log", "finish"]
    assert list((tmp_path / "secrets").glob("events.*"))


def test_trackers_are_closed_when_a_run_fails(wandb: Wandb, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(palu.DivergenceError):
        unlearn(model, report_to="wandb", logging_dir=str(tmp_path))
    assert wandb.calls[-1][0] == "finish"


def test_a_missing_package_is_told_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    model = tiny_llama()
    before = weights(model)
    told = r"^report_to = 'wandb' needs wandb, which is not here; pip install wandb$"
    with pytest.raises(ImportError, match=told):
        unlearn(model, report_to="wandb", logging_dir=str(tmp_path / "logs"))
    assert same_weights(model, before)
    assert not (tmp_path / "logs").exists()


def test_no_tracker_no_folder(tmp_path: Path) -> None:
    unlearn(logging_dir=str(tmp_path / "logs"), epochs=1)
    assert not (tmp_path / "logs").exists()
