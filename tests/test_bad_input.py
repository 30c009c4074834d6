"""Bad rows as a user meets them: each refused in exactly these words, with nothing changed.

What only one part can be asked is in that part's own tests; tests/test_bad_calls.py has models, settings and ops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.refusals import KEPT, Call, Cases, refused, row, text, unlearn, words
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import VOCAB, forget_rows, retain_rows
from transformers import PreTrainedTokenizer

import palu
from palu.data.tokenize import IGNORE, ORDINARY


class Slow(PreTrainedTokenizer):
    vocab_size = 1

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0}


def endless() -> Any:
    tokenizer = byte_level(CHATML, bos=False)
    tokenizer.eos_token = None
    return tokenizer


def in_int32(rows: list[Any]) -> list[Any]:
    return [{name: torch.tensor(values, dtype=torch.int32) for name, values in one.items()} for one in rows]


def kept(one: Any) -> Any:
    """A forget row as a retain row."""
    pairs = zip(one["input_ids"], one["labels"], strict=True)
    return one | {"labels": [label if label == IGNORE else token for token, label in pairs]}


def with_token(rows: list[Any], token: int) -> list[Any]:
    rows[2]["input_ids"][0] = token
    return rows


def file(name: str, content: bytes) -> str:
    """A file in the current folder, which is the test's own."""
    Path(name).write_bytes(content)
    return name


def jsonl(*lines: str) -> str:
    return file("rows.jsonl", "".join(f"{line}\n" for line in lines).encode())


def csv(content: bytes) -> Call:
    return text(forget=file("rows.csv", content))


def secret(value: Any, **columns: Any) -> Call:
    given = {"answer": "Ada Lovelace wrote it in 1843.", "spans": None, "secret": value} | columns
    return text(row(**given))


def alternate(value: Any) -> Call:
    """The alternate answer of the second row."""
    return text(forget=[row(alternate="No."), row(alternate=value)], objective="dpo")


def tokens(**changed: Any) -> Call:
    """A tokenised row beside one of text."""
    return text({"input_ids": IDS, "labels": LABELS} | changed)


def trl(**changed: Any) -> dict[str, Any]:
    """A row as TRL's conversational data sets have it."""
    return {"prompt": TURNS[:1], "completion": TURNS[1:], "secret": "Ada Lovelace"} | changed


EDGES = "give [start, end) in characters of the answer"
COLUMNS = "give question and answer, prompt and completion, or messages"
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada Lovelace did."}]
LATE = {"question": "Who?", "answer": "The cat sat. " * 10 + "Ada Lovelace.", "secret": "Ada Lovelace"}
ONE_ANSWER = "make 'completion' a list of one, the answer, and put what comes before it into 'prompt'"
NOT_BOTH = "the model cannot forget an answer and keep it; take the row out of one of the sets"
DOCUMENT = {"prompt": "", "completion": "The cat sat.", "spans": [[0, 3]]}
IDS, LABELS = [1, 20, 21, 22], [IGNORE, ORDINARY, 21, ORDINARY]
TOKENS = "a mapping with input_ids and labels"
MESSAGES = "forget row 1: column 'messages' must be a list of two or more {role, content}, the last one the assistant's; put the answer there"
SAVE, QUOTE = "save it with commas (.csv) or tabs (.tsv)", "quote fields with commas, quotes or line breaks"
DataError = palu.DataError

