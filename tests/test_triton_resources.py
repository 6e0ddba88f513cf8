"""Every Triton kernel compiles for NVIDIA GPUs without one, and takes no more of them than there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def measure(*arguments, **environment):
    command = [sys.executable, "-m", "rlhf_fast.bench.triton_resources", *arguments]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=env)


def kernels(path):
    """The kernels that a file launches, by the tool's names."""
    return {f"{path.stem}.{name.lstrip('_')}" for name in re.findall(r"launch\.run\(\s*(\w+)", path.read_text())}


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "kernels" / "triton").is_dir(), reason="not a source checkout")
def test_no_kernel_spills_and_products_use_tensor_cores(tmp_path):
    said = measure("--save", str(tmp_path / "table.md"))
    assert said.returncode == 0, said.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.stdout.splitlines()[2:]]
    compiled = {(row[0], row[3]) for row in rows}
    files = sorted((ROOT / "kernels" / "triton").glob("*.py"))
    written = set().union(*map(kernels, files))
    assert written, "no kernel found"
    missing = {(name, sm) for name in written for sm in ("sm_80", "sm_90")} - compiled
    assert not missing, f"launched by no op's large inputs: {sorted(missing)}"
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(rows) + 1


SPILLS = """
import sys
import rlhf_fast.bench.triton_resources as tool
import triton, triton.language as tl, torch

@triton.jit
def greedy(x, out, D, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = tl.load(x + D + at)
    c = tl.load(x + 2 * D + at)
    for i in range(D):
        a, b, c = b + c, a * c, a + b
    tl.store(out + at, a + b + c)

x = torch.empty(64, 8192)
one = tool.described(greedy, (x, x, 4096), {"BLOCK": 4096, "num_warps": 1})
print(*[f for sm in (80, 90) for f in tool.faults(one, sm, tool.compiled(one, sm))], sep="\\n")
"""


def test_a_kernel_that_spills_is_seen(tmp_path):
    file = tmp_path / "spills.py"
    file.write_text(SPILLS)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=env)
    assert len(re.findall(r"^\d+ spills$", said.stdout, re.M)) == 2, said.stdout + said.stderr


def test_an_unknown_op_and_the_interpreter_are_refused():
    said = measure("no_such_op")
    assert said.returncode == 2 and "there is no op no_such_op; there are:" in said.stderr
    said = measure("swiglu", TRITON_INTERPRET="1")
    assert said.returncode == 1 and "TRITON_INTERPRET=1 is set" in said.stderr
