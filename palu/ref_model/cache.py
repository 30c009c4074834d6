"""The reference's outputs for each item: views of a few long tensors, in memory or mapped from a file."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from palu.data.packing import Item, Items
from palu.data.ragged import RaggedSequence
from palu.methods.base import RefField
from palu.ref_model.storage import CacheFile


class ReferenceOutputs(RaggedSequence[dict[str, Tensor]]):
    """The reference fields [rows, ...] of each item, as views of tensors that hold those of all items end to end.

    Args:
        tensors: one for each field.
        fields: which rows of the items each has entries for.
        parts: the items whose outputs they are, in this order.
    """

    def __init__(self, tensors: Mapping[str, Tensor], fields: Sequence[RefField], *parts: Sequence[Item]):
        starts = {
            rows: array("q", accumulate(chain(*(getattr(Items.of(part), rows).tolist() for part in parts)), initial=0))
            for rows in ("targets", "others")
        }
        self.fields = [(field.name, tensors[field.name], starts[field.rows]) for field in fields]
        self.items = sum(map(len, parts))

    def __len__(self) -> int:
        return self.items

    def make(self, i: int) -> dict[str, Tensor]:
        """Return item ``i``'s fields by name."""
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
    anchors = [Item(torch.tensor(ids), torch.tensor(rows), targets) for ids, rows, targets in about["anchors"]]
    outputs = ReferenceOutputs(tensors, fields, items, anchors)
    return ReferenceCache(outputs, anchors, about["neighbours"], about["variants"])
