"""The compiled kernels run on the OpenMP threads of torch: a second runtime would start its own beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.kernels._backends import COMPILED

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc"),
    pytest.mark.skipif("cpu:generic" not in COMPILED, reason="rlhf_fast._cpu is not built"),
]
HIDES_OPENMP = """
import ctypes
loads = ctypes.CDLL
ctypes.CDLL = lambda name, mode=0, **others: loads(name, **others)  # as where torch has no libtorch_global_deps.so
import torch
ctypes.CDLL = loads
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
"""
USE = """
import os, torch
from rlhf_fast import ops

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
before = threads()
torch.tanh(torch.randn(1024, 1024))
of_torch = threads()
found, *_ = ops.token_logprobs(torch.zeros(512, 512), torch.zeros(512, dtype=torch.int64))
assert abs(found.sum().item() + 512 * 6.2383246) < 0.1, found
assert ops.token_logprobs.chosen("cpu").startswith("cpu:"), ops.token_logprobs.why("cpu")
assert of_torch - before >= 1, "torch has started no threads"
assert threads() == of_torch, f"the kernels have started {threads() - of_torch} threads of their own"
names = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(*sorted(name for name in names if os.path.basename(name).startswith(("libgomp", "libiomp", "libomp"))), sep="\\n")
"""


@pytest.mark.parametrize("start", ["", HIDES_OPENMP], ids=["torch shows it", "torch hides it"])
@pytest.mark.exhaustive(1)
def test_one_openmp_runtime_in_the_process(start):
    done = subprocess.run([sys.executable, "-c", start + USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (runtime,) = done.stdout.split()
    import torch

    folder = Path(torch.__file__).resolve().parent
    bundled = [*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]
    assert not bundled or Path(runtime).resolve() in [path.resolve() for path in bundled]


def test_kernels_without_a_runtime_say_so():
    """They are built: a compiler would not help."""
    refuses = HIDES_OPENMP.replace(
        "ctypes.CDLL = loads\n",
        """
def refusing(name, *args, **others):
    if name and "libgomp" in name:
        raise OSError(f"{name}: cannot open shared object file")
    return loads(name, *args, **others)

ctypes.CDLL = refusing
""",
    )
    code = refuses + "from rlhf_fast.kernels._backends import WHY_MISSING; print(WHY_MISSING['cpu'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rlhf_fast._cpu is built, but cannot be loaded (")
    assert "undefined symbol: " in done.stdout and "install it (Debian: libgomp1)" in done.stdout
