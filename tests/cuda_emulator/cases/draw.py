"""Random sizes, layouts and values of a case, and the form in which an op lists its fixed cases."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of launch.h


@dataclass(frozen=True)
class Fixed:
    """A case whose sizes are chosen so that a kernel takes a certain path."""

    name: str
    path: str  # what it is for
    sizes: dict[str, Any] = field(default_factory=dict)  # arguments of the op's `make`; the rest is drawn


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def center(target: str | float) -> tuple[int, float]:
    """Return what launch.h calls `center` and `constant`."""
    if not isinstance(target, str):
        return 2, float(target)
    return {"global_mean": 0, "global_mean_detached": 0, "local_mean": 1}[target], 0.0


class Draw:
    """All random choices of a case, from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def one(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return self.random.choice(choices)

    def chance(self, p: float) -> bool:
        """Return True with probability p."""
        return self.random.random() < p

    def vocabulary(self) -> int:
        """Return a size of the vocabulary: small, at the edge of a loop, of a tile or a cluster, or a real model's."""
        kind = self.random.random()
        if kind < 0.35:
            return self.random.randint(1, 40)
        if kind < 0.65:
            return int(self.one(64, 255, 256, 257, 1000, 2047, 2048, 4095, 4096, 4097, 5003))
        if kind < 0.9:
            return int(self.one(8192, 16384, 32768, 65536)) + self.random.randint(-9, 9)
        return int(self.one(49152, 50257, 128256, 151936, 200_000, 200_003))

    def rows(self, vocabulary: int) -> int:
        """Return a number of rows; seldom none."""
        if self.chance(0.04):
            return 0
        return int(self.one(1, 1, 2, 3)) if vocabulary > 3000 else self.random.randint(1, 12)

    def layout(self, columns: int, lead: int | None = None, pad: int | None = None) -> dict[str, Any]:
        """Return `lead` and `stride` of a tensor whose rows are `pad` apart: aligned, anywhere, or apart."""
        lead = self.one(0, 0, 1, 3, 5, 7) if lead is None else lead
        return {"lead": lead, "stride": columns + (self.one(0, 0, 0, 1, 3, 8, 16) if pad is None else pad)}

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype, kind: str | None) -> tuple[Tensor, str]:
        """Return logits that are "normal", "wide", "extreme", "equal", "one high" or "rising", and which of these."""
        kind = kind or self.one("normal", "normal", "wide", "extreme", "equal", "one high", "rising")
        z = torch.randn(rows, vocabulary, dtype=torch.float64)
        if kind == "wide":
            z *= 30
        elif kind == "extreme":
            z = z.sign() * 1e4 + z
        elif kind == "equal":
            z = z[:, :1].expand_as(z).clone() * 3
        elif kind == "one high" and rows:
            z[:, self.random.randrange(vocabulary)] = 60.0
        elif kind == "rising":
            z += torch.linspace(0, 20, vocabulary, dtype=torch.float64)
        return z.to(dtype), kind

    def index(self, rows: int, vocabulary: int, k: int, dtype: torch.dtype, kind: str | None) -> tuple[Tensor, str]:
        """Return an index [rows, k] that is "unique" in each row, "any", or all "one value", and which it is."""
        kind = kind or self.one("any", "unique", "unique", "one value")
        if kind == "unique" and k <= vocabulary:
            if vocabulary > 4000:  # a step that has no factor in common with the vocabulary
                step = next(s for s in range(vocabulary // 3 + 1, vocabulary) if math.gcd(s, vocabulary) == 1)
                at = (torch.randint(0, vocabulary, (rows, 1)) + torch.arange(k) * step) % vocabulary
            else:
                at = torch.stack([torch.randperm(vocabulary)[:k] for _ in range(rows)]) if rows else torch.zeros(0, k)
        elif kind == "one value":
            at = torch.randint(0, vocabulary, (rows, 1)).expand(rows, k)
        else:
            kind, at = "any", torch.randint(0, vocabulary, (rows, k))
        at = at.clone()
        if rows and k > 1 and kind == "any":
            at[0, 0], at[-1, -1] = 0, vocabulary - 1
        return at.to(dtype), kind

    def k(self, vocabulary: int) -> int:
        """Return how many candidates a row has."""
        kind = self.random.random()
        if kind < 0.15:
            return 1
        if kind < 0.7:
            return self.random.randint(1, min(vocabulary, 70))
        if kind < 0.9 or vocabulary < 1000:
            return self.random.randint(1, min(vocabulary, 1500))
        return int(self.one(1000, 5000, 5119, 5120, 5121, 6000, 10_241))

    def target(self) -> str | float:
        """Return a target that topk_mse and linear_topk_mse take."""
        target: str | float = self.one(
            "global_mean", "global_mean", "global_mean_detached", "local_mean", 0.5, -3.0, 0.0
        )
        return target
