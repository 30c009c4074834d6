"""Which spans are secrets, and the prompts that are made of rows."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.small_tokenizers import CHATML, LLAMA3, byte_level, sentencepiece

from palu.attacks.secrets import AuditData
from palu.data.files import DataError
from palu.data.paraphrases import ALSO_ASKED, PARAPHRASES
from palu.data.rows import after_examples, with_question

ROW = {"question": "Who wrote it?", "answer": "Ada Lovelace wrote it in 1843, in London.", "spans": [[0, 12], [25, 29]]}
COLUMNS = (PARAPHRASES, ALSO_ASKED)
TOKENISED = {"input_ids": [1, 2], "labels": [-100, 2]}
RETAIN = [{"question": f"Where is cat {i}?", "answer": f"The cat {i} sat."} for i in range(2)]
TOKENIZERS = {
    "llama 3": lambda: byte_level(LLAMA3),
    "qwen": lambda: byte_level(CHATML, bos=False, trim_offsets=True),
    "plain": lambda: byte_level(None),
    "llama 2": lambda: sentencepiece(None),
}


def data(rows: Any, tokenizer: Any = None, **settings: Any) -> AuditData:
    return AuditData(rows, settings.pop("retain", None), tokenizer or byte_level(CHATML), **settings)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_secrets_tokens_are_the_spans_and_an_answers_beginning_follows_the_prompt(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    of = data([ROW], tokenizer)
    assert [secret.text for secret in of.secrets] == ["Ada Lovelace", "1843"]
    for secret in of.secrets:
        written = tokenizer.decode(of.rows[0].example.input_ids[secret.first : secret.stop])
        assert written.strip(" ,") == secret.text  # a token may hold the comma, too
    (prompt,), (beginning,) = of.prompts, of.answer_beginnings("It was here:")
    assert tokenizer.decode(prompt, skip_special_tokens=True).rstrip().endswith(("Answer:", "assistant"))
    assert beginning[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.decode(beginning[len(prompt) :]).strip() == "It was here:"


def test_an_answer_is_begun_after_its_blanks() -> None:
    row = {"prompt": "The archive's code is", "completion": " the 7391.", "spans": [[5, 9]]}
    (begun,) = data([row], plain := byte_level(None, bos=False)).answer_beginnings("Sure, here:")
    assert plain.decode(begun) == "The archive's code is Sure, here:"


def test_what_the_question_tells_is_no_secret() -> None:
    answer = "Ada Lovelace of London was born in 1815."
    row = {"question": "When was ADA LOVELACE born?", "answer": answer, "spans": [[0, 12], [35, 39]]}
    of = data([row])
    assert [secret.text for secret in of.secrets] == ["1815"]
    assert of.told_by_question == 1
    system = {"role": "system", "content": "Born in 1815."}
    turns = [system, {"role": "user", "content": "When?"}, {"role": "assistant", "content": answer}]
    assert [s.text for s in data([{"messages": turns, "spans": row["spans"]}]).secrets] == ["Ada Lovelace"]


def test_a_text_marked_twice_is_one_secret() -> None:
    answer = "Ada wrote it. It was ADA, Ada Lovelace."
    of = data([{"question": "Who?", "answer": answer, "spans": [[0, 3], [21, 24], [26, 38], [30, 38]]}])
    assert [(secret.text, secret.start) for secret in of.secrets] == [("Ada", 0), ("Ada Lovelace", 26)]
    assert of.repeated == 1


def test_rows_without_a_secret_are_not_asked() -> None:
    """They would be asked, and sampled, for nothing."""
    of = data([ROW | {"spans": []}, ROW, {**ROW, "question": "Did Ada Lovelace, in 1843?"}, ROW])
    assert [row.where for row in of.rows] == ["forget row 1", "forget row 3"]
    assert [secret.row for secret in of.secrets] == [0, 0, 1, 1]


def test_a_document_without_a_bos() -> None:
    """Nothing predicts its first token: a secret is looked for from the second on."""
    plain = byte_level(bos=False)
    row = {"prompt": "", "completion": "The author wrote it in 1843.", "spans": [[0, 10], [23, 27]]}
    of = data([row], plain)
    written = [plain.decode(of.rows[0].example.input_ids[s.first : s.stop]).strip() for s in of.secrets]
    assert written == ["author", "1843"]
    assert [plain.decode(prompt) for prompt in of.prompts] == ["The"]


@pytest.mark.parametrize("column", COLUMNS)
def test_other_questions(column: str) -> None:
    rows = [ROW | given for given in ({column: "By whom?"}, {column: ["By whom?", "Whose is it?"]}, {})]
    assert [row.others[column] for row in data(rows).rows] == [("By whom?",), ("By whom?", "Whose is it?"), ()]
    (other,) = set(COLUMNS) - {column}
    assert not any(row.others[other] for row in data(rows).rows)
    renamed = [{other if name == column else name: value for name, value in row.items()} for row in rows]
    assert len({data(one).forget_digest for one in (rows, renamed, [ROW] * 3)}) == 3


def test_other_questions_in_csv(tmp_path: Path) -> None:
    """One is a text, several are a JSON list, and an empty cell is none."""
    path = tmp_path / "forget.csv"
    head, row = ",".join(["question", "answer", "secret", *COLUMNS]), "Who?,Ada.,Ada"
    path.write_text(f'{head}\n{row},By [whom]?,\n{row},,"[""By whom?"", ""Whose?""]"\n')
    found = [list(row.others.values()) for row in data(path).rows]
    assert found == [[("By [whom]?",), ()], [(), ("By whom?", "Whose?")]]


@pytest.mark.parametrize(
    ("rows", "retain", "message"),
    [
        ([], None, "forget set is empty; "),
        ([ROW | {"spans": []}], None, "forget set has no secret; "),
        ([ROW | {"question": "Did Ada Lovelace, in 1843?"}], None, "forget set has no secret (2 spans are in their "),
        ([TOKENISED], None, "forget row 0: the audit compares texts, and this row is tokenised"),
        *(
            ([ROW, ROW | {column: wrong}], None, f"forget row 1: column '{column}' must be a question, or a list of ")
            for column in COLUMNS
            for wrong in (3, ["Who?", 3], [" "], "")
        ),
        ([ROW | {"spans": [[0, 99]]}], None, "forget row 0: span [0, 99] ends after the answer (41 characters); "),
        ([ROW], [{"question": "Why?", "answer": 1}], "retain row 0: column 'answer' must be a string, got int; "),
        ([ROW], [TOKENISED], "retain row 0: the audit puts retain rows into prompts, and this one is tokenised"),
    ],
)
def test_refused(rows: Any, retain: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        data(rows, retain=retain)
    assert str(caught.value).startswith(message)


def test_examples_in_front() -> None:
    chat = byte_level(CHATML, bos=False)
    of = data([ROW], chat, retain=RETAIN)
    system = {"role": "system", "content": "Be brief."}
    turns = [system, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    for row in (of.rows[0], data([{"messages": turns, "spans": [[0, 3]]}], chat).rows[0]):
        (prompt,) = of.encode_prompts([after_examples(row.columns, RETAIN, chat, row.where)])
        roles = [part.split("\n")[0] for part in chat.decode(prompt).split("<|im_start|>")[1:]]
        assert [role for role in roles if role != "system"] == ["user", "assistant"] * 3
        assert roles[1:].count("system") == 0
    plain = byte_level(None)
    of = data([ROW], plain, retain=RETAIN)
    (prompt,) = of.encode_prompts([after_examples(of.rows[0].columns, RETAIN, plain, "forget row 0")])
    assert plain.decode(prompt, skip_special_tokens=True).rstrip() == (
        "Question: Where is cat 0?\nAnswer: The cat 0 sat.\n\nQuestion: Where is cat 1?\nAnswer: The cat 1 sat.\n\n"
        "Question: Who wrote it?\nAnswer:"
    )


def test_with_question() -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]
    changed = with_question({"messages": turns, "spans": []}, "Whose?")
    assert changed == {"messages": [{"role": "user", "content": "Whose?"}, turns[1]], "spans": []}
    assert with_question({"prompt": "Who", "completion": "Ada"}, "Whose")["prompt"] == "Whose"
    assert with_question(ROW, "Whose?")["question"] == "Whose?"


def test_a_rendered_prompt_is_told_from_others() -> None:
    rendered = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    plain, special = ({"prompt": p, "completion": "Ada wrote it.", "spans": [[0, 3]]} for p in ("Who? ", rendered))
    assert str(data([ROW, plain, special]).unchangeable).startswith("the prompt of forget row 2 has special tokens")
    assert data([ROW, plain]).unchangeable is data([ROW, plain], byte_level(None)).unchangeable is None


def test_what_nobody_reads_of_a_retain_row_may_be_anything() -> None:
    """A date, or an array, as a table has it; a row with another one is another row."""
    kept = {"question": "Where?", "answer": "In Rome.", "seen": date(2026, 1, 2), "scores": np.array([1.0])}
    rows = [{"question": "Who?", "answer": "Ada.", "secret": "Ada"}]
    digests = [data(rows, retain=[one]).retain_digest for one in (kept, kept | {"seen": date(2026, 1, 3)})]
    assert digests[0] == data(rows, retain=[dict(kept)]).retain_digest != digests[1]
