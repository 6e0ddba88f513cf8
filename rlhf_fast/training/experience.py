"""From sampled responses to PPO's experience: log-probabilities, values, scores, KL-penalised rewards, advantages.

The score of a response is the reward function's number, times score_scale, clipped to +-score_clip, then changed by the
rule for responses without an end token. It is added to the reward of the last response token. The KL penalty is taken
off the reward of every token; `ops.ppo_advantages` does both. values[:, j] is the value before token j is sampled.
Advantages are 0 outside `Experience.mask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.batches import Experience, Prompts, Responses
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.training.learner import to_floats
from rlhf_fast.training.micro_batches import micro_batches
from rlhf_fast.training.rewards import RewardFunction, score_responses
from rlhf_fast.training.rollout_gap import rollout_gap


@torch.no_grad()
def make_experience(
    responses: Responses,
    policy: Model,
    reference: Model,
    value: Model,
    reward: RewardFunction,
    cfg: PPOConfig,
    kl_coef: float | None = None,
    prompts: Prompts | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Return the experience of a batch of responses, and metrics of the batch.

    kl_coef: the KL controller's current coefficient; None = cfg.kl.coef. prompts: those of the responses, with the
    columns that reward functions ask for. The advantages are whitened here if cfg.whiten is "batch". With
    cfg.old_logprobs "rollout" the policy makes no forward pass here: the first step of the policy measures the gap
    between trainer and sampler (`ppo_policy_loss`, `measure_gap`).
    """
    kl_coef = cfg.kl.coef if kl_coef is None else kl_coef
    budget, temperature = cfg.optim.micro_batch_tokens, cfg.sampling.temperature
    ref_logprobs = _in_micro_batches(reference, responses, budget, lambda part: _logprobs(reference, part, temperature))
    values = _in_micro_batches(
        value, responses, budget, lambda part: value.values(part.tokens, part.prompt_lengths, part.lengths)
    )
    old_logprobs, gap = responses.logprobs, {}
    if cfg.old_logprobs == "recompute":
        old_logprobs = _in_micro_batches(policy, responses, budget, lambda part: _logprobs(policy, part, temperature))
        gap = to_floats(rollout_gap(old_logprobs[responses.mask], responses.logprobs[responses.mask]))
    scores, reward_stats, _ = score_responses(reward, responses, prompts)
    final, in_loss = final_scores(scores, responses.finished, cfg)
    mask = responses.mask & in_loss[:, None]
    bootstrap = _value_after_truncated(responses, value, budget) if cfg.bootstrap_truncated else None
    advantages, returns, moments, _ = ops.ppo_advantages(
        old_logprobs,
        ref_logprobs,
        values,
        final,
        mask,
        kl_coef,
        cfg.kl.estimator,
        cfg.gamma,
        cfg.lam,
        bootstrap=bootstrap,
    )
    experience = Experience(
        tokens=responses.tokens,
        prompt_lengths=responses.prompt_lengths,
        lengths=responses.lengths,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
        weights=token_weights(mask, cfg.loss_mean),
        scores=scores,
        finished=responses.finished,
        uids=responses.uids,
    )
    stats = _metrics(experience, responses, final, kl_coef, moments) | reward_stats | gap
    if cfg.whiten == "batch":
        experience = whiten(experience, cfg, moments)
    return experience, stats


