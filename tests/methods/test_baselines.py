"""The methods that PALU is compared with: each against its formula, on padded batches and full logits."""

import copy
import functools
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.runs import TEXT_FORGET
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import (
    Row,
    forget_rows,
    overfit,
    padded,
    retain_rows,
    rmu_layer,
    same_weights,
    tiny_llama,
    weights,
)
from torch import Tensor
from transformers import LlamaForCausalLM

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_alternates, load_forget, load_retain
from palu.data.files import DataError
from palu.data.packing import retain_items
from palu.data.tokenize import Example
from palu.methods import METHODS
from palu.methods.base import ForgetSet
from palu.models.head import head_of
from palu.ref_model.cache import ReferenceCache
from palu.ref_model.precompute import compute_outputs
from palu.training.dataloader import UnlearnDataLoader
from palu.training.engine import check_deepspeed

# What the methods' authors set.
DEFAULTS: dict[str, dict[str, float]] = {
    "ga": {"lambda_retain": 0},
    "gd": {},
    "npo": {"beta": 0.1},
    "dpo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "gamma": 0.125, "delta": 0},
    "pdu": {"dual_step": 1, "retain_loss_bound": 0},
    "tpo": {"beta": 0.32},
    "wga": {"beta": 1},
    "satimp": {"lambda_retain": 0.1, "beta1": 5, "beta2": 1},
    "undial": {"beta": 10, "lambda_retain": 0},
    "rmu": {"layer_id": 7, "steering_coeff": 2},
}
LAYER = 0  # RMU's, of the two that the models have
FIELDS = {"step", "epoch", "loss", "forget", "retain", "grad_norm", "learning_rate", "tokens", "tokens_per_second"}

ALTERNATES = ("I do not know.", "That is a question that I cannot answer.", "No idea.")
TEXT: list[Any] = [row | {"alternate": other} for row, other in zip(TEXT_FORGET, ALTERNATES, strict=True)]
BYTE_LEVEL = byte_level()


def text_rows(column: str) -> list[Row]:
    """The answers of a column behind their questions, every answer token sensitive."""
    rows = []
    for one in TEXT:
        prompt = f"Question: {one['question']}\nAnswer: "
        tokens = BYTE_LEVEL(prompt + one[column], return_offsets_mapping=True)
        ids = [*tokens["input_ids"], BYTE_LEVEL.eos_token_id]
        answer = [end > len(prompt) for _, end in tokens["offset_mapping"]] + [True]
        rows.append({"input_ids": ids, "labels": [i if a else -100 for i, a in zip(ids, answer, strict=True)]})
    return rows


def example_rows() -> list[Row]:
    """Answers of several spans, and two without any."""
    plain = [
        {"input_ids": row["input_ids"], "labels": [x if x < 0 else -200 for x in row["labels"]]}
        for row in forget_rows(2, seed=5)
    ]
    rows = forget_rows(5)
    return [*rows[:2], plain[0], *rows[2:], plain[1]]


