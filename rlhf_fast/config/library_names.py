"""The setting that a wrong name means: a misspelt name of ours, or the name that another library has for it.

The other libraries are transformers, TRL, trlx, OpenRLHF, verl, torchtune, axolotl, PEFT, vLLM and lm-eval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher

CUTOFF = 0.7
"""Two names mean the same only if they have this share of their characters in common, in one order."""

SAME_ROLE = {"model": "policy", "policy": "model"}
"""Group -> the group of other stages that has the model which is trained."""

_MODEL = ("model.path", "policy.path", "model", "models")
_BATCH = ("batch",)
_PASSES = ("epochs", "episodes")
_OUT = ("out",)
_DATA = ("data.path", "prompts", "data")
_RESPONSE = ("max_new_tokens", "data.max_response_tokens", "max_response_tokens")
_PROMPT = ("data.max_prompt_tokens", "max_prompt_tokens")
_CLIP = ("clip_low and clip_high",)
_DTYPE = ("model.dtype bfloat16", "policy.dtype bfloat16", "dtype bfloat16")

LIBRARY_NAMES: Mapping[str, tuple[str, ...]] = {
    # models
    "model_name_or_path": _MODEL,
    "pretrained_model_name_or_path": _MODEL,
    "base_model": _MODEL,
    "model_path": _MODEL,
    "model_name": _MODEL,
    "pretrained": _MODEL,
    "model": _MODEL,
    "sft_model_path": ("policy.path", "model.path"),
    "actor_model": ("policy.path",),
    "reward_model": ("reward",),
    "reward_funcs": ("reward",),
    "reward_model_path": ("reward",),
    "reward_pretrain": ("reward",),
    "ref_model": ("reference",),
    "reference_model": ("reference",),
    "critic_model": ("value.path",),
    "torch_dtype": ("dtype",),
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "attn_implementation": ("attention",),
    "flash_attention": ("attention",),
    "use_gradient_checkpointing": ("gradient_checkpointing",),
    "use_peft": ("lora.rank",),
    "use_lora": ("lora.rank",),
    "lora_r": ("lora.rank",),
    "r": ("lora.rank",),
    "lora_rank": ("lora.rank",),
    "lora_alpha": ("lora.alpha",),
    "lora_dropout": ("lora.dropout",),
    "lora_target_modules": ("lora.targets",),
    "target_modules": ("lora.targets",),
    # optimizer
    "learning_rate": ("lr",),
    "actor_learning_rate": ("optim.lr",),
    "critic_learning_rate": ("value_optim.lr",),
    "critic_lr": ("value_optim.lr",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_betas": ("betas",),
    "adam_epsilon": ("eps",),
    "max_grad_norm": ("grad_clip",),
    "max_norm": ("grad_clip",),
    "gradient_clipping": ("grad_clip",),
    "lr_scheduler": ("schedule",),
    "lr_scheduler_type": ("schedule",),
    "warmup_ratio": ("warmup_steps",),
    "num_warmup_steps": ("warmup_steps",),
    "lr_warmup_steps": ("warmup_steps",),
    "gradient_accumulation_steps": ("micro_batch_tokens",),
    "micro_batch_size": ("micro_batch_tokens",),
    "micro_train_batch_size": ("micro_batch_tokens",),
    # sizes of training
    "num_train_epochs": _PASSES,
    "num_epochs": _PASSES,
    "max_epochs": _PASSES,
    "max_steps": _PASSES,
    "total_episodes": _PASSES,
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "rollout_batch_size": _BATCH,
    "per_device_eval_batch_size": _BATCH,
    "batch_size": _BATCH,
    "mini_batch_size": ("minibatch", "batch"),
    "num_mini_batches": ("minibatch",),
    "ppo_mini_batch_size": ("minibatch",),
    "num_ppo_epochs": ("inner_epochs",),
    "ppo_epochs": ("inner_epochs",),
    # PPO
    "kl_coef": ("kl.coef",),
    "init_kl_coef": ("kl.coef",),
    "kl_coeff": ("kl.coef",),
    "beta": ("kl.coef",),
    "kl_penalty": ("kl.estimator",),
    "kl_estimator": ("kl.estimator",),
    "adap_kl_ctrl": ("kl.controller",),
    "adaptive_kl": ("kl.controller",),
    "kl_target": ("kl.target",),
    "kl_horizon": ("kl.horizon",),
    "cliprange": _CLIP,
    "clip_range": _CLIP,
    "clip_ratio": _CLIP,
    "eps_clip": _CLIP,
    "cliprange_value": ("value_clip",),
    "clip_range_value": ("value_clip",),
    "value_clip_range": ("value_clip",),
    "vf_coef": ("value_coef",),
    "value_loss_coef": ("value_coef",),
    "ent_coef": ("entropy_coef",),
    "entropy_coeff": ("entropy_coef",),
    "gae_lambda": ("lam",),
    "lambd": ("lam",),
    "lambda": ("lam",),
    "discount": ("gamma",),
    "whiten_rewards": ("whiten",),
    "whiten_advantages": ("whiten",),
    "missing_eos_penalty": ("missing_eos",),
    "cliprange_reward": ("score_clip",),
    "reward_clip": ("score_clip",),
    "reward_scale": ("score_scale",),
    # data and lengths
    "dataset": _DATA,
    "dataset_name": _DATA,
    "dataset_path": _DATA,
    "datasets": _DATA,
    "train_file": _DATA,
    "input_file": _DATA,
    "eval_dataset": ("data.valid",),
    "validation_file": ("data.valid",),
    "val_set_size": ("data.valid_fraction",),
    "test_size": ("data.valid_fraction",),
    "max_train_samples": ("data.limit", "limit"),
    "chat_template": ("data.template", "template"),
    "max_seq_length": ("data.max_prompt_tokens and data.max_response_tokens",),
    "max_seq_len": ("data.max_prompt_tokens and data.max_response_tokens",),
    "max_length": ("data.max_prompt_tokens and data.max_response_tokens", "max_new_tokens"),
    "sequence_len": ("data.max_prompt_tokens and data.max_response_tokens",),
    "cutoff_len": ("data.max_prompt_tokens and data.max_response_tokens",),
    "max_prompt_length": _PROMPT,
    "response_length": _RESPONSE,
    "max_response_length": _RESPONSE,
    "max_completion_length": _RESPONSE,
    "max_tokens": _RESPONSE,
    # sampling
    "do_sample": ("temperature",),
    "num_return_sequences": ("n",),
    "num_samples": ("n",),
    "num_generations": ("n",),
    "stop_sequences": ("stop",),
    "stop_strings": ("stop",),
    "system_prompt": ("system",),
    # files and reports
    "output_dir": _OUT,
    "output_path": _OUT,
    "output_file": _OUT,
    "save_dir": _OUT,
    "save_path": _OUT,
    "output": _OUT,
    "logging_steps": ("log.every",),
    "log_every_n_steps": ("log.every",),
    "save_steps": ("log.checkpoint_every",),
    "save_total_limit": ("log.keep",),
    "eval_steps": ("log.validate_every",),
    "report_to": ("log.sinks",),
    "resume_from_checkpoint": ("resume",),
    "overwrite_output_dir": ("overwrite", "resume"),
}
"""Name in another library -> setting here, the first of them that the command has. A setting without its group stands
for that of every group."""


def meant_setting(name: str, settings: Sequence[str]) -> str:
    """Return the path of the setting that `name`, which is none of `settings`, most likely means; "" if none is near.

    Names are compared without their groups; of equal ones that with the most similar group is meant. For a name of
    another library for two settings, both are returned with "and" between them, and for a switch the setting's value.
    """
    group, _, rest = name.partition(".")
    if f"{SAME_ROLE.get(group)}.{rest}" in settings:  # the stages differ in it
        return f"{SAME_ROLE[group]}.{rest}"
    last = _last(name)
    targets = {
        alias: found for alias, found in ((a, _existing(t, settings)) for a, t in LIBRARY_NAMES.items()) if found
    }
    if last in targets and last not in map(_last, settings):
        return _best_match(name, targets[last])
    known = {**targets, **{_last(path): [p for p in settings if _last(p) == _last(path)] for path in settings}}
    near = max(known, key=lambda other: _alike(last, other), default="")
    if not near or _alike(last, near) < CUTOFF:
        return ""
    return _best_match(name, known[near])


def _existing(targets: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return the settings that the first of `targets` names which are there, each with all its words."""
    for target in targets:
        first = target.split()[0]
        found = [first] if first in settings else [path for path in settings if path.endswith(f".{first}")]
        if found:
            return [path + target[len(first) :] for path in found]
    return []


def _best_match(name: str, paths: Sequence[str]) -> str:
    """Return the path whose group is most like that of `name`, of several the first."""
    group = name.rpartition(".")[0]
    return max(paths, key=lambda path: _alike(group, path.partition(" ")[0].rpartition(".")[0]) if group else 0)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _alike(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
