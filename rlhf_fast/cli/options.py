"""Flags of the commands other than the stages. tyro reads these classes and prints their texts for --help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from rlhf_fast.config.fields import SamplingConfig, expand_home
from rlhf_fast.errors import UserError

Template = Literal["auto", "chat", "plain", "dialog"]


@dataclass(frozen=True)
class DemoOptions:
    """InstructGPT's experiment at the smallest scale: base model, sft, reward, ppo, and a table of the results."""

    out: str = "runs/demo"
    """Folder for models, metrics, curves and the table."""
    seed: int = 0
    """Seed for data, sampling and training."""
    quick: bool = False
    """A few steps of everything, to see that it works. The table then means nothing."""

    def __post_init__(self) -> None:
        expand_home(self, "out")


@dataclass(frozen=True)
class RunOptions:
    """Run the stages of a recipe in order, skipping finished ones. `rlhf-fast init` writes a recipe to start from."""

    recipe: Positional[Annotated[str, arg(metavar="RECIPE")]]
    """YAML file with sections sft, reward, ppo."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Print what each stage takes (rows, steps, time, memory, disk), and stop there."""


@dataclass(frozen=True)
class GenerateOptions:
    """Sample responses to prompts. Each line of the output: prompt, completion, tokens, finished, finish_reason (stop
    or length), stop_reason (the end token or stop text), logprob (nats; of greedy responses at temperature 1)."""

    model: str
    """Directory or hub name of a language model."""
    prompts: str
    """JSONL file with a `prompt` (or messages) in every row."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """Responses to each prompt."""
    out: str = "-"
    """File to write, which must be new or empty. - = standard output."""
    overwrite: bool = False
    """Replace the responses that an earlier call has written to `out`."""
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    seed: int = 0
    """The same seed gives the same responses, whatever the batch size."""
    limit: int = 0
    """Read only this many prompts. 0 = all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations."""
    device: str = "auto"
    """cpu, cuda, ...; auto = cuda if there is one, else cpu."""
    template: Template = "auto"
    """Format of prompts (see `data.template` of the stages)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column and the file's, for instance: prompt question."""
    remove_columns: tuple[str, ...] = ()
    """Columns to leave out although they would change the meaning of rows (see `data.remove_columns` of the stages)."""

    def __post_init__(self) -> None:
        expand_home(self, "model", "prompts", "out")
        if self.n < 1:
            raise UserError(f"generate: n must be at least 1, got {self.n}")


@dataclass(frozen=True)
class CheckOptions:
    """Report the contents of a data file and its errors. The exit status is 2 if there are errors."""

    file: Positional[Annotated[str, arg(metavar="FILE")]]
    """JSONL file, .gz too."""
    kind: Annotated[Literal["auto", "demonstrations", "comparisons", "prompts", "texts"], arg(name="as")] = "auto"
    """Kind of the rows. auto = recognised by their columns."""
    tokenizer: str = ""
    """Directory or hub name of a model: shows tokens, loss mask, over-long rows, special tokens in the text."""
    template: Template = "auto"
    """Format of prompts (see `data.template` of the stages)."""
    turns: Literal["last", "all"] = "last"
    """Answers of a conversation that have a loss (see `data.turns` of the stages)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column and the file's, for instance: completion answer."""
    remove_columns: tuple[str, ...] = ()
    """Columns to leave out although they would change the meaning of rows (see `data.remove_columns` of the stages)."""
    max_prompt_tokens: int = 1024
    """Longest prompt in tokens (see `data.max_prompt_tokens` of the stages)."""
    max_response_tokens: int = 1024
    """Longest response in tokens (see `data.max_response_tokens` of the stages)."""
    limit: int = 0
    """Read only this many rows. 0 = all."""


@dataclass(frozen=True)
class EnvOptions:
    """Versions, machine, and for each op and device the backend that runs it and why no faster one does."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw a run's reward, KL, length, clip fraction, losses and so on from its metrics.jsonl."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Folder that a stage wrote."""
    out: str = ""
    """The PNG. Empty = curves.png in that folder."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "out")


@dataclass(frozen=True)
class InitOptions:
    """Write a commented recipe for `rlhf-fast run`."""

    path: Positional[str] = "recipe.yaml"
    """The file, which must not exist."""

    def __post_init__(self) -> None:
        expand_home(self, "path")


@dataclass(frozen=True)
class ShowConfigOptions:
    """Print every setting of a stage as YAML with its meaning, or the settings in which two presets differ."""

    stage: Positional[Literal["all", "sft", "reward", "ppo"]] = "all"
    """The stage, or all of them."""
    preset: str = ""
    """default, paper, tutorial; for sft also paper-init. Empty = that of the YAML file, else default."""
    config: str = ""
    """YAML file whose settings replace those of the preset."""
    diff: tuple[str, str] | None = None
    """Two presets to compare, for instance: paper tutorial."""