def models(objective: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model and another as its reference, for the tokens of the method's examples."""
    vocab = {"vocab_size": len(BYTE_LEVEL)} if objective == "dpo" else {}
    pair = tiny_llama(dtype=torch.float64, **vocab), tiny_llama(seed=1, dtype=torch.float64, **vocab)
    if not vocab:
        for model, state in zip(pair, knowing(), strict=True):
            model.load_state_dict(state)
    return pair


@cache
def knowing() -> list[dict[str, Tensor]]:
    """Weights of two models that know the answers, one better: no preference is decided, none is even."""
    found = []
    for seed, steps in ((0, 12), (1, 8)):
        model = tiny_llama(seed=seed, dtype=torch.float64)
        overfit(model, example_rows() + retain_rows(8), steps)
        found.append(weights(model))
    return found


def unlearn(
    objective: str, model: LlamaForCausalLM, ref_model: LlamaForCausalLM | None, **settings: Any
) -> palu.UnlearnResult:
    """palu.unlearn on the method's examples, each step over all of them unless the settings say otherwise."""
    settings = (
        {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "progress": False} | rmu_layer(objective) | settings
    )
    forget = TEXT if objective == "dpo" else example_rows()
    tokenizer = BYTE_LEVEL if objective == "dpo" else None
    return palu.unlearn(model, ref_model, forget, retain_rows(8), tokenizer=tokenizer, objective=objective, **settings)


# --- The textbook ---
def logits_and_labels(model: LlamaForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and the answer token that each predicts [B, T], -100 where none."""
    inputs, answers = padded(rows)
    logits = model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits
    return logits[:, :-1], answers[:, 1:].to(model.device)


def answer_nll(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
    """[B]: the summed NLL of each answer."""
    logits, labels = logits_and_labels(model, rows)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)


def mean_nll(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
    logits, labels = logits_and_labels(model, rows)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def state_distance(model: LlamaForCausalLM, rows: list[Row], target: LlamaForCausalLM | Tensor) -> Tensor:
    """Mean squared distance of the layer's output at the answer tokens from another model's, or from a vector [d]."""
    inputs, answers = padded(rows)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}

    def states(of: LlamaForCausalLM) -> Tensor:
        return of(**inputs, use_cache=False, output_hidden_states=True).hidden_states[LAYER + 1][answers != -100]

    return ((states(model) - (target if isinstance(target, Tensor) else states(target).detach())) ** 2).mean()


def steering_vector(model: LlamaForCausalLM, coefficient: float, seed: int = 0) -> Tensor:
    drawn = torch.rand(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return (coefficient * drawn / drawn.norm()).double().to(model.device)


def preference(advantage: Tensor, beta: float) -> Tensor:
    """NPO's own form, 2/beta * mean log(1 + ratio^beta), with ratio = exp(-advantage)."""
    return 2 / beta * torch.log1p(torch.exp(-beta * advantage)).mean()


def textbook(
    objective: str, model: LlamaForCausalLM, ref_model: LlamaForCausalLM, settings: dict[str, float]
) -> tuple[Tensor, Tensor]:
    """(forget, retain)."""
    beta = settings.get("beta", math.nan)
    rows = text_rows("answer") if objective == "dpo" else example_rows()
    logits, labels = logits_and_labels(model, rows)
    with torch.no_grad():
        ref_logits, _ = logits_and_labels(ref_model, rows)
    tokens = (labels != -100).sum(1)

    def drop(rows: list[Row]) -> Tensor:
        return answer_nll(model, rows) - answer_nll(ref_model, rows).detach()

    if objective in ("ga", "gd"):
        forget = -mean_nll(model, rows)
    elif objective == "npo":
        forget = preference(drop(rows), beta)
    elif objective == "dpo":
        forget = preference(drop(rows) - drop(text_rows("alternate")), beta)
    elif objective == "simnpo":
        forget = preference(answer_nll(model, rows) / tokens - settings["delta"], beta)
    elif objective == "pdu":
        forget = ((logits.max(2).values - logits.mean(2)) ** 2)[labels != -100].mean()
    elif objective == "wga":
        p = logits[labels != -100].softmax(-1).gather(1, labels[labels != -100][:, None])
        forget = (p.detach() ** beta * p.log()).mean()
    elif objective == "satimp":
        p = logits[labels != -100].softmax(-1).gather(1, labels[labels != -100][:, None])
        weight = p.detach() ** settings["beta1"] * (1 - p.detach()) ** settings["beta2"]
        forget = (weight * p.log()).mean()
    elif objective == "undial":
        lowered = ref_logits[labels != -100] - beta * F.one_hot(labels[labels != -100], logits.shape[-1])
        soft = lowered.softmax(-1)
        forget = (soft * (soft.log() - logits[labels != -100].log_softmax(-1))).sum(-1).mean()
    elif objective == "rmu":
        forget = state_distance(model, rows, steering_vector(model, settings["steering_coeff"]))
        return forget, state_distance(model, retain_rows(8), ref_model)
    else:
        parts, kept = [], []
        for b, row in enumerate(rows):
            gaps = []
            for t, label in enumerate(row["labels"][1:]):
                true = row["input_ids"][t + 1]
                if label >= 0:
                    gaps.append(ref_logits[b, t, true] - logits[b, t, true])
                elif label == -200:
                    kept.append(-logits[b, t].log_softmax(-1)[true])
            parts.append(preference(torch.stack(gaps).mean(), beta) if gaps else torch.tensor(0.0))
        forget = sum(parts) / len(rows) + torch.stack(kept).mean()
    return forget, mean_nll(model, retain_rows(8))


def assert_textbook(objective: str, settings: dict[str, float], reference: str, **run: int) -> None:
    """Three steps of palu.unlearn and of the textbook."""
    model, other = models(objective)
    expected = copy.deepcopy(model)
    result = unlearn(objective, model, other if reference == "other" else None, epochs=3, **settings, **run)
    ref_model = other if reference == "other" else copy.deepcopy(expected)
    full = {"gamma": 1, "lambda_retain": 1} | DEFAULTS[objective] | settings

    # On the device that palu chose: rotary embeddings are float32, and a CPU and a GPU round them apart.
    expected, ref_model = expected.to(model.device), ref_model.to(model.device)
    optimizer = torch.optim.AdamW(expected.parameters(), 1e-3, weight_decay=0)
    retain_weight = full["lambda_retain"]
    assert len(result.history) == 3
    for record in result.history:
        forget, retain = textbook(objective, expected, ref_model, full)
        loss = full["gamma"] * forget + retain_weight * retain
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        figures = {"grad_norm": norm, "loss": loss}
        if full["gamma"]:
            figures["forget"] = forget
        if retain_weight or objective == "pdu":
            figures["retain"] = retain
        if objective == "pdu":
            figures["retain_weight"] = torch.tensor(retain_weight)
            # The record is float32.
            retain_weight = max(0.0, retain_weight + full["dual_step"] * (record["retain"] - full["retain_loss_bound"]))
        assert {name: record[name] for name in figures} == pytest.approx(
            {name: value.item() for name, value in figures.items()}, rel=1e-6
        )
        assert record.keys() == FIELDS | ({"retain_weight"} if objective == "pdu" else set())
        optimizer.step()
        optimizer.zero_grad()
    after = weights(expected)
    for name, ours in weights(model).items():
        assert (ours - after[name]).abs().max() < 1e-9, name


CASES: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in DEFAULTS),
    ("ga", {"lambda_retain": 0.7, "gamma": 0.3}),
    ("gd", {"lambda_retain": 0.2, "gamma": 2.0}),
    ("npo", {"beta": 0.5, "lambda_retain": 0.2, "gamma": 3.0}),
    ("dpo", {"beta": 0.03, "lambda_retain": 0.2, "gamma": 3.0}),
    ("simnpo", {"beta": 1.5, "delta": 0.8, "lambda_retain": 0.2, "gamma": 3.0}),
    ("pdu", {"dual_step": 0.3, "retain_loss_bound": 0.4, "lambda_retain": 0.6, "gamma": 0.01}),
    ("pdu", {"retain_loss_bound": 9.0, "lambda_retain": 0.6}),  # the constraint holds: the variable falls to 0
    ("pdu", {"lambda_retain": 0.0}),  # and rises from 0
    ("tpo", {"beta": 1.1, "lambda_retain": 0.2, "gamma": 3.0}),
    ("wga", {"beta": 0.3, "lambda_retain": 0.2, "gamma": 3.0}),
    ("satimp", {"beta1": 0.7, "beta2": 2.0, "lambda_retain": 0.2, "gamma": 3.0}),
    ("undial", {"beta": 2.5, "lambda_retain": 0.2, "gamma": 3.0}),
    ("rmu", {"steering_coeff": 6.5, "lambda_retain": 12.0, "gamma": 3.0}),
    ("rmu", {"lambda_retain": 0.0}),
    ("rmu", {"gamma": 0.0}),
]