def final_scores(scores: Tensor, finished: Tensor, cfg: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return the scores (B,) after scale, clip and cfg.missing_eos, and (B,) bool: rows that stay in the losses."""
    final = scores * cfg.score_scale
    if cfg.score_clip:
        final = final.clamp(-cfg.score_clip, cfg.score_clip)
    in_loss = torch.ones_like(finished)
    if cfg.missing_eos == "replace":
        final = torch.where(finished, final, cfg.missing_eos_value)
    elif cfg.missing_eos == "subtract":
        final = torch.where(finished, final, final - cfg.missing_eos_value)
    elif cfg.missing_eos == "drop":
        in_loss = finished
    return final, in_loss


def token_weights(mask: Tensor, loss_mean: str) -> Tensor:
    """Return (B, R) float32 weights: 1 for each valid token, or with "sequence" 1 / length, so that a row sums to 1."""
    weights = mask.float()
    return weights if loss_mean == "token" else weights / weights.sum(1, keepdim=True).clamp_min(1)


def whiten(experience: Experience, cfg: PPOConfig, moments: Tensor | None = None) -> Experience:
    """Scale the advantages to variance 1 over the valid tokens, and shift them to mean 0 unless cfg.whiten_shift_mean
    is off.

    The variance is over n, or over n - 1 with whiten_unbiased. With one valid token or none, advantages become 0 (or
    keep their mean). moments: the advantages' count, mean and sum of squared deviations come first in it, as
    ops.ppo_advantages returns them for this experience; None = computed here.
    """
    mask = experience.mask
    if moments is None:
        valid = experience.advantages[mask].double()
        count = float(len(valid))
        mean = valid.mean() if len(valid) else valid.new_zeros(())
        sum_squares = ((valid - mean) ** 2).sum()
    else:
        count = float(moments[0])
        mean, sum_squares = moments[1:3].double().cpu()
    scale = (sum_squares / max(count - cfg.whiten_unbiased, 1) + cfg.whiten_eps).rsqrt()
    shift = 0 if cfg.whiten_shift_mean else mean
    whitened = (experience.advantages.double() - mean) * scale + shift
    return experience._replace(advantages=torch.where(mask, whitened, 0).float())


def minibatches(experience: Experience, cfg: PPOConfig, seed: int) -> Iterator[Experience]:
    """Yield minibatches of cfg.minibatch rows for cfg.inner_epochs passes, each in a new order drawn by `seed`.

    Rows without a valid token are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = experience.mask.any(1).nonzero()[:, 0]
    for _ in range(cfg.inner_epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for index in order.split(cfg.minibatch):
            part = experience.take(index)
            yield whiten(part, cfg) if cfg.whiten == "minibatch" else part


def _logprobs(model: Model, part: Responses, temperature: float) -> Tensor:
    return model.logprobs(part.tokens, part.prompt_lengths, part.lengths, temperature, sampled_tokens_only=True)[0]


def _value_after_truncated(responses: Responses, value: Model, budget: int) -> Tensor:
    """Return (B,): the value after the last token of a response without end token, 0 for a finished one."""

    def last_values(part: Responses) -> Tensor:
        return value.last_scores(part.tokens, part.lengths, part.prompt_lengths)[:, None]

    after = _in_micro_batches(value, responses, budget, last_values, 1)
    return torch.where(responses.finished, 0, after[:, 0])


def _in_micro_batches(
    model: Model, responses: Responses, budget: int, function: Callable[[Responses], Tensor], width: int | None = None
) -> Tensor:
    """Apply `function`, a pass of `model`, to micro-batches of at most `budget` tokens and join its (b, r) results to
    (B, width) on the CPU. width: None = R, the longest response.
    """
    out = torch.zeros(len(responses.lengths), responses.mask.shape[1] if width is None else width)
    parts = micro_batches(responses, budget, packed=lambda: model.packs_rows)
    results = [(index, function(part)) for index, part in parts]
    for index, result in results:  # after all passes: a GPU is not waited for between them
        out[index, : result.shape[1]] = result.cpu()
    return out


def _metrics(
    experience: Experience,
    responses: Responses,
    final: Tensor,
    kl_coef: float,
    moments: Tensor,
) -> dict[str, float]:
    """Return averages over the whole batch, dropped rows included. KL and entropy are nats per response, or nats per
    token (`_token`)."""
    mask = responses.mask
    lengths = mask.sum(1).double()
    num_tokens = max(float(lengths.sum()), 1.0)
    kl = torch.where(mask, experience.old_logprobs - experience.ref_logprobs, 0).double().sum(1)
    error_m2, return_m2 = float(moments[2]), float(moments[4])
    stats: dict[str, float | Tensor] = {
        "objective/kl": kl.mean(),
        "objective/kl_token": kl.sum() / num_tokens,
        "objective/entropy": torch.where(mask, -responses.logprobs, 0).double().sum(1).mean(),
        "objective/entropy_token": responses.entropy[mask].double().sum() / num_tokens,
        "objective/non_score_reward": -kl_coef * kl.mean(),
        "objective/rlhf_reward": final.double().mean() - kl_coef * kl.mean(),
        "objective/scores": experience.scores.double().mean(),
        "objective/scores_std": experience.scores.double().std(correction=0),
        "objective/kl_coef": kl_coef,
        "tokens/length": lengths.mean(),
        "tokens/eos_rate": responses.finished.double().mean(),
        "val/explained_variance": 1 - error_m2 / return_m2 if return_m2 > 0 else 0.0,
    }
    return {name: float(number) for name, number in stats.items()}
