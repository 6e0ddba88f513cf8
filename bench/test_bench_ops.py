"""Every op at its large sizes, and on a GPU at the sizes of bench/targets.py: our kernels beside the alternatives.

    pytest bench/test_bench_ops.py [--device cuda] [--targets] [--op NAME] [--save-table PATH]

`--targets` runs only the cases of bench/targets.py; with `--small` shrunk, to see that they run. An op's kernels must
agree with the reference before they are timed; one that does not fails its test.
`--compile-seconds 0` leaves torch.compile out, which takes most of the time; so does `--small`, where nothing is to be
learned from its times, unless `--compile-seconds` is given.
"""

import time
from pathlib import Path

import pytest
import torch

from rlhf_fast.bench import report
from rlhf_fast.bench.compare import measure
from rlhf_fast.bench.problem import Case, cases
from rlhf_fast.bench.timing import CLOCKS


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    dtypes = option("dtype") or ("float32" if option("device") == "cpu" else "bfloat16")
    dtypes = [getattr(torch, dtype) for dtype in dtypes.split(",")]
    found = cases(option("device"), option("op"), dtypes, option("small"), option("targets"))
    metafunc.parametrize("case", list(found), ids=str)


@pytest.fixture(scope="session")
def clock(request):
    return CLOCKS[request.config.getoption("device")]()


@pytest.fixture(scope="session")
def bandwidth(clock, ops_report):
    found = clock.copy_bandwidth()
    ops_report.facts = report.machine(clock.name, found)
    if (empty := clock.empty_graph_seconds()) is not None:
        ops_report.facts["a graph of one empty kernel"] = f"{report.duration(empty)}, not subtracted"
    return found


def test_op(case: Case, clock, bandwidth, ops_report, request):
    option = request.config.getoption
    if option("deadline") and time.monotonic() - ops_report.start > option("deadline"):
        ops_report.notes.append(f"{case}: not measured: --deadline {option('deadline'):.0f} is over")
        pytest.skip("the deadline is over")
    try:
        found = measure(case, clock, bandwidth, seconds=option("seconds"), compile_seconds=option("compile_seconds"))
    finally:
        clock.empty_cache()
    if option("small") and not option("compile_seconds"):
        found.notes.append(f"{case}: torch.compile is left out: --small; --compile-seconds 60 takes it in")
    ops_report.rows.extend(found.rows)
    ops_report.notes.extend([*found.notes, *found.faults])
    if option("save_table"):  # after each case: a run may be interrupted
        report.save_ops(Path(option("save_table")), ops_report.facts, ops_report.rows, ops_report.notes)
    assert not found.faults, found.faults
