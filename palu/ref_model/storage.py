"""The reference cache: what the reference gave, in memory, or in a file that is written while it runs and then mapped.

A file is one safetensors file, ``reference-KEY.safetensors``, with a tensor for each reference field, the rows of all
items end to end, and JSON in its header, with the extra items. The key is a hash of all that this
depends on: see :func:`reference_key`. Nothing is read but the rows of the items at hand, and nothing is held while it
is written.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from palu.config import UnlearnConfig
from palu.data.packing import Item, Items
from palu.data.ragged import RaggedSequence
from palu.hashing import digest
from palu.methods.base import RefField
from palu.ref_model.fingerprint import Fingerprints
from palu.ref_model.shared import TokenPair, drop_shared_targets, shared_pairs

FORMAT = 8  # raised, too, where the reference is asked other things, or its answers are read in another way


class CacheError(RuntimeError):
    """The reference cache cannot be written to disk, or what is there cannot be used."""


class ReferenceOutputs(RaggedSequence[dict[str, Tensor]]):
    """The reference fields [rows, ...] of each item, as views of tensors that hold those of all items end to end."""

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
        return {name: tensor[starts[i] : starts[i + 1]] for name, tensor, starts in self.fields}


@dataclass(frozen=True)
class ReferenceCache:
    """The reference's outputs for the forget set and the extra items, on the host.

    The extra items are, in this order: answers to neighbours, variants, answers to everyday prompts, and the rows of
    earlier requests.
    """

    outputs: Sequence[dict[str, Tensor]] = ()  # the method's reference fields: per forget item, then per extra item
    extra: Sequence[Item] = ()
    neighbours: int = 0  # how many of the extra items answer questions like those of the forget set
    variants: int = 0  # how many are other ways to tell a secret
    earlier: int = 0  # how many are rows of earlier requests

    @property
    def shared(self) -> frozenset[TokenPair]:
        """What a secret may begin with that is left alone: see :mod:`palu.ref_model.shared`."""
        return shared_pairs(self.extra[: self.neighbours])


# (which field, from which row on, the rows): puts them where they belong
Write: TypeAlias = Callable[[str, int, Tensor], object]


class CacheFile:
    """The file of one reference's outputs for one forget set, method and settings: those of :func:`reference_key`."""

    def __init__(self, folder: str | os.PathLike[str], key: str):
        self.key = key
        self.path = Path(folder) / f"reference-{key[:16]}.safetensors"

    def read(self, fields: Sequence[RefField], items: Sequence[Item]) -> ReferenceCache | None:
        """Map the outputs for items into memory; None: there is no file yet.

        Raises CacheError, with the fix, where the file is damaged, foreign, or written by another version.
        """
        fix = "delete it to have the reference run again"
        if not self.path.exists():
            return None
        tensors, header = map_file(self.path, CacheError, fix)
        if not isinstance(header, dict) or header.get("key") != self.key:
            raise CacheError(f"{self.path} does not hold this reference's outputs; {fix}")
        if header["transformers"] != transformers.__version__:
            raise CacheError(
                f"{self.path} holds outputs computed under transformers {header['transformers']}, and this is "
                f"{transformers.__version__}; {fix}"
            )
        about = header["about"]
        extra = list(map(item_from_json, about["extra"]))
        cache = ReferenceCache((), extra, about["neighbours"], about["variants"], about["earlier"])
        items = drop_shared_targets(items, cache.shared)
        return replace(cache, outputs=ReferenceOutputs(tensors, fields, items, extra))

    @contextmanager
    def locked(self, *, progress: bool = True) -> Iterator[None]:
        """Hold the file's lock on this machine within the block, at most while the process lives."""
        lock = FileLock(self._beside("lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if progress:
                    tqdm.write(f"palu: waiting for another process to write {self.path}", file=sys.stderr)
                lock.acquire()
        except OSError as error:
            raise self._unwritten(error) from error
        try:
            yield
            # Whoever waits for the lock finds the file, and whoever comes later does not ask for the lock.
            if self.path.exists():
                with suppress(OSError):
                    Path(lock.lock_file).unlink()
        finally:
            lock.release()

    @contextmanager
    def writing(
        self, like: Mapping[str, Tensor], lengths: Mapping[str, int], written: ReferenceCache
    ) -> Iterator[Write]:
        """Make room for tensors, to be filled within the block; then the file appears, whole.

        ``like``: [0, ...] of each tensor's dtype and row shape; ``lengths``: of each, in rows; ``written``: the extra
        items to be kept with them. Raises CacheError where there is no room or no permission; nothing is left then.
        """
        # Of empty tensors safetensors writes no more than a header.
        header = json.loads(save({name: torch.empty_like(one) for name, one in like.items()})[8:])
        row_bytes = {name: one.new_empty(1, *one.shape[1:]).nbytes for name, one in like.items()}
        starts, end = {}, 0
        for name in sorted(like, key=lambda name: -like[name].itemsize):  # wide ones first: all are aligned
            starts[name], end = end, end + lengths[name] * row_bytes[name]
            shape = [lengths[name], *like[name].shape[1:]]
            header[name] |= {"shape": shape, "data_offsets": [starts[name], end]}
        extra = list(map(item_to_json, written.extra))
        counts = {name: getattr(written, name) for name in ("neighbours", "variants", "earlier")}
        about = {"extra": extra, **counts}
        own = {"key": self.key, "transformers": transformers.__version__, "about": about}
        header["__metadata__"] = {"palu": json.dumps(own)}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = self._beside("partial")
        try:
            with partial.open("wb") as file:
                data = file.write(len(text).to_bytes(8, "little") + text)
                if hasattr(os, "posix_fallocate"):  # a full disk is told before the reference runs, not after
                    os.posix_fallocate(file.fileno(), 0, data + end)

                def write(name: str, row: int, rows: Tensor) -> None:
                    file.seek(data + starts[name] + row * row_bytes[name])
                    file.write(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

                yield write
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise self._unwritten(error) from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _beside(self, kind: str) -> Path:
        """Name a file for the time of writing. Machines that share the folder do not wait for one another."""
        return self.path.with_name(f"{self.path.stem}.{platform.node()}.{kind}")

    def _unwritten(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self.path} could not be written: {error}. Make room or repair the folder, or choose another one"
        )


def item_to_json(item: Item) -> list[Any]:
    """Return an item of one example for JSON."""
    return [item.input_ids.tolist(), item.rows.tolist(), item.targets, item.start]


def item_from_json(values: Sequence[Any]) -> Item:
    """Return the item of :func:`item_to_json`."""
    ids, rows, targets, start = values
    return Item(torch.tensor(ids), torch.tensor(rows, dtype=torch.int64), targets, start=start)


def map_file(path: Path, kind: type[Exception], fix: str) -> tuple[dict[str, Tensor], Any]:
    """Map a safetensors file into memory: (its tensors, palu's part of its header; None: it has none).

    Clone what is kept longer than the file. Raises an error of this kind where it cannot be read, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("palu", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except OSError as error:
        raise kind(f"{path} cannot be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise kind(f"{path} is damaged ({error}); {fix}") from error


def open_cache_file(config: UnlearnConfig, key: str) -> CacheFile | None:
    """Name the run's cache file: in ``cache_dir``, else in ``checkpoint_dir``; None: it is kept in memory alone."""
    folder = config.cache_dir or config.checkpoint_dir
    return None if folder is None else CacheFile(folder, key)


def reference_key(config: UnlearnConfig, accelerator: Accelerator, fingerprints: Fingerprints) -> str:
    """Hash everything that the reference's outputs depend on, but for versions of libraries."""
    drawn = config.reference.neighbours or config.reference.variants  # neighbours and paraphrases are
    return digest(
        {
            "format": FORMAT,
            "reference": fingerprints.reference,
            "forget": fingerprints.forget,
            "earlier": fingerprints.earlier,
            "anchor_prompts": fingerprints.anchor_prompts,
            "seed": config.seed if drawn else None,
            "objective": config.name,
            "settings": json.dumps(config.reference.settings, sort_keys=True, default=float),
            "mixed_precision": accelerator.mixed_precision,
            "device": accelerator.device.type,
        }
    )


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
