"""The settings of the three stages: trees of frozen dataclasses that flags, YAML files and saved runs all share.

The defaults are the InstructGPT paper's (arXiv 2203.02155, appendix C, 1.3B model), with six exceptions that keep short
runs from failing: `select`, `missing_eos`, `whiten`, `sampling.max_new_tokens` and `data.dedupe_prefix` of PPO, and
`residual_dropout` of SFT, which is 0 because the paper's value is for GPT-3. The preset `paper` sets those too. Where
the paper states no value, the default is lm-human-preferences' (lm-hp), and the setting's text says so.

If RLHF systems differ in a setting, its text names them: "N+" is vwxyzjn/summarize_from_feedback_details, "Aligner" is
NeMo-Aligner. Some differences are not settings, because one choice is right or the others are bugs:

- The score is the reward of the last response token (TRL and N+ put it one token later, on padding).
- GAE skips masked tokens (OpenRLHF multiplies by the mask).
- A loss is normalised over the whole optimizer batch (TRL averages the micro-batches' averages).
- Log-probabilities are taken at the sampling temperature (some systems leave it out).
- Dropout is off in PPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from rlhf_fast.config.checks import BadSetting, settings
from rlhf_fast.config.data_path import DataPath, parts
from rlhf_fast.config.fields import (
    DataConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    expand_home,
    require,
    require_positive,
    require_range,
)
from rlhf_fast.config.rewards import RewardSpec, RewardSpecs, given_twice, reward_specs, weights_rule
from rlhf_fast.errors import UserError


@settings
class _Stage:
    """Settings and checks that the three stages share."""

    stage: ClassVar[str] = ""
    required: ClassVar[tuple[str, ...]] = ()

    out: str = ""
    """Directory the run writes: a Hugging Face folder, metrics.jsonl, samples.jsonl, run.json, checkpoints/."""
    seed: int = 0
    """Seed for data order, dropout and sampling. 0 to below 2**63."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = cuda if there is one, else cpu."""
    resume: bool = True
    """Resume from the newest complete checkpoint in `out`. False: refuse an `out` that holds a run."""

    @classmethod
    def prepared(cls, name: str, value: Any) -> Any:
        """Return a value for a field: data=rows is short for data=DataConfig(path=rows) with the stage's defaults."""
        field = next(field for field in fields(cls) if field.name == name)
        if field.type == "DataConfig" and not isinstance(value, DataConfig) and callable(field.default_factory):
            try:
                return replace(field.default_factory(), path=value)
            except BadSetting as error:
                raise ValueError(error.rule) from None
        return value

    def __post_init__(self) -> None:
        expand_home(self, "out", *(name for name in ("reference",) if hasattr(self, name)))
        require(self, 0 <= self.seed < 2**63, "seed", "must be from 0 to below 2**63")
        for name, remedy in (("reward", "once, with the sum of the weights"), ("select_reward", "once")):
            twice = given_twice(getattr(self, name, ""))
            require(self, not twice, name, f"names {twice} twice; give it {remedy}")

    def ready(self) -> None:
        """Raise UserError if a required path is not set."""
        for name in self.required:
            value: object = self
            for part in name.split("."):
                value = getattr(value, part)
            if not value:
                group, _, field = name.partition(".")
                inner = f"{group}={type(getattr(self, group)).__name__}({field}=...)" if field else f"{name}=..."
                raise UserError(
                    f"{self.stage}: {name} is not set; give --{name} PATH, put it in the YAML file, or in Python write"
                    f" {type(self).__name__}({inner})"
                )

    def rewards(self) -> dict[str, RewardSpec]:
        """Return every reward that the stage names: setting -> reward, with its number if there are several."""
        found: dict[str, RewardSpec] = {}
        for name in ("reward", "select_reward"):
            specs = reward_specs(getattr(self, name, ""))
            found |= {f"{name}[{i}]" if len(specs) > 1 else name: spec for i, spec in enumerate(specs, 1)}
        return found

    def model_paths(self) -> list[str]:
        """Return the path of every model that the stage loads: a folder, a hub name, or a reward's module:function."""
        models = [value.path for value in vars(self).values() if isinstance(value, ModelConfig)]
        models += [getattr(self, "reference", ""), *(spec for spec in self.rewards().values() if isinstance(spec, str))]
        return list(dict.fromkeys(path for path in models if path))

    def input_paths(self) -> dict[str, str]:
        """Return the folder or file of every model and data setting that names one: setting -> path."""
        paths = {}
        for name, value in vars(self).items():
            if isinstance(value, ModelConfig):
                paths[f"{name}.path"] = value.path
            elif isinstance(value, DataConfig):
                for setting in ("path", "valid"):
                    files = parts(getattr(value, setting))
                    numbers = [f"[{i}]" for i in range(len(files))] if len(files) > 1 else [""]
                    paths |= {f"{name}.{setting}{i}": file for i, file in zip(numbers, files, strict=True)}
            elif name == "reference":
                paths[name] = value
        paths |= {name: spec for name, spec in self.rewards().items() if isinstance(spec, str)}
        return {name: path for name, path in paths.items() if path and Path(path).exists()}

    def data_paths(self) -> list[DataPath]:
        """Return the value of every setting that names data of the stage."""
        configs = [value for value in vars(self).values() if isinstance(value, DataConfig)]
        return [path for cfg in configs for path in (cfg.path, cfg.valid) if path]


