"""Settings of the demo's stages: the paper's at a smaller scale.

Learning rates are larger and batches smaller; the KL coefficient and the weight of the pretraining gradient suit
responses of 10 to 20 words.
"""

from pathlib import Path

from rlhf_fast.config.fields import DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.demo.materials import Plan
from rlhf_fast.demo.measure import NEW_TOKENS

LOG = LogConfig(checkpoint_every=10, keep=1, live=True)


def sft_config(plan: Plan, base: Path, data: Path, out: Path, seed: int) -> SFTConfig:
    """Train two epochs with a tenth of pretraining text, as the paper does for the model that PPO starts from."""
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
    """Train one epoch on all pairs of each prompt's 4 to 9 responses; set the demonstrations' mean score to 0."""
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
    """Train one inner epoch per batch, at a constant learning rate after a warm-up, with the SFT model as reference."""
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
