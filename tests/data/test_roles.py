"""Which tokens of a row are the answer's, and which of these sensitive: checked token by token."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from helpers import small_tokenizers as small
from helpers.runs import text_row as row
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from palu.data.examples import load_forget, load_retain
from palu.data.files import DataError
from palu.data.matching import stands_in
from palu.data.rows import load_marked_texts
from palu.data.tokenize import IGNORE, ORDINARY, Example

# An answer right behind a special token, and no special token behind the answer.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_start|>"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
TOKENIZERS: dict[str, Any] = {
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
    "byte, think": lambda: small.byte_level(small.THINKING),
    "sp": lambda: small.sentencepiece(),
    "sp, eos": lambda: small.sentencepiece(eos=True),
    "sp, no bos": lambda: small.sentencepiece(bos=False),
    "sp, normalizer": lambda: small.sentencepiece(metaspace=False),
    "sp, ChatML": lambda: small.sentencepiece(small.CHATML),
    "sp, bare": lambda: small.sentencepiece(BARE, prepend="always"),
    "sp, bare normalizer": lambda: small.sentencepiece(BARE, metaspace=False),
}


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return TOKENIZERS[name]()


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


LONDON = row("Ada Lovelace, in London.", "Ada Lovelace", "London")
STARTED = "Question: Who?\nAnswer:"
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
BRIEF = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
BRIEFLY = {"messages": [*BRIEF, {"role": "assistant", "content": "Ada."}], "spans": [[0, 3]]}
WHOLE = {"prompt": "", "completion": "The cat", "spans": [[0, 7]]}


@pytest.mark.parametrize(
    ("name", "columns", "before", "found"),
    [
        # " Ada" holds the prompt's last blank and the answer's first letters: it is an answer token.
        ("byte", LONDON, f"<|begin_of_text|>{STARTED}", "ĠAda=S ĠLovelace=S ,=o Ġin=o ĠLondon=S .=o <|end_of_text|>=o"),
        ("sp", LONDON, f"<s> {STARTED}", "▁Ada=S ▁Lovelace=S ,=o ▁in=o ▁London.=S </s>=o"),
        ("byte, Llama 3", LONDON, LLAMA3, "A=S da=S ĠLovelace=S ,=o Ġin=o ĠLondon=S .=o <|eot_id|>=o"),
        ("byte, ChatML", LONDON, CHATML, "A=S da=S ĠLovelace=S ,=o Ġin=o ĠLondon=S .=o <|im_end|>=o"),
        ("sp, ChatML", LONDON, CHATML, "A=S da=S ▁Lovelace=S ,=o ▁in=o ▁London.=S <|im_end|>=o"),
        ("byte, think", row("Ada.", "Ada"), f"{CHATML}<think>\n\n</think>\n\n", "A=S da=S .=o <|im_end|>=o"),
        # The line break behind the answer is dropped.
        ("byte, bare", row("Ada.", "Ada"), "Who?<|im_start|>", "A=S da=S .=o <|end_of_text|>=o"),
        ("byte, ChatML", BRIEFLY, f"<|im_start|>system\nBe brief.<|im_end|>\n{CHATML}", "A=S da=S .=o <|im_end|>=o"),
        (
            "byte", {"prompt": "The cat", "completion": " sat on", "spans": [[5, 7]]},
            "<|begin_of_text|>The cat", "Ġsat=o Ġon=S <|end_of_text|>=o",
        ),
        ("byte", WHOLE, "<|begin_of_text|>", "The=S Ġcat=S <|end_of_text|>=o"),
        ("byte, no bos", WHOLE, "The", "Ġcat=S <|end_of_text|>=o"),  # nothing predicts the first token
    ],
)  # fmt: skip
def test_a_row_token_by_token(name: str, columns: dict[str, Any], before: str, found: str) -> None:
    (example,) = forget(name, columns)
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    assert prompt(name, example) == before
    assert " ".join(map("=".join, roles(name, example))) == found


@pytest.mark.parametrize("answer", ["assistant", "think", "user", "im_end", "a"])
def test_answer_that_the_template_itself_contains_is_found(answer: str) -> None:
    (example,) = forget("byte, think", row(answer, answer))
    assert prompt("byte, think", example).endswith("</think>\n\n")
    assert "".join(piece for piece, role in roles("byte, think", example) if role == "S") == answer


def test_normalizer_that_joins_characters() -> None:
    """NFC makes one character of e and its accent; offsets still count the user's two."""
    (example,) = forget("byte, NFC", row("x e\u0301 y London", "e\u0301", "London"))
    assert [piece for piece, role in roles("byte, NFC", example) if role == "S"] == ["Ã©", "ĠLondon"]
    with pytest.raises(DataError, match=r"^forget row 0: the tokenizer gives '.+' in the answer no token; "):
        forget("byte, NFC", row("x e\u0301 y", "\u0301"))


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


