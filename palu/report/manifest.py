"""Describe what a run was made of: the model and where it came from, hashes of data and files, versions, device."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from palu.data.tokenize import Example
from palu.hashing import file_digest, json_digest
from palu.layout import CARD
from palu.models.lora import CausalLM, base_of, is_peft
from palu.models.quantized import quantized_by
from palu.version import __version__


def describe_model(model: CausalLM) -> dict[str, Any]:
    """Describe where a model comes from, as far as it tells, and its size."""
    base = base_of(model)
    name = str(getattr(base, "name_or_path", "") or "")
    folder = Path(name).resolve() if name and Path(name).is_dir() else None
    parameters = list(model.parameters())
    return {
        "name": (name if folder is None else folder.name) or None,
        "on_the_hub": _is_hub_name(name) and not Path(name).exists(),
        "license": None if folder is None else _license(folder / CARD),
        "type": type(base).__name__,
        "adapter": is_peft(model),
        "dtype": str(base.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # one without an owner may be anything


def _license(card: Path) -> str | None:
    """Read the licence that a model card names, where there is one."""
    if not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError):  # not a card of the hub's
        return None
    return found if isinstance(found, str) else None


def describe_data(source: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Describe a set: its number of examples, its file if it was one, and SHA-256 of the file and of the tokens."""
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    return {
        "examples": len(examples),
        "file": None if path is None else path.name,
        "file_sha256": None if path is None else file_digest(path),
        "tokens_sha256": json_digest([[e.row, e.input_ids.tolist(), e.labels.tolist()] for e in examples]),
    }


def describe_device(device: torch.device) -> str:
    """Name the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()} ({_processor()}, {threads} thread{'' if threads == 1 else 's'})"


def _processor() -> str:
    try:  # Linux's name for it is more telling than Python's
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(model: CausalLM) -> dict[str, str]:
    """Return the versions of Python and of the packages that had a part in the run."""
    packages = ["torch", "transformers", "accelerate", *(["peft"] if is_peft(model) else [])]
    packages += ["bitsandbytes"] if quantized_by(model) == "bitsandbytes" else []
    return {"palu": __version__, "python": platform.python_version()} | {p: version(p) for p in packages}


def files_in(folder: Path) -> dict[str, Path]:
    """List the files in a folder and below it by their names there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def hash_files(folder: Path, but: Set[str] = frozenset()) -> dict[str, str]:
    """Hash the files of a saved model by their names in its folder; not the card, which is written later."""
    return {name: file_digest(path) for name, path in files_in(folder).items() if name not in but | {CARD}}
