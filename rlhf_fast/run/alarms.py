"""Alarms: sentences about metrics that tend to end a run badly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

# The first minibatch of a PPO batch is trained on by the very weights that sampled it, so its ratio differs from 1 only
# by rounding. A larger gap means that sampling and training see different models (dropout, a stale cache, another
# temperature). The same holds for the share of tokens whose probability differs by more than a tenth between the
# trainer's forward pass on the same weights and the sampler: it is 0 in float32.
MAX_RATIO_DEVIATION = 0.02
MAX_SHARE_OUTSIDE = 0.01
MAX_KL_PER_TOKEN = 1.0
MIN_EOS_RATE = 0.01
MAX_LENGTH_GROWTH = 4.0
MIN_ENTROPY_SHARE = 0.05


class Alarms:
    """Checks each row of metrics and reports a fault once until it clears.

    Length and entropy are compared with the first row that has them.
    """

    def __init__(self) -> None:
        self.baseline: dict[str, float] = {}
        self.active: set[str] = set()

    def __call__(self, row: Mapping[str, object]) -> list[str]:
        """Return one sentence for each fault that was not there in the row before."""
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        faults = dict(self._faults(numbers))
        new = [text for name, text in faults.items() if name not in self.active]
        self.active = set(faults)
        return new

    def _faults(self, row: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Yield (name of the fault, sentence)."""
        for name, value in row.items():
            if not math.isfinite(value):
                yield name, f"{name} is {value}"
        for name in ("tokens/length", "objective/entropy_token"):
            if name in row:
                self.baseline.setdefault(name, row[name])
        ratio = row.get("val/ratio_first", 1.0)
        if abs(ratio - 1) > MAX_RATIO_DEVIATION:
            yield "ratio", f"the first minibatch's ratio is {ratio:.4f}, not 1: sampling and training disagree"
        outside = row.get("rollout/ratio_outside", 0.0)
        if outside > MAX_SHARE_OUTSIDE:
            yield "gap", f"{outside:.1%} of the tokens have another probability in training than they were sampled with"
        kl = row.get("objective/kl_token", 0.0)
        if abs(kl) > MAX_KL_PER_TOKEN:
            yield "kl", f"KL runs away: {kl:.2f} nats a token"
        eos_rate = row.get("tokens/eos_rate", 1.0)
        if eos_rate < MIN_EOS_RATE:
            advice = "raise sampling.max_new_tokens, train the SFT model longer, or set missing_eos"
            yield "eos", f"only {eos_rate:.1%} of the responses end by themselves; {advice}"
        length, first_length = self._with_baseline(row, "tokens/length")
        if length > MAX_LENGTH_GROWTH * first_length:
            yield "length", f"responses have grown from {first_length:.0f} to {length:.0f} tokens"
        entropy, first_entropy = self._with_baseline(row, "objective/entropy_token")
        if entropy < MIN_ENTROPY_SHARE * first_entropy:
            yield "entropy", f"entropy fell from {first_entropy:.3f} to {entropy:.3f} nats a token"

    def _with_baseline(self, row: dict[str, float], name: str) -> tuple[float, float]:
        """Return a metric now and at first; NaN, with which every comparison is false, if it was never measured."""
        return row.get(name, math.nan), self.baseline.get(name, math.nan)
