"""A stage's output folder: when a run may resume, from which step, and what it saves on SIGTERM.

`out/` becomes an ordinary Hugging Face folder and holds run.json, metrics.jsonl, samples.jsonl and checkpoints/, which
is removed at the end. The same command resumes from the newest undamaged checkpoint. With other settings, data or
models it is refused; once the run is finished it does nothing. SIGTERM, SIGHUP and Ctrl-C write a checkpoint at the
end of the step and exit with 143, 129 and 130.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from rlhf_fast.config.stages import StageConfig
from rlhf_fast.errors import BadRows, FunctionFailed, UserError, writing
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import check_finished, check_saving
from rlhf_fast.run import checkpoint
from rlhf_fast.run.contention import contention_note
from rlhf_fast.run.function_source import unreadable_notes
from rlhf_fast.run.identity import CHANGED_FLAG, check_same_run, input_checksums
from rlhf_fast.run.info import run_info
from rlhf_fast.run.logs import Log
from rlhf_fast.run.machine import resident_memory
from rlhf_fast.run.outputs import LOCK, RUN, check_run_folder, move_in, take_lock
from rlhf_fast.training.learner import Learner

BEST = "best"
EARLIER = "earlier_functions"
"""Section of run.json: the checksums of functions that have changed since, and the step until which each counted."""
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a run after its step."""
clock = time.monotonic
STOPPING = b"\nthe step is being finished and saved, then the run stops; a second Ctrl-C stops it at once\n"


