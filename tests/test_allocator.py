"""Memory that is kept between the ops of a training step."""

import subprocess
import sys

import pytest

from rlhf_fast.training import allocator

SCRIPT = """
import resource, torch
from rlhf_fast.training.allocator import keep_freed_memory
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(call: str, monkeypatch, **environment) -> int:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(call=call)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not allocator.keep_freed_memory(), reason="a C library without mallopt, or one that is set")
def test_a_freed_tensor_costs_no_page_faults_again(monkeypatch):
    fresh = faults("", monkeypatch, MALLOC_MMAP_THRESHOLD_="131072")  # its default, and fixed
    assert faults("assert not keep_freed_memory()", monkeypatch) > fresh / 2, "the user's setting holds"
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    assert fresh > 20 * faults("assert keep_freed_memory()", monkeypatch)
