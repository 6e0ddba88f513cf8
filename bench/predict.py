"""Predict on paper, without a GPU, what the ops take on an H100 SXM, and compare with what was measured.

    python -m rlhf_fast.bench.predict [OP ...] [--large] [--save bench/results/h100-predicted.md]

The cases are those of bench/targets.py, with --large also every op's large sizes in bfloat16. Each op's own launchers
run on fake tensors, and their launches are recorded (launches.py). Registers, shared memory and instructions come from
the compiled kernels: csrc/cuda by nvcc, kernels/triton by Triton. traffic.py counts bytes, card.py makes seconds.
Without nvcc only Triton's kernels are predicted.
"""

import argparse
import collections
import functools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_fast.bench import card, report
from rlhf_fast.bench.checks import cuda_resources, loops, runtime_stub, sass
from rlhf_fast.bench.report import duration
from rlhf_fast.kernels import _backends

if TYPE_CHECKING:
    from rlhf_fast.bench.launches import Arguments, Node
    from rlhf_fast.bench.problem import Case

SUMMARY = str(__doc__).partition("\n")[0]
RESULTS = Path(__file__).parent / "results"
MEASURED = [RESULTS / "nvidia-h100-80gb-hbm3.json", RESULTS / "nvidia-h100-80gb-hbm3-decode.json"]
FAR = 1.3  # a prediction that is off by more needs a reason
FOLDER = Path(__file__).resolve().parent.parent / "build" / "predict"


class Compiled(NamedTuple):
    """A kernel's name and what its machine code says: registers, static shared memory, passes and loops."""

    name: str
    registers: int
    shared: int
    code: loops.Code


class Step(NamedTuple):
    """A launch of a case with its prediction."""

    node: Any
    name: str
    shape: card.Shape | None
    work: card.Work
    bounds: card.Bounds
    is_by_hand: bool


class Row(NamedTuple):
    """A case on one backend."""

    case: Any
    backend: str
    minimum: tuple[float, float]
    steps: list[Step]
    measured: float | None

    @property
    def seconds(self) -> float:
        return card.seconds_of([step.bounds for step in self.steps])

    @property
    def floor(self) -> float:
        moved, flops = self.minimum
        return max(moved / card.COPY_RATE, flops / card.PRODUCT_RATE)

    @property
    def limiter(self) -> str:
        """The largest share of the time: a limit of the longest launch, or the launches themselves."""
        longest = max((step.bounds for step in self.steps), key=lambda one: one.seconds)
        launches = card.EMPTY_GRAPH + card.NODE_GAP * (len(self.steps) - 1)
        return "launches" if launches > longest.seconds else longest.limiter

    @property
    def has_steps(self) -> bool:
        """Return whether the launches of the case are listed: not for large sizes, of which there are many."""
        return bool(self.case.target.op or self.measured)

    @property
    def main(self) -> Step:
        """The longest launch of a kernel of ours."""
        own = [step for step in self.steps if step.shape]
        return max(own or self.steps, key=lambda step: step.bounds.seconds)


@functools.cache
def _cuda_code() -> tuple[dict, dict, dict[str, str]]:
    cuobjdump, path = str(sass.cuobjdump()), str(runtime_stub.build(FOLDER))
    usages = cuda_resources.by_function(cuda_resources.output_of(cuobjdump, "-res-usage", path))
    codes = cuda_resources.by_function(cuda_resources.output_of(cuobjdump, "-sass", path))
    functions = [function for function, _ in usages]
    names = dict(zip(functions, cuda_resources.demangle(functions), strict=True))
    return usages, codes, names


def compiled_by_nvcc(function: str) -> Compiled:
    """Return a kernel of csrc/cuda by its mangled name."""
    usages, codes, names = _cuda_code()
    key = next(key for key in usages if key[0] == function)
    return _compiled(names[function], usages[key], codes[key])


def _compiled(name: str, usage: str, code: str, shared: int | None = None) -> Compiled:
    numbers = dict(re.findall(r"\b(REG|SHARED):(\d+)", usage))
    reserved = card.SHARED_RESERVED if int(numbers["SHARED"]) >= card.SHARED_RESERVED else 0
    static = int(numbers["SHARED"]) - reserved
    return Compiled(name, int(numbers["REG"]), static if shared is None else shared, loops.analyze(code))


