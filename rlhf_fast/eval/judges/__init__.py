"""Judges of answers: refusal, toxicity, truth, informativeness and preference.

`load_answer_judge(spec, role)` and `load_pair_judge(spec)` return the judge that `spec` names:

    ""                 the built-in one of the role; preference has none
    strict | any       of refusals: full ones alone (the built-in default), or partial ones too
    module:function    a function of (answers) or (prompts, answers); of pairs, (first, second) or (prompts, first,
                       second)
    FILE.jsonl         labels that people have given
    FOLDER             a reward model, for preference
    chat:FOLDER        a local causal language model that is asked for A or B
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.config.rewards import is_function
from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.builtin import load_builtin
from rlhf_fast.eval.judges.chat import ChatJudge, ChatPairJudge, ScoreRequests
from rlhf_fast.eval.judges.functions import FunctionJudge, FunctionPairJudge
from rlhf_fast.eval.judges.labels import LabelJudge, LabelPairJudge, MissingLabels
from rlhf_fast.eval.judges.protocol import PREFERENCE, ROLES, Judge, PairJudge, Validation, Verdict
from rlhf_fast.eval.judges.reward_model import RewardModelJudge
from rlhf_fast.eval.judges.validation import check_labels, validate_on_file, validate_pairs_on_file
from rlhf_fast.eval.model_check import Planned, check_model, planned_head
from rlhf_fast.model.model import Model
from rlhf_fast.scoring import Scorer
from rlhf_fast.training.rewards import import_function

__all__ = [
    "PREFERENCE",
    "ROLES",
    "Judge",
    "JudgeSettings",
    "MissingLabels",
    "PairJudge",
    "Validation",
    "Verdict",
    "find_answer_judge",
    "find_pair_judge",
    "load_answer_judge",
    "load_pair_judge",
]
CHAT = "chat:"
MODES = ("strict", "any")
J = TypeVar("J", Judge, PairJudge)
Scorers = Callable[[Model], ScoreRequests]
"""Returns the function that scores requests with a language model."""


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of judges of every kind."""

    out: str | Path = "."
    """Folder where to_label.jsonl asks people for missing labels."""
    labels: str | Path = ""
    """JSONL file of people's labels {role, ...}, on which a judge is validated if they are of its role."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Settings of a model that is loaded; their path is ignored."""
    device: str | torch.device | None = None
    """Device of a model. None = cuda if there is one, else cpu."""
    scorer: Scorers = Scorer
    planned: Planned = field(default_factory=dict)
    """Folders of models that a judge may name before they are there."""
    loaded: dict[str, tuple[Model, ScoreRequests]] = field(default_factory=dict)
    """Language models by folder: one that judges in several roles is loaded once."""


def load_answer_judge(spec: str, role: str, settings: JudgeSettings | None = None) -> Judge:
    """Return the judge of single answers that `spec` names. UserError if it names none."""
    return find_answer_judge(spec, role, settings or JudgeSettings())()


def load_pair_judge(spec: str, settings: JudgeSettings | None = None) -> PairJudge:
    """Return the judge of pairs that `spec` names. UserError if it names none."""
    return find_pair_judge(spec, settings or JudgeSettings())()


def find_answer_judge(spec: str, role: str, settings: JudgeSettings) -> Callable[[], Judge]:
    """Return a function that loads the judge of single answers that `spec` names.

    UserError for all that can be seen to be wrong before a model is loaded.
    """
    if role not in ROLES:
        raise UserError(f"{role}: is no role of a judge; the roles are {', '.join((*ROLES, PREFERENCE))}")
    spec = _with_home(spec)
    load = _find_answer_judge(spec, role, settings)
    if not settings.labels:
        return load
    check_labels(settings.labels, role)

    validated = _validated(load, lambda judge: validate_on_file(judge, settings.labels, role, has_roles=True))
    if _is_builtin(spec, role):  # no model, and labels may lack what it reads
        judge = validated()
        return lambda: judge
    return validated


def find_pair_judge(spec: str, settings: JudgeSettings) -> Callable[[], PairJudge]:
    """Return a function that loads the judge of pairs that `spec` names, as `find_answer_judge` does."""
    load = _find_pair_judge(_with_home(spec), settings)
    if not settings.labels:
        return load
    check_labels(settings.labels, PREFERENCE)

    return _validated(load, lambda judge: validate_pairs_on_file(judge, settings.labels, has_roles=True))


