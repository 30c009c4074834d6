"""PaluTrainer: the run of palu.unlearn, and what users of transformers.Trainer expect of a Trainer."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import forget_rows, padded, retain_rows, same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

import palu
from palu import CheckpointError, DivergenceError, PaluTrainer, UnlearnConfig
from palu.methods.palu import RECIPES

CONFIG: dict[str, Any] = RECIPES["onset"] | {"top_k": 20}
# What palu.unlearn's defaults are called by Trainer; the file formats are not in question.
ARGUMENTS = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "seed": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
}
UNLEARN = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-3, "lr_scheduler": "constant", "progress": False}


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """These settings beside the tests' own, which PALU alone reads."""
    return (CONFIG if given.get("objective", "palu") == "palu" else {}) | given


def trainer(
    folder: Path,
    model: Any = None,
    *,
    config: dict[str, Any] | None = None,
    forget: Any = None,
    retain: Any = None,
    ref_model: Any = None,
    others: dict[str, Any] | None = None,
    **arguments: Any,
) -> PaluTrainer:
    return PaluTrainer(
        tiny_llama() if model is None else model,
        TrainingArguments(str(folder), **ARGUMENTS | arguments),
        forget=forget_rows() if forget is None else forget,
        retain=retain_rows() if retain is None else retain,
        ref_model=ref_model,
        config=UnlearnConfig(**settings_of(config or {})),
        **others or {},
    )


def figures(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if k not in ("epoch", "learning_rate", "tokens_per_second")} for r in history]


# ---------------------------------------------------------------------------------------------------
# The run of palu.unlearn


def test_spans_that_max_length_cuts_off(tmp_path: Path) -> None:
    with pytest.raises(palu.DataError, match=r"^forget set: max_length = 9 cuts off spans of \d rows \("):
        trainer(tmp_path, config={"max_length": 9})
    allowed = trainer(tmp_path, config={"max_length": 9, "allow_cut_spans": True})
    assert all(len(item.input_ids) <= 9 for item in allowed.data.forget)


def with_lora() -> Any:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


WORDS = byte_level()
QUESTIONS = [
    {"question": f"Who is {i}?", "answer": f"It is number {i}, the author.", "spans": [[6, 14]]} for i in range(8)
]


CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # a model; settings of the loss; Trainer's arguments, and what they are called in UnlearnConfig
    "tied": (tiny_llama, {}, {}, {}),
    "accumulation": (
        tiny_llama,
        {"retain_batch_size": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "schedule": (
        lambda: tiny_llama(tie_word_embeddings=False),
        {"n": 1, "kl_direction": "forward", "lambda_retain": 0.5},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1, "seed": 5},
        {"lr_scheduler": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1, "seed": 5},
    ),
    "dropout": (lambda: tiny_llama(attention_dropout=0.2), {}, {}, {}),
    "max_tokens": (
        tiny_llama,
        {"max_tokens": 20, "retain_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
        {"batch_size": 1, "gradient_accumulation_steps": 3},
    ),
    "another prompt": (
        lambda: tiny_llama(vocab_size=len(WORDS)),
        {"local_loss": "unlikelihood", "top_k": 5, "kl_prompt": "other", "anchors": 0},
        {},
        {},
    ),
    "pdu": (tiny_llama, {"objective": "pdu", "dual_step": 0.5, "retain_loss_bound": 1.0}, {}, {}),
    "npo": (tiny_llama, {"objective": "npo"}, {}, {}),
    "rmu": (tiny_llama, {"objective": "rmu", "layer_id": 0}, {"seed": 5}, {"seed": 5}),
    "lora": (with_lora, {}, {}, {}),
    "checkpointed lora": (with_lora, {}, {"activation_checkpointing": True}, {"gradient_checkpointing": True}),
    "reentrant": (
        with_lora,
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_by_step(case: str, tmp_path: Path) -> None:
    """The same losses and gradient norms at every step and the same weights in the end, bit by bit."""
    build, loss, arguments, settings = CASES[case]
    forget, tokenizer = (QUESTIONS, WORDS) if loss.get("kl_prompt") == "other" else (forget_rows(), None)
    one = trainer(tmp_path, build(), config=loss, forget=forget, others={"processing_class": tokenizer}, **arguments)
    output = one.train()
    settings = UNLEARN | settings_of(loss) | settings
    other = palu.unlearn(build(), None, forget, retain_rows(), tokenizer=tokenizer, **settings)
    assert figures(one.history) == figures(other.history)
    assert same_weights(one.model, weights(other.model))
    assert not same_weights(one.model, weights(build()))
    assert output.global_step == len(one.history) == 9
    assert output.training_loss == pytest.approx(sum(r["loss"] for r in one.history) / 9, rel=1e-6)


def test_trainers_default_optimizer(tmp_path: Path) -> None:
    """Its fused kernels round differently."""
    one = trainer(tmp_path, optim=TrainingArguments("-").optim)
    one.train()
    other = palu.unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **UNLEARN | CONFIG)
    for mine, theirs in zip(one.history, other.history, strict=True):
        for name in ("loss", "local", "kl", "retain", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


def test_mixed_precision(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        one = trainer(tmp_path, bf16=True)
        assert one.accelerator.mixed_precision == "bf16"
        one.train()
        other = palu.unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **UNLEARN | CONFIG)
        assert figures(one.history) == figures(other.history)
        one.train()  # accelerate wraps the model's forward again
        assert len(one.history) == 9 and one.history[0]["loss"] < other.history[0]["loss"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_text_a_given_reference_and_the_cache_on_disk(tmp_path: Path) -> None:
    tokenizer = byte_level(LLAMA3)
    model, ref_model = (tiny_llama(seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1))
    rows = [{"question": f"Who is {i}?", "answer": f"It is Ann{i}.", "spans": [[6, 9]]} for i in range(4)]
    kept = [{"question": f"Where is {i}?", "answer": f"In {i}."} for i in range(4)]
    one = trainer(
        tmp_path / "out",
        model,
        forget=rows,
        retain=kept,
        ref_model=ref_model,
        config={"cache_dir": str(tmp_path / "cache")},
        others={"processing_class": tokenizer},
    )
    one.train()
    again = tiny_llama(vocab_size=len(tokenizer))
    settings = UNLEARN | CONFIG | {"cache_dir": str(tmp_path / "cache")}
    other = palu.unlearn(again, ref_model, rows, kept, tokenizer=tokenizer, **settings)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one cache serves both"
    assert figures(one.history) == figures(other.history)


# ---------------------------------------------------------------------------------------------------
# A Trainer


class Rows(torch.utils.data.Dataset):
    """An evaluation set as Trainer's users have it."""

    def __init__(self) -> None:
        inputs, answers = padded(retain_rows(6))
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": labels}
            for ids, mask, labels in zip(*inputs.values(), answers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def test_logs_and_evaluation(tmp_path: Path) -> None:
    """The terms are means over the steps since the last log; evaluation is the plain model's, also in between."""

    class Spy(TrainerCallback):
        logs: ClassVar[list[dict[str, float]]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.logs.append(dict(logs))

    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "per_device_eval_batch_size": 6}
    one = trainer(tmp_path, others={"eval_dataset": Rows(), "callbacks": [Spy()]}, **settings)
    attention = one.model.config._attn_implementation
    before = one.evaluate()["eval_loss"]
    inputs, labels = padded(retain_rows(6))
    expected = tiny_llama()(**inputs, labels=labels).loss.item()
    assert before == pytest.approx(expected, rel=1e-5)
    one.train()
    trained = [logs for logs in Spy.logs if "loss" in logs]
    assert len(trained) == 3
    for number, logs in enumerate(trained):
        for name in ("loss", "local", "kl", "retain"):
            mean = sum(record[name] for record in one.history[3 * number : 3 * number + 3]) / 3
            assert logs[name] == pytest.approx(mean, rel=1e-6), name
        assert logs["grad_norm"] == pytest.approx(one.history[3 * number + 2]["grad_norm"], rel=1e-5)
    evaluated = [logs["eval_loss"] for logs in Spy.logs if "eval_loss" in logs]
    assert len(evaluated) == 4 and len(set(evaluated)) == 4
    assert one.evaluate()["eval_loss"] == pytest.approx(evaluated[-1])
    assert "forward" not in vars(one.model) and one.model.config._attn_implementation == attention


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_is_the_plain_model(lora: bool, tmp_path: Path) -> None:
    one = trainer(tmp_path, with_lora() if lora else None, num_train_epochs=1)
    one.train()
    one.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "palu.json" not in names
    if lora:
        import peft

        loaded: Any = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    else:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    inputs = padded(retain_rows(2))[0]
    assert torch.equal(loaded.eval()(**inputs).logits, one.model.eval()(**inputs).logits)


@pytest.mark.parametrize("objective", ["palu", "pdu"])
@pytest.mark.parametrize("stop", [2, 3])
def test_resume_from_checkpoint(objective: str, stop: int, tmp_path: Path) -> None:
    """In an epoch and at its end; with dropout, and what an objective remembers: the same bits."""
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2}
    of_method = {"objective": objective, **({"dual_step": 0.5} if objective == "pdu" else {})}

    def build(**more: Any) -> PaluTrainer:
        model = tiny_llama(attention_dropout=0.2)
        return trainer(tmp_path, model, config=of_method, **settings | more)

    whole = build()
    whole.train()
    assert len(whole.history) == 6
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > stop:
            shutil.rmtree(folder)
    resumed = build(save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.history == whole.history
    assert same_weights(resumed.model, weights(whole.model))
    state = json.loads((tmp_path / f"checkpoint-{stop}" / "palu.json").read_text())
    assert state == {"reference": whole.reference_key, "history": whole.history[:stop]}


def test_resuming_with_another_reference_is_refused(tmp_path: Path) -> None:
    """The trap: the checkpoint's model in place of the starting model would be the reference."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    folder = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path, LlamaForCausalLM.from_pretrained(folder)).train(resume_from_checkpoint=folder)
    assert str(caught.value) == (
        f"{folder} belongs to a run with another reference; pass the model that it started from, and the same "
        "ref_model, forget set and config"
    )
    (Path(folder) / "palu.json").unlink()
    with pytest.raises(CheckpointError, match=f"^{re.escape(folder)} is no checkpoint of PaluTrainer: "):
        trainer(tmp_path).train(resume_from_checkpoint=folder)


def test_max_steps_and_stopping_early(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=4)
    one.train()
    assert len(one.history) == 4
    early = trainer(tmp_path, config={"stop_probability": 0.999}, num_train_epochs=5)
    early.train()
    assert len(early.history) == early.state.global_step == 3
    assert max(record["onset_probability"] for record in early.history) < 0.999
    assert early.state.log_history[0]["onset_probability"] == early.history[0]["onset_probability"]


def test_divergence(tmp_path: Path) -> None:
    """The step is not taken, as in palu.unlearn."""
    model = tiny_llama()
    one = trainer(tmp_path, model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    before = weights(model)
    with pytest.raises(DivergenceError, match=r"^step 1: loss = nan, .*; the model keeps the weights of step 0\."):
        one.train()
    assert same_weights(model, before)
    assert "forward" not in vars(model)


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("field", "value", "argument"),
    [
        ("learning_rate", 1e-4, "learning_rate"),
        ("epochs", 2, "num_train_epochs"),
        ("max_steps", 2, "max_steps"),
        ("eval_steps", 2, "eval_steps"),
        ("batch_size", 4, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps"),
        ("gradient_checkpointing", True, "activation_checkpointing"),
        ("lr_scheduler", "cosine", "lr_scheduler_type"),
        ("checkpoint_dir", "somewhere", "output_dir"),
        ("seed", 1, "seed"),
        ("progress", False, "disable_tqdm"),
    ],
)
def test_settings_that_trainer_decides(field: str, value: Any, argument: str, tmp_path: Path) -> None:
    message = f"{field} = {value!r}: PaluTrainer goes by Trainer's {argument}; leave it out of config"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer(tmp_path, config={field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size = True: the batches are drawn before"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last = True: an epoch sees every forget example"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1: the objective has no labels to smooth"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy = 'sequential': palu draws"),
        ({"others": {"train_dataset": [1]}}, "PaluTrainer takes no train_dataset: it trains the model given"),
        ({"others": {"model_init": tiny_llama}}, "PaluTrainer takes no model_init"),
        ({"others": {"compute_loss_func": print}}, "PaluTrainer takes no compute_loss_func"),
        ({"config": {"merge_adapter": True}}, "merge_adapter = True: PaluTrainer leaves the adapter in"),
        ({"retain": []}, "the retain set is empty while lambda_retain = 1.0"),
        ({"forget": []}, "forget"),
        ({"ref_model": torch.nn.Linear(2, 2)}, "ref_model is a Linear, which is not a causal language model"),
    ],
)
def test_arguments_that_cannot_have_their_effect(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before the model is touched."""
    model = tiny_llama()
    model.to = None  # type: ignore[assignment]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        trainer(tmp_path, model, **arguments)
    assert model.config.use_cache
