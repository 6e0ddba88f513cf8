"""Measure one PPO step of random weights and rewards, by phases, beside the same in plain torch; and reward training.

    python -m rlhf_fast.bench.ppo_step [--device cuda] [--case NAME,...] --save PATH.json [--deadline SECONDS] [--tiny]

Ours is the stage's own code: Rollout, make_experience, ppo_update, with PPOConfig's defaults and the sizes of `CASES`.
Plain torch is bench/plain_learner.py: transformers' generate and forward on padded rows, whole logits, float32
log_softmax; both have our Learner's micro-batches and moving average, plain torch with torch's fused AdamW. The
optimizers go on through the rounds. "PPO step total" is the sum of the phases' best rounds. Case 135M-real takes the
lengths from files: bench/ppo_data.py says how. `--memory` takes the peaks of processes of their own.
"""

import argparse
import sys
from dataclasses import replace

import torch

from rlhf_fast.bench.decode_step import BASELINE
from rlhf_fast.bench.device_profile import Profiler
from rlhf_fast.bench.ppo_data import CASES, Records, Sizes
from rlhf_fast.bench.ppo_phases import OURS, PLAIN, TOLERANCE, Phase, Phases, checked
from rlhf_fast.bench.process_memory import processes
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import FILES, Run, parser_of
from rlhf_fast.errors import UserError


class Bench:
    """The rows of a step in one dtype."""

    def __init__(self, run: Run, sizes: Sizes, dtype: torch.dtype, records: Records | None = None):
        self.run, self.sizes, self.dtype = run, sizes, dtype
        self.phases = Phases(sizes, dtype, run.options.device, records, run.options.exact)
        self.name = self.phases.name
        self.on_gpu = run.options.device == "cuda"
        self.profiled = self.on_gpu or run.options.tiny  # on a CPU the profiler keeps every op of an update in memory
        self.step_rows: dict[str, dict] = {}
        """Rows of the step's phases, by the phase."""
        self.to_profile: list[tuple[dict, Phase]] = []

    def rollout_row(self) -> dict:
        """Return the row of our rollout. On a GPU transformers' follows after all others, since it takes long."""
        phase = self.phases.rollout()
        if self.on_gpu:
            row: dict = {"seconds": self.run.seconds(phase.ours)}
        else:
            times = self._times(phase, BASELINE)
            best = {provider: min(taken) for provider, taken in times.items()}
            row = {
                "seconds": best[OURS], "ratios": median_ratios(times, OURS), "rounds": times,
                "others": {BASELINE: {"seconds": best[BASELINE]}},
            }  # fmt: skip
        row = {"row": phase.name, **row, "decode_path": self.phases.sampler.decode_path}
        row["tokens_per_second"] = self.sizes.batch * self.sizes.new / row["seconds"]
        self.step_rows["rollout"] = row
        return row

    def experience_row(self) -> dict:
        """Return the row of the forward passes, the advantages and the metrics."""
        self.step_rows["experience"] = self._compared(self.phases.scoring())
        return self.step_rows["experience"]

    def update_row(self) -> dict:
        """Return the row of the optimizer steps of both models."""
        self.step_rows["update"] = self._compared(self.phases.update())
        return self.step_rows["update"]

    def reward_row(self) -> dict:
        """Return the row of one optimizer step of a reward model: prompts with 2 to 9 ranked responses each."""
        return self._compared(self.phases.reward())

    def baseline_rollout(self) -> None:
        """Add transformers' generate to the rollout's row."""
        row = self.step_rows["rollout"]
        seconds = self.run.seconds(self.phases.rollout().plain)
        more = {"others": {BASELINE: {"seconds": seconds}}, "ratios": {BASELINE: seconds / row["seconds"]}}
        self.run.extend(row, more)

    def total_row(self) -> dict:
        """Return the row of the whole step: the sum of the phases' best rounds."""
        ours = {phase: row["seconds"] for phase, row in self.step_rows.items()}
        plain = {phase: min(x["seconds"] for x in row["others"].values()) for phase, row in self.step_rows.items()}
        total = sum(plain.values())
        return {
            "row": f"PPO step total, {self.name}", "seconds": sum(ours.values()), "phases": {OURS: ours, PLAIN: plain},
            "others": {PLAIN: {"seconds": total}}, "ratios": {PLAIN: total / sum(ours.values())},
        }  # fmt: skip

    def memory(self, row: dict, phase: str) -> None:
        """Add to a row the peaks of a process of ours and of one of plain torch that only take its steps."""
        batch = self.phases.comparisons if phase == "reward" else self.phases.experience
        found = processes(self.sizes, self.dtype, batch, self.run.options.exact)
        row["others"][PLAIN]["process"] = found[PLAIN]
        ratio = found[PLAIN]["peak_bytes"] / found[OURS]["peak_bytes"]
        self.run.extend(row, {"process": found[OURS], "process_ratio": ratio})

    def _times(self, phase: Phase, plain: str) -> dict[str, list[float]]:
        """Return seconds of both sides, timed by turns."""
        calls = {plain: phase.plain, OURS: phase.ours}
        timers = {provider: lambda call=call: self.run.seconds(call) for provider, call in calls.items()}
        once = self.on_gpu and self.dtype != torch.bfloat16
        return interleaved(timers, rounds=1 if once else self.sizes.rounds)

    def _compared(self, phase: Phase) -> dict:
        """Return a row of both, timed by turns, with their peak memory and what ran on the device."""
        for _ in range(self.sizes.warm_ups if self.on_gpu else 0):
            phase.ours()
            phase.plain()
        times = self._times(phase, PLAIN)
        best = {provider: min(taken) for provider, taken in times.items()}
        row = {
            "row": phase.name, "seconds": best[OURS], "ratios": median_ratios(times, OURS), "rounds": times,
            "errors": phase.errors, "checked": checked(phase.errors, TOLERANCE[self.dtype]),
            "others": {PLAIN: {"seconds": best[PLAIN]}},
        }  # fmt: skip
        if phase.stats:
            row["stats"] = phase.stats
        if not self.run.options.memory:  # else processes of their own tell it
            row["peak_bytes"] = self.run.clock.peak_bytes(phase.ours)
            row["others"][PLAIN]["peak_bytes"] = self.run.clock.peak_bytes(phase.plain)
        if self.profiled:
            self.to_profile.append((row, phase))
        return row

    def profile(self) -> None:
        """Add to the rows what ran on the device. The profiler slows what is timed after it: it comes last."""
        for row, phase in self.to_profile:
            for call, into in ((phase.ours, row), (phase.plain, row["others"][PLAIN])):
                profiler = Profiler(self.run.options.device)
                profiler.start()
                call()
                profile = profiler.stop(1)
                into |= profile._asdict() if profile else {}
            self.run.extend(row, {})