class Stateful(Protocol):
    """A part of a run that is saved and restored: a learner, a controller, a selection."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class RunFolder:
    """The folder `cfg.out` of one stage's run, as a context manager.

    finished: nothing is left to do. notes: sentences on the data, which `start_or_resume` prints if no one has taken
    them. device: None = automatic. base_memory: bytes that the process held before it has read a model. dry_run: the
    run will not start, so that another process may have the folder.
    """

    def __init__(self, cfg: StageConfig, dry_run: bool = False):
        cfg.ready()
        self.dry_run = dry_run
        self.base_memory = resident_memory()
        self.cfg, self.stage, self.out = cfg, cfg.stage, Path(cfg.out)
        self.checkpoints = self.out / "checkpoints"
        self.finished = False
        self.notes: list[str] = []
        self.device = None if cfg.device == "auto" else cfg.device
        self._log: Log | None = None
        self._lock: TextIO | None = None
        self._handlers: dict[int, Any] = {}
        self._signal = 0
        self._last_save = 0.0
        saved = check_run_folder(cfg.out, cfg.input_paths())  # before models are read
        self._checksums = input_checksums(cfg)
        self.manifest = run_info(self.stage, cfg) | self._checksums
        if saved:
            if not cfg.resume:
                raise UserError(f"{self.out}: holds a run already; choose another `out`, or set resume to true")
            changed = check_same_run(saved, cfg, self._checksums)
            if changed and (done := self.steps_done()):
                self.notes.append(
                    f"{', '.join(changed)}: has changed, so from step {done} on this is no longer a run of a single"
                    f" reward; {RUN} has both checksums"
                )
            self.notes += self._environment_notes(saved)
            self.finished = "finished" in saved
        self.notes += unreadable_notes(cfg.rewards().values())

    def __enter__(self) -> RunFolder:
        if self.finished:
            print(f"{self.stage}: {self.out} is finished already; nothing is done", file=sys.stderr)
        elif not self.dry_run and (self.checkpoints / LOCK).exists():  # a run that began there may still go on
            self._lock = take_lock(self.checkpoints, self.out)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._log:
            self._log.close()
        if self._lock:
            self._lock.close()
        if isinstance(error, FunctionFailed) or (isinstance(error, BadRows) and error.by_function):
            raise UserError(f"{error}; {self._after_mending()}") from error

    def _after_mending(self) -> str:
        """Return what the same command does once a function is mended."""
        if done := self.steps_done():
            flag = CHANGED_FLAG.format(stage=self.stage)
            return f"with the function mended, the same command and {flag} goes on from step {done}"
        return "with the function mended, the same command starts again"

    @property
    def log(self) -> Log:
        """The run's log. It is opened by `start_or_resume`."""
        if self._log is None:
            raise RuntimeError("RunFolder: call start_or_resume() first")
        return self._log

    def take_notes(self) -> list[str]:
        """Return the notes that are not printed yet."""
        notes, self.notes = self.notes, []
        return [line for note in notes for line in note.split("\n")]

    def steps_done(self) -> int:
        """Return the steps before the newest undamaged checkpoint, which is not read yet."""
        return checkpoint.steps_done(self.out)

    def start_or_resume(self, total: int, progress_metrics: tuple[str, ...], state: Mapping[str, Stateful]) -> Log:
        """Lock the folder, restore `state` from the newest checkpoint, and open the log of a run of `total` steps.

        `log.start` is the number of steps done.
        """
        self._lock = self._lock or take_lock(self.checkpoints, self.out)
        saved = check_run_folder(self.cfg.out, self.cfg.input_paths())  # what has changed while the models were loaded
        if "finished" in saved:
            raise UserError(f"{self.out}: another process has finished this run meanwhile; nothing is left to do")
        changed = check_same_run(saved, self.cfg, self._checksums) if saved else {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._on_signal)
                for number in STOPS
                if signal.getsignal(number) != signal.SIG_IGN  # nohup and `&` have them ignored
            }
        path = checkpoint.latest(self.checkpoints)
        done = checkpoint.step_of(path) if path else 0
        earlier = saved.get(EARLIER, []) if done else []
        if changed and done:
            earlier = [*earlier, {"until_step": done, "functions": changed}]
        self.manifest |= {EARLIER: earlier} if earlier else {}
        checkpoint.write_json(self.out / RUN, self.manifest)
        self._log = log = Log(self.out, self.cfg.log, self.stage, total, done, progress_metrics)
        for note in filter(None, [*self.take_notes(), contention_note(torch.get_num_threads())]):
            log.message(note)
        if path:
            saved = checkpoint.load(path)
            for name, part in state.items():
                part.load_state_dict(saved[name])
            checkpoint.restore_random_states(saved["random"])
            log.message(f"goes on after step {done} of {total} ({path})")
        for part in state.values():
            if isinstance(part, Learner) and isinstance(part.model, Model):
                check_saving(part.model, self.checkpoints)
        self._last_save = clock()
        return log

    def checkpoint(self, step: int, state: Mapping[str, Stateful]) -> None:
        """Save `state` every log.checkpoint_every steps, log.checkpoint_minutes after the last save, and at the last
        step; after a signal, save it and exit."""
        every, minutes = self.cfg.log.checkpoint_every, self.cfg.log.checkpoint_minutes
        is_due = (every and step % every == 0) or (minutes and clock() - self._last_save >= 60 * minutes)
        if is_due or step == self.log.total or self._signal:
            with self.log.phase("save"):
                saved = {name: part.state_dict() for name, part in state.items()}
                saved["random"] = checkpoint.random_states()
                checkpoint.save(self.checkpoints, step, saved, self.cfg.log.keep)
            self._last_save = clock()
        if self._signal:
            self.log.message(f"stopped by signal {self._signal} after step {step}; the same command goes on from here")
            raise SystemExit(128 + self._signal)

    def finish(self, write: Callable[[Path], object], summary: Mapping[str, object]) -> None:
        """Let `write` fill a folder, move its files into `out`, and mark the run as finished with `summary`. UserError,
        and the checkpoints stay, if the folder is not the model that `write` saved with a probe."""
        folder = self.out / "finished"
        with writing(self.out), checkpoint.atomic_folder(folder) as unfinished:
            write(unfinished)
        notes = check_finished(folder)
        with writing(self.out):
            for entry in sorted(folder.iterdir()):
                if kept := move_in(entry, self.out):
                    self.log.message(f"{self.out / entry.name} was not of this run; it is {kept} now")
            folder.rmdir()
        checkpoint.write_json(
            self.out / RUN, self.manifest | {"finished": {**summary, **({"notes": notes} if notes else {})}}
        )
        for folder in (self.checkpoints / BEST, *checkpoint.all_steps(self.checkpoints)):  # it never resumes
            shutil.rmtree(folder, ignore_errors=True)
        (self.checkpoints / LOCK).unlink(missing_ok=True)  # who waits for it sees in run.json that nothing is left
        with suppress(OSError):  # a file of the user's is in it
            self.checkpoints.rmdir()
        self.finished = True
        for note in notes:
            self.log.message(note)
        self.log.message(f"finished; the model is in {self.out}")

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._signal:
            # a closing terminal may send SIGHUP twice, and a batch system SIGTERM; a second Ctrl-C is meant
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._signal = number
        if sys.stderr is not None:  # else another file may have the number 2
            with suppress(OSError):  # the terminal may be gone
                os.write(2, STOPPING)

    def _environment_notes(self, saved: dict[str, Any]) -> Iterator[str]:
        """Yield a note for another torch version and another number of threads than the run was started with."""
        for section, name in (("versions", "torch"), ("machine", "threads")):
            was, value = saved[section].get(name), self.manifest[section][name]
            if was != value:
                yield f"{name} was {was} when the run was started and is {value}: its last bits may differ"


class BestModel:
    """Keeps the weights with the highest score beside the checkpoints until the run is finished.

    step and score: those of the kept weights; 0 and None before the first update.
    """

    def __init__(self, run_folder: RunFolder):
        self.folder, self.step = run_folder.checkpoints / BEST, 0
        self.score: float | None = None

    def update(self, step: int, score: float, save: Callable[[Path], object]) -> None:
        """Keep this step's weights if their score is the highest; of equal scores the first stays."""
        if score > (-math.inf if self.score is None else self.score):
            self.score, self.step = score, step
            with writing(self.folder), checkpoint.atomic_folder(self.folder) as folder:
                save(folder)

    def writer(self, last_step: int, save: Callable[[Path], object]) -> Callable[[Path], object]:
        """Return a function that writes the kept weights into a folder: `save` if they are those of the last step."""
        if self.step in (0, last_step):
            return save
        return lambda folder: shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.step = state["score"], state["step"]
        checkpoint.undo_interrupted_write(self.folder)
