"""SHA-256 digests, as hexadecimal digits, of values and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Hash nested lists and mappings of tensors, strings and numbers."""
    sha256 = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            sha256.update(f"{value.dtype}{list(value.shape)}".encode())
            sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add([part for pair in value.items() for part in pair])
        elif isinstance(value, (list, tuple)):
            sha256.update(f"({len(value)})".encode())
            for part in value:
                add(part)
        else:
            sha256.update(f"{value!r},".encode())

    add(value)
    return sha256.hexdigest()


def json_digest(value: Any) -> str:
    """Hash a value's JSON, its keys in order; numbers of NumPy become Python's."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=float).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file, as ``sha256sum`` does."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            sha256.update(block)
    return sha256.hexdigest()