def compiled_by_triton(found) -> Compiled:
    """Compile a recorded launch of kernels/triton for sm_90."""
    from triton.backends.compiler import GPUTarget

    from rlhf_fast.bench.checks.triton_resources import TOOLS, compile_launch

    compiled = compile_launch(found, GPUTarget("cuda", runtime_stub.ARCH, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = str(TOOLS / "cuobjdump")
        usage, code = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return _compiled(found.name, usage, code, compiled.metadata.shared)


_KEYS: list = []  # of the worker processes, which are forked with it


def _compile_one(index: int) -> Compiled:
    return compiled_by_triton(_KEYS[index])


def compile_all(nodes: "list[Node]") -> dict:
    """Return each kernel that is launched, by its node's key."""
    functions = {node.code for node in nodes if node.kind == "cuda"}
    _KEYS[:] = list(dict.fromkeys(node.code for node in nodes if node.kind == "triton"))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        found = dict(zip(_KEYS, pool.map(_compile_one, range(len(_KEYS)), chunksize=1), strict=True))
    return found | {function: compiled_by_nvcc(function) for function in functions}


def steps_of(arguments: "Arguments | None", nodes: "list[Node]", compiled: dict) -> list[Step]:
    """Return the launches of a case with their predictions; those of torch's ops need no arguments."""
    from rlhf_fast.bench import traffic

    names = {key: re.sub(r"<.*", "", kernel.name) for key, kernel in compiled.items()}
    launched = [(names[node.code], node) for node in nodes if node.kind != "torch"]
    traffics = iter(traffic.traffic_of(arguments, launched) if arguments else [])
    steps = []
    for node in nodes:
        if node.kind == "torch":
            work = card.Work(node.num_bytes, flops=node.flops)
            steps.append(Step(node, node.name, None, work, card.bounds(work, None), False))
            continue
        assert arguments is not None, f"{node.name}: an op's own kernel, without the op's arguments"
        kernel, name, moved = compiled[node.code], names[node.code], next(traffics)
        issued = traffic.instructions_of(arguments.case, name, node, kernel.code, moved.read)
        visits = traffic.VISITS.get(name, traffic.FEWEST_VISITS)
        shape = card.Shape(node.blocks, node.threads, kernel.registers, kernel.shared + node.dynamic_shared)
        flops, share = traffic.product_of(arguments, name)
        work = card.Work(sum(moved), issued.all, issued.special, flops, issued.rounds, visits, share)
        steps.append(Step(node, kernel.name, shape, work, card.bounds(work, shape), issued.is_by_hand))
    return steps


def measured_seconds() -> dict[tuple[str, ...], float]:
    """Return what bench/results/ has of each case: on the device, or of a whole call where it is longer than 2 ms."""
    names, found = ("op", "size", "dtype", "pass", "backend"), {}
    for path in (path for path in MEASURED if path.exists()):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            key = (row["row"],) if "row" in row else tuple(row[name] for name in names)
            found[key] = row["seconds"] if "row" in row else row["device_seconds"] or row["seconds"]
    return found


def predict(names: list[str], large: bool) -> list[Row]:
    """Return the rows of the cases of these ops, of all where none is named."""
    with_cuda = bool(runtime_stub.nvcc() and sass.cuobjdump() and runtime_stub.CSRC.is_dir())
    recorder = None
    if with_cuda:  # before the ops are imported: they then get the launchers of the extension
        path = runtime_stub.build(FOLDER)
        _backends.COMPILED["simt"] = getattr(_backends._load_file("_simt", str(path)), runtime_stub.GROUP)
        recorder = runtime_stub.Recorder(path)
    else:
        print("nvcc was not found: csrc/cuda is left out", file=sys.stderr)

    import torch

    from rlhf_fast.bench import launches
    from rlhf_fast.bench.problem import cases, label

    chosen: dict[str, Case] = {}
    for case in cases("cuda", names, [torch.bfloat16], targets=not large):
        chosen.setdefault(str(case), case)  # a target may be a large size too
    recorded = []
    for case in chosen.values():
        arguments = launches.Arguments(case)
        for backend in launches.BACKENDS if with_cuda else launches.BACKENDS[1:]:
            nodes = launches.record(arguments, backend, recorder)
            if nodes:  # again: the first call also probes what torch can do, and makes zeros that are kept
                nodes = launches.record(arguments, backend, recorder)
                recorded.append((arguments, backend, nodes))
    decode = {}
    if with_cuda and not names:
        from rlhf_fast.bench import predict_step

        decode = {step: predict_step.nodes_of(step, recorder) for step in predict_step.step_cases()}
    parts = [part for parts in decode.values() for part in parts]
    compiled = compile_all([node for *_, nodes in recorded + parts for node in nodes])
    measured = measured_seconds()
    rows = []
    for arguments, backend, nodes in recorded:
        case, minimum = arguments.case, arguments.minimum()
        known = measured.get((case.op.name, label(case.size), str(case.dtype)[6:], case.direction, backend))
        rows.append(Row(case, backend, minimum, steps_of(arguments, nodes, compiled), known))
    for step, parts in decode.items():
        steps = [one for arguments, nodes in parts for one in steps_of(arguments, nodes, compiled)]
        rows.append(Row(step, "cuda", step.minimum, steps, measured.get((str(step),))))
    return rows


HEADER = [
    "case", "backend", "least, MB", "moved, MB", "GFLOP", "launches", "registers", "shared, KiB", "blocks", "waves",
    "predicted", "limiter", "floor", "target", "measured", "predicted / measured",
]  # fmt: skip
STEP_HEADER = [
    "launch", "times", "registers", "shared, KiB", "blocks x threads", "an SM", "waves", "MB", "warp instructions, M",
    "memory", "issue", "special", "products", "waves' loads", "start", "predicted",
]  # fmt: skip


def _sizes(step: Step) -> list[str]:
    shape = step.shape
    if shape is None:
        return ["", "", "", ""]
    return [str(shape.registers), f"{shape.shared / 1024:.1f}", str(shape.blocks), f"{shape.waves:.2f}"]


def row_cells(rows: list[Row]) -> list[list[str]]:
    """Return the table of the cases."""
    cells = [HEADER]
    for row in rows:
        moved = sum(step.work.num_bytes for step in row.steps)
        flops = sum(step.work.flops for step in row.steps)
        case = row.case
        cells.append(
            [
                str(case), row.backend, f"{row.minimum[0] / 1e6:.1f}", f"{moved / 1e6:.1f}",
                f"{flops / 1e9:.1f}" if flops else "", str(len(row.steps)), *_sizes(row.main), duration(row.seconds),
                row.limiter, duration(row.floor), str(case.target) if case.target.of else "", duration(row.measured),
                f"{row.seconds / row.measured:.2f}" if row.measured else "",
            ]
        )  # fmt: skip
    return cells


def step_cells(row: Row) -> list[list[str]]:
    """Return the table of a case's launches."""
    cells = [STEP_HEADER]
    for step, times in collections.Counter(row.steps).items():
        registers, shared, _, waves = _sizes(step)
        shape = step.shape
        blocks = f"{shape.blocks} x {shape.threads}" if shape else ""
        count = f"{step.work.instructions / 1e6:.3g}" if shape else ""
        limits = [duration(bound) if bound else "" for bound in step.bounds]
        cells.append(
            [
                step.name, str(times), registers, shared, blocks, str(shape.blocks_per_sm) if shape else "", waves,
                f"{step.work.num_bytes / 1e6:.1f}", count + (" by hand" if step.is_by_hand else ""), *limits,
                duration(step.bounds.seconds),
            ]
        )  # fmt: skip
    return cells


def head() -> str:
    """Return what the numbers depend on, and what the columns mean."""
    import triton

    facts = json.loads(MEASURED[0].read_text(encoding="utf-8"))["machine"] if MEASURED[0].exists() else {}
    command = shlex.join(["python", "-m", "rlhf_fast.bench.predict", *sys.argv[1:]])
    lines = [
        f"`{command}`: {cuda_resources.compiler()}, Triton {triton.__version__}, sm_{runtime_stub.ARCH}",
        f"the card: {card.NUM_SMS} SMs, 4 x {card.CLOCK / 1e9:.3f} GHz of instructions each, of which"
        f" {100 * card.ISSUE_SHARE:.0f} % are issued; copy {card.COPY_RATE / 1e12:.2f} TB/s; products"
        f" {card.PRODUCT_RATE / 1e12:.0f} TFLOP/s; {duration(card.EMPTY_GRAPH)} for a graph, {duration(card.NODE_GAP)}"
        f" between nodes, {duration(card.LATENCY)} a visit of memory (bench/card.py has each one's source)",
        "least: what `op.cost` counts; moved: what the kernels and torch's ops really read and write, our kernels'"
        " counted by hand (bench/traffic.py)",
        "registers, shared memory, blocks, waves: of our longest launch; grids from the launchers themselves, resources"
        " from the compiled code",
        "warp instructions: from the machine code, a pass through the kernel and its streaming loop as often as the"
        " bytes need it; `by hand` where they were counted by hand",
        "predicted: on the device, as a graph; limiter: of the longest launch, `launches` if their gaps take longer;"
        " `special`: exp2, log2, conversions; `start`: visits of memory that nothing overlaps",
        f"measured: on the device, or a whole call above 2 ms, at commit {facts.get('commit')}; kernels that have"
        " changed since are compared with what they were",
    ]
    return f"{SUMMARY}\n\n" + "".join(f"- {line}\n" for line in lines)


def agreement(rows: list[Row]) -> str:
    """Return how far the predictions are from what was measured."""
    ratios = [math.log(row.seconds / row.measured) for row in rows if row.measured]
    if not ratios:
        return ""
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((ratio - mean) ** 2 for ratio in ratios) / len(ratios))
    far = sum(abs(ratio) > math.log(FAR) for ratio in ratios)
    return (
        f"Of {len(ratios)} measured cases, predicted / measured is {math.exp(mean):.2f} in the geometric mean, with a"
        f" spread of {100 * spread:.0f} %; {far} are off by more than {FAR}.\n"
    )


def markdown(rows: list[Row]) -> str:
    """Return the whole as Markdown."""
    parts = [head(), agreement(rows), report.markdown_table(row_cells(rows))]
    parts += [
        f"### {row.case}, {row.backend}\n\n{report.markdown_table(step_cells(row))}" for row in rows if row.has_steps
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("op", nargs="*", help="only these (default: all)")
    parser.add_argument("--large", action="store_true", help="the ops' large sizes too, in bfloat16")
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the tables as Markdown")
    options = parser.parse_args()
    text = markdown(predict(options.op, options.large))
    print(text)
    if options.save:
        options.save.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
