"""Every setting of the three stages: one tree of frozen dataclasses is the flags, the YAML file and the saved run.

The defaults are the InstructGPT paper's (arXiv 2203.02155, appendix C, 1.3B model). Five of PPO's are gentler, so that
a short run is not spoiled: `select`, `missing_eos`, `whiten`, `sampling.max_new_tokens` and `data.dedupe_prefix`; and
SFT's `residual_dropout` is 0, as the paper's is for GPT-3. The preset `paper` sets those too. Where the paper is silent
the value is lm-human-preferences' (lm-hp); the line says so.

Settings on which RLHF systems silently differ name the systems: "N+" is vwxyzjn/summarize_from_feedback_details,
"Aligner" is NeMo-Aligner. Not settable, because one answer is right or the others are bugs: the score stands on the
last response token (TRL and N+ put it one later, on padding); masked tokens do not exist for GAE (OpenRLHF multiplies
by the mask); a loss is normalised over the whole optimizer batch (TRL averages the micro-batches' averages);
log-probabilities are taken at the sampling temperature (some leave it out); dropout is off in PPO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlhf_fast.config.fields import (
    INF,
    BadSetting,
    DataConfig,
    KLConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    need,
    need_positive,
    need_range,
)
from rlhf_fast.errors import UserError

__all__ = [
    "STAGES", "BadSetting", "DataConfig", "KLConfig", "LogConfig", "LoraConfig", "ModelConfig", "OptimConfig",
    "PPOConfig", "RewardConfig", "SFTConfig", "SamplingConfig",
]  # fmt: skip


@dataclass(frozen=True)
class _Stage:
    """What the three stages share."""

    stage: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()

    out: str = ""
    """Directory the run writes: a Hugging Face folder, metrics.jsonl, samples.jsonl, run.json, checkpoints/."""
    seed: int = 0
    """Of everything random: order of the data, dropout, sampling. 0 to below 2**63."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = cuda where there is one."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `out`. False: refuse an `out` that holds a run."""

    def __post_init__(self):
        need(self, 0 <= self.seed < 2**63, "seed", "must be from 0 to below 2**63")

    def ready(self) -> None:
        """Raise UserError if a path that the stage cannot do without is missing."""
        for name in self.required:
            value = self
            for part in name.split("."):
                value = getattr(value, part)
            if not value:
                raise UserError(f"{self.stage}: {name} is not set; give --{name} PATH, or put it in the YAML file")

    def model_paths(self) -> list[str]:
        """Every model the stage starts from or asks, as given: a folder, or a hub name; perhaps module:function."""
        own = [value.path for value in vars(self).values() if isinstance(value, ModelConfig)]
        named = [getattr(self, name, "") for name in ("reference", "reward", "select_reward")]
        return list(dict.fromkeys(path for path in own + named if path))

    def data_files(self) -> list[str]:
        """Every data file the stage reads."""
        parts = [value for value in vars(self).values() if isinstance(value, DataConfig)]
        return [file for part in parts for file in (part.path, part.valid) if file]


@dataclass(frozen=True)
class SFTConfig(_Stage):
    """Supervised fine-tuning on demonstrations (paper C.1)."""

    stage: ClassVar[str] = "sft"
    required: ClassVar[tuple[str, ...]] = ("model.path", "data.path")

    out: str = "runs/sft"
    model: ModelConfig = field(default_factory=ModelConfig)
    """The pretrained model."""
    data: DataConfig = field(default_factory=lambda: DataConfig(valid_fraction=0.05))
    """Demonstrations: prompt + completion, messages, alpaca or sharegpt rows."""
    pretrain: DataConfig = field(default_factory=DataConfig)
    """Pretraining text to mix in, `text` rows."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """AdamW; cosine to 10 % without warm-up, as in the paper."""
    log: LogConfig = field(default_factory=LogConfig)
    epochs: int = 16
    """Passes over the demonstrations (the validation loss is worst long before the end; see `select`)."""
    batch: int = 32
    """Demonstrations per optimizer step."""
    residual_dropout: float = 0.0
    """Dropout on the output of every attention and feed-forward block. The paper's 0.2 is for GPT-3; a model that was
    pretrained without dropout, as most are, can be wrecked by it (SmolLM2-135M: loss 10.9 instead of 2.2)."""
    packing: bool = True
    """Lay rows end to end, without attention across them; same loss, less padding."""
    pretrain_fraction: float = 0.0
    """Share of each step's sequences that are pretraining text (paper's start of PPO, C.3: 0.1)."""
    select: Literal["loss", "reward", "last"] = "loss"
    """Which weights `out` gets: lowest validation loss; highest mean score of `select_reward` on responses to the
    validation prompts (the paper's way, which needs a reward model first); or the last."""
    select_reward: str = ""
    """Directory of the reward model for select=reward."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Of the responses that select=reward scores and samples.jsonl shows."""

    def __post_init__(self):
        super().__post_init__()
        need_range(self, 1, INF, "epochs", "batch")
        need_range(self, 0, 0.9, "residual_dropout", "pretrain_fraction")
        rule = "needs pretrain.path, the text to mix in"
        need(self, self.pretrain_fraction == 0 or bool(self.pretrain.path), "pretrain_fraction", rule)
        rule = "needs select_reward, the reward model's directory (or choose select: loss)"
        need(self, self.select != "reward" or bool(self.select_reward), "select", rule)


@dataclass(frozen=True)
class RewardConfig(_Stage):
    """A reward model from ranked responses (paper C.2)."""

    stage: ClassVar[str] = "reward"
    required: ClassVar[tuple[str, ...]] = ("model.path", "data.path")

    out: str = "runs/reward"
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to start from, as a rule the sft directory; its unembedding gives way to a scalar head."""
    data: DataConfig = field(default_factory=lambda: DataConfig(valid_fraction=0.05))
    """Comparisons: prompt + responses + ranks, or prompt + chosen + rejected."""
    demonstrations: DataConfig = field(default_factory=DataConfig)
    """After training a bias puts these responses' mean score at 0 (paper C.2; N+ too). No path: the bias stays 0."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6))
    """AdamW; cosine to 10 % without warm-up, as in the paper."""
    log: LogConfig = field(default_factory=LogConfig)
    epochs: int = 1
    """The paper: 1; more overfit."""
    batch: int = 64
    """Prompts per optimizer step, each with all its responses and all their pairs (one element of the mean, whatever
    its number of responses; systems that train on shuffled pairs overfit, paper 3.5)."""

    def __post_init__(self):
        super().__post_init__()
        need_range(self, 1, INF, "epochs", "batch")


@dataclass(frozen=True)
class PPOConfig(_Stage):
    """Reinforcement learning against a reward with a KL penalty (paper C.3, C.4), with or without PPO-ptx."""

    stage: ClassVar[str] = "ppo"
    required: ClassVar[tuple[str, ...]] = ("policy.path", "reward", "data.path")

    out: str = "runs/ppo"
    policy: ModelConfig = field(default_factory=ModelConfig)
    """The policy's start, as a rule the sft directory."""
    reference: str = ""
    """Directory of the model the KL is taken to. Empty = the policy's start (paper C.3)."""
    value: ModelConfig = field(default_factory=ModelConfig)
    """The value model's start, a network of its own. No path: the reward model (paper, N+, DS-Chat; lm-hp and trlx
    share the policy's trunk). With a Python function as reward it must be given, or starts as the policy's trunk."""
    reward: str = ""
    """Directory of a reward model, or module:function, called with a list of texts (prompt and response) for their
    scores."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    pretrain: DataConfig = field(default_factory=DataConfig)
    """Pretraining text for PPO-ptx. No path: plain PPO."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-6, schedule="constant", warmup_steps=80, warmup_start=0.1)
    )
    """The policy's. Warm-up over 10 batches of 8 steps from a tenth (paper C.4). The paper does not state the final lr;
    it scanned 2.55e-6 to 2.55e-5 and saw divergence above 8.05e-6 without ptx."""
    value_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=9e-6, schedule="constant", warmup_steps=80, warmup_start=0.1)
    )
    """The value model's (paper: 9e-6). TRL and N+ have one lr for both."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(checkpoint_every=10))

    episodes: int = 256_000
    """Responses in all, not prompts: the paper's 31k prompts come round about 8 times."""
    batch: int = 512
    """Responses per batch (a rollout and the steps on it)."""
    minibatch: int = 64
    """Responses per optimizer step."""
    inner_epochs: int = 1
    """Passes over a batch (paper 1; lm-hp, TRL and N+ 4)."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda (not stated; lm-hp, N+, TRL 0.95; verl and OpenRLHF 1)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low (paper 0.2)."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (paper 0.2)."""
    dual_clip: float = 0.0
    """Bound on ratio * |advantage| for negative advantages: at most dual_clip times it; 0 = none. verl always has 3."""
    value_clip: float = 0.2
    """New values are clipped to this distance from the old (lm-hp, N+, TRL, DS-Chat 0.2; verl, OpenRLHF 0.5);
    0 = none."""
    value_coef: float = 0.1
    """Factor of the value loss 0.5 * max(squared errors) (lm-hp, N+, TRL 0.1; trlx 1.0). The value model has its own
    AdamW, so this matters only next to grad_clip and eps."""
    entropy_coef: float = 0.0
    """Entropy bonus in the policy loss (not in the paper)."""
    loss_mean: Literal["token", "sequence"] = "token"
    """Every token of the step counts alike (lm-hp, TRL, trlx), or every response (its tokens' mean first)."""
    whiten: Literal["batch", "minibatch", "none"] = "batch"
    """Tokens over which advantages are scaled to unit variance: the whole batch (verl, OpenRLHF), a step's (lm-hp), or
    not at all (DS-Chat). TRL and N+ take each rank's."""
    whiten_shift_mean: bool = True
    """Whitened advantages get mean 0 (lm-hp's advantages, TRL, N+); false keeps their mean (torchtune has the meaning
    inverted)."""
    whiten_unbiased: bool = False
    """Variance over n - 1 (verl, NeMo-RL) instead of n (OpenRLHF, lm-hp)."""
    whiten_eps: float = 1e-8
    """Added to the variance inside the root (lm-hp, TRL, verl 1e-8; AReaL 1e-5)."""
    score_scale: float = 1.0
    """Factor on the score, before the clip."""
    score_clip: float = 0.0
    """Scores are clipped to +-this (OpenRLHF 10, DS-Chat 5); 0 = none (paper, lm-hp)."""
    missing_eos: Literal["keep", "replace", "subtract", "drop"] = "keep"
    """A response without end token: keep its score; replace it by missing_eos_value (lm-hp, N+: -1); subtract that
    (TRL); or leave the response out of the losses (Aligner). AReaL: replace by 0."""
    missing_eos_value: float = -1.0
    """For replace, the score. For subtract, the amount taken off (so give it above 0)."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """The ratio's denominator: the sampler's log-probabilities (the behaviour policy), or a forward pass of the
    trainer's (TRL, verl, OpenRLHF), which hides the gap between the two; the gap is a metric either way."""

    ptx_coef: float = 27.8
    """Gamma: weight of the pretraining gradient, added to the PPO gradient before the one optimizer step (paper C.4;
    DS-Chat takes a step of its own). Only with pretrain.path."""
    ptx_ratio: int = 8
    """Pretraining texts per response (paper 8)."""
    ema: float = 0.992
    """Decay of the moving average of the policy's weights, per optimizer step (paper C.4); 0 = none."""
    select: Literal["last", "ema", "reward"] = "last"
    """Which weights `out` gets (paper: ema). A short run's average is still near the start. reward: the best mean of
    score minus KL penalty on the validation prompts."""
    critic_warmup: int = 0
    """First batches in which only the value model learns (verl, OpenRLHF, Aligner have it; the paper none)."""
    target_kl: float = 0.0
    """Skip the rest of a batch's steps once the mean of 0.5 * (log ratio)^2 is above this many nats per token; 0 =
    never (the paper, and every system read but cleanrl)."""

    def __post_init__(self):
        super().__post_init__()
        need_range(self, 1, INF, "episodes", "batch", "minibatch", "inner_epochs")
        need(self, self.batch % self.minibatch == 0, "batch", f"must be a multiple of minibatch ({self.minibatch})")
        need_range(self, 0, 1, "gamma", "lam", "ema")
        need_range(self, 0, 1, "clip_low")
        need_range(self, 0, INF, "clip_high", "value_clip", "value_coef", "score_clip", "ptx_coef", "critic_warmup")
        need_range(self, 0, INF, "target_kl")
        need_range(self, 1, INF, "ptx_ratio")
        need(self, self.dual_clip == 0 or self.dual_clip > 1, "dual_clip", "must be 0 (none) or above 1")
        need_positive(self, "whiten_eps", "score_scale")
        need(self, self.ema < 1, "ema", "must be below 1")
        need(self, self.select != "ema" or self.ema > 0, "select", "needs ema above 0")
        rule = "must be above 0 with missing_eos=subtract: it is the amount taken off"
        need(self, self.missing_eos != "subtract" or self.missing_eos_value > 0, "missing_eos_value", rule)
        need(self, math.isfinite(self.missing_eos_value), "missing_eos_value", "must be a number")
        if not self.sampling.temperature > 0:
            raise UserError("ppo: sampling.temperature must be above 0: a greedy policy has no log-probabilities")

    @property
    def batches(self) -> int:
        """Rollouts in all."""
        return -(-self.episodes // self.batch)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.batches * self.inner_epochs * (self.batch // self.minibatch)


StageConfig = SFTConfig | RewardConfig | PPOConfig

STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}
