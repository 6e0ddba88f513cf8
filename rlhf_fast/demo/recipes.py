"""The stages' settings in the demo. The paper's, but for scale: what differs is larger learning rates, smaller batches,
a KL coefficient and a weight of the pretraining gradient that suit 10 to 20 word responses."""

from pathlib import Path

from rlhf_fast.config.fields import DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.demo.materials import Plan
from rlhf_fast.demo.measure import NEW_TOKENS

LOG = LogConfig(checkpoint_every=10, keep=1, live=True)


def sft_config(plan: Plan, base: Path, data: Path, out: Path, seed: int) -> SFTConfig:
    """Two epochs with a tenth of pretraining text, as the model that the paper's PPO starts from and is held to."""
    return SFTConfig(
        out=str(out),
        seed=seed,
        model=ModelConfig(path=str(base)),
        data=DataConfig(path=str(data / "demonstrations.jsonl")),
        pretrain=DataConfig(path=str(data / "texts.jsonl")),
        pretrain_fraction=0.1,
        epochs=2,
        batch=32,
        residual_dropout=0.0,
        select="last",
        optim=OptimConfig(lr=plan.sft_lr),
        log=LOG,
    )


def reward_config(plan: Plan, run: Path, data: Path, out: Path, seed: int) -> RewardConfig:
    """One epoch, all pairs of a prompt's 4 to 9 responses as one element, demonstrations' mean score at 0."""
    return RewardConfig(
        out=str(out),
        seed=seed,
        model=ModelConfig(path=str(run / "sft")),
        data=DataConfig(path=str(data / "rankings_train.jsonl")),
        demonstrations=DataConfig(path=str(data / "demonstrations.jsonl")),
        epochs=1,
        batch=16,
        optim=OptimConfig(lr=plan.reward_lr, warmup_steps=5),
        log=LOG,
    )


def ppo_config(plan: Plan, run: Path, data: Path, out: Path, seed: int, ptx: bool) -> PPOConfig:
    """One inner epoch over each batch, constant learning rate after a warm-up, KL to the SFT model."""
    steps = plan.batch // plan.minibatch
    return PPOConfig(
        out=str(out),
        seed=seed,
        policy=ModelConfig(path=str(run / "sft")),
        reward=str(run / "reward"),
        data=DataConfig(path=str(data / "prompts.jsonl")),
        pretrain=DataConfig(path=str(data / "texts.jsonl")) if ptx else DataConfig(),
        ptx_coef=plan.ptx_coef,
        ptx_ratio=1,
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, batch=256),
        kl=KLConfig(coef=plan.kl),
        optim=OptimConfig(lr=plan.policy_lr, schedule="constant", warmup_steps=3 * steps),
        value_optim=OptimConfig(lr=plan.value_lr, schedule="constant", warmup_steps=3 * steps),
        value_coef=0.5,
        missing_eos="replace",
        missing_eos_value=-2.0,
        episodes=plan.batch * plan.batches,
        batch=plan.batch,
        minibatch=plan.minibatch,
        log=LOG,
    )
