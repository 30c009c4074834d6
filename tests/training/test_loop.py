"""palu.unlearn on a tiny Llama: what it changes, what it leaves alone, and which runs are equal."""

import copy
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import textbook
from helpers.runs import ENTROPY, LOSSES, TEXT_FORGET, TEXT_RETAIN, assert_same_run, live_bytes, unlearn
from helpers.small_tokenizers import CHATML, DATED, byte_level, sentencepiece
from helpers.tiny import (
    VOCAB,
    Row,
    answer_probabilities,
    forget_rows,
    overfit,
    retain_rows,
    rmu_layer,
    same_weights,
    tiny_llama,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import Packed, forget_items
from palu.data.rows import Renderer
from palu.losses import fused_linear_losses
from palu.methods import METHODS
from palu.methods import palu as palu_method
from palu.methods.base import ForgetSet
from palu.methods.palu import RECIPES, PaluMethod
from palu.models.root import ModelRoot
from palu.ref_model.anchors import AnchorPrompts, anchor_texts
from palu.ref_model.precompute import precompute_reference
from palu.report.recorder import GENERAL
from palu.training import loop
from palu.training.step import ending

FIELDS = {"step", "epoch", "loss", "local", "kl", "retain", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}


# --- What a run gives, and what it leaves alone ---
def test_history_and_summary() -> None:
    model = tiny_llama()
    config = UnlearnConfig(n=2, epochs=7, lambda_kl=2.0)
    result = unlearn(model, config=config, epochs=2, batch_size=3, n=2)
    assert result.model is model
    last = ", ".join(f"{name} {result.history[-1][name]:.3g}" for name in ("loss", "local", "kl", "retain"))
    assert repr(result) == str(result) == f"UnlearnResult(steps 6, {last})"
    assert [record["step"] for record in result.history] == list(range(1, 7))
    assert [record["epoch"] for record in result.history] == [1, 1, 1, 2, 2, 2]
    for record in result.history:
        assert record.keys() == FIELDS
        assert all(math.isfinite(value) for value in record.values())
        assert record["loss"] == pytest.approx(record["local"] + 2 * record["kl"] + record["retain"])
        assert record["learning_rate"] == 1e-3
        assert record["tokens_per_second"] > 0
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 2, None)
    summary = result.summary
    assert summary["forget_examples"] == 8
    assert summary["forget_without_span"] == summary["forget_skipped"] == summary["retain_skipped"] == 0
    assert summary["retain_examples"] == 12
    assert summary["onset_tokens"] == sum(item.targets for item in items)
    assert summary["ordinary_tokens"] == sum(label == -200 for row in forget_rows() for label in row["labels"])
    assert (summary["steps"], summary["epochs"], summary["ended_by"]) == (6, 2, None)
    # Overrides replace fields of the configuration given, helper's defaults among them.
    assert (summary["config"]["n"], summary["config"]["epochs"], summary["config"]["top_k"]) == (2, 2, 20)
    json.dumps(result.history)
    json.dumps(summary)


@pytest.mark.parametrize(
    ("attention", "checkpointing", "training"), [("sdpa", True, False), ("sdpa", False, True), ("eager", True, True)]
)
def test_what_was_set_is_set_back(attention: str, checkpointing: bool, training: bool) -> None:
    model, ref_model = tiny_llama(attention=attention), tiny_llama(seed=1, attention=attention)
    model.train(training)
    ref_model.train(not training)
    ref_before = weights(ref_model)
    unlearn(model, ref_model, epochs=1, gradient_checkpointing=checkpointing)
    assert model.training == training
    assert ref_model.training != training
    assert ref_model.device.type == "cpu"
    assert same_weights(ref_model, ref_before)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *ref_model.parameters()))
    for each in (model, ref_model):
        assert each.config._attn_implementation == attention
        assert not any(getattr(m, "gradient_checkpointing", False) for m in each.modules())


