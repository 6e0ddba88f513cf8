"""Flags of the commands other than the stages. tyro reads these classes and prints their texts for --help."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from rlhf_fast.config.data_path import expand_user
from rlhf_fast.config.fields import SamplingConfig, expand_home
from rlhf_fast.config.rewards import RewardSpecs, given_twice, reward_value, weights_rule
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
class GenerateOptions:
    """Sample responses to prompts. Each line of the output: the prompt as given, all other columns of its row, then
    rendered_prompt (the text that the model read), completion, tokens, finished, finish_reason (stop or length),
    stop_reason (the end token or stop text), logprob (nats; of greedy responses at temperature 1), and where they are
    asked for reward and value. A column of the row that has such a name is kept as input_NAME."""

    model: str
    """Directory or hub name of a language model."""
    prompts: str | tuple[str, ...]
    """Rows with a `prompt` (or messages): files, patterns or hub names (see `data.path` of the stages)."""
    n: Annotated[int, arg(aliases=["-n"])] = 1
    """Responses to each prompt."""
    out: str = "-"
    """File to write, which must be new or empty. - = standard output."""
    overwrite: Annotated[bool, arg(aliases=["--force"])] = False
    """Replace the responses that an earlier call has written to `out`."""
    reward: RewardSpecs = ""
    """Reward model's folder, or module:function: adds the column reward, the score of each response. Of several it is
    the sum, and each has a column of its own, rewards/NAME, by the last part of its name."""
    reward_weights: tuple[float, ...] = ()
    """Factor of each reward in the sum. Empty = 1 each."""
    value: str = ""
    """Folder of a value model, such as runs/ppo/value: adds the column value, that of the last token."""
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
    """Columns to leave out, of the output too, although they may change the meaning of rows (see `data.remove_columns`
    of the stages)."""

    def __post_init__(self) -> None:
        expand_home(self, "model", "out", "value")
        object.__setattr__(self, "prompts", expand_user(self.prompts))
        if self.reward == ():  # an empty variable of the shell
            raise UserError("generate: --reward needs a value")
        try:
            object.__setattr__(self, "reward", reward_value(self.reward))
        except ValueError as error:
            raise UserError(f"generate: --reward {error}") from error
        if not self.prompts:
            raise UserError("generate: --prompts needs a value")
        if self.n < 1:
            raise UserError(f"generate: n must be at least 1, got {self.n}")
        if twice := given_twice(self.reward):
            raise UserError(f"generate: --reward names {twice} twice; give it once")
        if rule := weights_rule(self.reward_weights, self.reward):
            raise UserError(f"generate: --reward-weights {rule}, got {' '.join(map(str, self.reward_weights))}")


@dataclass(frozen=True)
class ChatOptions:
    """Talk to a model in the terminal. Its format of prompts is the one that it was trained with. /help lists the
    commands. Input that is no terminal is read line by line: each line is a message or a command, and the answers go to
    standard output."""

    model: Positional[Annotated[str, arg(metavar="MODEL")]]
    """Directory or hub name of a language model."""
    system: str = ""
    """Text of the system turn, which stands before all others. Empty = none."""
    sampling: OmitArgPrefixes[SamplingConfig] = field(default_factory=lambda: SamplingConfig(max_new_tokens=512))
    seed: int = 0
    """The same seed and the same input give the same answers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations."""
    device: str = "auto"
    """cpu, cuda, ...; auto = cuda if there is one, else cpu."""
    template: Template = "auto"
    """Format of prompts (see `data.template` of the stages). plain: each message is a text that the model continues."""

    def __post_init__(self) -> None:
        expand_home(self, "model")


@dataclass(frozen=True)
class CheckOptions:
    """Report the contents of a data file and its errors. The exit status is 2 if there are errors."""

    file: Positional[Annotated[tuple[str, ...], arg(metavar="FILE")]]
    """JSONL, JSON array, parquet, csv or tsv (.gz too), a pattern, a hub name, or several of these (see `data.path` of
    the stages)."""
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

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError("check: FILE must be given; see `rlhf-fast check --help`")


@dataclass(frozen=True)
class CompletionOptions:
    """Print the script with which a shell completes rlhf-fast's commands, flags, values and file names.
    bash: eval "$(rlhf-fast completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit.
    fish: rlhf-fast completion fish > ~/.config/fish/completions/rlhf-fast.fish."""

    shell: Positional[Annotated[Literal["bash", "zsh", "fish"], arg(metavar="SHELL")]]
    """bash, zsh or fish."""


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
    smooth: float | None = None
    """Weight of the running mean (TensorBoard's smoothing), from 0 (as logged) to below 1. None = by the number of
    steps; below 50 none."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "out")


@dataclass(frozen=True)
class ExportOptions:
    """Write a model for other programs: a GGUF file for llama.cpp and Ollama, a Hugging Face folder in another dtype.
    Each file is read again and compared with the model, its greedy tokens too."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]
    """Folder that a stage wrote, or any model's folder or hub name."""
    out: str = ""
    """Folder to write, new or of an earlier export. Empty = RUN-export beside RUN."""
    gguf: Literal["", "q8_0", "f16", "bf16", "f32"] = ""
    """Write a GGUF file (extra [export]) whose matrices have this type."""
    ollama: bool = False
    """Write a Modelfile beside the GGUF file (q8_0 unless --gguf says otherwise): template, stop texts, sampling."""
    safetensors_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """Write a Hugging Face folder in this dtype."""
    merge_lora: bool = False
    """Merge RUN/adapter into its base model anew, in float32. RUN's own weights have it merged already, in the dtype of
    the training."""

    def __post_init__(self) -> None:
        expand_home(self, "run", "out")


@dataclass(frozen=True)
class CompareOptions:
    """Compare runs of one stage: settings that differ, last values, curves over one another and samples side by
    side. Writes one HTML file and prints its tables."""

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN RUN ...")]]
    """Folders that a stage wrote, two or more."""
    out: str = "compare.html"
    """The HTML file. It needs no other file and no network."""
    samples: int = 8
    """Prompts whose responses are shown."""
    smooth: float | None = None
    """Weight of the running mean (see `plot`)."""

    def __post_init__(self) -> None:
        expand_home(self, "out")
        object.__setattr__(self, "runs", tuple(os.path.expanduser(run) for run in self.runs))  # noqa: PTH111


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

    stage: Positional[Literal["all", "sft", "reward", "ppo", "eval"]] = "all"
    """The stage, or all three of them; eval: the section of a recipe, and the flags of `rlhf-fast eval`."""
    preset: str = ""
    """default, paper, tutorial; for sft also paper-init. Empty = that of the YAML file, else default."""
    config: str = ""
    """YAML file whose settings replace those of the preset."""
    diff: tuple[str, str] | None = None
    """Two presets to compare, for instance: paper tutorial."""
