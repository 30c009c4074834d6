"""The reference cache on disk: written while the reference is asked, mapped into memory when it is read.

A file is one safetensors file, ``reference-KEY.safetensors``, with a tensor for each kind of answer, the rows of all
items end to end, and JSON in its header, with the anchors that the reference wrote. The key is a hash of all that this
depends on: the reference's weights and configuration, the tokenised forget set with the rows that are looked at, the
everyday prompts, the settings of the question, the device and the precision. Nothing is read but the rows of the items
at hand, and nothing is held while it is written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from palu.config import UnlearnConfig
from palu.fingerprint import Fingerprints, digest

FORMAT = 1
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


class CacheError(RuntimeError):
    """The reference cache cannot be written to disk, or what is there cannot be used."""


# (which tensor, at which row, the rows): puts them where they belong
Write: TypeAlias = Callable[[int, int, Tensor], object]


class CacheFile:
    """Where one reference's answers to one question about one forget set are kept.

    Args:
        folder: where; it need not exist.
        key: see :func:`reference_key`.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str):
        self.key = key
        self.path = Path(folder) / f"reference-{key[:16]}.safetensors"

    def read(self) -> tuple[list[Tensor], dict[str, Any]] | None:
        """The tensors, mapped into memory, and what :meth:`writing` was told about them; None where there is no file.

        Raises:
            CacheError: the file is damaged, foreign, or written by another version; the message gives the mend.
        """
        mend = "delete it to have the reference asked again"
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("palu", "null"))
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{self.path} cannot be read: {error}") from error
        except (SafetensorError, ValueError) as error:
            raise CacheError(f"{self.path} is damaged ({error}); {mend}") from error
        if not isinstance(header, dict) or header.get("key") != self.key:
            raise CacheError(f"{self.path} does not hold this reference's answers; {mend}")
        if header["transformers"] != transformers.__version__:
            raise CacheError(
                f"{self.path} holds answers given under transformers {header['transformers']}, and this is "
                f"{transformers.__version__}; {mend}"
            )
        return tensors, header["about"]

    @contextmanager
    def locked(self, *, progress: bool = True) -> Iterator[None]:
        """Within the block, no other process writes the file: the processes of a run, or several runs, write it once.

        A process that dies gives its lock up.
        """
        lock = FileLock(self.path.with_suffix(".lock"))
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
    def writing(self, like: Sequence[Tensor], lengths: Sequence[int], about: dict[str, Any]) -> Iterator[Write]:
        """Room for tensors of known lengths, to be filled within the block; then the file appears, whole.

        Args:
            like: [0, ...] of each tensor's dtype and row shape.
            lengths: of each, in rows.
            about: to be kept with them, as JSON.

        Raises:
            CacheError: no room or no permission. Nothing is left then.
        """
        header: dict[str, Any] = {
            "__metadata__": {
                "palu": json.dumps({"key": self.key, "transformers": transformers.__version__, "about": about})
            }
        }
        row_bytes = [tensor[:0].new_empty(1, *tensor.shape[1:]).nbytes for tensor in like]
        starts, end = [0] * len(like), 0
        for i in sorted(range(len(like)), key=lambda i: -like[i].itemsize):  # wide ones first: all are aligned
            starts[i], end = end, end + lengths[i] * row_bytes[i]
            header[str(i)] = {
                "dtype": DTYPES[like[i].dtype],
                "shape": [lengths[i], *like[i].shape[1:]],
                "data_offsets": [starts[i], end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                data = file.write(len(text).to_bytes(8, "little") + text)
                if hasattr(os, "posix_fallocate"):  # a full disk is told before the reference is asked, not after
                    os.posix_fallocate(file.fileno(), 0, data + end)

                def write(i: int, row: int, rows: Tensor) -> None:
                    file.seek(data + starts[i] + row * row_bytes[i])
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

    def _unwritten(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self.path} could not be written: {error}. Make room or mend the folder, or choose another cache_dir"
        )


def cache_file(
    config: UnlearnConfig, depends_on: dict[str, Any], accelerator: Accelerator, fingerprints: Fingerprints
) -> CacheFile | None:
    """Where the reference's answers are kept: in ``cache_dir``, else in ``checkpoint_dir``, else in memory alone.

    ``depends_on``: the settings that the answers depend on, see :meth:`palu.objective.Objective.depends_on`.
    """
    folder = config.cache_dir or config.checkpoint_dir
    if folder is None:
        return None
    return CacheFile(folder, reference_key(config.objective, depends_on, accelerator, fingerprints))


def reference_key(
    objective: str, depends_on: dict[str, Any], accelerator: Accelerator, fingerprints: Fingerprints
) -> str:
    """SHA-256 of everything that the reference's answers depend on, but for versions of libraries."""
    return digest(
        {
            "format": FORMAT,
            "reference": fingerprints.reference,
            "forget": fingerprints.forget,
            "everyday": fingerprints.everyday,
            "objective": objective,
            "settings": json.dumps(depends_on, sort_keys=True, default=float),
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
