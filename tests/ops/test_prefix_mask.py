"""palu.prefix_mask against a naive Python twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import palu
from palu import eager

EOS = 2


def naive(labels: list[list[int]], n: int, eos: int | None) -> list[list[bool]]:
    mask = []
    for row in labels:
        mask.append([])
        for t in range(len(row)):
            before = 0  # sensitive labels from t backwards, t included
            while before <= t and row[t - before] >= 0 and row[t - before] != eos:
                before += 1
            mask[-1].append(before > 0 and (n == -1 or before <= n))
    return mask


# Runs rather than single labels, so that spans touch padding, ordinary labels, eos and each other.
LABELS = st.sampled_from([0, 1, EOS, 7, -100, -200])
ROWS = st.lists(st.tuples(LABELS, st.integers(1, 6)), max_size=8).map(
    lambda runs: [label for label, length in runs for _ in range(length)]
)


@settings(max_examples=2500, deadline=None)
@given(
    rows=st.lists(ROWS, max_size=4),
    n=st.sampled_from([-1, 0, 1, 2, 3, 5, 1000]),
    eos=st.sampled_from([None, EOS, 7]),
    transposed=st.booleans(),
)
def test_random_labels(rows: list[list[int]], n: int, eos: int | None, transposed: bool) -> None:
    length = max(map(len, rows), default=0)
    padded = [row + [-100] * (length - len(row)) for row in rows]
    labels = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)
    expected = torch.tensor(naive(padded, n, eos), dtype=torch.bool).reshape(len(rows), length)
    given_labels = labels.t().contiguous().t() if transposed else labels
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        mask = palu.prefix_mask(given_labels.to(device), n, eos)
        assert mask.dtype == torch.bool
        assert torch.equal(mask.cpu(), expected)
    assert torch.equal(eager.prefix_mask(labels, n, eos), expected)


def test_slices_and_expanded_labels(device: torch.device) -> None:
    wide = torch.randint(-1, 3, (9, 40), device=device)
    for labels in (wide[::2, 3:33:3], wide[1:2].expand(5, 40), wide.t()):
        assert torch.equal(palu.prefix_mask(labels, 2, 0), palu.prefix_mask(labels.contiguous(), 2, 0))
        assert palu.prefix_mask(labels, 2, 0).tolist() == naive(labels.tolist(), 2, 0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(device: torch.device, shape: tuple[int, int]) -> None:
    mask = palu.prefix_mask(torch.empty(shape, dtype=torch.int64, device=device), 3)
    assert mask.shape == shape and mask.dtype == torch.bool


def test_errors(device: torch.device) -> None:
    labels = torch.zeros(2, 3, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match=r"palu::prefix_mask: labels must be int64, got int32"):
        palu.prefix_mask(labels.int(), 1)
    with pytest.raises(ValueError, match=r"palu::prefix_mask: labels must have 2 dimensions, got shape \[3\]"):
        palu.prefix_mask(labels[0], 1)
    with pytest.raises(ValueError, match=r"palu::prefix_mask: n must be -1 \(all\) or at least 0, got -2"):
        palu.prefix_mask(labels, -2)


@pytest.mark.parametrize("eos", [None, 1])
def test_opcheck(device: torch.device, eos: int | None) -> None:
    labels = torch.randint(-1, 3, (3, 7), device=device)
    torch.library.opcheck(torch.ops.palu.prefix_mask.default, (labels, 2, eos))


def test_compile_fullgraph(device: torch.device) -> None:
    labels = torch.randint(-1, 3, (3, 7), device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return palu.prefix_mask(x, 2, 1).sum(1)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(labels), function(labels))
