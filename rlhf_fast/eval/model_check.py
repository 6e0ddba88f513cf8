"""Check the models and rewards that an evaluation will load, before it loads one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.rewards import is_function
from rlhf_fast.errors import UserError
from rlhf_fast.model.pretrained import check_folder, quiet
from rlhf_fast.training.rewards import check_function

Head = Literal["lm", "scalar"]
Planned = Mapping[str, Head]
"""Folder that a stage of the recipe writes -> the head of its model. It need not be there yet."""
KINDS: dict[Head, str] = {"lm": "language model", "scalar": "reward model"}


def planned_head(path: str, planned: Planned) -> Head | None:
    """Return the head of the model that a recipe will write to a folder; None if it will write none there."""
    return next((head for folder, head in planned.items() if Path(folder).resolve() == Path(path).resolve()), None)


def check_model(path: str, head: Head, setting: str, planned: Planned, command: str = "eval") -> None:
    """Raise UserError if `path` is no model with this head. No weights are read."""
    found = planned_head(path, planned)
    if found is None:
        try:
            found = _find_head(path, head)
        except UserError as error:
            raise UserError(f"{command}: {setting}: {error}") from error
    if found not in (head, None):
        raise UserError(f"{command}: {setting}: {path} is no {KINDS[head]}, but a {KINDS[found]}; give a {KINDS[head]}")


def check_rewards(cfg: EvalConfig, planned: Planned) -> None:
    """Raise UserError if the reward that is reported on or the second one is neither a function nor a reward model."""
    for setting, spec in (("reward", cfg.reward), ("gold", cfg.gold)):
        if is_function(spec):
            check_function(spec, f"eval: {setting}")
        elif spec:
            check_model(spec, "scalar", setting, planned)


def _find_head(path: str, wanted: Head) -> Head | None:
    """Return the head that a model has by its config.json and the names of its weights; None if these do not say it."""
    check_folder(path, wanted)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path)
    except Exception as error:  # a foreign file, which may be wrong in any way
        raise UserError(f"{path} is no model that can be loaded: {' '.join(str(error).split())[:300]}") from error
    names = " ".join(config.architectures or ())
    if "SequenceClassification" in names:
        if config.num_labels != 1:
            raise UserError(f"{path} has a head with {config.num_labels} outputs; a reward model has one, the score")
        return "scalar"
    files = sorted(Path(path).glob("*.safetensors"))
    return "lm" if "ForCausalLM" in names and files and not any(map(_has_score, files)) else None


def _has_score(file: Path) -> bool:
    """Return whether a file of weights has those of a scalar head, or cannot be read: then its loader says why."""
    try:
        with safe_open(file, "np") as weights:
            return any(name.startswith("score.") for name in weights.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return True
