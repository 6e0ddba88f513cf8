"""PPO against a reward function of your own, with the built-in trainer, on the demo's small model.

The reward counts polite words in the response. A reward function takes the prompts and the responses as two lists of
texts (or one list of both together) and returns one number for each response.

    python examples/custom_reward.py
"""

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_fast import DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, PPOConfig, SamplingConfig
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.stages import ppo

POLITE = {"please", "thank", "friend", "well"}
PROMPTS = ("write a letter to {} about the map .", "write a letter to {} about the drum .", "who is {} ?")
NAMES = ("adam", "bella", "emil", "fay", "gus", "hana", "ivan", "jane")


def politeness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the number of different polite words in each response."""
    return [float(len(POLITE & set(response.split()))) for response in responses]


def main(out: str = "runs/custom-reward", batches: int = 12) -> None:
    """Write a file of prompts and train on it; the model, metrics.jsonl and samples.jsonl are then in `out`."""
    folder = Path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "polite-prompts.jsonl"
    rows = [{"prompt": prompt.format(name)} for prompt in PROMPTS for name in NAMES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ppo.run(
        PPOConfig(
            out=out,
            policy=ModelConfig(path=str(BASE_MODELS / "small")),
            reward="custom_reward:politeness",  # module:function, imported from the script's folder
            data=DataConfig(path=str(data), template="plain"),
            sampling=SamplingConfig(max_new_tokens=24),
            kl=KLConfig(coef=0.05),
            optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=2),
            value_optim=OptimConfig(lr=1e-3, schedule="constant", warmup_steps=2),
            log=LogConfig(samples=2),
            episodes=batches * 32,
            batch=32,
            minibatch=16,
            inner_epochs=2,
        )
    )


if __name__ == "__main__":
    main()
