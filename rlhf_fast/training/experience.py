"""From sampled responses to what PPO learns from: log-probabilities, values, scores, advantages.

Order of the score: the reward's number, times score_scale, clipped to +-score_clip, then the rule for responses without
an end token. It is added to the reward of the last response token, whatever that token is. Values are those before each
token; all advantages stand on the tokens that count (`Experience.mask`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.batches import Experience, Responses, micro_batches
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model

RATIO_BAND = (0.9, 1.1)
"""Tokens whose probability in the trainer's forward over that in the rollout lies outside are counted."""


@torch.no_grad()
def collect(
    responses: Responses, policy: Model, reference: Model, value: Model,
    reward: Callable[[Responses], Tensor], cfg: PPOConfig,
    kl_coef: float | None = None, bootstrap: bool = False,
) -> tuple[Experience, dict[str, float]]:  # fmt: skip
    """Experience of a batch of responses, its advantages whitened if cfg.whiten is "batch", and metrics of the batch.

    `kl_coef` is the controller's at the moment (None: cfg.kl.coef). `bootstrap` gives a response without end token
    the value after its last token as its future instead of 0 (AReaL does; the paper and the others do not).
    """
    kl_coef = cfg.kl.coef if kl_coef is None else kl_coef
    budget, temperature = cfg.optim.micro_batch_tokens, cfg.sampling.temperature
    own = _by_parts(responses, budget, lambda r: _logprobs(policy, r, temperature))
    ref = _by_parts(responses, budget, lambda r: _logprobs(reference, r, temperature))
    values = _by_parts(responses, budget, lambda r: value.values(r.tokens, r.prompt_lengths, r.lengths))
    old = responses.logprobs if cfg.old_logprobs == "rollout" else own
    scores = reward(responses)
    final, kept = final_scores(scores, responses.finished, cfg)
    mask = responses.mask & kept[:, None]
    future = None
    if bootstrap:
        after = _by_parts(responses, budget, lambda r: value.last_scores(r.tokens, r.lengths)[:, None], width=1)[:, 0]
        future = torch.where(responses.finished, 0, after)
    advantages, returns, moments, _ = ops.ppo_advantages(
        old, ref, values, final, mask, kl_coef, cfg.kl.estimator, cfg.gamma, cfg.lam, bootstrap=future
    )
    experience = Experience(
        responses.tokens, responses.prompt_lengths, responses.lengths, mask, old, ref, values, advantages, returns,
        token_weights(mask, cfg.loss_mean), scores, responses.finished, responses.uids,
    )  # fmt: skip
    stats = _metrics(experience, responses, own, final, kl_coef, moments)
    return (whiten(experience, cfg, moments) if cfg.whiten == "batch" else experience), stats


def final_scores(scores: Tensor, finished: Tensor, cfg: PPOConfig) -> tuple[Tensor, Tensor]:
    """(B,) scores after scale, clip and the rule for missing end tokens, and (B,) bool: rows the losses keep."""
    final = scores * cfg.score_scale
    final = final.clamp(-cfg.score_clip, cfg.score_clip) if cfg.score_clip else final
    kept = torch.ones_like(finished)
    if cfg.missing_eos == "replace":
        final = torch.where(finished, final, cfg.missing_eos_value)
    elif cfg.missing_eos == "subtract":
        final = torch.where(finished, final, final - cfg.missing_eos_value)
    elif cfg.missing_eos == "drop":
        kept = finished
    return final, kept


def token_weights(mask: Tensor, loss_mean: str) -> Tensor:
    """(B, R) float32: "token", every token that counts weighs 1; "sequence", the tokens of a response together do."""
    weights = mask.float()
    return weights if loss_mean == "token" else weights / weights.sum(1, keepdim=True).clamp_min(1)


