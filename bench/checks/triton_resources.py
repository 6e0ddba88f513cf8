"""Resources of the Triton kernels on NVIDIA GPUs, without one: they are compiled ahead of time for sm_80 and sm_90.

    python -m rlhf_fast.bench.checks.triton_resources [OP ...] [--save bench/results/triton_resources.md]

Every op's Triton launcher is called on its `large_sizes`, in float32 and bfloat16, with fake CUDA tensors. The launches
are recorded instead of run, and each is compiled as Triton would compile it. The exit status is 1 where

- a kernel spills registers or needs more shared memory than the GPU has,
- a kernel multiplies bfloat16 without the GPU's best tensor-core instruction (on sm_90 that takes at least 64 rows),
- a kernel loads aligned rows without 16-byte loads,
- a launcher waits for the device.

A kernel should have 16-byte loads where Triton, from the alignment of addresses and strides, gives each thread at least
16 consecutive bytes of a tile: if it has none, a mask splits them. An op without `large_sizes` is compiled at small
ones, which are too small for such loads.

Another version of Triton, of which only compilation, shared memory and spills are checked:

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER:. python -m rlhf_fast.bench.checks.triton_resources --spills
"""

import argparse
import collections
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("triton_resources: TRITON_INTERPRET=1 is set, which leaves nothing to compile; unset it")

import torch
import triton
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlhf_fast import ops
from rlhf_fast.bench.checks import sass
from rlhf_fast.kernels._op import OPS, Op
from rlhf_fast.kernels.triton import launch
from rlhf_fast.kernels.triton._scale import scale_in_place, scale_two_in_place

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # compute capability: bytes that a block can have
NUM_SMS = 132  # of an H100, for launchers that depend on it
KERNELS = Path(launch.__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
MIN_HGMMA_ROWS = 64  # rows of a product that sm_90's own instruction takes

ArgumentPath = tuple[int, ...]


class Launch(NamedTuple):
    """A kernel as a launch would compile it. Paths are those of triton.compiler.ASTSource: the index of a parameter,
    then the indices of fields within it."""

    kernel: object
    signature: tuple[tuple[str, object], ...]  # parameter -> its type, or a tuple of the types of its fields
    constants: tuple[tuple[ArgumentPath, object], ...]
    aligned: tuple[ArgumentPath, ...]  # pointers and integers that are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    @property
    def constexprs(self) -> dict[str, object]:
        """The tl.constexpr parameters that are not None."""
        names = {(i,): p.name for i, p in enumerate(self.kernel.params) if p.is_constexpr}
        return {names[path]: value for path, value in self.constants if path in names and value is not None}


class Resources(NamedTuple):
    """Resources of a compiled kernel: registers per thread, bytes of shared memory, instructions of a kind."""

    registers: int
    shared: int
    spills: int
    vector_loads: int
    loads: int
    products: int
    product_instruction: str  # expected for the products of 16-bit numbers that the kernel has, "" without any
    aligned_loads: int  # loads of a tile in which each thread has 16 consecutive bytes or more


def describe_launch(kernel, args: tuple, meta: dict) -> Launch:
    """Return the launch as Triton specialises it: None and integers of 1 are constants, and pointers and integers that
    are multiples of 16 are known to be. Fields of a NamedTuple are specialised as parameters are."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: meta[name] for name in kernel.arg_names if name in meta}
    options = tuple(sorted((k, v) for k, v in meta.items() if k not in kernel.arg_names))
    constants, aligned = [], []

    def specialize(value, path: ArgumentPath, is_constexpr: bool, is_specialized: bool):
        if is_constexpr or value is None or (is_specialized and type(value) is int and value == 1):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, tuple):
            types = [specialize(x, (*path, i), False, True) for i, x in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(path)
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, bool):
            return "i1"
        if isinstance(value, int):
            if value % 16 == 0 and is_specialized:
                aligned.append(path)
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "fp32"

    signature = []
    for i, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, parameter.default)
        kind = specialize(value, (i,), parameter.is_constexpr, not parameter.do_not_specialize)
        signature.append((parameter.name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), options)


def as_if_on_gpu(x: torch.Tensor) -> torch.Tensor:
    """Return a fake CUDA tensor of x's shape and strides. A launcher that reads a value of it raises."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def op_launches(
    op: Op, size: dict, dtype: torch.dtype, archs: Iterable[int] = tuple(SHARED_MEMORY)
) -> Iterator[tuple[Launch, int]]:
    """Yield the launches of one call of the op's Triton launcher, for a GPU of each compute capability."""
    args = op.normalized(*op.make_inputs(device="cpu", dtype=dtype, **size))
    module = import_module(f"rlhf_fast.kernels.triton.{file_stem(op)}")
    launcher = getattr(module, op.name)
    for arch in archs:
        for found in record_launches(lambda: launcher(*tree_map_only(torch.Tensor, as_if_on_gpu, args)), arch):
            yield found, arch


