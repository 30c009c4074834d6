"""Requests in sequence: what was forgotten before stays forgotten, and a run goes on from no other model."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.scenarios import ON_CPU, assert_same, step, with_lora
from helpers.small_tokenizers import byte_level
from helpers.tiny import answer_probabilities, forget_rows, overfit, retain_rows, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import palu
from palu.methods.base import FEWEST_STEPS
from palu.training import checkpoint, loop
from palu.training.step import enough_forgotten

pytestmark = ON_CPU

FIRST, SECOND = forget_rows(4, seed=0), forget_rows(4, seed=7)
# They teach the first request's answers again, with a token more, so that they are other rows.
TELLING = [
    {
        "input_ids": [*ids, 5],
        "labels": [-100 if label == -100 else i for i, label in zip(ids, labels, strict=True)] + [5],
    }
    for ids, labels in (row.values() for row in FIRST)
]
CONFLICT = {"epochs": 60, "lambda_retain": 0.1}
SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 2, "lora_rank": None, "progress": False, "top_k": 20}


def run(folder: Path, model: Any, forget: Any, retain: Any, **settings: Any) -> palu.UnlearnResult:
    after = settings.pop("after", None)
    config = palu.UnlearnConfig(**SETTINGS | settings)
    recorder = palu.Recorder(model, forget, retain, config=config, after=after)
    result = palu.unlearn(model, None, forget, retain, config=config, after=after)
    palu.save_run(folder, result, byte_level(None), recorder)
    return result


def left_by(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def private(folder: Path, name: str) -> Any:
    return json.loads((folder / "private" / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests") / "first"
    model = tiny_llama()
    overfit(model, FIRST + SECOND + retain_rows(6), steps=150)
    run(folder, model, FIRST, retain_rows(6), epochs=40)
    return folder


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after the first one, which comes to its last step while retain rows tell what was forgotten there."""
    folder = tmp_path_factory.mktemp("requests") / "second"
    run(folder, left_by(first), SECOND, TELLING, **CONFLICT, after=first)
    return folder


# --- earlier requests stay forgotten ---
def test_what_comes_back_is_acted_on(first: Path, second: Path) -> None:
    """Retain rows teach the first request's answers again: alone they come back, and with ``after`` they do not."""
    alone = palu.unlearn(left_by(first), None, SECOND, TELLING, **SETTINGS | CONFLICT)
    came_back, stayed = (
        answer_probabilities(model, FIRST, sensitive_only=True) for model in (alone.model, left_by(second))
    )
    assert stayed.max() < 0.3 < 0.7 < came_back.max()
    history = [json.loads(line) for line in (second / "private" / "history.jsonl").read_text().splitlines()]
    taking_part = [record["earlier"] for record in history]
    assert taking_part[0] < taking_part[-1] == len(FIRST), "those whose tokens came back, and no others"
    assert all(taking_part[i] == taking_part[i + 1] for i in range(0, len(history), 2)), "they change between epochs"
    epochs = private(second, "summary.json")["epochs"]
    assert len(history) == 2 * epochs and "earlier" not in alone.history[0], (
        "an epoch has as many steps as without them"
    )


def test_a_run_does_not_end_while_an_earlier_request_is_back() -> None:
    method: Any = SimpleNamespace(settings=palu.UnlearnConfig().method)
    history: Any = [{"onset_probability": 0.05}] * FEWEST_STEPS
    assert enough_forgotten(history, 2, method) and enough_forgotten(history, 2, method, watched=0.19)
    assert not enough_forgotten(history, 2, method, watched=0.21)


