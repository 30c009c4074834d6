"""The reference cache on disk: asked once, the same bits, and nothing else is taken for it."""

import json
import re
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers.refusals import assert_refused
from helpers.scenarios import figures
from helpers.tiny import forget_rows, retain_rows, same_weights, tiny_llama, weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

import palu
from palu import CacheError
from palu.config import UnlearnConfig
from palu.data.examples import load_forget
from palu.data.packing import Item, forget_items
from palu.methods.base import ForgetSet
from palu.models.attention import use_packed_attention
from palu.models.root import ModelRoot
from palu.ref_model import precompute
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.precompute import compute_outputs
from palu.ref_model.storage import CacheFile, ReferenceOutputs, item_from_json, item_to_json, reference_key

RUN_AGAIN = "delete it to have the reference run again"


def unlearn(model: Any = None, ref_model: Any = None, **settings: Any) -> palu.UnlearnResult:
    given = {"epochs": 1, "batch_size": 3, "learning_rate": 1e-3, "progress": False, "lora_rank": None} | settings
    return palu.unlearn(model or tiny_llama(), ref_model, forget_rows(), retain_rows(), **given)


def items_of(count: int = 8, n: int = 2) -> list[Item]:
    return forget_items(load_forget(forget_rows(count), None, max_length=99).examples, n, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "some" / "cache"


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every run of a reference over a forget set."""
    runs: list[int] = []

    def spy(*args: Any) -> Iterator[dict[str, Tensor]]:
        runs.append(1)
        yield from run(*args)

    run = precompute._run
    monkeypatch.setattr(precompute, "_run", spy)
    return runs


# --- What it gives ---
@pytest.mark.parametrize(("top_k", "chunk_bytes"), [(5, 2**20), (5, 1), (10**6, 2**20)])
def test_cache_holds_what_the_reference_says(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, top_k: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(precompute, "TOKENS_PER_PASS", 30)  # two or so examples a pass
    model = tiny_llama(dtype=torch.float64).to(device)
    items = items_of(7)
    with use_packed_attention(model):
        config = UnlearnConfig(local_loss="topk_mse", top_k=top_k, chunk_bytes=chunk_bytes)
        cache = compute_outputs(model, items, config, Accelerator())
    assert len(cache.outputs) == len(items)
    for item, fields in zip(items, cache.outputs, strict=True):
        index, hidden = fields["index"], fields["hidden"]
        with torch.no_grad():
            output = model(input_ids=item.input_ids[None].to(device), output_hidden_states=True)
        onset, ordinary = item.rows.split([item.targets, len(item.rows) - item.targets])
        highest = output.logits[0].cpu()[onset].argsort(descending=True)[:, :top_k]
        assert index.dtype == torch.int32
        assert torch.equal(index.sort().values, highest.int().sort().values)
        torch.testing.assert_close(hidden, output.hidden_states[-1][0].cpu()[ordinary])
        assert not hidden.requires_grad


# --- A second run ---
@pytest.mark.parametrize(("objective", "given"), [("palu", False), ("palu", True), ("tpo", False), ("undial", True)])
def test_a_second_run_does_not_ask(objective: str, given: bool, folder: Path, passes: list[int]) -> None:
    """And it is, bit by bit, the run without a cache on disk."""
    ref_model = tiny_llama(seed=1) if given else None
    expected = unlearn(None, ref_model, objective=objective)
    for asked in (2, 2):
        result = unlearn(None, ref_model, objective=objective, cache_dir=str(folder))
        assert len(passes) == asked
        assert figures(result.history) == figures(expected.history)
        assert same_weights(result.model, weights(expected.model))
        (path,) = folder.iterdir()
        assert re.fullmatch(r"reference-[0-9a-f]{16}\.safetensors", path.name)


def test_a_known_reference_stays_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run needs its head alone."""
    moved: list[Any] = []
    monkeypatch.setattr(precompute, "on_device", lambda root, device: moved.append(device) or nullcontext())
    for moves in (1, 0):
        moved.clear()
        unlearn(None, tiny_llama(seed=1), cache_dir=str(folder))
        assert len(moved) == moves


def test_nothing_is_asked_and_nothing_written_where_the_loss_has_no_reference(folder: Path) -> None:
    unlearn(objective="ga", cache_dir=str(folder))
    assert not folder.exists()


def test_checkpoints_leave_the_answers_to_the_cache(folder: Path, passes: list[int]) -> None:
    settings = {"cache_dir": str(folder / "cache"), "checkpoint_dir": str(folder / "run")}
    unlearn(**settings)
    assert [path.name for path in (folder / "run").iterdir()] == ["step-00000003.safetensors"]
    (path,) = (folder / "cache").iterdir()
    with safe_open(folder / "run" / "step-00000003.safetensors", "pt") as file:
        key = json.loads(file.metadata()["palu"])["run"]["reference"]
    assert path.name == f"reference-{key[:16]}.safetensors"
    moved = path.parent.replace(folder / "elsewhere")  # the cache may be somewhere else, or lost
    unlearn(**settings | {"cache_dir": str(moved)}, resume=True)
    assert len(passes) == 1
    unlearn(**settings, resume=True)
    assert len(passes) == 2


def test_the_processes_of_a_run_ask_once(folder: Path, passes: list[int], capfd: pytest.CaptureFixture) -> None:
    model, items = tiny_llama(), items_of()
    file = CacheFile(folder, "0" * 64)

    def run(progress: bool) -> Any:
        return outputs_of(model, items, UnlearnConfig(top_k=4), CacheFile(folder, "0" * 64), progress)

    with ThreadPoolExecutor(3) as pool:
        with file.locked():
            waiting = [pool.submit(run, progress) for progress in (True, False, False)]
            assert not wait(waiting, 0.2).done
        found = [one.result() for one in waiting]
    assert len(passes) == 1
    assert all(same(found[0], other) for other in found)
    assert [path.name for path in folder.iterdir()] == [file.path.name]
    told = f"palu: waiting for another process to write {file.path}\n"
    assert capfd.readouterr().err.count(told) == 1, "by the one that shows its progress"


# --- The file ---
def same(one: Any, other: Any) -> bool:
    """Whether the answers for every item have the same bits."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for these, those in zip(one, other, strict=True)
        for a, b in zip(these.values(), those.values(), strict=True)
    )


def outputs_of(model: Any, items: list[Item], config: UnlearnConfig, file: Any = None, progress: bool = False) -> Any:
    """What the reference gives for each item."""
    return compute_outputs(model, items, config, Accelerator(), file=file, progress=progress).outputs


@pytest.mark.parametrize(
    ("objective", "dtype"), [("palu", torch.bfloat16), ("npo", torch.float64), ("tpo", torch.float32)]
)
def test_answers_from_the_file_are_those_in_memory(
    objective: str, dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many passes, with items that have no row of one kind."""
    monkeypatch.setattr(precompute, "TOKENS_PER_PASS", 20)
    model, config = tiny_llama(dtype=dtype), UnlearnConfig(objective)
    rows = forget_rows()
    for row in (rows[0], rows[5]):
        row["labels"] = [-200 if label >= 0 else label for label in row["labels"]]
    rows[2]["labels"] = [ids if label == -200 else label for ids, label in zip(*rows[2].values(), strict=True)]
    items = config.method_class.make_items(ForgetSet(load_forget(rows, None, max_length=99).examples), config)
    file = CacheFile(folder, "0" * 64)
    in_memory, written = (outputs_of(model, items, config, kept) for kept in (None, file))
    assert same(in_memory, written)
    assert same(in_memory[2:4], [written[2], written[-5]]) and len(written) == 8
    read = file.read(config.reference.fields, items)
    assert read is not None and same(in_memory, read.outputs)


def test_an_item_comes_back_from_json() -> None:
    for item in items_of():
        back = item_from_json(json.loads(json.dumps(item_to_json(item))))
        assert torch.equal(back.input_ids, item.input_ids) and torch.equal(back.rows, item.rows)
        assert (back.targets, back.start) == (item.targets, item.start)
    nothing = Item(torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64))
    assert len(item_from_json(json.loads(json.dumps(item_to_json(nothing)))).labels) == 0


