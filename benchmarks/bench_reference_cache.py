"""Size of the reference cache per token, and the time and memory it takes to build and to read, in memory and on disk.

Each row is a process of its own: `memory` runs the reference and keeps its outputs, `disk` writes them to a file, and
`again` is a second run, which finds that file. Memory is anonymous memory (RssAnon), of which pages of a mapped file,
which the kernel drops when it needs room, are no part; what it was before the cache is taken off.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from _timing import report
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from palu.config import UnlearnConfig
from palu.data.packing import Items, forget_items
from palu.data.tokenize import IGNORE, ORDINARY, Example
from palu.methods.palu import RECIPES
from palu.models.root import ModelRoot
from palu.ref_model.anchors import AnchorPrompts
from palu.ref_model.cache import ReferenceOutputs
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.precompute import precompute_reference
from palu.ref_model.storage import open_cache_file, reference_key
from palu.testbed.smollm2 import load_smollm2

MODES = ("memory", "disk", "again")
SIZES = {"tiny": 100_000, "smollm2": 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--examples", type=int, help="forget examples; by default 100,000 for tiny, 100 for smollm2")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    examples = args.examples or SIZES[args.model]
    if args.mode:
        print(json.dumps(measure(args.mode, args.model, examples, args.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
    details = rows[1].pop("details")
    report("reference_cache", rows, torch.device("cpu"), {"model": args.model, "examples": examples, **details})


def measure(mode: str, name: str, examples: int, folder: str) -> dict[str, Any]:
    """Build the cache and read all of it, in this process; returns its row of the table."""
    model = load_smollm2()[0] if name == "smollm2" else tiny()
    items = forget_set(examples, model.config.vocab_size)
    config = UnlearnConfig(**RECIPES["onset"], cache_dir=None if mode == "memory" else folder)
    accelerator = Accelerator(cpu=True)
    row: dict[str, Any] = {"mode": mode}
    with PeakMemory() as memory:
        clock = time.perf_counter()
        fingerprints = Fingerprints(model, None, items, [])
        if mode != "memory":
            _ = fingerprints.reference
            row["hash_model_s"] = round(time.perf_counter() - clock, 2)
            clock = time.perf_counter()
            _ = fingerprints.forget
            row["hash_data_s"] = round(time.perf_counter() - clock, 2)
        clock = time.perf_counter()
        file = None
        if mode != "memory":
            file = open_cache_file(config, reference_key(config, accelerator, fingerprints))
        root, no_anchors = ModelRoot(model), AnchorPrompts([], set(), 0)
        cache, _ = precompute_reference(root, items, no_anchors, config, accelerator, own=True, file=file)
        row["precompute_s"] = round(time.perf_counter() - clock, 2)
    row["precompute_peak_mib"] = memory.peak_mib
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    with PeakMemory() as memory:
        clock = time.perf_counter()
        for at in range(0, len(order), 8):  # what the data loader does for a micro-batch
            outputs = [cache.outputs[i] for i in order[at : at + 8]]
            _ = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        row["read_s"] = round(time.perf_counter() - clock, 2)
    row["read_peak_mib"] = memory.peak_mib
    if mode == "disk" and file is not None and isinstance(cache.outputs, ReferenceOutputs):
        onset = sum(item.targets for item in items)
        ordinary = sum(len(item.rows) for item in items) - onset
        sizes = {name: tensor.nbytes for name, tensor, _ in cache.outputs.fields}
        row["details"] = {
            "tokens": sum(len(item.input_ids) for item in items),
            "onset_tokens": onset,
            "ordinary_tokens": ordinary,
            "file_bytes": file.path.stat().st_size,
            "header_bytes": file.path.stat().st_size - sum(sizes.values()),
            "bytes_per_onset_token": (sizes["index"] + sizes["scale"]) / onset,
            "bytes_per_ordinary_token": sizes["hidden"] / ordinary,
            "model_bytes": sum(p.nbytes for p in model.parameters()),
        }
    return row


def tiny() -> LlamaForCausalLM:
    """Make a Llama of one layer, 64 wide, beside which the cache is what costs. It is the same in each process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def forget_set(count: int, vocab_size: int) -> Items:
    """Draw a forget set of random tokens: prompts of 8 to 16, answers of 12 to 36 with a span of 2 to 6."""
    rng = random.Random(0)
    examples = []
    for number in range(count):
        prompt, answer, span = rng.randint(8, 16), rng.randint(12, 36), rng.randint(2, 6)
        ids = torch.randint(vocab_size, (prompt + answer,), generator=torch.Generator().manual_seed(number))
        labels = torch.full_like(ids, ORDINARY)
        labels[:prompt] = IGNORE
        start = prompt + rng.randint(0, answer - span)
        labels[start : start + span] = ids[start : start + span]
        examples.append(Example(number, ids, labels))
    return forget_items(examples, 3, None)


class PeakMemory:
    """The highest anonymous memory of this process within the block, in MiB above that at its beginning."""

    def __enter__(self) -> PeakMemory:
        self.before = self.highest = anonymous()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.highest = max(self.highest, anonymous())

    def watch(self) -> None:
        """Look at the memory a hundred times a second."""
        while not self.ended.wait(0.01):
            self.highest = max(self.highest, anonymous())

    @property
    def peak_mib(self) -> float:
        """The highest memory above that at the beginning."""
        return round((self.highest - self.before) / 2**20, 1)


def anonymous() -> int:
    """Read how many bytes of this process's memory no file stands behind."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
