"""A stage's output folder: when a run may resume, from which step, and what it saves on SIGTERM.

`out/` becomes an ordinary Hugging Face folder and holds run.json, metrics.jsonl, samples.jsonl and checkpoints/, which
is emptied at the end. The same command resumes from the newest undamaged checkpoint. With other settings, data or
models it is refused; once the run is finished it does nothing. SIGTERM and Ctrl-C write a checkpoint at the end of the
step and exit with 143 and 130.
"""

from __future__ import annotations

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
from typing import Any, Protocol, TextIO

from rlhf_fast.config.fields import DataConfig
from rlhf_fast.config.resolve import show
from rlhf_fast.config.stages import StageConfig
from rlhf_fast.errors import UserError, writing
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import check_folder, check_saving
from rlhf_fast.run import checkpoint
from rlhf_fast.run.info import run_info
from rlhf_fast.run.logs import Log
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.rewards import is_function, source_file

RUN, BEST = "run.json", "best"

MAY_DIFFER_ON_RESUME = (
    "out",
    "resume",
    *(f"log.{name}" for name in ("every", "samples", "checkpoint_every", "keep", "live", "sinks")),
)
"""Settings that do not change the weights that `out` gets. log.validate_every does: it decides at which steps there are
weights to select from."""


class Stateful(Protocol):
    """A part of a run that is saved and restored: a learner, a controller, a selection."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class RunFolder:
    """The folder `cfg.out` of one stage's run, as a context manager. `data` are the settings whose files it reads.

    finished: nothing is left to do. notes: sentences on the data, which `start_or_resume` prints. device: None =
    automatic.
    """

    def __init__(self, cfg: StageConfig, *data: DataConfig):
        cfg.ready()
        self.cfg, self.stage, self.out = cfg, cfg.stage, Path(cfg.out)
        self.checkpoints = self.out / "checkpoints"
        self.finished = False
        self.notes: list[str] = []
        self.device = None if cfg.device == "auto" else cfg.device
        self._log: Log | None = None
        self._lock: TextIO | None = None
        self._handlers: dict[int, Any] = {}
        self._signal = 0
        self.manifest = run_info(self.stage, cfg, _files_read(cfg, data), _model_folders(cfg))
        if (self.out / RUN).exists():
            if not cfg.resume:
                raise UserError(f"{self.out}: holds a run already; choose another `out`, or set resume to true")
            self._check_same_run(self._read_manifest())
        elif (self.out / "config.json").exists():
            raise UserError(f"{self.out}: holds a model that no run of ours wrote there; choose another `out`")

    def __enter__(self) -> RunFolder:
        if self.finished:
            print(f"{self.stage}: {self.out} is finished already; nothing is done", file=sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._log:
            self._log.close()
        if self._lock:
            self._lock.close()

    @property
    def log(self) -> Log:
        """The run's log. It is opened by `start_or_resume`."""
        if self._log is None:
            raise RuntimeError("RunFolder: call start_or_resume() first")
        return self._log

    def start_or_resume(self, total: int, progress_metrics: tuple[str, ...], state: Mapping[str, Stateful]) -> Log:
        """Lock the folder, restore `state` from the newest checkpoint, and open the log of a run of `total` steps.

        `log.start` is the number of steps done.
        """
        self._take_lock()
        if "finished" in self._read_manifest():
            raise UserError(f"{self.out}: another process has finished this run meanwhile; nothing is left to do")
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        checkpoint.write_json(self.out / RUN, self.manifest)
        path = checkpoint.latest(self.checkpoints)
        done = checkpoint.step_of(path) if path else 0
        self._log = log = Log(self.out, self.cfg.log, self.stage, total, done, progress_metrics)
        for note in self.notes:
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
        return log

    def checkpoint(self, step: int, state: Mapping[str, Stateful]) -> None:
        """Save `state` every log.checkpoint_every steps and at the last step; after a signal, save it and exit."""
        every = self.cfg.log.checkpoint_every
        if (every and step % every == 0) or step == self.log.total or self._signal:
            with self.log.phase("save"):
                saved = {name: part.state_dict() for name, part in state.items()}
                saved["random"] = checkpoint.random_states()
                checkpoint.save(self.checkpoints, step, saved, self.cfg.log.keep)
        if self._signal:
            self.log.message(f"stopped by signal {self._signal} after step {step}; the same command goes on from here")
            raise SystemExit(128 + self._signal)

    def finish(self, write: Callable[[Path], object], summary: Mapping[str, object]) -> None:
        """Let `write` fill a folder, move its files into `out`, and mark the run as finished with `summary`. UserError,
        and the checkpoints stay, if the folder is not the model that `write` saved with a probe."""
        folder = self.out / "finished"
        with writing(self.out):
            with checkpoint.atomic_folder(folder) as unfinished:
                write(unfinished)
            check_folder(folder)
            for entry in sorted(folder.iterdir()):
                target = self.out / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                entry.replace(target)
            folder.rmdir()
        checkpoint.write_json(self.out / RUN, self.manifest | {"finished": dict(summary)})
        for folder in (self.checkpoints / BEST, *self.checkpoints.glob("step_*")):  # a finished run never resumes
            shutil.rmtree(folder, ignore_errors=True)
        self.finished = True
        self.log.message(f"finished; the model is in {self.out}")

    def _take_lock(self) -> None:
        with writing(self.out):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.checkpoints / "lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.out}: another process runs there; wait for it or choose another `out`") from error

    def _read_manifest(self) -> dict[str, Any]:
        """Return the run.json in the folder, {} if there is none."""
        path = self.out / RUN
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        os.write(2, b"\nthe step is being finished and saved, then the run stops; a second Ctrl-C stops it at once\n")

    def _check_same_run(self, saved: dict[str, Any]) -> None:
        """Raise UserError if the folder holds a run of another stage or with other settings, data or models.

        Sets `finished`, and notes another torch version or number of threads.
        """
        if saved["stage"] != self.stage:
            raise UserError(f"{self.out}: holds a run of {saved['stage']}, not {self.stage}; choose another `out`")
        before, now = _flatten(saved["config"]), _flatten(self.manifest["config"])
        differ = [
            f"{key} = {show(before.get(key))}, now {show(now.get(key))}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in MAY_DIFFER_ON_RESUME
        ]
        if differ:
            raise UserError(
                f"{self.out}: was started with {'; '.join(differ)}; set {'them' if len(differ) > 1 else 'it'} back or"
                " choose another `out`"
            )
        for file, digest in self.manifest["data"].items():
            if saved["data"].get(file, digest) != digest:
                raise UserError(f"{file}: has changed since {self.out} was started with it; choose another `out`")
        for folder, digest in self.manifest["models"].items():
            if saved.get("models", {}).get(folder, digest) != digest:
                raise UserError(
                    f"{folder}: the model in it has changed since {self.out} was started with it; choose another `out`"
                )
        for section, name in (("versions", "torch"), ("machine", "threads")):
            was, value = saved[section].get(name), self.manifest[section][name]
            if was != value:
                note = f"{name} was {was} when the run was started and is {value}: its last bits may differ"
                self.notes.append(note)
        self.finished = "finished" in saved


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


def _files_read(cfg: StageConfig, data: tuple[DataConfig, ...]) -> list[str | Path]:
    """Return the data files, and the source of a reward function if there is one."""
    files: list[str | Path] = [file for part in data for file in (part.path, part.valid) if Path(file).is_file()]
    sources = [source_file(spec) for spec in cfg.model_paths() if is_function(spec)]
    return files + [source for source in sources if source]


def _model_folders(cfg: StageConfig) -> list[str]:
    return [path for path in cfg.model_paths() if Path(path).is_dir()]


def _flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Turn a nested dict into one with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat
