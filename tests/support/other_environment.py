"""Run test cases in a process of its own, where another library is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent


def environment(path=(), **variables: str) -> dict[str, str]:
    """Return the environment of a process on one thread, with this package and `path` in front."""
    path = [*map(str, path), str(ROOT), str(SUPPORT)]
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for name in ("RLHF_FAST_STRICT", "RLHF_FAST_VERL"):
        known.pop(name, None)
    return known | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


def run_cases(name: str, folder: Path, min_passed: int, python: str = sys.executable, path=()) -> None:
    """Run the tests of a file of support/; all must pass, and none is skipped."""
    options = ["-q", "-c", os.devnull, "--rootdir", str(SUPPORT), "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, "-p", "no:xdist", str(SUPPORT / name)],
        env=environment(path), cwd=folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-10000:]}\n{done.stderr[-2000:]}"
    summary = done.stdout.strip().splitlines()[-1]
    passed = re.match(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= min_passed and "skipped" not in summary, summary
