"""Groups of settings that the stages share. `--help` and `show-config` print the text below each field."""

from __future__ import annotations

import math
import os
from dataclasses import field
from typing import Any, Literal

from rlhf_fast.config.checks import BadSetting, settings
from rlhf_fast.config.data_path import expand_user, path_value


def require(owner: object, condition: bool, name: str, rule: str) -> None:
    if not condition:
        raise BadSetting(owner, name, rule)


def require_range(owner: object, low: float, high: float, *names: str) -> None:
    """Raise BadSetting unless each named field is finite and in [low, high]."""
    rule = f"must be at least {low:g}" if high == math.inf else f"must be between {low:g} and {high:g}"
    for name in names:
        value = getattr(owner, name)
        own_rule = rule if math.isfinite(value) or high < math.inf else f"{rule} and finite"
        require(owner, low <= value <= high and value != math.inf, name, own_rule)


def require_positive(owner: object, *names: str) -> None:
    for name in names:
        require(owner, 0 < getattr(owner, name) < math.inf, name, "must be above 0")


def expand_home(owner: object, *names: str) -> None:
    """Replace a leading ~ in the named paths, which no shell has done in a YAML file or in `--out=~/runs`."""
    for name in names:
        if str(getattr(owner, name)).startswith("~"):
            object.__setattr__(owner, name, str(os.path.expanduser(getattr(owner, name))))  # noqa: PTH111


@settings
class LoraConfig:
    """Low-rank adapters by `peft` (extra [lora]). Without them the whole model is trained."""

    rank: int = 0
    """Rank of the adapters. 0 = no LoRA."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability before the adapters (sft and reward only; PPO keeps it off)."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get adapters, as in peft's target_modules. Empty = every linear layer of the decoder."""

    def __post_init__(self) -> None:
        require_range(self, 0, math.inf, "rank")
        require_positive(self, "alpha")
        require_range(self, 0, 0.99, "dropout")


