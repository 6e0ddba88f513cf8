"""Run every op's kernels once at small sizes and compare them with the reference: the first check on a new GPU.

    python -m rlhf_fast.bench.checks.smoke [--device cuda] [--backend triton] [--op NAME] [--sizes 2] [--processes 8]

Each op and backend is one line, printed as soon as it is known: "ok", or "FAULT" with the first error's place. Kernels
are compiled by several processes at a time. New memory is filled with NaN, which shows outputs that a kernel does not
write. The exit status is 1 where there is a fault.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
import warnings

import torch

from rlhf_fast.bench.compare import first_line, kernels_of
from rlhf_fast.bench.problem import TOLERANCE, Case, Problem
from rlhf_fast.kernels._backends import strict
from rlhf_fast.kernels._op import OPS


def fault_of(case: Case, device: str, backend: str) -> str:
    """Return what is wrong with one case, or an empty string."""
    torch.manual_seed(0)
    try:
        problem = Problem(case, device)
        with strict():
            found = problem.run_once(problem.op.backend(backend), problem.raw)
        return problem.error(found, TOLERANCE[case.dtype])
    except Exception as error:  # one case's fault hides no other's
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{first_line(error)} ({place.filename}:{place.lineno})"


def run(task: tuple[str, str, str, int]) -> tuple[int, str]:
    """Run one op's backend; return the number of faults and the lines to print."""
    device, name, backend, num_sizes = task
    op, start = OPS[name], time.perf_counter()
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.use_deterministic_algorithms(True, warn_only=True)  # this also fills new memory
    cases = [
        Case(op, size, dtype, op.has_gradient_at(size))
        for size in op.small_sizes[: num_sizes or None]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    faults = [f"FAULT {case} {backend}: {fault}" for case in cases if (fault := fault_of(case, device, backend))]
    seconds = time.perf_counter() - start
    lines = faults or [f"ok {name} {backend}: {len(cases)} cases, {seconds:.1f} s"]
    return len(faults), "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", action="append", default=[], help="only these; ops without one are left out")
    parser.add_argument("--op", action="append", default=[], choices=list(OPS), help="only these")
    parser.add_argument("--sizes", type=int, default=0, help="so many small sizes of each op (default: all)")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    tasks = [
        (options.device, op.name, backend, options.sizes)
        for op in OPS.values()
        if not options.op or op.name in options.op
        for backend in options.backend or kernels_of(op, options.device)
        if op.can_run(backend, options.device)
    ]
    if not tasks:
        print(f"smoke: no kernel runs on {options.device}")
        return 1
    num_faults = 0
    with multiprocessing.get_context("spawn").Pool(min(options.processes, len(tasks))) as pool:
        for faults, lines in pool.imap_unordered(run, tasks, chunksize=1):
            num_faults += faults
            print(lines, flush=True)
    print(f"{len(tasks)} kernels of {len({task[1] for task in tasks})} ops, {num_faults} faults")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
