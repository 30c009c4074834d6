"""Two processes: every engine gives the weights of one process, and an error on one process stops all."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from helpers.many_processes import PRECISION, PROCESSES, RUNS, run, run_command
from helpers.tiny import weights
from safetensors.torch import load_file

import palu
from palu.config import UnlearnConfig
from palu.training import engine as engine_module

ROOT = Path(__file__).parents[2]


Outcomes = tuple[Path, list[dict[str, Any]]]


def launch(*command: str) -> str:
    """Run a command of Python in processes that find each other on this machine; return what they print."""
    roots = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(roots)}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What many_processes.py left behind, and what each process says of it: one start for all tests."""
    folder = tmp_path_factory.mktemp("processes")
    launch("-m", "helpers.many_processes", str(folder))
    return folder, [json.loads((folder / f"outcome.{rank}.json").read_text()) for rank in range(PROCESSES)]


@cache
def one_process(case: str) -> palu.UnlearnResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", PRECISION.get(case, "no"))
        AcceleratorState._reset_state()
        result = run(case)
    AcceleratorState._reset_state()
    return result


def needs(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


WRAPPERS = {"ddp": ("DistributedDataParallel", 0), "zero2": ("DeepSpeedEngine", 0), "zero3": ("DeepSpeedEngine", 0)}
SHARDED = ("FSDPPaluMethod", 3)  # two decoder layers, and the rest
# Of weights, of figures, and what is noise. Two processes add their gradients in another order.
TOLERANCES = {
    "bfloat16": (2e-2, 0.1, 2e-2),  # a rounding of a weight is 4e-3 of it
    "mixed": (2e-2, 0.1, 2e-2),
    "anchors": (1e-9, 1e-6, 1e-9),
    "quantised": (1e-4, 1e-4, 1e-6),  # wider layers than the others': more sums
    "undial": (1e-4, 1e-3, 1e-6),  # its loss falls to 0.006, near which a rounding of the weights is more of it
}


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine, cases in RUNS.items() for case in cases])
def test_weights_of_one_process(engine: str, case: str, outcomes: Outcomes) -> None:
    """10 steps with accumulation, one process without a forget example in every other step."""
    needs(engine)
    folder, results = outcomes
    one = one_process(case)
    expected = weights(one.model)
    of_weights, rel, of_noise = TOLERANCES.get(case, (1e-5, 1e-4, 1e-6))
    for rank in range(PROCESSES):
        outcome = results[rank][f"{engine}.{case}"]
        # The engine trained it, and nothing of it is left in the model.
        if rank == 0 and case in ("untied", "tied", "lora"):
            assert (outcome["engine"], outcome["sharded units"]) == WRAPPERS.get(engine, SHARDED)
            assert (outcome["returned"], outcome["parameters"]) == (type(one.model).__name__, ["Parameter"])
        # Also in mixed precision, in which accelerate alone would have FSDP2 train float32 weights.
        assert outcome["dtypes"] == sorted({str(p.dtype) for p in one.model.parameters() if p.requires_grad})
        missing = outcome["missing"]
        assert missing == (engine == "fsdp2_main" and rank > 0), "weights come back to where they were"
        trained = load_file(folder / f"{engine}.{case}.{0 if missing else rank}.safetensors")
        assert trained.keys() == expected.keys()
        for name, weight in expected.items():
            assert (trained[name] - weight).abs().max() <= of_weights * weight.abs().max(), name
        history = outcome["history"]
        assert len(history) == len(one.history) == 10
        for many, single in zip(history, one.history, strict=True):
            assert many.keys() == single.keys()
            for name in single.keys() - {"tokens", "tokens_per_second"}:
                assert many[name] == pytest.approx(single[name], rel=rel, abs=of_noise), (name, many, single)
            if case not in ("max_tokens", "after"):  # which cut the parts of two processes otherwise
                # A process without an example or an anchor runs a token.
                idle = 0 if many["step"] % 2 or case == "anchors" else 1
                assert many["tokens"] == single["tokens"] + idle


@pytest.mark.parametrize("engine", [engine for engine in RUNS if engine != "fsdp2_main"])
def test_divergence_stops_all(engine: str, outcomes: Outcomes) -> None:
    """All say the same, and the model has the weights of the last good step."""
    needs(engine)
    first, *others = (result[f"{engine}.divergence"] for result in outcomes[1])
    assert re.match(r"DivergenceError: step 2: .* the model keeps the weights of step 1", first["said"]), first
    assert first["finite"]
    assert all(other == first for other in others)


NO_CHECKPOINTS = (
    "CheckpointError: DeepSpeed keeps its optimizer's state to itself, so no checkpoint can be written; "
    "use FSDP2, DDP or one process, or leave checkpoint_dir out"
)


@pytest.mark.parametrize(
    ("engine", "what", "expected"),
    [
        # The same bits: with dropout, for which every process goes on with its own random numbers, and in bfloat16,
        # beside which the optimizer keeps states of two dtypes, all of them sharded.
        ("ddp", "resumed", True),
        ("fsdp2", "resumed", True),
        # The main process's clock decides.
        ("ddp", "checkpoints by time", [f"step-{step:08}" for step in (3, 6, 9, 10)]),
        ("fsdp2", "checkpoints by time", [f"step-{step:08}" for step in (3, 6, 9, 10)]),
        ("zero2", "checkpoints", NO_CHECKPOINTS),
        ("zero3", "checkpoints", NO_CHECKPOINTS),
    ],
)
def test_checkpoints(engine: str, what: str, expected: Any, outcomes: Outcomes) -> None:
    needs(engine)
    assert [result[f"{engine}.{what}"] for result in outcomes[1]] == [expected] * PROCESSES


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_callback_of_one_process_ends_the_run_of_all(engine: str, outcomes: Outcomes) -> None:
    """By an evaluation that generates on the sharded model, whose figures are the main process's; or by its error."""
    first, second = (result[f"{engine}.callbacks"] for result in outcomes[1])
    assert first["evaluations"] == second["evaluations"]
    assert [(step, rank) for step, rank, _ in first["evaluations"]] == [(2, 0), (4, 0)]
    assert first["said"] == "ProcessError: process 1 has stopped: KeyError: 'mine'"
    assert second["said"] == "KeyError: 'mine'"
    for own in (first, second):
        assert own["stopped"] == [4, "callback"]
        assert own["same weights"] and own["weights kept"]


