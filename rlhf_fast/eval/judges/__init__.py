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
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges.builtin import load_builtin
from rlhf_fast.eval.judges.chat import ChatJudge, ChatPairJudge, ScoreRequests
from rlhf_fast.eval.judges.functions import FunctionJudge, FunctionPairJudge
from rlhf_fast.eval.judges.labels import LabelJudge, LabelPairJudge, MissingLabels
from rlhf_fast.eval.judges.protocol import PREFERENCE, ROLES, Judge, PairJudge, Validation, Verdict
from rlhf_fast.eval.judges.reward_model import RewardModelJudge
from rlhf_fast.eval.judges.validation import validate_on_file, validate_pairs_on_file
from rlhf_fast.model.model import Model
from rlhf_fast.scoring import Scorer
from rlhf_fast.training.rewards import import_function, is_function

__all__ = [
    "PREFERENCE",
    "ROLES",
    "Judge",
    "MissingLabels",
    "PairJudge",
    "Validation",
    "Verdict",
    "load_answer_judge",
    "load_pair_judge",
]
CHAT = "chat:"
MODES = ("strict", "any")


Scorers = Callable[[Model], ScoreRequests]
"""Returns the function that scores requests with a language model."""


def load_answer_judge(
    spec: str,
    role: str,
    *,
    out: str | Path = ".",
    labels: str | Path = "",
    cfg: ModelConfig | None = None,
    scorer: Scorers = Scorer,
    device: str | torch.device | None = None,
) -> Judge:
    """Return the judge of single answers that `spec` names.

    out: the folder where to_label.jsonl asks people for missing labels. labels: a JSONL file of people's labels
    {role, ...}, on which the judge is validated if they are of its role. cfg: how to load a model; its path is ignored.
    UserError if `spec` names no judge.
    """
    if role not in ROLES:
        raise UserError(f"{role}: is no role of a judge; the roles are {', '.join((*ROLES, PREFERENCE))}")
    judge = _answer_judge(spec, role, Path(out), _Models(cfg or ModelConfig(), scorer, device))
    if labels and not isinstance(judge, LabelJudge):
        judge.validation = validate_on_file(judge, labels, role, has_roles=True) or judge.validation
    return judge


def load_pair_judge(
    spec: str,
    *,
    out: str | Path = ".",
    labels: str | Path = "",
    cfg: ModelConfig | None = None,
    scorer: Scorers = Scorer,
    device: str | torch.device | None = None,
) -> PairJudge:
    """Return the judge of pairs that `spec` names; the settings are those of `load_answer_judge`."""
    judge = _pair_judge(spec, Path(out), _Models(cfg or ModelConfig(), scorer, device))
    if labels and not isinstance(judge, LabelPairJudge):
        judge.validation = validate_pairs_on_file(judge, labels, has_roles=True) or judge.validation
    return judge


class _Models(NamedTuple):
    """The settings of judges that are models."""

    cfg: ModelConfig
    scorer: Scorers
    device: str | torch.device | None

    def language_model(self, spec: str, role: str) -> tuple[Model, ScoreRequests, str]:
        """Return the model that chat:FOLDER names, the function that scores its requests, and the folder."""
        folder = spec.removeprefix(CHAT)
        if not folder:
            raise UserError(f"judge.{role}: {spec} names no model; write chat:FOLDER")
        model = Model.load(replace(self.cfg, path=folder), device=self.device)
        return model, self.scorer(model), folder


def _answer_judge(spec: str, role: str, out: Path, models: _Models) -> Judge:
    if not spec or (role == "refusal" and spec in MODES):
        return load_builtin(role, spec)
    if spec.startswith(CHAT):
        model, scorer, folder = models.language_model(spec, role)
        return ChatJudge(model, role, scorer, folder)
    if is_function(spec):
        return FunctionJudge(import_function(spec, f"judge.{role}"), spec)
    path = Path(spec)
    if path.is_dir():
        raise UserError(
            f"judge.{role}: {spec} is a folder, and a reward model judges preference alone; write chat:{spec} to ask it"
            " as a language model"
        )
    if _is_labels(path):
        return LabelJudge(path, role, out)
    raise UserError(
        f"judge.{role}: {spec} is no file; write module:function, a JSONL file of labels or chat:FOLDER, or leave it"
        " out for the built-in judge"
    )


def _pair_judge(spec: str, out: Path, models: _Models) -> PairJudge:
    if not spec:
        raise UserError(
            "preference has no built-in judge, since no rule knows quality; give judge.preference a reward model's"
            " folder, module:function, a JSONL file of people's labels, or chat:FOLDER"
        )
    if spec.startswith(CHAT):
        return ChatPairJudge(*models.language_model(spec, PREFERENCE))
    if is_function(spec):
        return FunctionPairJudge(import_function(spec, "judge.preference"), spec)
    path = Path(spec)
    if path.is_dir():
        return RewardModelJudge.load(replace(models.cfg, path=spec), models.device)
    if _is_labels(path):
        return LabelPairJudge(path, out)
    raise UserError(
        f"judge.preference: {spec} is neither a file nor a folder; write module:function, a JSONL file of labels, a"
        " reward model's folder or chat:FOLDER"
    )


def _is_labels(path: Path) -> bool:
    return path.is_file() or path.suffix in (".jsonl", ".gz")
