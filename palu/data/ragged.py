"""Rows of different lengths, end to end in one array: 100,000 small tensors would cost ten times what is in them."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")


class Ragged:
    """Rows of integers, int32 inside: 4 bytes for each integer, and 8 for each row. A row comes back as int64 [t]."""

    def __init__(self) -> None:
        self.values, self.ends = array("i"), array("q", [0])

    def append(self, row: Tensor | Sequence[int]) -> None:
        """Add a row: int64 [t], or a few Python integers. Raises OverflowError where one does not fit int32."""
        if isinstance(row, Tensor):
            narrow = row.to(torch.int32)
            if not torch.equal(narrow, row):
                raise OverflowError("a token id does not fit int32")
            self.values.frombytes(narrow.contiguous().numpy().tobytes())
        else:
            self.values.extend(row)
        self.ends.append(len(self.values))

    def __getitem__(self, i: int) -> Tensor:
        start, end = self.ends[i], self.ends[i + 1]
        if start == end:  # of which torch makes no buffer
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(self.values, dtype=torch.int32, count=end - start, offset=4 * start).long()

    def lengths(self) -> Tensor:
        """Return the length of each row, int64 [rows]."""
        return torch.frombuffer(self.ends, dtype=torch.int64).diff()

    def flat(self) -> list[Any]:
        """Return all that is in it, for a hash: lengths, and values where there are any."""
        return [self.lengths(), *([torch.frombuffer(self.values, dtype=torch.int32)] if self.values else [])]


class RaggedSequence(Sequence[T], Generic[T]):
    """A read-only sequence whose elements are made when they are asked for."""

    @abstractmethod
    def make(self, i: int) -> T:
        """Make element ``i``, which is not negative."""

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> list[T]: ...
    def __getitem__(self, i: int | slice) -> T | list[T]:
        if isinstance(i, slice):
            return [self.make(j) for j in range(*i.indices(len(self)))]
        return self.make(range(len(self))[i])
