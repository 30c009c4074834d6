"""PaluTrainer: the run of palu.unlearn, and what users of transformers.Trainer expect of a Trainer."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.runs import ENTROPY
from helpers.scenarios import SCENARIOS, STEPS, TRAINER_CANNOT, figures, loop_result, make_trainer, with_lora
from helpers.tiny import padded, retain_rows, same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM

import palu
from palu import CheckpointError
from palu.methods.base import FEWEST_STEPS
from palu.training.trainer import REFUSED, TRAINERS

CLOCKED = ("epoch", "learning_rate")  # which Trainer tells in its own way


# --- The run of palu.unlearn ---
@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - TRAINER_CANNOT))
def test_step_by_step(name: str, tmp_path: Path) -> None:
    """The same losses and gradient norms at every step and the same weights in the end, bit by bit."""
    scenario = SCENARIOS[name]
    one, other = scenario.trainer(tmp_path / "out"), loop_result(name)
    assert figures(one.history, *CLOCKED) == figures(other.history, *CLOCKED)
    assert len(one.history) == one.state.global_step == STEPS
    assert same_weights(one.model, weights(other.model))
    assert not same_weights(one.model, weights(scenario.build()))


def test_reentrant_checkpoints(tmp_path: Path) -> None:
    name = "checkpointed lora"
    one = SCENARIOS[name].trainer(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True})
    assert figures(one.history, *CLOCKED) == figures(loop_result(name).history, *CLOCKED)


def test_mixed_precision(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        one = SCENARIOS["local entropy"].trainer(tmp_path, bf16=True)
        assert one.accelerator.mixed_precision == "bf16"
        first = one.history[0]["loss"]
        assert figures(one.history, *CLOCKED) == figures(SCENARIOS["local entropy"].loop().history, *CLOCKED)
        one.train()  # accelerate wraps the model's forward again
        assert len(one.history) == STEPS and one.history[0]["loss"] < first
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_one_cache_on_disk_serves_both(tmp_path: Path) -> None:
    cached = SCENARIOS["reference"]._replace(settings={"cache_dir": str(tmp_path / "cache")})
    one, other = cached.trainer(tmp_path / "out"), cached.loop()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert figures(one.history, *CLOCKED) == figures(other.history, *CLOCKED)


# --- A Trainer ---
def test_logs_and_evaluation(tmp_path: Path) -> None:
    """The terms are means over the steps since the last log; evaluation is the plain model's, also in between."""
    inputs, labels = padded(retain_rows(6))
    columns = inputs | {"labels": labels}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "per_device_eval_batch_size": 6}
    one = make_trainer(tmp_path, config=ENTROPY, arguments=settings, eval_dataset=rows)
    attention = one.model.config._attn_implementation
    before = one.evaluate()["eval_loss"]
    assert before == pytest.approx(tiny_llama()(**inputs, labels=labels).loss.item(), rel=1e-5)
    output = one.train()
    assert output.training_loss == pytest.approx(sum(r["loss"] for r in one.history) / STEPS, rel=1e-6)
    trained = [logs for logs in one.state.log_history if "loss" in logs]
    assert len(trained) == 3
    for number, logs in enumerate(trained):
        for name in ("loss", "local", "kl", "retain"):
            mean = sum(record[name] for record in one.history[3 * number : 3 * number + 3]) / 3
            assert logs[name] == pytest.approx(mean, rel=1e-6), name
        assert logs["grad_norm"] == pytest.approx(one.history[3 * number + 2]["grad_norm"], rel=1e-5)
    evaluated = [logs["eval_loss"] for logs in one.state.log_history if "eval_loss" in logs]
    assert len(evaluated) == 3 and len({before, *evaluated}) == 4
    assert one.evaluate()["eval_loss"] == pytest.approx(evaluated[-1])
    assert "forward" not in vars(one.model) and one.model.config._attn_implementation == attention


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_the_plain_model(lora: bool, tmp_path: Path) -> None:
    one = make_trainer(tmp_path, with_lora() if lora else None, arguments={"max_steps": 2})
    one.train()
    one.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "palu.json" not in names and ("adapter_config.json" in names) == lora
    loaded: Any = (
        peft.PeftModel.from_pretrained(tiny_llama(), tmp_path) if lora else LlamaForCausalLM.from_pretrained(tmp_path)
    )
    inputs = padded(retain_rows(2))[0]
    assert torch.equal(loaded.eval()(**inputs).logits, one.model.eval()(**inputs).logits)


