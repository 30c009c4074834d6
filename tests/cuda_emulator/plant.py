"""Faults planted in a copy of the kernels, each of which the emulation must find: a test of the emulation itself."""

from dataclasses import dataclass
from pathlib import Path

import cases
import compiler
from machine import Finding, Machine

PREFIX = "fault/"
ARCHITECTURE = 900


@dataclass(frozen=True)
class Fault:
    """One line of a kernel, as it is and with the fault."""

    name: str
    file: str  # in csrc/cuda
    right: str
    wrong: str
    kernels: str  # the .cu file that is compiled with the fault
    case: str  # which must find it
    kind: str  # as what


FAULTS = [
    Fault(
        "index-past-tile-end",
        "topk.cu",
        "if (place < 0 || place >= kTile<T>) continue;",
        "if (place < 0 || place > kTile<T>) continue;",
        "topk.cu",
        "topk_mse/tile-edges/float32",
        "race",
    ),
    Fault(
        "tile-too-few",
        "topk.cu",
        "const int64_t tiles = (p.vocab_size + kPack<T> - 1 + kTile<T> - 1)",
        "const int64_t tiles = (p.vocab_size + kTile<T> - 1)",
        "topk.cu",
        "topk_mse/tile-unaligned/float32",
        "wrong result",
    ),
    Fault(
        "no-barrier-after-fill",
        "topk.cu",
        "shared[p] = fill_pack;\n  __syncthreads();",
        "shared[p] = fill_pack;\n  ;",
        "topk.cu",
        "topk_mse/tile-edges/float32",
        "race",
    ),
    Fault(
        "barrier-without-vote",
        "topk.cu",
        "if (__syncthreads_or(repeated)) {",
        "if (repeated) {",
        "topk.cu",
        "topk_mse/repeats/float32",
        "race",
    ),
    Fault(
        "no-barrier-after-repeats",
        "topk.cu",
        "tile[entry] = from_acc<T>(shift + scale * sum);\n      }\n    }\n    __syncthreads();",
        "tile[entry] = from_acc<T>(shift + scale * sum);\n      }\n    }\n    ;",
        "topk.cu",
        "topk_mse/repeats/float32",
        "race",
    ),
    Fault(
        "atomic-in-two-steps",
        "topk.cu",
        "mine = atomicAnd(&repeats[place / 32], ~bit) & bit;",
        "mine = repeats[place / 32] & bit; repeats[place / 32] &= ~bit;",
        "topk.cu",
        "topk_mse/repeats/float32",
        "race",
    ),
    Fault(
        "index-not-read-again",
        "topk.cu",
        "if (k > kKept * kBlock) load_index",
        "if (false) load_index",
        "topk.cu",
        "topk_mse/reread-index/float32",
        "wrong result",
    ),
    Fault(
        "slot-nobody-wrote",
        "common.cuh",
        "lane < blockDim.x / 32 ? warp_result[lane]",
        "lane <= blockDim.x / 32 ? warp_result[lane]",
        "softmax_loss.cu",
        "cross_entropy_/one-block/float32",
        "uninitialised",
    ),
    Fault(
        "no-barrier-in-reduction",
        "common.cuh",
        "if (lane == 0) warp_result[warp] = x;\n  __syncthreads();",
        "if (lane == 0) warp_result[warp] = x;\n  ;",
        "softmax_loss.cu",
        "cross_entropy_/one-block/float32",
        "uninitialised",
    ),
    Fault(
        "no-barrier-between-reductions",
        "common.cuh",
        "__syncthreads();  // the next reduction writes warp_result",
        ";",
        "topk.cu",
        "topk_mse/repeats/float32",
        "race",
    ),
    Fault(
        "no-cluster-barrier-before",
        "common.cuh",
        "if (threadIdx.x == 0) block_result = x;\n  cluster.sync();",
        "if (threadIdx.x == 0) block_result = x;\n  ;",
        "softmax_loss.cu",
        "cross_entropy_/2-blocks/float32",
        "uninitialised",
    ),
    Fault(
        "no-cluster-barrier-after",
        "common.cuh",
        "cluster.sync();  // no block overwrites its result, or leaves, while another reads it",
        ";",
        "softmax_loss.cu",
        "cross_entropy_/2-blocks/float32",
        "shared",
    ),
    Fault(
        "lane-missing-in-shuffle",
        "common.cuh",
        "lanes /= 2) x = op(x, __shfl_xor_sync(kWarpMask, x, lanes));",
        "lanes /= 2) if (threadIdx.x % 32 != 31) x = op(x, __shfl_xor_sync(kWarpMask, x, lanes));",
        "softmax_loss.cu",
        "cross_entropy_/one-block/float32",
        "deadlock",
    ),
    Fault(
        "reduction-stops-early",
        "common.cuh",
        "lanes = 16; lanes > 0",
        "lanes = 16; lanes > 1",
        "softmax_loss.cu",
        "cross_entropy_/one-block/float32",
        "wrong result",
    ),
    Fault(
        "write-into-the-gap",
        "common.cuh",
        "if (at >= 0 && at < size) row[at] =",
        "if (at >= 0) row[at] =",
        "softmax_loss.cu",
        "cross_entropy_/within-a-pack/float32",
        "out of bounds",
    ),
    Fault(
        "read-before-the-row",
        "common.cuh",
        "at >= 0 && at < size ? row[at] : fill",
        "at < size ? row[at] : fill",
        "softmax_loss.cu",
        "cross_entropy_/within-a-pack/float32",
        "out of bounds",
    ),
    Fault(
        "maximum-not-raised",
        "softmax_loss.cu",
        "part.raise(max_of<T>(packs));",
        "part.max = fmax(part.max, max_of<T>(packs));",
        "softmax_loss.cu",
        "cross_entropy_/second-round/float32",
        "wrong result",
    ),
    Fault(
        "label-not-checked",
        "softmax_loss.cu",
        'label >= 0 && label < vocab_size && "palu::cross_entropy_',
        'label >= 0 && "palu::cross_entropy_',
        "softmax_loss.cu",
        "out_of_range/cross_entropy_-past/float32",
        "out of bounds",
    ),
    Fault(
        "span-forgets-its-beginning",
        "prefix_mask.cu",
        "open = others ? __clz(others) : open + 32;",
        "open = others ? __clz(others) : 32;",
        "prefix_mask.cu",
        "prefix_mask/open-span",
        "wrong result",
    ),
    Fault(
        "write-past-the-row",
        "prefix_mask.cu",
        "if (t < length) mask[t]",
        "mask[t]",
        "prefix_mask.cu",
        "prefix_mask/one-label",
        "out of bounds",
    ),
    Fault(
        "index-past-k",
        "linear_topk_backward.cu",
        "const int64_t at = j < end ? index[j] : 0;",
        "const int64_t at = index[j];",
        "linear_topk_backward.cu",
        "linear_topk_mse/single/float32",
        "out of bounds",
    ),
    Fault(
        "true-token-counted",
        "linear_topk.cu",
        "if (index[j] != true_token) f(slope[j]);",
        "if (j != 0) f(slope[j]);",
        "linear_topk.cu",
        "linear_topk_unlikelihood/any/float32",
        "wrong result",
    ),
    Fault(
        "true-logit-read-late",
        "linear_topk.cu",
        "(true_logit - largest) - log(mass)",
        "(fmax(true_logit, slope[0]) - largest) - log(mass)",
        "linear_topk.cu",
        "linear_topk_unlikelihood/any/float32",
        "race",
    ),
]


