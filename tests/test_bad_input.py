"""Bad input as a user meets it: one table of calls, each refused in exactly these words with nothing changed.

Below it, input that looks as bad and is good. What only one part can be asked is in that part's own tests.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from helpers.benchmark_data import small_muse_news, small_tofu
from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import VOCAB, forget_rows, retain_rows, rmu_layer, tiny_llama, weights
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizer,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from typer.testing import CliRunner

import palu
from palu.cli import app
from palu.config import UnlearnConfig, readers_of
from palu.data.examples import load_forget
from palu.data.tokenize import IGNORE, ORDINARY
from palu.models.lora import UnsupportedModelError
from palu.ref_model.anchors import anchor_texts

Call = tuple[Callable[..., Any], dict[str, Any]]
META = torch.device("meta")  # stands for another device


# --- Calls that would work if nothing were changed in them ---
def unlearn(**changed: Any) -> Call:
    """Tokenised rows, and a model that learns at once."""
    given = {"model": tiny_llama(), "ref_model": None, "forget": forget_rows(), "retain": retain_rows()}
    return palu.unlearn, given | {"epochs": 1, "learning_rate": 0.1, "progress": False} | changed


@functools.cache
def words() -> Any:
    return byte_level(CHATML, bos=False)


KEPT = {"question": "Where?", "answer": "In London."}


def text(*forget: Any, **changed: Any) -> Call:
    """Rows of text: a good one, then these."""
    tokenizer = changed.pop("tokenizer", words())
    model = tiny_llama(vocab_size=len(words()))
    return unlearn(**{"model": model, "forget": [row(), *forget], "retain": [KEPT], "tokenizer": tokenizer} | changed)


def row(**columns: Any) -> dict[str, Any]:
    columns = {"question": "Who?", "answer": "Ada Lovelace did.", "spans": [[0, 12]]} | columns
    return {name: value for name, value in columns.items() if value is not None}


def trainer(**changed: Any) -> Call:
    given = {"model": tiny_llama(), "args": TrainingArguments("out", report_to="none"), "forget": forget_rows()}
    return palu.PaluTrainer, given | {"retain": retain_rows()} | changed


def topk_mse(**changed: Any) -> Call:
    return palu.topk_mse, {"logits": torch.randn(2, 6), "index": torch.tensor([[0, 1], [2, 3]])} | changed


def linear_topk_mse(**changed: Any) -> Call:
    given = {"hidden": torch.randn(2, 3), "weight": torch.randn(6, 3), "index": torch.tensor([[0, 1], [2, 3]])}
    return palu.linear_topk_mse, given | changed


def linear_topk_unlikelihood(**changed: Any) -> Call:
    return palu.linear_topk_unlikelihood, linear_topk_mse()[1] | changed


def prefix_mask(**changed: Any) -> Call:
    return palu.prefix_mask, {"labels": torch.tensor([[-100, 1, -200]]), "n": 3} | changed


def palu_loss(**changed: Any) -> Call:
    given = {"logits": torch.randn(1, 3, 5), "ref_logits": torch.randn(1, 3, 5)}
    return palu.palu_loss, given | {"labels": torch.tensor([[-100, 1, -200]])} | changed


def overwriting(grad_logits: Tensor) -> Call:
    """The raw op, which fills a buffer."""
    given = {"grad": torch.ones(2), "slope": torch.ones(2, 2), "index": torch.tensor([[0, 1], [2, 3]])}
    return torch.ops.palu.topk_backward, given | {"through_mean": True, "grad_logits": grad_logits}


def config(**settings: Any) -> Call:
    return palu.UnlearnConfig, settings


def tofu(**changed: Any) -> Call:
    model = tiny_llama(vocab_size=len(words()), max_position_embeddings=512)
    given = {"model": model, "tokenizer": words(), "data": small_tofu(), "max_new_tokens": 4, "progress": False}
    return palu.evaluate.tofu, given | changed


def muse_news(**changed: Any) -> Call:
    model = tiny_llama(vocab_size=len(words()), max_position_embeddings=512)
    return palu.evaluate.muse_news, {"model": model, "tokenizer": words(), "data": small_muse_news()} | changed


# --- What is bad about them ---
class Slow(PreTrainedTokenizer):
    vocab_size = 1

    def get_vocab(self) -> dict[str, int]:
        return {"x": 0}


def endless() -> Any:
    tokenizer = byte_level(CHATML, bos=False)
    tokenizer.eos_token = None
    return tokenizer


def lora(on: list[str], settings: Any = (), **config: Any) -> peft.PeftModel:
    model = tiny_llama(tie_word_embeddings=False, **config)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=on, task_type="CAUSAL_LM", **dict(settings)))


def after(model: Any, change: Callable[[Any], object]) -> Any:
    change(model)
    return model


def activate_two(model: peft.PeftModel) -> None:
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


def reference_of_an_adapter() -> Call:
    model = lora(["q_proj"])
    return unlearn(model=model, ref_model=model.get_base_model())


def quantised(model: Any, method: str) -> Any:
    """As transformers marks one; tests/models/test_quantized.py has real ones."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    base.is_quantized, base.quantization_method = True, method
    return model


def offloaded() -> LlamaForCausalLM:
    """As a device_map leaves it that keeps a layer on the disk."""
    model = tiny_llama()
    model.model.layers[1].to(META)
    return model


def broken() -> LlamaForCausalLM:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return model


