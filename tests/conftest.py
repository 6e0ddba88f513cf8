"""Every test starts from a fresh but printed seed; uninitialised memory of op tests is NaN."""

import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "simt")]

if not torch.cuda.is_available():  # Triton's kernels run on the CPU; Triton looks at this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter

    interpreter.hasten()

import build as simt  # noqa: E402

if "RLHF_FAST_SIMT" not in os.environ and simt.compiler() and (ROOT / "csrc").is_dir():  # csrc/cuda, run on the CPU
    os.environ["RLHF_FAST_SIMT"] = str(simt.build(ROOT / "build" / "simt"))

SEED = int(os.environ.get("RLHF_FAST_TEST_SEED") or random.randrange(2**31))


def pytest_report_header(config):
    return f"rlhf-fast: RLHF_FAST_TEST_SEED={SEED} draws the inputs of this run again"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(SEED)
    random.seed(SEED)
    return SEED


@pytest.fixture
def poisoned():
    """torch.empty returns NaN: an output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)  # fills new memory too
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """For models so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder of one's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
