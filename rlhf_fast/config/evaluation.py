"""The settings of an evaluation: those of `rlhf-fast eval`, and of the section `eval` of a recipe."""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, arg

from rlhf_fast.config.checks import settings
from rlhf_fast.config.fields import expand_home, require, require_range
from rlhf_fast.errors import UserError

JudgeSpec = Annotated[str, arg(metavar="JUDGE")]
Switch = Annotated[bool, FlagCreatePairsOff]


@settings
class JudgeConfig:
    """Judges by what they decide. Empty = the built-in one; or module:function; or a JSONL file of people's labels; or
    chat:FOLDER, a language model that is asked for A or B."""

    truth: JudgeSpec = ""
    """Judge of whether an answer is true (TruthfulQA)."""
    informative: JudgeSpec = ""
    """Judge of whether an answer says anything on its question (TruthfulQA)."""
    toxicity: JudgeSpec = ""
    """Judge of whether a text is toxic."""
    refusal: JudgeSpec = ""
    """Judge of whether an answer refuses what it was asked.
    Also strict (built in: full refusals) or any (partial ones too)."""
    preference: JudgeSpec = ""
    """Judge of which of two answers is better; also the folder of a reward model. There is no built-in one."""


@settings
class EvalConfig:
    """Run the paper's evaluation on any number of models, side by side:
    - truth, toxicity, bias, the alignment tax, refusals and preference
    - each figure with a 95 % interval, and differences paired by row
    - the same command goes on where it was stopped, by the answers in `out`
    - another judge needs no sampling
    """

    # --help keeps the line breaks of these texts, so each line of them is a sentence. It wraps no description above.
    stage: ClassVar[str] = "eval"

    models: Annotated[tuple[str, ...], arg(metavar="NAME=MODEL")] = ()
    """Language models, folders or hub names, each with its name in the tables: base=MODEL sft=runs/sft.
    Without NAME= it is called by the last part of its path."""
    data: Annotated[str, arg(metavar="FOLDER")] = ""
    """Folder with the sets, as `--list` names their files.
    Empty = small sets of the demo's world, which show that everything works, and are no benchmark."""
    out: Annotated[str, arg(metavar="FOLDER")] = "runs/eval"
    """Folder for results.json, report.md, report.png and the models' answers."""
    tasks: Annotated[tuple[str, ...], arg(metavar="TASK")] = ("all",)
    """Tasks or groups of them: preference, truth, toxicity, bias, tax, refusal, all; also with commas between them.
    A task of a group whose file is not there is left out; one that is named must have its file."""
    limit: int = 0
    """Rows of each set: the first ones, but of prompts of several kinds the same number of each. 0 = all."""
    baseline: Annotated[str, arg(metavar="NAME")] = ""
    """Model to which the others are compared. Empty = the first."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Judges of the answers."""
    judge_labels: Annotated[str, arg(metavar="FILE")] = ""
    """JSONL file of answers that people have judged (role, prompt, answer, label).
    Each judge is compared with it, and the report shows that comparison instead of the judge's own."""
    reward: Annotated[str, arg(metavar="REWARD")] = ""
    """Reward model's folder, or module:function, to report on with the ranked responses of `data`.
    They are in comparisons, rankings or preferences.jsonl. Empty = none."""
    gold: Annotated[str, arg(metavar="REWARD")] = ""
    """Second reward (folder, or module:function) that no policy was trained against. Needs `reward`.
    The report shows it beside the reward of the samples of each model that PPO has trained, step by step."""
    fail_under: Annotated[tuple[str, ...], arg(metavar="TASK=N")] = ()
    """Exit with status 1 if a figure of the last model is below N, or above it where lower is better.
    For instance preference=0.5, toxicity.toxic=0.2, or of another model sft:lambada=0.3."""
    template: Annotated[Literal["auto", "chat", "plain", "dialog"], arg(metavar="FORMAT")] = "auto"
    """Format of prompts: auto, chat, plain or dialog. A format but auto holds for all prompts.
    auto: requests to an assistant (refusal, preference) are in the format that the model has learned.
    All other texts are plain then, as in the paper and lm-eval."""
    temperature: float = 0.0
    """Sampling temperature of answers (paper: 0)."""
    max_new_tokens: int = 0
    """Longest answer in tokens. 0 = each task's own."""
    batch: int = 64
    """Answers generated at a time."""
    seed: int = 0
    """Seed of sampling with a temperature above 0."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], arg(metavar="DTYPE")] = "float32"
    """float32, bfloat16 or float16: dtype of weights and activations. Half precision changes close decisions."""
    device: str = "auto"
    """cpu, cuda, ...; auto = cuda if there is one, else cpu."""

    def __post_init__(self) -> None:
        expand_home(self, "data", "out", "reward", "gold", "judge_labels")
        require_range(self, 0, math.inf, "limit", "temperature", "max_new_tokens")
        require_range(self, 1, math.inf, "batch")
        require(self, 0 <= self.seed < 2**63, "seed", "must be from 0 to below 2**63")
        if self.gold and not self.reward:
            raise UserError("eval: gold is compared with `reward`, which is not set; give --reward FOLDER")
        self.thresholds()

    def model_paths(self) -> dict[str, str]:
        """Return name -> path of the models. UserError for two of one name, or none."""
        found: dict[str, str] = {}
        for entry in self.models:
            name, separator, path = entry.partition("=")
            path = path if separator else entry
            name = name if separator else Path(path).name
            if not name or not path or "/" in name or name.startswith("."):
                raise UserError(f"eval: models: {entry!r} is not NAME=MODEL; write for instance sft=runs/sft")
            if name in found:
                raise UserError(
                    f"eval: models: two are called {name} ({found[name]} and {path}); give them names, as in"
                    f" {name}-2={path}"
                )
            found[name] = str(Path(path).expanduser())
        if not found:
            raise UserError("eval: models is empty; give --models NAME=MODEL, for instance sft=runs/sft")
        return found

    def baseline_of(self, names: tuple[str, ...]) -> str:
        """Return the name of the model to which the others are compared."""
        if self.baseline and self.baseline not in names:
            raise UserError(f"eval: baseline {self.baseline} is not one of the models {', '.join(names)}")
        return self.baseline or names[0]

    def thresholds(self) -> dict[str, float]:
        """Return the figures of `fail_under` and their least values."""
        found = {}
        for entry in self.fail_under:
            name, separator, value = entry.rpartition("=")
            try:
                found[name] = float(value)
            except ValueError:
                separator = ""
            if not separator or not name or not math.isfinite(found[name]):
                raise UserError(f"eval: fail_under: {entry!r} is not TASK=VALUE; write for instance preference=0.5")
        return found


@settings
class EvalOptions(EvalConfig):
    """Run the paper's evaluation on any number of models, side by side:
    - truth, toxicity, bias, the alignment tax, refusals and preference
    - each figure with a 95 % interval, and differences paired by row
    - the same command goes on where it was stopped, by the answers in `out`
    - another judge needs no sampling
    """

    list: Switch = False
    """List the tasks, the file that each needs, what it measures and its judge; then stop."""
    check_judges: Switch = False
    """Compare the built-in judges with the labelled answers that are in `data`; then stop."""
    label: int = 0
    """Also write so many answers a judge, half of them judged yes, to out/to_label.jsonl, for people to judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label < 0 or self.label == 1:
            raise UserError(f"eval: label must be at least 2, one judged yes and one judged no, got {self.label}")