def test_checkpointing_that_was_on_stays_on() -> None:
    model = tiny_llama()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    unlearn(model, epochs=1, gradient_checkpointing=True)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_settings_are_set_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError

    model = tiny_llama()
    monkeypatch.setattr("palu.training.datasets.UnlearnDataLoader", fail)
    with pytest.raises(KeyError):
        unlearn(model, gradient_checkpointing=True)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_no_module_takes_the_place_of_a_function() -> None:
    """Importing a submodule sets its name on the package: none may be called as a public function is."""
    for name in palu.__all__:
        assert name in (*palu._SUBMODULES, "__version__") or importlib.util.find_spec(f"palu.{name}") is None, name


# --- It unlearns ---
@pytest.fixture(scope="module")
def knowing() -> dict[str, Tensor]:
    """Weights of a model that knows every answer by heart."""
    model = tiny_llama()
    overfit(model, forget_rows() + retain_rows())
    assert answer_probabilities(model, forget_rows() + retain_rows()).min() > 0.8
    return weights(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_direction": "forward", "n": 1},
        {"target": "local_mean"},
        {"target": -2.0, "n": -1},
        {"target": "global_mean_detached", "top_k": 1},
        {"local_loss": "unlikelihood"},
    ],
    ids=str,
)
def test_secrets_go_and_the_rest_stays(knowing: dict[str, Tensor], settings: dict) -> None:
    model = tiny_llama()
    model.load_state_dict(knowing)
    result = unlearn(model, learning_rate=3e-3, epochs=15, **settings)
    first, last = result.history[0], result.history[-1]
    assert last["local"] < 0.2 * first["local"]
    # The first token of every span is an onset token whatever n is.
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 1, None)
    rows: list[Row] = []
    for row, item in zip(forget_rows(), items, strict=True):
        onset = {int(t) + 1 for t in item.rows[: item.targets]}
        labels = [token if t in onset else -200 for t, token in enumerate(row["input_ids"])]
        rows.append({"input_ids": row["input_ids"], "labels": [-100, *labels[1:]]})
    model.cpu()
    assert answer_probabilities(model, rows, sensitive_only=True).mean() < 0.2
    assert answer_probabilities(model, retain_rows()).mean() > 0.8


def test_it_ends_when_all_is_forgotten(knowing: dict[str, Tensor]) -> None:
    """As long again as it took until every onset token stayed below a little more than the floor for two epochs."""
    model = tiny_llama()
    model.load_state_dict(knowing)
    settings: dict[str, Any] = {"learning_rate": 3e-3, "epochs": None, "local_loss": "unlikelihood"}
    result = unlearn(model, **settings)
    assert result.summary["ended_by"] == "forgotten"
    epochs, config = result.summary["epochs"], result_config(result)
    assert config.epochs == config.method.epochs > epochs > 3
    records = [[r for r in result.history if r["epoch"] == epoch] for epoch in range(1, epochs + 1)]
    below = [max(r["onset_probability"] for r in epoch) < config.method.ends_below for epoch in records]
    twice = [i for i in range(1, epochs) if below[i - 1] and below[i]]
    assert twice[0] > 1, "it took more than one epoch"
    assert epochs == next(i + 1 for i in twice if i + 1 >= 2 * (twice[0] - 1)), "and no sooner"


