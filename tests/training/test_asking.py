"""A run ends by itself when the model, asked, tells no secret in a way that is not watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.anchor_runs import TOKENIZER, llama, unlearn
from helpers.runs import TEXT_RETAIN
from helpers.scenarios import assert_same, step
from torch import Tensor
from transformers import AutoModelForCausalLM

import palu
from palu.data.packing import Item
from palu.ref_model import anchors
from palu.training import asking, checkpoint, loop
from palu.training import step as steps

SETTINGS: dict[str, Any] = {
    **{"retain": TEXT_RETAIN, "lora_rank": 2, "anchors": 0, "neighbours": 0, "variants": 1},
    **{"epochs": 9},
}


def telling_item() -> Item:
    """An answer of the model that tells one of the forget set's secrets, in words that no row has."""
    before = TOKENIZER("Where is she from? I am from", return_tensors="pt").input_ids[0]
    secret = torch.tensor(TOKENIZER(" Karachi", add_special_tokens=False).input_ids)
    rows = torch.arange(len(before) - 1, len(before) + len(secret) - 1)
    return Item(torch.cat([before, secret]), rows, len(rows))


@pytest.fixture
def tells(monkeypatch: pytest.MonkeyPatch) -> list[list[Item]]:
    """What the model tells when it is asked for the first time, the second, ...; nothing from then on."""
    answers: list[list[Item]] = []
    monkeypatch.setattr(asking, "generate_answers_that_tell", lambda *_: answers.pop(0) if answers else [])
    monkeypatch.setattr(steps, "FEWEST_STEPS", 4)
    return answers


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The runs that began to watch something."""
    runs: list[Any] = []
    watch = asking.watch
    for module in (asking, loop):
        monkeypatch.setattr(module, "watch", lambda run, items: runs.append(run) or watch(run, items))
    return runs


def test_what_is_told_is_watched_and_the_run_goes_on(tells: list[list[Item]], watched: list[Any]) -> None:
    """Until nothing new is told; what is known already keeps it no longer."""
    short = unlearn(**SETTINGS)
    assert short.summary["ended_by"] == "forgotten" and short.summary["told_when_asked"] == 0 and watched == []
    tells += [[telling_item()], [telling_item()]]
    longer = unlearn(**SETTINGS)
    assert longer.summary["ended_by"] == "forgotten" and longer.summary["told_when_asked"] == 1
    assert longer.summary["epochs"] == short.summary["epochs"] + 1 and "earlier" not in longer.history[-1]
    (run,) = watched
    ((item, outputs),) = run.loader.later
    (batch,) = (batch for _, batch in run.loader.watched_batches())
    assert batch.counts.targets == item.targets == telling_item().targets
    # Its candidates are those of the reference, not of the model as it was when it told.
    with torch.no_grad():
        highest = llama()(input_ids=item.input_ids[None]).logits[0, item.rows].topk(50).indices
    assert torch.equal(outputs["index"][:, 0], item.labels.int())
    assert [set(row) for row in outputs["index"][:, 1:].tolist()] == [set(row) for row in highest.tolist()]


def test_what_has_a_token_above_the_floor_takes_part(
    tells: list[list[Item]], watched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[list[int]] = []
    check = asking.check_watched
    monkeypatch.setattr(asking, "check_watched", lambda run: check(run) + (returned.append(run.loader.returned) or 0))
    told = telling_item()
    with torch.no_grad():
        likeliest = llama()(input_ids=told.input_ids[None, :-1]).logits[0, -1].argmax()
    ids = torch.cat([told.input_ids[:-1], likeliest[None]])
    tells.append([Item(ids, torch.tensor([len(ids) - 2]), 1)])
    unlearn(**SETTINGS, probability_floor=0.01)
    (run,) = watched
    assert returned == [run.loader.watched] and len(run.loader.watched) == 1


def test_resumed_bit_by_bit(tells: list[list[Item]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "KEPT", 99)
    settings = SETTINGS | {"checkpoint_dir": str(tmp_path), "checkpoint_steps": 1}
    tells.append([telling_item()])
    expected = unlearn(**settings)
    last, by_epoch = len(expected.history), [record["epoch"] for record in expected.history]
    asked = by_epoch.index(by_epoch[-1])  # the step after which it told something
    assert asked < last - 1
    for kept in (last - 1, asked):
        for later in range(kept + 1, last + 1):
            (tmp_path / step(later)).unlink(missing_ok=True)
        tells += [[telling_item()]] * (kept == asked)  # its checkpoint was written before it was asked
        resumed = unlearn(**settings, resume=True)
        assert_same(resumed, expected)
        assert resumed.summary["told_when_asked"] == 1


@pytest.mark.parametrize("given", ["weights", "reference"])
def test_not_asked_where_the_reference_cannot_be_run(given: str, tells: list[list[Item]]) -> None:
    tells.append([telling_item()])
    settings: dict[str, Any] = {"lora_rank": None} if given == "weights" else {"ref_model": llama()}
    result = unlearn(**SETTINGS | settings)
    assert result.summary["ended_by"] == "forgotten" and result.summary["told_when_asked"] == 0 and tells


def test_the_model_is_asked_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question for its own secrets, as it is trained, and as long as an answer."""
    monkeypatch.setattr(steps, "FEWEST_STEPS", 4)
    calls: list[tuple[list[str], int]] = []
    generate = anchors.generate_ids

    def watch_generate(model: Any, prompts: list[Tensor], *args: Any, **settings: Any) -> Any:
        said = generate(model, prompts, *args, **settings)
        if settings["max_new_tokens"] == anchors.ANSWER_TOKENS:
            calls.append(
                ([TOKENIZER.decode(prompt) for prompt in prompts], sum(p.requires_grad for p in model.parameters()))
            )
            first = TOKENIZER(" Karachi. Ada Lovelace", add_special_tokens=False).input_ids
            return [first] * 2 + said[2:]  # the first question has the one secret, the second the other
        return said

    monkeypatch.setattr(anchors, "generate_ids", watch_generate)
    result = unlearn(**SETTINGS)
    prompts, adapter = calls[0]
    assert "Who wrote the first program?" in prompts[0] and "Where was she born?" in prompts[1] and adapter > 0
    assert result.summary["told_when_asked"] == 2


def test_what_was_forgotten_earlier_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "FEWEST_STEPS", 4)
    earlier = [{"question": "Who is the mayor?", "answer": "The mayor is Sansom.", "secret": "Sansom"}]
    given: dict[str, Any] = {"tokenizer": TOKENIZER, "config": palu.UnlearnConfig(max_length=200, progress=False)}
    recorder = palu.Recorder(model := llama(), earlier, TEXT_RETAIN, **given)
    palu.save_run(tmp_path / "first", unlearn(model, forget=earlier, **SETTINGS), TOKENIZER, recorder)
    generate = anchors.generate_ids

    def tell(model: Any, prompts: list[Tensor], *args: Any, **settings: Any) -> Any:
        said = generate(model, prompts, *args, **settings)
        if settings["max_new_tokens"] != anchors.ANSWER_TOKENS:
            return said
        told = TOKENIZER(" Sansom", add_special_tokens=False).input_ids
        asked = ["Who is the mayor?" in TOKENIZER.decode(prompt) for prompt in prompts]
        assert sum(asked) == 1
        return [told if own else ids for own, ids in zip(asked, said, strict=True)]

    monkeypatch.setattr(anchors, "generate_ids", tell)
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "model")
    result = unlearn(left, after=tmp_path / "first", **SETTINGS)
    assert result.summary["earlier_examples"] == result.summary["told_when_asked"] == 1
