"""Faults planted in a copy of the kernels, each of which the emulation must find: a test of the emulation itself."""

import re
from dataclasses import dataclass
from pathlib import Path

import cases
import compiler
from machine import Finding, Machine

PREFIX = "fault/"
ARCHITECTURE = 900
DISPATCH = "csrc/cuda/common.cuh"
OTHER_DTYPES = re.compile(r"(case Dtype::k(?:Double|Half|BFloat16):) return f\(\S+\);")


@dataclass(frozen=True)
class Fault:
    """One line of a kernel, as it is and with the fault."""

    name: str
    right: str
    wrong: str
    case: str  # which must find it
    kind: str  # as what
    kernels: str = ""  # of a header: the .cu file that is compiled with the fault


# By the file in csrc/cuda. All but prefix_mask's cases are of float32: see run().
FAULTS = {
    "topk.cu": [
        Fault(
            "index-past-tile-end",
            "if (place < 0 || place >= kTile<T>) continue;",
            "if (place < 0 || place > kTile<T>) continue;",
            "topk_mse/tile-edges/float32",
            "race",
        ),
        Fault(
            "tile-too-few",
            "const int64_t tiles = (p.vocab_size + kPack<T> - 1 + kTile<T> - 1)",
            "const int64_t tiles = (p.vocab_size + kTile<T> - 1)",
            "topk_mse/tile-unaligned/float32",
            "wrong result",
        ),
        Fault(
            "no-barrier-after-fill",
            "shared[p] = fill_pack;\n  __syncthreads();",
            "shared[p] = fill_pack;\n  ;",
            "topk_mse/tile-edges/float32",
            "race",
        ),
        Fault(
            "barrier-without-vote",
            "if (__syncthreads_or(repeated)) {",
            "if (repeated) {",
            "topk_mse/repeats/float32",
            "race",
        ),
        Fault(
            "no-barrier-after-repeats",
            "tile[entry] = from_acc<T>(shift + scale * sum);\n      }\n    }\n    __syncthreads();",
            "tile[entry] = from_acc<T>(shift + scale * sum);\n      }\n    }\n    ;",
            "topk_mse/repeats/float32",
            "race",
        ),
        Fault(
            "atomic-in-two-steps",
            "mine = atomicAnd(&repeats[place / 32], ~bit) & bit;",
            "mine = repeats[place / 32] & bit; repeats[place / 32] &= ~bit;",
            "topk_mse/repeats/float32",
            "race",
        ),
        Fault(
            "index-not-read-again",
            "if (k > kKept * kBlock) load_index",
            "if (false) load_index",
            "topk_mse/reread-index/float32",
            "wrong result",
        ),
    ],
    "common.cuh": [
        Fault(
            "slot-nobody-wrote",
            "lane < blockDim.x / 32 ? warp_result[lane]",
            "lane <= blockDim.x / 32 ? warp_result[lane]",
            "cross_entropy_/one-block/float32",
            "uninitialised",
            "softmax_loss.cu",
        ),
        Fault(
            "no-barrier-in-reduction",
            "if (lane == 0) warp_result[warp] = x;\n  __syncthreads();",
            "if (lane == 0) warp_result[warp] = x;\n  ;",
            "cross_entropy_/one-block/float32",
            "uninitialised",
            "softmax_loss.cu",
        ),
        Fault(
            "no-barrier-between-reductions",
            "__syncthreads();  // the next reduction writes warp_result",
            ";",
            "topk_mse/repeats/float32",
            "race",
            "topk.cu",
        ),
        Fault(
            "no-cluster-barrier-before",
            "if (threadIdx.x == 0) block_result = x;\n  cluster.sync();",
            "if (threadIdx.x == 0) block_result = x;\n  ;",
            "cross_entropy_/2-blocks/float32",
            "uninitialised",
            "softmax_loss.cu",
        ),
        Fault(
            "no-cluster-barrier-after",
            "cluster.sync();  // no block overwrites its result, or leaves, while another reads it",
            ";",
            "cross_entropy_/2-blocks/float32",
            "shared",
            "softmax_loss.cu",
        ),
        Fault(
            "lane-missing-in-shuffle",
            "lanes /= 2) x = op(x, __shfl_xor_sync(kWarpMask, x, lanes));",
            "lanes /= 2) if (threadIdx.x % 32 != 31) x = op(x, __shfl_xor_sync(kWarpMask, x, lanes));",
            "cross_entropy_/one-block/float32",
            "deadlock",
            "softmax_loss.cu",
        ),
        Fault(
            "reduction-stops-early",
            "lanes = 16; lanes > 0",
            "lanes = 16; lanes > 1",
            "cross_entropy_/one-block/float32",
            "wrong result",
            "softmax_loss.cu",
        ),
        Fault(
            "write-into-the-gap",
            "if (at >= 0 && at < size) row[at] =",
            "if (at >= 0) row[at] =",
            "cross_entropy_/within-a-pack/float32",
            "out of bounds",
            "softmax_loss.cu",
        ),
        Fault(
            "read-before-the-row",
            "at >= 0 && at < size ? row[at] : fill",
            "at < size ? row[at] : fill",
            "cross_entropy_/within-a-pack/float32",
            "out of bounds",
            "softmax_loss.cu",
        ),
    ],
    "softmax_loss.cu": [
        Fault(
            "maximum-not-raised",
            "part.raise(max_of<T>(packs));",
            "part.max = fmax(part.max, max_of<T>(packs));",
            "cross_entropy_/second-round/float32",
            "wrong result",
        ),
        Fault(
            "label-not-checked",
            'label >= 0 && label < vocab_size && "palu::cross_entropy_',
            'label >= 0 && "palu::cross_entropy_',
            "out_of_range/cross_entropy_-past/float32",
            "out of bounds",
        ),
    ],
    "prefix_mask.cu": [
        Fault(
            "span-forgets-its-beginning",
            "open = others ? __clz(others) : open + 32;",
            "open = others ? __clz(others) : 32;",
            "prefix_mask/open-span",
            "wrong result",
        ),
        Fault(
            "write-past-the-row",
            "if (t < length) mask[t]",
            "mask[t]",
            "prefix_mask/one-label",
            "out of bounds",
        ),
    ],
    "linear_topk_backward.cu": [
        Fault(
            "index-past-k",
            "const int64_t at = j < end ? index[j] : 0;",
            "const int64_t at = index[j];",
            "linear_topk_mse/single/float32",
            "out of bounds",
        ),
    ],
    "linear_topk.cu": [
        Fault(
            "true-token-counted",
            "if (index[j] != true_token) f(slope[j]);",
            "if (j != 0) f(slope[j]);",
            "linear_topk_unlikelihood/any/float32",
            "wrong result",
        ),
        Fault(
            "true-logit-read-late",
            "(true_logit - largest) - log(mass)",
            "(fmax(true_logit, slope[0]) - largest) - log(mass)",
            "linear_topk_unlikelihood/any/float32",
            "race",
        ),
    ],
}


