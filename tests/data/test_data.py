"""palu.data: roles checked token by token, every complaint by its exact words."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palu.data.examples import load_alternates, load_forget, load_retain
from palu.data.files import DataError
from palu.data.rows import with_answer
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.models.generation import encode_prompts

SHARED = Path(__file__).parents[3] / "shared"

# An answer right behind a special token, and no special token behind the answer.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_start|>"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
# As Qwen3's: the full text has words between the generation prompt and the answer.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
# As Qwen3's: an empty thought before the answer, which the prompt for generation has only without thinking.
THINKING = THINK + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Mistral's: a blank before the answer, but none at the end of the prompt for generation.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return {
        "byte": lambda: small.byte_level(),
        "byte, no bos": lambda: small.byte_level(bos=False),
        "byte, trimmed": lambda: small.byte_level(trim_offsets=True),
        "byte, prefix": lambda: small.byte_level(add_prefix_space=True),
        "byte, trimmed prefix": lambda: small.byte_level(add_prefix_space=True, trim_offsets=True, bos=False),
        "byte, no words": lambda: small.byte_level(split=False),
        "byte, NFC": lambda: small.byte_level(normalizer=normalizers.NFC()),
        "byte, Llama 3": lambda: small.byte_level(small.LLAMA3),
        "byte, ChatML": lambda: small.byte_level(small.CHATML),
        "byte, bare": lambda: small.byte_level(BARE),
        "byte, think": lambda: small.byte_level(THINK),
        "sp": lambda: small.sentencepiece(),
        "sp, eos": lambda: small.sentencepiece(eos=True),
        "sp, no bos": lambda: small.sentencepiece(bos=False),
        "sp, normalizer": lambda: small.sentencepiece(metaspace=False),
        "sp, ChatML": lambda: small.sentencepiece(small.CHATML),
        "sp, bare": lambda: small.sentencepiece(BARE, prepend="always"),
        "sp, bare normalizer": lambda: small.sentencepiece(BARE, metaspace=False),
    }[name]()


PLAIN = ["byte", "byte, trimmed", "byte, prefix", "byte, trimmed prefix", "byte, no words", "sp", "sp, eos",
         "sp, no bos", "sp, normalizer"]  # fmt: skip
TEMPLATED = ["byte, Llama 3", "byte, ChatML", "byte, bare", "byte, think", "sp, ChatML", "sp, bare",
             "sp, bare normalizer"]  # fmt: skip


def row(answer: str, *words: str, question: str = "Who?") -> dict[str, Any]:
    """A forget row whose spans are these words."""
    return {
        "question": question,
        "answer": answer,
        "spans": [[answer.index(word), answer.index(word) + len(word)] for word in words],
    }


def forget(name: str, *rows: dict[str, Any], max_length: int = 4096) -> list[Example]:
    return load_forget(list(rows), tokenizer(name), max_length=max_length).examples


def roles(name: str, example: Example) -> list[tuple[str, str]]:
    """[(piece, role)] from the first token with a role: o ordinary, S sensitive."""
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (IGNORE, ORDINARY, token)
    pieces = tokenizer(name).convert_ids_to_tokens(example.input_ids.tolist())
    named = [
        (piece, {IGNORE: ".", ORDINARY: "o"}.get(label, "S"))
        for piece, label in zip(pieces, example.labels.tolist(), strict=True)
    ]
    first = next(i for i, (_, role) in enumerate(named) if role != ".")
    assert all(role != "." for _, role in named[first:])
    return named[first:]


def prompt(name: str, example: Example) -> str:
    """The text of the tokens without a role."""
    return str(tokenizer(name).decode(example.input_ids[example.labels == IGNORE]))


# --- roles ---
def test_plain_byte_level_row_token_by_token() -> None:
    (example,) = forget("byte", row("Ada Lovelace, in London.", "Ada Lovelace", "London"))
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    assert prompt("byte", example) == "<|begin_of_text|>Question: Who?\nAnswer:"
    # " Ada" holds the prompt's last blank and the answer's first letters: it is an answer token.
    assert roles("byte", example) == [
        ("ĠAda", "S"), ("ĠLovelace", "S"), (",", "o"), ("Ġin", "o"), ("ĠLondon", "S"), (".", "o"),
        ("<|end_of_text|>", "o"),
    ]  # fmt: skip


def test_plain_sentencepiece_row_token_by_token() -> None:
    (example,) = forget("sp", row("Ada Lovelace, in London.", "Ada Lovelace", "London"))
    assert prompt("sp", example) == "<s> Question: Who?\nAnswer:"
    assert roles("sp", example) == [
        ("▁Ada", "S"), ("▁Lovelace", "S"), (",", "o"), ("▁in", "o"), ("▁London.", "S"), ("</s>", "o"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "before", "terminator"),
    [
        (
            "byte, Llama 3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        ("byte, ChatML", "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        ("sp, ChatML", "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
        (
            "byte, think",
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "<|im_end|>",
        ),
        ("byte, bare", "Who?<|im_start|>", "<|end_of_text|>"),  # its line break behind the answer is dropped
    ],
)
def test_chat_template(name: str, before: str, terminator: str) -> None:
    (example,) = forget(name, row("Ada Lovelace, in London :", "Ada Lovelace", "London"))
    assert prompt(name, example) == before
    found = roles(name, example)
    blank = "▁" if name.startswith("sp") else "Ġ"
    sensitive = [piece for piece, role in found if role == "S"]
    assert sensitive == ["A", "da", f"{blank}Lovelace", f"{blank}London"]
    assert found[-2:] == [(":", "o"), (terminator, "o")]


@pytest.mark.parametrize("nothing", [None, ""])
def test_rows_of_all_forms_in_one_table(nothing: str | None) -> None:
    """As CSV and Parquet hold them: each row has nothing in the columns of the other forms."""
    forms: list[dict[str, Any]] = [
        {"question": "Who?", "answer": "Ada."},
        {"prompt": "Who?", "completion": "Ada."},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]},
    ]
    empty = dict.fromkeys(("question", "answer", "prompt", "completion"), nothing) | {"messages": None}
    first, *others = forget("byte, ChatML", *(empty | form | {"spans": [[0, 3]]} for form in forms))
    for example in others:
        assert torch.equal(first.labels, example.labels)
        assert torch.equal(first.input_ids, example.input_ids)
    assert with_answer(empty | forms[1], "Hina.") == empty | {"prompt": "Who?", "completion": "Hina."}


@pytest.mark.parametrize("answer", ["assistant", "think", "user", "im_end", "Who?", "a"])
def test_answer_that_the_template_itself_contains_is_found(answer: str) -> None:
    (example,) = forget("byte, think", row(answer, answer))
    assert prompt("byte, think", example).endswith("</think>\n\n")
    assert "".join(piece for piece, role in roles("byte, think", example) if role == "S") == answer


def test_messages_and_prompt_completion() -> None:
    turns = {"system": "Be brief.", "user": "Who?", "assistant": "Ada."}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    (example,) = forget("byte, ChatML", {"messages": messages, "spans": [[0, 3]]})
    assert prompt("byte, ChatML", example).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert roles("byte, ChatML", example) == [("A", "S"), ("da", "S"), (".", "o"), ("<|im_end|>", "o")]
    (plain,) = forget("byte", {"prompt": "The cat", "completion": " sat on", "spans": [[5, 7]]})
    assert prompt("byte", plain) == "<|begin_of_text|>The cat"
    assert roles("byte", plain) == [("Ġsat", "o"), ("Ġon", "S"), ("<|end_of_text|>", "o")]


def test_normalizer_that_joins_characters() -> None:
    """NFC makes one character of e and its accent; offsets still count the user's two."""
    (example,) = forget("byte, NFC", row("x e\u0301 y London", "e\u0301", "London"))
    assert [piece for piece, role in roles("byte, NFC", example) if role == "S"] == ["Ã©", "ĠLondon"]
    with pytest.raises(DataError, match=r"^forget row 0: the tokenizer gives '.+' in the answer no token; "):
        forget("byte, NFC", row("x e\u0301 y", "\u0301"))


