"""max_steps, and transformers' callbacks and evaluations within a run: what is called, and what ends the run."""

from __future__ import annotations

import functools
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.runs import TEXT_FORGET, unlearn
from helpers.scenarios import ON_CPU, Killed, assert_same, figures, kept
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.models.attention import PLAIN
from palu.ref_model.anchors import encode_anchor_prompts
from palu.training.callbacks import CALLED, LossLines


def at(event: str, function: Callable[..., Any]) -> TrainerCallback:
    """A callback that calls ``function(state, control, **given)`` at one event."""

    def call(self: Any, args: Any, state: Any, control: Any, **given: Any) -> Any:
        return function(state, control, **given)

    return type(f"At{event}", (TrainerCallback,), {f"on_{event}": call})()


def asking(event: str, name: str, step: int) -> TrainerCallback:
    """A callback that sets a field of control at an event of a step."""

    def ask(state: Any, control: TrainerControl, **_: Any) -> TrainerControl:
        setattr(control, name, state.global_step == step)
        return control

    return at(event, ask)


def test_a_long_run_prints_few_lines_of_losses(capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 91):
        state = TrainerState(global_step=step, max_steps=90)
        LossLines().on_log(None, state, TrainerControl(), logs={"step": step, "loss": 0.25, "eval_told": 1})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"step {step} of 90: loss 0.25, eval_told 1" for step in range(3, 91, 3)]


def test_the_last_step_of_a_run_that_ends_early_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for stop, printed in ((4, [2, 4]), (5, [2, 4, 5])):
        stopping = asking("step_end", "should_training_stop", stop)
        unlearn(tiny_llama(), max_steps=80, callbacks=[LossLines(), stopping])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in lines] == [f"step {number} of 80" for number in printed]


class Listener(TrainerCallback):
    """Writes down each event, the step after which it came, and what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.given: dict[str, Any] = {}

    def write_down(self, event: str, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.calls.append((event, state.global_step))
        self.given[event] = {"args": args, "state": state, **given}


for event in CALLED:
    setattr(Listener, f"on_{event}", functools.partialmethod(Listener.write_down, event))


def logit(model: LlamaForCausalLM) -> dict[str, float]:
    """A figure of the model as it is, by a pass over a padded batch."""
    ids, mask = torch.tensor([[1, 2, 3], [0, 4, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    return {"logit": model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[1, -1, 7]}


@functools.cache
def plain_run(**settings: Any) -> palu.UnlearnResult:
    """A run without callbacks: one for all tests that compare with it, which leave it as it is."""
    return unlearn(tiny_llama(), **settings)


def training_records(result: palu.UnlearnResult) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if not k.startswith("eval_")} for record in figures(result.history)]


# --- max_steps ---
@ON_CPU
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_max_steps_in_place_of_epochs(steps: int) -> None:
    """Two steps an epoch: the records are the first ones of a longer run, where the schedule looks no further."""
    result = unlearn(tiny_llama(), epochs=1, max_steps=steps)
    assert training_records(result) == training_records(plain_run())[:steps]
    assert (result.summary["steps"], result.summary["epochs"]) == (steps, -(-steps // 2))
    assert result.summary["ended_by"] is None


def test_no_more_anchors_than_max_steps_draw() -> None:
    """Three forget examples by two a step; an anchor a step."""
    tokenizer = byte_level(LLAMA3)
    forget = load_forget(TEXT_FORGET, tokenizer, max_length=200)

    def count(**settings: Any) -> int:
        config = UnlearnConfig(batch_size=2, **settings)
        return len(encode_anchor_prompts(forget, None, tokenizer, config, 1, secrets=[]).prompts)

    assert (count(epochs=2), count(epochs=2, max_steps=3), count(epochs=2, max_steps=7)) == (4, 3, 7)


# --- What callbacks are told ---
def test_events_come_in_trainers_order(tmp_path: Path) -> None:
    one = Listener()
    settings = {"epochs": 2, "eval_steps": 3, "checkpoint_dir": str(tmp_path), "checkpoint_steps": 2}
    unlearn(tiny_llama(), evaluate=logit, callbacks=[one], **settings)
    step = ("step_end", "log")
    assert one.calls == [
        ("train_begin", 0),
        ("evaluate", 0),
        ("epoch_begin", 0),
        *[("step_begin", 0), *((name, 1) for name in step)],
        *[("step_begin", 1), *((name, 2) for name in step), ("save", 2)],
        ("epoch_end", 2),
        ("epoch_begin", 2),
        *[("step_begin", 2), *((name, 3) for name in step), ("evaluate", 3)],
        *[("step_begin", 3), *((name, 4) for name in step), ("save", 4)],
        ("epoch_end", 4),
        ("evaluate", 4),
        ("train_end", 4),
    ]


@pytest.mark.parametrize("event", ["train_begin", "epoch_begin", "step_end", "epoch_end"])
def test_the_time_of_callbacks_is_no_steps(event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an hour."""
    clock, hours = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(hours))
    result = unlearn(tiny_llama(), callbacks=[at(event, lambda *_, **__: hours.append(1))])
    assert hours and all(r["tokens"] / r["tokens_per_second"] < 1800 for r in result.history)


