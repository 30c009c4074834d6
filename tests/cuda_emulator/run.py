"""Run the CUDA kernels of palu on an emulated GPU, beside their plain-torch twins in float64.

python tests/cuda_emulator/run.py                                # fixed and random cases of every op, planted faults
python tests/cuda_emulator/run.py --only kl,topk --cases 2000    # many random cases of some ops
python tests/cuda_emulator/run.py --case topk_mse/repeats/float16 --arch 900

Needs g++ 12 or later, no GPU and no CUDA. Exits 1 if there is any finding. README.md says what is checked.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for helpers

import cases
import compiler
import plant
import torch
from machine import Finding, Machine, Outcome
from report import Done, Report

machines: dict[int, Machine] = {}  # of this process, by architecture
folder = Path()  # of what is compiled


def start(build: Path, libraries: dict[int, Path]) -> None:
    """Prepare this process for cases."""
    global folder
    folder = build
    torch.set_num_threads(1)
    machines.update({architecture: Machine(path, architecture) for architecture, path in libraries.items()})


def run(name: str) -> Done:
    """Run a case on every architecture, or a planted fault."""
    done = Done(name, cases.seed_of(name), "")
    try:
        if name.startswith(plant.PREFIX):
            done.text, findings = plant.run(name, folder)
            done.outcomes = [Outcome(findings)]
        else:
            case = cases.make(name)
            done.text = case.text
            done.outcomes = [machine.run(case, done.seed) for machine in machines.values()]
            done.instances = {architecture: machine.instances() for architecture, machine in machines.items()}
    except Exception:
        done.outcomes = [Outcome([Finding("error", "", min(machines), traceback.format_exc())])]
    return done


def run_all(names: list[str], jobs: int, build: Path, libraries: dict[int, Path]) -> Iterator[Done]:
    """Run cases, `jobs` at a time; one alone in this process, where a debugger reaches it."""
    if len(names) == 1:
        start(build, libraries)
        yield run(names[0])
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=start, initargs=(build, libraries)) as pool:
        futures = {pool.submit(run, name): name for name in names}
        waiting = dict.fromkeys(names)
        try:
            for future in as_completed(futures):
                done = future.result()
                del waiting[futures[future]]
                yield done
        except BrokenProcessPool:
            suspects = list(waiting)[: 2 * jobs]
            message = f"one of the next cases, or one beside it, ended its process: {', '.join(suspects)}"
            yield Done(suspects[0], 0, "", [Outcome([Finding("a process died", "", min(libraries), message)])])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3, help="random cases of each op, besides the fixed ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first random case; the next has the next seed")
    parser.add_argument("--only", default="", help="parts of the names of ops, or 'fault', separated by commas")
    parser.add_argument("--case", help="one case alone: op/seed or op/name/dtype; prints what it is, too")
    parser.add_argument("--arch", type=int, nargs="+", default=list(compiler.ARCHITECTURES), help="of __CUDA_ARCH__")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers and cases at a time")
    parser.add_argument("--build", type=Path, default=compiler.ROOT / "build" / "cuda_emulator", help="a folder")
    options = parser.parse_args()
    if options.case:
        op, _, case = options.case.partition("/")
        if f"{op}/" != plant.PREFIX and op not in cases.OPS:
            parser.error(f"--case: no op is called {op!r}; there are {', '.join(cases.OPS)}, and 'fault'")
        known = list(cases.fixed_names(op) if op in cases.OPS else plant.faults())
        if options.case not in known and not (op in cases.OPS and case.isdecimal()):
            parser.error(f"--case: {options.case!r} is none: use OP/SEED, or one of\n  " + "\n  ".join(known))
    for part in filter(None, options.only.split(",")):
        if part != "fault" and not any(part in op for op in cases.OPS):
            parser.error(f"--only: no op has {part!r} in its name; there are {', '.join(cases.OPS)}, and 'fault'")
    return options


def main() -> int:
    """Compile, run, and print what was found."""
    options = parse()
    began = time.perf_counter()
    options.build.mkdir(parents=True, exist_ok=True)
    libraries = compiler.build(options.build, options.arch, options.jobs)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)

    wanted = [part for part in options.only.split(",") if part]
    ops = [op for op in cases.OPS if not wanted or any(part in op for part in wanted)]
    names = [name for name in plant.faults() if not wanted or "fault" in wanted]  # first: they have to be compiled
    names += [name for op in ops for name in cases.fixed_names(op)]
    names += [f"{op}/{options.seed + number}" for op in ops for number in range(options.cases)]
    if options.case:
        names = [options.case]
    report = Report(options.arch)
    for done in run_all(names, options.jobs, options.build, libraries):
        report.add(done)
        if options.case:
            print(done.text)
    print(report.text(complete=not wanted and not options.case))
    print(f"{time.perf_counter() - began:.0f} s")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