@pytest.mark.parametrize(
    ("ended_by", "highest", "neighbours", "said"),
    [
        ("forgotten", 0.03, 5, "palu: 2 steps; no token to be forgotten is above 0.1 among its candidates any more"),
        (
            None,
            0.34,
            None,
            "the likeliest token to be forgotten had 0.34 among its candidates; allow more epochs, or",
        ),
        (None, 0.03, 0, "had 0.03 among its candidates. The reference wrote no question like those to be forgotten:"),
        ("callback", 0.34, None, "palu: 2 steps; ended by callback"),
    ],
)
def test_the_last_line(ended_by: str | None, highest: float, neighbours: int | None, said: str) -> None:
    method: Any = SimpleNamespace(settings=UnlearnConfig().method)
    history = [{"onset_probability": 0.9}, {"onset_probability": highest}]
    assert said in ending(history, ended_by, method, neighbours=neighbours)


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"probability_floor": 0.99}, 2),
        ({"probability_floor": 0.99, "gamma": 0}, 3),  # nothing was to be forgotten
        ({"probability_floor": 0.99, "max_steps": 3}, 2),
        ({"objective": "npo"}, 3),
    ],
    ids=str,
)
def test_when_a_run_ends_by_itself(settings: dict[str, Any], epochs: int) -> None:
    own = {} if "objective" in settings else {"local_loss": "unlikelihood"}
    result = unlearn(tiny_llama(), **own | settings)
    assert result.summary["epochs"] == epochs
    assert (result.summary["ended_by"] == "forgotten") == (epochs == 2 and "max_steps" not in settings)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 48),
        ({"probability_floor": 0.0}, 8),
        ({"local_loss": "topk_mse"}, 8),
        ({"objective": "npo"}, 8),
        ({"epochs": 3}, 3),
    ],
)
def test_the_methods_epochs(settings: dict[str, Any], most: int) -> None:
    assert UnlearnConfig(**settings).total_steps(5) == 5 * most


# --- Data ---
@pytest.mark.parametrize("build", [lambda: byte_level(), lambda: sentencepiece(CHATML)])
def test_text_and_spans(build: Callable, tmp_path: Path) -> None:
    tokenizer = build()
    vocab = len(tokenizer)
    given: dict[str, Any] = {"tokenizer": tokenizer, "neighbours": 0, "variants": 0}  # tokenised rows have none
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, TEXT_FORGET)))
    (tmp_path / "retain.jsonl").write_text("\n".join(map(json.dumps, TEXT_RETAIN)))
    from_dicts = unlearn(tiny_llama(vocab_size=vocab), None, TEXT_FORGET, TEXT_RETAIN, **given)
    from_files = unlearn(
        tiny_llama(vocab_size=vocab),
        None,
        tmp_path / "forget.jsonl",
        str(tmp_path / "retain.jsonl"),
        **given,
    )
    assert from_dicts.summary["forget_examples"] == 3
    assert from_dicts.summary["forget_without_span"] == 1
    assert from_dicts.summary["retain_examples"] == 2
    assert_same_run(from_dicts, from_files, 0 if from_dicts.summary["device"] == "cpu" else 1e-5)
    tokenised = [
        {"input_ids": e.input_ids, "labels": e.labels}
        for e in load_forget(TEXT_FORGET, tokenizer, max_length=1024).examples
    ]
    from_tokens = unlearn(tiny_llama(vocab_size=vocab), None, tokenised, TEXT_RETAIN, **given)
    assert_same_run(from_dicts, from_tokens, 0 if from_dicts.summary["device"] == "cpu" else 1e-5)


def test_examples_without_a_span_enter_the_kl_alone() -> None:
    plain = [
        {"input_ids": row["input_ids"], "labels": [x if x < 0 else -200 for x in row["labels"]]}
        for row in forget_rows(3, seed=5)
    ]
    model = tiny_llama()
    result = unlearn(model, tiny_llama(seed=3), forget_rows(2) + plain, [], epochs=1, batch_size=5, lambda_retain=0)
    only = unlearn(tiny_llama(), tiny_llama(seed=3), forget_rows(2), [], epochs=1, batch_size=5, lambda_retain=0)
    assert result.summary["forget_without_span"] == 3
    assert only.summary["forget_without_span"] == 0
    assert result.summary["onset_tokens"] == only.summary["onset_tokens"]
    added = sum(label == -200 for row in plain for label in row["labels"])
    assert result.summary["ordinary_tokens"] == only.summary["ordinary_tokens"] + added
    assert result.history[0]["local"] == pytest.approx(only.history[0]["local"], rel=1e-5)
    assert result.history[0]["kl"] != pytest.approx(only.history[0]["kl"], rel=1e-3)


