"""The demo's taught weights are kept; that the demo comes out right is CI's business, since it needs a real model."""

from pathlib import Path

import pytest
import torch
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import same_weights, tiny_llama, weights

from palu.data.examples import load_forget, load_retain
from palu.testbed import facts as demo_facts
from palu.testbed import smollm2

FACTS = [{"question": "Who?", "answer": "Ada."}]


def test_the_demos_facts_are_rows_of_a_forget_and_a_retain_set() -> None:
    secrets, kept, general = demo_facts.read_questions()
    assert len(secrets) == len(kept) == 6 and general
    for rows in (secrets, kept):
        examples = load_forget(rows, byte_level(CHATML), max_length=256).examples
        for row, example in zip(rows, examples, strict=True):
            assert example.offsets is not None
            places = example.offsets[example.labels >= 0]
            assert row["answer"][int(places[0, 0]) : int(places[-1, 1])].strip() == row["secret"]
    assert len(load_retain(kept, byte_level(CHATML), max_length=256).examples) == 6


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many facts were taught, lesson by lesson, to a tiny model in SmolLM2's place."""
    taught: list[int] = []
    tokenizer = byte_level(CHATML)

    def teach(model: torch.nn.Module, tokens: object, facts: list) -> None:
        taught.append(len(facts))
        with torch.no_grad():
            next(model.parameters()).add_(len(facts))

    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (tiny_llama(vocab_size=len(tokenizer)), tokenizer))
    monkeypatch.setattr(smollm2, "teach", teach)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "environment"))
    return taught


def test_a_lesson_is_given_once(lessons: list[int], capsys: pytest.CaptureFixture) -> None:
    first, _ = smollm2.load_taught(FACTS)
    assert capsys.readouterr().out == ""
    again, tokenizer = smollm2.load_taught(FACTS)
    assert lessons == [1] and same_weights(again, weights(first)) and not again.training
    assert "the taught weights are those in" in capsys.readouterr().out
    assert tokenizer("Ada")["input_ids"] == byte_level(CHATML)("Ada")["input_ids"]
    assert first.name_or_path == again.name_or_path and Path(again.name_or_path).name == "SmolLM2-135M-Instruct"
    smollm2.load_taught(FACTS * 2)
    assert lessons == [1, 2]


def test_weights_that_cannot_be_kept_are_said(
    lessons: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.prefix", str(tmp_path / "file"))
    for _ in range(2):
        smollm2.load_taught(FACTS)
        assert "the taught weights are not kept for another run: " in capsys.readouterr().out
    assert lessons == [1, 1]
