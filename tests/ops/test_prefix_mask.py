"""palu.prefix_mask against a naive Python twin."""

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