def sequential_head() -> LlamaForCausalLM:
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head = nn.Sequential(nn.Linear(32, 32), model.lm_head)
    return model


def same_model_twice() -> Call:
    model = tiny_llama()
    return unlearn(model=model, ref_model=model)


def model_inside_reference() -> Call:
    adapted = lora(["q_proj"])
    return unlearn(model=adapted.get_base_model(), ref_model=adapted)


def two_adapters() -> dict[str, Any]:
    one = lora(["q_proj"], vocab_size=len(words()))
    return {"model": one, "reference_model": peft.PeftModel(one.get_base_model(), one.peft_config["default"], "other")}


def merged_adapter() -> dict[str, Any]:
    adapted = lora(["q_proj"], vocab_size=len(words()))
    adapted.merge_adapter()
    return {"model": adapted, "reference_model": adapted.get_base_model()}


def in_int32(rows: list[Any]) -> list[Any]:
    return [{name: torch.tensor(values, dtype=torch.int32) for name, values in one.items()} for one in rows]


def kept(one: Any) -> Any:
    """A forget row as a retain row."""
    pairs = zip(one["input_ids"], one["labels"], strict=True)
    return one | {"labels": [label if label == IGNORE else token for token, label in pairs]}


def with_token(rows: list[Any], token: int) -> list[Any]:
    rows[2]["input_ids"][0] = token
    return rows


def jsonl(*lines: str) -> str:
    """A file in the current folder, which is the test's own."""
    Path("rows.jsonl").write_text("\n".join(lines) + "\n")
    return "rows.jsonl"


