"""Runs beside other programs: waiting threads leave them the cores, and a run says that they are busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from rlhf_fast.run import contention
from rlhf_fast.run.contention import contention_note, shorten_spins

REGIONS = """
import rlhf_fast, time, torch
torch.set_num_threads(2)
x = torch.zeros(200_000)  # of the size from which torch uses two threads
x.add_(1.0)
start = time.process_time()
for _ in range(100):
    x.add_(1.0)
    time.sleep(0.01)
print(time.process_time() - start)
"""
DEFAULT_SPINS = "300000"
"""GNU's spin count where none is set."""


def environment(**others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in contention.ENVIRONMENT}
    return kept | {"OMP_NUM_THREADS": "2"} | others


def processor_seconds(**chosen: str) -> float:
    """Return the processor time of two threads that add 100 times and wait in between, the least of three runs."""
    command = [sys.executable, "-c", REGIONS]
    options = {"env": environment(**chosen), "capture_output": True, "check": True}
    return min(float(subprocess.run(command, **options).stdout) for _ in range(3))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP")
def test_waiting_threads_leave_the_cores_to_others():
    """Processor time is the same on a busy machine. GNU's spins take some 10 times as much as ours."""
    default, ours = processor_seconds(GOMP_SPINCOUNT=DEFAULT_SPINS), processor_seconds()
    assert ours < default / 3, (ours, default)


def test_spins_are_shortened_before_torch_is_loaded():
    program = "import rlhf_fast, os, sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"

    def found(program: str, **chosen: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(command, env=environment(**chosen), capture_output=True, text=True, check=True).stdout

    assert found(program) == f"{contention.SPIN_COUNT}\n"
    assert found(program, GOMP_SPINCOUNT="7") == "7\n", "the user has chosen"
    assert found(program, OMP_WAIT_POLICY="active") == "None\n", "the user has chosen"
    assert found("import torch\n" + program.replace("assert", "assert not")) == "None\n", "it would have no effect"


@pytest.fixture
def machine(monkeypatch):
    """Set the machine's load and cores, and the processor time of this process after `elapsed` seconds."""

    def pretend(load: float, cores: int, own: float = 0.0, elapsed: float = 1e6, too_late: bool = False) -> None:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(time, "process_time", lambda: own)
        monkeypatch.setattr(contention, "_started", time.monotonic() - elapsed)
        monkeypatch.setattr(contention, "_too_late", too_late)

    return pretend


def test_note_where_other_programs_keep_cores_busy(machine):
    machine(load=2.0, cores=2)
    assert contention_note(2) == (
        "other programs keep about 2.0 of 2 cores busy, so steps take longer; OMP_NUM_THREADS=1 leaves them theirs"
    )
    machine(load=30.0, cores=64, too_late=True)
    assert "about 30.0 of 64 cores" in contention_note(64) and "OMP_NUM_THREADS=34" in contention_note(64)
    assert "GOMP_SPINCOUNT" in contention_note(64)
    assert contention_note(34) == "", "there are cores enough"
    machine(load=5.0, cores=2, too_late=True)
    assert contention_note(1) == "other programs keep about 2.0 of 2 cores busy, so steps take longer"


def test_no_note_for_its_own_threads(machine):
    machine(load=2.0, cores=2, own=2e6)
    assert contention_note(2) == "", "two threads of its own for a long time"
    machine(load=4.0, cores=2, own=2e6)
    assert "about 2.0" in contention_note(2)
    machine(load=0.7, cores=2, own=20, elapsed=10)
    assert contention_note(2) == "", "two threads of its own for ten seconds"
    machine(load=0.5, cores=1)
    assert contention_note(1) == "", "less than one program"


def test_no_note_without_a_load(monkeypatch):
    def unknown() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert contention_note(2) == ""


def test_torch_was_first(monkeypatch):
    """In this process torch is loaded: nothing is set, and the note says what is to be done."""
    for name in contention.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(contention, "_too_late", False)
    assert torch.__name__ in sys.modules
    shorten_spins()
    assert "GOMP_SPINCOUNT" not in os.environ and contention._too_late