def test_the_command_loads_a_model_once(outcomes: Outcomes, tmp_path: Path) -> None:
    """The second process has no weights; the first one's record and model are those of a run on one process."""
    folder, (first, second) = outcomes
    assert first["command"][0] == 0, first["command"][1]
    assert second["command"] == [0, ""]
    code, said = run_command(tmp_path)
    assert code == 0, said
    ours, whole = folder / f"command of {PROCESSES}", tmp_path / "command of 1"
    trained, expected = (load_file(path / "model" / "model.safetensors") for path in (ours, whole))
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        assert (trained[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name
    many, one = (json.loads((path / "private" / "record.json").read_text()) for path in (ours, whole))
    assert many["hashes"]["weights_before"] == one["hashes"]["weights_before"]
    assert many["data"] == one["data"]


PATIENCE = """
import os, time
from datetime import timedelta
from accelerate import Accelerator, InitProcessGroupKwargs
from palu.distributed import compute_on_main

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=10))])
print(compute_on_main(lambda: time.sleep(12) or "annotated", accelerator), flush=True)
try:
    if accelerator.is_main_process:
        time.sleep(12)
    accelerator.wait_for_everyone()
except Exception as error:
    print("a collective gave up on process", accelerator.process_index, flush=True)
os._exit(0)
"""


def test_long_work_of_one_process_is_waited_for(tmp_path: Path) -> None:
    """Longer than a collective would wait: the control shows that it would not."""
    (tmp_path / "patience.py").write_text(PATIENCE)
    said = launch(str(tmp_path / "patience.py"))  # two processes may write into one line
    assert said.count("annotated") == PROCESSES
    assert "a collective gave up on process 1" in said


def test_an_error_on_one_process_stops_all(outcomes: Outcomes) -> None:
    other, own = (result["bad data"] for result in outcomes[1])
    assert re.fullmatch(
        r"DataError: forget row \d+: token id \d+ is outside the model's vocabulary of 97; "
        "use the tokenizer that belongs to the model",
        own,
    )
    assert other == f"ProcessError: process 1 has stopped: {own}"


def accelerator_of(kind: DistributedType, **state: Any) -> SimpleNamespace:
    """What start_engine looks at of an Accelerator."""
    fsdp = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False}
    zero = {"zero_stage": 3, "zero3_init_flag": False, "gradient_clipping": "auto", "deepspeed_config": {}}
    return SimpleNamespace(
        distributed_type=kind,
        parallelism_config=state.pop("parallelism_config", None),
        gradient_accumulation_steps=state.pop("gradient_accumulation_steps", 1),
        mixed_precision="no",
        num_processes=2,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**fsdp | state)),
        deepspeed_plugin=SimpleNamespace(**zero | state),
    )


SEQUENCE = SimpleNamespace(tp_enabled=False, cp_enabled=False, sp_enabled=True)


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        (DistributedType.MEGATRON_LM, {}, "accelerate's MEGATRON_LM is not supported; use DDP, FSDP2 or DeepSpeed"),
        (DistributedType.MULTI_GPU, {"parallelism_config": SEQUENCE}, "leave out parallelism_config"),
        (DistributedType.MULTI_GPU, {"gradient_accumulation_steps": 4}, "pass gradient_accumulation_steps=4 to palu"),
        (DistributedType.FSDP, {"fsdp_version": 1}, "set fsdp_version: 2"),
        (DistributedType.FSDP, {"activation_checkpointing": True}, "pass gradient_checkpointing=True"),
        (DistributedType.DEEPSPEED, {"zero_stage": 0}, "zero_stage: 0 is not supported; set 1, 2 or 3, or use DDP"),
        (DistributedType.DEEPSPEED, {"zero3_init_flag": True}, "zero3_init_flag .* set it to false"),
        (DistributedType.DEEPSPEED, {"gradient_clipping": 0.5}, "= 0.5 while max_grad_norm = 1.0; leave gradient_clip"),
        (DistributedType.DEEPSPEED, {}, "^learning_rate = None: DeepSpeed keeps the gradient to itself, .*; give one$"),
    ],
)
def test_engines_that_are_refused(
    kind: DistributedType, state: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "Accelerator", lambda **_: accelerator_of(kind, **state))
    with pytest.raises(ValueError, match=message):
        engine_module.start_engine(UnlearnConfig())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("deepspeed_zero2", DistributedType.DEEPSPEED),
        ("deepspeed_zero3", DistributedType.DEEPSPEED),
    ],
)
def test_shipped_configurations(name: str, kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate reads them, and what they ask for is not refused."""
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    asked: dict[str, Any] = {}
    for key, value in (config.fsdp_config | config.deepspeed_config).items():
        asked[key.removeprefix("fsdp_") if key != "fsdp_version" else key] = value
    accelerator = accelerator_of(kind, **asked)
    monkeypatch.setattr(engine_module, "Accelerator", lambda **_: accelerator)
    assert engine_module.start_engine(UnlearnConfig(learning_rate=1e-5)) is accelerator
