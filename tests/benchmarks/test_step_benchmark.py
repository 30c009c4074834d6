"""The published formulation, which the benchmarks compare with, computes palu's loss and gradients."""

import json
from typing import Any

import _candidates
import _workload
import bench_step
import gpu_budget
import pytest
import torch

from palu.data.packing import Counts
from palu.ops.gpu import H100


def differences(device: torch.device, *options: str) -> dict[str, float]:
    common = ["--model", "tiny", "--loss", "paper", "--check", "--top-k", "50", "--batch-size", "3"]
    return bench_step.check(bench_step.parse([*common, "--device", str(device), *options]))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ("--n 1", 1e-12),
        ("--n 3 --frozen-head", 1e-12),
        ("--n -1", 1e-12),
        ("--retain-batch-size 5 --no-checkpointing --dtype float32", 1e-4),
    ],
)
def test_published_step_agrees_with_palu(device: torch.device, options: str, most: float) -> None:
    found = differences(device, *options.split())
    assert max(found.values()) < most, found


def test_the_comparison_notices_a_difference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    published_step = _candidates.published_step

    def with_another_k(*arguments: Any) -> torch.Tensor:
        *models_and_batches, config, eos_token_id = arguments
        return published_step(*models_and_batches, config.replace(top_k=49), eos_token_id)

    monkeypatch.setattr(_candidates, "published_step", with_another_k)
    assert min(differences(device).values()) > 1e-6


def test_the_default_is_timed_beside_the_published_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows of the KL are those of the retain examples; --check is for the paper's loss alone."""
    options = ["--model", "tiny", "--device", "cpu", "--batch-size", "2", "--batches", "1", "--repeats", "2"]
    bench_step.measure(bench_step.parse(options))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["impl"] for row in record["results"]] == list(_candidates.CANDIDATES)
    assert all(row["median_ms"] > 0 and row["floor_ms"] is None for row in record["results"])
    setup = _candidates.prepare(bench_step.parse(options))
    [[batch]] = setup.loaders[0]
    assert batch.counts.retain == 0 and batch.counts.examples == 4 and setup.config.method.top_k == 50
    with pytest.raises(SystemExit):
        bench_step.parse(["--check"])


def test_the_budget_of_a_gpu() -> None:
    """Bytes and operations of an 8B Llama's step, from its shape."""
    model = _workload.make_model("llama-3.1-8b", torch.device("meta"), torch.bfloat16)
    counts = Counts(targets=50, others=800, retain=0, examples=24)
    parts = {part.name: part for part in gpu_budget.budget(model, 1500, counts, 1_000_000, torch.bfloat16)}
    weights = sum(p.numel() for p in model.parameters())
    assert weights == 8_030_261_248 and parts["AdamW"].bytes == 22 * weights
    assert parts["AdamW"].launches == len(list(model.parameters())) == 291
    head = 128256 * 4096
    assert parts["body"].operations == 6 * 1500 * (weights - 2 * head)
    assert parts["head: products"].operations == 3 * 850 * 2 * head
    assert parts["losses"].bytes == (50 + 3 * 800) * 128256 * 2
    table = gpu_budget.rows(list(parts.values()), H100, torch.bfloat16)
    assert table[-1]["floor_ms"] == pytest.approx(sum(row["floor_ms"] for row in table[:-1]), abs=0.01)
    assert all(row["floor_ms"] <= row["expected_ms"] for row in table)


def test_drawn_examples_have_the_roles_of_tofu() -> None:
    batches = _workload.make_batches(512, batches=50, forget=8, retain=8, seed=0)
    forget = [example for batch, _ in batches for example in batch]
    labels = torch.cat([example.labels for example in forget])
    assert 52 < len(labels) / len(forget) < 68  # TOFU with SmolLM2's tokenizer: 60
    assert 6.5 < (labels >= 0).sum() / len(forget) < 9  # 7.75
    for example in forget:
        sensitive = example.labels >= 0
        assert torch.equal(example.labels[sensitive], example.input_ids[sensitive])
        assert example.labels[-1] == _workload.ORDINARY
        assert example.input_ids[-1] == 511
    for _, retain in batches:
        assert all((example.labels >= 0).any() for example in retain)
