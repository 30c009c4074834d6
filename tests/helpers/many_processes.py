"""What each of the processes that test_engine.py starts does: every engine's runs, one after the other.

accelerate offers FSDP2 and DeepSpeed to GPUs only. On a CPU its state is told otherwise; all that follows is real.
"""

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, PartialState, init_empty_weights
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers import runs
from helpers.command import palu_command, write_input
from helpers.runs import TEXT_FORGET, TEXT_RETAIN
from helpers.scenarios import Scenario, with_lora
from helpers.small_tokenizers import LLAMA3, byte_level
from helpers.tiny import forget_rows, same_weights, tiny_llama, weights
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback

import palu
from palu.data.packing import Item
from palu.ref_model.fingerprint import fingerprint_model
from palu.training import asking, checkpoint, step
from palu.training.checkpoint import Checkpoints
from palu.training.requests import lines_digest, row_lines

PROCESSES = 2
TOKENIZER = byte_level(LLAMA3)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    # As accelerate's fsdp_cpu_ram_efficient_loading: the first process loads the weights, and the others none.
    "fsdp2_main": FSDP2 | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def make_llama(**config: Any) -> LlamaForCausalLM:
    """A tiny Llama; where accelerate takes the weights from the first process, without weights on the others."""
    broadcast = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true"
    with nullcontext() if PartialState().is_main_process or not broadcast else init_empty_weights():
        return tiny_llama(**config)


def quantised() -> Any:
    """An adapter on a Llama in 4 bits."""
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    given = {"config": model.config, "state_dict": model.state_dict(), "dtype": torch.float32}
    return with_lora(LlamaForCausalLM.from_pretrained(None, quantization_config=config, **given))


untied = functools.partial(make_llama, tie_word_embeddings=False)
CASES = {
    "untied": Scenario(untied),
    "tied": Scenario(make_llama, {"gradient_checkpointing": True}, lambda: make_llama(seed=3)),
    "lora": Scenario(lambda: with_lora(make_llama())),
    "added adapter": Scenario(untied, {"lora_rank": 4}),  # merged at the end, as by default
    "quantised": Scenario(quantised),
    "npo": Scenario(make_llama, {"objective": "npo", "learning_rate": 3e-4}),
    "undial": Scenario(make_llama, {"objective": "undial"}),
    # In float64, where nothing but an unequal weight of unequal shares can make a difference.
    "anchors": Scenario(
        lambda: make_llama(vocab_size=len(TOKENIZER), max_position_embeddings=256, dtype=torch.float64),
        {
            "forget": TEXT_FORGET * 3,
            "retain": TEXT_RETAIN,
            "tokenizer": TOKENIZER,
            "anchors": 5,
            "neighbours": 0,  # each process draws its own
            "variants": 0,
            "max_length": 200,
            "learning_rate": None,
        },
    ),
    # A KL near 0 is rounding here, which the default's weight would show in the gradient's norm.
    "bfloat16": Scenario(lambda: untied(dtype=torch.bfloat16), {"lambda_kl": 4.0}),
    "mixed": Scenario(lambda: untied(dtype=torch.bfloat16), {"lambda_kl": 4.0}),  # in mixed precision (PRECISION)
    "max_tokens": Scenario(untied, {"max_tokens": 30}),
    # After a run that has left rows, of which some take part from the first epoch on.
    "after": Scenario(untied, {"local_loss": "unlikelihood", "top_k": 20, "max_tokens": 60}),
    # It tells something when it is asked after the second epoch, and after each one from then on.
    "asked": Scenario(untied, {"local_loss": "unlikelihood", "top_k": 20, "lora_rank": 4}),
}
PRECISION = {"mixed": "bf16"}
RUNS = {
    "ddp": (
        "untied",
        "tied",
        "lora",
        "added adapter",
        "quantised",
        "anchors",
        "npo",
        "bfloat16",
        "max_tokens",
        "after",
        "asked",
    ),
    "fsdp2": (
        "untied",
        "tied",
        "lora",
        "added adapter",
        "anchors",
        "undial",
        "bfloat16",
        "mixed",
        "max_tokens",
        "after",
        "asked",
    ),
    "fsdp2_main": ("untied", "tied", "lora", "added adapter", "after"),
    "zero2": ("untied", "tied", "max_tokens"),
    "zero3": ("untied", "tied", "lora", "added adapter", "after", "asked"),
}