def test_rows_that_are_cut_off_are_counted() -> None:
    long, first, last = (
        {"input_ids": list(range(start, start + 60)), "labels": [-100] * 50 + list(range(start + 50, start + 60))}
        for start in range(3)
    )
    forget, retain = [*forget_rows(3), long], [first, *retain_rows(4), last]
    result = unlearn(tiny_llama(), None, forget, retain, epochs=1, max_length=40, allow_cut_spans=True)
    assert (result.summary["forget_examples"], result.summary["forget_skipped"]) == (3, 1)
    assert (result.summary["forget_spans_cut"], result.summary["forget_all_spans_cut"]) == (1, 0)
    assert (result.summary["retain_examples"], result.summary["retain_skipped"]) == (4, 2)


def test_every_text_is_rendered_with_the_values_for_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of both sets, of the alternate answers, of the anchors' prompts and of the record."""
    tokenizer = byte_level(DATED)
    seen: list[tuple[str, Any]] = []
    render = tokenizer.apply_chat_template

    def record(conversation: Any, **kwargs: Any) -> Any:
        seen.append((conversation[0]["content"], kwargs.get("date_string")))
        return render(conversation, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", record)
    config = UnlearnConfig(epochs=1, progress=False, chat_template_kwargs={"date_string": "26 Jul 2024"})
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    palu.Recorder(model, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, config=config)
    everyday, rows = set(anchor_texts()), {row["question"] for row in TEXT_FORGET + TEXT_RETAIN}
    assert {question for question, _ in seen} == rows | set(anchor_texts()[-GENERAL:])
    palu.unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, config=config)
    assert len({question for question, _ in seen} & everyday) == GENERAL + 4, "anchors, too"
    forget = [{**row, "alternate": "No."} for row in TEXT_FORGET]
    palu.unlearn(model, None, forget, TEXT_RETAIN, tokenizer=tokenizer, config=config, objective="dpo")
    unmarked, values = {"question": "Who?", "answer": "Ada."}, {"chat_template_kwargs": config.chat_template_kwargs}
    palu.annotate([unmarked, TEXT_FORGET[0]], "contrast", model, tokenizer, progress=False, **values)
    assert {date for _, date in seen} == {"26 Jul 2024"}


def test_a_prompt_that_generation_does_not_give_is_told_once() -> None:
    thought = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    tokenizer = byte_level(CHATML.replace("{{ m['content'] }}", thought + "{{ m['content'] }}"))
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    with pytest.warns(UserWarning, match="prompt for generation") as caught:
        unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, tokenizer=tokenizer, epochs=1)
    told = [str(one.message) for one in caught if "prompt for generation" in str(one.message)]
    assert [one.partition(":")[0] for one in told] == ["forget row 0", "retain row 0"]


@pytest.mark.parametrize("retain", [[], retain_rows()])
def test_without_a_retain_loss(retain: Any) -> None:
    model = tiny_llama()
    result = palu.unlearn(model, None, forget_rows(), retain, lambda_retain=0, epochs=1, progress=False)
    assert result.summary["retain_examples"] == 0
    assert result.history[0]["retain"] == 0