def test_it_is_mapped_and_written_a_few_items_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "TOKENS_PER_PASS", 40)
    model, items, file = tiny_llama(), items_of(60), CacheFile(folder, "0" * 64)
    sizes = []
    fill = precompute._fill

    def spy(write: Any, *args: Any) -> None:
        fill(lambda name, row, rows: (sizes.append(len(rows)), write(name, row, rows)), *args)

    monkeypatch.setattr(precompute, "_fill", spy)
    outputs = outputs_of(model, items, UnlearnConfig(top_k=4), file)
    assert max(sizes) <= 40 and len(sizes) > 2 * 15
    assert isinstance(outputs, ReferenceOutputs)
    maps = Path("/proc/self/maps")
    if maps.exists():
        regions = [line.split("-", 1) for line in maps.read_text().splitlines() if line.endswith(str(file.path))]
        mapped = [(int(start, 16), int(rest.split()[0], 16)) for start, rest in regions]
        assert all(any(low <= t.data_ptr() < high for low, high in mapped) for _, t, _ in outputs.fields)


def test_bytes_per_token(folder: Path) -> None:
    """4 (K + 1) for an onset token, one hidden state for an ordinary one, and a header."""
    model, items, file = tiny_llama(), items_of(40), CacheFile(folder, "0" * 64)
    outputs_of(model, items, UnlearnConfig(top_k=7), file)
    onset = sum(item.targets for item in items)
    ordinary = sum(len(item.rows) for item in items) - onset
    assert 0 < file.path.stat().st_size - onset * (4 * 7 + 4) - ordinary * 32 * 4 < 1000