def test_prompt_may_be_empty_and_the_first_token_has_no_role() -> None:
    (example,) = forget("byte", {"prompt": "", "completion": "The cat", "spans": [[0, 7]]})
    assert roles("byte", example)[0] == ("The", "S")
    (example,) = forget("byte, no bos", {"prompt": "", "completion": "The cat", "spans": [[0, 7]]})
    assert example.labels.tolist()[0] == IGNORE
    assert roles("byte, no bos", example) == [("Ġcat", "S"), ("<|end_of_text|>", "o")]


def test_spans_in_any_order_nested_repeated_touching() -> None:
    expected = forget("byte", row("Ada Lovelace in London", "Ada Lovelace", "London"))[0].labels
    for spans in (
        [[16, 22], [0, 12]],
        [[0, 12], [16, 22], [0, 3]],
        [[0, 12], [0, 12], [16, 22]],
        [[0, 4], [4, 12], [16, 22]],
    ):
        (example,) = forget("byte", {"question": "Who?", "answer": "Ada Lovelace in London", "spans": spans})
        assert torch.equal(example.labels, expected), spans


def test_end_of_sequence_is_not_doubled() -> None:
    for name in ("sp", "sp, eos"):
        (example,) = forget(name, row("Ada.", "Ada"))
        assert (example.input_ids == 2).sum() == 1
        assert roles(name, example)[-1] == ("</s>", "o")


