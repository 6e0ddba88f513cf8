"""Measure one PPO step of random weights and rewards, by phases, beside the same in plain torch; and reward training.

    python -m rlhf_fast.bench.ppo_step [--device cuda] [--case NAME,...] --save PATH.json [--deadline SECONDS] [--tiny]

Ours is the stage's own code: Rollout, make_experience, ppo_update, with PPOConfig's defaults and the sizes of `CASES`.
Plain torch is bench/plain_learner.py: transformers' generate and forward on padded rows, whole logits, float32
log_softmax; both have our Learner's micro-batches and moving average, plain torch with torch's fused AdamW. The
optimizers go on through the rounds.
"""

import argparse
import copy
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast.batches import Comparisons, Experience, Responses, pad_rows, response_mask
from rlhf_fast.bench import plain_learner
from rlhf_fast.bench.decode_step import BASELINE, prompts, transformers_generate
from rlhf_fast.bench.device_profile import Profiler
from rlhf_fast.bench.shapes import SMOLLM2_135M, STORIES_260K, TINY, random_model
from rlhf_fast.bench.timing import interleaved, median_ratios
from rlhf_fast.bench.whole import Run, parser_of
from rlhf_fast.config.fields import SamplingConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages.ppo import State, ppo_update
from rlhf_fast.training.experience import make_experience
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import reward_loss

PLAIN = "plain torch"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the losses, the gradients' norms and the advantages


@dataclass(frozen=True)
class Sizes:
    """Amounts that are measured."""

    shape: dict
    prompt: int = 128
    new: int = 128
    batch: int = 64
    minibatch: int = 64
    inner_epochs: int = 1
    micro_batch_tokens: int = 8192
    rounds: int = 3
    warm_ups: int = 1
    """Calls of both sides after the first and before the measured ones, on a GPU: ours capture graphs, for each size of
    micro-batch."""
    ragged: bool = False
    """Prompts of 1 to `prompt` tokens, as many short ones as people write; responses are cut to 1 to `new` tokens."""

    @property
    def name(self) -> str:
        return "260K" if self.shape is STORIES_260K else "135M"

    @property
    def words(self) -> str:
        limit = "up to " if self.ragged else ""
        minibatches = f", minibatches of {self.minibatch}" if self.minibatch != self.batch else ""
        epochs = f", {self.inner_epochs} epochs" if self.inner_epochs > 1 else ""
        return f"{self.batch} responses of {limit}{self.prompt} + {self.new} tokens{minibatches}{epochs}"


TINY_SIZES = Sizes(TINY, prompt=5, new=6, batch=4, minibatch=4, micro_batch_tokens=22, rounds=1)
CASES = {
    "135M": Sizes(SMOLLM2_135M),
    "135M-small": Sizes(SMOLLM2_135M, prompt=16, new=64, batch=8, minibatch=2),
    "135M-ragged": Sizes(SMOLLM2_135M, prompt=128, new=128, batch=32, minibatch=8, ragged=True, warm_ups=4),
    "260K": Sizes(STORIES_260K, prompt=16, new=64, batch=64, minibatch=16, inner_epochs=4, rounds=5),
}
"""Sizes by name; the first is for a GPU, the others are for a CPU."""