def options_of(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Sizes], Records | None]:
    """Return the options, the sizes of the cases, and the files of a real one."""
    parser: argparse.ArgumentParser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16,float32", help="float32 is the stages' default")
    parser.add_argument("--micro-batch-tokens", type=int, help="tokens of a forward and backward pass (default: 8192)")
    parser.add_argument("--rounds", type=int, help="of both sides by turns (default: the case's)")
    parser.add_argument(
        "--case", default=next(iter(CASES)), help=f"which sizes, of {', '.join(CASES)} (default: first)"
    )
    parser.add_argument("--reward", action="store_true", help="a step of reward training too")
    parser.add_argument("--memory", action="store_true", help="on a CPU, peaks of processes that only take the steps")
    parser.add_argument("--exact", action="store_true", help="ours repeats the rollout's arithmetic, on a CPU")
    for name, (metavar, text) in FILES.items():
        parser.add_argument(f"--{name}", metavar=metavar, default="", help=text)
    options = parser.parse_args(arguments)
    if options.memory and options.device == "cuda":
        parser.error("--memory is for a CPU: on a GPU the rows have the allocator's peaks")
    cases = {}
    for case in options.case.split(","):
        if case not in CASES:
            parser.error(f"--case: there is no case {case}; there are: {', '.join(CASES)}")
        sizes = CASES[case].tiny() if options.tiny else CASES[case]
        changes = {"micro_batch_tokens": options.micro_batch_tokens, "rounds": options.rounds}
        cases[case] = replace(sizes, **{name: x for name, x in changes.items() if x})
    try:
        return options, cases, Records.of(options, cases.values())
    except UserError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    options, cases, records = options_of(arguments)
    run = Run("ppo_step", options)
    benches: list[Bench] = []

    def phases(sizes: Sizes, dtype: str) -> None:
        bench = Bench(run, sizes, getattr(torch, dtype), records)
        run.add(bench.rollout_row())
        run.add(bench.experience_row())
        run.add(bench.update_row())
        if not bench.on_gpu:
            run.add(bench.total_row())
        if options.memory:
            bench.memory(bench.step_rows["update"], "update")
        if options.reward:
            run.add(bench.reward_row())
        if options.reward and options.memory:
            bench.memory(run.rows[-1], "reward")
        if bench.profiled:  # else its models are not needed any more
            benches.append(bench)

    for case, sizes in cases.items():
        for dtype in options.dtype.split(","):
            run.measure(f"PPO step, {case} {dtype}", phases, sizes, dtype)
    for bench in benches[:1] if options.device == "cuda" else ():
        run.measure(f"{BASELINE}, {bench.name}", bench.baseline_rollout)
        run.measure(f"PPO step total, {bench.name}", lambda bench=bench: run.add(bench.total_row()))
    for bench in benches:
        run.measure(f"profile, {bench.name}", bench.profile)
    run.failed |= any("DIFFER" in row.get("checked", "") for row in run.rows)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