def file_stem(op: Op) -> str:
    """Return the name of the op's file, which kernels/ and kernels/triton/ share."""
    return Path(op.reference.__code__.co_filename).stem


def has_kernels(op: Op) -> bool:
    """Return whether the op has a file in kernels/triton/."""
    return (KERNELS / f"{file_stem(op)}.py").is_file()


def record_launches(call: Callable[[], object], arch: int) -> list[Launch]:
    """Return the launches that a call on fake CUDA tensors makes. None of them is run."""
    recorded: list[Launch] = []

    def record(kernel, grid, *args, **meta):
        if all(grid):
            recorded.append(describe_launch(kernel, args, meta))

    before = launch.run, launch.num_sms, launch.sm_arch
    launch.run, launch.num_sms, launch.sm_arch = record, lambda _: NUM_SMS, lambda _: arch
    try:
        with FakeTensorMode(), torch.no_grad():
            call()
    finally:
        launch.run, launch.num_sms, launch.sm_arch = before
    return recorded


def count_aligned_loads(ttgir: str) -> int:
    """Return the number of loads whose layout gives a thread at least 16 consecutive bytes."""
    layouts = {
        name: max(map(int, sizes.split(",")))
        for name, sizes in re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir)
    }
    loads = re.findall(
        r"(?:tt\.load|ttg\.async_copy_global_to_local) .*?: tensor<[\dx]+!tt\.ptr<[a-z]+(\d+)>, (#\w+)>", ttgir
    )
    return sum(layouts.get(layout, 0) * max(int(bits), 8) >= 128 for bits, layout in loads)


def compile_launch(found: Launch, target: GPUTarget):
    """Return Triton's compiled kernel of a launch."""
    source = ASTSource(
        fn=found.kernel,
        signature=dict(found.signature),
        constexprs=dict(found.constants),
        attrs={path: [["tt.divisibility", 16]] for path in found.aligned},
    )
    return triton.compile(source, target=target, options=dict(found.options))


def measure(found: Launch, arch: int) -> Resources:
    """Compile a launch for an NVIDIA GPU of that compute capability and return the kernel's resources."""
    compiled = compile_launch(found, GPUTarget("cuda", arch, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True).stdout
    rows = [int(x) for x in re.findall(r"tt\.dot .*: tensor<(\d+)x\d+xb?f16", compiled.asm["ttir"])]
    instruction = ""
    if rows:
        instruction = "HGMMA" if arch >= 90 and max(rows) >= MIN_HGMMA_ROWS else "HMMA"
    count = collections.Counter(re.findall(r"\b(HMMA|HGMMA)\b", code))
    vector_loads, loads = sass.loads(code)
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        spills=sum(sass.spills(code)),
        vector_loads=vector_loads,
        loads=loads,
        products=count[instruction] if instruction else count.total(),
        product_instruction=instruction,
        aligned_loads=count_aligned_loads(compiled.asm["ttgir"]),
    )


def find_faults(arch: int, used: Resources, is_small: bool = False, only_spills: bool = False) -> Iterator[str]:
    """Yield what is wrong with a kernel. is_small: it was compiled at small sizes."""
    if used.spills:
        yield f"{used.spills} spills"
    if used.shared > SHARED_MEMORY[arch]:
        yield f"{used.shared} bytes of shared memory"
    if only_spills:
        return
    if used.product_instruction and not used.products:
        yield f"no {used.product_instruction}"
    if used.aligned_loads and not used.vector_loads and not is_small:
        yield f"none of {used.aligned_loads} loads of aligned rows has 16 bytes"


