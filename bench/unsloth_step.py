"""Time a step of Unsloth's SFT trainer on a CPU beside TRL's with our ops: the row of `trainer_step --unsloth PYTHON`.

PYTHON is of an environment that has Unsloth and rlhf-fast. Both sides run there, with the same versions of TRL and
transformers. `import unsloth` replaces TRL's trainer, so each side is a process (trainer_worker). They take steps by
turns: one waits while the other computes.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from rlhf_fast.bench.ppo_phases import OURS, TOLERANCE, checked
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import Run
from rlhf_fast.errors import UserError

TITLE = "Unsloth, TRL SFTTrainer"
UNSLOTH = "Unsloth"
BOUND = TOLERANCE[torch.float32] / 10
PAUSE = 0.02  # seconds before a turn: OpenMP's threads of the other process spin for some milliseconds after a step
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_FORCE_CPU": "1",
}  # fmt: skip
PROBE = """
import importlib, json, sys
def fault():
    for name in ("unsloth", "trl", "datasets", "rlhf_fast.bench.trainer_worker", "rlhf_fast.bench.trainer_step"):
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            line = (str(error).strip().splitlines() or [""])[0]
            return f"cannot import {name.partition('.')[0]}: {type(error).__name__}: {line[:300]}"
    from rlhf_fast import ops
    if ops.linear_logprobs.chosen("cpu") == "reference":
        return "has no compiled CPU kernels of rlhf_fast: install rlhf-fast in its environment"
print("\\n" + json.dumps({"fault": fault()}))
"""


def environment(folder: str) -> dict[str, str]:
    """Return the environment of a process: as many threads as this one has, no network, Unsloth's files in `folder`."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "UNSLOTH_COMPILE_LOCATION": f"{folder}/compiled"}
    return os.environ | SETTINGS | threads


def check_python(python: str) -> None:
    """Raise UserError unless `python` is one that imports Unsloth, TRL and this package with its kernels."""
    if shutil.which(python) is None:
        raise UserError(
            f"there is no program {python}: name the python of an environment that has Unsloth"
            ' (docs/integrations.md, "Beside Unsloth")'
        )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, env=environment(folder))
    line = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        fault = json.loads(line)["fault"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{python} does not run Python: {last_line(done.stderr)}") from None
    if fault:
        raise UserError(f'{python} {fault} (docs/integrations.md, "Beside Unsloth", has what it needs)')


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it wrote nothing"])[-1][-400:]


class Worker:
    """A side's process. It computes from `ask` until the answer is there, and waits else."""

    def __init__(self, name: str, process: subprocess.Popen, log: Path):
        self.name, self.process, self.log = name, process, log
        self.first = self.answer()

    def answer(self) -> dict:
        """Return the next line of JSON that the process writes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of {self.name} ended: {last_line(self.log.read_text(errors='replace'))}")

    def ask(self, question: str) -> dict:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `answer` says by what
            print(question, file=self.process.stdin, flush=True)
        return self.answer()

    def seconds(self) -> float:
        """Return the wall time of a step, by the clock of the process that takes it."""
        time.sleep(PAUSE)
        return self.ask("step")["seconds"]


@contextmanager
def started(name: str, command: list[str], folder: Path) -> Iterator[Worker]:
    """Yield the worker of a command, after its first step; end it in the end."""
    folder.mkdir()
    log = folder / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment(str(folder)),
        ) as process,
    ):  # fmt: skip
        try:
            yield Worker(name, process, log)
        except BaseException:
            process.kill()
            raise


def command_of(python: str, side: str, folder: Path, tiny: bool) -> list[str]:
    options = ["--folder", str(folder), "--threads", str(torch.get_num_threads()), *(["--tiny"] * tiny)]
    return [python, "-m", "rlhf_fast.bench.trainer_worker", side, *options]


def difference(ours: float, theirs: float) -> float:
    """Return the relative difference, infinite where a number is not finite."""
    found = abs(ours - theirs) / max(abs(theirs), 1e-3)
    return found if math.isfinite(found) else math.inf


def row_of(run: Run, commands: Callable[[str, Path], list[str]]) -> dict:
    """Return the row: seconds of both sides by turns, losses and gradient norms compared, peaks.

    commands(side, folder): how to start a side's worker.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {}
        for name, side in ((UNSLOTH, "unsloth"), (OURS, "ours")):
            place = Path(folder) / side
            workers[name] = stack.enter_context(started(name, commands(side, place), place))
        peaks = {name: worker.ask("peak")["bytes"] for name, worker in workers.items()}
        rounds = 1 if run.options.tiny else run.options.rounds
        times = interleaved({name: worker.seconds for name, worker in workers.items()}, rounds=rounds)
    ours, theirs = (workers[name].first for name in (OURS, UNSLOTH))
    errors = {
        "loss": difference(ours["loss"], theirs["loss"]),
        "gradient norm": difference(ours["gradient_norm"], theirs["gradient_norm"]),
        "steps without our ops": 0.0 if ours["answered"] else 1.0,
    }
    share = ours["labelled"] / ours["rows"]
    return {
        "row": f"{TITLE}, {share:.0%} of {ours['rows']} rows have a label", "labelled": share,
        "seconds": statistics.median(times[OURS]), "ratios": median_ratios(times, OURS), "rounds": times,
        "peak_bytes": peaks[OURS], "errors": errors, "checked": checked(errors, BOUND),
        "others": {UNSLOTH: {"seconds": statistics.median(times[UNSLOTH]), "peak_bytes": peaks[UNSLOTH]}},
        "first": {OURS: ours, UNSLOTH: theirs},
    }  # fmt: skip


def measure(run: Run, commands: Callable[[str, Path], list[str]]) -> None:
    """Add the row to the run, print what it was measured with, and note where both sides differ."""
    run.add(row_of(run, commands))
    row = run.rows[-1]
    ours, theirs = (row["first"][name] for name in (OURS, UNSLOTH))
    versions = ", ".join(f"{name} {found}" for name, found in theirs["versions"].items())
    chunked = "in use" if theirs["chunked_loss"] else "not in use"
    peaks = [side["peak_bytes"] / 2**20 for side in (row, row["others"][UNSLOTH])]
    print(f"  peak: {peaks[0]:.0f} MiB, {peaks[1]:.0f} MiB with Unsloth; its chunked cross-entropy is {chunked}")
    print(f"  {versions}")
    for what, key in (("loss", "loss"), ("gradient norm", "gradient_norm")):
        if row["errors"][what] > BOUND:
            run.notes.append(
                f"{TITLE}: the {what} is {theirs[key]:.6g} with Unsloth and {ours[key]:.6g} with our ops: they do not"
                " compute the same step, so that their times cannot be compared"
            )
    if not ours["answered"]:
        run.notes.append(f"{TITLE}: our ops answered no call of TRL {ours['versions']['trl']}")
    run.save()
