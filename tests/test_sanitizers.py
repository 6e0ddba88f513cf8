"""tests/sanitizers/openmp.cpp runs parallel regions as OpenMP does, and ThreadSanitizer sees what they wait for."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
spec = importlib.util.spec_from_file_location("sanitizers", HERE / "sanitizers" / "run.py")
sanitizers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sanitizers)
pytestmark = [
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("setarch") and CSRC.is_dir()), reason="no g++"),
    pytest.mark.slow,
]

PROGRAM = """
#include <cstdio>
#include "cpu/team.h"
int main() {
  int a[100], b[100], c[100], thread[100] = {}, members = 0;
  TeamState state = {};
#pragma omp parallel num_threads(3) if (a == b)
  {
    const Team team = join_team(&state);
#pragma omp atomic
    members += team.num_threads;
#pragma omp for schedule(dynamic, 7) FIRST
    for (int i = 0; i < 100; ++i) a[i] = i;
#pragma omp for SECOND
    for (int i = 0; i < 100; ++i) b[i] = a[99 - i];
    parallel_for(team, 100, [&](int64_t i) { c[i] = b[99 - i] + 1; });
    barrier(team);
    parallel_for(team, 100, [&](int64_t i) { a[i] = c[99 - i]; });
  }
  parallel_items(2, 100, [&](int64_t i, int number) { thread[i] = number + 1; });
  int right = members == 9;
  for (int i = 0; i < 100; ++i) right += a[i] == 100 - i && thread[i] >= 1 && thread[i] <= 3;
  std::printf("%d right\\n", right);
}
"""


@pytest.fixture(scope="module")
def openmp(tmp_path_factory):
    return sanitizers.compile_openmp(tmp_path_factory.mktemp("openmp"))


def run(openmp, folder, **clauses):
    """Return exit status and output of PROGRAM, whose loops have these clauses."""
    source, program = folder / "program.cpp", folder / "program"
    source.write_text(PROGRAM)
    defines = {"FIRST": "", "SECOND": ""} | clauses
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=thread", f"-I{CSRC}"]
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run(["g++", *flags, str(source), str(openmp), "-o", str(program)], check=True)
    command = sanitizers.sanitized("thread", [str(program)])
    completed = subprocess.run(command, capture_output=True, text=True)
    return completed.returncode, completed.stdout + completed.stderr


def test_phases_that_wait_for_one_another_are_clean(openmp, tmp_path):
    assert run(openmp, tmp_path) == (0, "101 right\n")


@pytest.mark.parametrize("phase", ["FIRST", "SECOND"])
def test_a_loop_that_nothing_waits_for_is_a_data_race(openmp, tmp_path, phase):
    status, output = run(openmp, tmp_path, **{phase: "nowait"})
    assert status == 66 and "data race" in output and "program.cpp" in output, output


def test_a_barrier_that_orders_nothing_is_a_data_race(openmp, tmp_path):
    """An x86 processor orders the stores all the same, so that no result is wrong."""
    relaxed = (CSRC / "cpu" / "team.h").read_text()
    for order in ("ACQ_REL", "ACQUIRE", "RELEASE"):
        assert f"__ATOMIC_{order}" in relaxed
        relaxed = relaxed.replace(f"__ATOMIC_{order}", "__ATOMIC_RELAXED")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "team.h").write_text(relaxed)
    status, output = run(openmp, tmp_path)
    assert status == 66 and "data race" in output, output
