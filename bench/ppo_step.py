"""Measure one PPO step at the 135M shape, by phases, beside the same in plain torch: random weights and rewards.

    python -m rlhf_fast.bench.ppo_step --device cuda --save PATH.json [--deadline SECONDS] [--tiny]

Ours is the stage's own code: Rollout, make_experience, ppo_update, with PPOConfig's defaults and one minibatch of 64
responses. Plain torch is bench/plain_learner.py: transformers' generate and forward, whole logits, float32
log_softmax; both have our Learner's AdamW, micro-batches and moving average. The optimizers go on through the rounds.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, replace

import torch

from rlhf_fast.batches import Experience, Responses
from rlhf_fast.bench import plain_learner
from rlhf_fast.bench.decode_step import BASELINE, prompts, transformers_generate
from rlhf_fast.bench.device_profile import Profiler
from rlhf_fast.bench.shapes import SMOLLM2_135M, TINY, random_model
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import Run, parser_of
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages.ppo import State, ppo_update
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner

PLAIN = "plain torch"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the losses, the gradients' norms and the advantages


@dataclass(frozen=True)
class Sizes:
    """Amounts that are measured."""

    shape: dict
    prompt: int = 128
    new: int = 128
    batch: int = 64
    micro_batch_tokens: int = 8192
    rounds: int = 3


TINY_SIZES = Sizes(TINY, prompt=5, new=6, batch=4, micro_batch_tokens=22, rounds=1)


def random_scores(responses: Responses) -> torch.Tensor:
    """Return fixed rewards (B,), which depend on nothing."""
    return torch.randn(len(responses.lengths), generator=torch.Generator().manual_seed(1))


class Trainer:
    """A policy and a value model with their optimizers. Two from the same models begin with the same weights."""

    def __init__(self, policy: Model, value: Model, cfg: PPOConfig):
        self.policy, self.value = copy.deepcopy(policy), copy.deepcopy(value)
        self.policy_learner = Learner(self.policy, cfg.optim, cfg.steps, ema=cfg.ema)
        self.value_learner = Learner(self.value, cfg.value_optim, cfg.steps)
        self.state = State(self.policy_learner, self.value_learner, KLController(cfg.kl), best=None)


class Bench:
    """The phases of a step in one dtype, for both sides."""

    def __init__(self, run: Run, sizes: Sizes, dtype: torch.dtype):
        self.run, self.sizes, self.dtype = run, sizes, dtype
        self.name = f"135M {str(dtype)[6:]}, {sizes.batch} responses of {sizes.prompt} + {sizes.new} tokens"
        sampling = SamplingConfig(max_new_tokens=sizes.new, batch=sizes.batch)
        cfg = PPOConfig(batch=sizes.batch, minibatch=sizes.batch, episodes=1000 * sizes.batch, sampling=sampling)
        optims = [replace(optim, micro_batch_tokens=sizes.micro_batch_tokens) for optim in (cfg.optim, cfg.value_optim)]
        self.cfg = replace(cfg, optim=optims[0], value_optim=optims[1])
        device = run.options.device
        self.policy = random_model(sizes.shape, device, dtype)
        self.reference = random_model(sizes.shape, device, dtype, seed=1)
        self.value = random_model(sizes.shape, device, dtype, head="scalar", seed=2)
        self.prompts = prompts(sizes.shape, sizes.batch, sizes.prompt)
        self.rollout = Rollout(self.policy, self.cfg.sampling)
        self.responses: Responses | None = None
        self.experience: Experience | None = None
        self.num_updates = 0
        self.to_profile: list[tuple[dict, dict]] = []

    def rollout_row(self) -> dict:
        """Return the row of our rollout; transformers' is a row of its own, since it takes long."""
        self.responses = self.rollout.generate(self.prompts)  # it also compiles the kernels
        seconds = self.run.seconds(lambda: self.rollout.generate(self.prompts))
        return {
            "row": f"PPO rollout, {self.name}", "seconds": seconds,
            "tokens_per_second": self.sizes.batch * self.sizes.new / seconds, "decode_path": self.rollout.decode_path,
        }  # fmt: skip

    def experience_row(self) -> dict:
        """Return the row of the forward passes, the advantages and the metrics."""
        models = (self.policy, self.reference, self.value)

        def ours():
            self.experience, _ = make_experience(self.responses, *models, random_scores, self.cfg)
            return self.experience

        def plain():
            return plain_learner.make_experience(self.responses, self.reference, self.value, random_scores, self.cfg)

        found, expected = ours(), plain()
        errors = {
            name: relative(getattr(found, name), getattr(expected, name))
            for name in ("ref_logprobs", "values", "advantages")
        }
        return self._compared(f"PPO experience, {self.name}", ours, plain, errors)

    def update_row(self) -> dict:
        """Return the row of one optimizer step of both models."""
        ours, plain = (Trainer(self.policy, self.value, self.cfg) for _ in range(2))

        def update_ours() -> dict[str, float]:
            self.num_updates += 1
            return ppo_update(ours.state, self.experience, None, self.cfg, self.num_updates)

        def update_plain() -> dict[str, float]:
            return plain_learner.ppo_update(plain.state, self.experience, self.cfg, self.num_updates)

        found, expected = update_ours(), update_plain()
        names = ("loss/policy_avg", "loss/value_avg", "grad_norm", "value/grad_norm")
        errors = {name: abs(found[name] - expected[name]) / max(abs(expected[name]), 0.1) for name in names}
        row = self._compared(f"PPO update, {self.name}", update_ours, update_plain, errors)
        row["stats"] = {"ours": found, PLAIN: expected}
        return row

    def baseline_rollout(self) -> None:
        """Add transformers' generate to the rollout's row."""
        row = next(row for row in self.run.rows if row["row"] == f"PPO rollout, {self.name}")
        transformers_generate(self.policy, self.prompts, 1)
        seconds = self.run.seconds(lambda: transformers_generate(self.policy, self.prompts, self.sizes.new))
        more = {"others": {BASELINE: {"seconds": seconds}}, "ratios": {BASELINE: seconds / row["seconds"]}}
        self.run.extend(row, more)

    def _compared(self, name: str, ours, plain, errors: dict[str, float]) -> dict:
        """Return a row of both, timed by turns, with their peak memory and what ran on the device."""
        calls = {PLAIN: plain, "ours": ours}
        timers = {provider: lambda call=call: self.run.seconds(call) for provider, call in calls.items()}
        times = interleaved(timers, rounds=self.sizes.rounds if self.dtype == torch.bfloat16 else 1)
        best = {provider: min(taken) for provider, taken in times.items()}
        row = {
            "row": name, "seconds": best["ours"], "ratios": median_ratios(times, "ours"), "rounds": times,
            "errors": errors, "checked": checked(errors, TOLERANCE[self.dtype]),
            "peak_bytes": self.run.clock.peak_bytes(ours),
            "others": {PLAIN: {"seconds": best[PLAIN], "peak_bytes": self.run.clock.peak_bytes(plain)}},
        }  # fmt: skip
        self.to_profile.append((row, calls))
        return row

    def profile(self) -> None:
        """Add to the rows what ran on the device. The profiler slows what is timed after it: it comes last."""
        for row, calls in self.to_profile:
            for provider, into in (("ours", row), (PLAIN, row["others"][PLAIN])):
                profiler = Profiler(self.run.options.device)
                profiler.start()
                calls[provider]()
                profile = profiler.stop(1)
                into |= profile._asdict() if profile else {}
            self.run.extend(row, {})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of the expected."""
    return float((found.cpu() - expected.cpu()).norm() / expected.cpu().norm().clamp_min(1e-12))


def checked(errors: dict[str, float], tolerance: float) -> str:
    """Return in words whether both sides agree."""
    worst = max(errors, key=errors.__getitem__)
    verdict = "agree" if errors[worst] <= tolerance else "DIFFER"
    return f"{verdict}: {worst} by {errors[worst]:.2g}"


def main(arguments: list[str] | None = None) -> int:
    parser: argparse.ArgumentParser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="bfloat16,float32", help="float32 is the stages' default")
    parser.add_argument("--micro-batch-tokens", type=int, help="tokens of a forward and backward pass (default: 8192)")
    options = parser.parse_args(arguments)
    run, sizes = Run("ppo_step", options), TINY_SIZES if options.tiny else Sizes(SMOLLM2_135M)
    if options.micro_batch_tokens:
        sizes = replace(sizes, micro_batch_tokens=options.micro_batch_tokens)
    benches: list[Bench] = []

    def phases(dtype: str) -> None:
        bench = Bench(run, sizes, getattr(torch, dtype))
        run.add(bench.rollout_row())
        run.add(bench.experience_row())
        run.add(bench.update_row())
        benches.append(bench)

    for dtype in options.dtype.split(","):
        run.measure(f"PPO step, {dtype}", phases, dtype)
    for bench in benches[:1]:
        run.measure(f"{BASELINE}, {bench.name}", bench.baseline_rollout)
    for bench in benches:
        run.measure(f"profile, {bench.name}", bench.profile)
    run.failed |= any("DIFFER" in row.get("checked", "") for row in run.rows)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
