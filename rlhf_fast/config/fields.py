"""The parts that the stages' settings (config.py) are made of; each field says what it does and who does otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_fast.errors import UserError


class BadSetting(UserError):
    """A setting whose value breaks its rule. `name` is the field, so that a reader of files can add path and line."""

    def __init__(self, owner: object, name: str, rule: str):
        self.name, self.rule, self.value = name, rule, getattr(owner, name)
        super().__init__(f"{type(owner).__name__}: {name} {rule}, got {self.value!r}")


def need(owner: object, ok: bool, name: str, rule: str) -> None:
    if not ok:
        raise BadSetting(owner, name, rule)


def need_range(owner: object, low: float, high: float, *names: str) -> None:
    """Each named field lies in [low, high] and is finite; NaN does not."""
    rule = f"must be at least {low:g}" if high == float("inf") else f"must be between {low:g} and {high:g}"
    for name in names:
        value = getattr(owner, name)
        need(owner, low <= value <= high and value != INF, name, rule)


def need_positive(owner: object, *names: str) -> None:
    for name in names:
        need(owner, 0 < getattr(owner, name) < INF, name, "must be above 0")


INF = float("inf")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters by `peft` (extra [lora]); without them the whole model is trained."""

    rank: int = 0
    """Rank of the adapters. 0 = no LoRA."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapters (sft and reward only; PPO keeps it off)."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get adapters, as peft's target_modules. Empty = every linear layer of the decoder."""

    def __post_init__(self):
        need_range(self, 0, INF, "rank")
        need_positive(self, "alpha")
        need_range(self, 0, 0.99, "dropout")


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model of Hugging Face transformers, or one with a scalar head."""

    path: str = ""
    """Directory or hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights and activations. Log-probabilities, losses and their statistics are float32 always."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """transformers' attn_implementation."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataConfig:
    """A JSONL file (.gz too) and how its rows become tokens. `rlhf-fast check FILE` shows the result."""

    path: str = ""
    """The file."""
    valid: str = ""
    """A file for validation; replaces `valid_fraction`."""
    valid_fraction: float = 0.0
    """Share of the prompts (whole groups, no prompt on both sides) held out for validation."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the file's name, for instance {completion: answer}. Our names: prompt, completion, messages, chosen,
    rejected, responses, ranks, text, group."""
    template: Literal["auto", "chat", "plain", "dialog"] = "auto"
    """How a prompt becomes text: by the tokenizer's chat template; as it stands; or as HH's "Human: ... Assistant:".
    auto = chat if the tokenizer has a template, else plain."""
    max_prompt_tokens: int = 1024
    """Rows with a longer prompt are dropped and counted, as in the paper ("longer than 1k tokens filtered")."""
    max_response_tokens: int = 1024
    """Rows with a longer response are dropped and counted. For `text` rows: tokens per piece of a document."""
    limit: int = 0
    """Read only this many rows. 0 = all."""
    append_eos: bool = True
    """End every response and text with the end token. Without it a policy never learns to stop."""
    dedupe_prefix: int = 0
    """Prompts only: drop a prompt that shares its first so many characters with an earlier one (the paper: "a long
    common prefix", length not stated). 0 = keep all."""

    def __post_init__(self):
        need_range(self, 0, 0.9, "valid_fraction")
        need_range(self, 1, INF, "max_prompt_tokens", "max_response_tokens")
        need_range(self, 0, INF, "limit", "dedupe_prefix")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Filters apply in the order temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """The paper's rollouts: 1. 0 = greedy (not for PPO). PPO's log-probabilities are taken at this temperature, as in
    TRL and lm-hp; systems that use temperature 1 there optimise another policy than the one that was sampled."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability. 1 = all. PPO's log-probabilities stay those before the
    filters."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest. 0 = all."""
    max_new_tokens: int = 128
    """Longest response, the end token included (paper: 1024)."""
    min_new_tokens: int = 0
    """The end token cannot be drawn before so many tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a response like the end token; they stay part of it."""
    batch: int = 64
    """Responses generated at a time. Results do not depend on it."""
    cache_mb: int = 0
    """Most MiB that keys and values may take during a rollout; fewer responses run at a time where `batch` of them
    need more. 0 = what `batch` of them need."""

    def __post_init__(self):
        need_range(self, 0, INF, "temperature", "top_k", "min_new_tokens", "cache_mb")
        need(self, 0 < self.top_p <= 1, "top_p", "must be above 0 and at most 1")
        need_range(self, 0, 1, "min_p")
        need_range(self, 1, INF, "max_new_tokens", "batch")
        rule = f"must be at most max_new_tokens ({self.max_new_tokens})"
        need(self, self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", rule)


@dataclass(frozen=True)
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
    """After the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up. In PPO a batch is batch / minibatch * inner_epochs steps."""
    warmup_start: float = 0.1
    """Learning rate of the first step as a share of the peak."""
    final_ratio: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    micro_batch_tokens: int = 8192
    """Tokens per forward pass, padding included: memory, not results (up to rounding)."""

    def __post_init__(self):
        need_positive(self, "lr", "eps")
        need(self, all(0 <= b < 1 for b in self.betas), "betas", "must be two numbers from 0 to below 1")
        need_range(self, 0, INF, "weight_decay", "grad_clip", "warmup_steps")
        need_range(self, 0, 1, "warmup_start", "final_ratio")
        need_range(self, 1, INF, "micro_batch_tokens")


@dataclass(frozen=True)
class LogConfig:
    """What a run writes and shows. Of these, validate_every alone can change the weights in `out` (see `select`)."""

    every: int = 1
    """Steps between lines of metrics.jsonl (PPO: batches)."""
    samples: int = 4
    """Responses written to samples.jsonl at each such step."""
    validate_every: int = 0
    """Steps (PPO: batches) between validations. 0 = once an epoch. There is one at the end in any case."""
    checkpoint_every: int = 100
    """Steps (PPO: batches) between checkpoints to resume from. 0 = none before the end."""
    keep: int = 2
    """Checkpoints kept while the run lasts, each with the weights, two moments and any averages of every model trained;
    a finished run needs none and keeps none."""
    live: bool = True
    """One live line on a terminal; plain lines otherwise."""
    sinks: tuple[str, ...] = ()
    """Further places for the metrics, by name: tensorboard, trackio, wandb (extra [log])."""

    def __post_init__(self):
        need_range(self, 1, INF, "every", "keep")
        need_range(self, 0, INF, "samples", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class KLConfig:
    """The penalty for leaving the reference model, taken off the reward of every token."""

    coef: float = 0.02
    """Beta (paper C.4: 0.02; lm-hp 0.15, TRL and N+ 0.05). With the adaptive controller, its start."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of log pi - log ref at the sampled token. k1 (paper, lm-hp, TRL) is unbiased; k2 = k1^2 / 2;
    k3 = exp(-k1) - 1 + k1."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """fixed (paper), or lm-hp's proportional controller, which moves coef until the KL meets the target."""
    target: float = 6.0
    """Nats the adaptive controller steers to, in `target_unit`."""
    target_unit: Literal["sequence", "token"] = "sequence"
    """lm-hp sums the KL over the response (target 6); verl feeds the mean per token (target 0.1)."""
    horizon: int = 10000
    """Episodes over which the controller corrects; larger is slower."""

    def __post_init__(self):
        need_range(self, 0, INF, "coef")
        need_positive(self, "target", "horizon")