def collect(names: list[str], archs: Iterable[int]) -> dict[tuple[Launch, int], str]:
    """Return the launches of the ops named, or of all, on each GPU, with the first op and dtype that makes each."""
    found: dict[tuple[Launch, int], str] = {}
    for op in sorted(OPS.values(), key=lambda op: not op.large_sizes):
        stem = file_stem(op)
        is_wanted = not names or op.name in names or stem in names
        if not is_wanted or not has_kernels(op):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for size in op.large_sizes or op.small_sizes[1:3]:
                for launch_and_arch in op_launches(op, size, dtype, archs):
                    first = f"{op.name}, {str(dtype)[6:]}" + ("" if op.large_sizes else SMALL)
                    found.setdefault(launch_and_arch, first)
        if op.name == "linear_cross_entropy":  # backward passes, its own and those of PPO's losses, launch more
            for dtype, arch in itertools.product((torch.float32, torch.bfloat16), archs):
                for one in record_launches(functools.partial(scale_gradients, dtype), arch):
                    found.setdefault((one, arch), f"{op.name}'s backward pass, {str(dtype)[6:]}")
    return found


def scale_gradients(dtype: torch.dtype, device: str = "cuda") -> None:
    """Scale the gradient of a weight, and those of two inputs of one size, by the gradients of losses."""
    gradient = torch.empty((4096, 768), dtype=dtype, device=device)
    factor = torch.empty((), dtype=torch.float32, device=device)
    scale_in_place(gradient, factor)
    scale_two_in_place([gradient, gradient], [factor, factor])


_LAUNCHES: list[tuple[Launch, int]] = []  # of the worker processes, which are forked with it


def _measure_one(index: int) -> tuple[int, Resources | str]:
    try:
        return index, measure(*_LAUNCHES[index])
    except Exception as error:  # reported as that kernel's fault, so that the others are still measured
        return index, f"{type(error).__name__}: {str(error)[-300:]}"


def table_row(found: Launch, arch: int, first: str, used: Resources) -> str:
    num_warps = dict(found.options).get("num_warps", 4)
    constants = ", ".join(f"{name}={value}" for name, value in found.constexprs.items())
    return (
        f"| {found.name} | {first} | {constants} | sm_{arch} | {num_warps} | {used.registers} |"
        f" {used.shared / 1024:.0f} | {used.spills} | {used.vector_loads} / {used.loads} | {used.products or ''} |"
    )


def check_names(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """End the program with one sentence where a name is neither an op's nor its file's."""
    unknown = set(names) - {name for op in OPS.values() for name in (op.name, file_stem(op))}
    if unknown:
        parser.error(f"there is no op {', '.join(sorted(unknown))}; there are: {', '.join(sorted(ops.__all__))}")


def main() -> int:
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED_MEMORY), help="only for these GPUs")
    parser.add_argument("--spills", action="store_true", help="look neither at products nor at the widths of loads")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args()
    check_names(parser, options.op)
    found = collect(options.op, options.arch or list(SHARED_MEMORY))
    _LAUNCHES.extend(found)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = dict(pool.imap_unordered(_measure_one, range(len(_LAUNCHES))))
    lines, faults = [HEADER], []
    for i, (one, arch) in enumerate(_LAUNCHES):
        used, first = results[i], found[one, arch]
        kernel = f"{one.name} ({first}) on sm_{arch}"
        if isinstance(used, str):
            faults.append(f"{kernel}: {used}")
            continue
        lines.append(table_row(one, arch, first, used))
        faults += [f"{kernel}: {fault}" for fault in find_faults(arch, used, first.endswith(SMALL), options.spills)]
    table = "\n".join(lines)
    print(table)
    if options.save:
        options.save.write_text(f"{title}\n\nTriton {triton.__version__}. `{COMMAND}`\n\n{table}\n", encoding="utf-8")
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


SMALL = ", small"
COMMAND = "python -m rlhf_fast.bench.checks.triton_resources --save bench/results/triton_resources.md"
HEADER = """\
| kernel | first seen in | constants | for | warps | registers | shared, KiB | spills | 16-byte loads | products |
|---|---|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    sys.exit(main())
