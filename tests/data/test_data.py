"""Loading sets: from every source, cut to max_length, rendered by chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_tokenizers as small
from helpers.runs import row_forms
from helpers.runs import text_row as row
from tokenizers import Tokenizer, models, normalizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from palu.data.examples import load_alternates, load_forget, load_retain
from palu.data.files import DataError
from palu.data.rows import with_answer
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.models.generation import encode_prompts

# As Mistral's: a blank before the answer, but none at the end of the prompt for generation.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


BYTE = small.byte_level()
CHATML = small.byte_level(small.CHATML)
IDS = [1, 20, 21, 22]
LABELS = [IGNORE, ORDINARY, 21, ORDINARY]


ROWS = [row("Ada Lovelace.", "Ada"), row("In London.", "London"), row("Yes.")]


def found(source: Any, tokenizer: PreTrainedTokenizerFast | None = BYTE) -> list[tuple[int, list[int], list[int]]]:
    """(row, tokens, labels) of each example."""
    examples = load_forget(source, tokenizer, max_length=99).examples
    return [(e.row, e.input_ids.tolist(), e.labels.tolist()) for e in examples]


def parts(example: Example) -> list[Any]:
    assert example.offsets is not None
    return [example.input_ids.tolist(), example.labels.tolist(), example.offsets.tolist()]


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    loaded = load_forget(ROWS, BYTE, max_length=99)
    assert (loaded.skipped, loaded.without_span) == (0, 1)
    expected = found(ROWS)
    assert [row for row, _, _ in expected] == [0, 1, 2]
    path = tmp_path / "forget.jsonl"
    lines = [json.dumps(one) for one in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", lines[1], "  ", lines[2], ""]).encode())
    separator = tmp_path / "separator.jsonl"  # U+2028 is a line's end to str.splitlines, not to JSON
    separator.write_text(json.dumps(row("a\u2028Ada", "Ada"), ensure_ascii=False), encoding="utf-8")
    assert len(found(separator)) == 1
    spans = (
        [{**one, "spans": np.array(one["spans"], dtype=np.int32).reshape(-1, 2)} for one in ROWS],
        [{**one, "spans": [tuple(map(np.int64, span)) for span in one["spans"]]} for one in ROWS],
        [{**one, "spans": torch.tensor(one["spans"], dtype=torch.long).reshape(-1, 2)} for one in ROWS],
    )
    source: Any
    for source in (path, str(path), iter(ROWS), tuple(ROWS), *spans):
        assert found(source) == expected


def test_every_tokenised_source_gives_the_same() -> None:
    expected = found(ROWS)
    lists = [{"input_ids": ids, "labels": labels} for _, ids, labels in expected]
    tensors = [{key: torch.tensor(value) for key, value in one.items()} for one in lists]
    columns = {key: [one[key] for one in lists] for key in lists[0]}
    for source in (lists, tensors, columns):
        assert found(source, None) == found(source) == expected
    assert found([ROWS[0], lists[1], ROWS[2]]) == expected
    for one in tensors:
        one["attention_mask"] = torch.ones_like(one["labels"])
    for side in ("left", "right"):
        padded = {
            key: pad_sequence([one[key] for one in tensors], True, filler, side)
            for key, filler in (("input_ids", 0), ("labels", IGNORE), ("attention_mask", 0))
        }
        before = padded["labels"].clone()
        assert found(padded, None) == found({key: value.tolist() for key, value in padded.items()}, None) == expected
        assert torch.equal(padded["labels"], before)


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    expected = found(ROWS)
    table = datasets.Dataset.from_list(ROWS)
    tokenised = datasets.Dataset.from_list([{"input_ids": ids, "labels": labels} for _, ids, labels in expected])
    for one in (table, tokenised):
        assert found(one) == found(one.with_format("torch")) == found(one.to_iterable_dataset()) == expected


def test_tokenised_rows_are_copied_and_their_first_label_dropped() -> None:
    ids = torch.tensor([[5, 6, 7]])
    labels = ids.clone()
    loaded = load_retain({"input_ids": ids, "labels": labels}, None, max_length=99)
    assert loaded.examples[0].labels.tolist() == [IGNORE, 6, 7]
    assert labels.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("nothing", [None, ""])
def test_rows_of_all_forms_in_one_table(nothing: str | None) -> None:
    """As CSV and Parquet hold them: each row has nothing in the columns of the other forms."""
    forms = row_forms("Who?", "Ada.")
    empty = dict.fromkeys(("question", "answer", "prompt", "completion"), nothing)
    empty |= dict.fromkeys(("messages", "input_ids", "labels", "attention_mask"))
    rows = [*({"spans": [[0, 3]]} | form for form in forms), {"input_ids": IDS, "labels": LABELS}]
    first, *others, tokens = load_forget([empty | row for row in rows], CHATML, max_length=99).examples
    assert parts(first) == parts(others[0]) == parts(others[1])
    assert tokens.labels.tolist() == LABELS
    assert with_answer(empty | forms[1], "Hina.") == empty | {"prompt": "Who?", "completion": "Hina."}


# --- Cut to max_length ---
@pytest.mark.parametrize("tokenised", [False, True])
def test_spans_that_max_length_cuts_off_are_counted(tokenised: bool) -> None:
    long = "the cat sat on the mat " * 9
    rows = [
        row("Ada Lovelace did.", "Ada"),
        row(f"{long}Ada.", "Ada"),  # all of its spans are beyond
        row(f"Ada {long}Lovelace", "Ada", "Lovelace"),  # one of two
        row("Ada.", "Ada", question=long),  # the whole answer is
        row("Ada."),
        row(f"{long}Ada."),
        row("Ada.", question=long),
    ]
    whole = load_forget(rows, BYTE, max_length=999)
    assert (whole.without_span, whole.cut_rows, whole.all_spans_cut, whole.spans_length) == (3, (), 0, 0)
    source: Any = rows
    if tokenised:
        source = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in whole.examples]
    with pytest.raises(DataError) as caught:
        load_forget(source, BYTE, max_length=30)
    needed = max(int((e.labels >= 0).nonzero()[-1]) + 1 for e in whole.examples if e.row in (1, 2, 3))
    assert "cuts off spans of 3 rows (1, 2, 3), " in str(caught.value)
    assert f"set max_length = {needed}, " in str(caught.value)
    loaded = load_forget(source, BYTE, max_length=30, allow_cut_spans=True)
    assert [example.row for example in loaded.examples] == [0, 1, 2, 4, 5]
    for example, full in zip(loaded.examples, [e for e in whole.examples if e.row not in (3, 6)], strict=True):
        assert torch.equal(example.input_ids, full.input_ids[:30]) and torch.equal(example.labels, full.labels[:30])
    assert (loaded.skipped, loaded.without_span) == (2, 2)
    assert (loaded.cut_rows, loaded.all_spans_cut, loaded.spans_length) == ((1, 2, 3), 1, needed)
    assert load_forget(source, BYTE, max_length=needed).cut_rows == ()
    with pytest.raises(DataError, match=rf"max_length = {needed - 1} cuts off spans of 1 row \(\d\), which"):
        load_forget(source, BYTE, max_length=needed - 1)


def test_ten_rows_with_cut_spans_are_named() -> None:
    rows = [{"input_ids": IDS, "labels": LABELS}, *[{"input_ids": IDS * 2, "labels": LABELS * 2}] * 11]
    with pytest.raises(DataError, match=r"of 11 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\), which .* = 7, or"):
        load_forget(rows, None, max_length=4)
    with pytest.raises(DataError, match=r"of 10 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10\), which"):
        load_forget(rows[:-1], None, max_length=4)
    assert load_retain([{"input_ids": IDS * 2, "labels": [-100, *IDS[1:]] * 2}], None, max_length=4).cut_rows == ()


# --- chat templates ---
def test_values_for_the_chat_template() -> None:
    dated = small.byte_level(small.DATED)
    fixed = small.byte_level(small.DATED.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    kwargs = {"date_string": "26 Jul 2024"}
    rows = [row("Ada did.", "Ada") | {"alternate": "No."}]
    for load in (load_forget, load_retain):
        (ours,), (theirs,) = (
            load(rows, tokenizer, max_length=99, chat_template_kwargs=given).examples
            for tokenizer, given in ((dated, kwargs), (fixed, None))
        )
        assert parts(ours) == parts(theirs) and "26 Jul 2024" in dated.decode(ours.input_ids)
    (ours,) = load_alternates(rows, dated, [ours], max_length=99, chat_template_kwargs=kwargs)
    (theirs,) = load_alternates(rows, fixed, [ours], max_length=99)
    assert parts(ours) == parts(theirs)
    prompts, expected = encode_prompts(["Who?"], dated, kwargs), encode_prompts(["Who?"], fixed)
    assert torch.equal(prompts[0][0], expected[0][0]) and prompts[1] == expected[1]


def test_a_prompt_that_generation_does_not_give() -> None:
    rows, thinking = [row("Ada.", "Ada"), row("Ada.", "Ada", question="Where?")], small.byte_level(small.THINKING)
    for load, name in ((load_forget, "forget"), (load_retain, "retain")):
        with pytest.warns(UserWarning, match="trained on") as caught:
            load(rows, thinking, max_length=99, warn=True)
        (told,) = (str(one.message) for one in caught)  # once a set
        assert told.startswith(f"{name} row 0: the prompt that is trained on has '<think>")
    without = small.byte_level("{% if messages | length < 2 %}{{ raise_exception('no') }}{% endif %}" + small.CHATML)
    with pytest.warns(UserWarning, match=r"^forget row 0: the chat template gives no prompt for generation \(no\), so"):
        load_forget(rows, without, max_length=99, warn=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("template", [small.CHATML, small.LLAMA3, MISTRAL, small.THINKING, None])
def test_a_prompt_that_generation_gives(template: str | None) -> None:
    """Also for several turns, blanks around an answer, and rows that are rendered or tokenised already."""
    turns = [{"role": role, "content": "Who?"} for role in ("user", "assistant", "user")]
    rows: list[dict[str, Any]] = [row(" Ada. ", "Ada"), {"input_ids": IDS, "labels": LABELS}]
    rows.append({"prompt": "<|im_start|>Who?", "completion": "Ada", "spans": [[0, 3]]})
    if template is not None:
        rows.append({"messages": [*turns, {"role": "assistant", "content": "Ada"}], "spans": [[0, 3]]})
    kwargs = {"enable_thinking": False} if template == small.THINKING else None
    load_forget(rows, small.byte_level(template), max_length=99, chat_template_kwargs=kwargs, warn=True)


@pytest.mark.parametrize("prompt", ["It is", "Answer:", "Who?", "Un été", "Born on the 3"])
def test_a_completion_that_continues_the_prompts_last_word(prompt: str) -> None:
    rows = [{"prompt": prompt, "completion": f"{blank}élan 7."} for blank in (" ", "")]
    with pytest.warns(UserWarning, match=r"^retain row 1: .* without a blank"):
        load_retain(rows, BYTE, max_length=99, warn=True)


@pytest.mark.filterwarnings("error")
def test_completions_that_need_no_blank() -> None:
    """Where a blank or a line break stands between, or the script or the sign has none; or a chat template renders."""
    pairs = [("Who? ", "Ada"), ("Who?\n", "Ada"), ("Who", ", Ada"), ("f(", "x)"), ("", "Ada"), ("東京は", "大きい")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    load_retain(rows, BYTE, max_length=99, warn=True)
    load_retain([{"prompt": "It is", "completion": "Ada"}], CHATML, max_length=99, warn=True)


@pytest.mark.parametrize("template", [small.CHATML, small.LLAMA3])
@pytest.mark.parametrize("whole", [False, True])
def test_a_prompt_that_is_rendered_already(template: str, whole: bool) -> None:
    """It gives the tokens and roles of the row that the template renders."""
    tok = small.byte_level(template)
    columns = row("Ada Lovelace, in London.", "Ada Lovelace", "London")
    message = [{"role": "user", "content": columns["question"]}]
    text = str(tok.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    end = "<|eot_id|>" if template == small.LLAMA3 else "<|im_end|>\n"
    completion = columns["answer"] + end * whole
    rendered = {"prompt": text, "completion": completion, "spans": columns["spans"]}
    plain = row("Ada.", "Ada")
    examples = load_forget([plain, rendered, columns, rendered], tok, max_length=99).examples
    expected = examples[2]
    if not whole:  # no end is told: it is the tokenizer's
        expected.input_ids[-1] = tok.eos_token_id
    assert parts(examples[1]) == parts(examples[3]) == parts(expected)
    assert parts(examples[0]) == parts(load_forget([plain], tok, max_length=99).examples[0])
    (kept,) = load_retain([rendered], tok, max_length=99).examples
    assert torch.equal(kept.input_ids, expected.input_ids)
    assert torch.equal(kept.labels != IGNORE, expected.labels != IGNORE)


@pytest.mark.parametrize("tok", [BYTE, small.sentencepiece()], ids=["byte", "sp"])
def test_a_rendered_prompt_gets_no_second_bos(tok: PreTrainedTokenizerFast) -> None:
    plain, rendered = "Who? ", f"{tok.bos_token}Who? "
    rows = [{"prompt": text, "completion": "Ada.", "spans": [[0, 3]]} for text in (plain, rendered, plain)]
    one, two, three = load_forget(rows, tok, max_length=99).examples
    assert two.input_ids.tolist().count(tok.bos_token_id) == 1
    if tok is BYTE:  # the other one puts a blank before a text
        assert parts(one) == parts(two)
    assert parts(one) == parts(three)
    assert one.input_ids[0] == two.input_ids[0] == tok.bos_token_id and two.input_ids[-1] == tok.eos_token_id


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ messages[1].content }} {{ messages[1].content }}"]
)
def test_a_template_without_the_answer_or_with_two(template: str) -> None:
    with pytest.raises(DataError, match=r"^forget row 0: the chat template alters the answer"):
        load_forget([row("Ada.", "Ada")], small.byte_level(template), max_length=99)


def test_max_length_too_small_for_any_label() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        load_forget(ROWS, BYTE, max_length=1)


def test_text_that_the_tokenizer_drops() -> None:
    backend = Tokenizer(models.WordLevel({"[U]": 0, "Ada": 1}, unk_token="[U]"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    dropping = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[U]")
    for answer, told in (("\u200bAda", r"'\\u200b' in the answer no token"), ("\u200b", "the answer no token")):
        with pytest.raises(DataError, match=f"^forget row 0: the tokenizer gives {told}"):
            load_forget([{"prompt": "", "completion": answer, "spans": [[0, 1]]}], dropping, max_length=99)