def test_what_the_question_tells_is_kept_like_other_words() -> None:
    """And it is said, with the rows; elsewhere the same words are secret."""
    answer = "Ada Lovelace of London, in 1843. London!"
    asked = row(answer, "Ada Lovelace", "London", "1843", question="Who was ADA LOVELACE, in 1843?")
    told = "2 marked spans stand in the question already, so kept like other words"
    with pytest.warns(UserWarning, match=rf"{told} \(forget row 0: 'Ada Lovelace'; forget row 0: '1843'\)"):
        loaded = load_forget([asked, row(answer, "1843")], tokenizer("byte"), max_length=99, warn=True)
    assert loaded.told_by_question == 2
    marked = load_marked_texts(loaded.source)
    assert marked == dict.fromkeys(("Ada Lovelace", "London", "1843"), "forget row 0")
    secrets = load_marked_texts(loaded.source, told_by_question=False)
    assert secrets == {"London": "forget row 0", "1843": "forget row 1"}
    for example, secret in zip(loaded.examples, ("ĠLondon", "1843"), strict=True):
        assert "".join(piece for piece, role in roles("byte", example) if role == "S") == secret
    alone = row("Ada Lovelace.", "Ada Lovelace", question="Ada Lovelace?")
    with pytest.raises(DataError, match="no sensitive token; mark spans that the question does not tell"):
        load_forget([alone], tokenizer("byte"), max_length=99)
    turns = [("system", "In 1843."), ("user", "Who?"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    (example,) = forget("byte, Llama 3", {"messages": messages, "spans": [[27, 31], [0, 12]]})
    assert "".join(piece for piece, role in roles("byte, Llama 3", example) if role == "S") == "AdaĠLovelace"


def test_rows_in_which_nothing_is_to_be_forgotten_are_named() -> None:
    """Rows without a mark, and rows whose question tells all that is marked; the first ten of them."""
    unmarked, marked = row("London."), row("Ada of London.", "Ada")
    told = row("Ada of London.", "Ada", question="Who is Ada?")
    kept = r"forget set: no token is to be forgotten in 2 rows \(1, 2\), so a loss on spans keeps what"
    with pytest.warns(UserWarning, match=kept), pytest.warns(UserWarning, match="in the question already"):
        loaded = load_forget([marked, unmarked, told], tokenizer("byte"), max_length=99, warn=True)
    assert loaded.without_span == 2
    many = [marked, *(row(f"London {i}.") for i in range(11))]
    with pytest.warns(UserWarning, match=r"11 rows \(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\)"):
        load_forget(many, tokenizer("byte"), max_length=99, warn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_forget(many, tokenizer("byte"), max_length=99)
        load_forget([marked], tokenizer("byte"), max_length=99, warn=True)


def test_a_secret_that_is_marked_at_one_of_its_places_is_said() -> None:
    """Nothing is said where every place is marked, or where it is a part of a longer word."""
    marks = {"question": "Who?", "answer": "Ada, Adas, Ada.", "spans": [[0, 3]]}
    secret = {"question": "Who?", "secret": "Ada"}
    once = r"a marked span stands in the answer again, unmarked, so kept; .* \(forget row 1: 'Ada'\)"
    with pytest.warns(UserWarning, match=once):
        load_forget([{**secret, "answer": "Ada, Ada."}, marks], tokenizer("byte"), max_length=99, warn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_forget([{**marks, "spans": [[0, 3], [11, 14]]}], tokenizer("byte"), max_length=99, warn=True)
    other = {"question": "Who?", "answer": "The code is 7391, that is 7,391.", "secret": "7391"}
    with pytest.warns(UserWarning, match=r"in the answer again.* give each way in which it is written"):
        load_forget([other], tokenizer("byte"), max_length=99, warn=True)


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


NAMES = sorted(TOKENIZERS.keys() - {"byte, NFC"})
WORDS = st.sampled_from(
    [*" \n\t\u00a0.東京都é😀🦙", "  ", "Ada", "the", "city", "1843", "e\u0301", "👩\u200d👩\u200d👧"]
)
TEXTS = st.lists(WORDS | st.text(st.characters(codec="utf-8", exclude_characters="<|>\0Ġ▁"), max_size=3), max_size=12)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_roles_follow_the_bytes_that_each_token_holds(data: st.DataObject, name: str) -> None:
    """Against an oracle without offsets: pieces laid end to end over the text's bytes.

    So every non-blank character of a span is in sensitive tokens alone, and each of these overlaps one.
    (Left out: a text's own "▁" and "Ġ", which nothing tells from the blanks that tokenizers write so.)
    """
    answer = "".join(data.draw(TEXTS.filter(lambda words: "".join(words).strip())))
    question = "".join(data.draw(TEXTS))
    edges = sorted(data.draw(st.sets(st.integers(0, len(answer)), max_size=6)))
    edges = zip(edges[::2], edges[1::2], strict=False)
    spans = [[a, b] for a, b in edges if (text := answer[a:b]).strip() and not stands_in(text, question)]
    tok = tokenizer(name)
    source = [{"prompt": question, "completion": answer, "spans": spans}, row("Ada", "Ada")]
    try:
        example = load_forget(source, tok, max_length=10**6).examples[0]
    except DataError as error:
        # A span that is the text's first token, and no other.
        if question.strip() or "nothing stands before" not in str(error):
            raise
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
