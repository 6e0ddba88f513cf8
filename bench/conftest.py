"""`pytest bench`: our ops beside what one uses today, on this machine, as ratios.

    pytest bench -k sampling --threads 2 --save-table bench/results/<machine>.md

Machines are noisy, so rivals take turns: each round runs every contestant once, a ratio is taken within its round, and
the median over the rounds is printed. Before that, `check` asserts that the contestants agree. A missed target is
printed, never an error. pytest-benchmark keeps our times (`--benchmark-json` writes them, ratios in extra_info);
`pytest bench -k ops` (test_bench_ops.py: every op, on a CPU or a GPU) does without that plugin.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rlhf_fast import ops  # noqa: F401  registers them
from rlhf_fast.bench import report
from rlhf_fast.bench.timing import CLOCKS, ROUND, SECONDS, best, seconds
from rlhf_fast.kernels._backends import COMPILED
from rlhf_fast.kernels._op import OPS


class Row(NamedTuple):
    """One comparison: what was measured, seconds a call, share of the floor, the rival, ratio and its target."""

    group: str
    case: str
    ours: float
    floor: float | None
    rival: str
    ratio: float
    target: float | None


class OpsReport:
    """What test_bench_ops.py found: rows for its table, what was left out, the machine."""

    def __init__(self):
        self.start, self.rows, self.notes, self.facts = time.monotonic(), [], [], {}

    def markdown(self) -> str:
        return report.op_markdown(self.facts, self.rows, self.notes)


ROWS = pytest.StashKey[list]()
MACHINE = pytest.StashKey[dict]()
BY_OP = pytest.StashKey[OpsReport]()


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=0, help="threads of torch and of our kernels (default: torch's)")
    parser.addoption("--vllm", metavar="PYTHON", default="", help="an interpreter with vLLM's CPU build (rollout)")
    parser.addoption("--save-table", metavar="PATH", help="write the table as Markdown; of -k ops, JSON beside it")
    group = parser.getgroup("-k ops")
    group.addoption("--device", choices=tuple(CLOCKS), default="cpu")
    group.addoption("--op", action="append", default=[], help="only this op (more than once: these)")
    group.addoption("--dtype", default="", help="float32,bfloat16,float16 (default: float32, on a GPU bfloat16)")
    group.addoption(
        "--small", action="store_true", help="the tests' small inputs: whether the bench runs, not how fast"
    )
    group.addoption("--seconds", type=float, default=SECONDS, help="spent on the rounds of a case")
    group.addoption(
        "--compile-seconds", type=float, default=60, help="torch.compile's limit for a case; 0: leave it out"
    )
    group.addoption("--deadline", type=float, default=0, help="seconds after which no other case is begun")


def pytest_configure(config):
    config.stash[ROWS], config.stash[BY_OP] = [], OpsReport()
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    if unknown := set(config.getoption("op")) - set(OPS):
        raise pytest.UsageError(f"--op: there is no op {', '.join(sorted(unknown))}; there are: {', '.join(OPS)}")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("-n: a bench has the machine to itself; run it in one process, without -n")
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    if config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True  # our table says the same, side by side


@pytest.fixture(scope="session")
def ops_report(request) -> OpsReport:
    return request.config.stash[BY_OP]


@pytest.fixture(scope="session")
def machine(request) -> dict:
    """What this machine can do: bytes/s of a copy that leaves the caches, and of reading alone, FLOP/s of torch's
    float32 product."""
    source, target = torch.ones(2, 1 << 25)
    a, out = torch.ones(2, 1536, 1536)
    found = {
        "bandwidth": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "read": source.nbytes / best(source.sum),
        "flops": 2 * 1536**3 / best(lambda: torch.mm(a, a, out=out)),
    }
    request.config.stash[MACHINE] = found
    return found


@pytest.fixture
def side_by_side(request, benchmark, machine):
    """`side_by_side(case, ours, rivals, check=..., bytes=..., flops=...)`: measure, keep a row for the table.

    `rivals` maps a name to a callable, or to (callable, target): the least ratio rival's time / our time aimed at.
    `check()` runs first and asserts that all agree. `bytes` and `flops` are the least one call must move and compute,
    `reads` the bytes of a call that only reads: the floor is the largest by this machine's measured rates. `rounds`
    instead of as many as SECONDS allow. `info` is kept beside the numbers.
    """

    def compare(
        case: str,
        ours: Callable,
        rivals: dict[str, Callable | tuple[Callable, float]],
        *,
        check: Callable[[], None],
        bytes: float = 0,
        flops: float = 0,
        reads: float = 0,
        rounds: int = 0,
        **info,
    ) -> dict[str, float]:
        check()
        entries = {name: rival if isinstance(rival, tuple) else (rival, None) for name, rival in rivals.items()}
        calls = {}
        for name, call in {"": ours, **{name: rival for name, (rival, _) in entries.items()}}.items():
            once = seconds(call)
            calls[name] = 1 if once > 0.5 or rounds else max(1, round(ROUND / best(call, 3)))
        once = 0.0
        if not rounds:
            once = seconds(ours, calls[""]) * calls[""]
            once += sum(seconds(rival, calls[name]) * calls[name] for name, (rival, _) in entries.items())
        times: dict[str, list[float]] = {name: [] for name in ["", *entries]}

        def run_rivals():
            for name, (rival, _) in entries.items():
                times[name].append(seconds(rival, calls[name]))

        def run_ours():
            times[""].append(seconds(ours, calls[""]))

        benchmark.group = request.node.path.stem.removeprefix("test_bench_")
        benchmark.pedantic(run_ours, setup=run_rivals, rounds=rounds or max(5, min(50, round(SECONDS / once))))
        mine = statistics.median(times[""])
        floor = max(bytes / machine["bandwidth"], reads / machine["read"], flops / machine["flops"]) or None
        ratios = {}
        for name, (_, target) in entries.items():
            ratios[name] = statistics.median(r / o for r, o in zip(times[name], times[""], strict=True))
            row = Row(benchmark.group, case, mine, floor and floor / mine, name, ratios[name], target)
            request.config.stash[ROWS].append(row)
        isa = next((name for name in reversed(COMPILED) if name.startswith("cpu")), "reference")
        benchmark.extra_info.update(
            case=case, calls_per_round=calls[""], seconds=mine, ratios=ratios, bytes=bytes, flops=flops, floor=floor,
            threads=torch.get_num_threads(), isa=isa, **info,
        )  # fmt: skip
        return ratios

    return compare


def table(rows: list[Row]) -> list[list[str]]:
    cells = [["op and size", "ours", "of the floor", "beside", "ratio", "target"]]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.3g}x" + (" missed" if row.ratio < row.target else "")
        floor = "" if row.floor is None else f"{100 * row.floor:.0f} %"
        cells.append([row.case, report.duration(row.ours), floor, row.rival, f"{row.ratio:.2f}x", target])
    return cells


def pytest_terminal_summary(terminalreporter, config):
    rows, by_op, written = config.stash[ROWS], config.stash[BY_OP], []
    if rows:
        cells = table(rows)
        terminalreporter.section(
            "side by side (ratio: the other's time / ours; the target is the least ratio aimed at)"
        )
        for line in report.aligned(cells):
            terminalreporter.line(line)
        written.append(markdown(cells, config.stash[MACHINE]))
    if by_op.rows or by_op.notes:
        terminalreporter.section("ops (ratio: the other's time / ours)")
        for line in [*report.aligned(report.op_cells(by_op.rows)), *by_op.notes]:
            terminalreporter.line(line)
        written.append(by_op.markdown())
    path = config.getoption("save_table")
    if path and written:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("\n".join(written), encoding="utf-8")
        terminalreporter.line(f"written to {path}")


def markdown(cells: list[list[str]], rates: dict) -> str:
    facts = report.machine("cpu", rates["bandwidth"])
    head = [
        f"- processor: {facts['device']}, {facts['threads']} threads, kernels: {facts['kernels']}",
        f"- measured: copy {rates['bandwidth'] / 1e9:.1f} GB/s, read {rates['read'] / 1e9:.1f} GB/s,"
        f" float32 product {rates['flops'] / 1e9:.0f} GFLOP/s",
        f"- Python {facts['python']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}",
        "- ratio: the other's time / ours, median of interleaved rounds",
    ]
    return "\n".join([*head, "", report.markdown_table(cells)])