def test_what_callbacks_are_given() -> None:
    one, model, tokenizer = Listener(), tiny_llama(vocab_size=len(byte_level())), byte_level()
    result = unlearn(
        model, None, TEXT_FORGET, [], tokenizer=tokenizer, lambda_retain=0, max_steps=3, evaluate=logit, callbacks=[one]
    )
    given = one.given["step_end"]
    assert given["args"].max_steps == 3
    assert given["model"] is model
    assert given["processing_class"] is tokenizer
    assert given["lr_scheduler"].get_last_lr() == [1e-3]
    assert type(given["optimizer"]).__name__ == "AcceleratedOptimizer"
    assert len(given["train_dataloader"]) == 1
    state = given["state"]
    assert (state.max_steps, state.num_train_epochs, state.epoch) == (3, 3, 3.0)
    assert state.is_world_process_zero and state.is_local_process_zero
    assert state.log_history == result.history
    assert one.given["log"]["logs"] == {k: v for k, v in result.history[-1].items() if k != "eval_logit"}
    assert one.given["evaluate"]["metrics"] == {"eval_logit": result.history[-1]["eval_logit"]}


@ON_CPU
def test_a_callback_may_generate() -> None:
    """As in Trainer: the model takes a padded batch, and is in training mode again, and packed, at the next step."""
    modes = []

    def generate(state: Any, control: Any, *, model: LlamaForCausalLM, **_: Any) -> None:
        model.eval()
        assert model.config._attn_implementation == "sdpa"
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False, pad_token_id=0)

    def look(model: Any, *_: Any, **__: Any) -> None:
        modes.append((model.training, model.config._attn_implementation))

    model = tiny_llama()
    model.model.register_forward_pre_hook(lambda body, _: look(body) if torch.is_grad_enabled() else None)
    result = unlearn(model, callbacks=[at("step_end", generate)])
    assert set(modes) == {(True, PLAIN)}
    assert same_weights(result.model, weights(plain_run().model))