def test_blank_before_the_terminator_is_kept() -> None:
    """As Llama 2's template; and as GPT-2, whose end-of-sequence token is its unknown token too."""
    llama2 = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }} <|end_of_text|>{% endif %}{% endfor %}"
    )
    tok = small.byte_level(llama2)
    tok.unk_token = tok.eos_token
    (example,) = load_forget([row("Ada.", "Ada")], tok, max_length=99).examples
    pieces = tok.convert_ids_to_tokens(example.input_ids[example.labels != IGNORE].tolist())
    assert pieces == ["ĠAda", ".", "Ġ", "<|end_of_text|>"]


def test_unknown_token_ends_no_answer() -> None:
    backend = Tokenizer(models.WordLevel({"[U]": 0, "Who": 1, "Ada": 2, "<e>": 3}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{{ messages[0].content }} {{ messages[1].content }} ! <e>"
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="[U]", chat_template=template)
    (example,) = load_forget([row("Ada", "Ada", question="Who")], tok, max_length=99).examples
    assert tok.convert_ids_to_tokens(example.input_ids.tolist()) == ["Who", "Ada", "[U]", "<e>"]
    assert example.labels.tolist() == [IGNORE, 2, ORDINARY, ORDINARY]


def test_special_tokens_that_swallow_blanks_stay_out_of_the_answer() -> None:
    from tokenizers import AddedToken

    greedy = small.byte_level(small.CHATML.replace("<|im_end|>\n", "<|im_end|>").replace("}}\n{{", "}}<|go|>{{"))
    greedy.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|go|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True)]}
    )
    (example,) = load_forget([row("  Ada x  ", "Ada")], greedy, max_length=99).examples
    answer = example.input_ids[example.labels != IGNORE].tolist()
    assert greedy.convert_ids_to_tokens(answer) == ["A", "da", "Ġ", "x", "<|im_end|>"]