# --- The key ---
def key_of(
    model: Any = None, ref_model: Any = None, forget: Any = None, mixed_precision: str = "no", **settings: Any
) -> str:
    config = UnlearnConfig(**settings)
    examples = load_forget(forget or forget_rows(), None, max_length=config.max_length).examples
    items = config.method_class.make_items(ForgetSet(examples), config)
    fingerprints = Fingerprints(model or tiny_llama(), ref_model, items, [])
    accelerator: Any = SimpleNamespace(mixed_precision=mixed_precision, device=torch.device("cpu"))
    return reference_key(config, accelerator, fingerprints)


def test_the_key_has_in_it_what_the_answers_depend_on() -> None:
    rows = forget_rows()
    keys = {
        "nothing": key_of(),
        "weights": key_of(tiny_llama(seed=1)),
        "dtype": key_of(tiny_llama(dtype=torch.bfloat16)),
        "mixed precision": key_of(mixed_precision="bf16"),
        "model configuration": key_of(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e3})),
        "reference": key_of(None, tiny_llama(seed=2)),
        "order": key_of(forget=rows[::-1]),
        "a token": key_of(forget=[rows[0] | {"input_ids": [1, *rows[0]["input_ids"][1:]]}, *rows[1:]]),
        "one more": key_of(forget=forget_rows(9)),
        "n": key_of(n=1),
        "top_k": key_of(top_k=49),
        "local_loss": key_of(local_loss="topk_mse"),
        "objective": key_of(objective="npo"),
        "kl_rows": key_of(kl_rows=2),
        "kl_rows, drawn otherwise": key_of(kl_rows=2, seed=1, neighbours=0, variants=0),
        "neighbours, drawn otherwise": key_of(seed=1, variants=0),
        "paraphrases, drawn otherwise": key_of(seed=2, neighbours=0),
        "no KL": key_of(lambda_kl=0.0),
        "no local loss": key_of(gamma=0.0),
    }
    assert len(set(keys.values())) == len(keys), keys


def test_the_onset_length_is_in_the_key_where_a_variant_may_be_longer() -> None:
    """Spans of one token are the same at any n; what the reference says in other words need not be."""
    short = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -200, 6, -200]}]
    assert key_of(forget=short, n=2) != key_of(forget=short, n=3)
    assert key_of(forget=short, n=2, variants=0) == key_of(forget=short, n=3, variants=0)


def test_the_key_has_nothing_else_in_it() -> None:
    run = {"learning_rate": 1.0, "epochs": 3, "batch_size": 2, "chunk_bytes": 8, "max_tokens": 9}
    drawn = {"neighbours": 0, "variants": 0}
    assert key_of(**drawn) == key_of(**drawn, seed=4)
    assert key_of() == key_of(lambda_kl=3.0, kl_direction="forward", probability_floor=0.5, **run)
    entropy = {"local_loss": "topk_mse"}
    assert key_of(**entropy) == key_of(**entropy, target="local_mean")
    # The reference decides, whatever is trained towards or away from it.
    assert key_of() == key_of(tiny_llama(seed=3), tiny_llama()) != key_of(tiny_llama(seed=3))


def test_training_a_bias_does_not_move_the_reference() -> None:
    """Also where the head's weight, beside it, is frozen."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=32, **sizes))
    model.lm_head.weight.requires_grad_(False)
    head = precompute._frozen_head(ModelRoot(model), True, Accelerator())
    before = head.bias.clone()
    model.lm_head.bias.data += 1
    assert torch.equal(head.bias, before)


# --- What is refused ---
@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    unlearn(cache_dir=str(folder))
    return folder


def refused(folder: Path) -> str:
    """The message, less the path. The model is untouched."""
    model = tiny_llama()
    (path,) = folder.iterdir()
    with pytest.raises(CacheError) as caught:
        unlearn(model, cache_dir=str(folder))
    assert same_weights(model, weights(tiny_llama()))
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("length", [0, 7, 200, -1, None])
def test_a_damaged_or_foreign_file(length: int | None, written: Path, folder: Path) -> None:
    shutil.copytree(written, folder)
    (path,) = folder.iterdir()
    if length is None:
        save_file({"0": torch.ones(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:length])
    told = r"is damaged \(.+\)" if length is not None else "does not hold this reference's outputs"
    assert re.fullmatch(f" {told}; {RUN_AGAIN}", refused(folder))


def test_answers_given_under_another_version(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = transformers.__version__
    monkeypatch.setattr("palu.ref_model.storage.transformers.__version__", "99.0")
    assert refused(written) == f" holds outputs computed under transformers {version}, and this is 99.0; {RUN_AGAIN}"


def test_a_file_that_cannot_be_read(written: Path, folder: Path) -> None:
    """That is no damage: nothing is said of deleting it."""
    (path,) = written.iterdir()
    (folder / path.name).mkdir(parents=True)
    assert re.fullmatch(r" cannot be read: [^;]+", refused(folder))


def test_a_full_disk_is_told_before_the_reference_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = []
    monkeypatch.setattr(precompute, "_fill", lambda *_: fill.append(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(
            CacheError, match=r"could not be written: .*too large.*\. Make room or repair the folder, or"
        ):
            unlearn(cache_dir=str(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not fill
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.partial"))


def test_a_write_that_fails_leaves_nothing_to_be_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("palu.ref_model.storage.os.fsync", fail)
        with pytest.raises(CacheError, match=r"\[Errno 5\] Input/output error\. Make room or repair the folder"):
            unlearn(cache_dir=str(folder))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    (folder / "reference-0.partial").touch()  # as after a kill
    unlearn(cache_dir=str(folder))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """Every folder that a run writes to is tried before anything else, and nothing is made."""
    file, below = tmp_path / "file", tmp_path / "new" / "folder"
    file.touch()
    for field, settings in (("cache_dir", {}), ("checkpoint_dir", {}), ("logging_dir", {"report_to": "tensorboard"})):
        for folder in (file, file / "below"):
            told = f"{field} = {str(folder)!r}: {file} is a file; give a folder"
            given = {"cache_dir": str(below)} | settings | {field: str(folder)}
            assert_refused(tiny_llama(), NotADirectoryError, told, forget="absent.jsonl", **given)
    assert not below.parent.exists()


def test_a_folder_that_fails_later(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"could not be written: .*File exists.* or choose another one$"):
        CacheFile(tmp_path / "file", "0" * 16).locked().__enter__()