def test_a_run_warns_of_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """transformers' own handler would miss one of its callbacks."""
    settings: dict[str, Any] = {"gradient_checkpointing": True, "callbacks": [Listener()], "evaluate": logit}
    settings |= {"checkpoint_dir": str(tmp_path), "checkpoint_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearn(tiny_llama(), **settings)
        (tmp_path / "step-00000006.safetensors").unlink()
        unlearn(tiny_llama(), **settings, resume=True)
    assert not caplog.records


# --- What callbacks may ask for ---
@ON_CPU
@pytest.mark.parametrize(
    ("event", "step", "steps"),
    [
        ("epoch_begin", 2, 3),
        ("step_begin", 2, 3),
        ("step_end", 3, 3),
        ("log", 3, 3),
        ("evaluate", 4, 4),
        ("epoch_end", 4, 4),
    ],
)
def test_a_callback_ends_the_run(event: str, step: int, steps: int, tmp_path: Path) -> None:
    """It is resumed as ended, also without the callback."""
    one, settings = Listener(), {"epochs": 4, "evaluate": logit, "eval_steps": 4, "checkpoint_dir": str(tmp_path)}
    ended = unlearn(tiny_llama(), **settings, callbacks=[asking(event, "should_training_stop", step), one])
    assert training_records(ended) == training_records(plain_run(epochs=4))[:steps]
    assert sorted(one.calls[-4:-2]) == [("epoch_end", steps), ("evaluate", steps)]
    assert one.calls[-2:] == [("save", steps), ("train_end", steps)]
    resumed = unlearn(tiny_llama(), **settings, resume=True)
    assert_same(resumed, ended)
    assert resumed.summary["ended_by"] == ended.summary["ended_by"] == "callback"


@ON_CPU
def test_a_run_that_is_ended_after_its_checkpoint_is_resumed_as_ended(tmp_path: Path) -> None:
    one, settings = Listener(), {"epochs": 4, "checkpoint_dir": str(tmp_path), "checkpoint_steps": 1}
    ended = unlearn(tiny_llama(), **settings, callbacks=[asking("epoch_end", "should_training_stop", 4), one])
    assert one.calls[-4:] == [("save", 4), ("epoch_end", 4), ("save", 4), ("train_end", 4)]
    resumed = unlearn(tiny_llama(), **settings, resume=True)
    assert_same(resumed, ended)
    assert resumed.summary["ended_by"] == "callback"


def test_asking_to_stop_after_the_last_step_changes_nothing() -> None:
    result = unlearn(tiny_llama(), max_steps=3, callbacks=[asking("step_end", "should_training_stop", 3)])
    assert result.summary["ended_by"] is None


def test_a_checkpoint_on_demand(tmp_path: Path) -> None:
    one = Listener()
    saves = [asking("step_end", "should_save", 3), asking("epoch_end", "should_save", 4)]
    unlearn(tiny_llama(), checkpoint_dir=str(tmp_path), callbacks=[*saves, one])
    assert [step for name, step in one.calls if name == "save"] == [3, 4, 6]
    assert kept(tmp_path) == [4, 6]


def test_an_evaluation_on_demand() -> None:
    for event, step in (("step_end", 3), ("epoch_end", 4), ("log", 1)):
        result = unlearn(tiny_llama(), evaluate=logit, callbacks=[asking(event, "should_evaluate", step)])
        assert [r["step"] for r in result.history if "eval_logit" in r] == [step, 6], event


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (asking("step_end", "should_epoch_stop", 2), ValueError, "step_end of a callback set should_epoch_stop, "),
        (asking("step_end", "should_evaluate", 2), ValueError, "step_end of a callback set should_evaluate; "),
        (asking("step_end", "should_save", 2), ValueError, "step_end of a callback set should_save; "),
        (at("log", lambda *_, **__: True), TypeError, "log of a callback returned a bool; return control, or nothing$"),
    ],
)
def test_what_cannot_be_done_is_said(callback: TrainerCallback, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^on_{message}"):
        unlearn(tiny_llama(), callbacks=[callback])


# --- Evaluations ---
@ON_CPU
@pytest.mark.parametrize(("dropout", "checkpointing"), [(0.3, False), (0.3, True), (0.0, False)])
def test_an_evaluation_changes_nothing(dropout: float, checkpointing: bool) -> None:
    """Bit for bit: random numbers (dropout), the mode of each module, attention, gradients, generation's settings.

    Without dropout the model is trained with packed attention.
    """
    build = functools.partial(tiny_llama, attention_dropout=dropout)

    def evaluate(model: LlamaForCausalLM) -> dict[str, float]:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(5)
        random.random(), np.random.rand()
        model.generation_config.max_new_tokens = 2
        model.generate(torch.tensor([[1, 2, 3]]), do_sample=True, pad_token_id=0)
        assert model.config._attn_implementation == "sdpa"
        return logit(model)

    plain = unlearn(build(), gradient_checkpointing=checkpointing)
    evaluated = unlearn(build(), gradient_checkpointing=checkpointing, evaluate=evaluate, eval_steps=1)
    assert training_records(evaluated) == training_records(plain)
    assert same_weights(evaluated.model, weights(plain.model))
    assert all("eval_logit" in record for record in evaluated.history)
    before, after = (float(logit(model)["logit"].detach()) for model in (build(), evaluated.model))
    assert evaluated.summary["evaluation_before"] == pytest.approx({"eval_logit": before})
    assert evaluated.history[-1]["eval_logit"] == pytest.approx(after)
    assert evaluated.model.config._attn_implementation == "sdpa"
    assert plain.summary["evaluation_before"] == {}


def test_evaluations_before_the_first_step_and_at_the_end_alone() -> None:
    result = unlearn(tiny_llama(), evaluate=lambda model: {"a": torch.tensor(2), "b": np.float32(0.5), "eval_c": True})
    metrics = {"eval_a": 2.0, "eval_b": 0.5, "eval_c": 1.0}
    assert {k: v for k, v in result.history[-1].items() if k.startswith("eval_")} == metrics
    assert result.summary["evaluation_before"] == metrics
    assert not any(k.startswith("eval_") for record in result.history[:-1] for k in record)
    json.dumps(result.history)


def test_trackers_get_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, dict(values))))
    result = unlearn(tiny_llama(), max_steps=2, evaluate=logit)
    assert logged[0] == (0, result.summary["evaluation_before"])
    assert logged[-1] == (2, {"eval_logit": result.history[-1]["eval_logit"]})