def test_retain_labels_are_the_tokens_and_spans_are_ignored() -> None:
    for name in ("byte", "byte, Llama 3", "sp"):
        (example,) = forget(name, row("Ada Lovelace, in London.", "Ada"))
        for extra in ({}, {"spans": "nonsense"}):
            source = [{"question": "Who?", "answer": "Ada Lovelace, in London.", **extra}]
            loaded = load_retain(source, tokenizer(name), max_length=99)
            (retained,) = loaded.examples
            assert torch.equal(retained.input_ids, example.input_ids)
            expected = torch.where(example.labels == IGNORE, IGNORE, example.input_ids)
            assert torch.equal(retained.labels, expected)
            assert (loaded.skipped, loaded.without_span) == (0, 0)


WORDS = st.sampled_from(
    [*" \n\t\u00a0.東京都é😀🦙", "  ", "Ada", "the", "city", "1843", "e\u0301", "👩\u200d👩\u200d👧"]
)
TEXTS = st.lists(WORDS | st.text(st.characters(codec="utf-8", exclude_characters="<|>\0Ġ▁"), max_size=3), max_size=12)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(PLAIN + TEMPLATED))
def test_roles_follow_the_bytes_that_each_token_holds(data: st.DataObject, name: str) -> None:
    """Against an oracle without offsets: pieces laid end to end over the text's bytes.

    So every non-blank character of a span is in sensitive tokens alone, and each of these overlaps one.
    (Left out: a text's own "▁" and "Ġ", which nothing tells from the blanks that tokenizers write so.)
    """
    answer = "".join(data.draw(TEXTS.filter(lambda words: "".join(words).strip())))
    question = "".join(data.draw(TEXTS))
    edges = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)))
    spans = [[a, b] for a, b in zip(edges[::2], edges[1::2], strict=False) if answer[a:b].strip()]
    tok = tokenizer(name)
    source = [{"prompt": question, "completion": answer, "spans": spans}, row("Ada", "Ada")]
    try:
        example = load_forget(source, tok, max_length=10**6).examples[0]
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:  # a span that is the text's first token, and no other
        assert not question and "nothing stands before" in refused
        return

    if tok.chat_template is None:
        text, shift = question + answer, len(question)
    else:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = str(tok.apply_chat_template(turns, tokenize=False))
        start = text.rindex(answer.strip(), 0, text.rindex("\n" if name.endswith(("bare", "normalizer")) else "<|"))
        shift = start - (len(answer) - len(answer.lstrip()))
    ids = tok(text, add_special_tokens=tok.chat_template is None)["input_ids"]
    ranges = small.token_bytes(tok, text, ids)
    at = [0]  # where each character begins, in bytes
    for char in text:
        at.append(at[-1] + len(char.encode()))
    wanted: set[int] = set()
    for a, b in spans:
        first_char, last_char = (a + len(answer[a:b]) - len(answer[a:b].lstrip()), a + len(answer[a:b].rstrip()))
        wanted |= set(range(at[first_char + shift], at[last_char + shift]))
    # A piece of a character stands for the whole of it, as offsets do.
    whole = [
        (max(p for p in at if p <= lo), min(p for p in at if p >= hi)) if hi > lo else (lo, lo) for lo, hi in ranges
    ]
    word = at[shift + len(answer) - len(answer.lstrip())]
    first = next(i for i, (lo, hi) in enumerate(whole) if hi > lo and hi > word)
    for i, (token, label) in enumerate(zip(example.input_ids.tolist(), example.labels.tolist(), strict=True)):
        if i >= len(ids):
            assert (token, label) == (tok.eos_token_id, ORDINARY)
        elif i == 0 or (i < first and label == IGNORE):
            assert label == IGNORE
        elif token != ids[i]:  # the end-of-sequence token in place of what follows the answer
            assert (i, token, label) == (len(example.labels) - 1, tok.eos_token_id, ORDINARY)
        else:
            assert label == (token if wanted & set(range(*whole[i])) else ORDINARY), (text, i)


# --- sources ---
ROWS = [row("Ada Lovelace.", "Ada"), row("In London.", "London"), row("Yes.")]


