"""``python tests/stress/torture.py``: SIGKILL a run at random moments and resume it, until it ends.

Every run that ends is compared, bit by bit, with one that was left alone; then the next begins, until all kills are
spent. A kill may come anywhere in ``palu.unlearn``: before the first step, in the middle of one, in the middle of a
write. The model is loaded once, by a parent that never computes; each attempt is a fork of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

import palu.training.loop  # here, so that no fork spends its time on imports
from palu.ref_model.fingerprint import fingerprint_model
from palu.testbed.facts import UNLEARN, read_questions
from palu.testbed.real_models import load_packaged

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.tiny import forget_rows, retain_rows, tiny_llama

THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Run:
    """A call of ``palu.unlearn`` that takes its checkpoints from, and leaves its outcome in, a folder."""

    model: LlamaForCausalLM
    arguments: dict[str, Any]
    folder: Path

    def attempt(self, limit: float) -> dict[str, Any] | None:
        """Resume in a process of its own; returns the outcome, or None if it did not end in ``limit`` seconds."""
        process = multiprocessing.get_context("fork").Process(target=self.resume)
        process.start()
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                return None
        if process.exitcode != 0:
            sys.exit(f"a run failed, see above (status {process.exitcode}); its folder is {self.folder}")
        return json.loads((self.folder / "outcome.json").read_text())

    def resume(self) -> None:
        """Resume in this process, and write the outcome."""
        torch.set_num_threads(THREADS)
        checkpoints = {"checkpoint_dir": str(self.folder), "checkpoint_steps": 1, "resume": True}
        result = palu.unlearn(self.model, None, **self.arguments, **checkpoints)
        history = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in result.history]
        outcome = {"weights": fingerprint_model(result.model), "history": history}
        (self.folder / "outcome.json").write_text(json.dumps(outcome))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", choices=["demo", "tiny"], default="demo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/torture"), help="for checkpoints; removed at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    palu.prefix_mask(torch.tensor([[-100]]), 1)  # loads the native ops, once for all forks

    run = Run(*(demo() if args.model == "demo" else tiny()), args.folder)
    shutil.rmtree(run.folder, ignore_errors=True)
    clock = time.perf_counter()
    expected = run.attempt(limit=3600)
    if expected is None:
        sys.exit("the run that is left alone took more than an hour")
    seconds = time.perf_counter() - clock
    shutil.rmtree(run.folder, ignore_errors=True)
    steps = len(expected["history"])
    print(f"{steps} steps, left alone: {seconds:.1f} s", flush=True)

    rng = random.Random(args.seed)
    kills = writing = ends = 0
    while True:
        # Some attempts must get beyond a step. The kills spent, the last one may end; a hundred times as long as it
        # should take is never.
        limit = rng.uniform(0, seconds * max(0.25, 3 / steps)) if kills < args.kills else 100 * seconds
        outcome = run.attempt(limit)
        if outcome is not None:
            ends += 1
            if outcome != expected:
                sys.exit(f"after {kills} kills: the run ended otherwise than the one left alone; see {args.folder}")
            shutil.rmtree(run.folder, ignore_errors=True)
            if kills == args.kills:
                break
        elif kills == args.kills:
            sys.exit(f"after {kills} kills: a resumed run does not end")
        else:
            kills += 1
            writing += (args.folder / "unfinished").exists()
            last = max((path.name for path in args.folder.glob("step-*")), default="no checkpoint")
            print(f"kill {kills} after {limit:.2f} s: {last}", flush=True)
    print(
        f"{kills} kills, {writing} of them while a file was written; {ends} runs ended, each bit-identical to the one "
        f"left alone; {time.perf_counter() - clock:.0f} s"
    )


def tiny() -> tuple[LlamaForCausalLM, dict[str, Any]]:
    config = palu.UnlearnConfig(learning_rate=1e-3, epochs=20, batch_size=3, progress=False)
    model = tiny_llama(attention_dropout=0.1)
    return model, {"forget": forget_rows(), "retain": retain_rows(), "config": config}


def demo() -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """The demo's model and facts: checkpoints of the demo's size, and small steps, to be killed often."""
    model, tokenizer = load_packaged("smollm2")
    secrets, kept, _ = read_questions()
    small = {"epochs": 2, "batch_size": 2, "retain_batch_size": 1, "gradient_accumulation_steps": 1}
    config = UNLEARN.replace(**small, anchors=0, neighbours=0, variants=0, progress=False)
    return model, {"forget": secrets, "retain": kept, "tokenizer": tokenizer, "config": config}


if __name__ == "__main__":
    main()
