"""Named sets of hyperparameters, laid between the defaults and the file: `--preset paper`.

paper        InstructGPT (arXiv 2203.02155), 1.3B model, appendix C. What it does not state is lm-human-preferences'
             (lm-hp) or, where said so, ours.
paper-init   sft only: the separate model that PPO starts from and is held to (C.3), with pretraining text mixed in.
tutorial     the numbers that tutorials pass on as InstructGPT's. Some are not in the paper: lr 1.77e-6 lies below the
             range it scanned, 4 PPO epochs are its predecessors', the value coefficient is not stated, and 256k are
             episodes, not prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_fast.config.resolve import Setting, difference, explained, read_yaml, resolve, section, show
from rlhf_fast.config.stages import STAGES
from rlhf_fast.errors import UserError

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "paper": {
            "epochs": 16,
            "batch": 32,
            "optim.lr": 9.65e-6,
            "optim.betas": (0.9, 0.95),
            "optim.schedule": "cosine",
            "optim.warmup_steps": 0,
            "optim.final_ratio": 0.1,
            "residual_dropout": 0.2,
            "data.max_prompt_tokens": 1024,
            "data.max_response_tokens": 1024,
            "sampling.max_new_tokens": 1024,
            # By the reward model's score: `select: reward` with `select_reward`. It stays off here, because the reward
            # model is trained from this stage's result.
            "select": "loss",
        },
        "paper-init": {
            "epochs": 2,
            "batch": 32,
            "optim.lr": 5e-6,
            "optim.betas": (0.9, 0.95),
            "optim.schedule": "cosine",
            "optim.final_ratio": 0.1,
            "residual_dropout": 0.2,
            "pretrain_fraction": 0.1,
            "select": "last",
        },
        "tutorial": {
            "epochs": 16,
            "batch": 32,
            "optim.lr": 9.65e-6,
            "optim.schedule": "cosine",
            "residual_dropout": 0.2,
        },
    },
    "reward": {
        "paper": {
            "epochs": 1,
            "batch": 64,
            "optim.lr": 9e-6,
            "optim.betas": (0.9, 0.95),
            "optim.schedule": "cosine",
            "optim.warmup_steps": 0,
            "optim.final_ratio": 0.1,
            "data.max_prompt_tokens": 1024,
            "data.max_response_tokens": 1024,
        },
        "tutorial": {"epochs": 1, "batch": 64, "optim.lr": 9e-6},
    },
    "ppo": {
        "paper": {
            "episodes": 256_000,
            "batch": 512,
            "minibatch": 64,
            "inner_epochs": 1,
            "optim.lr": 5e-6,  # not stated: ours, in the scanned range and below the 8.05e-6 that diverged without ptx
            "optim.betas": (0.9, 0.95),
            "optim.schedule": "constant",
            "optim.warmup_steps": 80,
            "optim.warmup_start": 0.1,
            "value_optim.lr": 9e-6,
            "value_optim.betas": (0.9, 0.95),
            "value_optim.schedule": "constant",
            "value_optim.warmup_steps": 80,
            "value_optim.warmup_start": 0.1,
            "sampling.temperature": 1.0,
            "sampling.max_new_tokens": 1024,
            "data.max_prompt_tokens": 1024,
            "data.dedupe_prefix": 200,  # "a long common prefix": the length is ours
            "kl.coef": 0.02,
            "kl.estimator": "k1",
            "kl.controller": "fixed",
            "gamma": 1.0,
            "lam": 0.95,  # not stated: lm-hp
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_clip": 0.2,  # not stated: lm-hp
            "value_coef": 0.1,  # not stated: lm-hp
            "whiten": "minibatch",  # not stated: lm-hp
            "whiten_shift_mean": True,  # not stated: lm-hp
            "missing_eos": "replace",  # not stated: lm-hp
            "missing_eos_value": -1.0,  # not stated: lm-hp
            "ptx_coef": 27.8,
            "ptx_ratio": 8,
            "ema": 0.992,
            "select": "ema",
        },
        "tutorial": {
            "episodes": 256_000,
            "batch": 512,
            "inner_epochs": 4,
            "optim.lr": 1.77e-6,
            "value_optim.lr": 1.77e-6,
            "kl.coef": 0.02,
            "clip_low": 0.2,
            "clip_high": 0.2,
            "value_coef": 1.0,
        },
    },
}


def preset(stage: str, name: str) -> Mapping[str, Setting]:
    """The layer `name` of a stage; "" and "default" are empty."""
    if name in ("", "default"):
        return {}
    if name not in PRESETS[stage]:
        raise UserError(f"{stage}: no preset {name!r}; there are default, {', '.join(PRESETS[stage])}")
    return {path: Setting(value, f"preset {name}") for path, value in PRESETS[stage][name].items()}


def show_config(stage: str, name: str, file: str = "", diff: tuple[str, str] | None = None) -> Iterator[str]:
    """The lines of `rlhf-fast show-config`: each stage's settings as YAML and what they do, or where presets differ."""
    for each in STAGES if stage == "all" else (stage,):
        if diff:
            left, right = (resolve(STAGES[each], preset(each, side), check=False) for side in diff)
            rows = [(each, *diff), *((p, show(_listed(a)), show(_listed(b))) for p, a, b in difference(left, right))]
            widths = [max(len(row[i]) for row in rows) for i in range(3)]
            for row in rows:
                yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            if len(rows) == 1:
                yield "  no difference"
            yield ""
            continue
        layers = [preset(each, name)] + ([section(read_yaml(file), each)] if file else [])
        if stage == "all":
            yield f"{each}:"
        yield from explained(resolve(STAGES[each], *layers, check=False), indent="  " if stage == "all" else "")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