def same(left: list[Example], right: list[Example]) -> bool:
    return len(left) == len(right) and all(
        a.row == b.row and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right, strict=True)
    )


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    tok = tokenizer("byte")
    loaded = load_forget(ROWS, tok, max_length=99)
    assert (loaded.skipped, loaded.without_span) == (0, 1)
    assert [example.row for example in loaded.examples] == [0, 1, 2]
    path = tmp_path / "forget.jsonl"
    lines = [json.dumps(one) for one in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", lines[1], "  ", lines[2], ""]).encode())
    separator = tmp_path / "separator.jsonl"  # U+2028 is a line's end to str.splitlines, not to JSON
    separator.write_text(json.dumps(row("a\u2028Ada", "Ada"), ensure_ascii=False), encoding="utf-8")
    assert len(load_forget(separator, tok, max_length=99).examples) == 1

    numpy_spans = [{**one, "spans": np.array(one["spans"], dtype=np.int32).reshape(-1, 2)} for one in ROWS]
    numpy_edges = [{**one, "spans": [tuple(map(np.int64, span)) for span in one["spans"]]} for one in ROWS]
    tensor_spans = [{**one, "spans": torch.tensor(one["spans"], dtype=torch.long).reshape(-1, 2)} for one in ROWS]
    spans = (numpy_spans, numpy_edges, tensor_spans)
    source: Any
    for source in (path, str(path), iter(ROWS), tuple(ROWS), *spans):
        assert same(load_forget(source, tok, max_length=99).examples, loaded.examples)

    dicts = [{"input_ids": one.input_ids, "labels": one.labels} for one in loaded.examples]
    lists = [{key: value.tolist() for key, value in one.items()} for one in dicts]
    longest = max(len(one["labels"]) for one in dicts)
    for side in ("left", "right"):
        padded: dict[str, Any] = {"input_ids": [], "labels": [], "attention_mask": []}
        for one in lists:
            pad = longest - len(one["labels"])
            for key, filler, values in (
                ("input_ids", 0, one["input_ids"]),
                ("labels", IGNORE, one["labels"]),
                ("attention_mask", 0, [1] * len(one["labels"])),
            ):
                padded[key].append([filler] * pad + values if side == "left" else values + [filler] * pad)
        stacked = {key: torch.tensor(value) for key, value in padded.items()}
        before = stacked["labels"].clone()
        for source in (padded, stacked):
            assert same(load_forget(source, None, max_length=99).examples, loaded.examples)
        assert torch.equal(stacked["labels"], before)
    columns = {key: [one[key] for one in lists] for key in lists[0]}
    for source in (dicts, lists, columns):
        assert same(load_forget(source, None, max_length=99).examples, loaded.examples)
        assert same(load_forget(source, tok, max_length=99).examples, loaded.examples)
    mixed = [ROWS[0], lists[1], ROWS[2]]
    assert same(load_forget(mixed, tok, max_length=99).examples, loaded.examples)


def test_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    tok = tokenizer("byte")
    expected = load_forget(ROWS, tok, max_length=99).examples
    table = datasets.Dataset.from_list(ROWS)
    tokens = [{"input_ids": one.input_ids.tolist(), "labels": one.labels.tolist()} for one in expected]
    tokenised = datasets.Dataset.from_list(tokens)
    for source in (table, table.to_iterable_dataset(), tokenised, tokenised.with_format("torch")):
        assert same(load_forget(source, tok, max_length=99).examples, expected)
    assert same(load_forget(table.with_format("torch"), tok, max_length=99).examples, expected)


def test_tokenised_rows_are_copied_and_their_first_label_dropped() -> None:
    ids = torch.tensor([[5, 6, 7]])
    labels = ids.clone()
    loaded = load_retain({"input_ids": ids, "labels": labels}, None, max_length=99)
    assert loaded.examples[0].labels.tolist() == [IGNORE, 6, 7]
    assert labels.tolist() == [[5, 6, 7]]


def test_max_length_cuts_from_the_right_and_counts() -> None:
    rows = [row("Ada Lovelace.", "Lovelace"), row("Ada.", "Ada", question="the cat sat on the mat " * 5)]
    whole = load_forget(rows, tokenizer("byte"), max_length=999)
    start = int((whole.examples[0].labels != IGNORE).nonzero()[0])
    rows = [*rows, row("Ada", "Ada")]
    loaded = load_forget(rows, tokenizer("byte"), max_length=start + 1, allow_cut_spans=True)
    assert [example.row for example in loaded.examples] == [0, 2]
    assert (loaded.skipped, loaded.without_span) == (1, 0)
    assert torch.equal(loaded.examples[0].labels, whole.examples[0].labels[: start + 1])
    assert torch.equal(loaded.examples[0].input_ids, whole.examples[0].input_ids[: start + 1])


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
    whole = load_forget(rows, tokenizer("byte"), max_length=999)
    assert (whole.without_span, whole.cut_rows, whole.all_spans_cut, whole.spans_length) == (3, (), 0, 0)
    source: Any = rows
    if tokenised:
        source = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in whole.examples]
    with pytest.raises(DataError) as caught:
        load_forget(source, tokenizer("byte"), max_length=30)
    needed = max(int((e.labels >= 0).nonzero()[-1]) + 1 for e in whole.examples if e.row in (1, 2, 3))
    assert "cuts off spans of 3 rows (1, 2, 3), " in str(caught.value)
    assert f"set max_length = {needed}, " in str(caught.value)
    loaded = load_forget(source, tokenizer("byte"), max_length=30, allow_cut_spans=True)
    assert [example.row for example in loaded.examples] == [0, 1, 2, 4, 5]
    assert (loaded.skipped, loaded.without_span) == (2, 2)
    assert (loaded.cut_rows, loaded.all_spans_cut, loaded.spans_length) == ((1, 2, 3), 1, needed)
    assert load_forget(source, tokenizer("byte"), max_length=needed).cut_rows == ()
    with pytest.raises(DataError, match=rf"max_length = {needed - 1} cuts off spans of 1 row \(\d\), which"):
        load_forget(source, tokenizer("byte"), max_length=needed - 1)


