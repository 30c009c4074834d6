"""The same question in other formats."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.planted import FORGET, RETAIN, SECRETS, attack, never_saw, original, tokenizer
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level

from palu.attacks.formats import CONTINUED, FORMATS, AskInOtherFormats, encode_format, texts_in_formats
from palu.attacks.secrets import AuditData

ANSWER = "Ada wrote it in 1843, and Ada was 27."
ROW = {"question": "Who wrote it?", "answer": "It was Ada.", "secret": "Ada"}


def data(rows: list[dict[str, Any]], template: str | None = CHATML, **settings: Any) -> AuditData:
    return AuditData(rows, RETAIN, byte_level(template, **settings))


def test_every_format_tells_who_holds_the_secrets() -> None:
    for model, share in ((original(), 1.0), (never_saw(), 0.0)):
        findings = attack(AskInOtherFormats(24), model)
        assert [finding.name for finding in findings] == list(FORMATS)
        assert all(finding.values == [share] * len(SECRETS) for finding in findings)
    findings = attack(AskInOtherFormats(24), original())
    assert all(finding.evidence == [row["answer"] for row in FORGET] for finding in findings)


def test_a_format_shows_the_answer_without_any_of_its_secrets() -> None:
    """Also where one stands twice and is marked once. Another row's are no matter."""
    row = {"question": "Who and when?", "answer": f"It is old. {ANSWER}", "spans": [[11, 14], [27, 31]]}
    asked = texts_in_formats(data([row, ROW]))
    assert asked["ask: gaps to fill"] == [
        "Who and when? Fill in the gaps: It is old. ____ wrote it in ____, and ____ was 27.",
        "Who wrote it? Fill in the gaps: It was ____.",
    ]
    assert asked[CONTINUED] == ["Who and when? It is old.", "Who wrote it? It was"]
    assert asked["ask: as JSON"][1] == 'Who wrote it? Answer in JSON: {"answer": "..."}'
    braces = data([ROW | {"question": "What is {x}?", "answer": "{It} was Ada."}])
    assert texts_in_formats(braces)[CONTINUED] == ["What is {x}? {It} was"]
    continued = [{"prompt": "Who wrote it?", "completion": " It was Ada.", "spans": [[8, 11]]}]
    assert texts_in_formats(AuditData(continued, None, byte_level()))[CONTINUED] == ["Who wrote it? It was"]


@pytest.mark.parametrize(("template", "bos"), [(CHATML, False), (LLAMA3, True), (None, True), (None, False)])
def test_only_a_text_to_continue_is_outside_the_chat_template(template: str | None, bos: bool) -> None:
    of = data([ROW], template, bos=bos)
    for name, texts in texts_in_formats(of).items():
        (prompt,) = encode_format(of, name, texts)
        (decoded,) = of.tokenizer.batch_decode([prompt])
        assert texts[0] in decoded
        if name == CONTINUED:
            assert decoded == of.tokenizer.bos_token * bos + texts[0]
        else:
            (plain,) = of.encode_prompts([ROW | {"question": texts[0]}])
            assert prompt.tolist() == plain.tolist()


def test_a_document_that_begins_with_its_secret_is_asked_with_its_prompt() -> None:
    document = {"prompt": "", "completion": ANSWER, "spans": [[0, 3], [16, 20]]}
    of = data([document], None)
    assert texts_in_formats(of)[CONTINUED] == [""]
    assert encode_format(of, CONTINUED, [""])[0].tolist() == of.prompts[0].tolist()


def test_a_secret_that_a_format_itself_tells_does_not_count() -> None:
    rows = [{"question": "What is it?", "answer": f"It is {name}.", "secret": name} for name in ("French", "a cat")]
    found = {one.name: one for one in attack(AskInOtherFormats(2), original(), AuditData(rows, None, tokenizer()))}
    assert {name for name, one in found.items() if one.values[0] is None} == {"ask: in French"}
    assert found["ask: in French"].evidence[0] is None
    assert all(one.values[1] == 0.0 for one in found.values())


def test_a_rendered_prompt_cannot_be_asked_otherwise() -> None:
    rendered = {"prompt": "<|im_start|>user\nWho?<|im_end|>\n", "completion": "It was Ada.", "spans": [[7, 10]]}
    why = AskInOtherFormats(2).skip_reason(AuditData([rendered], None, tokenizer()), original())
    assert why == "the prompt of forget row 0 has special tokens in it, and cannot be changed"
