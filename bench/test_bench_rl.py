"""gae, ppo_advantages, ppo_loss and ranking_loss beside the loops of torch calls that trainers run today."""

import itertools

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.bench.plain_torch import advantages_loop, eager_losses, gae_loop


def pairwise_losses(scores, sizes):
    """Loop over prompts, every pair of each by torch.combinations, as Open-Assistant's reward model did."""
    losses = []
    for group in scores.split(sizes):
        pairs = torch.combinations(torch.arange(len(group)))
        losses.append(-torch.nn.functional.logsigmoid(group[pairs[:, 0]] - group[pairs[:, 1]]).mean())
    return torch.stack(losses).mean()


def responses(B, T):
    lengths = torch.randint(T // 2, T + 1, (B, 1))
    return torch.arange(T) < lengths


SIZES = [(64, 128), (64, 1024), (512, 1024)]


@pytest.mark.parametrize("B, T", SIZES)
def test_gae(compare, B, T):
    rewards, values = torch.randn(2, B, T)
    mask = responses(B, T)
    as_float = mask.float()

    def check():
        ours, loop = ops.gae(rewards, values, mask), gae_loop(rewards, values, as_float, 1.0, 0.95)
        for a, b in zip(ours, loop, strict=True):
            torch.testing.assert_close(a[mask], b[mask], atol=5e-5, rtol=1e-4)

    compare(
        f"gae [{B}, {T}]",
        lambda: ops.gae(rewards, values, mask),
        {"loop over tokens": lambda: gae_loop(rewards, values, as_float, 1.0, 0.95)},
        check=check,
        bytes=17 * B * T,
    )


@pytest.mark.parametrize("B, T", SIZES)
def test_ppo_advantages(compare, B, T):
    logprobs, values = -torch.rand(B, T), torch.randn(B, T)
    ref_logprobs, scores, mask = logprobs + 0.1 * torch.randn(B, T), torch.randn(B), responses(B, T)
    as_float = mask.float()

    def ours():
        return ops.ppo_advantages(logprobs, ref_logprobs, values, scores, mask)

    def loop():
        return advantages_loop(logprobs, ref_logprobs, values, scores, as_float, 0.02, 1.0, 0.95)

    def check():
        (advantages, returns, stats, _), (*theirs, mean, variance) = ours(), loop()
        for a, b in zip((advantages, returns), theirs, strict=True):
            torch.testing.assert_close(a[mask], b[mask], atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(
            stats[1:3] / torch.stack([stats[0] / stats[0], stats[0]]), torch.stack([mean, variance])
        )

    target = 250 if (B, T) == (64, 1024) else None
    compare(f"ppo_advantages [{B}, {T}]", ours, {"loop over tokens": (loop, target)}, check=check, bytes=21 * B * T)


@pytest.mark.parametrize("B, T", SIZES)
def test_ppo_loss(compare, B, T):
    mask = responses(B, T)
    weights = mask / mask.sum()
    old, advantages, old_values, returns = -torch.rand(B, T), *torch.randn(3, B, T)
    logprobs = (old + 0.1 * torch.randn(B, T)).requires_grad_()
    values = (old_values + 0.2 * torch.randn(B, T)).requires_grad_()
    as_float = mask.float()
    fixed = old_values, returns

    def ours():
        policy, value, _ = ops.ppo_loss(logprobs, old, advantages, weights, values, *fixed)
        return torch.autograd.grad(policy + value, [logprobs, values])

    def eager():
        policy, value, _ = eager_losses(logprobs, old, advantages, as_float, values, *fixed)
        return torch.autograd.grad(policy + value, [logprobs, values])

    def check():
        for a, b in zip(ours(), eager(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-4)

    target = 15 if (B, T) == (64, 1024) else None
    compare(
        f"ppo_loss forward+backward [{B}, {T}]",
        ours,
        {"eager torch": (eager, target)},
        check=check,
        bytes=(28 + 8 + 16) * B * T,  # inputs, gradients, gradients times the upstream gradient
    )


@pytest.mark.parametrize("sizes", [[9] * 64, [4, 9, 6, 2] * 16], ids=["64x9", "ragged"])
def test_ranking_loss(compare, sizes):
    scores = torch.randn(sum(sizes), requires_grad=True)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    ranks = torch.cat([torch.arange(k) for k in sizes])

    def ours():
        return torch.autograd.grad(ops.ranking_loss(scores, offsets, ranks)[0], scores)[0]

    def loop():
        return torch.autograd.grad(pairwise_losses(scores, sizes), scores)[0]

    compare(
        f"ranking_loss forward+backward {len(sizes)} prompts, {sum(sizes)} responses",
        ours,
        {"loop over prompts": loop},
        check=lambda: torch.testing.assert_close(ours(), loop(), atol=1e-7, rtol=1e-4),
        flops=60 * sum(k * (k - 1) // 2 for k in sizes),
    )