@settings
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
    """Passes over the demonstrations. The validation loss starts to rise long before the end; see `select`."""
    batch: int = 32
    """Demonstrations per optimizer step."""
    residual_dropout: float = 0.0
    """Dropout probability on the output of every attention and feed-forward block. The paper's 0.2 is for GPT-3. It can
    ruin a model that was pretrained without dropout, as most are (SmolLM2-135M: loss 10.9 instead of 2.2)."""
    packing: bool = True
    """Put several rows end to end in one sequence, without attention across them. Same loss, less padding. Our own
    layers, on the CPU, always have packed rows."""
    pretrain_fraction: float = 0.0
    """Share of each step's sequences that are pretraining text (paper C.3, for the model that PPO starts from: 0.1)."""
    select: Literal["loss", "reward", "last"] = "loss"
    """Weights that `out` gets. loss: lowest validation loss. reward: highest mean score by `select_reward` of responses
    to the validation prompts (the paper's way, which needs a reward model first). last: those of the last step."""
    select_reward: RewardSpecs = ""
    """Reward for select=reward: as PPO's `reward`, several of them with equal weights."""
    resume_with_changed_reward: bool = False
    """Go on from the checkpoint although a function of select_reward has changed since. run.json keeps its
    old checksum. Before the first checkpoint a function may change without it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the responses that select=reward scores and samples.jsonl shows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, math.inf, "epochs", "batch")
        require_range(self, 0, 0.9, "residual_dropout", "pretrain_fraction")
        rule = "needs pretrain.path, the text to mix in"
        require(self, self.pretrain_fraction == 0 or bool(self.pretrain.path), "pretrain_fraction", rule)
        rule = "needs select_reward, the reward model's directory (or choose select: loss)"
        require(self, self.select != "reward" or bool(self.select_reward), "select", rule)


@settings
class RewardConfig(_Stage):
    """A reward model from ranked responses (paper C.2)."""

    stage: ClassVar[str] = "reward"
    required: ClassVar[tuple[str, ...]] = ("model.path", "data.path")

    out: str = "runs/reward"
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to start from, usually the sft directory. A scalar head replaces its unembedding."""
    data: DataConfig = field(default_factory=lambda: DataConfig(valid_fraction=0.05))
    """Comparisons: prompt + responses + ranks, or prompt + chosen + rejected."""
    demonstrations: DataConfig = field(default_factory=DataConfig)
    """Demonstrations whose mean score becomes 0: after training, a bias is set (paper C.2; N+ too). No path: the bias
    stays 0."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6))
    """AdamW; cosine to 10 % without warm-up, as in the paper."""
    log: LogConfig = field(default_factory=LogConfig)
    epochs: int = 1
    """Passes over the comparisons (paper: 1; more overfit)."""
    batch: int = 64
    """Prompts per optimizer step, each with all its responses and all their pairs. A prompt is one element of the mean,
    whatever its number of responses; systems that train on shuffled pairs overfit (paper 3.5)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, math.inf, "epochs", "batch")
        if self.log.eval_every:
            error = BadSetting(self.log, "eval_every", "must be 0 here: a reward model answers no task")
            error.name = "log.eval_every"
            raise error


