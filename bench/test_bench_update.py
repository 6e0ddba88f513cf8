"""A PPO step and a step of reward training beside plain torch, random weights, by phases, on a CPU.

    pytest bench/test_bench_update.py --threads 2 [--prompts FILE.jsonl --rankings FILE.jsonl --tokenizer FOLDER]

`-k 260K`, `-k 135M-small`, `-k 135M-real` and `-k bfloat16` choose cases; the real one needs the files. `--small`
measures sizes that take no time. bench/ppo_step.py does the same as a command, on a GPU too; the phases are its own.
The memory is that of processes which only take the steps. Plain torch is written as TRL's PPO is (plain_learner.py).
TRL 1.12 itself is absent: its PPOTrainer in trl.experimental is one `train()` from prompts to checkpoints, with no
phase that could be called, and timed, alone.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from rlhf_fast.bench import report
from rlhf_fast.bench.decode_step import BASELINE
from rlhf_fast.bench.ppo_data import CASES, Records
from rlhf_fast.bench.ppo_phases import OURS, PLAIN, TOLERANCE, Phase, Phases, checked
from rlhf_fast.bench.process_memory import processes
from rlhf_fast.errors import UserError

TOTAL_TARGETS = {
    ("260K", torch.float32): 2.3, ("135M-small", torch.float32): 1.7, ("135M-small", torch.bfloat16): 1.8,
    ("135M-real", torch.float32): 2.5, ("135M-real", torch.bfloat16): 2.5,
}  # fmt: skip
REWARD_TARGETS = {("135M-real", torch.float32): 2.5, ("135M-real", torch.bfloat16): 2.5}
REWARD_MEMORY = 1 / 0.6  # plain's peak over ours
UPDATE_BYTES = {("135M-small", torch.bfloat16): 4 << 30}  # most of ours
STEP = ("rollout", "experience", "update")


@pytest.fixture(scope="module")
def records(request) -> Records | None:
    options = request.config.option
    given = options.prompts or options.rankings or options.tokenizer
    try:
        return Records.of(options, [CASES["135M-real"]]) if given else None
    except UserError as error:
        pytest.exit(str(error), returncode=2)


@pytest.fixture(scope="module", params=["260K", "135M-small", "135M-real"])
def case(request, records) -> str:
    if CASES[request.param].real and records is None:
        pytest.skip("no --prompts, --rankings and --tokenizer")
    return request.param


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def phases(request, case, records) -> Phases:
    sizes = CASES[case].tiny() if request.config.getoption("small") else CASES[case]
    return Phases(sizes, getattr(torch, request.param), "cpu", records)


@pytest.fixture(scope="module")
def best(phases) -> dict[str, dict[str, float]]:
    """Return the shortest seconds by phase and side, which the tests of the phases fill in."""
    return defaultdict(dict)


def measure(compare, phases: Phases, phase: Phase, baseline: str, target: float | None = None) -> dict[str, float]:
    """Compare both sides by turns; return the shortest seconds of each."""
    times: dict[str, list[float]] = {OURS: [], PLAIN: []}

    def timed(side: str, call: Callable) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            call()
            times[side].append(time.perf_counter() - start)
            return times[side][-1]

        return run

    def check():
        if phase.errors:
            assert checked(phase.errors, TOLERANCE[phases.dtype]).startswith("agree"), phase.errors

    compare(
        phase.name, timed(OURS, phase.ours), {baseline: (timed(PLAIN, phase.plain), target)}, check=check,
        rounds=phases.sizes.rounds,
    )  # fmt: skip
    return {side: min(taken) for side, taken in times.items()}


def test_rollout(compare, phases, best):
    best["rollout"] = measure(compare, phases, phases.rollout(), BASELINE)


def test_experience(compare, phases, best):
    best["experience"] = measure(compare, phases, phases.scoring(), PLAIN)


def test_update(compare, phases, best):
    best["update"] = measure(compare, phases, phases.update(), PLAIN)


def test_step_total(add_row, case, phases, best):
    if missing := [phase for phase in STEP if not best[phase]]:
        pytest.skip(f"not measured: {', '.join(missing)}")
    ours, plain = (sum(best[phase][side] for phase in STEP) for side in (OURS, PLAIN))
    target = TOTAL_TARGETS.get((case, phases.dtype))
    add_row(f"PPO step total, {phases.name}", report.duration(ours), PLAIN, plain / ours, target)


def test_reward(compare, case, phases):
    measure(compare, phases, phases.reward(), PLAIN, REWARD_TARGETS.get((case, phases.dtype)))


@pytest.mark.parametrize("step", ["update", "reward"])
def test_memory(add_row, case, phases, step):
    if case == "260K":
        pytest.skip("a process that imports torch has more memory than the model takes")
    found = processes(phases.sizes, phases.dtype, phases.comparisons if step == "reward" else phases.experience)
    ours, plain = (found[side]["peak_bytes"] for side in (OURS, PLAIN))
    name, shown = f"{step}'s process, peak memory, {phases.name}", f"{ours / 2**30:.2f} GiB"
    add_row(name, shown, PLAIN, plain / ours, REWARD_MEMORY if step == "reward" and phases.sizes.real else None)
    if step == "update" and (limit := UPDATE_BYTES.get((case, phases.dtype))):
        add_row(name, shown, f"{limit / 2**30:.2f} GiB", limit / ours, 1.0)
