"""The reference's outputs for each item: views of a few long tensors, in memory or mapped from a file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal, overload

import torch
from torch import Tensor

from palu.data.packing import Item, Items
from palu.methods.base import RefField
from palu.ref_model.storage import CacheFile


class ReferenceOutputs(Sequence[dict[str, Tensor]]):
    """The reference fields of each item, as views of tensors that hold those of all items end to end.

    Args:
        tensors: one for each field.
        fields: which rows of the items each has entries for.
        items, anchors: whose outputs they are, in this order.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        fields: Sequence[RefField],
        items: Sequence[Item],
        anchors: Sequence[Item] = (),
    ):
        starts = {
            rows: array("q", accumulate(chain(count_rows(items, rows), count_rows(anchors, rows)), initial=0))
            for rows in ("targets", "others")
        }
        self.fields = [(field.name, tensors[field.name], starts[field.rows]) for field in fields]
        self.items = len(items) + len(anchors)

    def __len__(self) -> int:
        return self.items

    @overload
    def __getitem__(self, i: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, i: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return an item's fields by name, [rows, ...] each; or those of several items."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return {name: tensor[starts[i] : starts[i + 1]] for name, tensor, starts in self.fields}


@dataclass(frozen=True)
class ReferenceCache:
    """The reference's outputs for each item that it was asked about and each anchor, on the host."""

    outputs: Sequence[dict[str, Tensor]]  # per forget (and retain) item, then per anchor: the method's reference fields
    anchors: Sequence[Item] = ()  # what the reference wrote itself; see :mod:`palu.ref_model.anchors`
    neighbours: int = 0  # how many of the anchors, the first, answer questions like those of the forget set
    variants: int = 0  # how many after these are other ways to tell a secret


def read_cache(file: CacheFile, fields: Sequence[RefField], items: Sequence[Item]) -> ReferenceCache | None:
    """Map the file's outputs into memory; None where there is no file yet."""
    if (found := file.read()) is None:
        return None
    tensors, about = found
    anchors = []
    for ids, rows, targets in about["anchors"]:
        ids, rows = torch.tensor(ids), torch.tensor(rows)
        anchors.append(Item(ids, rows, ids[rows + 1], targets))
    outputs = ReferenceOutputs(tensors, fields, items, anchors)
    return ReferenceCache(outputs, anchors, about["neighbours"], about["variants"])


def count_rows(items: Sequence[Item], rows: Literal["targets", "others"]) -> list[int]:
    """Count the "targets" or "others" of each item."""
    counted = Items.of(items)
    return (counted.targets if rows == "targets" else counted.others).tolist()
