"""Print what a stage will do and take: rows, steps, tokens, time, memory, disk.

A run that does not fit is refused here, with the nearest setting that does, unless log.check_fit is off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from rlhf_fast.config.stages import PPOConfig, StageConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.run import estimate, machine
from rlhf_fast.run.estimate import Disk, Knobs, Work, gib
from rlhf_fast.run.folder import RunFolder
from rlhf_fast.stages import timing


@dataclass(frozen=True)
class Plan:
    """The rest of a run: what it does and takes."""

    counts: str
    """The sentence on rows, steps and tokens."""
    steps: int
    work: Work
    operations: float
    """Multiplications and additions, roughly."""
    tokens: int
    time: Callable[[float], tuple[float, str]]
    """Guessed seconds -> measured seconds, and the sentence on them."""
    checkpoint: int
    """Bytes of a checkpoint."""
    saved: int
    """Bytes of the models that the finished run leaves."""
    best: int
    """Bytes of the weights that are kept to select from."""


DryRun = bool | Literal["fit"]
"""A dry run says what the stage takes, and ends. fit: only what of memory and disk, before earlier stages have run."""


def tell(cfg: StageConfig, run_folder: RunFolder, model: Model, plan: Plan, dry_run: DryRun) -> bool:
    """Print the plan, and return whether the run ends here. UserError for a run that does not fit."""
    console = Console(stderr=True, highlight=False, emoji=False)

    def message(text: str, style: str = "") -> None:
        console.print(f"{cfg.stage}: {text}", style=style, markup=False, soft_wrap=True)

    for note in run_folder.take_notes() if dry_run != "fit" else ():
        message(note)
    if dry_run != "fit":
        message(plan.counts)
    knobs = _knobs(cfg, plan.work)
    needed = estimate.memory_needed(plan.work, knobs)
    usable = machine.usable_memory(model.device)
    of_device = "GPU memory" if plan.work.on_gpu else "memory"
    problems = []
    if usable is not None and needed > usable:
        problems.append(_too_little_memory(cfg, plan.work, knobs, of_device, needed, usable))
    seconds = 0.0
    if not problems and dry_run != "fit":  # a pass might exhaust the memory
        guess = timing.guessed_seconds(plan.operations, model.device)
        if plan.steps and guess >= timing.MIN_SECONDS:
            seconds, sentence = plan.time(guess)
            message(sentence)
    disk = _disk(cfg, plan, seconds)
    free = machine.free_disk(cfg.out) + machine.size_of(run_folder.checkpoints)
    if disk.running > free:
        problems.append(_too_little_disk(cfg, plan, disk, free, seconds))
    memory = f"{of_device} about {gib(needed)}" if usable is None else (
        f"{of_device} about {estimate.size_in_gib(needed)} of {gib(usable)}"
    )  # fmt: skip
    will = "will take " if dry_run == "fit" else ""
    message(f"{will}{memory}; disk {gib(disk.running)}, later {estimate.size_in_gib(disk.after)}, of {gib(free)} free")
    if problems and cfg.log.check_fit:
        way = "to go on all the same set log.check_fit to false"
        raise UserError(f"{cfg.stage}: {'; '.join(problems)}; {way}")
    for problem in problems:
        message(f"{problem}; log.check_fit is false, so it goes on", style="yellow")
    if dry_run is True:
        message("a dry run ends here; nothing is written")
    return bool(dry_run)


def _knobs(cfg: StageConfig, work: Work) -> Knobs:
    if not isinstance(cfg, PPOConfig):
        return Knobs(cfg.optim.micro_batch_tokens)
    budget = max(cfg.optim.micro_batch_tokens, cfg.value_optim.micro_batch_tokens)
    return Knobs(budget, slots=len(work.prompts), cache_mb=cfg.sampling.cache_mb)


def _settings(cfg: StageConfig, before: Knobs, after: Knobs) -> str:
    """Return the settings in which `after` differs, as a user writes them."""
    models = ("policy", "value") if isinstance(cfg, PPOConfig) else ("model",)
    optims = ("optim", "value_optim") if isinstance(cfg, PPOConfig) else ("optim",)
    found = []
    if after.micro_batch_tokens != before.micro_batch_tokens:
        found.append((optims, f"micro_batch_tokens {after.micro_batch_tokens}"))
    if after.cache_mb != before.cache_mb:
        found.append((("sampling",), f"cache_mb {after.cache_mb}"))
    if after.checkpointing != before.checkpointing:
        found.append((models, "gradient_checkpointing true"))
    if after.bfloat16 != before.bfloat16:
        found.append((models, "dtype bfloat16"))
    if after.rank != before.rank:
        found.append((models, f"lora.rank {after.rank}"))
    return ", ".join(f"{group}.{text}" for groups, text in found for group in groups)


def _too_little_memory(cfg: StageConfig, work: Work, knobs: Knobs, name: str, needed: int, usable: int) -> str:
    text = f"needs about {gib(needed)} of {name}, and {gib(usable)} can be had"
    smallest = needed
    for tried in estimate.smaller(work, knobs):
        size = estimate.memory_needed(work, tried)
        smallest = min(smallest, size)
        if size <= usable:
            return f"{text}: {_settings(cfg, knobs, tried)} would take {gib(size)}"
    return f"{text}; no setting makes this model fit, the least is {gib(smallest)}"


def _disk(cfg: StageConfig, plan: Plan, seconds: float, keep: int = 0) -> Disk:
    every, minutes = cfg.log.checkpoint_every, cfg.log.checkpoint_minutes
    written = 1 + (plan.steps // every if every else 0) + (int(seconds / 60 / minutes) if minutes else 0)
    return estimate.disk_needed(plan.checkpoint, plan.saved, plan.best, keep or cfg.log.keep, written)


def _too_little_disk(cfg: StageConfig, plan: Plan, disk: Disk, free: int, seconds: float) -> str:
    needed = gib(disk.running)
    needed = needed if needed.startswith("under") else f"about {needed}"
    text = f"needs {needed} of disk in {cfg.out} while it runs, and {gib(free)} are free"
    for keep in range(cfg.log.keep - 1, 0, -1):
        if (size := _disk(cfg, plan, seconds, keep).running) <= free:
            return f"{text}: log.keep {keep} would take {gib(size)}"
    only_last = estimate.disk_needed(plan.checkpoint, plan.saved, plan.best, 1, 1).running
    if only_last <= free:
        return f"{text}: log.checkpoint_every 0, log.checkpoint_minutes 0 would take {gib(only_last)}"
    return f"{text}; the least is {gib(only_last)}: free some space, or choose another `out`"
