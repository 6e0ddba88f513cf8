"""Train for three updates with the PPOTrainer of trl 1.12, its last version, and write metrics and weights to OUT.json.

    trl_ppo.py MODEL OUT.json

Twice: as it is, and under lazy_head of the policy and the reference. A process of its own, because another trl is
installed beside it.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf_fast.integrations import lazy_head, status

SIZES = {"per_device_train_batch_size": 4, "local_rollout_forward_batch_size": 4, "response_length": 8}


class Record(TrainerCallback):
    def __init__(self):
        self.metrics = []

    def on_log(self, args, state, control, logs=None, **_):
        if "loss/policy_avg" in logs:
            self.metrics.append(logs)


def flat(model) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def train(folder: str, out: str, lazy: bool) -> dict:
    """Return what a run gave; counts: of each model the calls that an op answered and the logits that were made."""
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    words.pad_token = words.unk_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    scorers = []
    for seed in (1, 2):  # their heads are random
        set_seed(seed)
        scorers.append(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32))
    prompts = [
        {"input_ids": words(f"the {a} saw a {b}")["input_ids"]}
        for a in ("cat", "dog", "mat")
        for b in ("cat", "dog", "mat", "one")
    ]
    args = PPOConfig(
        output_dir=f"{out}.run", num_mini_batches=1, total_episodes=12, num_ppo_epochs=2, learning_rate=1e-3,
        temperature=0.9, report_to=[], use_cpu=True, bf16=False, seed=0, logging_steps=1, max_grad_norm=0.0,
        save_strategy="no", num_sample_generations=0, missing_eos_penalty=None, disable_tqdm=True, **SIZES,
    )  # fmt: skip
    record, start = Record(), flat(policy)
    set_seed(0)
    with contextlib.ExitStack() as stack:
        if lazy:
            stack.enter_context(lazy_head(policy))
            stack.enter_context(lazy_head(reference))
        PPOTrainer(
            args=args,
            processing_class=words,
            model=policy,
            ref_model=reference,
            value_model=scorers[0],
            reward_model=scorers[1],
            train_dataset=Dataset.from_list(prompts),
            callbacks=[record],
        ).train()
    counts = (
        [[found.answered.total(), found.fallbacks.total()] for found in (status(policy), status(reference))]
        if lazy
        else []
    )
    weights = {"start": start, "weights": flat(policy)}
    return {"version": trl.__version__, "metrics": record.metrics, "counts": counts, **weights}


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    Path(out).write_text(json.dumps([train(folder, out, lazy) for lazy in (False, True)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
