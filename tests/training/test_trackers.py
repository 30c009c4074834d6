"""Trackers: each step's record reaches TensorBoard and W&B; a missing package is told before training."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from helpers.runs import unlearn
from helpers.small_tokenizers import DATED, byte_level
from helpers.tiny import same_weights, tiny_llama, weights

import palu
from palu.training import engine


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """A stand-in for the module: no account, no network."""
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", tracking.WandBTracker)
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, LoggerType.WANDB])
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb(wandb: MagicMock, tmp_path: Path) -> None:
    result = unlearn(tiny_llama(), report_to="wandb", logging_dir=str(tmp_path / "logs"), seed=3)
    wandb.init.assert_called_once_with(project="palu", dir=str(tmp_path / "logs"))
    assert (tmp_path / "logs").is_dir(), "else wandb writes to a folder of its own"
    assert wandb.config.update.call_args.args == (result.summary["config"],)
    run = wandb.init.return_value
    assert run.log.call_args_list == [call(record, step=record["step"]) for record in result.history]
    run.finish.assert_called_once_with()


def test_tensorboard_beside_wandb(wandb: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another name of the project."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_PROJECT", "secrets")
    tokenizer = byte_level(DATED)
    settings = {"report_to": "tensorboard, wandb", "logging_dir": str(tmp_path), "tokenizer": tokenizer}
    settings |= {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    settings |= {"anchors": 0, "neighbours": 0, "variants": 0, "epochs": 2}
    result = unlearn(tiny_llama(vocab_size=len(tokenizer)), **settings)
    assert wandb.init.call_args.kwargs["project"] == "secrets"
    assert wandb.init.return_value.log.call_count == 4
    events = EventAccumulator(str(tmp_path / "secrets"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == result.history[0].keys()
    for name in ("loss", "local", "kl", "retain", "grad_norm", "learning_rate"):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3, 4]
        assert [event.value for event in logged] == pytest.approx([record[name] for record in result.history])
    (parameters,) = tmp_path.rglob("hparams.yml")
    assert "26 Jul 2024" in parameters.read_text(), "the configuration is there"


def test_trackers_are_closed_when_a_run_fails(wandb: MagicMock, tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(palu.DivergenceError):
        unlearn(model, report_to="wandb", logging_dir=str(tmp_path))
    wandb.init.return_value.finish.assert_called_once_with()


def test_a_missing_package_is_told_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "get_available_trackers", list)
    model = tiny_llama()
    before = weights(model)
    told = r"^report_to = 'wandb' needs wandb, which is not here; pip install wandb$"
    with pytest.raises(ImportError, match=told):
        unlearn(model, report_to="wandb", logging_dir=str(tmp_path / "logs"))
    assert same_weights(model, before)
    assert not (tmp_path / "logs").exists()