def names() -> list[str]:
    """Return the names of all faults, as cases."""
    return [PREFIX + fault.name for faults in FAULTS.values() for fault in faults]


def check_name(name: str) -> None:
    """Raise ValueError, with what would do, unless a fault has this name."""
    if name not in names():
        raise ValueError(f"{name!r} is no fault; there are\n  " + "\n  ".join(names()))


def run(name: str, folder: Path) -> tuple[str, list[Finding]]:
    """Compile the kernels with one fault, for float32 alone, and run its case.

    Returns as what and where the fault was found, and what is wrong with the emulation.
    """
    file, fault = next((file, one) for file, faults in FAULTS.items() for one in faults if PREFIX + one.name == name)
    path = f"csrc/cuda/{file}"
    texts = compiler.read_sources()
    times = texts[path].count(fault.right)
    if times != 1:
        details = f"{path} has this {times} times, not once: {fault.right}"
        return "", [Finding("a fault that cannot be planted", fault.name, ARCHITECTURE, details)]
    texts[path] = texts[path].replace(fault.right, fault.wrong)
    texts[DISPATCH] = OTHER_DTYPES.sub(r"\1 return;", texts[DISPATCH])
    library = compiler.build_changed(folder, ARCHITECTURE, f"csrc/cuda/{fault.kernels or file}", texts)
    machine = Machine(library, ARCHITECTURE)
    outcome = machine.run(cases.make(fault.case), cases.seed_of(fault.case))
    machine.close()
    found = [f"{finding.kind} at {finding.place or finding.details}" for finding in outcome.findings]
    as_expected = [text for text in found if text.startswith(f"{fault.kind} at ")]
    if as_expected:
        return as_expected[0], []
    details = f"{fault.case} must find {fault.kind!r} in {path} with `{fault.wrong}`; found: {found or 'nothing'}"
    return "", [Finding("a planted fault that is not found", fault.name, ARCHITECTURE, details)]