@pytest.mark.parametrize(
    ("off", "fields", "copies_head"),
    [
        ({"gamma": 0}, {"hidden"}, True),
        ({"lambda_kl": 0}, {"index"}, False),
        ({"gamma": 0, "lambda_kl": 0}, set(), False),
        ({"gamma": 0, "objective": "npo"}, set(), False),
        ({"gamma": 0, "objective": "tpo"}, set(), False),
        ({"gamma": 0, "objective": "undial", "lambda_retain": 1}, set(), False),
    ],
)
def test_a_term_of_weight_0_costs_nothing(
    off: dict[str, Any], fields: set[str], copies_head: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No rows, nothing of the reference and no copy of its head; its figure is 0. Also from the cache on disk."""
    kept: list[Any] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        kept.append(precompute_reference(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(loop, "precompute_reference", spy)
    on = {"objective": off.get("objective", "palu"), "cache_dir": str(tmp_path), "epochs": 1}
    unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **on)
    for _ in range(2):
        result = unlearn(tiny_llama(), None, forget_rows(), retain_rows(), **on | off)
        cache, head = kept[-1]
        assert set(cache.outputs[0]) == fields
        assert (head is not None) == copies_head
    names = {"gamma": METHODS[on["objective"]].terms[0], "lambda_kl": "kl"}
    for setting in off.keys() & names.keys():
        assert all(record[names[setting]] == 0 for record in result.history)
    assert result.history[-1]["retain"] > 0
    if on["objective"] == "palu":
        assert (result.summary["ordinary_tokens"] > 0) == ("lambda_kl" not in off)
        assert (result.summary["onset_tokens"] > 0) == ("gamma" not in off)


def test_a_retain_set_of_weight_0_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(bos=False)
    rendered: list[Any] = []
    original = Renderer.render

    def render(self: Renderer, row: int, where: str, columns: Any, *args: Any, **kwargs: Any) -> Any:
        rendered.append(columns)
        return original(self, row, where, columns, *args, **kwargs)

    monkeypatch.setattr(Renderer, "render", render)
    for weight, expected in ((0, 0), (1, len(TEXT_RETAIN))):
        rendered.clear()
        model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512)
        settings = {
            "tokenizer": tokenizer,
            "lambda_retain": weight,
            "epochs": 1,
            "anchors": 2,
            "neighbours": 0,
            "variants": 0,
        }
        summary = unlearn(model, None, TEXT_FORGET, TEXT_RETAIN, **settings).summary
        assert sum(columns in TEXT_RETAIN for columns in rendered) == expected == summary["retain_examples"]
        assert sum(columns in TEXT_FORGET for columns in rendered) == len(TEXT_FORGET)
        assert summary["anchors"] + summary["anchors_skipped"] == 2


def test_kl_rows_is_the_kl_of_the_rows_drawn() -> None:
    """The same run as with all other ordinary tokens labelled as prompt."""
    model = functools.partial(tiny_llama, dtype=torch.float64)
    config = UnlearnConfig(kl_rows=3, seed=5)
    examples = load_forget(forget_rows(), None, max_length=99).examples
    masked = []
    for item, row in zip(PaluMethod.make_items(ForgetSet(examples), config), forget_rows(), strict=True):
        drawn = set((item.rows[item.targets :] + 1).tolist())
        labels = [-100 if label == -200 and i not in drawn else label for i, label in enumerate(row["labels"])]
        masked.append(row | {"labels": labels})
    assert masked != forget_rows()
    drawn_run = unlearn(model(), None, forget_rows(), config=config)
    assert_same_run(drawn_run, unlearn(model(), None, masked, seed=5), 1e-12)
    assert drawn_run.summary["ordinary_tokens"] == sum(r["labels"].count(-200) for r in masked)


# --- Equal settings, equal runs ---
def test_same_seed_same_bits() -> None:
    """Also the order of the data and the dropout."""

    def run(seed: int) -> palu.UnlearnResult:
        torch.manual_seed(torch.seed() % 2**31)  # whatever was drawn before does not matter
        model = tiny_llama(attention_dropout=0.2)
        torch.rand(3)
        return unlearn(model, batch_size=3, seed=seed)

    one, same, other = run(0), run(0), run(1)
    assert [[r[k] for k in LOSSES] for r in one.history] == [[r[k] for k in LOSSES] for r in same.history]
    assert same_weights(one.model, weights(same.model))
    assert not same_weights(one.model, weights(other.model))
    assert one.history[0]["retain"] != other.history[0]["retain"]


@pytest.mark.parametrize("tied", [True, False])
def test_no_reference_is_the_model_itself_before_training(tied: bool) -> None:
    settings = {"dtype": torch.float64, "tie_word_embeddings": tied}
    model = tiny_llama(**settings)
    with_copy = unlearn(model, copy.deepcopy(model))
    without = unlearn(tiny_llama(**settings))
    assert_same_run(with_copy, without, 1e-12)
    assert with_copy.history[-1]["kl"] > 1e-6, "the reference did not stay behind"


def test_accumulation_changes_nothing() -> None:
    """The losses are token means over the whole step, whatever micro-batches it is cut into."""
    forget, retain = forget_rows(16), retain_rows(20)
    runs = [
        unlearn(tiny_llama(dtype=torch.float64), None, forget, retain, batch_size=8 // k, gradient_accumulation_steps=k)
        for k in (1, 4)
    ]
    assert len(runs[0].history) == 6
    assert_same_run(*runs, 1e-9)


@pytest.mark.parametrize(
    ("objective", "most"),
    [("palu", 8), ("palu", 60), ("npo", 30), ("simnpo", 8), ("tpo", 30), ("undial", 8), ("rmu", 30)],
)
def test_max_tokens_changes_nothing(objective: str, most: int) -> None:
    """A step is cut into passes, and its losses stay means over the whole of it."""

    def run(**settings: Any) -> palu.UnlearnResult:
        model = tiny_llama(dtype=torch.float64)
        return unlearn(
            model, None, forget_rows(16), retain_rows(20), objective=objective, **rmu_layer(objective), **settings
        )

    whole, cut = run(), run(max_tokens=most)
    names = ["loss", "grad_norm", *METHODS[objective].terms]
    for one, other in zip(whole.history, cut.history, strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-6, abs=1e-9)
    theirs = weights(cut.model)
    for name, ours in weights(whole.model).items():
        assert (ours - theirs[name]).abs().max() <= 1e-9 * theirs[name].abs().max(), name


def test_no_pass_has_more_than_max_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the reference as of the training; an example that is longer has one of its own."""
    passes: list[tuple[int, ...]] = []
    original = Packed.inputs

    def inputs(self: Packed) -> dict[str, Any]:
        passes.append(self.sequence_lengths)
        return original(self)

    monkeypatch.setattr(Packed, "inputs", inputs)
    long = {"input_ids": [1] * 40, "labels": [-100] + [1, -200] * 19 + [-200]}
    monkeypatch.setattr("palu.training.datasets.check_packing", lambda *args, **kwargs: None)
    unlearn(tiny_llama(), None, [*forget_rows(7), long], max_tokens=36, epochs=1)
    assert sum(40 in one for one in passes) == 2
    assert all(one == (40,) for one in passes if 40 in one)
    # Beside what a pass has there may be the token that stands in where it has no forget example.
    assert all(sum(one) <= 36 + (one[0] == 1) for one in passes if 40 not in one)


def test_gradient_checkpointing_changes_nothing() -> None:
    runs = [unlearn(tiny_llama(dtype=torch.float64), gradient_checkpointing=on) for on in (False, True)]
    assert_same_run(*runs, 1e-12)


def test_gradient_checkpointing_happens() -> None:
    def passes(checkpointing: bool) -> int:
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += torch.is_grad_enabled()

        model = tiny_llama()
        model.model.layers[0].self_attn.register_forward_hook(count)
        unlearn(model, epochs=1, gradient_checkpointing=checkpointing)
        return calls

    assert (passes(False), passes(True)) == (2, 4)


def test_gathered_and_dense_onset_rows_give_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for impl in ("gather", "dense"):
        monkeypatch.setattr("palu.methods.base.fused_linear_losses", functools.partial(fused_linear_losses, impl=impl))
        runs.append(unlearn(tiny_llama(dtype=torch.float64)))
    assert_same_run(*runs, 1e-9)


@pytest.mark.parametrize("head", ["tied", "own", "frozen"])
def test_chunks_change_nothing(head: str) -> None:
    runs = []
    for chunk_bytes in (1, 5 * VOCAB * 8, 2**20):
        model = tiny_llama(dtype=torch.float64, tie_word_embeddings=head == "tied")
        model.lm_head.weight.requires_grad_(head != "frozen")
        runs.append(unlearn(model, chunk_bytes=chunk_bytes))
    assert_same_run(runs[0], runs[1], 1e-9)
    assert_same_run(runs[0], runs[2], 1e-9)


@pytest.fixture
def bf16_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As under `accelerate launch --mixed_precision bf16`; accelerate keeps it for the whole process."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision(bf16_autocast: None) -> None:
    """Products in bfloat16, weights and their updates in float32."""
    expected = tiny_llama()
    unlearned = unlearn(tiny_llama(), epochs=2)
    assert unlearned.model.dtype == torch.float32
    config = UnlearnConfig(**ENTROPY, epochs=1, learning_rate=1e-3)
    (terms,) = textbook.train(copy.deepcopy(expected), forget_rows(), retain_rows(8), config)
    (record,) = unlearn(expected, None, forget_rows(), retain_rows(8), epochs=1, batch_size=8).history
    assert record["local"] == pytest.approx(terms["local"], rel=0.03)
    assert record["retain"] == pytest.approx(terms["retain"], rel=0.03)
    assert record["retain"] != pytest.approx(terms["retain"], rel=1e-6), "autocast had no effect"
    # The reference is the same model at this step; its logits are rounded another way at most.
    assert abs(record["kl"]) < 1e-3
    assert not same_weights(unlearned.model, weights(tiny_llama()))


def test_cached_states_are_in_the_dtype_of_the_heads_product(
    bf16_autocast: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half of float32, and not one bit of the run is another one."""

    def run(folder: Path) -> tuple[palu.UnlearnResult, set[torch.dtype], int]:
        result = unlearn(tiny_llama(), cache_dir=str(folder))
        (path,) = folder.glob("*.safetensors")
        hidden = load_file(path)["hidden"]
        return result, {hidden.dtype}, hidden.nbytes

    one, dtypes, size = run(tmp_path / "product")
    assert dtypes == {torch.bfloat16}
    monkeypatch.setattr(palu_method, "_product_dtype", lambda hidden, head: hidden.dtype)
    other, dtypes, as_it_was = run(tmp_path / "states")
    assert dtypes == {torch.float32}
    assert as_it_was == 2 * size
    assert [[r[k] for k in LOSSES] for r in one.history] == [[r[k] for k in LOSSES] for r in other.history]
    assert same_weights(one.model, weights(other.model))


def test_attention_implementations_agree() -> None:
    runs = [unlearn(tiny_llama(attention=name), epochs=1) for name in ("sdpa", "eager")]
    assert_same_run(*runs, 1e-3)


# --- Against a plain loop ---
@pytest.mark.parametrize(
    "settings",
    [
        {"local_loss": "topk_mse", "lambda_kl": 0},
        {"local_loss": "topk_mse", "target": "local_mean", "kl_direction": "forward", "n": -1},
        {"local_loss": "topk_mse", "target": "global_mean_detached", "top_k": 10**6, "n": 1, "weight_decay": 0.1},
        {"local_loss": "topk_mse", "target": 1.5, "max_grad_norm": 0.05, "gamma": 0},
        {"probability_floor": 1 / 64, "top_k": 10**6},
        {"n": 3, "probability_floor": 0.0, "kl_direction": "forward", "gamma": 0.3},
        {"gamma": 0, "lambda_kl": 0},
    ],
    ids=str,
)
def test_steps_equal_a_plain_loop(settings: dict[str, Any]) -> None:
    """With another model as the reference. A term of weight 0 has no part in the gradient.

    Two epochs, after which one with a floor would end.
    """
    model, ref_model = (tiny_llama(seed=s, dtype=torch.float64, tie_word_embeddings="n" in settings) for s in (0, 1))
    textbook.assert_unlearn_equals(model, ref_model=ref_model, tolerance=1e-7, epochs=2, **settings)


def test_the_papers_recipe_is_the_published_loss() -> None:
    """Records are float32; golden vectors hold the same terms to 1e-9 in float64."""
    forget, retain = forget_rows(8), retain_rows(8)
    model, ref_model = (tiny_llama(seed=seed, dtype=torch.float64) for seed in (0, 1))
    before = copy.deepcopy(model)
    sizes: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "progress": False}
    result = palu.unlearn(model, ref_model, forget, retain, recipe="paper", **sizes)
    assert result_config(result) == UnlearnConfig(**RECIPES["paper"], **sizes)
    (expected,) = textbook.train(
        before.to(model.device), forget, retain, result_config(result), ref_model.to(model.device)
    )
    for name in ("local", "kl", "retain"):
        assert result.history[0][name] == pytest.approx(expected[name], rel=1e-6)
    # What is given beside it comes after it, and it comes after a configuration.
    given = UnlearnConfig(lambda_kl=7.0, n=1)
    mixed = result_config(palu.unlearn(model, None, forget, retain, config=given, recipe="paper", n=2, **sizes)).method
    assert (mixed.lambda_kl, mixed.top_k, mixed.n) == (1.0, 5000, 2)
    with pytest.raises(ValueError, match="recipe = 'papers'"):
        palu.unlearn(model, None, forget, retain, recipe="papers")


def result_config(result: palu.UnlearnResult) -> UnlearnConfig:
    return UnlearnConfig(**result.summary["config"])


def test_warmup_and_schedule() -> None:
    result = unlearn(tiny_llama(), epochs=3, batch_size=4, warmup_steps=2, lr_scheduler="linear")
    rates = [record["learning_rate"] for record in result.history]
    assert rates == pytest.approx([0, 0.5e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


# --- The head of the reference ---
@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_head_is_shared_and_a_trainable_one_copied(trainable: bool) -> None:
    objectives = []

    class Spy(PaluMethod):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            objectives.append(self)

    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(trainable)
    before = model.lm_head.weight.detach().clone()
    unlearn(model, objective=Spy)
    (objective,) = objectives
    ref_weight = objective.ref_head.weight
    shared = ref_weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert shared == (not trainable)
    assert torch.equal(ref_weight.cpu(), before)
    assert torch.equal(model.lm_head.weight.cpu(), before) == (not trainable)
    # A mean row that is kept is one of a head that does not change.
    assert (objective.weight_mean is None) == trainable


@pytest.mark.parametrize("trainable", [True, False])
def test_no_second_model_exists(trainable: bool) -> None:
    """With ref_model=None the reference's answers and, if it is trained, its head are all that is kept."""
    accelerator = Accelerator()
    model = tiny_llama().to(accelerator.device)  # tied: the head is the embedding
    model.lm_head.weight.requires_grad_(trainable)
    items = forget_items(load_forget(forget_rows(), None, max_length=1024).examples, 2, None)
    before = live_bytes()
    cache, head = precompute_reference(
        ModelRoot(model),
        items,
        AnchorPrompts([], set(), 0),
        UnlearnConfig(local_loss="topk_mse", top_k=4),
        accelerator,
        own=True,
    )
    held = live_bytes() - before
    answers = sum(t.numel() * 4 for parts in cache.outputs for t in parts.values())
    assert held == answers + (head.weight.numel() * 4 if trainable else 0)


# --- Divergence ---
def test_divergence_at_the_first_step() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    before = weights(model)
    with pytest.raises(palu.DivergenceError, match=r"^step 1: .*= nan") as caught:
        unlearn(model)
    assert caught.value.step == 1
    assert caught.value.history == []
    assert same_weights(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_divergence_later_keeps_the_last_good_step(monkeypatch: pytest.MonkeyPatch) -> None:
    good = unlearn(tiny_llama(), epochs=2, batch_size=8)  # two steps
    forward = PaluMethod.batch_losses
    calls = 0

    def diverging(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = forward(self, *args)
        if calls < 3:
            return losses
        return losses._replace(total=losses.total * math.inf, terms=losses.terms * math.nan)

    monkeypatch.setattr(PaluMethod, "batch_losses", diverging)
    model = tiny_llama()
    with pytest.raises(palu.DivergenceError, match=r"^step 3: .*weights of step 2") as caught:
        unlearn(model, epochs=9, batch_size=8)
    assert caught.value.step == 3
    assert [r["loss"] for r in caught.value.history] == [r["loss"] for r in good.history]
    assert same_weights(model, weights(good.model))


def test_a_gradient_that_overflows_is_divergence() -> None:
    """The losses are finite, their gradient is not."""
    model = tiny_llama()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    with pytest.raises(palu.DivergenceError, match=r"step 1: grad_norm = (nan|inf);"):
        unlearn(model)
    assert same_weights(model, before)
