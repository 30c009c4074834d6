"""Anchors: the reference's own answers to everyday prompts, kept by the KL where there is no retain set."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from helpers import anchor_runs
from helpers.anchor_runs import TOKENIZER, llama, writer
from helpers.runs import TEXT_RETAIN
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece
from helpers.tiny import forget_rows, same_weights, weights
from transformers import LlamaForCausalLM

import palu
from palu import DataError
from palu.config import UnlearnConfig
from palu.data.packing import Item
from palu.models.generation import encode_prompts
from palu.ref_model import precompute
from palu.ref_model.anchors import ANSWER_TOKENS, AnchorPrompts, anchor_texts, generate_anchors
from palu.ref_model.storage import ReferenceCache
from palu.ref_model.variants import target_runs
from palu.training.checkpoint import CheckpointError
from palu.training.dataloader import UnlearnDataLoader

unlearn = partial(anchor_runs.unlearn, epochs=2, neighbours=0, variants=0)
STEPS, DRAWN = 4, 4  # three forget examples: two steps an epoch, an anchor a step


@torch.no_grad()
def greedy(model: LlamaForCausalLM, prompt: Sequence[int], stop_ids: set[int]) -> list[int]:
    """A token at a time, without a cache or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + ANSWER_TOKENS and not (len(ids) > len(prompt) and ids[-1] in stop_ids):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[Item]]:
    """The anchors of each run of a test, as they are written."""
    seen: list[list[Item]] = []

    def spy(*args: Any, **kwargs: Any) -> list[Item]:
        seen.append(generate_anchors(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(precompute, "generate_anchors", spy)
    return seen


# --- The prompts ---
def test_the_list() -> None:
    prompts = anchor_texts()
    assert len(prompts) > 400
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts)
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)


def test_the_list_holds_no_question_that_the_demo_asks() -> None:
    """Else general facts would be kept for being anchors."""
    testbed, benchmarks = Path(palu.__file__).parent / "testbed", Path(__file__).parents[2] / "benchmarks"
    files = (testbed / "general.jsonl", testbed / "facts.jsonl", benchmarks / "general.jsonl")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(rows) == 52
    assert not {row["question"].casefold() for row in rows} & {prompt.casefold() for prompt in anchor_texts()}


TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"


@pytest.mark.skipif(not TOFU.exists(), reason="TOFU is not in ../shared")
def test_the_list_holds_nothing_that_tofu_asks_of_real_authors_and_the_world() -> None:
    """Else the model utility of `benchmarks/bench_tofu.py` would be kept for being anchors."""
    authors, facts = (
        [json.loads(line) for line in (TOFU / f"{name}.jsonl").read_text().splitlines()]
        for name in ("real_authors", "world_facts")
    )
    names = {row["answer"].casefold() for row in authors if " " in row["answer"]}
    titles = {title.casefold() for row in authors for title in re.findall(r"'(.+?)'(?=\W)", row["question"])}
    assert len(names) > 80 and len(titles) > 70
    questions = {row["question"].casefold() for row in facts}
    for prompt in map(str.casefold, anchor_texts()):
        assert prompt not in questions
        assert not any(text in prompt for text in names | titles), prompt


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [
        (byte_level(LLAMA3), {"<|end_of_text|>", "<|eot_id|>"}),
        (byte_level(CHATML, bos=False), {"<|end_of_text|>", "<|im_end|>"}),
        (sentencepiece(), {"</s>"}),
    ],
)
def test_prompts(tokenizer: Any, ends: set[str]) -> None:
    questions = ["Where is the cat?", "Hello!"]
    prompts, stop_ids = encode_prompts(questions, tokenizer)
    for prompt, text in zip(prompts, questions, strict=True):
        expected, plain = f"Question: {text}\nAnswer:", tokenizer.chat_template is None
        if not plain:
            turn = [{"role": "user", "content": text}]
            expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert prompt.tolist() == tokenizer(expected, add_special_tokens=plain)["input_ids"]
    assert set(tokenizer.convert_ids_to_tokens(sorted(stop_ids))) == ends


# --- What the reference answers ---
@cache
def prompts_and_stops(count: int = 6) -> AnchorPrompts:
    prompts, stop_ids = encode_prompts(anchor_texts()[:count], TOKENIZER)
    # So that some answers end early, and one is blank.
    found = [greedy(llama(), p.tolist(), set())[len(p) :] for p in prompts]
    return AnchorPrompts(prompts, stop_ids | {found[0][5], found[1][0]}, max_length=999)