@pytest.mark.parametrize(("name", "stop"), [("dropout", 4), ("npo", 3)])
def test_resume_from_checkpoint(name: str, stop: int, tmp_path: Path) -> None:
    """In an epoch and at its end; with dropout, and with another objective: the same bits."""
    scenario, saving = SCENARIOS[name], {"save_strategy": "steps", "save_steps": 1}
    whole = scenario.trainer(tmp_path, **saving)
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > stop:
            shutil.rmtree(folder)
    resumed = scenario.trainer(tmp_path, resume=True)
    assert resumed.history == whole.history
    assert same_weights(resumed.model, weights(whole.model))
    state = json.loads((tmp_path / f"checkpoint-{stop}" / "palu.json").read_text())
    assert state == {"made_with": whole.made_with, "history": whole.history[:stop]}


def test_resuming_with_another_reference_is_refused(tmp_path: Path) -> None:
    """The trap: the checkpoint's model in place of the starting model would be the reference."""
    make_trainer(tmp_path, arguments={"save_strategy": "steps", "save_steps": 2, "max_steps": 2}).train()
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError, match="belongs to a run with another reference"):
        make_trainer(tmp_path, LlamaForCausalLM.from_pretrained(folder)).train(resume_from_checkpoint=str(folder))
    for config, told in (({"lambda_kl": 3.0}, "lambda_kl"), ({"probability_floor": 0.5}, "probability_floor")):
        with pytest.raises(CheckpointError, match=f"belongs to a run with another {told}; "):
            make_trainer(tmp_path, config=config).train(resume_from_checkpoint=str(folder))
    with pytest.raises(CheckpointError, match="belongs to a run with another retain set; "):
        make_trainer(tmp_path, retain=retain_rows(3)).train(resume_from_checkpoint=str(folder))
    (folder / "palu.json").unlink()
    with pytest.raises(CheckpointError, match="is no checkpoint of PaluTrainer"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_max_steps_and_stopping_early(tmp_path: Path) -> None:
    one = make_trainer(tmp_path, arguments={"max_steps": 4})
    one.train()
    assert len(one.history) == 4
    forgotten = make_trainer(tmp_path, config={"probability_floor": 0.01}, arguments={"num_train_epochs": 40})
    forgotten.train()
    assert len(forgotten.history) == forgotten.state.global_step == FEWEST_STEPS
    assert 0 < max(record["onset_probability"] for record in forgotten.history) < 0.05
    assert forgotten.state.log_history[0]["onset_probability"] == forgotten.history[0]["onset_probability"]


def test_divergence(tmp_path: Path) -> None:
    """The step is not taken, as in palu.unlearn."""
    model = tiny_llama()
    one = make_trainer(tmp_path, model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    before = weights(model)
    with pytest.raises(palu.DivergenceError, match=r"^step 1: "):
        one.train()
    assert same_weights(model, before)
    assert "forward" not in vars(model)


# --- What is refused ---
OTHER: dict[str, Any] = {"lr_scheduler": "cosine", "gradient_checkpointing": True}
OTHER |= {"progress": False, "checkpoint_dir": "x", "logging_dir": "x", "report_to": "wandb"}
NEED_A_FOLDER = {"checkpoint_minutes", "checkpoint_steps", "resume"}  # which is refused first


@pytest.mark.parametrize("field", sorted(TRAINERS.keys() - NEED_A_FOLDER))
def test_settings_that_trainer_decides(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*: PaluTrainer goes by Trainer's {TRAINERS[field]};"):
        make_trainer(tmp_path, config={field: OTHER.get(field, 2)})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *(({"arguments": {name: 0.1 if "factor" in name else True}}, name) for name in REFUSED if name != "fp16"),
        ({"arguments": {"train_sampling_strategy": "sequential"}}, "train_sampling_strategy"),
        ({"arguments": {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}}, "num_steps"),
        ({"train_dataset": [1]}, "train_dataset"),
        ({"model_init": tiny_llama}, "model_init"),
        ({"compute_loss_func": print}, "compute_loss_func"),
        ({"retain": []}, "retain set"),
        ({"forget": []}, "forget set"),
        ({"ref_model": torch.nn.Linear(2, 2)}, "ref_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_arguments_that_cannot_have_their_effect(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Before the model is touched."""
    model = tiny_llama()
    model.to = None  # type: ignore[assignment]
    with pytest.raises((ValueError, TypeError), match=told):
        make_trainer(tmp_path, model, **given)
    assert model.config.use_cache
