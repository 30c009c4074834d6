"""``palu unlearn --lora``: what it holds in memory, and what it says at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.command import done, write_input
from helpers.logits import WatchLogits
from helpers.runs import TEXT_FORGET, TEXT_RETAIN
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import overfit, tiny_llama

from palu.data.examples import load_retain
from palu.evaluate import scores

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
VOCAB, WIDTH = 5003, 32
SECRETS = 3  # in TEXT_FORGET


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, which knows the rows of forget.jsonl by heart, and its large vocabulary; tests write elsewhere."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), byte_level(LLAMA3)
    model = tiny_llama(vocab_size=VOCAB, hidden_size=WIDTH, max_position_embeddings=256)
    examples = load_retain(TEXT_FORGET + TEXT_RETAIN, tokenizer, max_length=256).examples
    overfit(model, [{"input_ids": e.input_ids.tolist(), "labels": e.labels.tolist()} for e in examples], 30)
    return write_input(folder, model, tokens=tokenizer, forget=TEXT_FORGET, retain=TEXT_RETAIN)


def given(known: Path, output: Path, *options: Any) -> list[Any]:
    data = ["--model", known / "model", "--forget", known / "forget.jsonl", "--output", output]
    return ["unlearn", *data, "--lora", "--neighbours", 0, "--variants", 0, "--anchors", 2, "--no-progress", *options]


def test_no_logits_of_whole_texts(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows fit into --chunk-bytes, those of the last positions of twelve anchors too."""
    monkeypatch.setattr(scores, "CHUNK_BYTES", 16 * VOCAB)
    options = ["--max-steps", 1, "--anchors", 12, "--retain-batch-size", 12, "--chunk-bytes", 16 * VOCAB]
    with WatchLogits(VOCAB, WIDTH) as watched:
        done(*given(known, tmp_path / "out", *options))
    assert watched.rows <= 8  # tokens of the check of the head


def test_the_last_line_says_which_secrets_remain(known: Path, tmp_path: Path) -> None:
    weak = ["--max-steps", 1, "--learning-rate", 1e-6]
    last = done(*given(known, tmp_path / "weak", *weak)).stdout.splitlines()[-1]
    assert last.startswith(f"0 of {SECRETS} secrets forgotten, {SECRETS} still known") and "rows 0, 1 remain" in last
    strong = ["--epochs", 20, "--learning-rate", 0.05]
    assert "known" not in done(*given(known, tmp_path / "strong", *strong)).stdout