def unlearn(model: Any, ref_model: Any = None, forget: Any = None, **settings: Any) -> palu.UnlearnResult:
    """10 steps in 5 epochs of 9 forget examples: the second step of an epoch has one, so one process has none."""
    defaults = {"epochs": 5, "batch_size": 4 // PartialState().num_processes, "gradient_accumulation_steps": 2}
    return runs.unlearn(model, ref_model, forget_rows(9) if forget is None else forget, **defaults | settings)


def run(case: str) -> palu.UnlearnResult:
    """A case's run on one process, or on this one of many."""
    build, settings, reference, _ = CASES[case]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        if case == "after":
            settings = settings | {"after": finished_run(Path(folder))}
        if case == "asked":
            told = [[Item(torch.arange(i, i + 9), torch.tensor([6, 7]), 2)] for i in (20, 40, 60)]
            stack.enter_context(mock.patch.object(asking, "generate_answers_that_tell", side_effect=told))
            stack.enter_context(mock.patch.object(step, "FEWEST_STEPS", 2))
        return unlearn(build(), reference() if reference else None, **settings)


def finished_run(folder: Path) -> Path:
    """What of a run's folder the next one reads, as if it had left the model that ``untied`` makes."""
    lines = row_lines(forget_rows(5, seed=7))
    left = fingerprint_model(tiny_llama(tie_word_embeddings=False))
    request = {"number": 1, "rows": len(lines), "rows_sha256": lines_digest(lines), "weights_after": left}
    texts = {"run.json": '{"palu": ""}', "summary.json": "", "forget.jsonl": "".join(f"{line}\n" for line in lines)}
    (folder / "private").mkdir()
    for name, text in (texts | {"ledger.json": json.dumps({"requests": [request]})}).items():
        (folder / "private" / name).write_text(text)
    return folder


def start(engine: str, precision: str = "no") -> None:
    """Leave accelerate as its launcher does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    os.environ.update(ENGINES[engine], ACCELERATE_MIXED_PRECISION=precision)
    PartialState(cpu=True)
    if engine.startswith("fsdp2"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def resumed(model: Callable[[], Any], folder: Path) -> bool:
    """Whether a run that goes on from its fifth step ends with the bits of one that was left alone."""
    settings = {"checkpoint_dir": str(folder), "checkpoint_steps": 5}
    whole = unlearn(model(), **settings)
    torch.distributed.barrier()
    if PartialState().is_main_process:
        (folder / "step-00000010.safetensors").unlink()
    torch.distributed.barrier()
    again = unlearn(model(), **settings, resume=True)
    return same_weights(again.model, weights(whole.model)) and len(again.history) == 10


def by_the_clock(rank: int, folder: Path) -> list[str]:
    """The checkpoints of a run in which each step takes the main process 4 minutes and the other one none."""
    now, after_step = 0.0, Checkpoints.after_step

    def tick(self: Checkpoints, history: Any) -> None:
        nonlocal now
        now += 240.0 if rank == 0 else 0.0
        after_step(self, history)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "after_step", tick)
        patch.setattr(checkpoint, "KEPT", 10)
        patch.setattr(checkpoint.time, "monotonic", lambda: now)
        unlearn(tiny_llama(), checkpoint_dir=str(folder))
    return sorted(path.stem for path in folder.glob("step-*"))


def complaint(function: Callable[[], Any]) -> str:
    """What a run that must fail says."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class StopAt(TrainerCallback):
    """Ends the run by an evaluation of step 4; or fails after that step."""

    def __init__(self, fails: bool):
        self.fails = fails

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.fails and state.global_step == 4:
            raise KeyError("mine")


def with_callbacks(rank: int) -> dict[str, Any]:
    """What a callback of the second process alone does to both."""

    def evaluate(model: Any) -> dict[str, float]:
        ids = torch.tensor([[1, 2, 3]])
        ids = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, synced_gpus=False)
        return {"logit": model(ids).logits.float().mean(), "rank": rank}

    def stopping(model: Any, fails: bool) -> palu.UnlearnResult:
        callbacks = [StopAt(fails)] if rank == 1 else []
        return unlearn(model, evaluate=evaluate, eval_steps=2, callbacks=callbacks)

    result, failed = stopping(tiny_llama(), False), tiny_llama()
    said = complaint(lambda: stopping(failed, True))
    expected = weights(unlearn(tiny_llama(), max_steps=4).model)
    return {
        "evaluations": [[r["step"], r["eval_rank"], r["eval_logit"]] for r in result.history if "eval_rank" in r],
        "stopped": [len(result.history), result.summary["ended_by"]],
        "same weights": same_weights(result.model, expected),
        "said": said,
        "weights kept": same_weights(failed, expected),
    }


