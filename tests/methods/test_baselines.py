"""The methods that PALU is compared with: each against its formula, on padded batches and full logits."""

import copy
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.runs import TEXT_FORGET, row_forms
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import Row, forget_rows, overfit, padded, retain_rows, tiny_llama, weights
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
from palu.ref_model.precompute import compute_outputs
from palu.ref_model.storage import ReferenceCache
from palu.training.dataloader import UnlearnDataLoader

# What the methods' authors set.
DEFAULTS: dict[str, dict[str, float]] = {
    "ga": {"lambda_retain": 0},
    "gd": {},
    "npo": {"beta": 0.1},
    "dpo": {"beta": 0.1},
    "simnpo": {"beta": 4.5, "gamma": 0.125, "delta": 0},
    "tpo": {"beta": 0.32},
    "satimp": {"lambda_retain": 0.1, "beta1": 5, "beta2": 1},
    "undial": {"beta": 10, "lambda_retain": 0},
}
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
    rows, plain = forget_rows(5), forget_rows(2, seed=5)
    for row in plain:
        row["labels"] = [min(label, -200) if label != -100 else -100 for label in row["labels"]]
    return [*rows[:2], plain[0], *rows[2:], plain[1]]


def models(objective: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A model and another as its reference, for the tokens of the method's examples."""
    vocab = {"vocab_size": len(BYTE_LEVEL)} if objective == "dpo" else {}
    pair = tiny_llama(dtype=torch.float64, **vocab), tiny_llama(seed=1, dtype=torch.float64, **vocab)
    if not vocab:
        for model, state in zip(pair, knowing(), strict=True):
            model.load_state_dict(state)
    return pair


@functools.cache
def knowing() -> list[dict[str, Tensor]]:
    """Weights of two models that know the answers, one better: no preference is decided, none is even."""
    found = []
    for seed, steps in ((0, 12), (1, 8)):
        model = tiny_llama(seed=seed, dtype=torch.float64)
        overfit(model, example_rows() + retain_rows(8), steps)
        found.append(weights(model))
    return found


def unlearn(objective: str, model: LlamaForCausalLM, ref_model: Any = None, **settings: Any) -> palu.UnlearnResult:
    """palu.unlearn on the method's examples, each step over all of them unless the settings say otherwise."""
    forget, tokenizer = (TEXT, BYTE_LEVEL) if objective == "dpo" else (example_rows(), None)
    given = {"forget": forget, "retain": retain_rows(8), "tokenizer": tokenizer, "epochs": 1, "batch_size": 8}
    given |= {"learning_rate": 1e-3, "progress": False, "lora_rank": None} | settings
    return palu.unlearn(model, ref_model, objective=objective, **given)


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


def preference(advantage: Tensor, beta: float) -> Tensor:
    """NPO's own form, 2/beta * mean log(1 + ratio^beta), with ratio = exp(-advantage)."""
    return 2 / beta * torch.log1p(torch.exp(-beta * advantage)).mean()


def textbook(objective: str, model: Any, ref_model: Any, settings: dict[str, float]) -> tuple[Tensor, Tensor]:
    """(forget, retain)."""
    beta = settings.get("beta", math.nan)
    rows = text_rows("answer") if objective == "dpo" else example_rows()
    logits, labels = logits_and_labels(model, rows)
    with torch.no_grad():
        ref_logits, _ = logits_and_labels(ref_model, rows)
    answer = labels != -100
    p = logits[answer].softmax(-1).gather(1, labels[answer][:, None])
    q = p.detach()

    def drop(rows: list[Row]) -> Tensor:
        return answer_nll(model, rows) - answer_nll(ref_model, rows).detach()

    if objective in ("ga", "gd"):
        forget = p.log().mean()
    elif objective == "satimp":
        forget = (q ** settings["beta1"] * (1 - q) ** settings["beta2"] * p.log()).mean()
    elif objective == "npo":
        forget = preference(drop(rows), beta)
    elif objective == "dpo":
        forget = preference(drop(rows) - drop(text_rows("alternate")), beta)
    elif objective == "simnpo":
        forget = preference(answer_nll(model, rows) / answer.sum(1) - settings["delta"], beta)
    elif objective == "undial":
        soft = (ref_logits[answer] - beta * F.one_hot(labels[answer], logits.shape[-1])).softmax(-1)
        forget = (soft * (soft.log() - logits[answer].log_softmax(-1))).sum(-1).mean()
    else:
        parts, others = [], []
        for b, row in enumerate(rows):
            gaps = []
            for t, label in enumerate(row["labels"][1:]):
                true = row["input_ids"][t + 1]
                if label >= 0:
                    gaps.append(ref_logits[b, t, true] - logits[b, t, true])
                elif label == -200:
                    others.append(-logits[b, t].log_softmax(-1)[true])
            parts.append(preference(torch.stack(gaps).mean(), beta) if gaps else torch.tensor(0.0))
        forget = sum(parts) / len(rows) + torch.stack(others).mean()
    kept, labels = logits_and_labels(model, retain_rows(8))
    return forget, F.cross_entropy(kept.flatten(0, 1), labels.flatten(), ignore_index=-100)


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
    assert len(result.history) == 3
    for record in result.history:
        forget, retain = textbook(objective, expected, ref_model, full)
        loss = full["gamma"] * forget + full["lambda_retain"] * retain
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        figures = {"grad_norm": norm.item(), "loss": loss.item()}
        if full["gamma"]:
            figures["forget"] = forget.item()
        if full["lambda_retain"]:
            figures["retain"] = retain.item()
        assert {name: record[name] for name in figures} == pytest.approx(figures, rel=1e-6)
        assert record.keys() == FIELDS
        optimizer.step()
        optimizer.zero_grad()
    after = weights(expected)
    for name, ours in weights(model).items():
        assert (ours - after[name]).abs().max() < 1e-9, name


CASES: list[tuple[str, dict[str, float]]] = [
    ("gd", {}),  # the others' own defaults: in the next test
    ("ga", {"lambda_retain": 0.7, "gamma": 0.3}),
    ("npo", {"beta": 0.5, "lambda_retain": 0.2, "gamma": 3.0}),
    ("dpo", {"beta": 0.03, "lambda_retain": 0.2, "gamma": 3.0}),
    ("simnpo", {"beta": 1.5, "delta": 0.8, "lambda_retain": 0.2, "gamma": 3.0}),
    ("tpo", {"beta": 1.1, "lambda_retain": 0.2, "gamma": 3.0}),
    ("satimp", {"beta1": 0.7, "beta2": 2.0, "lambda_retain": 0.2, "gamma": 3.0}),
    ("undial", {"beta": 2.5, "lambda_retain": 0.2, "gamma": 3.0}),
]


@pytest.mark.parametrize(("objective", "settings"), CASES, ids=str)
def test_steps_equal_the_textbook(objective: str, settings: dict) -> None:
    assert_textbook(objective, settings, "other")


@pytest.mark.parametrize("objective", DEFAULTS)
def test_micro_batches_and_no_reference_equal_the_textbook(objective: str) -> None:
    """Seven examples (DPO: three) by two; means and preferences are of the whole step, the reference is the start."""
    parts = 2 if objective == "dpo" else 4
    run = {"batch_size": 2, "retain_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    assert_textbook(objective, {}, "itself", **run)


# --- Around the losses ---
@pytest.mark.parametrize("objective", DEFAULTS)
def test_a_reference_is_consulted_only_where_the_formula_has_one(objective: str) -> None:
    needed = objective in ("npo", "dpo", "tpo", "undial")
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
    def counted(rows: list[Row]) -> tuple[int, int]:
        labels = [label for row in rows for label in row["labels"]]
        return sum(label >= 0 for label in labels), sum(label == -200 for label in labels)

    sensitive, ordinary = counted(example_rows())
    answers, alternates = (counted(text_rows(column))[0] for column in ("answer", "alternate"))
    for objective, figures in (
        ("npo", (sensitive + ordinary, 0, 7, 2)),
        ("tpo", (sensitive, ordinary, 7, 2)),
        ("dpo", (answers, alternates, 3, 1)),
    ):
        summary = unlearn(objective, models(objective)[0]).summary
        names = "onset_tokens", "ordinary_tokens", "forget_examples", "forget_without_span"
        assert tuple(summary[name] for name in names) == figures


def test_without_a_retain_set() -> None:
    history = unlearn("ga", models("ga")[0], retain=None, epochs=2).history
    assert [record["retain"] for record in history] == [0, 0]
    assert history[0]["loss"] == history[0]["forget"]
    # One that has no part is not run.
    assert unlearn("ga", models("ga")[0]).summary["retain_examples"] == 0


@pytest.mark.parametrize("objective", DEFAULTS)
def test_processes_add_up_also_where_one_has_no_example(objective: str) -> None:
    """Three examples over four processes: the last runs an example without rows."""
    method = METHODS[objective]
    config = UnlearnConfig(objective=objective, batch_size=2, retain_batch_size=1)
    model, ref_model = models(objective)
    forget, tokenizer = (TEXT, BYTE_LEVEL) if objective == "dpo" else (example_rows()[:3], None)
    examples = load_forget(forget, tokenizer, max_length=99).examples
    alternates = functools.partial(load_alternates, TEXT, BYTE_LEVEL, examples, max_length=99)
    items = method.make_items(ForgetSet(examples, None, alternates), config)
    retain = retain_items(load_retain(retain_rows(4), None, max_length=99).examples)
    cache = ReferenceCache([{}] * len(items))
    if config.reference.fields:
        cache = compute_outputs(ref_model, items, config, Accelerator())

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
        gradients = torch.autograd.grad(total, list(model.parameters()))
        return total.item(), torch.cat([gradient.flatten() for gradient in gradients])

    apart = total_and_gradient(4, config)
    alone = total_and_gradient(1, config.replace(batch_size=3, retain_batch_size=4))
    assert apart[0] == pytest.approx(alone[0], rel=1e-12)
    assert (apart[1] - alone[1]).norm() <= 1e-10 * alone[1].norm()


# --- Alternate answers ---
def load(rows: Any, tokenizer: Any, max_length: int) -> list[Example]:
    examples = load_forget(rows, tokenizer, max_length=max_length, allow_cut_spans=True).examples
    return load_alternates(rows, tokenizer, examples, max_length=max_length)


@pytest.mark.parametrize(("form", "template"), [(0, None), (0, CHATML), (1, CHATML), (2, CHATML)])
def test_alternate_answers(form: int, template: str | None) -> None:
    """As if the alternate answer were that of a retain row. Rows that are cut off need none that fits."""
    tokenizer = byte_level(template)
    kept = [{"question": one["question"], "answer": one["alternate"]} for one in TEXT]
    expected = load_retain(kept, tokenizer, max_length=99).examples
    rows = [
        row_forms(one["question"], one["answer"])[form] | {"spans": one["spans"], "alternate": one["alternate"]}
        for one in [{**TEXT[0], "question": "x " * 99}, *TEXT]
    ]
    end = "<|im_end|>" if template else tokenizer.eos_token
    for ours, example, one in zip(load(rows, tokenizer, 99), expected, TEXT, strict=True):
        assert ours.row == example.row + 1
        assert torch.equal(ours.input_ids, example.input_ids) and torch.equal(ours.labels, example.labels)
        assert tokenizer.decode(example.labels[example.labels >= 0]).lstrip() == one["alternate"] + end


def test_rows_that_come_once_are_read_twice() -> None:
    (expected,), (record,) = (unlearn("dpo", models("dpo")[0], forget=forget).history for forget in (TEXT, iter(TEXT)))
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
        with pytest.raises(DataError, match=f"^alternate answer of forget row {told}"):
            load(rows, tokenizer, max_length)
