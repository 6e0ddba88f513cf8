"""The part of an evaluation that is on a reward model: how it orders ranked responses, and gold against proxy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.config.rewards import is_function
from rlhf_fast.data.row_columns import require_columns
from rlhf_fast.data.rows import read_examples
from rlhf_fast.errors import UserError, listed
from rlhf_fast.eval import gold_curve, reward_report
from rlhf_fast.eval.held_out import training_notes
from rlhf_fast.eval.judges.reward_model import RewardModelJudge, learned_end_tokens
from rlhf_fast.eval.reward_report import TextReward
from rlhf_fast.eval.sets import DEMO_SETS
from rlhf_fast.model.model import Model
from rlhf_fast.run.logs import SAMPLES
from rlhf_fast.run.outputs import read_run
from rlhf_fast.run.prompt_format import model_prompt_format
from rlhf_fast.training.reward_functions import IDS, FunctionReward
from rlhf_fast.training.rewards import import_function

COMPARISONS = ("rankings_held", "comparisons", "rankings", "preferences")


def find_comparisons(folder: str) -> Path:
    """Return the file of ranked responses in a folder ("" = the demo's sets). UserError if there is none."""
    for name in COMPARISONS:
        for suffix in (".jsonl", ".jsonl.gz"):
            if (path := Path(folder or DEMO_SETS) / f"{name}{suffix}").is_file():
                return path
    names = ", ".join(f"{name}.jsonl" for name in COMPARISONS)
    raise UserError(f"eval: reward: {folder} has no file of ranked responses ({names}); give another --data")


def check_columns(cfg: EvalConfig) -> None:
    """Raise UserError if a function that is a reward needs what its rows do not have, before anything is generated."""
    if is_function(cfg.reward):
        function = FunctionReward(import_function(cfg.reward, "eval: reward"), None, cfg.reward)
        _require_no_tokens("reward", function, "responses of a file are texts")
        if function.wanted.depends_on_columns:
            file = find_comparisons(cfg.data)
            examples = read_examples(str(file), "comparisons", limit=cfg.limit)
            require_columns(str(file), examples, [function.wanted])
    if is_function(cfg.gold):
        function = FunctionReward(import_function(cfg.gold, "eval: gold"), None, cfg.gold)
        _require_no_tokens("gold", function, f"{SAMPLES} has texts")
        if needed := function.form.required:
            raise UserError(
                f"eval: gold: {cfg.gold} needs {listed(needed)}, and the samples of a PPO run have prompts and"
                " completions alone; give the parameter a default"
            )


def _require_no_tokens(setting: str, function: FunctionReward, why: str) -> None:
    if ids := [name for name in function.form.given if name in IDS]:
        raise UserError(f"eval: {setting}: {function.name} needs {ids[0]}, and {why}; take completions instead")


def reward_records(cfg: EvalConfig, models: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the records of the reward model, and sections of the report: title -> lines of markdown.

    With a second reward (cfg.gold), there is a section on each of the models that PPO has trained.
    """
    device = None if cfg.device == "auto" else cfg.device
    file = find_comparisons(cfg.data)
    data = DataConfig(path=str(file), limit=cfg.limit, append_eos=learned_end_tokens(cfg.reward))
    notes: list[str] = []
    if is_function(cfg.reward):
        ranked = reward_report.score_comparisons(import_function(cfg.reward, "eval: reward"), data)
    else:
        model = Model.load(ModelConfig(path=cfg.reward, dtype=cfg.dtype), head="scalar", device=device)
        prompt_format, _ = model_prompt_format(cfg.reward, model.tokenizer, "auto", "eval: reward", strict=False)
        ranked = reward_report.score_comparisons(model, data, prompt_format, notes)
        notes += training_notes([file], {cfg.reward: cfg.reward})
    found = reward_report.report(ranked)
    lines = [*(f"- {note}" for note in notes), *reward_report.report_lines(found)]
    sections = {f"Reward model {cfg.reward} on {file.name}": lines}
    records = reward_report.records(found, cfg.reward)
    if cfg.gold:
        gold = load_gold(cfg, device)
        for name, path in ppo_models(models).items():
            points = gold_curve.run_curve(path, gold)
            lines = [*gold_curve.curve_lines(points), "", gold_curve.change_line(points)]
            records += gold_curve.records(points, name, cfg.gold)
            sections[f"{name}: its reward (proxy) and {cfg.gold} (gold)"] = lines
    return records, sections


def ppo_models(models: Mapping[str, str]) -> dict[str, str]:
    """Return those of the models (name -> folder) that PPO has trained, with samples. UserError if there is none."""
    found = {
        name: path
        for name, path in models.items()
        if (Path(path) / SAMPLES).is_file() and read_run(path).get("stage") == "ppo"
    }
    if not found:
        raise UserError(
            f"eval: gold: none of the models ({', '.join(models)}) is the folder of a PPO run with {SAMPLES}; give one"
            " to --models, or leave gold out"
        )
    return found


def load_gold(cfg: EvalConfig, device: str | None) -> TextReward:
    """Return the second reward, as a function of prompts and responses."""
    if is_function(cfg.gold):
        return import_function(cfg.gold, "eval: gold")
    return RewardModelJudge.load(ModelConfig(path=cfg.gold, dtype=cfg.dtype), device).answer_scores