def run_command(folder: Path) -> list[Any]:
    """The exit code of `palu unlearn` and what it says; the first process writes the input, too."""
    processes = PartialState().num_processes
    out = folder / f"command of {processes}"
    if PartialState().is_main_process:
        model = tiny_llama(vocab_size=len(TOKENIZER), max_position_embeddings=256)
        write_input(folder, model, tokens=TOKENIZER, forget=TEXT_FORGET, retain=TEXT_RETAIN)
    PartialState().wait_for_everyone()
    options = {"--model": folder / "model", "--forget": folder / "forget.jsonl", "--retain": folder / "retain.jsonl"}
    options |= {"--output": out, "--epochs": 3, "--learning-rate": 1e-3, "--batch-size": 4 // processes}
    options |= {"--neighbours": 0, "--variants": 0}  # each process draws its own
    given = [str(part) for option in options.items() for part in option]
    result = palu_command("unlearn", *given, "--no-progress")
    return [result.exit_code, result.output]


def diverging() -> dict[str, Any]:
    """A run whose second step has a loss that is not finite."""
    model = tiny_llama(tie_word_embeddings=False)
    said = complaint(lambda: unlearn(model, learning_rate=1e30, max_grad_norm=1e9))
    return {"said": said, "finite": all(weight.isfinite().all().item() for weight in weights(model).values())}


def main(folder: Path) -> None:
    """Run everything; the outcome of this process goes to the folder."""
    rank = int(os.environ["RANK"])
    outcome: dict[str, Any] = {}
    prepared: list[Any] = []
    prepare = Accelerator.prepare

    def remembering(self: Accelerator, *parts: Any) -> Any:
        prepared[:] = prepare(self, *parts)
        return prepared

    Accelerator.prepare = remembering  # type: ignore[method-assign]
    for engine, cases in RUNS.items():
        if engine.startswith("zero"):
            if importlib.util.find_spec("deepspeed") is None:
                continue
            import deepspeed  # noqa: F401

            # A shared-memory collective for CPUs, which would be compiled first.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        for case in cases:
            start(engine, PRECISION.get(case, "no"))
            result = run(case)
            missing = all(parameter.is_meta for parameter in result.model.parameters())
            if not missing:
                save_file(weights(result.model), folder / f"{engine}.{case}.{rank}.safetensors")
            outcome[f"{engine}.{case}"] = {
                "history": result.history,
                "engine": type(prepared[0]).__name__,
                "dtypes": sorted({str(p.dtype) for p in prepared[0].parameters() if p.requires_grad}),
                "sharded units": sum(isinstance(module, FSDPModule) for module in prepared[0].modules()),
                "missing": missing,
                "returned": type(result.model).__name__,
                "parameters": sorted({type(parameter).__name__ for parameter in result.model.parameters()}),
            }
            print(engine, case, "done", flush=True)
        start(engine)
        if engine == "fsdp2_main":
            continue
        outcome[f"{engine}.divergence"] = diverging()
        if engine in ("ddp", "fsdp2"):
            model = (lambda: with_lora(dropout=0.2)) if engine == "ddp" else (lambda: tiny_llama(dtype=torch.bfloat16))
            outcome[f"{engine}.checkpoints by time"] = by_the_clock(rank, folder / f"clock_{engine}")
            outcome[f"{engine}.callbacks"] = with_callbacks(rank)
            outcome[f"{engine}.resumed"] = resumed(model, folder / f"checkpoints_{engine}")
        else:
            outcome[f"{engine}.checkpoints"] = complaint(
                lambda: unlearn(tiny_llama(), checkpoint_dir=str(folder / "none"))
            )
        print(engine, "done", flush=True)
    start("ddp")
    forget = forget_rows(9, vocab=97 if rank == 0 else 3000)
    outcome["bad data"] = complaint(lambda: unlearn(tiny_llama(), forget=forget))
    start("fsdp2_main")
    outcome["command"] = run_command(folder)  # the last: it ends what the processes have in common
    (folder / f"outcome.{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as the command does, and for its reason
