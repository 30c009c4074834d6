"""Input that looks bad and is good: layouts of tensors, dtypes of a reference, numbers of NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.refusals import Call, linear_topk_mse, linear_topk_unlikelihood, row, text, topk_mse, unlearn
from helpers.small_tokenizers import byte_level
from helpers.tiny import rmu_layer, tiny_llama, weights
from torch import Tensor

import palu
from palu.data.examples import load_forget
from palu.data.tokenize import IGNORE, ORDINARY


def outcome(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of its floating arguments."""
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    loss = function(**leaves)
    loss.sum().backward()
    return [loss, *(t.grad for t in leaves.values() if t.grad is not None)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "zero stride": lambda t: t[:1].expand(t.shape),
    "every other column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "reversed storage": lambda t: torch.cat([t, t])[1 : 1 + len(t)],
    "index in int32": lambda t: t if t.is_floating_point() else t.int(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("build", [topk_mse, linear_topk_mse, linear_topk_unlikelihood])
def test_layouts_of_inputs(build: Callable[..., Call], layout: str) -> None:
    """Bit for bit what the same values give in a contiguous tensor with an int64 index."""
    function, arguments = build()
    changed = {name: LAYOUTS[layout](tensor) for name, tensor in arguments.items()}
    plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in changed.items()}
    plain["index"] = plain["index"].long()
    for one, other in zip(outcome(function, changed), outcome(function, plain), strict=True):
        assert torch.equal(one, other)


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
        function, arguments = unlearn(forget=forget)
        function(**arguments)
        ends.append(weights(arguments["model"]))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["lm_head.weight"], tiny_llama().lm_head.weight)


@pytest.mark.parametrize(
    ("objective", "dtype"),
    [
        *(("palu", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)),
        *(("npo", torch.bfloat16), ("tpo", torch.float16), ("undial", torch.float64), ("rmu", torch.float16)),
    ],
)
def test_a_reference_in_another_dtype(objective: str, dtype: torch.dtype) -> None:
    reference = tiny_llama(seed=1)
    function, arguments = unlearn(objective=objective, **rmu_layer(objective), ref_model=reference)
    same = function(**arguments).history[-1]
    function, arguments = unlearn(objective=objective, **rmu_layer(objective), ref_model=tiny_llama(seed=1).to(dtype))
    other = function(**arguments).history[-1]
    assert {n: other[n] for n in other if n != "tokens_per_second"} == pytest.approx(
        {n: same[n] for n in same if n != "tokens_per_second"}, rel=0.1
    )


def test_numbers_of_numpy() -> None:
    """As settings they are Python's own, which JSON has, and as spans integers."""
    settings = {"n": np.int64(2), "learning_rate": np.float32(0.125), "allow_cut_spans": np.bool_(True)}
    function, arguments = text(
        forget=[row(spans=np.array([[0, 12]]))], retain=[], lambda_retain=np.int64(0), **settings
    )
    summary = function(**arguments).summary
    assert summary["onset_tokens"] == 2
    assert json.loads(json.dumps(summary))["config"]["learning_rate"] == 0.125


def test_a_tokenizer_that_adds_no_end_of_sequence() -> None:
    """It has one: each answer is taught to end, and in forget its end is held by the KL."""
    plain = byte_level(bos=False)
    assert plain(row()["answer"])["input_ids"][-1] != plain.eos_token_id
    function, arguments = text(tokenizer=plain)
    answer = plain(f"Question: Who?\nAnswer: {row()['answer']}")["input_ids"]
    summary = function(**arguments).summary
    held = summary["onset_tokens"] + summary["ordinary_tokens"]
    alone = load_forget([row()], plain, max_length=99).examples[0]
    assert alone.input_ids.tolist() == [*answer, plain.eos_token_id]
    assert int(alone.labels[-1]) == ORDINARY
    assert 0 < held <= int((alone.labels != IGNORE).sum())