def test_resumed_bit_by_bit(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an epoch, the same rows take part; after one, they are chosen again."""
    settings = SETTINGS | {"epochs": 4, "checkpoint_steps": 1, "checkpoint_dir": str(tmp_path / "checkpoints")}
    monkeypatch.setattr(checkpoint, "KEPT", 8)

    def unlearn(**more: Any) -> palu.UnlearnResult:
        return palu.unlearn(left_by(first), None, SECOND, TELLING, **settings | {"after": first} | more)

    expected = unlearn()
    taking_part = [record["earlier"] for record in expected.history]
    assert len(set(taking_part)) > 1, "else the next lines tell nothing"
    assert_same(unlearn(checkpoint_dir=None, checkpoint_steps=None), expected)
    for last in (6, 5, 4):
        for later in range(last + 1, 9):
            (tmp_path / "checkpoints" / step(later)).unlink(missing_ok=True)
        assert_same(unlearn(resume=True), expected)
    with pytest.raises(palu.CheckpointError, match="the choice of earlier requests is another one"):
        unlearn(resume=True, after=None)


def test_what_was_left_alone_is_not_looked_at_later(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a secret that its run left alone would be above the floor for ever."""
    folder = shutil.copytree(first, tmp_path / "first")
    seen: list[Any] = []
    prepare = loop.prepare_run
    monkeypatch.setattr(loop, "prepare_run", lambda *args, **kwargs: seen.append(prepare(*args, **kwargs)) or seen[-1])
    ledger = private(folder, "ledger.json")
    assert ledger["requests"][0]["shared_beginnings"] == []
    ids, labels = FIRST[0].values()
    start = next(i for i, label in enumerate(labels) if min(label, labels[i + 1]) >= 0)  # of two tokens or more
    for pairs in ([], [ids[start - 1 : start + 1]]):
        ledger["requests"][0]["shared_beginnings"] = pairs
        (folder / "private" / "ledger.json").write_text(json.dumps(ledger))
        palu.unlearn(left_by(first), None, SECOND, TELLING, **SETTINGS, max_steps=1, after=folder)
    whole, less = (data.earlier[0] for data in seen)
    assert whole.targets == less.targets + 1 and set(whole.rows.tolist()) - set(less.rows.tolist()) == {start - 1}


# --- the ledger ---
def test_ledger_and_rows_need_no_earlier_folder(first: Path, second: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(second, tmp_path / "moved")
    third = forget_rows(2, seed=9)
    run(tmp_path / "third", left_by(moved), third, retain_rows(6), max_steps=1, after=moved)
    shutil.rmtree(moved)
    folder = tmp_path / "third"
    rows = [json.loads(line) for line in (folder / "private" / "forget.jsonl").read_text().splitlines()]
    assert rows == third + SECOND + FIRST
    assert all(stat.S_IMODE((folder / "private" / n).stat().st_mode) == 0o600 for n in ("forget.jsonl", "ledger.json"))
    requests = private(folder, "ledger.json")["requests"]
    earlier = private(second, "ledger.json")["requests"]
    assert [(one["number"], one["run"], one["rows"]) for one in requests] == [
        (1, "first", 4),
        (2, "second", 4),
        (3, "third", 2),
    ]
    assert [one["proof"] for one in requests[:2]] == [one["proof"] for one in earlier]
    assert (
        requests[0]["weights_after"]
        == requests[1]["weights_before"]
        == private(first, "record.json")["hashes"]["weights_after"]
    )
    record = private(folder, "record.json")
    assert {(s["request"], s["row"]) for s in record["secrets"]} == {
        *((3, row) for row in range(2)),
        *((2, row) for row in range(2, 6)),
        *((1, row) for row in range(6, 10)),
    }
    (proof, now) = (requests[0][name] for name in ("proof", "now"))
    assert (
        proof["known"]["before"]
        == proof["secrets"]
        == now["secrets"]
        == sum(s["request"] == 1 for s in record["secrets"])
    )
    assert now["highest"] == max(s["after"]["probability"] for s in record["secrets"] if s["request"] == 1)
    assert record["data"]["forget"]["examples"] == 2
    assert record["model"]["name"] == private(first, "record.json")["model"]["name"], "not that of the folder before"


# --- what is refused ---
def refused(match: str, model: Any, after: Path, **settings: Any) -> None:
    with pytest.raises(ValueError, match=match):
        palu.unlearn(model, None, SECOND, retain_rows(6), **SETTINGS | settings, after=after)


def test_another_model_is_refused(first: Path, second: Path) -> None:
    match = "the model is not the one that this run left, by its fingerprint; load .*first.model"
    refused(match, tiny_llama(), first)
    refused(match, left_by(second), first)
    with pytest.raises(ValueError, match=match):
        palu.Recorder(tiny_llama(), SECOND, retain_rows(6), config=palu.UnlearnConfig(**SETTINGS), after=first)
    with pytest.raises(ValueError, match="leave ref_model out"):
        palu.unlearn(left_by(first), tiny_llama(), SECOND, retain_rows(6), **SETTINGS, after=first)
    refused('only local_loss = "unlikelihood" with a probability_floor', left_by(first), first, local_loss="topk_mse")


def test_a_new_adapter_goes_on_and_its_run_is_the_last(first: Path, tmp_path: Path) -> None:
    adapted = with_lora(left_by(first))
    run(tmp_path / "adapter", adapted, SECOND, retain_rows(6), max_steps=1, after=first)
    assert len(private(tmp_path / "adapter", "ledger.json")["requests"]) == 2
    refused("is an adapter, whose reference would be its base", adapted, tmp_path / "adapter")


def test_a_folder_of_no_finished_run_is_refused(first: Path, tmp_path: Path) -> None:
    model = left_by(first)
    refused("is not the folder of a run; give the folder that palu unlearn wrote", model, tmp_path)
    refused("give the run's folder", model, first / "model")
    unfinished = shutil.copytree(first, tmp_path / "unfinished")
    (unfinished / "private" / "summary.json").unlink()
    refused("has not finished", model, unfinished)
    for name, fault in {"forget.jsonl": "\n", "ledger.json": "[]"}.items():
        changed = shutil.copytree(first, tmp_path / name)
        (changed / "private" / name).write_text(fault)
        refused("are not as the run left them", model, changed)
        (changed / "private" / name).unlink()
        refused(f"{name} is missing", model, changed)


def test_rows_that_a_new_setting_or_set_breaks_are_named(first: Path) -> None:
    same = [
        row
        | {"labels": [i if label >= -200 and label != -100 else -100 for i, label in zip(*row.values(), strict=True)]}
        for row in FIRST
    ]
    with pytest.raises(palu.DataError, match="earlier forget row 0 and retain row 0 are the same"):
        palu.unlearn(left_by(first), None, SECOND, same, **SETTINGS, after=first)
    with pytest.raises(
        palu.DataError, match=r"earlier requests, in .*forget\.jsonl: forget set: max_length = 12 cuts off"
    ):
        palu.unlearn(
            left_by(first),
            None,
            [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}],
            retain_rows(6),
            **SETTINGS,
            max_length=12,
            after=first,
        )