def names() -> list[str]:
    """Return the names of all faults, as cases."""
    return [PREFIX + fault.name for fault in FAULTS]


def check_name(name: str) -> None:
    """Raise ValueError, with what would do, unless a fault has this name."""
    if name not in names():
        raise ValueError(f"{name!r} is no fault; there are\n  " + "\n  ".join(names()))


def run(name: str, folder: Path) -> tuple[str, list[Finding]]:
    """Compile the kernels with one fault and run its case.

    Returns as what and where the fault was found, and what is wrong with the emulation.
    """
    fault = next(fault for fault in FAULTS if PREFIX + fault.name == name)
    path = f"csrc/cuda/{fault.file}"
    texts = compiler.read_sources()
    times = texts[path].count(fault.right)
    if times != 1:
        details = f"{path} has this {times} times, not once: {fault.right}"
        return "", [Finding("a fault that cannot be planted", fault.name, ARCHITECTURE, details)]
    texts[path] = texts[path].replace(fault.right, fault.wrong)
    library = compiler.build_changed(folder, ARCHITECTURE, f"csrc/cuda/{fault.kernels}", texts)
    machine = Machine(library, ARCHITECTURE)
    outcome = machine.run(cases.make(fault.case), cases.seed_of(fault.case))
    machine.close()
    found = [f"{finding.kind} at {finding.place or finding.details}" for finding in outcome.findings]
    as_expected = [text for text in found if text.startswith(f"{fault.kind} at ")]
    if as_expected:
        return as_expected[0], []
    details = f"{fault.case} must find {fault.kind!r} in {path} with `{fault.wrong}`; found: {found or 'nothing'}"
    return "", [Finding("a planted fault that is not found", fault.name, ARCHITECTURE, details)]
