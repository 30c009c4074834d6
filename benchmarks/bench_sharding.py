"""Peak memory of each process under FSDP2: while a model is loaded, the reference runs, and the model is trained.

Two CPU processes (accelerate offers FSDP2 to GPUs only, so its state is told otherwise; all that follows is real)
unlearn with a Llama of random weights, whose layers are nearly all of it. The memory is anonymous memory above that of
the process before the model was loaded, sampled a thousand times a second. Beside it stands what the stage must hold:
a process's share of the weights (while the reference runs), or of weights, gradients and AdamW's moments (in training).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import Any

import torch
from _memory import status
from _timing import report
from accelerate import PartialState, init_empty_weights
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM

import palu
from palu.training import loop, step

STAGES = ("load", "reference", "train")
BYTES = {"load": 4, "reference": 4, "train": 16}  # for each weight: itself; with its gradient and AdamW's moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(measure(args.rank, args.layers, args.hidden, args.processes)), flush=True)
        os._exit(0)  # Gloo's threads may outlive the interpreter, and abort it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(args.processes):
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(args.processes),
            "LOCAL_WORLD_SIZE": str(args.processes),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            # Freed tensors go back to the system at once, so that what is measured is what is held.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank)]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode or not output:
            raise SystemExit(f"a process ended with {process.returncode}")
    rows = [json.loads(output.splitlines()[-1]) for output in outputs]
    with init_empty_weights():
        model = make_model(args.layers, args.hidden)
    weights = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    share: dict[str, Any] = {"process": "its share"}
    bound: dict[str, Any] = {"process": "1.5 shares and a layer"}
    for stage in STAGES:
        of_stage = BYTES[stage] * weights / args.processes / 2**20
        share[f"{stage}_mib"] = round(of_stage, 1)
        bound[f"{stage}_mib"] = round(1.5 * of_stage + 4 * layer / 2**20, 1)
    report("sharding", [*rows, share, bound], torch.device("cpu"), {"weights": weights, **vars(args)})


def make_model(layers: int, hidden: int) -> LlamaForCausalLM:
    """Build a Llama, nearly all of which are its layers."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def measure(rank: int, layers: int, hidden: int, processes: int) -> dict[str, Any]:
    """Unlearn for a few steps in this process; returns its row of the table."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 999, (64,), generator=generator).tolist() for _ in range(16)]
    forget = [{"input_ids": ids, "labels": [-100] * 8 + [-200] * 40 + ids[48:]} for ids in rows[:8]]
    retain = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:]} for ids in rows[8:]]
    with Stages() as stages:
        with nullcontext() if rank == 0 else init_empty_weights():
            model = make_model(layers, hidden)
        palu.unlearn(model, None, forget, retain, epochs=1, batch_size=2, progress=False)
    return {"process": rank} | {f"{stage}_mib": round(stages.highest[stage] / 2**20, 1) for stage in STAGES}


class Stages:
    """The highest anonymous memory of this process in each stage of a run, in bytes above that at the beginning."""

    def __enter__(self) -> Stages:
        self.before, self.stage, self.highest = status("RssAnon"), "load", dict.fromkeys((*STAGES, "back"), 0)
        begins: list[tuple[Any, str, str]] = [
            (loop, "check_forward_passes", "reference"),  # the first pass of a sharded model
            (loop, "training_mode", "train"),
            (step, "copy_weights_back", "back"),
        ]
        for module, name, stage in begins:
            setattr(module, name, self.entering(stage, getattr(module, name)))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def entering(self, stage: str, function: Any) -> Any:
        """Wrap the function that a stage begins with."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.stage = stage
            return function(*args, **kwargs)

        return wrapped

    def watch(self) -> None:
        """Look at the memory again and again."""
        while not self.ended.wait(0.001):
            stage, now = self.stage, status("RssAnon") - self.before
            self.highest[stage] = max(self.highest[stage], now)


if __name__ == "__main__":
    main()