def test_ten_rows_with_cut_spans_are_named() -> None:
    rows = [{"input_ids": IDS, "labels": LABELS}, *[{"input_ids": IDS * 2, "labels": LABELS * 2}] * 11]
    with pytest.raises(DataError, match=r"of 11 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\), which .* = 7, or"):
        load_forget(rows, None, max_length=4)
    with pytest.raises(DataError, match=r"of 10 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10\), which"):
        load_forget(rows[:-1], None, max_length=4)
    assert load_retain([{"input_ids": IDS * 2, "labels": [-100, *IDS[1:]] * 2}], None, max_length=4).cut_rows == ()


def test_empty_retain_set_is_returned() -> None:
    loaded = load_retain([], None, max_length=99)
    assert (list(loaded.examples), loaded.skipped, loaded.without_span) == ([], 0, 0)


# --- chat templates ---
def same_as(one: Example, other: Example) -> bool:
    assert one.offsets is not None and other.offsets is not None
    pairs = ((one.input_ids, other.input_ids), (one.labels, other.labels), (one.offsets, other.offsets))
    return all(torch.equal(a, b) for a, b in pairs)


def test_values_for_the_chat_template() -> None:
    dated, fixed = (
        small.byte_level(small.DATED),
        small.byte_level(small.DATED.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")),
    )
    given = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}, "max_length": 99}
    rows = [row("Ada did.", "Ada") | {"alternate": "No."}]
    (forget,), (expected,) = (
        load_forget(rows, t, **g).examples for t, g in ((dated, given), (fixed, {"max_length": 99}))
    )
    assert same_as(forget, expected) and "26 Jul 2024" in dated.decode(forget.input_ids)
    (retain,), (expected,) = (
        load_retain(rows, t, **g).examples for t, g in ((dated, given), (fixed, {"max_length": 99}))
    )
    assert same_as(retain, expected)
    (alternate,) = load_alternates(rows, dated, [forget], **given)
    (expected,) = load_alternates(rows, fixed, [forget], max_length=99)
    assert torch.equal(alternate.input_ids, expected.input_ids)
    ours, theirs = encode_prompts(["Who?"], dated, given["chat_template_kwargs"]), encode_prompts(["Who?"], fixed)
    assert torch.equal(ours[0][0], theirs[0][0]) and ours[1] == theirs[1]