BAD: Cases = {
    # Spans
    "a span beyond the answer": (lambda: text(row(spans=[[4, 99]])), DataError, f"forget row 1: span [4, 99] ends after the answer (17 characters); {EDGES}"),
    "a span before the answer": (lambda: text(row(spans=[[-2, 3]])), DataError, f"forget row 1: span [-2, 3] starts before the answer; {EDGES}"),
    "a reversed span": (lambda: text(row(spans=[[3, 1]])), DataError, f"forget row 1: span [3, 1] is empty or reversed; {EDGES}"),
    "an empty span": (lambda: text(row(spans=[[3, 3]])), DataError, f"forget row 1: span [3, 3] is empty or reversed; {EDGES}"),
    "spans that cross": (lambda: text(row(spans=[[0, 5], [3, 9]])), DataError, "forget row 1: spans [0, 5] and [3, 9] overlap; merge or part them"),
    "a span of fractions": (lambda: text(row(spans=[[0.5, 3]])), DataError, f"forget row 1: span [0.5, 3] is not two integers; {EDGES}"),
    "a span of words": (lambda: text(row(spans=["Ada"])), DataError, f"forget row 1: span 'Ada' is not two integers; {EDGES}"),
    "a span of blanks": (lambda: text(row(spans=[[3, 4]])), DataError, "forget row 1: span [3, 4] holds only whitespace; move it onto the words or remove it"),
    "a span that nothing predicts": (lambda: text(DOCUMENT, tokenizer=byte_level(bos=False)), DataError, "forget row 1: nothing stands before 'The', so nothing predicts its only token; give a prompt, or a tokenizer that adds a BOS"),
    "spans that cross, in any order": (lambda: text(row(spans=[[13, 16], [0, 14], [2, 3]])), DataError, "forget row 1: spans [0, 14] and [13, 16] overlap; merge or part them"),
    "a span of truth values": (lambda: text(row(spans=[[True, 3]])), DataError, f"forget row 1: span [True, 3] is not two integers; {EDGES}"),
    "a span of three edges": (lambda: text(row(spans=[[0, 3, 5]])), DataError, f"forget row 1: span [0, 3, 5] is not two integers; {EDGES}"),
    "a span that is no list": (lambda: text(row(spans=[0, 3, 5])), DataError, f"forget row 1: span 0 is not two integers; {EDGES}"),
    "one span in place of a list": (lambda: text(row(spans=[0, 3])), DataError, "forget row 1: column 'spans' is one pair, not a list of pairs; write [[0, 3]]"),
    "one span of numpy": (lambda: text(row(spans=np.array([0, 3]))), DataError, "forget row 1: column 'spans' is one pair, not a list of pairs; write [[0, 3]]"),
    "spans in text": (lambda: text(row(spans="0-3")), DataError, f"forget row 1: column 'spans' must be a list of pairs, got str; {EDGES}"),
    # Secrets
    "a secret in small letters": (lambda: secret("ada lovelace"), DataError, "forget row 1: secret 'ada lovelace' is not in the answer; did you mean 'Ada Lovelace'?"),
    "a secret with a slip": (lambda: secret(["Ada", "1834"]), DataError, "forget row 1: secret '1834' is not in the answer; did you mean '1843'?"),
    "a secret of another row": (lambda: secret("Karachi"), DataError, "forget row 1: secret 'Karachi' is not in the answer; write it as it stands there"),
    "a secret within a number": (lambda: secret("84"), DataError, "forget row 1: secret '84' is in the answer only as a part of '1843'; give all of it, or use 'spans'"),
    "a secret within a number with a comma": (lambda: secret("391", answer="The code is 7,391."), DataError, "forget row 1: secret '391' is in the answer only as a part of '7,391'; give all of it, or use 'spans'"),
    "a secret that is a number": (lambda: secret(["Ada", 1843]), DataError, "forget row 1: column 'secret' must be text or a list of texts, got int; put it in quotes"),
    "a secret in a mapping": (lambda: secret({"text": "Ada"}), DataError, "forget row 1: column 'secret' must be text or a list of texts, got dict; put it in quotes"),
    "a blank secret": (lambda: secret(["Ada", " "]), DataError, "forget row 1: column 'secret' is blank; give the text to forget, or [] for nothing"),
    "a secret and spans": (lambda: secret("Ada", spans=[]), DataError, "forget row 1: it has 'secret', and also 'spans'; leave one of them out"),
    "a secret in other code points": (lambda: secret("caf\u00e9", answer="The cafe\u0301."), DataError, "forget row 1: secret 'caf\u00e9' is in the answer with other code points (NFC, NFD); write both in one way"),
    # Rows
    "no spans": (lambda: text(row(spans=None)), DataError, "forget row 1: column 'secret' (or 'spans') is missing; give the text to forget, or [] if nothing is sensitive"),
    "no answer": (lambda: text(row(answer=None)), DataError, f"forget row 1: columns are question, spans; {COLUMNS}"),
    "a question and a prompt": (lambda: text(row(prompt="Who?", completion="Ada.")), DataError, "forget row 1: it has question and answer, and also prompt and completion; leave one of them out"),
    "a prompt and messages": (lambda: text(row(messages=TURNS, question=None, answer=None, prompt="Who?", completion="Ada.")), DataError, "forget row 1: it has messages, and also prompt and completion; leave one of them out"),
    "a question and messages to retain": (lambda: text(retain=[row(messages=TURNS)]), DataError, "retain row 0: it has messages, and also question and answer; leave one of them out"),
    "a blank answer": (lambda: text(row(answer=" ")), DataError, "forget row 1: column 'answer' is blank; give an answer or remove the row"),
    "an answer that is a number": (lambda: text(row(answer=1843)), DataError, "forget row 1: column 'answer' must be a string, got int; give text"),
    "no rows to forget": (lambda: unlearn(forget=[]), DataError, "forget set is empty; give at least one row"),
    "nothing given to forget": (lambda: unlearn(forget=None), DataError, "forget set is of type NoneType; give a file's path, a list of dicts, a datasets.Dataset, a pandas.DataFrame, or a mapping with input_ids and labels"),
    "rows without any span": (lambda: text(forget=[row(spans=[])] * 2), DataError, "forget set has no sensitive token; mark spans"),
    "a span that is cut off": (lambda: unlearn(forget=[*forget_rows(1), {"input_ids": [1, 2, 3] * 9, "labels": [-100, 2, 3] * 9}], max_length=20), DataError, "forget set: max_length = 20 cuts off spans of 1 row (1), which would not be forgotten; set max_length = 27, or allow_cut_spans = True to go on without them"),
    "a secret that is cut off": (lambda: text(forget=[LATE], max_length=40), DataError, "forget set: max_length = 40 cuts off spans of 1 row (0), which would not be forgotten; set max_length = 53, or allow_cut_spans = True to go on without them"),
    "only secrets that may be cut off": (lambda: text(forget=[LATE], max_length=40, allow_cut_spans=True), DataError, "forget set has no sensitive token in the first 40 tokens of any row; set max_length = 53"),
    "answers cut off entirely": (lambda: text(max_length=3), DataError, "forget set has no answer token in the first 3 tokens of any row; set max_length = 17"),
    "answers to retain cut off entirely": (lambda: text(forget=[{"input_ids": [1, 2], "labels": [-100, 2]}], max_length=3), DataError, "retain set has no answer token in the first 3 tokens of any row; set max_length = 19"),
    "a prompt of messages before a text": (lambda: text(trl(completion="Ada Lovelace did.")), DataError, f"forget row 1: column 'prompt' is a list of messages; {ONE_ANSWER}"),
    "a completion of several messages": (lambda: text(trl(completion=TURNS)), DataError, f"forget row 1: column 'prompt' is a list of messages; {ONE_ANSWER}"),
    "messages given twice": (lambda: text(trl(messages=TURNS)), DataError, "forget row 1: it has messages, and also prompt and completion; leave one of them out"),
    "a prompt of texts": (lambda: text(trl(prompt=["Who?"])), DataError, "forget row 1: column 'prompt' must be a string, got list; give text"),
    "a row to forget and to retain": (lambda: text(row(answer="Ada.", spans=[[0, 3]]), retain=[KEPT, row(), row(answer="Ada.")]), DataError, f"forget row 0 and retain row 1 are the same, prompt and answer (and 1 more): {NOT_BOTH}"),
    "tokens to forget and to retain": (lambda: unlearn(retain=[*retain_rows(2), kept(forget_rows()[3])]), DataError, f"forget row 3 and retain row 2 are the same, prompt and answer: {NOT_BOTH}"),
    "no rows to retain": (lambda: unlearn(retain=[], lambda_retain=0.5), DataError, "the retain set is empty while lambda_retain = 0.5; give examples to keep, or set lambda_retain=0"),
    "nothing given to retain": (lambda: unlearn(retain=None), DataError, "retain = None: for the model to answer everyday prompts there must be a tokenizer; pass it, or give retain examples, or retain=[] with lambda_retain=0"),
    "a tensor's columns without rows": (lambda: unlearn(retain={"input_ids": [], "labels": []}), DataError, "the retain set is empty while lambda_retain = 1.0; give examples to keep, or set lambda_retain=0"),
    "a number for a set": (lambda: unlearn(retain=3), DataError, "retain set is of type int; give a file's path, a list of dicts, a datasets.Dataset, a pandas.DataFrame, or a mapping with input_ids and labels"),
    "a file that is not there": (lambda: unlearn(forget="nowhere.jsonl"), FileNotFoundError, "[Errno 2] No such file or directory: 'nowhere.jsonl'"),
    "a folder": (lambda: text(forget="."), DataError, "forget set: . is a folder; give a file, or datasets.load_from_disk of it"),
    "a file that is not JSON": (lambda: text(forget=jsonl(json.dumps(row()), '{"question":')), DataError, "forget line 2 of rows.jsonl: not JSON (Expecting value at column 13); write one JSON object per line, or one list of them"),
    "a list that is not JSON": (lambda: text(forget=jsonl("[", json.dumps(row()))), DataError, "forget line 1 of rows.jsonl: not JSON (Expecting ',' delimiter: line 2 column 72 (char 73)); write one JSON object per line, or one list of them"),
    "a list of texts in a file": (lambda: text(forget=jsonl('["Ada"]')), DataError, "forget row 0: a row must map column names to values, got str"),
    "no columns": (lambda: text({}), DataError, f"forget row 1: columns are none; {COLUMNS}"),
    "no columns to retain": (lambda: text(retain=[KEPT, {"question": "Who?", "text": "x"}]), DataError, f"retain row 1: columns are question, text; {COLUMNS}"),
    "a question that is a number": (lambda: text(row(question=3)), DataError, "forget row 1: column 'question' must be a string, got int; give text"),
    "a blank completion": (lambda: text(trl(prompt="Who?", completion=" \n")), DataError, "forget row 1: column 'completion' is blank; give an answer or remove the row"),
    "half a character": (lambda: text(row(answer="Ada \ud83d")), DataError, "forget row 1: column 'answer' has half a surrogate pair at character 4; repair the text"),
    "messages in text": (lambda: text({"messages": "hello"}), DataError, MESSAGES),
    "messages without an answer": (lambda: text({"messages": [TURNS[0]] * 2}), DataError, MESSAGES),
    "messages without a role": (lambda: text({"messages": [TURNS[0], {"content": "x"}]}), DataError, MESSAGES),
    "a message that is text": (lambda: text({"messages": [TURNS[0], "x"]}), DataError, MESSAGES),
    "one message": (lambda: text({"messages": TURNS[1:]}), DataError, MESSAGES),
    "a message of parts": (lambda: text({"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}), DataError, "forget row 1: content of message 1 must be a string, got list; give text"),
    "a message without content": (lambda: text({"messages": [{"role": "user"}, TURNS[1]]}), DataError, "forget row 1: content of message 0 must be a string, got NoneType; give text"),
    "a blank message": (lambda: text({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}), DataError, "forget row 1: content of the last message is blank; give an answer or remove the row"),
    "messages without a template": (lambda: text({"messages": TURNS, "spans": []}, tokenizer=byte_level(bos=False)), DataError, "forget row 1: 'messages' need a chat template; set tokenizer.chat_template"),
    "several splits": (lambda: text(forget={"train": [], "test": []}), DataError, f"forget set is a mapping with train, test; give one split, a list of rows, or {TOKENS}"),
    "an empty mapping": (lambda: text(forget={}), DataError, f"forget set is a mapping with nothing; give one split, a list of rows, or {TOKENS}"),
    "a file in another encoding": (lambda: text(retain=file("rows.jsonl", b'{"question": "Who?", "answer": "Ada"}\n\n\xff\xfe\n')), DataError, "retain line 3 of rows.jsonl: not UTF-8 text; give JSONL, JSON, CSV, TSV (as UTF-8) or Parquet"),
    "a row of a file": (lambda: text(forget=jsonl(json.dumps(row()), "", json.dumps(row(spans=[[12, 40]])))), DataError, f"forget row 1 (line 3): span [12, 40] ends after the answer (17 characters); {EDGES}"),
    "a list in a file": (lambda: text(forget=jsonl(json.dumps(row()), "[1]")), DataError, "forget row 1 (line 2): a row must map column names to values, got list"),
    "too many fields": (lambda: csv(b"question,answer\na,b,c\n"), DataError, f"forget line 2 of rows.csv: 3 fields under a header of 2; {QUOTE}"),
    "too few fields": (lambda: csv(b"question,answer\n\na\n"), DataError, f"forget line 3 of rows.csv: 1 fields under a header of 2; {QUOTE}"),
    "a quote within a field": (lambda: csv(b'question,answer\na,"b"c\n'), DataError, f"forget line 2 of rows.csv: not CSV (',' expected after '\"'); {QUOTE}"),
    "an open quote": (lambda: csv(b'question,answer\na,"b\n'), DataError, f"forget line 2 of rows.csv: not CSV (unexpected end of data); {QUOTE}"),
    "a column twice": (lambda: csv(b"question,answer,answer\n"), DataError, "forget line 1 of rows.csv: column 'answer' is there twice; give each column one name"),
    "a column of JSON twice": (lambda: text(forget=file("rows.jsonl", b'{"question": "Who?", "secret": "Ada", "secret": "x", "answer": "Ada"}')), DataError, "forget line 1 of rows.jsonl: column 'secret' is there twice; give each column one name"),
    "a blank before quotes": (lambda: csv(b'question,answer\nWho?, "Ada"\n'), DataError, "forget line 2 of rows.csv: column 'answer' has a blank before its quotes, which makes them a part of the text; delete the blank"),
    "a table in another encoding": (lambda: csv(b"question,answer\n\xff,c\n"), DataError, "forget line 2 of rows.csv: not UTF-8 text; give JSONL, JSON, CSV, TSV (as UTF-8) or Parquet"),
    "a cell that is no list": (lambda: csv(b"question,answer,spans\na,b,0-3\n"), DataError, "forget line 2 of rows.csv: column 'spans' is not JSON (Extra data at character 1); write lists as JSON, such as [[0, 5]]"),
    "a table with semicolons": (lambda: csv(b"question;answer;spans\na;b, c;[]\n"), DataError, f"forget line 1 of rows.csv: the columns are parted by semicolons (';'); {SAVE}"),
    "a table with tabs": (lambda: csv(b"question\tanswer\n"), DataError, f"forget line 1 of rows.csv: the columns are parted by tabs ('\\t'); {SAVE}"),
    "an empty table": (lambda: csv(b"question,answer,spans\n"), DataError, "forget set is empty; give at least one row"),
    "commas in place of tabs": (lambda: text(forget=file("rows.tsv", b"question,answer\n")), DataError, f"forget line 1 of rows.tsv: the columns are parted by commas (','); {SAVE}"),
    "too many fields between tabs": (lambda: text(forget=file("rows.tsv", b"question\tanswer\na\tb\tc\n")), DataError, "forget line 2 of rows.tsv: 3 fields under a header of 2; quote fields with tabs, quotes or line breaks"),
    "no alternate answer": (lambda: alternate(None), DataError, "forget row 1: column 'alternate' is missing; give the answer to prefer"),
    "a blank alternate answer": (lambda: alternate(" \n"), DataError, "forget row 1: column 'alternate' is blank; give the answer to prefer"),
    "an alternate answer that is a number": (lambda: alternate(7), DataError, "forget row 1: column 'alternate' must be a string, got int; give text"),
    "a tokenised row without an alternate answer": (lambda: unlearn(objective="dpo"), DataError, "forget row 0: a tokenised row has no alternate answer; give text with a column 'alternate'"),
    # Tokenised rows
    "labels of another length": (lambda: unlearn(forget=[*forget_rows(1), {"input_ids": [1, 2, 3], "labels": [-100, 2]}]), DataError, "forget row 1: labels have 2 tokens, input_ids 3; give one label per token"),
    "labels that were shifted": (lambda: unlearn(retain=[{"input_ids": [1, 2, 3], "labels": [-100, 3, 2]}]), DataError, "retain row 0: label 3 at token 1 is not its id (2); do not shift the labels"),
    "a label after padding": (lambda: unlearn(retain=[{"input_ids": [0, 0, 5, 9], "labels": [-100, -100, -100, 7], "attention_mask": [0, 0, 1, 1]}]), DataError, "retain row 0: label 7 at token 3 is not its id (9); do not shift the labels"),
    "a label without a meaning": (lambda: unlearn(forget=[{"input_ids": [1, 2, 3], "labels": [-100, -300, 3]}]), DataError, "forget row 0: label -300 at token 1 has no meaning; use -100, -200 or the token's id"),
    "labels in int32": (lambda: unlearn(forget=in_int32(forget_rows())), DataError, "forget row 0: input_ids must be int64, got int32; convert them"),
    "labels that want a gradient": (lambda: unlearn(forget=[{"input_ids": [1, 2], "labels": torch.tensor([-100.0, 2.0], requires_grad=True)}]), DataError, "forget row 0: labels must be int64, got float32; convert them"),
    "a token beyond the vocabulary": (lambda: unlearn(forget=with_token(forget_rows(3), VOCAB)), DataError, f"forget row 2: token id {VOCAB} is outside the model's vocabulary of {VOCAB}; use the tokenizer that belongs to the model"),
    "a token beyond the vocabulary, to retain": (lambda: unlearn(retain=with_token(retain_rows(3), VOCAB)), DataError, f"retain row 2: token id {VOCAB} is outside the model's vocabulary of {VOCAB}; use the tokenizer that belongs to the model"),
    "a sensitive label that nothing predicts": (lambda: unlearn(forget=[{"input_ids": [1, 2, 3], "labels": [1, -200, 3]}]), DataError, "forget row 0: nothing stands before token 0, so nothing predicts it; label it -100, or give the tokens before it"),
    "input ids alone": (lambda: tokens(labels=None), DataError, "forget row 1: column 'labels' is missing; give input_ids and labels"),
    "labels of fractions": (lambda: tokens(labels=[1.0, 2.0, 3.0, 4.0]), DataError, "forget row 1: labels must be int64, got float32; convert them"),
    "labels of numpy in int32": (lambda: tokens(labels=np.array(LABELS, dtype=np.int32)), DataError, "forget row 1: labels must be int64, got int32; convert them"),
    "labels in text": (lambda: tokens(labels=["a"] * 4), DataError, "forget row 1: labels must be int64, got other values; give a flat list of integers"),
    "labels beyond int64": (lambda: tokens(labels=[2**70] * 4), DataError, "forget row 1: labels must be int64, got other values; give a flat list of integers"),
    "a row of rows": (lambda: tokens(input_ids=[IDS], labels=[LABELS]), DataError, "forget row 1: input_ids must be one row of tokens, got shape [1, 4]; give [tokens]"),
    "a row without tokens": (lambda: tokens(input_ids=[], labels=[]), DataError, "forget row 1: input_ids must be one row of tokens, got shape [0]; give [tokens]"),
    "a label beyond the tokenizer": (lambda: tokens(labels=[IGNORE, ORDINARY, 999, ORDINARY]), DataError, "forget row 1: label 999 at token 2 is outside the vocabulary; use this tokenizer's ids"),
    "an id below 0": (lambda: tokens(input_ids=[1, -1, 21, 22]), DataError, "forget row 1: input id -1 at token 1 is outside the vocabulary; use this tokenizer's ids"),
    "no label but the first": (lambda: tokens(labels=[1, IGNORE, IGNORE, IGNORE]), DataError, "forget row 1: every label after the first token is -100; label the answer or remove the row"),
    "a mask with a hole": (lambda: tokens(attention_mask=[1, 0, 1, 1]), DataError, "forget row 1: attention_mask must be one run of ones in 4 tokens; mask only padding"),
    "a mask of nothing": (lambda: tokens(attention_mask=[0, 0, 0, 0]), DataError, "forget row 1: attention_mask must be one run of ones in 4 tokens; mask only padding"),
    "an ordinary label to retain": (lambda: unlearn(retain=[{"input_ids": IDS, "labels": LABELS}]), DataError, "retain row 0: label -200 at token 1 has no meaning; use -100 or the token's id"),
    "columns of other lengths": (lambda: unlearn(forget={"input_ids": [IDS, IDS], "labels": [LABELS]}), DataError, "forget set: columns differ in rows (input_ids 2, labels 1); give each the same number of rows"),
    "a column of one row": (lambda: unlearn(forget={"input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)}), DataError, "forget row 0: input_ids must be one row of tokens, got shape []; give [tokens]"),
    # Tokenizers
    "no tokenizer": (lambda: text(tokenizer=None), DataError, "forget row 0: text needs a tokenizer; pass one, or give input_ids and labels"),
    "a slow tokenizer": (lambda: text(tokenizer=Slow()), DataError, "forget row 0: a slow tokenizer gives no offsets; load a fast one (one with a tokenizer.json)"),
    "a tokenizer's name": (lambda: text(tokenizer="meta-llama/Llama-3.2-1B"), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a tokenizer without an end of sequence": (lambda: text(tokenizer=endless()), DataError, "forget row 0: the tokenizer has no end-of-sequence token; set tokenizer.eos_token"),
    "a tokenizer of another model": (lambda: unlearn(tokenizer=words()), ValueError, f"the tokenizer has {len(words())} tokens and the model a vocabulary of {VOCAB}; load the tokenizer that belongs to the model"),
    "a template that fails": (lambda: text(tokenizer=byte_level("{{ raise_exception('no system role') }}")), DataError, "forget row 0: the chat template fails (no system role); correct the messages or the template"),
    "a template that alters the answer": (lambda: text(tokenizer=byte_level("{{ messages[1].content | upper }}")), DataError, "forget row 0: the chat template alters the answer; correct the answer or the template"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build, error, message = BAD[name]
    assert refused(build, error) == message