def file(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


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


def without(data: Any, name: str, number: int, column: str) -> Any:
    del getattr(data, name)[number][column]
    return data


EDGES = "give [start, end) in characters of the answer"
CAUSAL = "which is not a causal language model with a linear head; load it with AutoModelForCausalLM.from_pretrained"
BNB = "while palu works with bitsandbytes: load it with a BitsAndBytesConfig (load_in_4bit or load_in_8bit), or without a quantization_config"
WHOLE = "load it without offloading to CPU or disk"
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
TRAINERS_OWN = "which goes by Trainer's arguments; leave it out and write a TrainerCallback (docs/unlearn.md), or set report_to for a tracker"
DataError = palu.DataError

BAD: dict[str, tuple[Callable[[], Call], type[Exception], str]] = {
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
    "answers cut off entirely": (lambda: text(max_length=3), DataError, "forget set has no answer token in the first 3 tokens of any row; set max_length = 17 to cut none of them"),
    "answers to retain cut off entirely": (lambda: text(forget=[{"input_ids": [1, 2], "labels": [-100, 2]}], max_length=3), DataError, "retain set has no answer token in the first 3 tokens of any row; set max_length = 19 to cut none of them"),
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
    "a file in another encoding": (lambda: text(retain=file("rows.jsonl", b'{"question": "Who?", "answer": "Ada"}\n\n\xff\xfe\n')), DataError, "retain line 3 of rows.jsonl: not UTF-8; save the file as UTF-8"),
    "a row of a file": (lambda: text(forget=jsonl(json.dumps(row()), "", json.dumps(row(spans=[[12, 40]])))), DataError, f"forget row 1 (line 3): span [12, 40] ends after the answer (17 characters); {EDGES}"),
    "a list in a file": (lambda: text(forget=jsonl(json.dumps(row()), "[1]")), DataError, "forget row 1 (line 2): a row must map column names to values, got list"),
    "too many fields": (lambda: csv(b"question,answer\na,b,c\n"), DataError, f"forget line 2 of rows.csv: 3 fields under a header of 2; {QUOTE}"),
    "too few fields": (lambda: csv(b"question,answer\n\na\n"), DataError, f"forget line 3 of rows.csv: 1 fields under a header of 2; {QUOTE}"),
    "a quote within a field": (lambda: csv(b'question,answer\na,"b"c\n'), DataError, f"forget line 2 of rows.csv: not CSV (',' expected after '\"'); {QUOTE}"),
    "an open quote": (lambda: csv(b'question,answer\na,"b\n'), DataError, f"forget line 2 of rows.csv: not CSV (unexpected end of data); {QUOTE}"),
    "a column twice": (lambda: csv(b"question,answer,answer\n"), DataError, "forget line 1 of rows.csv: column 'answer' is there twice; give each column one name"),
    "a table in another encoding": (lambda: csv(b"question,answer\n\xff,c\n"), DataError, "forget line 2 of rows.csv: not UTF-8; save the file as UTF-8"),
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
    "a tokenizer's name with a chat template's values": (lambda: muse_news(tokenizer="gpt2", chat_template_kwargs={"a": 1}), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a slow tokenizer": (lambda: text(tokenizer=Slow()), DataError, "forget row 0: a slow tokenizer gives no offsets; load a fast one (one with a tokenizer.json)"),
    "a tokenizer's name": (lambda: text(tokenizer="meta-llama/Llama-3.2-1B"), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a tokenizer without an end of sequence": (lambda: text(tokenizer=endless()), DataError, "forget row 0: the tokenizer has no end-of-sequence token; set tokenizer.eos_token"),
    "a tokenizer of another model": (lambda: unlearn(tokenizer=words()), ValueError, f"the tokenizer has {len(words())} tokens and the model a vocabulary of {VOCAB}; load the tokenizer that belongs to the model"),
    "a template that fails": (lambda: text(tokenizer=byte_level("{{ raise_exception('no system role') }}")), DataError, "forget row 0: the chat template fails (no system role); correct the messages or the template"),
    "a template that alters the answer": (lambda: text(tokenizer=byte_level("{{ messages[1].content | upper }}")), DataError, "forget row 0: the chat template alters the answer; correct the answer or the template"),
    # Models
    "a model's name": (lambda: unlearn(model="meta-llama/Llama-3.2-1B"), UnsupportedModelError, f"model is a str, {CAUSAL}"),
    "no model": (lambda: unlearn(model=None), UnsupportedModelError, f"model is a NoneType, {CAUSAL}"),
    "a model without a head": (lambda: unlearn(model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"model is a LlamaModel, {CAUSAL}"),
    "a reference without a head": (lambda: unlearn(ref_model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"ref_model is a LlamaModel, {CAUSAL}"),
    "a head of two layers": (lambda: unlearn(model=sequential_head()), UnsupportedModelError, f"model is a LlamaForCausalLM, {CAUSAL}"),
    "the model as its own reference": (same_model_twice, ValueError, "ref_model is the model itself, which training would change; pass None to use its starting weights"),
    "a model inside its reference": (model_inside_reference, ValueError, "ref_model is the model itself, which training would change; pass None to use its starting weights"),
    "two adapters on one base": (lambda: tofu(**two_adapters()), ValueError, "model and reference_model share one base model, which has an adapter in it; load model on its own"),
    "a base with a merged adapter": (lambda: tofu(**merged_adapter()), ValueError, "reference_model and model share one base model, which has an adapter in it; load reference_model on its own"),
    "a reference with another vocabulary": (lambda: unlearn(ref_model=tiny_llama(vocab_size=VOCAB + 1)), ValueError, f"the model has a vocabulary of {VOCAB} and ref_model one of {VOCAB + 1}; the reference must be the model as it was before training"),
    "a frozen model": (lambda: unlearn(model=tiny_llama().requires_grad_(False)), ValueError, "no parameter of the model requires a gradient, so nothing could be unlearned"),
    "a model with NaN in it": (lambda: unlearn(model=broken()), palu.DivergenceError, "step 1: loss = nan, local = nan, kl = nan, retain = nan, grad_norm = nan, onset_probability = nan; the model keeps the weights of step 0. Lower the learning rate, or look at the model and the data of this step"),
    "an adapter on the head": (lambda: unlearn(model=lora(["q_proj", "lm_head"])), ValueError, "the adapter of model is on lm_head; PALU needs the head as the reference has it: leave lm_head out of target_modules, modules_to_save and trainable_token_indices"),
    "an adapter on a base quantised otherwise": (lambda: unlearn(model=quantised(lora(["q_proj"]), "gptq")), ValueError, f"model is quantised by gptq, {BNB}"),
    "a reference quantised otherwise": (lambda: unlearn(ref_model=quantised(tiny_llama(), "awq")), ValueError, f"ref_model is quantised by awq, {BNB}"),
    "a quantised model": (lambda: unlearn(model=quantised(tiny_llama(), "bitsandbytes")), ValueError, "model is quantised, and quantised weights cannot be trained; add a LoRA adapter (docs/lora.md), or load it without a quantization_config"),
    "a merge without an adapter": (lambda: unlearn(merge_adapter=True), ValueError, "merge_adapter = True: model is a LlamaForCausalLM, which has no adapter; leave it out"),
    "an activated adapter": (lambda: unlearn(model=lora(["q_proj"], {"alora_invocation_tokens": [1, 2]})), ValueError, "model has an activated LoRA, which acts on some tokens only; leave out alora_invocation_tokens"),
    "a frozen adapter": (lambda: unlearn(model=lora(["q_proj"]).requires_grad_(False)), ValueError, "no parameter of the adapter 'default' requires a gradient, so nothing could be unlearned; load it with is_trainable=True"),
    "a base that is trained": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.get_output_embeddings().requires_grad_(True))), ValueError, "base_model.model.lm_head.weight requires a gradient and is no part of the adapter 'default', so that saving the adapter would lose it; freeze it"),
    "two active adapters": (lambda: unlearn(model=after(lora(["q_proj"]), activate_two)), ValueError, "the model has 2 active adapters (default, second); choose the one to train with set_adapter"),
    "no active adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.delete_adapter("default"))), ValueError, "model is a PeftModelForCausalLM without any adapter; use get_base_model() of it"),
    "a merged adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.merge_adapter())), ValueError, "the adapter 'default' is merged into the base weights; call unmerge_adapter() before unlearning"),
    "a disabled adapter": (lambda: unlearn(model=after(lora(["q_proj"]), lambda m: m.base_model.disable_adapter_layers())), ValueError, "the adapter 'default' is disabled; call base_model.enable_adapter_layers()"),
    "an adapter that changes its base": (lambda: unlearn(model=lora(["q_proj"], {"init_lora_weights": "pissa"})), ValueError, "the adapter 'default' was initialised by pissa, which changes the base weights, so that the model without its adapter is not the model before training; pass ref_model"),
    "a reference with the model's adapter in it": (reference_of_an_adapter, ValueError, "ref_model has the model's adapter in it, since PEFT puts it there; pass None to use the model without its adapter"),
    "an adapter of another kind": (lambda: unlearn(model=peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM"))), UnsupportedModelError, "model has an adapter of PEFT type IA3; palu works with LoRA (peft.LoraConfig)"),
    "an adapter around something else": (lambda: unlearn(model=peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))), UnsupportedModelError, f"model is a PeftModel, {CAUSAL}"),
    "a model over several devices": (lambda: unlearn(model=after(tiny_llama(), lambda m: setattr(m, "hf_device_map", {"model": 0, "lm_head": 1}))), ValueError, "model is spread over the devices 0, 1 by its device_map; load it on one device (device_map={'': 0}), or leave device_map out and shard it with FSDP2 (docs/processes.md)"),
    # Devices and dtypes of models
    "a model without weights": (lambda: unlearn(model=tiny_llama().to(META)), ValueError, f"model is not wholly loaded: model.embed_tokens.weight is on the meta device; {WHOLE}"),
    "a model in part elsewhere": (lambda: unlearn(model=offloaded()), ValueError, f"model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a reference in part elsewhere": (lambda: unlearn(ref_model=offloaded()), ValueError, f"ref_model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a half-precision model": (lambda: unlearn(model=tiny_llama().half()), ValueError, "the model is in float16, which the CPU kernels do not support; load it with dtype=torch.bfloat16 or torch.float32"),
    "rows on another device": (lambda: unlearn(forget=[{name: torch.tensor(v, device=META) for name, v in one.items()} for one in forget_rows()]), DataError, "forget row 0: input_ids must be int64, got other values; give a flat list of integers"),
    # Settings
    "K of nothing": (lambda: unlearn(top_k=0), ValueError, "top_k = 0: give a positive integer"),
    "N of nothing": (lambda: unlearn(n=0), ValueError, "n = 0: give a positive integer, or -1 for whole spans"),
    "a setting of no name": (lambda: unlearn(topk=10), TypeError, f"'topk' is no setting of palu.unlearn; the settings are {', '.join(sorted(palu.UnlearnConfig().values()))}"),
    "settings of other methods": (lambda: unlearn(layer_id=3), ValueError, "layer_id = 3: objective = 'palu' does not read it (rmu would); leave it out"),
    "a setting of PALU alone": (lambda: unlearn(objective="npo", anchors=7), ValueError, "anchors = 7: objective = 'npo' does not read it (palu would); leave it out"),
    "settings in a dict": (lambda: unlearn(config={"top_k": 10}), TypeError, "config is a dict; give a palu.UnlearnConfig, or its fields as arguments"),
    "a target that is NaN": (lambda: config(target=float("nan")), ValueError, "target = nan: give one of global_mean, global_mean_detached, local_mean, or a finite number"),
    "a chat template's values in text": (lambda: config(chat_template_kwargs="{}"), ValueError, "chat_template_kwargs = '{}': give a mapping of names to values, or None"),
    "a value that no chat template knows": (lambda: text(chat_template_kwargs={"enable_thinking": False}), ValueError, "chat_template_kwargs = {'enable_thinking': False}: the chat template knows no enable_thinking; correct the name or leave it out"),
    "a chat template's values without one": (lambda: unlearn(chat_template_kwargs={"enable_thinking": False}), ValueError, "chat_template_kwargs = {'enable_thinking': False}: there is no chat template; leave it out"),
    "a switch that is text": (lambda: config(gradient_checkpointing="no"), ValueError, "gradient_checkpointing = 'no': give True or False"),
    "a tokenizer by the name that Trainer had for it": (lambda: trainer(tokenizer=words()), TypeError, "PaluTrainer takes no tokenizer: pass it as processing_class, as to Trainer"),
    "a callback's class": (lambda: unlearn(callbacks=[TrainerCallback]), TypeError, "callbacks[0] is the class TrainerCallback; give an instance of it: TrainerCallback()"),
    "a function for a callback": (lambda: unlearn(callbacks=[print]), TypeError, "callbacks[0] is a builtin_function_or_method; give an instance of a transformers.TrainerCallback"),
    "one callback": (lambda: unlearn(callbacks=TrainerCallback()), TypeError, "callbacks is a TrainerCallback; give a list of transformers.TrainerCallback"),
    "a callback of Trainer's own": (lambda: unlearn(callbacks=[EarlyStoppingCallback()]), TypeError, f"callbacks[0] is transformers' EarlyStoppingCallback, {TRAINERS_OWN}"),
    "Trainer's progress bar": (lambda: unlearn(callbacks=[ProgressCallback()]), TypeError, f"callbacks[0] is transformers' ProgressCallback, {TRAINERS_OWN}"),
    "a tracker for a callback": (lambda: unlearn(callbacks=[TensorBoardCallback()]), TypeError, f"callbacks[0] is transformers' TensorBoardCallback, {TRAINERS_OWN}"),
    "metrics for an evaluation": (lambda: unlearn(evaluate={"told": 1}), TypeError, "evaluate is a dict; give a function that takes the model and returns numbers by name"),
    "nothing to evaluate at steps": (lambda: unlearn(eval_steps=2), ValueError, "eval_steps = 2: there is nothing to evaluate; give evaluate, too"),
    "anchors without a tokenizer": (lambda: unlearn(anchors=5), DataError, "anchors = 5: for the model to answer everyday prompts there must be a tokenizer; pass it, or set anchors=0"),
    "anchors without a KL": (lambda: text(retain=None, lambda_kl=0), ValueError, "retain = None: the model's own answers are kept by the KL, and lambda_kl = 0; raise it, or give retain examples, or retain=[] with lambda_retain=0"),
    "more anchors than prompts": (lambda: text(retain=None, anchors=10**4), ValueError, f"anchors = 10000: there are {len(anchor_texts())} everyday prompts; give no more than these"),
    "no rows to retain for another method": (lambda: text(retain=None, objective="npo"), DataError, "the retain set is empty while lambda_retain = 1.0; give examples to keep, or set lambda_retain=0"),
    "a resume from nowhere": (lambda: config(resume=True), ValueError, "resume = True: give checkpoint_dir, too"),
    "checkpoints to nowhere, by steps": (lambda: config(checkpoint_steps=5), ValueError, "checkpoint_steps = 5: give checkpoint_dir, too"),
    "checkpoints to nowhere, by time": (lambda: config(checkpoint_minutes=5), ValueError, "checkpoint_minutes = 5: give checkpoint_dir, too"),
    "a warmup that the schedule leaves out": (lambda: config(lr_scheduler="constant", warmup_steps=2), ValueError, 'warmup_steps = 2: lr_scheduler = "constant" has no warmup; give "constant_with_warmup"'),
    # The ops
    "an index out of range": (lambda: topk_mse(index=torch.tensor([[0, 1], [6, 3]])), IndexError, "palu::topk_mse: index[1, 0] = 6 is out of range for a vocabulary of 6"),
    "a negative index": (lambda: linear_topk_mse(index=torch.tensor([[0, -1], [2, 3]])), IndexError, "palu::linear_topk_mse: index[0, 1] = -1 is out of range for a vocabulary of 6"),
    "an index that wants a gradient": (lambda: topk_mse(index=torch.zeros(2, 2, requires_grad=True)), TypeError, "palu::topk_mse: index must be int32 or int64, got float32"),
    "an index in int16": (lambda: topk_mse(index=torch.zeros(2, 2, dtype=torch.int16)), TypeError, "palu::topk_mse: index must be int32 or int64, got int16"),
    "a mask for an index": (lambda: topk_mse(index=torch.ones(2, 2, dtype=torch.bool)), TypeError, "palu::topk_mse: index must be int32 or int64, got bool"),
    "an index in a list": (lambda: topk_mse(index=[[0, 1], [2, 3]]), TypeError, "palu::topk_mse: index must be a torch.Tensor, got list"),
    "an index on another device": (lambda: topk_mse(index=torch.zeros(2, 2, dtype=torch.int64, device=META)), ValueError, "palu::topk_mse: index is on meta but logits is on cpu; move it there"),
    "logits on another device": (lambda: topk_mse(logits=torch.zeros(2, 6, device=META)), ValueError, "palu::topk_mse: index is on cpu but logits is on meta; move it there"),
    "half-precision logits": (lambda: topk_mse(logits=torch.zeros(2, 6, dtype=torch.float16)), TypeError, "palu::topk_mse: logits is float16, which the CPU kernels do not support; use bfloat16 or float32"),
    "sparse logits": (lambda: topk_mse(logits=torch.eye(6)[:2].to_sparse()), TypeError, "palu::topk_mse: logits must be a dense tensor, got a torch.sparse_coo one"),
    "an infinite target": (lambda: topk_mse(target=float("inf")), ValueError, "unknown target inf; choose one of global_mean, global_mean_detached, local_mean, or a finite number"),
    "no rows in an index": (lambda: topk_mse(index=torch.zeros(0, 2, dtype=torch.int64)), ValueError, "palu::topk_mse: index must have one row for each of the 2 rows, got 0"),
    "a head on another device": (lambda: linear_topk_mse(weight=torch.zeros(6, 3, device=META)), ValueError, "palu::linear_topk_mse: weight is on meta but hidden is on cpu; move it there"),
    "a bias on another device": (lambda: linear_topk_mse(bias=torch.zeros(6, device=META)), ValueError, "palu::linear_topk_mse: bias is on meta but hidden is on cpu; move it there"),
    "a head in another dtype": (lambda: linear_topk_mse(weight=torch.zeros(6, 3, dtype=torch.float64)), TypeError, "palu::linear_topk_mse: weight must be float32, got float64"),
    "a half-precision head": (lambda: linear_topk_mse(hidden=torch.zeros(2, 3).half(), weight=torch.zeros(6, 3).half()), TypeError, "palu::linear_topk_mse: hidden is float16, which the CPU kernels do not support; use bfloat16 or float32"),
    "a true token alone": (lambda: linear_topk_unlikelihood(index=torch.tensor([[0], [2]]), impl="dense"), ValueError, "palu::linear_topk_unlikelihood: index must hold the true token and at least one candidate in each row, got K = 1"),
    "a floor of one": (lambda: linear_topk_unlikelihood(floor=1.0), ValueError, "palu::linear_topk_unlikelihood: floor must be in [0, 1), got 1"),
    "a mean row of another size": (lambda: linear_topk_mse(weight_mean=torch.zeros(6)), ValueError, "palu::linear_topk_mse: weight_mean must have shape [3], got [6]"),
    "a buffer of zero stride": (lambda: overwriting(torch.zeros(1, 6).expand(2, 6)), ValueError, "palu::topk_backward: grad_logits must not have rows that overlap, got shape [2, 6] and strides [0, 1]"),
    "a buffer in steps": (lambda: overwriting(torch.zeros(6, 2).t()), ValueError, "palu::topk_backward: grad_logits must have unit stride in its last dimension, got strides [1, 2]"),
    "a buffer on another device": (lambda: overwriting(torch.zeros(2, 6, device=META)), ValueError, "palu::topk_backward: grad_logits is on meta but grad is on cpu; move it there"),
    "a mask of int32 labels": (lambda: prefix_mask(labels=torch.zeros(1, 3, dtype=torch.int32)), TypeError, "palu::prefix_mask: labels must be int64, got int32"),
    "a mask of a fractional N": (lambda: prefix_mask(n=1.5), TypeError, "palu::prefix_mask: n must be one integer of 64 bits, got 1.5"),
    "a mask of N below -1": (lambda: prefix_mask(n=-2), ValueError, "palu::prefix_mask: n must be -1 (all) or at least 0, got -2"),
    "several ends of sequence": (lambda: prefix_mask(eos_token_id=[1, 2]), TypeError, "palu::prefix_mask: eos_token_id must be one integer of 64 bits, got [1, 2]"),
    "a loss of other shapes": (lambda: palu_loss(ref_logits=torch.zeros(1, 3, 6)), ValueError, "palu_loss needs logits and ref_logits [B, T, V] and labels [B, T], got [1, 3, 5], [1, 3, 6] and [1, 3]"),
    "a loss of int32 labels": (lambda: palu_loss(labels=torch.zeros(1, 3, dtype=torch.int32)), TypeError, "palu::prefix_mask: labels must be int64, got int32"),
    "a loss of a label that is none": (lambda: palu_loss(labels=torch.tensor([[-100, 1, -300]])), ValueError, "palu_loss: labels[0, 2] = -300: a label must be a token id below V = 5, -100 or -200"),
    "a loss with labels elsewhere": (lambda: palu_loss(labels=torch.zeros(1, 3, dtype=torch.int64, device=META)), ValueError, "palu_loss: labels is on meta but logits is on cpu; move it there"),
    "a loss with its reference elsewhere": (lambda: palu_loss(ref_logits=torch.zeros(1, 3, 5, device=META)), ValueError, "palu_loss: ref_logits is on meta but logits is on cpu; move it there"),
    "a loss of a fractional K": (lambda: palu_loss(top_k=1.5), ValueError, "top_k = 1.5: give a positive integer"),
    # Evaluation
    "an attack that does not exist": (lambda: tofu(mia=["lira"]), ValueError, "there is no attack 'lira'; mia may hold loss, zlib, reference, gradnorm, min_k, min_k_plus_plus"),
    "a split that does not exist": (lambda: tofu(forget="forget50", data=None), ValueError, "there is no forget split 'forget50'; locuslab/TOFU has forget01, forget05, forget10"),
    "nothing to evaluate": (lambda: tofu(data=palu.evaluate.TofuData([])), DataError, "forget set is empty; give at least one row"),
    "a row to evaluate without an answer": (lambda: tofu(data=without(small_tofu(), "retain", 1, "answer")), DataError, "retain row 1: column 'answer' is missing; fill it in, or use TOFU's perturbed sets, which have it"),
    "results that are none": (lambda: tofu(retain_results={"loss": 1.0}), ValueError, "these are no results: a mapping of metrics to {agg_value, value_by_index} is needed, as palu.evaluate returns it and open-unlearning logs it"),
    "a language without a word list": (lambda: tofu(language="ja"), ValueError, "there is no word list for language 'ja'; give one of ar, bg, bn, ca, cs, da, de, el, en, es, fa, fi, fil, fr, he, hi, hu, id, is, it, lt, lv, mk, ms, nb, nl, pl, pt, ro, ru, sh, sk, sl, sv, ta, tr, uk, ur, vi, or None to leave the share of words out"),
    "reference results of other rows": (lambda: tofu(reference_results={"forget_Q_A_ROUGE": {"agg_value": 1.0}}), ValueError, "reference_results do not fit: they hold no forget_Q_A_ROUGE generations for these rows; evaluate the model as it was before unlearning on the same rows"),
    "a tokenizer's name to evaluate with": (lambda: tofu(tokenizer="gpt2"), TypeError, "tokenizer is a str; load it with AutoTokenizer.from_pretrained"),
    "a model without a head to evaluate": (lambda: tofu(model=LlamaModel(tiny_llama().config)), UnsupportedModelError, f"model is a LlamaModel, {CAUSAL}"),
    "a model to evaluate in part elsewhere": (lambda: muse_news(model=offloaded()), ValueError, f"model is not wholly loaded: model.layers.1.self_attn.q_proj.weight is on the meta device; {WHOLE}"),
    "a set to evaluate that is missing": (lambda: muse_news(data={}), DataError, "verbmem_forget set is missing or empty; use the sets of MUSE-News"),
}  # fmt: skip


def picture(value: Any) -> Any:
    """All that a call could change in what it was given; equal pictures mean equal bits."""
    if isinstance(value, nn.Module):
        state = [(n, p, p.requires_grad, p.grad is None) for n, p in value.named_parameters()]
        return picture([state, list(value.named_buffers()), [m.training for m in value.modules()]])
    if isinstance(value, Tensor):
        if value.is_meta:
            return value.shape
        value = value.detach().to_dense() if value.is_sparse else value.detach()
        return value.dtype, value.shape, value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, Mapping):
        return {name: picture(part) for name, part in value.items()}
    return [picture(part) for part in value] if isinstance(value, list | tuple) else repr(value)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build, error, message = BAD[name]
    if "half-precision model" in name and Accelerator().device.type != "cpu":
        pytest.skip("only CPU kernels lack float16")
    function, arguments = build()
    before = picture(arguments)
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert str(caught.value) == message
    assert picture(arguments) == before


# --- Settings ---
NAN, INF = float("nan"), float("inf")
OBJECTIVES = "give one of palu, ga, gd, dpo, npo, simnpo, pdu, tpo, wga, satimp, undial, rmu, or a class of method"
# Names, what each of them may not be, and what is said of it.
BAD_SETTINGS: list[tuple[str, tuple[Any, ...], str]] = [
    ("n", (0, -2, 1.5, "3", None, True), "give a positive integer, or -1 for whole spans"),
    ("top_k", (0, -1, 5.0, "all", None, True), "give a positive integer"),
    ("target", ("mean", "", NAN, INF, None, True), "give one of global_mean, global_mean_detached, local_mean, or a finite number"),
    ("local_loss", ("entropy", None, 1), "give one of topk_mse, unlikelihood"),
    ("probability_floor", (-0.1, 1, NAN, "0.1", None, True), "give a number from 0 to below 1"),
    ("target", ("local_mean",), 'read by local_loss = "topk_mse" alone; give that, too, or leave it out'),
    ("kl_direction", ("both", None, 1), "give one of forward, reverse"),
    ("gamma lambda_kl lambda_retain weight_decay dual_step retain_loss_bound", (-0.1, NAN, INF, "1", True), "give a number that is not negative"),
    ("objective", ("NPO", "", None, 1), OBJECTIVES),
    ("allow_cut_spans gradient_checkpointing merge_adapter resume progress", (None, 1, "yes"), "give True or False"),
    ("beta", (0, -1, NAN, "1", True), "give a positive number"),
    ("layer_id", (-1, 1.0, "7", None, True), "give 0 or a positive integer"),
    ("delta", (NAN, INF, "1", None), "give a finite number"),
    ("learning_rate", (0, -1e-5, NAN, INF, "1", True), "give a positive number, or None for one from the first gradient"),
    ("max_grad_norm steering_coeff", (0, -1e-5, NAN, INF, "1", None), "give a positive number"),
    ("checkpoint_minutes", (0, None), "give a positive number"),
    ("epochs", (0, -1, 1.0), "give a positive integer, or None for the method's"),
    ("batch_size gradient_accumulation_steps chunk_bytes", (0, -1, 1.0, None), "give a positive integer"),
    ("retain_batch_size", (0, -1, 2.0), "give a positive integer, or None for batch_size"),
    ("kl_rows", (0, -1, 2.0), "give a positive integer, or None for all ordinary tokens"),
    ("max_tokens", (0, -1, 2.0), "give a positive integer, or None for no bound"),
    ("max_steps", (0, -1, 2.0), "give a positive integer, or None for epochs"),
    ("eval_steps", (0, -1, 2.0), "give a positive integer, or None for one before and one after"),
    ("checkpoint_steps", (0, -1, 2.0), "give a positive integer, or None for checkpoint_minutes"),
    ("anchors", (-1, 2.0, True, "all"), "give 0 or a positive integer, or None"),
    ("neighbours variants", (-1, 2.0, True, None, "all"), "give 0 or a positive integer"),
    ("max_length", (1, 0, -1, 10.0, None), "give an integer above 1"),
    ("warmup_steps", (-1, 0.5, None), "give 0 or a positive integer"),
    ("seed", (-1, 2**32, 1.0, None), "give an integer in [0, 2**32)"),
    ("checkpoint_dir cache_dir", ("",), "give a folder's path as a string, or None"),
    ("logging_dir", ("", None), "give a folder's path"),
    ("report_to", ("mlflow", "", ("wandb",)), "give one of tensorboard, wandb, both with a comma between them, or None"),
    ("chat_template_kwargs", ("{}", [], 1, True, {1: 2}), "give a mapping of names to values, or None"),
    ("chat_template_kwargs", ({"d": datetime.date(2024, 7, 26)}, {"x": NAN}, {"x": {1, 2}}), "give values that JSON has (text, numbers, lists, ...); a date is text"),
    ("chat_template_kwargs", ({"tokenize": True},), "leave out tokenize, which palu sets itself"),
    ("chat_template_kwargs", ({"conversation": True},), "leave out conversation, which palu sets itself"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "values", "rule"), BAD_SETTINGS)
def test_settings_that_are_not_valid(names: str, values: tuple[Any, ...], rule: str) -> None:
    for name in names.split():
        readers = readers_of(name)
        objective = {"objective": readers[0]} if readers and name != "objective" else {}
        for value in values:
            for make in (UnlearnConfig, UnlearnConfig(**objective).replace):
                with pytest.raises(ValueError, match=f"^{re.escape(f'{name} = {value!r}: {rule}')}$"):
                    make(**objective, **{name: value})


# --- The command line ---
@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=len(words())).save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def settings(*lines: str) -> str:
    Path("settings.yaml").write_text("\n".join(lines) + "\n")
    return "settings.yaml"


REFUSED: dict[str, tuple[Callable[[], list[str]], str]] = {
    # What is added to `palu unlearn --model ... --forget ... --output ...`, and the one line that is said.
    "another tool's name of a setting": (lambda: ["--lr", "1e-4"], "No such option: --lr (Possible options: --learning-rate)"),
    "another tool's name of a setting in a file": (lambda: ["--config", settings("lr: 1e-4")], "Invalid value for '--config': settings.yaml: unknown key 'lr'; did you mean learning_rate?"),
    "a key twice": (lambda: ["--config", settings("epochs: 1", "n: 3", "epochs: 2")], "Invalid value for '--config': settings.yaml: key 'epochs' is there twice; keep one of them"),
    "a key twice within a key": (lambda: ["--config", settings("chat_template_kwargs:", "  a: 1", "  a: 2")], "Invalid value for '--config': settings.yaml: key 'a' is there twice; keep one of them"),
    "a secret that is cut off": (lambda: ["--forget", jsonl(json.dumps(LATE)), "--max-length", "40"], "forget set: max_length = 40 cuts off spans of 1 row (0), which would not be forgotten; set max_length = 53, or allow_cut_spans = True to go on without them"),
    "a weight for no rows": (lambda: ["--retain", "none", "--lambda-retain", "1"], "the retain set is empty while lambda_retain = 1.0; give examples to keep, or set lambda_retain=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_command(name: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build, message = REFUSED[name]
    forget = ["--forget", jsonl(json.dumps(row()))]
    result = CliRunner().invoke(app, ["unlearn", "--model", model_folder, "--output", "out", *forget, *build()])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == f"palu: {message}"


# --- What looks as bad and is good ---
def outcome(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of its floating arguments."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    loss = function(**leaves)
    loss.sum().backward()
    return [loss, *(t.grad for t in leaves.values() if t.grad is not None)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "zero stride": lambda t: t[:1].expand(t.shape),
    "every other column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "reversed storage": lambda t: torch.cat([t, t])[1 : 1 + len(t)],
    "index in int32": lambda t: t if t.is_floating_point() else t.int(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("build", [topk_mse, linear_topk_mse, linear_topk_unlikelihood])
def test_layouts_of_inputs(build: Callable[..., Call], layout: str) -> None:
    """Bit for bit what the same values give in a contiguous tensor with an int64 index."""
    function, arguments = build()
    changed = {name: LAYOUTS[layout](tensor) for name, tensor in arguments.items()}
    plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in changed.items()}
    plain["index"] = plain["index"].long()
    for one, other in zip(outcome(function, changed), outcome(function, plain), strict=True):
        assert torch.equal(one, other)


def test_layouts_of_labels_and_rows() -> None:
    """Expanded and sliced columns of a forget set train the model as their copies do."""
    ids, labels = torch.arange(1, 13).repeat(4, 1), torch.full((4, 12), -200)
    labels[:, :4], labels[:, 5:7] = -100, ids[:, 5:7]
    views = {"input_ids": ids[:1].expand(4, 12), "labels": torch.stack([labels, labels], -1)[..., 0]}
    assert views["input_ids"].stride(0) == 0 and not views["labels"].is_contiguous()
    masks = [palu.prefix_mask(x, 1) for x in (views["labels"], labels, labels[:1].expand(4, 12))]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    ends = []
    for forget in (views, {"input_ids": ids, "labels": labels}):
        function, arguments = unlearn(forget=forget)
        function(**arguments)
        ends.append(weights(arguments["model"]))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["lm_head.weight"], tiny_llama().lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("objective", ["palu", "npo", "tpo", "undial", "rmu"])
def test_a_reference_in_another_dtype(dtype: torch.dtype, objective: str) -> None:
    reference = tiny_llama(seed=1)
    function, arguments = unlearn(objective=objective, **rmu_layer(objective), ref_model=reference)
    same = function(**arguments).history[-1]
    function, arguments = unlearn(objective=objective, **rmu_layer(objective), ref_model=tiny_llama(seed=1).to(dtype))
    other = function(**arguments).history[-1]
    assert {n: other[n] for n in other if n != "tokens_per_second"} == pytest.approx(
        {n: same[n] for n in same if n != "tokens_per_second"}, rel=0.1
    )


def test_numbers_of_numpy() -> None:
    """As settings they are Python's own, which JSON has, and as spans integers."""
    settings = {"n": np.int64(2), "learning_rate": np.float32(0.125), "allow_cut_spans": np.bool_(True)}
    function, arguments = text(
        forget=[row(spans=np.array([[0, 12]]))], retain=[], lambda_retain=np.int64(0), **settings
    )
    summary = function(**arguments).summary
    assert summary["onset_tokens"] == 2
    assert json.loads(json.dumps(summary))["config"]["learning_rate"] == 0.125


def test_a_tokenizer_that_adds_no_end_of_sequence() -> None:
    """It has one: each answer is taught to end, and in forget its end is held by the KL."""
    plain = byte_level(bos=False)
    assert plain(row()["answer"])["input_ids"][-1] != plain.eos_token_id
    function, arguments = text(tokenizer=plain)
    answer = plain(f"Question: Who?\nAnswer: {row()['answer']}")["input_ids"]
    summary = function(**arguments).summary
    held = summary["onset_tokens"] + summary["ordinary_tokens"]
    alone = load_forget([row()], plain, max_length=99).examples[0]
    assert alone.input_ids.tolist() == [*answer, plain.eos_token_id]
    assert int(alone.labels[-1]) == ORDINARY
    assert 0 < held <= int((alone.labels != IGNORE).sum())
