"""PPO against a reward function of your own, with the built-in trainer, on the demo's small model.

The reward counts polite words in the response. It is called by the names of its parameters, as in TRL, and returns one
number for each response (docs/rewards.md). It ends in reward hacking, as any reward does that leaves out what one
wants: the score rises, while the letters forget what they are about and no longer end. The KL grows with it, and a
larger `kl.coef` holds the model back. The script prints a response of the first batch and one of the last to show it.

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


def politeness(completions: Sequence[str]) -> list[float]:
    """Return the number of different polite words in each response."""
    return [float(len(POLITE & set(completion.split()))) for completion in completions]


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
            reward=politeness,  # on the command line: --reward custom_reward:politeness
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
    rows = [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in (rows[0], rows[-1]):
        numbers = f"score {row['score']:.0f}, KL {row['kl']:.1f}"
        print(f"batch {row['step']}: {numbers}: {row['prompt']} -> {row['response']}")


if __name__ == "__main__":
    main()
