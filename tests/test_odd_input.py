"""Input that looks bad and is good: layouts of tensors, dtypes of a reference, numbers of NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.refusals import row, text, unlearn
from helpers.tiny import VOCAB, tiny_llama, weights

import palu


def test_layouts_of_labels_and_rows() -> None:
    """Expanded and sliced columns of a forget set train the model as their copies do."""
    ids, labels = torch.arange(1, 13).repeat(4, 1), torch.full((4, 12), -200)
    labels[:, :4], labels[:, 5:7] = -100, ids[:, 5:7]
    views = {"input_ids": ids[:1].expand(4, 12), "labels": torch.stack([labels, labels], -1)[..., 0]}
    assert views["input_ids"].stride(0) == 0 and not views["labels"].is_contiguous()
    masks = [palu.prefix_mask(x, 1) for x in (views["labels"], labels, labels[:1].expand(4, 12))]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    ends = []
    for forget in (views, {"input_ids": ids, "labels": labels}):
        function, arguments = unlearn(forget=forget, lora_rank=None)
        function(**arguments)
        ends.append(weights(arguments["model"]))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["lm_head.weight"], tiny_llama().lm_head.weight)


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        *(("palu", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
        *(("npo", torch.bfloat16), ("tpo", torch.float16), ("undial", torch.float64)),
    ],
)
def test_a_reference_in_another_dtype(objective: str, dtype: torch.dtype) -> None:
    # All are candidates: which of two is the 50th can hang on a rounding, and with it twice the probability.
    settings = {"top_k": VOCAB} if objective == "palu" else {}
    ends = []
    for reference in (tiny_llama(seed=1), tiny_llama(seed=1).to(dtype)):
        function, arguments = unlearn(objective=objective, ref_model=reference, **settings)
        ends.append(function(**arguments).history[-1] | {"tokens_per_second": 0})
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


def test_numbers_of_numpy() -> None:
    """As settings they are Python's own, which JSON has, and as spans integers."""
    settings = {"n": np.int64(2), "learning_rate": np.float32(0.125), "allow_cut_spans": np.bool_(True)}
    function, arguments = text(
        forget=[row(spans=np.array([[0, 12]]))], retain=[], lambda_retain=np.int64(0), **settings
    )
    summary = function(**arguments).summary
    assert summary["onset_tokens"] == 2
    assert json.loads(json.dumps(summary))["config"]["learning_rate"] == 0.125