def test_a_prompt_that_generation_does_not_give() -> None:
    rows, thinking = [row("Ada.", "Ada"), row("Ada.", "Ada", question="Where?")], small.byte_level(THINKING)
    for load, name in ((load_forget, "forget"), (load_retain, "retain")):
        with pytest.warns(UserWarning, match="trained on") as caught:
            load(rows, thinking, max_length=99, warn=True)
        (told,) = (str(one.message) for one in caught)  # once a set
        assert told.startswith(f"{name} row 0: the prompt that is trained on has '<think>")
    without = small.byte_level("{% if messages | length < 2 %}{{ raise_exception('no') }}{% endif %}" + small.CHATML)
    with pytest.warns(UserWarning, match=r"^forget row 0: the chat template gives no prompt for generation \(no\), so"):
        load_forget(rows, without, max_length=99, warn=True)


@pytest.mark.parametrize("template", [small.CHATML, small.LLAMA3, MISTRAL, BARE, THINKING, None])
def test_a_prompt_that_generation_gives(template: str | None) -> None:
    """Also for several turns, blanks around an answer, and rows that are rendered or tokenised already."""
    turns = [{"role": role, "content": "Who?"} for role in ("user", "assistant", "user")]
    rows: list[dict[str, Any]] = [row(" Ada. ", "Ada"), {"input_ids": IDS, "labels": LABELS}]
    rows.append({"prompt": "<|im_start|>Who?", "completion": "Ada", "spans": [[0, 3]]})
    if template is not None:
        rows.append({"messages": [*turns, {"role": "assistant", "content": "Ada"}], "spans": [[0, 3]]})
    kwargs = {"enable_thinking": False} if template == THINKING else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_forget(rows, small.byte_level(template), max_length=99, chat_template_kwargs=kwargs, warn=True)


@pytest.mark.parametrize("prompt", ["It is", "Answer:", "Who?", "Un été", "Born on the 3"])
def test_a_completion_that_continues_the_prompts_last_word(prompt: str) -> None:
    rows = [{"prompt": prompt, "completion": f"{blank}élan 7."} for blank in (" ", "")]
    with pytest.warns(UserWarning, match=r"^retain row 1: .* without a blank"):
        load_retain(rows, tokenizer("byte"), max_length=99, warn=True)