def ragged_lengths(count: int, longest: int, seed: int) -> Tensor:
    """Return (count,) lengths of 1 to `longest`, log-normal around a fifth of it; the first is `longest`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest / 5 * torch.randn(count, generator=generator).exp()).long().clamp(1, longest)
    lengths[0] = longest
    return lengths


def cut(responses: Responses, sizes: Tensor) -> Responses:
    """Return the responses with at most `sizes` (B,) tokens each, as if an end token had been sampled."""
    lengths = torch.minimum(responses.lengths, responses.prompt_lengths + sizes)
    mask = response_mask(responses.prompt_lengths, lengths)
    fields = {name: torch.where(mask, getattr(responses, name), 0) for name in ("logprobs", "entropy")}
    return responses._replace(lengths=lengths, mask=mask, **fields)


def random_scores(responses: Responses) -> Tensor:
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
        self.name = f"{sizes.name} {str(dtype)[6:]}, {sizes.words}"
        sampling = SamplingConfig(max_new_tokens=sizes.new, batch=sizes.batch)
        cfg = PPOConfig(
            batch=sizes.batch, minibatch=sizes.minibatch, inner_epochs=sizes.inner_epochs,
            episodes=1000 * sizes.batch, sampling=sampling,
        )  # fmt: skip
        optims = [replace(optim, micro_batch_tokens=sizes.micro_batch_tokens) for optim in (cfg.optim, cfg.value_optim)]
        self.cfg = replace(cfg, optim=optims[0], value_optim=optims[1])
        device = run.options.device
        self.policy = random_model(sizes.shape, device, dtype)
        self.reference = random_model(sizes.shape, device, dtype, seed=1)
        self.value = random_model(sizes.shape, device, dtype, head="scalar", seed=2)
        self.prompts = prompts(sizes.shape, sizes.batch, sizes.prompt)
        if sizes.ragged:
            lengths = ragged_lengths(sizes.batch, sizes.prompt, seed=0).tolist()
            tokens = [row[:length] for row, length in zip(self.prompts.tokens, lengths, strict=True)]
            self.prompts = self.prompts._replace(tokens=tokens)
        self.rollout = Rollout(self.policy, self.cfg.sampling)
        self.responses: Responses | None = None
        self.experience: Experience | None = None
        self.num_updates = 0
        self.to_profile: list[tuple[dict, dict]] = []

    def rollout_row(self) -> dict:
        """Return the row of our rollout; transformers' is a row of its own, since it takes long."""
        self.responses = self.rollout.generate(self.prompts)  # it also compiles the kernels
        seconds = self.run.seconds(lambda: self.rollout.generate(self.prompts))
        if self.sizes.ragged:
            self.responses = cut(self.responses, ragged_lengths(self.sizes.batch, self.sizes.new, seed=1))
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
            with forcing("reference"):  # torch's AdamW
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

    def reward_row(self) -> dict:
        """Return the row of one optimizer step of a reward model: prompts with 2 to 9 ranked responses each."""
        sizes, shape = self.sizes, self.sizes.shape
        counts = [2 + i % 8 for i in range(max(sizes.minibatch, 2))]
        lengths = ragged_lengths(sum(counts), sizes.new, seed=2)
        rows, prompts_of = [], ragged_lengths(len(counts), sizes.prompt, seed=3)
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        generator = torch.Generator().manual_seed(4)
        starts = [torch.randint(1, shape["vocab_size"], (n,), generator=generator) for n in prompts_of.tolist()]
        for prompt, length in zip(owner.tolist(), lengths.tolist(), strict=True):
            response = torch.randint(1, shape["vocab_size"], (length,), generator=generator)
            rows.append([*starts[prompt].tolist(), *response.tolist()])
        tokens, totals = pad_rows(rows)
        offsets = torch.tensor([0, *counts]).cumsum(0)
        ranks = torch.cat([torch.randperm(count, generator=generator) for count in counts])
        batch = Comparisons(tokens, prompts_of[owner], totals, offsets, ranks)
        ours, plain = (Trainer(self.policy, self.value, self.cfg).value_learner for _ in range(2))

        def step_ours() -> dict[str, float]:
            return ours.step([(reward_loss, batch, 1.0)])

        def step_plain() -> dict[str, float]:
            with forcing("reference"):
                return plain.step([(plain_learner.reward_loss, batch, 1.0)])

        found, expected = step_ours(), step_plain()
        names = ("loss", "grad_norm")
        errors = {name: abs(found[name] - expected[name]) / max(abs(expected[name]), 0.1) for name in names}
        name = f"reward step, {self.name.partition(',')[0]}, {len(counts)} prompts of 2 to 9 responses"
        return self._compared(name, step_ours, step_plain, errors)

    def _compared(self, name: str, ours, plain, errors: dict[str, float]) -> dict:
        """Return a row of both, timed by turns, with their peak memory and what ran on the device."""
        calls = {PLAIN: plain, "ours": ours}
        for _ in range(self.sizes.warm_ups if self.run.options.device == "cuda" else 0):
            ours()
            plain()
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


def relative(found: Tensor, expected: Tensor) -> float:
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
    parser.add_argument(
        "--case", default=next(iter(CASES)), help=f"which sizes, of {', '.join(CASES)} (default: first)"
    )
    parser.add_argument("--reward", action="store_true", help="a step of reward training too")
    options = parser.parse_args(arguments)
    run = Run("ppo_step", options)
    benches: list[Bench] = []

    def phases(sizes: Sizes, dtype: str) -> None:
        bench = Bench(run, sizes, getattr(torch, dtype))
        run.add(bench.rollout_row())
        run.add(bench.experience_row())
        run.add(bench.update_row())
        if options.reward:
            run.add(bench.reward_row())
        benches.append(bench)

    for case in options.case.split(","):
        sizes = replace(TINY_SIZES, ragged=CASES[case].ragged) if options.tiny else CASES[case]
        if options.micro_batch_tokens:
            sizes = replace(sizes, micro_batch_tokens=options.micro_batch_tokens)
        for dtype in options.dtype.split(","):
            run.measure(f"PPO step, {case} {dtype}", phases, sizes, dtype)
    for bench in benches[:1] if options.device == "cuda" else benches:
        run.measure(f"{BASELINE}, {bench.name}", bench.baseline_rollout)
    # on a CPU the profiler keeps every op of an update in memory
    for bench in benches if options.device == "cuda" or options.tiny else ():
        run.measure(f"profile, {bench.name}", bench.profile)
    run.failed |= any("DIFFER" in row.get("checked", "") for row in run.rows)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
