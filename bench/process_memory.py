"""Measure the peak memory of a process that takes optimizer steps of one side, ours or plain torch's, and nothing else.

    python -m rlhf_fast.bench.process_memory REQUEST.pt

prints JSON: `peak_bytes`, resident at most while two steps are taken, the first of which makes the optimizer's state;
`imported_bytes` of them the process had before it made a model. The models of the other roles, the rollout and its
cache are not in it. `processes` writes the requests and starts the interpreters.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.batches import Comparisons, Experience
from rlhf_fast.bench.ppo_data import Sizes
from rlhf_fast.bench.ppo_phases import (
    OURS,
    PLAIN,
    config_of,
    reward_learner,
    reward_step,
    state_of,
    update_step,
    value_model,
)
from rlhf_fast.bench.shapes import random_model
from rlhf_fast.rollout.exact import make_exact
from rlhf_fast.run.memory import peak_memory, reset_peak_memory
from rlhf_fast.training import learner

STEPS = 2


class Request(NamedTuple):
    """One side's steps: of PPO on an Experience, of reward training on Comparisons."""

    side: str
    sizes: Sizes
    dtype: torch.dtype
    batch: Experience | Comparisons
    threads: int
    exact: bool = False


def measure(request: Request) -> dict[str, int]:
    """Take the steps in this process; return its bytes."""
    torch.set_num_threads(request.threads)
    reset_peak_memory()
    imported = peak_memory()
    if request.side == PLAIN:  # who writes it by hand has the C library's default
        learner.keep_freed_memory = lambda: False
    cfg, value = config_of(request.sizes), value_model(request.sizes, "cpu", request.dtype)
    if request.exact and request.side == OURS:
        make_exact(value)
    if isinstance(request.batch, Comparisons):
        step = reward_step(request.side, reward_learner(value, cfg), request.batch)
    else:
        policy = random_model(request.sizes.shape, "cpu", request.dtype)
        if request.exact and request.side == OURS:
            make_exact(policy)
        step = update_step(request.side, state_of(policy, value, cfg), request.batch, cfg)
    reset_peak_memory()
    for _ in range(STEPS):
        step()
    return {"peak_bytes": peak_memory(), "imported_bytes": imported}


def processes(
    sizes: Sizes, dtype: torch.dtype, batch: Experience | Comparisons, exact: bool = False
) -> dict[str, dict[str, int]]:
    """Return what `measure` returns for each side, one process after the other."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.pt"
        for side in (OURS, PLAIN):
            torch.save(Request(side, sizes, dtype, batch, torch.get_num_threads(), exact), path)
            command = [sys.executable, "-m", "rlhf_fast.bench.process_memory", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the process of {side} failed: {done.stderr.strip()[-400:]}")
            found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    print(json.dumps(measure(torch.load(sys.argv[1], weights_only=False))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
