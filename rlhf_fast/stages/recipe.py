"""`rlhf-fast run recipe.yaml`: the stages one after another, each finding what the one before it made.

A recipe holds `out`, `preset`, `seed` and `device` for all, and a section for each stage that is to run. What is not
said follows: a stage writes to out/<stage>, the reward model and the policy start from the sft directory, and PPO's
reward is the reward directory. A finished stage is skipped; one whose settings have changed since is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.config.presets import preset
from rlhf_fast.config.resolve import Setting, difference, from_json, read_yaml, resolve, show
from rlhf_fast.config.stages import STAGES, StageConfig
from rlhf_fast.data.rows import must_exist
from rlhf_fast.errors import UserError, writing
from rlhf_fast.run.memory import peak_memory, reset_peak
from rlhf_fast.run.plot import read_metrics

SHARED = ("out", "preset", "seed", "device")
NOTES = "recipe.json"
LINKS = {"reward": (("model.path", "sft"),), "ppo": (("policy.path", "sft"), ("reward", "reward"))}
"""Stage -> the setting that is another stage's directory, and which stage's."""
RESULTS = {
    "sft": ("valid/sft", "loss/sft"),
    "reward": ("valid/accuracy", "reward/accuracy"),
    "ppo": ("objective/scores", "objective/kl"),
}
"""Metrics that the table shows."""

UNFILLED = "PATH-OR-HUB-NAME"
TEMPLATE = """\
# A recipe: `rlhf-fast run {name}` runs its stages in order and skips those that are finished.
# `rlhf-fast show-config sft` (reward, ppo) lists every setting; `rlhf-fast check FILE` looks at a data file.
out: runs/first        # each stage writes to a folder in here
preset: default        # or paper, or tutorial: hyperparameters laid below what stands in this file
seed: 0

sft:                   # learn from demonstrations
  model.path: {unfilled}
  data:
    path: demonstrations.jsonl     # rows: prompt + completion, or messages, alpaca, sharegpt
    # columns: {{completion: answer}}  # if the file calls them otherwise
    # template: dialog             # how a prompt becomes text: auto, chat, plain, dialog
  epochs: 2
  optim.lr: 1e-5
  residual_dropout: 0    # the paper's 0.2 is for GPT-3; it wrecks most models that were pretrained without dropout

reward:                # learn from ranked responses; starts from the sft folder
  data.path: rankings.jsonl        # rows: prompt + responses + ranks, or prompt + chosen + rejected
  demonstrations.path: demonstrations.jsonl   # their mean score becomes 0
  optim.lr: 9e-6

ppo:                   # policy from the sft folder, reward from the reward folder
  # reward: my_module:my_function  # instead: a function from a list of texts to their scores; drop `reward:` above
  data.path: prompts.jsonl         # rows: prompt
  # pretrain.path: texts.jsonl     # rows: text; adds PPO-ptx
  episodes: 10240
  sampling.max_new_tokens: 128
  kl.coef: 0.02
"""


class Plan(NamedTuple):
    """A recipe read: where it writes, and the settings of its stages in order."""

    out: Path
    stages: dict[str, StageConfig]


def write_template(path: str | Path) -> Path:
    """Writes a commented recipe; never over a file that is there."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path}: exists already; choose another name")
    with writing(path):
        path.write_text(TEMPLATE.format(name=path, unfilled=UNFILLED), encoding="utf-8")
    return path


def read_recipe(path: str | Path) -> Plan:
    """The recipe's stages, everything resolved, every needed path named, every data file there."""
    values = read_yaml(path)
    shared, sections = _sections(path, values)
    if not sections:
        raise UserError(f"{path}: holds no stage; give at least one of the sections {', '.join(STAGES)}")
    out = Path(str(shared["out"].value) if "out" in shared else "runs/first")
    chosen = str(shared["preset"].value or "") if "preset" in shared else ""
    stages: dict[str, StageConfig] = {}
    for stage, cls in STAGES.items():
        if stage not in sections:
            continue
        for setting, item in sections[stage].items():
            if item.value == UNFILLED:
                raise UserError(
                    f"{stage}: {setting} is still {UNFILLED}; write the folder or hub name of a language model there"
                    f" ({item.origin})"
                )
        follows = {"out": Setting(str(out / stage), "the recipe")}
        for setting, source in LINKS.get(stage, ()):
            if source in stages:
                follows[setting] = Setting(stages[source].out, f"the {source} stage")
        common = {name: shared[name] for name in ("seed", "device") if name in shared}
        stages[stage] = resolve(cls, preset(stage, chosen), follows, common, sections[stage])
        stages[stage].ready()
        for file in stages[stage].data_files():
            must_exist(file)
    return Plan(out, stages)


def _sections(
    path: str | Path, values: Mapping[str, Setting]
) -> tuple[dict[str, Setting], dict[str, dict[str, Setting]]]:
    shared: dict[str, Setting] = {}
    sections: dict[str, dict[str, Setting]] = {}
    for name, item in values.items():
        stage, dot, rest = name.partition(".")
        if stage in STAGES and (dot or item.value is None):
            sections.setdefault(stage, {})
            if dot:
                sections[stage][rest] = item
        elif name in SHARED:
            shared[name] = item
        else:
            known = ", ".join([*SHARED, *STAGES])
            raise UserError(f'{path}: no setting "{name}" for all stages; there are {known} ({item.origin})')
    return shared, sections


