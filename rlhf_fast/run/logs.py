"""What a run tells: metrics.jsonl (one row a step), samples.jsonl, run.json, one live line, and alarms. No telemetry.

Metric names are those of TRL's PPO (`objective/kl`, `policy/clipfrac_avg`, `val/ratio`, ...), so that old dashboards
keep working. Units: nats for log-probabilities, entropies and KL; seconds for `time/*`.
"""

import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_fast import __version__
from rlhf_fast.errors import UserError, writing

MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py")
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

# When an alarm rings. The first minibatch is trained on by the very weights that sampled it: its probability ratios
# differ from 1 only by rounding, so a larger gap means that sampling and training see different models (dropout, a
# stale cache, another temperature). So it is with the share of tokens whose probability the trainer and the sampler
# put more than a tenth apart: none in float32.
RATIO_GAP = 0.02
RATIO_OUTSIDE = 0.01
KL_PER_TOKEN = 1.0
EOS_RATE = 0.01
LENGTH_GROWTH = 4.0
ENTROPY_LEFT = 0.05


class Alarms:
    """Reads each step's metrics and says, once per fault until it clears, what tends to end a run badly.

    Length and entropy are compared with the first step that had them.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.ringing: set[str] = set()

    def __call__(self, row: Mapping[str, object]) -> list[str]:
        """Sentences for the alarms that begin at this row."""
        now = dict(self._faults({k: v for k, v in row.items() if isinstance(v, float)}))
        started = [text for name, text in now.items() if name not in self.ringing]
        self.ringing = set(now)
        return started

    def _faults(self, row: dict[str, float]) -> Iterator[tuple[str, str]]:
        for name, value in row.items():
            if not math.isfinite(value):
                yield name, f"{name} is {value}"
        for name in ("tokens/length", "objective/entropy_token"):
            if name in row:
                self.first.setdefault(name, row[name])
        ratio = row.get("val/ratio_first", 1.0)
        if abs(ratio - 1) > RATIO_GAP:
            yield "ratio", f"the first minibatch's ratio is {ratio:.4f}, not 1: sampling and training disagree"
        outside = row.get("rollout/ratio_outside", 0.0)
        if outside > RATIO_OUTSIDE:
            yield "gap", f"{outside:.1%} of the tokens have another probability in training than they were sampled with"
        kl = row.get("objective/kl_token", 0.0)
        if abs(kl) > KL_PER_TOKEN:
            yield "kl", f"KL runs away: {kl:.2f} nats a token"
        if row.get("tokens/eos_rate", 1.0) < EOS_RATE:
            rate = f"only {row['tokens/eos_rate']:.1%} of the responses end by themselves"
            yield "eos", f"{rate}; raise sampling.max_new_tokens, train the SFT model longer, or see missing_eos"
        length, before = (found.get("tokens/length", math.nan) for found in (row, self.first))
        if length > LENGTH_GROWTH * before:
            yield "length", f"responses have grown from {before:.0f} to {length:.0f} tokens"
        entropy, before = (found.get("objective/entropy_token", math.nan) for found in (row, self.first))
        if entropy < ENTROPY_LEFT * before:
            yield "entropy", f"entropy fell from {before:.3f} to {entropy:.3f} nats a token"


class Log:
    """One stage's log below `directory`. Rows after step `start` from an earlier, killed process are dropped.

    `headline` names the metrics that the live line shows. `cfg` is a LogConfig.
    """

    def __init__(
        self, directory: str | Path, cfg, title: str, total: int, start: int = 0, headline: tuple[str, ...] = ()
    ) -> None:
        self.directory, self.cfg, self.title, self.total = Path(directory), cfg, title, total
        self.headline, self.seconds, self.tokens = headline, defaultdict(float), 0
        self.alarms = Alarms()
        self.sinks = [_sink(name, self.directory, title) for name in cfg.sinks]
        with writing(self.directory):
            for row in _truncate(self.directory / METRICS, start):
                self.alarms(row)
            _truncate(self.directory / SAMPLES, start)
            self._metrics = open(self.directory / METRICS, "a", encoding="utf-8", newline="\n")
            self._samples = open(self.directory / SAMPLES, "a", encoding="utf-8", newline="\n")
        self.console = Console(stderr=True, highlight=False)
        self._live, self._task = None, None
        if cfg.live and self.console.is_terminal:
            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[told]}"))
            self._live = Progress(TextColumn("{task.description}"), *columns, console=self.console)
            self._task = self._live.add_task(title, total=total, completed=start, told="")
            self._live.start()
        self._start, self._first_step, self._last = time.perf_counter(), start, time.perf_counter()
        self._told = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside as `time/<name>` of the next row. Phases do not nest."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def metrics(self, step: int, values: Mapping[str, object], tokens: int = 0) -> None:
        """Writes one row (every `cfg.every` steps and at the end) and moves the live line on.

        `values` are numbers or 0-d tensors; `tokens` were generated or trained on since the last call.
        """
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        self.tokens += tokens
        begun = self.alarms(row)
        for text in begun:
            self.say(f"alarm at step {step}: {text}", style="yellow")
        if step % self.cfg.every and step != self.total and not begun:
            return
        now = time.perf_counter()
        took, self._last = max(now - self._last, 1e-9), now
        row["time/step"] = took
        row.update({f"time/{name}": seconds for name, seconds in self.seconds.items()})
        row["perf/tokens_per_second"] = self.tokens / took
        if begun:
            row["alarms"] = begun
        self._write(self._metrics, row)
        for sink in self.sinks:
            sink(step, {name: value for name, value in row.items() if isinstance(value, float)})
        self._tell(step, row, took)
        self.seconds.clear()
        self.tokens = 0

    def samples(self, step: int, rows: Iterable[Mapping[str, object]]) -> None:
        """Writes up to `cfg.samples` rows (prompt, response, score, ...) of this step to samples.jsonl."""
        for _, row in zip(range(self.cfg.samples), rows, strict=False):
            self._write(self._samples, {"step": step, **row})

    def say(self, text: str, style: str = "") -> None:
        """One line above the live line, or on its own."""
        self.console.print(f"{self.title}: {text}", style=style, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live line and closes the files."""
        if self._live:
            self._live.stop()
        self._metrics.close()
        self._samples.close()

    def _write(self, stream, row: Mapping[str, object]) -> None:
        with writing(stream.name):
            stream.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()

    def _tell(self, step: int, row: Mapping[str, object], took: float) -> None:
        words = {name: name.replace("valid/", "valid ").rpartition("/")[2] for name in self.headline}
        shown = [f"{words[name]} {row[name]:.4g}" for name in self.headline if name in row]
        shares = [f"{name} {seconds / took:.0%}" for name, seconds in self.seconds.items() if seconds >= 0.01 * took]
        told = "  ".join([*shown, f"{row['perf/tokens_per_second']:.3g} tok/s", *shares])
        if self._live:
            self._live.update(self._task, completed=step, told=told)
            return
        # Without a terminal a line a second is plenty; the file has every row.
        now = time.perf_counter()
        if self.cfg.live and (now - self._told >= 1 or step == self.total):
            self._told = now
            left = (now - self._start) / max(step - self._first_step, 1) * (self.total - step)
            clock = f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
            self.console.print(f"{self.title} {step}/{self.total}  ETA {clock}  {told}", markup=False, soft_wrap=True)


