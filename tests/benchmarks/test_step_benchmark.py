"""The published formulation, which the benchmarks compare with, computes palu's loss and gradients."""

import json
from typing import Any

import _candidates
import _workload
import bench_attention
import bench_step
import pytest
import torch


def differences(device: torch.device, *options: str) -> dict[str, float]:
    common = ["--model", "tiny", "--check", "--top-k", "50", "--batch-size", "3"]
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


def test_attention_is_timed_in_both_dtypes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_attention, "SHAPES", ((2, 9), (1, 12)))
    monkeypatch.setattr("sys.argv", ["bench_attention.py", "--repeats", "2"])
    bench_attention.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["examples"], row["longest"]) for row in record["results"]] == [(2, 9), (1, 12)]
    for row in record["results"]:
        assert row["ratio"] == pytest.approx(row["bfloat16_ms"] / row["float32_ms"], abs=0.01)