def run_recipe(path: str | Path, say: Callable[[str], None] = print) -> None:
    """Runs what is not finished, in order, and prints the table."""
    plan = read_recipe(path)
    done = {stage: finished(cfg) for stage, cfg in plan.stages.items()}
    notes = _read_notes(plan.out)
    for stage in plan.stages:
        sources = [source for _, source in LINKS.get(stage, ()) if source in plan.stages]
        stale = [s for s in sources if done[stage] and not (done[s] and _same_input(notes, stage, s, plan))]
        if stale:
            raise UserError(
                f"{plan.stages[stage].out}: was made from another {stale[0]} run than the one the recipe has now;"
                " move it away to run the stage again, or choose another `out`"
            )
    for stage, cfg in plan.stages.items():
        if done[stage]:
            say(f"{stage}: finished already, in {cfg.out}")
            continue
        started = time.perf_counter()
        reset_peak()
        try:
            _stage_function(stage)(cfg)
        finally:
            note = notes.setdefault(stage, {})
            note["seconds"] = note.get("seconds", 0.0) + time.perf_counter() - started
            note["peak"] = max(note.get("peak", 0), peak_memory())
            sources = [source for _, source in LINKS.get(stage, ()) if source in plan.stages]
            note["inputs"] = {source: _digest(plan.stages[source].out) for source in sources}
            if plan.out.is_dir():
                with writing(plan.out / NOTES):
                    (plan.out / NOTES).write_text(json.dumps(notes, indent=1), encoding="utf-8")
    say("\n".join(table(plan, notes)))


def _stage_function(stage: str) -> Callable[[Any], object]:
    from rlhf_fast.stages import ppo, reward, sft

    return {"sft": sft.run, "reward": reward.run, "ppo": ppo.run}[stage]


def finished(cfg: StageConfig) -> bool:
    """Whether `out` holds this stage, finished. UserError if it was run there with other settings."""
    from rlhf_fast.run.folder import FREE

    path = Path(cfg.out) / "run.json"
    if not path.is_file():
        return False
    told = json.loads(path.read_text(encoding="utf-8"))
    if told.get("stage") != cfg.stage:
        raise UserError(f"{cfg.out}: holds a run of {told.get('stage')}, not {cfg.stage}; choose another `out`")
    rows = difference(from_json(cfg.stage, told["config"]), cfg)
    differ = [f"{key} = {show(was)}, the recipe has {show(now)} now" for key, was, now in rows if key not in FREE]
    if differ:
        raise UserError(
            f"{cfg.out}: was {'finished' if 'finished' in told else 'started'} with {'; '.join(differ)}; set"
            f" {'them' if len(differ) > 1 else 'it'} back, or choose another `out`"
        )
    return "finished" in told


def _read_notes(out: Path) -> dict[str, dict[str, Any]]:
    """What earlier calls of this recipe measured: stage -> seconds, peak, and the digests of its inputs."""
    try:
        return json.loads((out / NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _same_input(notes: Mapping[str, dict], stage: str, source: str, plan: Plan) -> bool:
    """Whether `stage` was made from the `source` run that is there now (a stage run by hand is believed)."""
    digest = notes.get(stage, {}).get("inputs", {}).get(source)
    return digest is None or digest == _digest(plan.stages[source].out)


def _digest(folder: str) -> str:
    """Of the names, sizes and times of a stage's weights: another one when the stage was run anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def table(plan: Plan, notes: Mapping[str, dict[str, Any]]) -> list[str]:
    """One line a stage: time, tokens a second, peak memory, the numbers that say how it went."""
    rows = [("stage", "time", "tokens/s", "peak memory", "result", "folder")]
    for stage, cfg in plan.stages.items():
        metrics = read_metrics(cfg.out)
        note = notes.get(stage, {})
        seconds = note.get("seconds") or sum(row.get("time/step", 0.0) for row in metrics)
        busy = sum(row.get("time/step", 0.0) for row in metrics)
        tokens = sum(row.get("perf/tokens_per_second", 0.0) * row.get("time/step", 0.0) for row in metrics)
        peak = f"{note['peak'] / 2**30:.2f} GiB" if note.get("peak") else "-"
        clock = f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
        speed = f"{tokens / busy:.0f}" if busy else "-"
        rows.append((stage, clock, speed, peak, _result(stage, metrics), cfg.out))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _result(stage: str, metrics: list[dict]) -> str:
    """First -> last value of the stage's own metrics, of those that were measured."""
    told = []
    for name in RESULTS[stage]:
        values = [row[name] for row in metrics if isinstance(row.get(name), (int, float))]
        if values:
            begin = f"{values[0]:.4g} -> " if len(values) > 1 else ""
            told.append(f"{name} {begin}{values[-1]:.4g}")
    return ", ".join(told[:2]) or "-"