def _validated(load: Callable[[], J], validate: Callable[[J], Validation | None]) -> Callable[[], J]:
    """Return a function that loads a judge and validates it on people's labels, unless it is such labels itself."""

    def load_and_validate() -> J:
        judge = load()
        if not isinstance(judge, (LabelJudge, LabelPairJudge)):
            judge.validation = validate(judge) or judge.validation
        return judge

    return load_and_validate


def _find_answer_judge(spec: str, role: str, settings: JudgeSettings) -> Callable[[], Judge]:
    if _is_builtin(spec, role):
        return lambda: load_builtin(role, spec)
    if spec.startswith(CHAT):
        folder = _chat_folder(spec, role, settings)
        return lambda: _load_chat_judge(folder, role, settings)
    if is_function(spec):
        function = FunctionJudge(import_function(spec, f"judge.{role}"), spec)
        return lambda: function
    path = Path(spec)
    if path.is_dir() or planned_head(spec, settings.planned):
        raise UserError(
            f"judge.{role}: {spec} is a folder, and a reward model judges preference alone; write chat:{spec} to ask it"
            " as a language model"
        )
    if _is_labels(path):
        labels = LabelJudge(path, role, settings.out)
        return lambda: labels
    modes = ", strict, any" if role == "refusal" else ""
    raise UserError(
        f"judge.{role}: {spec} is no file; write module:function, a JSONL file of labels{modes} or chat:FOLDER, or"
        " leave it out for the built-in judge"
    )


def _find_pair_judge(spec: str, settings: JudgeSettings) -> Callable[[], PairJudge]:
    if not spec:
        raise UserError(
            "preference has no built-in judge, since no rule knows quality; give judge.preference a reward model's"
            " folder, module:function, a JSONL file of people's labels, or chat:FOLDER"
        )
    if spec.startswith(CHAT):
        folder = _chat_folder(spec, PREFERENCE, settings)
        return lambda: ChatPairJudge(*_load_chat(folder, settings), folder)
    if is_function(spec):
        function = FunctionPairJudge(import_function(spec, "judge.preference"), spec)
        return lambda: function
    path = Path(spec)
    if path.is_dir() or planned_head(spec, settings.planned):
        check_model(spec, "scalar", "judge.preference", settings.planned)
        return lambda: RewardModelJudge.load(replace(settings.model, path=spec), settings.device)
    if _is_labels(path):
        labels = LabelPairJudge(path, settings.out)
        return lambda: labels
    raise UserError(
        f"judge.preference: {spec} is neither a file nor a folder; write module:function, a JSONL file of labels, a"
        " reward model's folder or chat:FOLDER"
    )


def _chat_folder(spec: str, role: str, settings: JudgeSettings) -> str:
    """Return the language model that chat:FOLDER names."""
    folder = spec.removeprefix(CHAT)
    if not folder:
        raise UserError(f"judge.{role}: {spec} names no model; write chat:FOLDER")
    check_model(folder, "lm", f"judge.{role}", settings.planned)
    return folder


def _load_chat(folder: str, settings: JudgeSettings) -> tuple[Model, ScoreRequests]:
    """Return a language model, and the function that scores its requests."""
    if folder not in settings.loaded:
        model = Model.load(replace(settings.model, path=folder), device=settings.device)
        settings.loaded[folder] = model, settings.scorer(model)
    return settings.loaded[folder]


def _load_chat_judge(folder: str, role: str, settings: JudgeSettings) -> ChatJudge:
    model, scorer = _load_chat(folder, settings)
    return ChatJudge(model, role, scorer, folder)


def _with_home(spec: str) -> str:
    """Replace a leading ~ of a path, which no shell has done in a YAML file."""
    prefix, path = (CHAT, spec.removeprefix(CHAT)) if spec.startswith(CHAT) else ("", spec)
    return prefix + str(Path(path).expanduser()) if path.startswith("~") else spec


def _is_builtin(spec: str, role: str) -> bool:
    return not spec or (role == "refusal" and spec in MODES)


def _is_labels(path: Path) -> bool:
    return path.is_file() or path.suffix in (".jsonl", ".gz")
