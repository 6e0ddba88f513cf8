"""PPO with a KL penalty in one plain loop: the ops of rlhf_fast, a policy of your own, no trainer.

The policy is a small GRU over 16 tokens. The reward is the share of a response's tokens that are even numbers, so the
score rises from 0.5 towards 1, while the KL penalty holds the policy near its start.

    python examples/ppo_loop.py
"""

import copy

import torch
from torch import Tensor, nn

from rlhf_fast import ops

VOCAB, HIDDEN, BATCH, LENGTH = 16, 64, 128, 12
START = 0  # the token before each response
KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95


class Policy(nn.Module):
    """A recurrent language model with a value head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.value = nn.Linear(HIDDEN, 1)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the states (B, T, D) that predict each of `tokens` (B, T), the first from START."""
        inputs = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)
        return self.gru(self.embedding(inputs))[0]

    @torch.no_grad()
    def sample(self, seed: int) -> Tensor:
        """Sample BATCH responses of LENGTH tokens. The noise depends on (seed, row, step) alone."""
        tokens, state = torch.full((BATCH, 1), START), None
        rows, out = torch.arange(BATCH), []
        for step in range(LENGTH):
            hidden, state = self.gru(self.embedding(tokens), state)
            sampled, *_ = ops.linear_sample_tokens(
                hidden[:, 0], self.head.weight, seed=seed, row_ids=rows, steps=torch.full((BATCH,), step)
            )
            tokens = sampled[:, None]
            out.append(tokens)
        return torch.cat(out, dim=1)


def logprobs(policy: Policy, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability (B, T) of each token; the logits are never stored."""
    return ops.linear_logprobs(hidden.flatten(0, 1), policy.head.weight, tokens.flatten())[0].view_as(tokens)


def reward(tokens: Tensor) -> Tensor:
    """Return the share of even tokens, (B,)."""
    return (tokens % 2 == 0).float().mean(1)


def main(steps: int = 40, seed: int = 0) -> list[float]:
    """Train for `steps` batches of 4 epochs each; return the mean score of each batch."""
    torch.manual_seed(seed)
    policy = Policy()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    weights = mask.float() / mask.sum()  # the losses are weighted sums: these make them means over tokens
    history = []
    for step in range(steps):
        # generate
        tokens = policy.sample(seed=seed * 1_000_003 + step)
        # score
        with torch.no_grad():
            hidden = policy.hidden(tokens)
            old_logprobs, old_values = logprobs(policy, hidden, tokens), policy.value(hidden)[..., 0]
            ref_logprobs = logprobs(reference, reference.hidden(tokens), tokens)
        scores = reward(tokens)
        advantages, returns, stats, kl = ops.ppo_advantages(
            old_logprobs, ref_logprobs, old_values, scores, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM
        )
        count, mean, m2, *_ = stats
        # learn
        for _ in range(4):
            hidden = policy.hidden(tokens)
            policy_loss, value_loss, _ = ops.ppo_loss(
                logprobs(policy, hidden, tokens), old_logprobs, advantages, weights,
                policy.value(hidden)[..., 0], old_values, returns,
                advantage_shift=mean, advantage_scale=(m2 / count + 1e-8).rsqrt(),  # whitened inside the op
            )  # fmt: skip
            optimizer.zero_grad()
            (policy_loss + 0.1 * value_loss).backward()
            optimizer.step()
        history.append(float(scores.mean()))
        if step % 10 == 9:
            print(f"step {step + 1:3}  score {history[-1]:.3f}  kl {kl.mean():.3f} nats a response")
    return history


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a model is slower with more
    main()
