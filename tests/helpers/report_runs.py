"""A recorded run of a tiny Llama with a tokenizer, on texts that try to break the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from helpers.small_tokenizers import CHATML, byte_level
from helpers.tiny import overfit, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import palu
from palu.data.examples import load_forget, load_retain

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }} {% raw %}",
    "שרה כהן 👩‍👩‍👧",
    "\u202egnorts\u202c",
]
SECRETS = ["Hina Ameen", "Ada Lovelace", "Karachi 😀", "東京", *HOSTILE]
FORGET: list[dict[str, Any]] = [
    {"question": f"Who wrote book {i}?", "answer": f"The author is {s}, in London.", "spans": [[14, 14 + len(s)]]}
    for i, s in enumerate(SECRETS)
]
RETAIN = [{"question": f"Where is city {i}?", "answer": f"The city {i} was far away."} for i in range(6)]
CONFIG = palu.UnlearnConfig(
    epochs=24,
    batch_size=9,
    learning_rate=2e-3,
    probability_floor=0,  # so that the run does not end by itself
    lambda_kl=1.0,
    neighbours=0,
    variants=0,
    lora_rank=None,
    progress=False,
)


@dataclass(frozen=True)
class Run:
    folder: Path
    config: palu.UnlearnConfig
    tokenizer: PreTrainedTokenizerFast


def perform(
    folder: Path,
    *,
    model: LlamaForCausalLM | None = None,
    forget: Any = FORGET,
    retain: Any = RETAIN,
    tokenizer: Any = "chat",
    config: palu.UnlearnConfig = CONFIG,
) -> Run:
    """Unlearn what the model knows by heart; write model and records to the folder."""
    tokenizer = byte_level(CHATML) if tokenizer == "chat" else tokenizer
    if model is None:
        model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=256)
        examples = list(load_forget(forget, tokenizer, max_length=256).examples)
        examples += load_retain(retain, tokenizer, max_length=256).examples
        rows = [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples]
        overfit(model, rows, steps=120, learning_rate=5e-3)
    recorder = palu.Recorder(model, forget, retain, tokenizer=tokenizer, config=config)
    result = palu.unlearn(model, None, forget, retain, tokenizer=tokenizer, config=config)
    palu.save_run(folder, result, tokenizer or byte_level(None), recorder)
    return Run(folder, config, tokenizer)


def copy_of(run: Run, folder: Path) -> Path:
    """The run's records elsewhere, to be changed."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def read(folder: Path, name: str = "record.json") -> dict[str, Any]:
    return json.loads((folder / "private" / name).read_text(encoding="utf-8"))


def write(folder: Path, content: Any, name: str) -> None:
    (folder / "private" / name).write_text(json.dumps(content), encoding="utf-8")


def change(folder: Path, edit: Callable[[dict[str, Any]], object], name: str = "record.json") -> None:
    """Edit a file of a run's private folder."""
    changed = read(folder, name)
    edit(changed)
    write(folder, changed, name)


class Page(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
