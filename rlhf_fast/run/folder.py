"""A stage's output folder: what may go on there, where it goes on, and what is kept when it is told to stop.

`out/` becomes an ordinary Hugging Face folder and holds run.json, metrics.jsonl, samples.jsonl and checkpoints/, which
is emptied at the end. The same command started again goes on from the newest whole checkpoint; with other settings,
data or models it is refused; once finished it says so. SIGTERM and Ctrl-C write a checkpoint at the end of the step and
exit with 143 and 130.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.resolve import show
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.errors import UserError, writing
from rlhf_fast.run import checkpoint
from rlhf_fast.run.logs import Log, describe
from rlhf_fast.training.rewards import is_function, source_of

RUN, BEST = "run.json", "best"
# What may differ when a run is taken up again: none of it changes the weights that `out` gets. log.validate_every does:
# it says at which steps there is something to select from.
FREE = ("out", "resume", *(f"log.{name}" for name in "every samples checkpoint_every keep live sinks".split()))


class Part(Protocol):
    """What has a state to be resumed: a learner, a controller, a selection."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


class RunDir:
    """One stage's run in `cfg.out`, as a context manager. `data` are the settings whose files it reads.

    finished: nothing is left to do. log: after `begin`. notes: what `begin` says of the data.
    """

    def __init__(self, cfg: StageConfig, *data: DataConfig):
        cfg.ready()
        self.cfg, self.stage, self.out = cfg, cfg.stage, Path(cfg.out)
        self.checkpoints = self.out / "checkpoints"
        self.finished, self.log, self.total = False, None, 0
        self.notes: list[str] = []
        self.device = None if cfg.device == "auto" else cfg.device
        self._signal, self._handlers, self._lock = 0, {}, None
        files = [file for part in data for file in (part.path, part.valid) if Path(file).is_file()]
        models = cfg.model_paths()
        files += [source for spec in models if is_function(spec) and (source := source_of(spec))]
        self.told = describe(self.stage, cfg, files, [path for path in models if Path(path).is_dir()])
        if (self.out / RUN).exists():
            if not cfg.resume:
                raise UserError(f"{self.out}: holds a run already; choose another `out`, or set resume to true")
            self._compare(json.loads((self.out / RUN).read_text(encoding="utf-8")))
        elif (self.out / "config.json").exists():
            raise UserError(f"{self.out}: holds a model that no run of ours wrote there; choose another `out`")

    def __enter__(self) -> "RunDir":
        if self.finished:
            print(f"{self.stage}: {self.out} is finished already; nothing is done", file=sys.stderr)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.log:
            self.log.close()
        if self._lock:
            self._lock.close()

    def begin(self, total: int, headline: tuple[str, ...], parts: Mapping[str, Part]) -> int:
        """Opens the log of a run of `total` steps, puts `parts` where the newest checkpoint left them, and returns
        the number of steps done."""
        with writing(self.out):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.checkpoints / "lock", "w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.out}: another process runs there; wait for it or choose another `out`") from error
        if (self.out / RUN).exists() and "finished" in json.loads((self.out / RUN).read_text(encoding="utf-8")):
            raise UserError(f"{self.out}: another process has finished this run meanwhile; nothing is left to do")
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        checkpoint.write_json(self.out / RUN, self.told)
        path, self.total = checkpoint.latest(self.checkpoints), total
        done = checkpoint.step_of(path) if path else 0
        self.log = Log(self.out, self.cfg.log, self.stage, total, done, headline)
        for note in self.notes:
            self.log.say(note)
        if path:
            state = checkpoint.load(path)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            checkpoint.restore_random_states(state["random"])
            self.log.say(f"goes on after step {done} of {total} ({path})")
        return done

    def checkpoint(self, step: int, parts: Mapping[str, Part]) -> None:
        """Saves `parts` when it is time, at the last step, or when the process was told to stop: then it exits."""
        every = self.cfg.log.checkpoint_every
        if (every and step % every == 0) or step == self.total or self._signal:
            with self.log.phase("save"):
                state = {name: part.state_dict() for name, part in parts.items()}
                state["random"] = checkpoint.random_states()
                checkpoint.save(self.checkpoints, step, state, self.cfg.log.keep)
        if self._signal:
            self.log.say(f"stopped by signal {self._signal} after step {step}; the same command goes on from here")
            raise SystemExit(128 + self._signal)

    def finish(self, write: Callable[[Path], object], summary: Mapping[str, object]) -> None:
        """Has `write` fill a folder, moves what it wrote into `out`, and marks the run as finished."""
        folder = self.out / "finished"
        with writing(self.out):
            with checkpoint.atomic_folder(folder):
                write(folder.with_name(folder.name + ".tmp"))
            for entry in sorted(folder.iterdir()):
                target = self.out / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
            folder.rmdir()
        checkpoint.write_json(self.out / RUN, self.told | {"finished": dict(summary)})
        for folder in (self.checkpoints / BEST, *self.checkpoints.glob("step_*")):  # nothing goes on from here
            shutil.rmtree(folder, ignore_errors=True)
        self.finished = True
        self.log.say(f"finished; the model is in {self.out}")

    def _stop(self, number: int, frame: object) -> None:
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        os.write(2, b"\nthe step is being finished and saved, then the run stops; a second Ctrl-C stops it at once\n")

    def _compare(self, old: dict) -> None:
        """Refuses a folder in which something else was run; sees whether it is finished."""
        if old["stage"] != self.stage:
            raise UserError(f"{self.out}: holds a run of {old['stage']}, not {self.stage}; choose another `out`")
        before, now = _flat(old["config"]), _flat(self.told["config"])
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        differ = [f"{key} = {show(before.get(key))}, now {show(now.get(key))}" for key in keys if key not in FREE]
        if differ:
            raise UserError(
                f"{self.out}: was started with {'; '.join(differ)}; set {'them' if len(differ) > 1 else 'it'} back or"
                " choose another `out`"
            )
        for file, digest in self.told["data"].items():
            if old["data"].get(file, digest) != digest:
                raise UserError(f"{file}: has changed since {self.out} was started with it; choose another `out`")
        for folder, digest in self.told["models"].items():
            if old.get("models", {}).get(folder, digest) != digest:
                raise UserError(
                    f"{folder}: the model in it has changed since {self.out} was started with it; choose another `out`"
                )
        for part, name in (("versions", "torch"), ("machine", "threads")):
            was, now = old[part].get(name), self.told[part][name]
            if was != now:
                self.notes.append(f"{name} was {was} when the run was started and is {now}: its last bits may differ")
        self.finished = "finished" in old


class Best:
    """The best model so far by a score: its folder is kept beside the checkpoints until the run is finished.

    step and score: 0 and None while nothing was offered.
    """

    def __init__(self, run: RunDir):
        self.folder, self.step = run.checkpoints / BEST, 0
        self.score: float | None = None

    def model(self, step: int, save: Callable[[Path], object]) -> Callable[[Path], object]:
        """What writes the chosen model into a folder: `save` if the chosen step is this last one."""
        if self.step in (0, step):
            return save
        return lambda folder: shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def offer(self, step: int, score: float, save: Callable[[Path], object]) -> None:
        """Keeps this model if its score is the highest; of equals the first."""
        if score > (-math.inf if self.score is None else self.score):
            self.score, self.step = score, step
            with writing(self.folder), checkpoint.atomic_folder(self.folder) as folder:
                save(folder)

    def state_dict(self) -> dict:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.score, self.step = state["score"], state["step"]


def _flat(tree: object, at: str = "") -> dict[str, object]:
    """A nested dict as dotted keys."""
    if not isinstance(tree, dict):
        return {at: tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{at}.{name}" if at else name).items()}