def test_completions_that_need_no_blank() -> None:
    """Where a blank or a line break stands between, or the script or the sign has none; or a chat template renders."""
    pairs = [("Who? ", "Ada"), ("Who?\n", "Ada"), ("Who", ", Ada"), ("f(", "x)"), ("", "Ada"), ("東京は", "大きい")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_retain(rows, tokenizer("byte"), max_length=99, warn=True)
        load_retain([{"prompt": "It is", "completion": "Ada"}], tokenizer("byte, ChatML"), max_length=99, warn=True)


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
    wrapped, plain = columns, row("Ada.", "Ada")
    examples = load_forget([plain, rendered, wrapped, rendered], tok, max_length=99).examples
    expected = examples[2]
    if not whole:  # no end is told: it is the tokenizer's
        ids, labels = expected.input_ids.clone(), expected.labels.clone()
        ids[-1] = tok.eos_token_id
        expected = Example(2, ids, labels, expected.offsets)
    assert same_as(examples[1], expected) and same_as(examples[3], expected)
    assert same_as(examples[0], load_forget([plain], tok, max_length=99).examples[0])
    (kept,) = load_retain([rendered], tok, max_length=99).examples
    assert torch.equal(kept.input_ids, expected.input_ids)
    assert torch.equal(kept.labels != IGNORE, expected.labels != IGNORE)


@pytest.mark.parametrize("name", ["byte", "sp"])
def test_a_rendered_prompt_gets_no_second_bos(name: str) -> None:
    tok = tokenizer(name)
    plain, rendered = "Who? ", f"{tok.bos_token}Who? "
    rows = [{"prompt": text, "completion": "Ada.", "spans": [[0, 3]]} for text in (plain, rendered, plain)]
    one, two, three = load_forget(rows, tok, max_length=99).examples
    assert two.input_ids.tolist().count(tok.bos_token_id) == 1
    if name == "byte":  # the other one puts a blank before a text
        assert same_as(one, two)
    assert same_as(one, three)
    assert one.input_ids[0] == two.input_ids[0] == tok.bos_token_id and two.input_ids[-1] == tok.eos_token_id


# --- complaints ---
@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ messages[1].content }} {{ messages[1].content }}"]
)
def test_a_template_without_the_answer_or_with_two(template: str) -> None:
    with pytest.raises(DataError, match=r"^forget row 0: the chat template alters the answer"):
        load_forget([row("Ada.", "Ada")], small.byte_level(template), max_length=99)


def test_max_length_too_small_for_any_label() -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        load_forget(ROWS, tokenizer("byte"), max_length=1)


def test_text_that_the_tokenizer_drops() -> None:
    backend = Tokenizer(models.WordLevel({"[U]": 0, "Ada": 1}, unk_token="[U]"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    dropping = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[U]")
    for answer, told in (("\u200bAda", r"'\\u200b' in the answer no token"), ("\u200b", "the answer no token")):
        with pytest.raises(DataError, match=f"^forget row 0: the tokenizer gives {told}"):
            load_forget([{"prompt": "", "completion": answer, "spans": [[0, 1]]}], dropping, max_length=99)


IDS = [1, 20, 21, 22]
LABELS = [IGNORE, ORDINARY, 21, ORDINARY]


# --- real data ---
needs_tofu = pytest.mark.skipif(not (SHARED / "data" / "tofu").exists(), reason=f"no TOFU files in {SHARED}")


@needs_tofu
@pytest.mark.parametrize("name", ["byte, Llama 3", "sp"])
def test_tofu_loads_and_sensitive_tokens_hold_their_spans(name: str) -> None:
    path = SHARED / "data" / "tofu" / "forget05.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    loaded = load_forget(path, tokenizer(name), max_length=4096)
    assert [example.row for example in loaded.examples] == list(range(len(rows)))
    assert loaded.without_span == sum(not one["spans"] for one in rows)
    for one, example in zip(rows, loaded.examples, strict=True):
        sensitive = (example.labels >= 0).tolist()
        runs = "".join(  # the sensitive tokens, a bar for each run of others
            "|" if not role else chr(0xF0000 + token)
            for token, role in zip(example.input_ids.tolist(), sensitive, strict=True)
        )
        decoded = [str(tokenizer(name).decode([ord(char) - 0xF0000 for char in run])) for run in runs.split("|") if run]
        for start, end in one["spans"]:
            assert any(one["answer"][start:end].strip() in run for run in decoded), (one, decoded)


@needs_tofu
def test_tofu_retain_loads() -> None:
    loaded = load_retain(SHARED / "data" / "tofu" / "retain90.jsonl", tokenizer("byte, Llama 3"), max_length=4096)
    assert len(loaded.examples) == 3600
