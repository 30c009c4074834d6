"""Plant faults in a copy of the kernels and see whether the driver finds each: a test of the emulation itself.

python tests/cuda_emulator/plant.py . [--cases 25] [--only barrier]
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Every barrier is taken out in turn; these are exchanged: file, what, by what, and the ops to run.
BARRIERS = re.compile(r"__syncthreads\(\);|cluster\.sync\(\);")
EXCHANGES = [
    ("common.cuh", "e >= 0 && e + (U - 1) * step + kPack<T> <= size", "e >= 0 && e + (U - 1) * step < size", ""),
    ("common.cuh", "at >= 0 && at < size ? row[at] : fill", "at < size ? row[at] : fill", ""),
    (
        "common.cuh",
        "if (e >= 0 && e + kPack<T> <= size) {\n    const uint4 bits",
        "if (e + kPack<T> <= size) {\n    const uint4 bits",
        "cross,kl,scale",
    ),
    ("common.cuh", "if (at >= 0 && at < size) row[at] =", "if (at >= 0) row[at] =", "cross,kl,scale"),
    ("common.cuh", "lanes = 16; lanes > 0", "lanes = 16; lanes > 1", ""),
    ("topk_mse.cu", "__syncthreads_or(repeated)", "repeated", "topk"),
    (
        "topk_mse.cu",
        "mine = atomicAnd(&repeats[place / 32], ~bit) & bit;",
        "mine = repeats[place / 32] & bit; repeats[place / 32] &= ~bit;",
        "topk",
    ),
    (
        "topk_mse.cu",
        "if (!(atomicOr(&occurs[place / 32], bit) & bit))",
        "if (!(occurs[place / 32] & bit) || (occurs[place / 32] |= bit, false))",
        "topk",
    ),
    ("topk_mse.cu", "if (k > kKept * kBlock) load_index", "if (false) load_index", "topk"),
    (
        "topk_mse.cu",
        "const int64_t tiles = (p.vocab_size + kPack<T> - 1 + kTile<T> - 1)",
        "const int64_t tiles = (p.vocab_size + kTile<T> - 1)",
        "topk",
    ),
    ("softmax_loss.cu", "part.raise(max_of<T>(packs));", "part.max = fmax(part.max, max_of<T>(packs));", "cross"),
    ("softmax_loss.cu", "moment *= kReverse ? raised_p : raised_q;", "moment *= kReverse ? raised_q : raised_p;", "kl"),
    ("linear_topk_mse.cu", "const int64_t at = j < end ? index[j] : 0;", "const int64_t at = index[j];", "linear"),
    ("linear_topk_mse.cu", "row_stride % kPack<T> == 0 && row_size", "row_size", "linear"),
    ("linear_topk_mse.cu", "if (v > vocab_size) return;", "if (v >= vocab_size) return;", "linear"),
    ("prefix_mask.cu", "open = others ? __clz(others) : open + 32;", "open = others ? __clz(others) : 32;", "prefix"),
    ("prefix_mask.cu", "if (t < length) mask[t]", "mask[t]", "prefix"),
    ("scale.cu", "e < n; e += gridDim.x * kUnroll * step", "e < n - 1; e += gridDim.x * kUnroll * step", "scale"),
]


def faults(sources: Path) -> list[tuple[str, str, str, str]]:
    """File, name, its text with the fault, and the ops to run."""
    planted = []
    for path in sorted(sources.iterdir()):
        text = path.read_text()
        for found in BARRIERS.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            changed = text[: found.start()] + ";" + text[found.end() :]
            planted.append((path.name, f"barrier: {path.name}:{line} without {found[0]}", changed, ""))
    for name, old, new, ops in EXCHANGES:
        text = (sources / name).read_text()
        if old in text:
            what = f"exchange: {name}: {old.splitlines()[0]} -> {new.splitlines()[0]}"
            planted.append((name, what, text.replace(old, new, 1), ops))
        else:
            print(f"not there any more, left out: {name}: {old}")
    return planted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--cases", type=int, default=25)
    parser.add_argument("--only", default="", help="a part of the names of faults")
    options = parser.parse_args()
    missed = tried = 0
    for name, what, text, ops in faults(options.project / "csrc" / "cuda"):
        if options.only not in what:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "project")
            shutil.copytree(options.project / "csrc", copy / "csrc")
            (copy / "palu").mkdir()
            shutil.copy(options.project / "palu" / "eager.py", copy / "palu")
            (copy / "csrc" / "cuda" / name).write_text(text)
            command = [sys.executable, HERE / "drive.py", copy, "--quick", "--arch", "900", "--only", ops]
            command += ["--cases", str(options.cases)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        tried += 1
        found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        missed += not found and done.returncode >= 0
        kinds = sorted({line.split(" | ")[1] for line in found}) or [f"exit {done.returncode}"]
        print("found " if found or done.returncode < 0 else "MISSED", what, "--", ", ".join(kinds), flush=True)
    print(f"{tried - missed} of {tried} faults found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
