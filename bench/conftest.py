"""`pytest bench`: our ops beside what one uses today, on this machine, as ratios.

    pytest bench -k sampling --threads 2 --save-table bench/results/<machine>.md

Machines are noisy, so rivals take turns: each round runs every contestant once, a ratio is taken within its round, and
the median over the rounds is printed. Before that, `check` asserts that the contestants agree. A missed target is
printed, never an error. pytest-benchmark keeps our times (`--benchmark-json` writes them, ratios in extra_info).
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rlhf_fast.kernels._op import COMPILED

SECONDS = 1.5  # spent on the rounds of one comparison
ROUND = 2e-3  # a round of one contestant lasts at least this long


class Row(NamedTuple):
    """One comparison: what was measured, seconds a call, share of the floor, the rival, ratio and its target."""

    group: str
    case: str
    ours: float
    floor: float | None
    rival: str
    ratio: float
    target: float | None


ROWS = pytest.StashKey[list]()
MACHINE = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=0, help="threads of torch and of our kernels (default: torch's)")
    parser.addoption("--vllm", metavar="PYTHON", default="", help="an interpreter with vLLM's CPU build (rollout)")
    parser.addoption("--save-table", metavar="PATH", help="write the table of ratios as Markdown")


def pytest_configure(config):
    config.stash[ROWS] = []
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))
    if config.getoption("verbose") <= 0:
        config.option.benchmark_quiet = True  # our table says the same, side by side


def seconds(call: Callable, calls: int = 1) -> float:
    """Wall time of one of `calls` calls in a row; where they time themselves and return it, a float, its median."""
    start = time.perf_counter()
    said = [call() for _ in range(calls)]
    if isinstance(said[0], float):
        return statistics.median(said)
    return (time.perf_counter() - start) / calls


def best(call: Callable, rounds: int = 7) -> float:
    return min(seconds(call) for _ in range(rounds))


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


def duration(s: float) -> str:
    return f"{s * 1e6:.1f} us" if s < 1e-3 else f"{s * 1e3:.2f} ms" if s < 1 else f"{s:.2f} s"


def table(rows: list[Row]) -> list[list[str]]:
    cells = [["op and size", "ours", "of the floor", "beside", "ratio", "target"]]
    for row in rows:
        target = "" if row.target is None else f"{row.target:.3g}x" + (" missed" if row.ratio < row.target else "")
        floor = "" if row.floor is None else f"{100 * row.floor:.0f} %"
        cells.append([row.case, duration(row.ours), floor, row.rival, f"{row.ratio:.2f}x", target])
    return cells


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    cells = table(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    terminalreporter.section("side by side (ratio: the other's time / ours; the target is the least ratio aimed at)")
    for line in cells:
        terminalreporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if path := config.getoption("save_table"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(markdown(cells, config.stash[MACHINE]))
        terminalreporter.line(f"written to {path}")


def markdown(cells: list[list[str]], rates: dict) -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    head = [
        f"- processor: {models[0] if models else platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, kernels: {', '.join(COMPILED) or 'reference'}",
        f"- measured: copy {rates['bandwidth'] / 1e9:.1f} GB/s, read {rates['read'] / 1e9:.1f} GB/s,"
        f" float32 product {rates['flops'] / 1e9:.0f} GFLOP/s",
        f"- Python {platform.python_version()}, torch {torch.__version__}, commit {commit}, {time.strftime('%F')}",
        "- ratio: the other's time / ours, median of interleaved rounds",
    ]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([*head, "", lines[0], "|---" * len(cells[0]) + "|", *lines[1:], ""])
