"""What the Triton kernels take of a GPU, found without one: compiled ahead of time for sm_80 and sm_90.

    python -m rlhf_fast.bench.checks.triton_resources [OP ...] [--save bench/results/triton_resources.md]

Every op's Triton function is called on its `large` inputs, float32 and bfloat16, as fake CUDA tensors; the launches are
not run but written down, and each is compiled as the launch would have it. The exit status is 1 where a kernel spills,
needs more shared memory than the chip has, multiplies bfloat16 without its best tensor cores (which on sm_90 take no
fewer than 64 rows) or reads aligned rows without 16-byte loads, and where a launcher waits for the device.

A kernel should have 16-byte loads where Triton, from what it knows of addresses and strides, gives each thread 16 bytes
or more of a tile in a row: then it is a mask that splits them. `large` inputs have sizes that need not; an op without
any is compiled at small ones, of which none is asked for.
"""

import argparse
import collections
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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

from rlhf_fast import ops  # noqa: F401  registers them
from rlhf_fast.bench.checks import sass
from rlhf_fast.kernels._op import OPS, Op
from rlhf_fast.kernels.triton import launch

ARCHITECTURES = {80: 163 << 10, 90: 227 << 10}  # compute capability: shared memory a block can have, bytes
PROCESSORS = 132  # of an H100, for the rules that look at it
KERNELS = Path(launch.__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
WIDE = 64  # rows from which on sm_90 has an instruction of its own


class Launch(NamedTuple):
    """A kernel as a launch would compile it."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        room = self.kernel.fn.__module__.rpartition(".")[2]
        return f"{room}.{self.kernel.fn.__name__.lstrip('_')}"


class Resources(NamedTuple):
    """What a compiled kernel takes: registers a thread, bytes of shared memory, instructions of a kind."""

    registers: int
    shared: int
    spills: int
    wide_loads: int
    loads: int
    products: int
    wants: str  # the instruction for the products of 16-bit numbers that it has, "" without any
    aligned: int  # loads of a tile of which each thread has 16 bytes or more in a row


def described(kernel, args: tuple, options: dict) -> Launch:
    """The launch as Triton would specialise it: integers of 1 are constants, multiples of 16 and addresses aligned."""
    given = dict(zip(kernel.arg_names, args, strict=False))
    given |= {name: options[name] for name in kernel.arg_names if name in options}
    rest = tuple(sorted((k, v) for k, v in options.items() if k not in kernel.arg_names))
    types, constants, aligned = [], {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name], kind = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            kind = f"*{TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, bool):
            kind = "i1"
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            kind = "fp32"
        types.append((name, kind))
    return Launch(kernel, tuple(types), tuple(constants.items()), tuple(aligned), rest)


def as_if_on_gpu(x: torch.Tensor) -> torch.Tensor:
    """Under FakeTensorMode, a CUDA tensor of that shape and those strides: nothing is there to compute with, and a
    launcher that would wait for a result raises."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def launches(op: Op, size: dict, dtype: torch.dtype) -> Iterator[tuple[Launch, int]]:
    """The launches of one call of the op's Triton function, on a GPU of each compute capability."""
    args = op.make_inputs(device="cpu", dtype=dtype, **size)
    args = op.normalized(*args)
    stem = Path(op.reference.__code__.co_filename).stem
    function = getattr(import_module(f"rlhf_fast.kernels.triton.{stem}"), op.name)
    for capability in ARCHITECTURES:
        for one in recorded(lambda: function(*tree_map_only(torch.Tensor, as_if_on_gpu, args)), capability):
            yield one, capability


def recorded(call: Callable[[], object], capability: int) -> list[Launch]:
    """The launches that a call on fake CUDA tensors makes, none of them run."""
    seen: list[Launch] = []

    def write_down(kernel, grid, *args, **options):
        if all(grid):
            seen.append(described(kernel, args, options))

    before = launch.run, launch.processors, launch.capability
    launch.run, launch.processors, launch.capability = write_down, lambda x: PROCESSORS, lambda x: capability
    try:
        with FakeTensorMode(), torch.no_grad():
            call()
    finally:
        launch.run, launch.processors, launch.capability = before
    return seen


def aligned_loads(ttgir: str) -> int:
    """Loads whose layout gives a thread at least 16 bytes in a row."""
    layouts = {
        name: max(map(int, sizes.split(",")))
        for name, sizes in re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir)
    }
    loads = re.findall(
        r"(?:tt\.load|ttg\.async_copy_global_to_local) .*?: tensor<[\dx]+!tt\.ptr<[a-z]+(\d+)>, (#\w+)>", ttgir
    )
    return sum(layouts.get(layout, 0) * max(int(bits), 8) >= 128 for bits, layout in loads)


