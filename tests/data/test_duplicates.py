"""Rows that are given twice: which are the same, and that each set is complained of once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from helpers.runs import row_forms
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import forget_rows, tiny_llama
from transformers import TrainingArguments

import palu
from palu.data.duplicates import check_disjoint, warn_of_told_secrets
from palu.data.examples import load_forget, load_retain


def row(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "answer": answer, "spans": [[0, 3]]}


ADA = row("Who?", "Ada did.")
FIX = "keep each row once, with all that is to be forgotten in it"
TWICE = f"forget set: 2 rows repeat an earlier one, so that it weighs more: 1 (as 0), 3 (as 0); {FIX}"


def warned(call: Callable[[], Any], *words: str) -> list[str]:
    """The warnings, of those words if there are any given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    messages = [str(one.message) for one in caught]
    return [message for message in messages if not words or any(word in message for word in words)]


def told(load: Any, rows: Any, tokenizer: Any = None) -> list[str]:
    return warned(lambda: load(rows, tokenizer or byte_level(CHATML), max_length=99, warn=True))


def test_repeats_are_named() -> None:
    rows = [ADA, ADA, row("Who else?", "Ada did."), ADA | {"spans": [[4, 7]]}, row("Who?", "Ada.")]
    assert told(load_forget, rows) == [TWICE]
    alone = "retain set: 1 row repeats an earlier one, so that it weighs more: 3 (as 2); keep each row once"
    assert told(load_retain, [rows[4], rows[2], ADA, ADA]) == [alone]
    assert told(load_forget, rows[2:]) == []
    read = warned(lambda: load_forget(rows, byte_level(CHATML), max_length=99))  # as the record and the evaluation do
    assert read == []


def test_many_repeats_are_not_all_named() -> None:
    (message,) = told(load_forget, forget_rows(3) * 1000)
    assert message.startswith("forget set: 2997 rows repeat an earlier one, so that it weighs more: 3 (as 0), 4 (as 1)")
    assert message.endswith(f"12 (as 0), ...; {FIX}")


def test_the_text_as_the_model_reads_it_counts() -> None:
    """Whatever the columns are called; and two documents that are alike up to max_length are two."""
    forms = [form | {"spans": [[0, 3]]} for form in row_forms("Who?", "Ada did.")]
    (message,) = told(load_forget, forms)
    assert "1 (as 0), 2 (as 0)" in message
    long = [row("Who?", f"Ada {'and Bob ' * 99}{end}.") for end in ("sat", "ran")]
    assert told(load_forget, long) == []
    (message,) = told(load_forget, [*long, long[0]])
    assert "2 (as 0)" in message


def test_where_the_answer_begins_counts() -> None:
    rows = [{"prompt": "The cat", "completion": " sat"}, {"prompt": "The", "completion": " cat sat"}]
    loaded = load_retain(rows, byte_level(), max_length=99)
    assert loaded.examples[0].input_ids.tolist() == loaded.examples[1].input_ids.tolist()
    assert told(load_retain, rows, byte_level()) == []


def test_another_answer_to_the_same_question_may_be_kept() -> None:
    tokenizer = byte_level(CHATML)
    retain = load_retain([row("Who?", "I do not know."), row("Who was it?", "Ada did.")], tokenizer, max_length=99)
    check_disjoint(load_forget([ADA], tokenizer, max_length=99).hashes, retain.hashes)


def secrets_told(secrets: list[str], *answers: str) -> list[str]:
    def numbered(name: str, texts: Any) -> list[tuple[str, str]]:
        return [(text, f"{name} {i}") for i, text in enumerate(texts)]

    return warned(lambda: warn_of_told_secrets(numbered("forget", secrets), numbered("retain", answers)))


@pytest.mark.parametrize(
    ("secret", "answer"),
    [
        ("Ada Lovelace", "It was ADA  LOVELACE."),
        ("06/30/1975", "On 06-30-1975"),
        ("東京", "彼は東京で生まれた"),
        ("7", "It is 7."),
        ("Al", "Al sat."),
        ("😀", "so 😀!"),
        ("O'Neil", "He is O&#39;Neil."),
    ],
)
def test_an_answer_that_tells_a_secret(secret: str, answer: str) -> None:
    (message,) = secrets_told(["Karachi", secret], "The cat sat.", answer)
    assert message.startswith(
        f"retain set: 1 answer tells what is to be forgotten: retain 1 has {secret!r} of forget 1; "
    )
    assert secrets_told([secret], "The cat sat.", "Adam Lovelaces, 1975, 71, 京都, Alan") == []


def test_the_rarest_secrets_are_named_first() -> None:
    names = [f"name {i}" for i in range(3000)]
    (message,) = secrets_told(["the city", *names], *["It is the city."] * 50, *(f"{name}, the city" for name in names))
    assert message.startswith(
        "retain set: 3050 answers tell what is to be forgotten: retain 50 has 'name 0' of forget 1, "
    )
    assert message.count(" has ") == 10 and "'the city'" not in message


def test_a_run_warns_once(tmp_path: Any) -> None:
    tokenizer = byte_level(CHATML)
    in_question = {"question": "Is it at home?", "answer": "Yes, at home.", "secret": "home"}
    rows = [ADA, ADA, row("Who else?", "Ada did."), ADA, in_question]
    kept = [row("Where?", "At home, with Ada."), row("Where to?", "Not home.")]
    config = palu.UnlearnConfig(epochs=1, anchors=0, neighbours=0, variants=0, progress=False)

    def model() -> Any:
        return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256)

    def recorded() -> None:
        trained = model()
        palu.Recorder(trained, rows, kept, tokenizer=tokenizer, config=config)
        palu.unlearn(trained, None, rows, kept, tokenizer=tokenizer, config=config)

    told = (
        "retain set: 1 answer tells what is to be forgotten: retain row 0 has 'Ada' of forget row 0; "
        "take such rows out, or mark less in the forget set"
    )
    assert warned(recorded, "repeat", "tells") == [TWICE, told]
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)

    def trainer(retain: Any) -> None:
        palu.PaluTrainer(model(), arguments, forget=rows, retain=retain, processing_class=tokenizer)

    assert warned(lambda: trainer(kept), "repeat", "tells") == [TWICE, told]
    with pytest.raises(palu.DataError, match=r"^forget row 2 and retain row 2 are the same, prompt and answer: "):
        trainer([*kept, rows[2]])