@pytest.mark.parametrize("given", [0.5, {"told": None}, {"told": "no"}])
def test_an_evaluation_of_no_numbers(given: Any) -> None:
    with pytest.raises(TypeError, match=r"^evaluate returned (a float|'told': )"):
        unlearn(tiny_llama(), evaluate=lambda model: given)


# --- Errors ---
@ON_CPU
@pytest.mark.parametrize(
    ("event", "error", "every", "checkpoints"),
    [
        ("step_end", KeyError, 9, [2]),
        ("evaluate", KeyError, 9, [2]),
        ("epoch_begin", KeyError, 9, [2]),
        ("evaluate", Killed, 1, [1]),
        ("step_begin", Killed, 1, [1, 2]),
    ],
)
def test_an_error_of_a_callback_loses_nothing(
    event: str, error: type[BaseException], every: int, checkpoints: list[int], tmp_path: Path
) -> None:
    """The model has the last step's weights and its own settings; the run goes on from its checkpoint."""
    settings: dict[str, Any] = {"evaluate": logit, "eval_steps": 2}
    expected = plain_run(**settings)
    settings |= {"checkpoint_dir": str(tmp_path), "checkpoint_steps": every}

    def fail(state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise error("mine")

    model = tiny_llama()
    with pytest.raises(error, match="mine"):
        unlearn(model, **settings, callbacks=[at(event, fail)])
    assert same_weights(model, weights(plain_run(max_steps=2).model))
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert kept(tmp_path) == checkpoints
    resumed = unlearn(tiny_llama(), **settings, resume=True)
    assert resumed.summary["evaluation_before"] == expected.summary["evaluation_before"] != {}
    assert_same(resumed, expected)


@ON_CPU
def test_an_evaluation_that_failed_is_made_up_for(tmp_path: Path) -> None:
    calls = []

    def evaluate(model: LlamaForCausalLM) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no room")
        return logit(model)

    settings: dict[str, Any] = {"eval_steps": 4, "checkpoint_dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match="no room"):
        unlearn(tiny_llama(), evaluate=evaluate, **settings)
    resumed = unlearn(tiny_llama(), evaluate=evaluate, resume=True, **settings)
    assert figures(resumed.history) == figures(plain_run(evaluate=logit, eval_steps=4).history)


class Mine(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise AssertionError


def test_events_that_never_come_are_warned_of() -> None:
    said = r"callbacks\[0\]: palu.unlearn never calls on_pre_optimizer_step of Mine"
    with pytest.warns(UserWarning, match=f"^{said}$") as caught:
        unlearn(tiny_llama(), max_steps=1, callbacks=[Mine()])
    assert Path(caught[0].filename).name == "runs.py", "it points at the caller of palu.unlearn"
