"""Time candidates in turns, read the memory of this process, and report and keep what was measured."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where a command runs that has no --device


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cold_seconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Time calls on a GPU whose cache holds nothing of their inputs: what fills it in between is not timed."""
    other = torch.empty(2**28, dtype=torch.int8, device=device)  # five times the cache of an H100
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in pairs:
        other.zero_()
        begin.record()
        run()
        end.record()
    synchronize(device)
    return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3 / calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    cold_calls: int = 0,
) -> dict[str, dict[str, float]]:
    """Time each candidate `repeats` times, in turns, so that all of them meet the same disturbances.

    `cold_calls`: on a GPU a timing is the mean of so many calls in a row, each with the GPU's cache emptied before it.
    Returns, for each candidate, the median and the quartiles of a call in milliseconds.
    """
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            synchronize(device)
            if cold_calls and device.type == "cuda":
                seconds[name].append(cold_seconds(run, device, cold_calls))
                continue
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    result = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles([1e3 * value for value in values], n=4, method="inclusive")
        result[name] = {"median_ms": round(median, 3), "q1_ms": round(low, 3), "q3_ms": round(high, 3)}
    return result


def copy_bandwidth(device: torch.device) -> float:
    """Measure memory bandwidth: bytes read and written per millisecond by a copy of a tensor that no cache holds."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.zeros_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, warmup=2, repeats=9)
    return 2 * source.nbytes / times["copy"]["median_ms"]


def status(name: str) -> int:
    """Read a figure of /proc/self/status (Linux), in bytes: "VmRSS", "VmHWM", ..."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def reset_peak() -> None:
    """Begin the count of :func:`peak`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Return the highest memory since :func:`reset_peak`, in bytes: torch's on CUDA, else the resident set."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status("VmHWM")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe device and versions, on which a result depends."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "device": device.type,
        "device_name": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def report(
    benchmark: str, rows: list[dict[str, Any]], device: torch.device, details: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Print the rows as a table, then everything, `details` included, as one JSON line; return that."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    record = {"benchmark": benchmark, **machine(device), **(details or {}), "results": rows}
    print(json.dumps(record))
    return record


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON: floats to four digits, a line for each field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(_rounded(value))}" for name, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], texts: int = 1) -> str:
    """Format a table as Markdown; the first ``texts`` columns are aligned left, the others right."""
    rule = ["|---"] * texts + ["|---:"] * (len(columns) - texts)
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "".join(rule) + "|", *lines[1:]]) + "\n"
