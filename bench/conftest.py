"""`pytest bench`: our ops beside what people use today, on this machine, as ratios.

    pytest bench -k sampling --threads 2 --save-table bench/results/<machine>.md

Machines are noisy, so the providers take turns: each round runs every provider once, a ratio is taken within its round,
and the median over the rounds is printed. Before that, `check` asserts that the providers agree. A missed target is
printed, never an error. pytest-benchmark keeps our times (`--benchmark-json` writes them, ratios in extra_info);
`pytest bench -k ops` (test_bench_ops.py: every op, on a CPU or a GPU) works without that plugin.
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
from rlhf_fast.bench.timing import CLOCKS, SECONDS, Cpu, interleaved, median_ratios
from rlhf_fast.bench.whole import FILES
from rlhf_fast.kernels._backends import COMPILED
from rlhf_fast.kernels._op import OPS

OURS = "ours"


class Row(NamedTuple):
    """One comparison: the case, our time or memory, our share of the floor, the baseline, its ratio and the target."""

    group: str
    case: str
    ours: str
    share: float | None
    baseline: str
    ratio: float
    target: float | None


class OpsReport:
    """Results of test_bench_ops.py: rows for its table, notes on what is left out, facts about the machine."""

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
        "--small",
        action="store_true",
        help="the tests' small inputs: whether the bench runs, not how fast; without torch.compile, unless"
        " --compile-seconds is given: it takes up to a minute for a case",
    )
    group.addoption("--targets", action="store_true", help="only the cases of bench/targets.py")
    group.addoption("--seconds", type=float, default=SECONDS, help="budget for the rounds of a case")
    group.addoption(
        "--compile-seconds", type=float, help="torch.compile's limit for a case (default 60); 0: leave it out"
    )
    group.addoption("--deadline", type=float, default=0, help="seconds after which no other case is started")
    group = parser.getgroup("-k update")
    for name, (metavar, text) in FILES.items():
        group.addoption(f"--{name}", metavar=metavar, default="", help=text)


def pytest_xdist_auto_num_workers():
    """Return 0: a bench has the machine to itself, whatever pyproject.toml's `-n auto` says."""
    return 0


def pytest_configure(config):
    config.stash[ROWS], config.stash[BY_OP] = [], OpsReport()
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    if config.option.compile_seconds is None:
        config.option.compile_seconds = 0.0 if config.getoption("small") else 60.0
    if unknown := set(config.getoption("op")) - set(OPS):
        raise pytest.UsageError(f"--op: there is no op {', '.join(sorted(unknown))}; there are: {', '.join(OPS)}")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("-n: a bench has the machine to itself; run it in one process, without -n")
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    if config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True  # our table has the same numbers, side by side


@pytest.fixture(scope="session")
def ops_report(request) -> OpsReport:
    return request.config.stash[BY_OP]


@pytest.fixture(scope="session")
def machine(request) -> dict:
    """Rates of this machine: bytes/s of a copy and of reading, beyond the caches, and FLOP/s of torch's product."""
    clock = Cpu()
    rates = {"copy": clock.copy_bandwidth(), "read": clock.read_bandwidth(), "flops": clock.product_rate()}
    request.config.stash[MACHINE] = rates
    return rates


@pytest.fixture
def compare(request, benchmark, machine):
    """Measure ours beside baselines and keep a row for the table.

    `compare(case, ours, baselines, check=..., bytes=..., flops=...)` returns each baseline's ratio. `baselines` maps a
    name to a callable, or to (callable, target): the smallest ratio baseline's time / our time that is aimed at.
    `check()` runs first and asserts that all agree. `bytes` and `flops` are what one call must move and compute at
    least, `reads` the bytes of a call that only reads: the floor is the largest of these by this machine's measured
    rates. `rounds` replaces as many rounds as SECONDS allow. `info` is kept beside the numbers.
    """

    def run(
        case: str,
        ours: Callable,
        baselines: dict[str, Callable | tuple[Callable, float | None]],
        *,
        check: Callable[[], None],
        bytes: float = 0,
        flops: float = 0,
        reads: float = 0,
        rounds: int = 0,
        **info,
    ) -> dict[str, float]:
        check()
        targets = {name: entry[1] if isinstance(entry, tuple) else None for name, entry in baselines.items()}
        calls = {name: entry[0] if isinstance(entry, tuple) else entry for name, entry in baselines.items()}
        timers = {name: Cpu().timer(call, 1 if rounds else 0) for name, call in {**calls, OURS: ours}.items()}
        benchmark.group = request.node.path.stem.removeprefix("test_bench_")

        def repeat(last: Callable, others: Callable, rounds: int) -> None:
            benchmark.pedantic(last, setup=others, rounds=rounds)

        times = interleaved(timers, SECONDS, rounds, repeat)
        seconds, ratios = statistics.median(times[OURS]), median_ratios(times, OURS)
        floor = max(bytes / machine["copy"], reads / machine["read"], flops / machine["flops"]) or None
        for name, ratio in ratios.items():
            share = floor and floor / seconds
            row = Row(benchmark.group, case, report.duration(seconds), share, name, ratio, targets[name])
            request.config.stash[ROWS].append(row)
        isa = next((name for name in reversed(COMPILED) if name.startswith("cpu")), "reference")
        benchmark.extra_info.update(
            case=case, seconds=seconds, ratios=ratios, bytes=bytes, flops=flops, floor=floor,
            threads=torch.get_num_threads(), isa=isa, **info,
        )  # fmt: skip
        return ratios

    return run


@pytest.fixture
def add_row(request, machine) -> Callable:
    """Return `add(case, ours, baseline, ratio, target=None)`, which adds to the table what was measured otherwise."""

    def add(case: str, ours: str, baseline: str, ratio: float, target: float | None = None) -> None:
        group = request.node.path.stem.removeprefix("test_bench_")
        request.config.stash[ROWS].append(Row(group, case, ours, None, baseline, ratio, target))

    return add


def table(rows: list[Row]) -> list[list[str]]:
    """Return the cells of the rows' table, its header first."""
    cells = [["op and size", "ours", "of the floor", "baseline", "ratio", "target"]]
    for row in rows:
        target = ""
        if row.target is not None:
            target = f"{row.target:.3g}x" + (" missed" if row.ratio < row.target else "")
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        cells.append([row.case, row.ours, share, row.baseline, f"{row.ratio:.2f}x", target])
    return cells


def pytest_terminal_summary(terminalreporter, config):
    rows, by_op, written = config.stash[ROWS], config.stash[BY_OP], []
    if rows:
        cells = table(rows)
        terminalreporter.section(
            "side by side (ratio: the baseline's time / ours; the target is the smallest ratio aimed at)"
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
    """Return the table under the facts about the machine."""
    facts = report.machine("cpu", rates["copy"])
    head = [
        f"- processor: {facts['device']}, {facts['threads']} threads, kernels: {facts['kernels']}",
        f"- measured: copy {rates['copy'] / 1e9:.1f} GB/s, read {rates['read'] / 1e9:.1f} GB/s,"
        f" float32 product {rates['flops'] / 1e9:.0f} GFLOP/s",
        f"- Python {facts['python']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}",
        "- ratio: the baseline's time / ours, median of interleaved rounds",
    ]
    return "\n".join([*head, "", report.markdown_table(cells)])