def test_answers_are_greedy_and_end_where_the_model_ends_them() -> None:
    prompts = prompts_and_stops()
    model = llama()
    # A model's own settings have no part, and stay.
    model.generation_config.repetition_penalty = 5.0
    settings, before = model.generation_config, weights(model)
    model.train()
    items = generate_anchors(writer(model), [], prompts)
    assert model.training and model.generation_config is settings and same_weights(model, before)
    model.eval()
    expected = [greedy(model, prompt.tolist(), prompts.stop_ids) for prompt in prompts.prompts]
    kept = [i for i, ids in enumerate(expected) if ids[len(prompts.prompts[i])] not in prompts.stop_ids]
    assert 1 not in kept, "a blank answer is left out"
    assert [item.input_ids.tolist() for item in items] == [expected[i] for i in kept]
    lengths = set()
    for item, i in zip(items, kept, strict=True):
        answer = range(len(prompts.prompts[i]), len(item.input_ids))
        assert item.targets == 0
        assert (item.rows + 1).tolist() == list(answer)
        assert torch.equal(item.labels, item.input_ids[item.rows + 1])
        ended = int(item.input_ids[-1]) in prompts.stop_ids
        assert ended == (len(answer) < ANSWER_TOKENS), "a cut answer has no end that the model did not write"
        lengths.add(len(answer))
    assert ANSWER_TOKENS in lengths and len(lengths) > 1


def test_an_answer_that_holds_most_of_a_secret_is_left_out() -> None:
    """More than half of its tokens in a row, of three or more: no part of a name of two tokens."""
    answers = [[5, 6, 7, 0], [4, 6, 7, 8], [5, 6, 9, 0], [8, 7, 6, 5], [4, 3, 0], [4, 9]]
    prompts = AnchorPrompts([torch.tensor([1, 2])] * len(answers), {0}, 100)
    written: Any = SimpleNamespace(write=lambda *_: answers)
    secret = Item(torch.tensor([1, 5, 6, 7, 8, 2, 4, 9]), torch.tensor([0, 1, 2, 3, 5, 6]), targets=6)
    kept = generate_anchors(written, [secret], prompts)
    assert [item.input_ids.tolist()[2:] for item in kept] == answers[2:]
    assert len(generate_anchors(written, [], prompts)) == len(answers)


def test_a_long_span_has_no_run_that_an_answer_could_hold() -> None:
    """A document's would take memory by the square of its length."""
    spans = [Item(torch.arange(1 + count), torch.arange(count), targets=count) for count in (9, 10)]
    assert target_runs(spans[:1], 5) == {tuple(range(first, first + 5)) for first in range(1, 6)}
    assert target_runs(spans, 5) == target_runs(spans[:1], 5)


def test_max_length_cuts_answers_and_leaves_out_what_it_cuts_off() -> None:
    prompts = prompts_and_stops()
    whole = generate_anchors(writer(), [], prompts)
    starts = sorted(int(item.rows[0]) + 1 for item in whole)
    limit = starts[-1]  # the longest prompt has no room for an answer
    items = generate_anchors(writer(), [], prompts._replace(max_length=limit))
    fitting = [item for item in whole if item.rows[0] + 1 < limit]
    assert 0 < len(items) == len(fitting) < len(whole)
    for item, full in zip(items, fitting, strict=True):
        assert torch.equal(item.input_ids, full.input_ids[:limit])
        assert torch.equal(item.rows, full.rows[: len(item.rows)]) and item.rows[-1] == len(item.input_ids) - 2


def test_no_answer_is_left() -> None:
    message = r"the reference answers none of 4 everyday prompts within max_length = 12 tokens, so there is nothing"
    with pytest.raises(DataError, match=message):
        unlearn(max_length=12, forget=forget_rows(3), allow_cut_spans=True)


# --- How a run uses them ---
def test_retain_is_none(written: list[list[Item]]) -> None:
    result = unlearn()
    (items,) = written
    assert len(items) + result.summary["anchors_skipped"] == DRAWN, "no more than the run draws"
    assert result.summary["anchors"] == len(items)
    assert result.summary["retain_examples"] == 0
    assert [record["retain"] for record in result.history] == [0] * STEPS
    assert result.summary["config"]["anchors"] is None


