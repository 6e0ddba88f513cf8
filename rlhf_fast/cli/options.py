"""The flags of the commands that are no stages; tyro reads these classes and writes their --help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.errors import UserError

Template = Literal["auto", "chat", "plain", "dialog"]


@dataclass(frozen=True)
class DemoOptions:
    """InstructGPT's experiment at the smallest scale: base model, sft, reward, ppo, and a table of what came out."""

    out: str = "runs/demo"
    """Folder for models, metrics, curves and the table."""
    seed: int = 0
    """Of everything random."""
    quick: bool = False
    """A few steps of everything, to see that it works; the table means nothing then."""


@dataclass(frozen=True)
class RunOptions:
    """Run the stages of a recipe in order, skipping finished ones. `rlhf-fast init` writes a recipe to start from."""

    recipe: Positional[str]
    """YAML file with sections sft, reward, ppo."""


@dataclass(frozen=True)
class GenerateOptions:
    """Sample responses to prompts. Each line of the output: prompt, completion, tokens, finished, finish_reason (stop
    or length), stop_reason (the end token or stop text), logprob."""

    model: str
    """Directory or hub name of a language model."""
    prompts: str
    """JSONL file with a `prompt` (or messages) in every row."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """Responses to each prompt."""
    out: str = "-"
    """File to write. - = standard output."""
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=SamplingConfig)
    seed: int = 0
    """The same seed gives the same responses, whatever the batch size."""
    limit: int = 0
    """Only so many prompts. 0 = all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and activations."""
    device: str = "auto"
    """cpu, cuda, ...; auto = cuda where there is one."""
    template: Template = "auto"
    """How a prompt becomes text (see `data.template` of the stages)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name and the file's name of a column, for instance: prompt question."""

    def __post_init__(self):
        if self.n < 1:
            raise UserError(f"generate: n must be at least 1, got {self.n}")


@dataclass(frozen=True)
class CheckOptions:
    """Say what a data file holds and what is wrong with it. The exit status is 2 if there are errors."""

    file: Positional[str]
    """JSONL file, .gz too."""
    kind: Annotated[Literal["auto", "demonstrations", "comparisons", "prompts", "texts"], arg(name="as")] = "auto"
    """What the rows are meant to be. auto = told by their columns."""
    tokenizer: str = ""
    """Directory or hub name of a model: shows tokens, loss mask, over-long rows, special tokens in the text."""
    template: Template = "auto"
    """How a prompt becomes text (see `data.template` of the stages)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name and the file's name of a column, for instance: completion answer."""
    max_prompt_tokens: int = 1024
    """As in the stages' data settings."""
    max_response_tokens: int = 1024
    """As in the stages' data settings."""
    limit: int = 0
    """Only so many rows. 0 = all."""


@dataclass(frozen=True)
class EnvOptions:
    """Versions, machine, and which backend answers for each op on each device, and why nobody faster does."""


@dataclass(frozen=True)
class PlotOptions:
    """Draw a run's reward, KL, length, clip fraction, losses and so on from its metrics.jsonl."""

    run: Positional[str]
    """Folder that a stage wrote."""
    out: str = ""
    """The PNG. Empty = curves.png in that folder."""


@dataclass(frozen=True)
class InitOptions:
    """Write a commented recipe for `rlhf-fast run`."""

    path: Positional[str] = "recipe.yaml"
    """The file, which must not exist."""


@dataclass(frozen=True)
class ShowConfigOptions:
    """Print every setting of a stage as YAML, resolved, with what it does; or what two presets differ in."""

    stage: Positional[Literal["all", "sft", "reward", "ppo"]] = "all"
    """Of which stage."""
    preset: str = "default"
    """default, paper, tutorial; for sft also paper-init."""
    config: str = ""
    """YAML file laid over the preset."""
    diff: tuple[str, str] | None = None
    """Two presets to compare, for instance: paper tutorial."""