@settings
class PPOConfig(_Stage):
    """Reinforcement learning against a reward with a KL penalty (paper C.3, C.4), with or without PPO-ptx."""

    stage: ClassVar[str] = "ppo"
    required: ClassVar[tuple[str, ...]] = ("policy.path", "reward", "data.path")

    out: str = "runs/ppo"
    policy: ModelConfig = field(default_factory=ModelConfig)
    """The model that the policy starts from, usually the sft directory."""
    reference: str = ""
    """Directory of the reference model of the KL penalty. Empty = the model that the policy starts from (paper C.3)."""
    value: ModelConfig = field(default_factory=ModelConfig)
    """The model that the value model starts from; it is a network of its own. No path: the reward model (paper, N+,
    DS-Chat; lm-hp and trlx share the policy's trunk), the first of several, or the policy's trunk if no reward is a
    model."""
    reward: RewardSpecs = ""
    """Directory of a reward model, or module:function (in Python also the function itself), or a list of these. The
    function is called by the names of its parameters, as in TRL: prompts, completions, completion_ids and the columns
    of the rows; or with a list of texts, or with lists of prompts and of responses (docs/rewards.md)."""
    reward_weights: tuple[float, ...] = ()
    """Factor of each reward in their sum, which is the score. Empty = 1 each (TRL has the same)."""
    reward_timeout: float = 0.0
    """Seconds that a reward function may take for a batch. 0 = any."""
    reward_retries: int = 0
    """Times that a reward function is called again if it raises or takes too long, after 1, 2, 4, ... seconds."""
    resume_with_changed_reward: bool = False
    """Go on from the checkpoint although a reward function has changed since. run.json keeps its old checksum. Before
    the first checkpoint a function may change without it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    pretrain: DataConfig = field(default_factory=DataConfig)
    """Pretraining text for PPO-ptx. No path: plain PPO."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-6, schedule="constant", warmup_steps=80, warmup_start=0.1)
    )
    """The policy's optimizer. Warm-up over 10 batches of 8 steps from a tenth of the peak (paper C.4). The paper does
    not state the final lr; it scanned 2.55e-6 to 2.55e-5 and saw divergence above 8.05e-6 without ptx."""
    value_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=9e-6, schedule="constant", warmup_steps=80, warmup_start=0.1)
    )
    """The value model's optimizer (paper: lr 9e-6). TRL and N+ have one lr for both."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(checkpoint_every=10))

    episodes: int = 256_000
    """Responses in total, not prompts: each of the paper's 31k prompts is used about 8 times."""
    batch: int = 512
    """Responses per batch (a rollout and its optimizer steps)."""
    minibatch: int = 64
    """Responses per optimizer step."""
    inner_epochs: int = 1
    """Passes over a batch (paper 1; lm-hp, TRL and N+ 4)."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda (the paper states none; lm-hp, N+, TRL 0.95; verl and OpenRLHF 1)."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low (paper 0.2)."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (paper 0.2)."""
    dual_clip: float = 0.0
    """Upper bound on the ratio for tokens with a negative advantage (dual clip); 0 = none. verl always has 3."""
    value_clip: float = 0.2
    """New values are clipped to this distance from the old (lm-hp, N+, TRL, DS-Chat 0.2; verl, OpenRLHF 0.5);
    0 = none."""
    value_coef: float = 0.1
    """Factor of the value loss 0.5 * max(squared errors) (lm-hp, N+, TRL 0.1; trlx 1.0). The value model has its own
    AdamW, so the factor acts only through grad_clip and eps."""
    entropy_coef: float = 0.0
    """Factor of the entropy bonus in the policy loss (not in the paper)."""
    loss_mean: Literal["token", "sequence"] = "token"
    """token: every token of a step has the same weight (lm-hp, TRL, trlx). sequence: every response has."""
    whiten: Literal["batch", "minibatch", "none"] = "batch"
    """Tokens over which advantages are scaled to unit variance: the whole batch (verl, OpenRLHF), a step's minibatch
    (lm-hp), or none (DS-Chat). TRL and N+ use those of each rank."""
    whiten_shift_mean: bool = True
    """Whitened advantages have mean 0 (lm-hp, TRL, N+). False: they keep their mean (torchtune's flag has the opposite
    meaning)."""
    whiten_unbiased: bool = False
    """Divide the variance by n - 1 (verl, NeMo-RL) instead of n (OpenRLHF, lm-hp)."""
    whiten_eps: float = 1e-8
    """Added to the variance before the square root (lm-hp, TRL, verl 1e-8; AReaL 1e-5)."""
    score_scale: float = 1.0
    """Factor of the score, applied before the clip."""
    score_clip: float = 0.0
    """Scores are clipped to +-this (OpenRLHF 10, DS-Chat 5); 0 = none (paper, lm-hp)."""
    missing_eos: Literal["keep", "replace", "subtract", "drop"] = "keep"
    """Score of a response without end token. keep: unchanged. replace: missing_eos_value (lm-hp, N+: -1; AReaL: 0).
    subtract: the score minus that value (TRL). drop: the response is left out of the losses (Aligner)."""
    missing_eos_value: float = -1.0
    """replace: the score. subtract: the amount to subtract, which must be above 0."""
    bootstrap_truncated: bool = False
    """Give a response without end token the value after its last token as its future instead of 0 (AReaL does; the
    paper and the others do not)."""
    old_logprobs: Literal["rollout", "recompute"] = "rollout"
    """Log-probabilities in the ratio's denominator. rollout: the sampler's, the policy that really acted. recompute: a
    forward pass of the trainer (TRL, verl, OpenRLHF), which hides the gap between the two. The gap is logged with both;
    rollout measures it in the policy's first step on a batch, without a pass of its own."""
    exact: bool = False
    """Policy, reference and value model repeat the rollout's arithmetic in training, so that the gap is 0 for every
    token, and a row's numbers do not depend on its micro-batch. On a CPU with AVX2, for the models of the decode path
    fused (docs/rollouts.md), without adapters."""

    ptx_coef: float = 27.8
    """Gamma: weight of the pretraining gradient, which is added to the PPO gradient before the one optimizer step
    (paper C.4; DS-Chat makes a separate step). Only with pretrain.path."""
    ptx_ratio: int = 8
    """Pretraining texts per response (paper 8)."""
    ema: float = 0.992
    """Decay per optimizer step of the moving average of the policy's weights (paper C.4); 0 = none."""
    select: Literal["last", "ema", "reward"] = "last"
    """Weights that `out` gets. last: those of the last step. ema: the moving average (paper); after a short run it is
    still near the start. reward: those with the best mean of score minus KL penalty on the validation prompts."""
    critic_warmup: int = 0
    """Number of first batches in which only the value model learns (verl, OpenRLHF, Aligner; not in the paper)."""
    target_kl: float = 0.0
    """Skip the rest of a batch's steps once the mean of 0.5 * (log ratio)^2 exceeds this many nats per token. 0 = never
    (the paper; of the systems read only cleanrl has it)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, 1, math.inf, "episodes", "batch", "minibatch", "inner_epochs", "ptx_ratio")
        require(self, self.batch % self.minibatch == 0, "batch", f"must be a multiple of minibatch ({self.minibatch})")
        require_range(self, 0, 1, "gamma", "lam", "ema", "clip_low")
        require_range(self, 0, math.inf, "clip_high", "value_clip", "value_coef", "score_clip", "ptx_coef")
        require_range(self, 0, math.inf, "critic_warmup", "target_kl", "reward_timeout", "reward_retries")
        require(self, self.dual_clip == 0 or self.dual_clip > 1, "dual_clip", "must be 0 (none) or above 1")
        require_positive(self, "whiten_eps", "score_scale")
        require(self, self.ema < 1, "ema", "must be below 1")
        require(self, self.select != "ema" or self.ema > 0, "select", "needs ema above 0")
        rule = "must be above 0 with missing_eos=subtract: it is the amount taken off"
        require(self, self.missing_eos != "subtract" or self.missing_eos_value > 0, "missing_eos_value", rule)
        require(self, math.isfinite(self.missing_eos_value), "missing_eos_value", "must be a number")
        rule = weights_rule(self.reward_weights, self.reward)
        require(self, not rule, "reward_weights", rule)
        if not self.sampling.temperature > 0:
            raise UserError("ppo: sampling.temperature must be above 0: a greedy policy has no log-probabilities")
        rule = "must be false with an adapter, which a rollout merges into the weights and a training pass does not"
        require(self, not (self.exact and (self.policy.lora.rank or self.value.lora.rank)), "exact", rule)
        for name, off in self.sampling.biased_filters.items():
            rule = (
                f"must be {off} in PPO, which trains on the log-probabilities of all tokens; to train with a biased"
                " gradient set sampling.allow_biased_filters"
            )
            error = BadSetting(self.sampling, name, rule)
            error.name = f"sampling.{name}"
            raise error

    @property
    def num_batches(self) -> int:
        """Number of rollouts."""
        return -(-self.episodes // self.batch)

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.num_batches * self.inner_epochs * (self.batch // self.minibatch)


StageConfig = SFTConfig | RewardConfig | PPOConfig

STAGES: dict[str, type[StageConfig]] = {"sft": SFTConfig, "reward": RewardConfig, "ppo": PPOConfig}


def require_stage(cfg: object) -> None:
    """Raise UserError for what are not the settings of a stage, such as a dict of them."""
    if not isinstance(cfg, StageConfig):
        inner = ", ".join(f"{name}=..." for name in cfg) if isinstance(cfg, Mapping) else "..."
        names = ", ".join(cls.__name__ for cls in STAGES.values())
        raise UserError(
            f"run_stage: takes the settings of a stage ({names}), got {type(cfg).__name__}; write for instance"
            f" PPOConfig({inner})"
        )