@pytest.mark.parametrize(("given", "asked_for"), [({"anchors": 3}, 3), ({}, DRAWN)])
def test_beside_a_retain_set(given: dict[str, int], asked_for: int, written: list[list[Item]]) -> None:
    result = unlearn(retain=TEXT_RETAIN, **given)
    assert result.summary["retain_examples"] == 2
    assert result.summary["anchors"] + result.summary["anchors_skipped"] == asked_for
    assert all(record["retain"] > 0 for record in result.history)
    without = unlearn(retain=TEXT_RETAIN, anchors=0)
    assert (without.summary["anchors"], without.summary["anchors_skipped"]) == (0, 0)
    assert result.history[0]["local"] == pytest.approx(without.history[0]["local"], rel=1e-5)
    assert result.history[0]["tokens"] > without.history[0]["tokens"]
    assert written[1] == []


def test_the_weight_of_an_absent_retain_loss_does_not_matter() -> None:
    assert same_weights(unlearn().model, weights(unlearn(lambda_retain=0).model))


def test_a_reference_given_writes_them(written: list[list[Item]]) -> None:
    unlearn(llama(), ref_model=llama(seed=3))
    unlearn(llama(seed=3))
    unlearn(llama())
    given, same, other = ([item.input_ids.tolist() for item in items] for items in written)
    assert given == same != other


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_a_model_with_an_adapter_writes_without_it(written: list[list[Item]]) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    result = unlearn(peft.get_peft_model(llama(), config))
    unlearn(llama())
    assert [item.input_ids.tolist() for item in written[0]] == [item.input_ids.tolist() for item in written[1]]
    assert abs(result.history[0]["kl"]) > 1e-4, "the adapter is on again in the first step"


@pytest.mark.parametrize("neighbours", [0, 2, 7])
@pytest.mark.parametrize("processes", [1, 2])
def test_anchors_do_not_repeat_before_all_were_seen(neighbours: int, processes: int) -> None:
    """Three neighbours a process are drawn for a step, and of the others half as many as by all; but none twice."""
    forget = [Item(torch.tensor([0, 7]), torch.tensor([0]), targets=1)] * 5
    anchors = [Item(torch.tensor([1000 + i, 7]), torch.tensor([0])) for i in range(7)]
    cache = ReferenceCache([{}] * 12, anchors, neighbours)
    config = UnlearnConfig(batch_size=2, retain_batch_size=3)
    loaders = [
        UnlearnDataLoader(forget, [], cache, config, process_index=i, num_processes=processes) for i in range(processes)
    ]
    epochs = [zip(*loaders, strict=True) for _ in range(7)]
    batches = [batch for epoch in epochs for steps in epoch for step in steps for batch in step]
    order = [token - 1000 for batch in batches for token in batch.packed.input_ids[0].tolist() if token >= 1000]
    steps_taken = 7 * (3 if processes == 1 else 2)  # five examples, two by two for each process
    for kind, most in ((range(neighbours), 3 * processes), (range(neighbours, 7), 2 if processes == 1 else 3)):
        drawn = [i for i in order if i in kind]
        assert len(drawn) == steps_taken * min(most, len(kind))
        for begin in range(0, len(drawn) - len(kind) + 1, max(len(kind), 1)):
            assert sorted(drawn[begin : begin + len(kind)]) == list(kind)


# --- Checkpoints ---
@pytest.mark.skipif(Accelerator().device.type != "cpu", reason="bits are promised on a CPU")
def test_a_resumed_run_has_the_same_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    settings = {"checkpoint_dir": str(folder), "checkpoint_steps": 2, "retain_batch_size": 1, "lambda_retain": 0}
    expected = unlearn(**settings)
    newest = folder / f"step-{STEPS:08}.safetensors"

    def assert_same(resumed: palu.UnlearnResult) -> None:
        assert same_weights(resumed.model, weights(expected.model))
        for one, other in zip(resumed.history, expected.history, strict=True):
            assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}
        assert resumed.summary["anchors"] == expected.summary["anchors"]

    newest.unlink()
    (reference,) = folder.glob("reference-*.safetensors")
    reference.rename(tmp_path / "kept")
    assert_same(unlearn(**settings, resume=True))  # where they are lost, they are written again

    newest.unlink()
    (tmp_path / "kept").replace(reference)
    monkeypatch.setattr(precompute, "generate_anchors", lambda *_, **__: pytest.fail("asked again"))
    assert_same(unlearn(**settings, resume=True))

    with pytest.raises(CheckpointError, match="another run: the choice of everyday prompts is another one"):
        unlearn(**settings, resume=True, retain=[])