def translated(of: Launch, target: GPUTarget):
    """What Triton makes of a launch for that GPU."""
    names = of.kernel.arg_names
    source = ASTSource(
        fn=of.kernel,
        signature=dict(of.signature),
        constexprs={(names.index(name),): value for name, value in of.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in of.aligned},
    )
    return triton.compile(source, target=target, options=dict(of.options))


def compiled(of: Launch, capability: int) -> Resources:
    """Compile for a GPU of that compute capability, and read the result."""
    made = translated(of, GPUTarget("cuda", capability, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True).stdout
    rows = [int(x) for x in re.findall(r"tt\.dot .*: tensor<(\d+)x\d+xb?f16", made.asm["ttir"])]
    wants = ("HGMMA" if capability >= 90 and max(rows) >= WIDE else "HMMA") if rows else ""
    count = collections.Counter(re.findall(r"\b(HMMA|HGMMA)\b", code))
    wide_loads, loads = sass.loads(code)
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=made.metadata.shared,
        spills=sum(sass.spills(code)),
        wide_loads=wide_loads,
        loads=loads,
        products=count[wants] if wants else count["HMMA"] + count["HGMMA"],
        wants=wants,
        aligned=aligned_loads(made.asm["ttgir"]),
    )


def faults(of: Launch, capability: int, has: Resources, small: bool = False) -> Iterator[str]:
    if has.spills:
        yield f"{has.spills} spills"
    if has.shared > ARCHITECTURES[capability]:
        yield f"{has.shared} bytes of shared memory"
    if has.wants and not has.products:
        yield f"no {has.wants}"
    if has.aligned and not has.wide_loads and not small:
        yield f"none of {has.aligned} loads of aligned rows has 16 bytes"


def collect(wanted: list[str]) -> dict[tuple[Launch, int], str]:
    """Every launch of the ops wanted (all if none is named) on each GPU, with the first op and dtype that makes it."""
    found: dict[tuple[Launch, int], str] = {}
    for op in sorted(OPS.values(), key=lambda op: not op.large_sizes):
        stem = Path(op.reference.__code__.co_filename).stem
        if wanted and op.name not in wanted and stem not in wanted or not (KERNELS / f"{stem}.py").is_file():
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for size in op.large_sizes or op.small_sizes[1:3]:
                for one in launches(op, size, dtype):
                    found.setdefault(one, f"{op.name}, {str(dtype)[6:]}" + ("" if op.large_sizes else SMALL))
    return found


_FOUND: list[tuple[Launch, int]] = []


def _job(index: int) -> tuple[int, Resources | str]:
    try:
        return index, compiled(*_FOUND[index])
    except Exception as error:  # shown in the table's place: one kernel's fault hides no other's
        return index, f"{type(error).__name__}: {str(error)[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args()
    unknown = set(options.op) - {n for o in OPS.values() for n in (o.name, Path(o.reference.__code__.co_filename).stem)}
    if unknown:
        parser.error(f"there is no op {', '.join(sorted(unknown))}; there are: {', '.join(sorted(ops.__all__))}")
    found = collect(options.op)
    _FOUND.extend(found)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        results = dict(pool.imap_unordered(_job, range(len(_FOUND))))
    lines, bad = [HEADER], []
    for i, (of, capability) in enumerate(_FOUND):
        has, first = results[i], found[of, capability]
        where = f"{of.name} ({first}) on sm_{capability}"
        if isinstance(has, str):
            bad.append(f"{where}: {has}")
            continue
        warps = dict(of.options).get("num_warps", 4)
        constants = ", ".join(f"{k}={v}" for k, v in of.constants if k.isupper() and v is not None)
        lines.append(
            f"| {of.name} | {first} | {constants} | sm_{capability} | {warps} | {has.registers} |"
            f" {has.shared / 1024:.0f} | {has.spills} | {has.wide_loads} / {has.loads} | {has.products or ''} |"
        )
        bad += [f"{where}: {fault}" for fault in faults(of, capability, has, first.endswith(SMALL))]
    print("\n".join(lines))
    if options.save:
        text = (
            __doc__.partition("\n")[0] + f"\n\nTriton {triton.__version__}. `{COMMAND}`\n\n" + "\n".join(lines) + "\n"
        )
        options.save.write_text(text, encoding="utf-8")
    for line in bad:
        print(f"FAULT {line}", file=sys.stderr)
    return 1 if bad else 0


SMALL = ", small"
COMMAND = "python -m rlhf_fast.bench.checks.triton_resources --save bench/results/triton_resources.md"
HEADER = """\
| kernel | first seen in | constants | for | warps | registers | shared, KiB | spills | 16-byte loads | products |
|---|---|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    sys.exit(main())