@settings
class ModelConfig:
    """A causal language model of Hugging Face transformers, or one with a scalar head."""

    path: str = ""
    """Directory or hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of weights and activations. Log-probabilities, losses and their statistics are always float32."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation, as in transformers' attn_implementation. An architecture without sdpa gets its own."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        expand_home(self, "path")


@settings
class DataConfig:
    """Rows and how they become tokens. `rlhf-fast check FILE` shows the result."""

    path: str | tuple[str, ...] = ""
    """JSONL, JSON array, parquet, csv or tsv (.gz too); a pattern, data/*.jsonl; org/name[/config][:split] of the hub
    (extra [hub]); or a list of these. In Python also a list of dicts or a datasets.Dataset."""
    valid: str | tuple[str, ...] = ""
    """Rows for validation, as `path`. They replace `valid_fraction`."""
    valid_fraction: float = 0.0
    """Share of the prompts held out for validation: whole groups, and no prompt on both sides."""
    columns: dict[str, str] = field(default_factory=dict)
    """Map from our column names to those of the file, for instance {completion: answer}. Our names: prompt, completion,
    messages, chosen, rejected, responses, ranks, scores, text, group, instruction, context, system, history, tools,
    reasoning_content."""
    remove_columns: tuple[str, ...] = ()
    """Columns, and keys of turns such as messages[].name, to leave out although they would change the meaning of rows.
    A row with such a column is refused otherwise; all that is not used is named."""
    template: Literal["auto", "chat", "plain", "dialog"] = "auto"
    """Format of prompts. chat: the tokenizer's chat template. plain: the text unchanged. dialog: HH's "Human: ...
    Assistant:". auto: the one that the model was trained with (its run.json); for a model that no run of ours wrote,
    chat if the tokenizer has a template, else plain."""
    turns: Literal["last", "all"] = "last"
    """Answers of a conversation that have a loss (demonstrations only). last: the last one; the others belong to the
    prompt. all: every one with its end token, as the chat template writes the whole conversation; what lies between two
    answers counts as part of the response. A turn with `weight: 0` has no loss in either."""
    max_prompt_tokens: int = 1024
    """Rows with a longer prompt are dropped and counted (the paper: "longer than 1k tokens filtered")."""
    max_response_tokens: int = 1024
    """Rows with a longer response are dropped and counted. `text` rows are split into chunks of this many tokens."""
    limit: int = 0
    """Read only this many rows. 0 = all."""
    append_eos: bool = True
    """End every response and text with the end token. Without it a policy never learns to stop."""
    dedupe_prefix: int = 0
    """Drop a prompt whose first so many characters are those of an earlier prompt (prompts only). The paper drops "a
    long common prefix" without a length. 0 = keep all."""

    @classmethod
    def prepared(cls, name: str, value: Any) -> Any:
        """Return a value for a field, with rows in Python as a path (see `settings`)."""
        return expand_user(path_value(value)) if name in ("path", "valid") else value

    def __post_init__(self) -> None:
        require_range(self, 0, 0.9, "valid_fraction")
        require_range(self, 1, math.inf, "max_prompt_tokens", "max_response_tokens")
        require_range(self, 0, math.inf, "limit", "dedupe_prefix")


@settings
class SamplingConfig:
    """Sampling of responses. Filters apply in the order temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Sampling temperature (paper: 1). 0 = greedy (not for PPO), whose log-probabilities are reported at temperature 1.
    PPO takes log-probabilities at this temperature, as TRL and lm-hp do; systems that take them at temperature 1
    optimise another policy than the one that was sampled."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this total probability. 1 = all."""
    min_p: float = 0.0
    """Keep tokens with at least this probability relative to the likeliest token's. 0 = all."""
    max_new_tokens: int = 128
    """Longest response in tokens, the end token included (paper: 1024)."""
    min_new_tokens: int = 0
    """The end token is not sampled before this many tokens."""
    allow_biased_filters: bool = False
    """Let PPO sample with top_k, top_p, min_p or min_new_tokens. Its log-probabilities are those of all tokens, but the
    samples come from those that are kept, which biases the gradient."""
    stop: tuple[str, ...] = ()
    """Texts that end a response as the end token does. They stay part of it. A text that begins in the prompt does not
    count."""
    batch: int = 64
    """Responses generated at a time. Results do not depend on it, but for rounding on paths other than `fused`."""
    cache_mb: int = 0
    """Largest size in MiB of the KV cache during a rollout. If `batch` responses need more, fewer run at a time.
    0 = as much as `batch` responses need."""

    def __post_init__(self) -> None:
        require_range(self, 0, math.inf, "temperature", "top_k", "min_new_tokens", "cache_mb")
        require(self, 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        require_range(self, 0, 1, "min_p")
        require_range(self, 1, math.inf, "max_new_tokens", "batch")
        rule = f"must be at most max_new_tokens ({self.max_new_tokens})"
        require(self, self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", rule)
        require(self, all(self.stop), "stop", "must not have an empty text, which every response has")

    @property
    def biased_filters(self) -> dict[str, float]:
        """The settings that keep tokens from being sampled, with their values without effect. None if it is allowed."""
        without_effect = {"top_k": 0, "top_p": 1, "min_p": 0, "min_new_tokens": 0}
        if self.allow_biased_filters:
            return {}
        return {name: off for name, off in without_effect.items() if getattr(self, name) != off}


@settings
class OptimConfig:
    """AdamW (torch, fused) and its learning rate over the optimizer steps."""

    lr: float = 9.65e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates (paper: 0.9, 0.95)."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (the paper does not state one)."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient (GPT-3's; the paper does not state one). 0 = no clipping."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up. In PPO a batch has batch / minibatch * inner_epochs steps."""
    warmup_start: float = 0.1
    """Learning rate of the first step, as a share of the peak."""
    final_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of the peak."""
    micro_batch_tokens: int = 8192
    """Tokens per forward pass. Where our own layers run, a prompt that several rows share counts once and padding does
    not; elsewhere padding counts. It limits memory and does not change results (up to rounding)."""

    def __post_init__(self) -> None:
        require_positive(self, "lr", "eps")
        require(self, all(0 <= beta < 1 for beta in self.betas), "betas", "must be two numbers from 0 to below 1")
        require_range(self, 0, math.inf, "weight_decay", "grad_clip", "warmup_steps")
        require_range(self, 0, 1, "warmup_start", "final_ratio")
        require_range(self, 1, math.inf, "micro_batch_tokens")


@settings
class LogConfig:
    """Files that a run writes and lines that it prints. Only validate_every can change the weights in `out` (see
    `select`)."""

    every: int = 1
    """Steps between rows of metrics.jsonl (PPO: batches)."""
    samples: int = 4
    """Responses written to samples.jsonl at each such step."""
    show_samples: int = 10
    """Steps (PPO: batches) between samples that are printed: a prompt, the response and its score, the first of those
    that go to samples.jsonl. SFT and reward training make samples where they validate. 0 = none."""
    validate_every: int = 0
    """Steps (PPO: batches) between validations. 0 = once an epoch. The last step always validates."""
    checkpoint_every: int = 100
    """Steps (PPO: batches) between checkpoints to resume from. 0 = none by steps."""
    checkpoint_minutes: float = 10.0
    """Longest time without a checkpoint: the first step that ends later than this after the last one writes one too, so
    that a killed run loses minutes. 0 = none by time."""
    keep: int = 2
    """Checkpoints kept during the run. Each holds the weights, two moments and any averages of every trained model. A
    finished run keeps none."""
    check_fit: bool = True
    """Refuse a run that by the estimate does not fit into memory or onto the disk. False: only say so, and go on."""
    live: bool = True
    """Show progress: one live line on a terminal, plain lines elsewhere."""
    sinks: tuple[str, ...] = ()
    """Other loggers that get the metrics: tensorboard, trackio, wandb (extra [log])."""
    eval_every: int = 0
    """Steps (PPO: batches) between evaluations by tasks of `rlhf-fast eval`, with the same figures: metrics
    eval/TASK.MEASURE. 0 = none. With any other number the last step evaluates too. Not for reward models."""
    eval_tasks: tuple[str, ...] = ("all",)
    """Names and groups of these tasks. Preference, which compares two models, is left out."""
    eval_data: str = ""
    """Folder with their sets. Empty = the small sets that come with the package."""
    eval_limit: int = 100
    """Rows of each set. 0 = all."""

    def __post_init__(self) -> None:
        require_range(self, 1, math.inf, "every", "keep")
        counts = ("samples", "show_samples", "validate_every", "checkpoint_every", "eval_every", "eval_limit")
        require_range(self, 0, math.inf, *counts, "checkpoint_minutes")


@settings
class KLConfig:
    """The penalty on the KL divergence from the reference model, subtracted from every token's reward."""

    coef: float = 0.02
    """Beta (paper C.4: 0.02; lm-hp 0.15, TRL and N+ 0.05). With the adaptive controller, its start."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of log pi - log ref at the sampled token. k1 (paper, lm-hp, TRL) is unbiased; k2 = k1^2 / 2;
    k3 = exp(-k1) - 1 + k1."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed (paper), or lm-hp's proportional controller, which changes coef until the KL is at the target."""
    target: float = 6.0
    """KL in nats that the adaptive controller aims at, per `target_unit`."""
    target_unit: Literal["sequence", "token"] = "sequence"
    """sequence: the KL summed over a response (lm-hp; target 6). token: the mean KL per token (verl; target 0.1)."""
    horizon: int = 10000
    """Episodes over which the controller corrects. A larger horizon is slower."""

    def __post_init__(self) -> None:
        require_range(self, 0, math.inf, "coef")
        require_positive(self, "target", "horizon")