@pytest.mark.parametrize(("objective", "settings"), CASES, ids=str)
def test_steps_equal_the_textbook(objective: str, settings: dict) -> None:
    assert_textbook(objective, settings, "other")


@pytest.mark.parametrize("objective", DEFAULTS)
def test_micro_batches_and_no_reference_equal_the_textbook(objective: str) -> None:
    """Seven examples (DPO: three) by two; means and preferences are of the whole step, the reference is the start."""
    parts = 2 if objective == "dpo" else 4
    assert_textbook(
        objective, {}, "itself", batch_size=2, retain_batch_size=8 // parts, gradient_accumulation_steps=parts
    )


# --- Around the losses ---
@pytest.mark.parametrize("objective", DEFAULTS)
def test_a_reference_is_consulted_only_where_the_formula_has_one(objective: str) -> None:
    needed = objective in ("npo", "dpo", "tpo", "undial", "rmu")
    assert bool(UnlearnConfig(objective).reference.fields) == needed
    runs = []
    for broken in (False, True):
        model, ref_model = models(objective)
        if broken:
            with torch.no_grad():
                ref_model.model.layers[0].input_layernorm.weight.fill_(math.nan)
        if not needed:
            ref_model.to = None  # type: ignore[assignment]  # it is not even moved
        passes: list[int] = []
        ref_model.model.register_forward_hook(lambda _, __, output: passes.append(output[0].shape[1]))  # noqa: B023
        if broken and needed:
            with pytest.raises(palu.DivergenceError, match=r"^step 1: "):
                unlearn(objective, model, ref_model)
        else:
            runs.append(unlearn(objective, model, ref_model).history[0]["forget"])
        # The first tokens of one example, three times, for its head; two examples alone and packed; then all at once.
        assert [length > 8 for length in passes] == 3 * [False] + 4 * [True] * needed
    assert needed or runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_tokens_that_are_acted_on_are_counted() -> None:
    rows = example_rows()
    sensitive = sum(label >= 0 for row in rows for label in row["labels"])
    ordinary = sum(label == -200 for row in rows for label in row["labels"])
    for objective, counted in (("npo", (sensitive + ordinary, 0)), ("tpo", (sensitive, ordinary))):
        summary = unlearn(objective, models(objective)[0], None).summary
        assert (summary["onset_tokens"], summary["ordinary_tokens"]) == counted
        assert summary["forget_without_span"] == 2
    summary = unlearn("dpo", models("dpo")[0], None).summary
    counted = tuple(
        sum(label >= 0 for row in text_rows(column) for label in row["labels"]) for column in ("answer", "alternate")
    )
    assert (summary["onset_tokens"], summary["ordinary_tokens"]) == counted
    assert summary["forget_examples"] == 3