def describe(stage: str, cfg, files: Iterable[str | Path], models: Iterable[str | Path] = ()) -> dict:
    """What run.json says of a run: the stage, its resolved config, the versions at work, and the sha256 of each file
    it reads and of the model in each folder."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft")
    return {
        "stage": stage,
        "config": json.loads(json.dumps(dataclasses.asdict(cfg))),
        "versions": {"rlhf-fast": __version__, "python": platform.python_version()}
        | {name: found for name in packages if (found := _version(name))},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(), "gpu": _gpu()},
        "command": sys.argv,
        "data": {str(file): sha256(file) for file in files},
        "models": {str(folder): model_sha256(folder) for folder in models},
    }


def model_sha256(folder: str | Path) -> str:
    """Of what a model is loaded from: weights, configs, tokenizer and any code. A run's own notes do not count."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in MODEL_FILES and file.name != "run.json" and file.is_file():
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def sha256(file: str | Path) -> str:
    """The checksum of a file of any size, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _finite(value: object) -> object:
    """The row with NaN and infinities as null: strict JSON has no word for them."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _truncate(path: Path, step: int) -> list[dict]:
    """Drops the rows after `step`, and a last line that a crash cut short; returns the rows kept."""
    if not path.exists():
        return []
    kept = [(line, row) for line, row in read_rows(path) if row["step"] <= step]
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_bytes(b"".join(line + b"\n" for line, _ in kept))
    unfinished.replace(path)
    return [row for _, row in kept]


def read_rows(path: Path) -> list[tuple[bytes, dict]]:
    """(line, row) of a file that a Log writes. A last line that was cut short is left out; UserError for any other that
    is not JSON. A line ends at a newline alone: texts may hold U+2028 and other separators as they are."""
    lines, rows = path.read_bytes().split(b"\n"), []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append((line, json.loads(line)))
        except ValueError as error:
            if number >= len(lines) - (not lines[-1]):
                break
            raise UserError(f"{path}:{number}: not JSON: {error}; mend or remove the line") from error
    return rows


def _sink(name: str, directory: Path, title: str):
    """A function (step, values) that forwards a row to another logger, imported only when asked for."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"))
            return lambda step, values: [writer.add_scalar(key, value, step) for key, value in values.items()]
        if name == "wandb":
            import wandb as tracker
        elif name == "trackio":
            import trackio as tracker
        else:
            raise UserError(f"log.sinks: no sink is called {name!r}; there are tensorboard, trackio and wandb")
    except ImportError as error:
        raise UserError(f"log.sinks: {name} is not installed; run `pip install {name}`") from error
    tracker.init(project="rlhf-fast", name=f"{title} {directory}")
    return lambda step, values: tracker.log(values, step=step)
