"""`rlhf-fast run recipe.yaml`: runs the stages in order, each from the folders of the earlier ones.

A recipe holds `out`, `preset`, `seed` and `device` for all stages, and a section for each stage that is to run. By
default a stage writes to out/<stage>, the reward model and the policy start from the sft folder, and PPO's reward is
the reward folder. A finished stage is skipped; a stage whose settings have changed since is refused. With a section
`eval` all models are evaluated afterwards, by default the one that sft starts from, sft's and ppo's. Flags over the
recipe's values: config/recipe_flags.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.presets import preset
from rlhf_fast.config.recipe_flags import Overrides
from rlhf_fast.config.resolve import resolve
from rlhf_fast.config.sections import EVAL, PASSED_ON, shared_text, split_sections
from rlhf_fast.config.stages import STAGES, PPOConfig, RewardConfig, SFTConfig, StageConfig, require_stage
from rlhf_fast.config.yaml_file import Setting, read_yaml
from rlhf_fast.data.files import require_data
from rlhf_fast.errors import UserError, writing
from rlhf_fast.run.logs import read_metrics
from rlhf_fast.run.memory import free_memory, peak_memory, reset_peak_memory
from rlhf_fast.run.outputs import RUN, check_run_folder, read_json
from rlhf_fast.run.terminal import aligned, format_duration, format_speed

MEASUREMENTS = "recipe.json"
UPSTREAM = {"reward": (("model.path", "sft"),), "ppo": (("policy.path", "sft"), ("reward", "reward"))}
"""Stage -> (setting that is an earlier stage's folder, that stage)."""
SUMMARY_METRICS = {
    "sft": ("valid/sft", "loss/sft"),
    "reward": ("valid/accuracy", "reward/accuracy"),
    "ppo": ("objective/scores", "objective/kl"),
}
"""Metrics in the table at the end."""

OTHER_FOLDER = "choose another `out`"
UNFILLED = "PATH-OR-HUB-NAME"
TEMPLATE = """\
# A recipe: `rlhf-fast run {name}` runs its stages in order and skips those that are finished.
# `rlhf-fast show-config sft` (reward, ppo, eval) lists every setting; `rlhf-fast check FILE` looks at a data file.
# A flag replaces a value: `rlhf-fast run {name} --ppo.kl.coef 0.1 --ppo.out runs/b`.
out: runs/first        # each stage writes to a folder in here
preset: default        # or paper, or tutorial: hyperparameters under the settings in this file
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
  # log.eval_every: 100            # steps between evaluations by the tasks of `rlhf-fast eval`; 0 = none

reward:                # learn from ranked responses; starts from the sft folder
  data.path: rankings.jsonl        # rows: prompt + responses + ranks, or prompt + chosen + rejected
  demonstrations.path: demonstrations.jsonl   # their mean score becomes 0
  optim.lr: 9e-6

ppo:                   # policy from the sft folder, reward from the reward folder
  # reward: my_module:my_function  # instead: f(completions, COLUMN, **kwargs), as in TRL; drop `reward:` above
  # reward: [runs/first/reward, my_module:my_function]   # or both, with reward_weights: [1, 0.5]
  data.path: prompts.jsonl         # rows: prompt
  # pretrain.path: texts.jsonl     # rows: text; adds PPO-ptx
  episodes: 10240
  sampling.max_new_tokens: 128
  kl.coef: 0.02
  # log.eval_every: 20             # batches between evaluations; log.eval_tasks and log.eval_data choose the tasks

# eval:                  # then compare the models before and after (`rlhf-fast eval --list --data sets`)
#   data: sets                       # folder with truthfulqa.jsonl, hellaswag.jsonl and so on
#   tasks: [truth, toxicity, bias, tax, refusal]
#   limit: 200
"""


class Recipe(NamedTuple):
    """A recipe's output folder, the settings of its stages in order, and those of the evaluation, if it has one."""

    out: Path
    stages: dict[str, StageConfig]
    evaluation: EvalConfig | None = None


def write_template(path: str | Path) -> Path:
    """Write a commented recipe; raise UserError if the file exists."""
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already; choose another name")
    with writing(path), path.open("x", encoding="utf-8") as stream:
        stream.write(TEMPLATE.format(name=path, unfilled=UNFILLED))
    return path


def read_recipe(path: str | Path, flags: Overrides | None = None) -> Recipe:
    """Read and resolve a recipe; check that every required path is set and every data file exists.

    flags: settings over those of the recipe.
    """
    flags = flags or {}
    shared, sections = split_sections(path, read_yaml(path))
    if not sections:
        raise UserError(f"{path}: holds no stage; give at least one of the sections {', '.join(STAGES)}")
    _check_sections(path, sections, flags)
    for_all = {name: setting for name, setting in flags.get("", {}).items() if name in PASSED_ON}
    given = {name: {**section, **for_all, **flags.get(name, {})} for name, section in sections.items()}
    shared |= flags.get("", {})
    out = Path(shared_text(shared, "out", "runs/first")).expanduser()
    preset_name = shared_text(shared, "preset", "")
    common: dict[str, Setting] = {name: shared[name] for name in PASSED_ON if name in shared}
    stages: dict[str, StageConfig] = {}
    for stage, cls in STAGES.items():
        if stage not in sections:
            continue
        for name, setting in given[stage].items():
            if setting.value == UNFILLED:
                raise UserError(
                    f"{stage}: {name} is still {UNFILLED}; write the folder or hub name of a language model there"
                    f" ({setting.origin})"
                )
        defaults = {"out": Setting(str(out / stage), "the recipe")}
        for name, source in UPSTREAM.get(stage, ()):
            if source in stages:
                defaults[name] = Setting(stages[source].out, f"the {source} stage")
        cfg = resolve(cls, preset(stage, preset_name), defaults, common, given[stage])
        cfg.ready()
        for data in cfg.data_paths():
            require_data(data)
        stages[stage] = cfg
    evaluation = None
    if EVAL in sections:
        models = tuple(f"{name}={folder}" for name, folder in _models(stages).items())
        folder = _evaluation_folder(out, stages, flags)
        defaults = {"out": Setting(folder, "the recipe"), "models": Setting(models, "the recipe")}
        evaluation = resolve(EvalConfig, defaults, common, given[EVAL])
        evaluation.baseline_of(tuple(evaluation.model_paths()))
    return Recipe(out, stages, evaluation)


def _check_sections(path: str | Path, sections: Collection[str], flags: Overrides) -> None:
    """Raise UserError for a flag of a section that the recipe does not have: a stage would not run for it."""
    for section in flags:
        if section and section not in sections:
            flag = next(iter(flags[section].values())).origin
            raise UserError(f"{flag}: {path} has no section {section}; it has {', '.join(sections)}")


def _evaluation_folder(out: Path, stages: Mapping[str, StageConfig], flags: Overrides) -> str:
    """Return the folder of the evaluation: beside that of a stage which a flag sends elsewhere, so that the evaluation
    of the recipe's own models stays."""
    moved = [stages[stage].out for stage in stages if "out" in flags.get(stage, {})]
    return f"{moved[-1]}-{EVAL}" if moved else str(out / EVAL)


def _models(stages: Mapping[str, StageConfig]) -> dict[str, str]:
    """Return name -> folder of a recipe's language models: the one that it starts from, and those that it makes."""
    models: dict[str, str] = {}
    for stage, cfg in stages.items():
        if isinstance(cfg, SFTConfig):
            models |= {"base": cfg.model.path, stage: cfg.out}
        elif isinstance(cfg, PPOConfig):
            models |= {} if "sft" in stages else {"sft": cfg.policy.path}
            models[stage] = cfg.out
    return models


def planned_models(stages: Mapping[str, StageConfig]) -> dict[str, Literal["lm", "scalar"]]:
    """Return the folder of each stage and the head of the model that it writes there."""
    return {cfg.out: "scalar" if isinstance(cfg, RewardConfig) else "lm" for cfg in stages.values()}


def run_recipe(
    path: str | Path, echo: Callable[[str], None] = print, flags: Overrides | None = None, dry_run: bool = False
) -> list[str]:
    """Run the stages that are not finished, in order, and print the table; then evaluate. Return a sentence for each
    figure that is below its threshold. dry_run: only print what each of these stages takes."""
    recipe = read_recipe(path, flags)
    check_recipe(recipe)
    measurements = run_stages(recipe, echo, dry_run)
    if dry_run:
        return []
    echo("\n".join(table(recipe, measurements)))
    if recipe.evaluation is None:
        return []
    from rlhf_fast.eval.evaluate import evaluate_and_print

    return evaluate_and_print(recipe.evaluation)


def check_recipe(recipe: Recipe, remedy: Callable[[str], str] | None = None) -> None:
    """Raise UserError, before the first stage runs, for all that can be seen to be wrong.

    remedy: returns what to do for a stage whose folder holds another run; None names the flags of new folders.
    """
    remedy = remedy or partial(new_folders, recipe)
    done = _finished_stages(recipe, remedy)
    read_measurements(recipe.out)
    if recipe.evaluation is not None:  # its mistakes are known before days of training
        from rlhf_fast.eval.evaluate import check
        from rlhf_fast.stages.fit import check_device

        check_device(EVAL, recipe.evaluation.device)
        check(recipe.evaluation, planned=planned_models(recipe.stages))
        _check_gold(recipe)
    _check_stages([cfg for stage, cfg in recipe.stages.items() if not done[stage]], list(recipe.stages.values()))


def run_stages(recipe: Recipe, echo: Callable[[str], None] = print, dry_run: bool = False) -> dict[str, dict[str, Any]]:
    """Run the stages that are not finished, in order; return the measurements of all. dry_run: as of `run_recipe`."""
    done = _finished_stages(recipe, partial(new_folders, recipe))
    measurements = read_measurements(recipe.out)
    if not dry_run:
        check_room(recipe)
    for stage, cfg in recipe.stages.items():
        if done[stage]:
            echo(f"{stage}: finished already, in {cfg.out}")
        elif dry_run:
            run_stage(cfg, dry_run, list(recipe.stages.values()))
        else:
            _run_measured(stage, recipe, measurements)
    return measurements


def check_room(recipe: Recipe, names: Collection[str] = STAGES) -> None:
    """Raise UserError, before the first stage trains, if memory or disk is too small for a later one of `names`."""
    left = [(name, cfg) for name, cfg in recipe.stages.items() if not finished(cfg)][1:]  # the first one looks itself
    for cfg in [cfg for name, cfg in left if name in names and cfg.log.check_fit]:
        run_stage(cfg, "fit", list(recipe.stages.values()))
        free_memory()


def _finished_stages(recipe: Recipe, remedy: Callable[[str], str]) -> dict[str, bool]:
    """Return for each stage whether it is finished. UserError if its folder holds another run."""
    done = {stage: finished(cfg, remedy(stage)) for stage, cfg in recipe.stages.items()}
    for stage, cfg in recipe.stages.items():
        read = {Path(path) for path in cfg.model_paths()} if done[stage] else set()
        for source, earlier in recipe.stages.items():
            if Path(earlier.out) in read and not done[source]:
                raise UserError(
                    f"{cfg.out}: was made from another {source} run than the one the recipe has now;"
                    f" move it away to run the stage again, or {remedy(stage)}"
                )
    return done


def new_folders(recipe: Recipe, stage: str) -> str:
    """Return the flags that give a stage a new folder, and those later ones that read it and hold a run."""
    changed = dependents(recipe.stages, [stage])
    held = [name for name in changed if name == stage or (Path(recipe.stages[name].out) / RUN).exists()]
    return "give " + " ".join(f"--{name}.out {_free(recipe.stages[name].out)}" for name in held)


def _free(folder: str) -> str:
    """Return a name like that of a folder, by which there is nothing yet."""
    return next(name for number in count(2) if not os.path.lexists(name := f"{folder}-{number}"))


def dependents(stages: Mapping[str, StageConfig], changed: Collection[str]) -> list[str]:
    """Return the stages in `changed` and those that read the folder of one of them, directly or not."""
    found: list[str] = []
    for stage, cfg in stages.items():
        read = {Path(path) for path in cfg.model_paths()}
        if stage in changed or any(Path(stages[earlier].out) in read for earlier in found):
            found.append(stage)
    return found


def _check_gold(recipe: Recipe) -> None:
    """Raise UserError if the evaluation has a second reward, but no samples of a PPO run to compare the two on."""
    assert recipe.evaluation is not None
    ppo = recipe.stages.get("ppo")
    paths = recipe.evaluation.model_paths()
    planned = ppo is not None and any(Path(path) == Path(ppo.out) for path in paths.values())
    if recipe.evaluation.gold and planned and ppo is not None and not ppo.log.samples:
        raise UserError("eval: gold needs the samples of a PPO run; set log.samples of ppo above 0, or leave gold out")
    if recipe.evaluation.gold and not planned:
        from rlhf_fast.eval.reward_records import ppo_models

        ppo_models(paths)


def _check_stages(to_run: Sequence[StageConfig], stages: Sequence[StageConfig]) -> None:
    """Raise UserError, before the first stage runs, if the models, folders or tasks of one of them will not do."""
    if to_run:
        from rlhf_fast.eval.in_training import select_for_training
        from rlhf_fast.stages.fit import check_fit
    for cfg in to_run:
        check_run_folder(cfg.out, {f"{other.stage}.out": other.out for other in stages if other is not cfg})
        check_fit(cfg, stages)
        if cfg.log.eval_every:
            try:
                select_for_training(cfg.log)
            except UserError as error:
                raise UserError(f"{cfg.stage}: {error}") from error


def _run_measured(stage: str, recipe: Recipe, measurements: dict[str, dict[str, Any]]) -> None:
    """Run a stage; add its time and its peak memory to recipe.json even if it fails."""
    from rlhf_fast.run.checkpoint import write_json

    start = time.perf_counter()
    reset_peak_memory()
    try:
        run_stage(recipe.stages[stage])
    finally:
        measured = measurements.setdefault(measurement_key(stage, recipe), {})
        measured["seconds"] = measured.get("seconds", 0.0) + time.perf_counter() - start
        measured["peak"] = max(measured.get("peak", 0), peak_memory())
        if recipe.out.is_dir():
            write_json(recipe.out / MEASUREMENTS, measurements)


def run_stage(cfg: StageConfig, dry_run: bool | Literal["fit"] = False, earlier: Sequence[StageConfig] = ()) -> None:
    """Run one stage; dry_run: print what it takes instead, fit: whether it fits. The stages are imported here, so that
    a faulty recipe is refused before torch is loaded."""
    require_stage(cfg)
    from rlhf_fast.stages import ppo, reward, sft

    if isinstance(cfg, SFTConfig):
        sft.run(cfg, dry_run, earlier)
    elif isinstance(cfg, RewardConfig):
        reward.run(cfg, dry_run, earlier)
    else:
        ppo.run(cfg, dry_run, earlier)


def finished(cfg: StageConfig, remedy: str = OTHER_FOLDER) -> bool:
    """Return whether `out` holds this stage, finished; raise UserError if it was run there with other settings, data or
    models. remedy: what to do then."""
    saved = check_run_folder(cfg.out, cfg.input_paths())
    if saved:
        from rlhf_fast.run.identity import check_same_run, input_checksums

        check_same_run(saved, cfg, input_checksums(cfg), remedy)
    return "finished" in saved


def read_measurements(out: Path) -> dict[str, dict[str, Any]]:
    """Return what earlier runs of this recipe measured: stage, or "stage: folder" for one that is not in `out`, ->
    seconds, peak (bytes). UserError for another file."""
    found = read_json(out / MEASUREMENTS)
    if found is None and not (out / MEASUREMENTS).is_file():
        return {}
    if not isinstance(found, dict) or not all(map(_is_measurement, found, found.values())):
        raise UserError(f"{out / MEASUREMENTS}: was not written by a recipe of ours; choose another `out`, or move it")
    return found


def measurement_key(stage: str, recipe: Recipe) -> str:
    folder = recipe.stages[stage].out
    return stage if Path(folder) == recipe.out / stage else f"{stage}: {folder}"


def _is_measurement(stage: str, value: object) -> bool:
    """Return whether `_run_measured` may have written the value of a stage."""
    if (
        stage.partition(": ")[0] not in STAGES
        or not isinstance(value, dict)
        or not {"seconds"} <= value.keys() <= {"seconds", "peak"}
    ):
        return False
    numbers = [number for number in value.values() if type(number) in (int, float)]
    return len(numbers) == len(value) and all(0 <= number < math.inf for number in numbers)


def table(recipe: Recipe, measurements: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return one line a stage: time, tokens per second, peak memory, first and last value of its metrics."""
    rows = [("stage", "time", "speed", "peak memory", "result", "folder")]
    for stage, cfg in recipe.stages.items():
        metrics = read_metrics(cfg.out)
        measured = measurements.get(measurement_key(stage, recipe), {})
        logged = sum(row.get("time/step", 0.0) for row in metrics)
        tokens = sum(row.get("perf/tokens_per_second", 0.0) * row.get("time/step", 0.0) for row in metrics)
        duration = format_duration(measured.get("seconds") or logged)
        speed = format_speed(tokens / logged) if logged else "-"
        peak = f"{measured['peak'] / 2**30:.2f} GiB" if measured.get("peak") else "-"
        rows.append((stage, duration, speed, peak, _summary(stage, metrics), cfg.out))
    return aligned(rows)


def _summary(stage: str, metrics: list[dict[str, Any]]) -> str:
    """Return "first -> last" of the stage's summary metrics that were measured."""
    found = []
    for name in SUMMARY_METRICS[stage]:
        values = [row[name] for row in metrics if isinstance(row.get(name), (int, float))]
        if values:
            first = f"{values[0]:.4g} -> " if len(values) > 1 else ""
            found.append(f"{name} {first}{values[-1]:.4g}")
    return ", ".join(found) or "-"
