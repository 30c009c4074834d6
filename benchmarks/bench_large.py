"""Memory and time of a large forget set (loading, the reference's pass, an epoch of batches), and of long documents.

Each row is a process of its own. Memory is anonymous memory (RssAnon), of which pages of a mapped file, which the
kernel drops when it needs room, are no part; what it was before the data (Python, torch, model, tokenizer) is taken
off.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from _memory import PeakMemory
from _timing import alone, report
from accelerate import Accelerator
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import palu
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.methods.base import ForgetSet
from palu.methods.palu import PaluMethod
from palu.models.root import ModelRoot
from palu.ref_model.anchors import AnchorPrompts
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.precompute import precompute_reference
from palu.ref_model.storage import open_cache_file, reference_key
from palu.training.dataloader import UnlearnDataLoader

ROWS = (1_000, 10_000, 100_000)
LONG = 8_000  # tokens of the one long row
SHORTER = 2_000  # tokens of the seven documents that are unlearned beside it
# Of the run on documents: what each process sets.
RUNS: dict[str, dict[str, int]] = {
    "default": {},
    "max_tokens": {"max_tokens": 2048},
    "kl_rows": {"max_tokens": 2048, "kl_rows": 256},
}
SYLLABLES = ["ka", "lo", "mi", "tar", "ven", "sho", "bel", "dun", "esk", "or", "ith", "ra"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="sizes of the forget set")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        warnings.simplefilter("ignore")
        row = measure_document(args.process) if args.process in RUNS else measure_set(int(args.process))
        print(json.dumps(row))
        return
    for part, processes in {"set": args.rows, "document": RUNS}.items():
        rows = [alone(__file__, "--process", process) for process in processes]
        report(f"large_{part}", rows, torch.device("cpu"), {"long": LONG})


def measure_set(count: int) -> dict[str, Any]:
    """Load, cache and feed a forget set of ``count`` rows, one of them long; returns its row of the table."""
    tokenizer = make_tokenizer()
    model = tiny(len(tokenizer))
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forget.jsonl"
        write_rows(path, count, tokenizer)
        config = UnlearnConfig(max_length=2 * LONG, cache_dir=folder)
        with PeakMemory("load") as memory:
            examples = load_forget(path, tokenizer, max_length=config.max_length).examples
            items = PaluMethod.make_items(ForgetSet(examples, tokenizer.eos_token_id), config)
            del examples
            memory.begin("cache")
            fingerprints = Fingerprints(model, None, items, [])
            file = open_cache_file(config, reference_key(config, accelerator, fingerprints))
            root, none = ModelRoot(model), AnchorPrompts([], set(), 0)
            cache, _ = precompute_reference(root, items, none, config, accelerator, own=True, file=file)
            memory.begin("epoch")
            tokens = sum(
                sum(batch.packed.sequence_lengths)
                for step in UnlearnDataLoader(items, [], cache, config)
                for batch in step
            )
        assert file is not None
        return {
            "rows": count,
            **memory.row("load", "cache", "epoch", seconds=True),
            "tokens": tokens,
            "peak_bytes_per_row": round(max(memory.mib.values()) * 2**20 / count),
            "text_mib": round(path.stat().st_size / 2**20, 1),
            "file_mib": round(file.path.stat().st_size / 2**20, 1),
        }


def measure_document(name: str) -> dict[str, Any]:
    """Unlearn a long document and seven shorter ones in one step an epoch; returns its row of the table."""
    tokenizer = make_tokenizer()
    model, rng = tiny(len(tokenizer), layers=2, width=128), random.Random(0)
    forget = [document(tokenizer, rng, LONG), *(document(tokenizer, rng, SHORTER) for _ in range(7))]
    retain = [{k: v for k, v in short_row(number, rng).items() if k != "spans"} for number in range(8)]
    reference = copy.deepcopy(model).eval()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"max_length": 2 * LONG, "epochs": 4, "learning_rate": 1e-3, **RUNS[name]}
        settings |= {"anchors": 0, "neighbours": 0, "variants": 0}
        settings |= {"local_loss": "topk_mse"}  # a loss that never is 0 ends no run
        config = UnlearnConfig(**settings, cache_dir=folder, progress=False)
        with PeakMemory("run") as memory:
            result = palu.unlearn(model, None, forget, retain, tokenizer=tokenizer, config=config)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "run": name,
        "seconds": round(result.summary["seconds"], 1),
        "peak_mib": round(memory.mib["run"], 1),
        "file_mib": round(size / 2**20, 1),
        "kl_tokens": result.summary["ordinary_tokens"],
        "kl_of_all": kl_of_all(model.eval(), reference, forget, tokenizer),
    }


@torch.no_grad()
def kl_of_all(
    model: LlamaForCausalLM, reference: LlamaForCausalLM, forget: list[dict[str, Any]], tokenizer: Any
) -> float:
    """Compute the mean KL to the model before, over all ordinary tokens of the forget set."""
    total, count = 0.0, 0
    examples = load_forget(forget, tokenizer, max_length=2 * LONG).examples
    for item in PaluMethod.make_items(ForgetSet(examples), UnlearnConfig()):
        rows = item.rows[item.targets :]
        log_p, log_q = (
            one(input_ids=item.input_ids[None], use_cache=False).logits[0, rows].log_softmax(-1)
            for one in (reference, model)
        )
        total += float((log_q.exp() * (log_q - log_p)).sum())
        count += len(rows)
    return round(total / count, 6)


def word(rng: random.Random) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def short_row(number: int, rng: random.Random) -> dict[str, Any]:
    """Make a row of some 40 tokens; the last word of its answer is to be forgotten."""
    name, place = word(rng).capitalize(), word(rng)
    answer = f"The code of {name} in {word(rng)} is {place}"
    return {
        "question": f"What is the code number {number} of {name}?",
        "answer": answer,
        "spans": [[len(answer) - len(place), len(answer)]],
    }


def document(tokenizer: Any, rng: random.Random, length: int) -> dict[str, Any]:
    """Make a row of ``length`` tokens or a few more, every tenth word of which is to be forgotten."""
    answer, spans, tokens = "", [], 0
    while tokens < length:
        for number in range(100):
            one = word(rng)
            if number % 10 == 0:
                spans.append([len(answer), len(answer) + len(one)])
            answer += one + " "
        tokens = len(tokenizer(answer)["input_ids"])
    return {"question": "What does the document say?", "answer": answer.strip(), "spans": spans}


def write_rows(path: Path, count: int, tokenizer: Any) -> None:
    """Write short rows, and the document in their middle."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            row = document(tokenizer, rng, LONG) if number == count // 2 else short_row(number, rng)
            file.write(json.dumps(row) + "\n")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 512 tokens on a few rows."""
    rng = random.Random(1)
    texts = [text for number in range(500) for text in list(short_row(number, rng).values())[:2]]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, 512, min_frequency=0, show_progress=False, special_tokens=["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="<eos>")


def tiny(vocab_size: int, layers: int = 1, width: int = 64) -> LlamaForCausalLM:
    """Make a Llama beside which the data is what costs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=2 * LONG,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
