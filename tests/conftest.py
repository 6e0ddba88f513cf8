"""Shared by all tests: a fresh but printed seed, NaN in uninitialised memory, worker processes, and two sizes.

`pytest` runs the quick tests in one process a core, `pytest -m slow` longer ones, `pytest -m ''` all. A cross product
marked `exhaustive(keep, by, slow)` is sampled: of the cases with the same values of the parameters `by`, `keep` are
drawn for the quick run, `slow` others (as many by default) are slow, and the rest is `full`: `-m ''` alone runs it.
RLHF_FAST_TEST_SEED draws them if it is set (CI sets it from the commit, so that each commit tries others), else 0.
"""

import contextlib
import gc
import os
import random
import signal
import socket
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

# Workers inherit both. More threads than one in each would only wait for one another.
os.environ.setdefault("RLHF_FAST_TEST_SAMPLE", os.environ.get("RLHF_FAST_TEST_SEED", "0"))
os.environ.setdefault("RLHF_FAST_TEST_SEED", str(random.randrange(2**31)))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "simt")]

if not torch.cuda.is_available():  # Triton's kernels run on the CPU; Triton reads this at import
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter

    interpreter.speed_up()

import build as simt  # noqa: E402

# Under nohup and behind `&` both are ignored, and with them what the tests send to the processes that they start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

SEED = int(os.environ["RLHF_FAST_TEST_SEED"])
SAMPLE = os.environ["RLHF_FAST_TEST_SAMPLE"]


def pytest_configure(config):
    """Compile csrc/cuda for the CPU, before rlhf_fast is imported and workers start. It says so past the capture."""
    if "RLHF_FAST_SIMT" in os.environ or not simt.compiler() or not (ROOT / "csrc").is_dir():
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        os.environ["RLHF_FAST_SIMT"] = str(simt.build(ROOT / "build" / "simt"))


def pytest_report_header():
    return f"rlhf-fast: RLHF_FAST_TEST_SEED={SEED} draws the inputs of this run again"


def pytest_xdist_auto_num_workers():
    """Return the usable cores; xdist itself counts those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items):
    groups: dict[tuple, list[pytest.Item]] = {}
    for item in items:
        if mark := item.get_closest_marker("exhaustive"):
            values = [item.callspec.params[name] for name in mark.kwargs.get("by", ())]
            (keep,), slow = mark.args, mark.kwargs.get("slow", mark.args[0])
            key = (item.function, keep, slow, *(getattr(value, "name", repr(value)) for value in values))
            groups.setdefault(key, []).append(item)
    for (function, keep, slow, *names), members in groups.items():
        draw = random.Random(f"{SAMPLE} {function.__qualname__} {names}")
        order = draw.sample(members, len(members))
        for item in order[keep : keep + slow]:
            item.add_marker("slow")
        for item in order[keep + slow :]:
            item.add_marker("full")


def pytest_collection_finish():
    """Leave the million objects of the imports and of the tests out of garbage collections: recipes ask for one at each
    run of a stage, which then took half a second or more, longer than most of those runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(SEED)
    random.seed(SEED)
    return SEED


@pytest.fixture
def poisoned():
    """Fill new memory with NaN, which shows the outputs that a kernel forgets to write.

    torch does so in its deterministic mode. On a GPU that mode would also refuse functions that references use, such as
    the cumulative sum, so that it only warns here, and the warnings are ignored.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Run on one thread: models are so small that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gloo():
    """Make a process group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=address)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder, which is the working directory during the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