def whiten(experience: Experience, cfg: PPOConfig, moments: Tensor | None = None) -> Experience:
    """Advantages to mean 0 (unless whiten_shift_mean is off, then their mean stays) and variance 1 over the tokens that
    count; the variance is over n, or over n - 1 with whiten_unbiased. No token, or one: zeros (or that mean).

    `moments` are ops.ppo_advantages' of this very experience, if they are at hand: number, mean, sum of squared
    deviations of the advantages come first in it.
    """
    mask = experience.mask
    if moments is None:
        tokens = experience.advantages[mask].double()
        number, mean = len(tokens), tokens.mean() if len(tokens) else tokens.new_zeros(())
        squares = ((tokens - mean) ** 2).sum()
    else:
        number, mean, squares = moments[:3].double().tolist()
        mean, squares = torch.tensor([mean, squares], dtype=torch.float64)
    scale = (squares / max(number - cfg.whiten_unbiased, 1) + cfg.whiten_eps).rsqrt()
    whitened = (experience.advantages.double() - mean) * scale + (0 if cfg.whiten_shift_mean else mean)
    return experience._replace(advantages=torch.where(mask, whitened, 0).float())


def minibatches(experience: Experience, cfg: PPOConfig, seed: int) -> Iterator[Experience]:
    """cfg.inner_epochs passes over the rows that count, each in a new order drawn by `seed`, cfg.minibatch a time."""
    generator = torch.Generator().manual_seed(seed)
    rows = experience.mask.any(1).nonzero()[:, 0]
    for _ in range(cfg.inner_epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for index in order.split(cfg.minibatch):
            part = experience.take(index)
            yield whiten(part, cfg) if cfg.whiten == "minibatch" else part


def _logprobs(model: Model, part: Responses, temperature: float) -> Tensor:
    return model.logprobs(part.tokens, part.prompt_lengths, part.lengths, temperature)[0]


def _by_parts(responses: Responses, budget: int, function: Callable[[Responses], Tensor], width: int = 0) -> Tensor:
    """function's (b, r) over parts of at most `budget` tokens, as one (B, R) on the CPU; `width` is R unless that of
    the mask."""
    out = torch.zeros(len(responses.lengths), width or responses.mask.shape[1])
    for index, part in micro_batches(responses, budget):
        result = function(part).cpu()
        out[index, : result.shape[1]] = result
    return out


def _metrics(
    experience: Experience, responses: Responses, own: Tensor, final: Tensor, kl_coef: float, moments: Tensor
) -> dict[str, float]:
    """Averages over the whole batch, left-out rows too. KL and entropy: nats per response, or per token (`_token`)."""
    mask, sizes = responses.mask, responses.mask.sum(1).double()
    gap = (own - responses.logprobs)[mask].double()
    ratio = gap.exp()
    kl = torch.where(mask, experience.old_logprobs - experience.ref_logprobs, 0).double().sum(1)
    tokens = max(float(sizes.sum()), 1.0)
    return_m2 = float(moments[4])
    stats = {
        "objective/kl": kl.mean(),
        "objective/kl_token": kl.sum() / tokens,
        "objective/entropy": torch.where(mask, -responses.logprobs, 0).double().sum(1).mean(),
        "objective/entropy_token": responses.entropy[mask].double().sum() / tokens,
        "objective/non_score_reward": -kl_coef * kl.mean(),
        "objective/rlhf_reward": final.double().mean() - kl_coef * kl.mean(),
        "objective/scores": experience.scores.double().mean(),
        "objective/scores_std": experience.scores.double().std(correction=0),
        "objective/kl_coef": kl_coef,
        "tokens/length": sizes.mean(),
        "tokens/eos_rate": responses.finished.double().mean(),
        "val/explained_variance": 1 - float(moments[2]) / return_m2 if return_m2 > 0 else 0.0,
        "rollout/gap_mean": gap.abs().mean() if len(gap) else 0.0,
        "rollout/gap_p99": gap.abs().kthvalue(-(-len(gap) * 99 // 100)).values if len(gap) else 0.0,
        "rollout/ratio_outside": ((ratio < RATIO_BAND[0]) | (ratio > RATIO_BAND[1])).sum() / tokens,
    }
    return {name: float(number) for name, number in stats.items()}