@pytest.mark.parametrize("objective", ["ga", "pdu"])
def test_without_a_retain_set(objective: str) -> None:
    model, _ = models(objective)
    result = palu.unlearn(
        model, None, example_rows(), None, objective=objective, lambda_retain=0, epochs=2, batch_size=8, progress=False
    )
    assert [record["retain"] for record in result.history] == [0, 0]
    assert result.history[-1].get("retain_weight", 0) == 0
    assert result.history[0]["loss"] == result.history[0]["forget"]


def test_a_retain_set_that_has_no_part_is_not_run() -> None:
    assert unlearn("ga", models("ga")[0], None).summary["retain_examples"] == 0
    with pytest.raises(DataError, match="retain set is empty while lambda_retain = 1"):
        palu.unlearn(models("npo")[0], None, example_rows(), None, objective="npo", progress=False)


@pytest.mark.parametrize("objective", DEFAULTS)
def test_processes_add_up_also_where_one_has_no_example(objective: str) -> None:
    """Three examples over four processes: the last runs an example without rows."""
    method = METHODS[objective]
    config = UnlearnConfig(objective=objective, batch_size=2, retain_batch_size=1, **rmu_layer(objective))
    model, ref_model = models(objective)
    forget, tokenizer = (TEXT, BYTE_LEVEL) if objective == "dpo" else (example_rows()[:3], None)
    examples = load_forget(forget, tokenizer, max_length=99).examples
    alternates = functools.partial(load_alternates, TEXT, BYTE_LEVEL, examples, max_length=99)
    items = method.make_items(ForgetSet(examples, None, alternates), config)
    retain = retain_items(load_retain(retain_rows(4), None, max_length=99).examples)
    cache = ReferenceCache([{}] * len(items))
    if config.reference.fields:
        asked = items + retain if config.reference.of_retain else items
        cache = compute_outputs(ref_model, asked, config, Accelerator())

    def total_and_gradient(processes: int, config: UnlearnConfig) -> tuple[float, Tensor]:
        batches = [
            batch
            for index in range(processes)
            for step in UnlearnDataLoader(items, retain, cache, config, process_index=index, num_processes=processes)
            for batch in step
        ]
        assert [batch.counts.examples for batch in batches] == ([1, 1, 1, 0] if processes == 4 else [3])
        counts = torch.tensor([batch.counts for batch in batches]).sum(0).double()
        parts = [method(model, config) for _ in batches]
        for part in parts:
            part.ref_head = head_of(ref_model)
        total = torch.stack([part(batch, counts).total for part, batch in zip(parts, batches, strict=True)]).sum()
        gradients = torch.autograd.grad(total, list(model.parameters()), materialize_grads=not method.reaches_all)
        return total.item(), torch.cat([gradient.flatten() for gradient in gradients])

    apart = total_and_gradient(4, config)
    alone = total_and_gradient(1, config.replace(batch_size=3, retain_batch_size=4))
    assert apart[0] == pytest.approx(alone[0], rel=1e-12)
    assert (apart[1] - alone[1]).norm() <= 1e-10 * alone[1].norm()


