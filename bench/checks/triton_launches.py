"""Launch every op's Triton kernels without a GPU: compiled for sm_90, on a stub of CUDA's driver (driver_stub.py).

    python -m rlhf_fast.bench.checks.triton_launches [OP ...] [--sizes 2]

The interpreter takes another way to a kernel than a GPU does, and compilation ahead of time (triton_resources.py)
leaves out the binding of arguments. Here Triton's own driver class binds the arguments, compiles the kernel, loads and
launches it, at the ops' small sizes in float32 and bfloat16; nothing is computed. Triton needs gcc or clang for that.
The exit status is 1 where a launch fails, and, at all sizes, where a kernel of kernels/triton/ is launched by no op.

Another version of Triton: `pip install --no-deps --target FOLDER triton==3.6.0`, then the same command with FOLDER
first in PYTHONPATH.
"""

import argparse
import collections
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from rlhf_fast.bench.checks import driver_stub
from rlhf_fast.bench.checks.triton_resources import (
    KERNELS,
    NUM_SMS,
    check_names,
    file_stem,
    has_kernels,
    scale_gradients,
)
from rlhf_fast.kernels._op import OPS
from rlhf_fast.kernels.triton import _head, launch

SM_ARCH = 90
MIN_16_BIT_WORK = _head.MIN_16_BIT_WORK
MORE_SIZES = {"ppo_advantages": [{"B": 4, "T": 16384}]}  # few long rows, which are split among programs


class Outcome(NamedTuple):
    """Launches of an op in one dtype: how often each kernel was launched, what failed, and how long it took."""

    title: str
    launches: collections.Counter[str]
    faults: list[str]
    seconds: float


def activate(folder: Path) -> None:
    """Make Triton compile for an H100 and launch on the stub, which is built in `folder`."""
    driver_stub.load(folder)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: divmod(SM_ARCH, 10)
    stub = CudaDriver()
    stub.get_current_stream = lambda device=None: 0
    driver.set_active(stub)
    launch.num_sms, launch.sm_arch = lambda x: NUM_SMS, lambda x: SM_ARCH


def kernel_name(kernel) -> str:
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def kernel_names() -> set[str]:
    """Return the kernels of kernels/triton/. By the naming law a kernel's name ends so."""
    return {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }


def launch_op(task: tuple[str, torch.dtype, int]) -> Outcome:
    """Call an op's launcher at its small sizes."""
    name, dtype, num_sizes = task
    op, start = OPS[name], time.perf_counter()
    outcome = Outcome(f"{name} {str(dtype)[6:]}", collections.Counter(), [], 0.0)
    run = launch.run

    def counted(kernel, grid, *args, **meta):
        run(kernel, grid, *args, **meta)
        outcome.launches[kernel_name(kernel)] += all(grid)

    launch.run = counted
    try:
        launcher = getattr(import_module(f"rlhf_fast.kernels.triton.{file_stem(op)}"), name)
        for i, size in enumerate(op.small_sizes[: num_sizes or None] + MORE_SIZES.get(name, [])):
            _head.MIN_16_BIT_WORK = 0 if i % 2 else MIN_16_BIT_WORK  # gradients of a head by 16-bit products, and not
            try:
                launcher(*op.normalized(*op.make_inputs(device="cpu", dtype=dtype, **size)))
            except Exception as error:  # one size's fault hides no other's
                outcome.faults.append(f"{outcome.title} {size}: {describe(error)}")
        if name == "linear_cross_entropy":  # backward passes, its own and those of PPO's losses, launch more
            scale_gradients(dtype, "cpu")
    finally:
        launch.run = run
    return outcome._replace(seconds=time.perf_counter() - start)


def describe(error: BaseException) -> str:
    """Return the class and the last line of an error and of its first cause, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    texts = []
    for one in {id(x): x for x in (chain[0], chain[-1])}.values():
        lines = [line for line in str(one).splitlines() if line.strip(" ^")] or [""]
        texts.append(f"{type(one).__name__}: {lines[-1].strip()}")
    return f"{', by '.join(texts)} ({place.filename}:{place.lineno})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--sizes", type=int, default=0, help="so many small sizes of each op (default: all)")
    options = parser.parse_args()
    check_names(parser, options.op)
    names = [op.name for op in OPS.values() if has_kernels(op) and {op.name, file_stem(op)} & {*(options.op or OPS)}]
    names.sort(key=lambda name: not name.startswith("linear"))  # the longest first
    tasks = [(name, dtype, options.sizes) for name in names for dtype in (torch.bfloat16, torch.float32)]
    launches, faults = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            activate(Path(folder))
        except FileNotFoundError as error:
            parser.error(str(error))
        with multiprocessing.get_context("fork").Pool(min(os.cpu_count(), len(tasks))) as pool:
            for one in pool.imap_unordered(launch_op, tasks):
                launches += one.launches
                faults += one.faults
                print(f"{one.title}: {one.launches.total()} launches, {one.seconds:.1f} s", flush=True)
                for fault in one.faults:
                    print(f"FAULT {fault}", file=sys.stderr, flush=True)
    is_whole = not options.op and not options.sizes
    missing = kernel_names() - launches.keys() if is_whole else set()
    if missing:
        print(f"FAULT launched by no op: {', '.join(sorted(missing))}", file=sys.stderr)
    print(f"Triton {triton.__version__}: {len(launches)} kernels, {launches.total()} launches, {len(faults)} faults")
    return 1 if faults or missing else 0


if __name__ == "__main__":
    sys.exit(main())
