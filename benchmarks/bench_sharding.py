"""Peak memory of each process under FSDP2: while a model is loaded, the reference runs, and the model is trained.

Two CPU processes (accelerate offers FSDP2 to GPUs only, so its state is told otherwise; all that follows is real)
unlearn with a Llama of random weights, whose layers are nearly all of it. The memory is anonymous memory above that of
the process before the model was loaded, sampled a thousand times a second. Beside it stands what the stage must hold:
a process's share of the weights (while the reference runs), or of weights, gradients and AdamW's moments (in training).
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
from _memory import PeakMemory
from _timing import report
from accelerate import PartialState, init_empty_weights
from accelerate.utils import DistributedType, gather_object
from torch.distributed import run
from transformers import LlamaConfig, LlamaForCausalLM

import palu
from palu.training import loop, step

PROCESSES, LAYERS, HIDDEN = 2, 24, 512
# Of each stage, for each weight: itself; with its gradient and AdamW's moments.
BYTES = {"load": 4, "reference": 4, "train": 16}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Freed tensors go back to the system at once, so that what is measured is what is held.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def main() -> None:
    if "RANK" not in os.environ:
        os.environ.update(ENVIRONMENT)
        run.main(["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={PROCESSES}", *sys.argv])
        return
    rank = int(os.environ["RANK"])
    rows = gather_object([measure(rank)])
    if rank == 0:
        with init_empty_weights():
            model = make_model()
        weights = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        shares = {name: of_weight * weights / PROCESSES / 2**20 for name, of_weight in BYTES.items()}
        rows += [
            {"process": "its share"} | {f"{name}_mib": round(mib, 1) for name, mib in shares.items()},
            {"process": "1.5 shares and a layer"}
            | {f"{name}_mib": round(1.5 * mib + 4 * layer / 2**20, 1) for name, mib in shares.items()},
        ]
        sizes = {"weights": weights, "layers": LAYERS, "hidden": HIDDEN, "processes": PROCESSES}
        report("sharding", rows, torch.device("cpu"), sizes)
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads may outlive the interpreter, and abort it


def make_model() -> LlamaForCausalLM:
    """Build a Llama, nearly all of which are its layers."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def measure(rank: int) -> dict[str, Any]:
    """Unlearn for a few steps in this process; returns its row of the table."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 999, (64,), generator=generator).tolist() for _ in range(16)]
    forget = [{"input_ids": ids, "labels": [-100] * 8 + [-200] * 40 + ids[48:]} for ids in rows[:8]]
    retain = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:]} for ids in rows[8:]]
    with PeakMemory("load") as memory:
        entering(loop, "check_forward_passes", memory, "reference")  # the first pass of a sharded model
        entering(loop, "training_mode", memory, "train")
        entering(step, "copy_weights_back", memory, "back")
        with nullcontext() if rank == 0 else init_empty_weights():
            model = make_model()
        palu.unlearn(model, None, forget, retain, epochs=1, batch_size=2, progress=False)
    return {"process": rank, **memory.row(*BYTES)}


def entering(module: Any, name: str, memory: PeakMemory, stage: str) -> None:
    """Begin a stage wherever this function of the module is called."""
    function = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        memory.begin(stage)
        return function(*args, **kwargs)

    setattr(module, name, wrapped)


if __name__ == "__main__":
    main()