# --- RMU ---
def deep_llama(**config: Any) -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=3, tie_word_embeddings=False, **config)


def rmu(model: Any, ref_model: LlamaForCausalLM | None = None, retain: Any = None, **settings: Any) -> Any:
    settings = {"epochs": 2, "batch_size": 4, "layer_id": 1, "progress": False, "learning_rate": 1e-3} | settings
    return palu.unlearn(model, ref_model, forget_rows(), retain or retain_rows(), objective="rmu", **settings)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}], ids=str)
def test_rmu_trains_no_weight_above_its_layer(settings: dict[str, Any]) -> None:
    model = deep_llama()
    before = weights(model)
    rmu(model, **settings)
    changed = {name.split(".")[2] for name, now in weights(model).items() if not torch.equal(now, before[name])}
    assert changed == {"weight", "0", "1"}, "the embeddings and two layers"


@pytest.mark.parametrize("reentrant", [False, True])
def test_rmu_checkpoints_activations_and_comes_out_the_same(reentrant: bool) -> None:
    plain, checkpointed = deep_llama(), deep_llama()
    name = "activation" if hasattr(checkpointed, "activation_checkpointing_enable") else "gradient"
    getattr(checkpointed, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    assert [r["loss"] for r in rmu(plain).history] == [r["loss"] for r in rmu(checkpointed).history]
    assert same_weights(plain, weights(checkpointed))


def test_rmu_on_the_weights_of_the_paper() -> None:
    """The down projections of the layer and of the one below; all others are frozen by the user."""
    model = deep_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(r"layers\.[01]\.mlp\.down_proj", name) is not None)
    before = weights(model)
    rmu(model)
    changed = [name for name, now in weights(model).items() if not torch.equal(now, before[name])]
    assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]


def test_rmu_draws_its_vector_by_the_seed() -> None:
    first = [rmu(deep_llama(), seed=seed, epochs=1, batch_size=8).history[0]["forget"] for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


def test_rmu_asks_again_where_the_retain_set_or_the_layer_is_another_one(tmp_path: Path) -> None:
    plain = [rmu(deep_llama()), rmu(deep_llama(), retain=retain_rows(seed=9)), rmu(deep_llama(), layer_id=0)]
    folder = str(tmp_path)
    for _ in range(2):  # the second time from what is there
        cached = [
            rmu(deep_llama(), cache_dir=folder),
            rmu(deep_llama(), retain=retain_rows(seed=9), cache_dir=folder),
            rmu(deep_llama(), layer_id=0, cache_dir=folder),
        ]
        assert len(list(tmp_path.iterdir())) == 3
        for one, other in zip(plain, cached, strict=True):
            assert [r["loss"] for r in one.history] == [r["loss"] for r in other.history]
            assert same_weights(one.model, weights(other.model))


def test_layers_that_rmu_cannot_steer() -> None:
    told = "layer_id = 7: the model has 3 layers; give one of 0 to 2"
    with pytest.raises(ValueError, match=f"^{told}$"):
        rmu(deep_llama(), layer_id=7)
    model = deep_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    with pytest.raises(ValueError, match=r"^layer_id = 1: no parameter of the layers up to it requires a gradient"):
        rmu(model)
    model = deep_llama()
    model.model.layers = torch.nn.ModuleList([*model.model.layers, model.model.layers[0]])
    with pytest.raises(ValueError, match="LlamaModel has no one list of as many layers as its configuration says"):
        rmu(model)


def test_rmu_under_deepspeed_is_refused() -> None:
    check_deepspeed(UnlearnConfig())
    with pytest.raises(
        ValueError, match=r"^objective = 'rmu' trains the lower layers alone, .*; use FSDP2, DDP or one"
    ):
        check_deepspeed(UnlearnConfig(objective="rmu"))


# --- Alternate answers ---
def with_answer(one: dict[str, Any], column: str) -> dict[str, Any]:
    return {"question": one["question"], "answer": one[column]}


def as_messages(one: dict[str, Any]) -> dict[str, Any]:
    asked = {"role": "user", "content": one["question"]}
    others = {name: value for name, value in one.items() if name not in ("question", "answer")}
    return {**others, "messages": [asked, {"role": "assistant", "content": one["answer"]}]}


STYLES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "question": lambda one: one,
    "prompt": lambda one: {
        "prompt": one["question"], "completion": one["answer"], "answer": "Not this column.",
        "spans": one["spans"], "alternate": one["alternate"],
    },
    "messages": as_messages,
}  # fmt: skip


def same_examples(ours: list[Example], theirs: list[Example]) -> bool:
    return [(e.row, e.input_ids.tolist(), e.labels.tolist()) for e in ours] == [
        (e.row, e.input_ids.tolist(), e.labels.tolist()) for e in theirs
    ]


@pytest.mark.parametrize("style", STYLES)
def test_alternate_answers(style: str, tmp_path: Path) -> None:
    """In every style: as if the alternate answer were that of a retain row."""
    rows: Any = [STYLES[style](one) for one in TEXT]
    tokenizer = byte_level(CHATML)
    expected = load_retain([with_answer(one, "alternate") for one in TEXT], tokenizer, max_length=99).examples
    if style == "question":
        (tmp_path / "forget.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        rows = tmp_path / "forget.jsonl"
    examples = load_forget(rows, tokenizer, max_length=99).examples
    assert same_examples(load_alternates(rows, tokenizer, examples, max_length=99), expected)
    for example, one in zip(expected, TEXT, strict=True):
        answer = tokenizer.decode(example.labels[example.labels >= 0])
        assert answer == one["alternate"] + "<|im_end|>"


def test_alternate_answers_of_plain_text() -> None:
    examples = load_forget(TEXT, BYTE_LEVEL, max_length=99).examples
    loaded = load_alternates(TEXT, BYTE_LEVEL, examples, max_length=99)
    assert [e.input_ids.tolist() for e in loaded] == [row["input_ids"] for row in text_rows("alternate")]
    assert [e.labels.tolist() for e in loaded] == [row["labels"] for row in text_rows("alternate")]


def test_rows_that_are_cut_off_need_no_alternate_answer_that_fits() -> None:
    long = {**TEXT[0], "question": "x " * 99}
    examples = load_forget([long, *TEXT], BYTE_LEVEL, max_length=60, allow_cut_spans=True).examples
    assert [example.row for example in examples] == [1, 2, 3]
    loaded = load_alternates([long, *TEXT], BYTE_LEVEL, examples, max_length=60)
    assert [example.row for example in loaded] == [1, 2, 3]
    assert [example.input_ids.tolist() for example in loaded] == [row["input_ids"] for row in text_rows("alternate")]


def test_rows_that_come_once_are_read_twice() -> None:
    model, again = models("dpo")[0], models("dpo")[0]
    (expected,) = unlearn("dpo", model, None).history
    (record,) = palu.unlearn(
        again, None, iter(TEXT), retain_rows(8), tokenizer=BYTE_LEVEL, objective="dpo",
        epochs=1, batch_size=8, learning_rate=1e-3, progress=False,
    ).history  # fmt: skip
    assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_alternate_answers_that_cannot_be_used() -> None:
    # " Ada" is one token and " 1843" begins with a blank, the prompt's own: it reaches one token further.
    short = len(BYTE_LEVEL("Question: Who?\nAnswer:")["input_ids"]) + 1
    whole = len(BYTE_LEVEL("Question: Who?\nAnswer: 1843")["input_ids"]) + 1
    used = {"question": "Who?", "answer": "Ada.", "spans": [[0, 3]]}
    rows = [used | {"alternate": "Ada wrote it."}, used | {"alternate": "1843"}]
    altering = byte_level("{{ messages[0].content }}{{ messages[1].content | replace('wrote', 'read') }}")
    for tokenizer, max_length, told in (
        (BYTE_LEVEL, short, f"1: .* set max_length = {whole}$"),
        (altering, 99, "0: the chat"),
    ):
        examples = load_forget(rows, tokenizer, max_length=max_length).examples
        with pytest.raises(DataError, match=f"^alternate answer of forget row {told}"):
            load_alternates(rows, tokenizer, examples, max_length=max_length)
