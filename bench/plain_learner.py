"""A PPO step in plain torch and transformers, as TRL and cleanrl write it, for ppo_step.py to measure ours beside.

The logits of whole rows are stored, cut to the response and made float32; log_softmax and gather follow. All prompts
of a batch have one length, and all responses another. Adam and the micro-batches are our Learner's, so that the
difference is in the passes and the losses.
"""

from functools import partial

import torch
from torch import Tensor

from rlhf_fast.batches import Experience, Responses, micro_batches
from rlhf_fast.bench.plain_torch import advantages_loop, policy_loss, value_loss
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.stages.ppo import State
from rlhf_fast.training.experience import minibatches, token_weights
from rlhf_fast.training.rewards import RewardFunction


def response_span(batch: Responses | Experience) -> slice:
    """Return the positions that predict the response."""
    first, last = int(batch.prompt_lengths[0]), int(batch.lengths[0])
    if (batch.prompt_lengths != first).any() or (batch.lengths != last).any():
        raise ValueError("plain_learner: all prompts must have one length, and all responses")
    return slice(first - 1, last - 1)


def response_logits(model: Model, batch: Responses | Experience, temperature: float) -> Tensor:
    """Return float32 logits (b, R, V)."""
    logits = model.module(input_ids=batch.tokens.to(model.device), use_cache=False).logits
    return logits[:, response_span(batch)].float() / temperature


def response_logprobs(logits: Tensor, batch: Responses | Experience) -> Tensor:
    """Return the log-probability (b, R) of each response token."""
    span = response_span(batch)
    targets = batch.tokens[:, span.start + 1 : span.stop + 1].to(logits.device)
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def response_values(model: Model, batch: Responses | Experience) -> Tensor:
    """Return the value (b, R) before each response token."""
    hidden = model.decoder(input_ids=batch.tokens.to(model.device), use_cache=False).last_hidden_state
    return model.base.score(hidden)[:, response_span(batch), 0].float()


@torch.no_grad()
def make_experience(
    responses: Responses, reference: Model, value: Model, reward: RewardFunction, cfg: PPOConfig
) -> Experience:
    """Return what training/experience.py's function of this name returns, with whitened advantages. The policy makes no
    pass here either: the old log-probabilities are the sampler's."""
    temperature, shape = cfg.sampling.temperature, responses.mask.shape
    ref_logprobs, values = torch.zeros(2, *shape, device=value.device)
    for index, part in micro_batches(responses, cfg.optim.micro_batch_tokens):
        index = index.to(value.device)
        ref_logprobs[index] = response_logprobs(response_logits(reference, part, temperature), part)
        values[index] = response_values(value, part)
    old_logprobs, mask = responses.logprobs.to(value.device), responses.mask.to(value.device)
    scores = reward(responses)
    advantages, returns, mean, variance = advantages_loop(
        old_logprobs, ref_logprobs, values, scores.to(value.device), mask.float(), cfg.kl.coef, cfg.gamma, cfg.lam
    )
    advantages = torch.where(mask, (advantages - mean) * (variance + cfg.whiten_eps).rsqrt(), 0)
    return Experience(
        tokens=responses.tokens,
        prompt_lengths=responses.prompt_lengths,
        lengths=responses.lengths,
        mask=responses.mask,
        old_logprobs=responses.logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=advantages,
        returns=returns,
        weights=token_weights(responses.mask, cfg.loss_mean),
        scores=scores,
        finished=responses.finished,
        uids=responses.uids,
    )


def ppo_policy_loss(model: Model, batch: Experience, num_items: float, *, temperature: float):
    """Return PPO's clipped loss, and the metrics that TRL logs, the entropy included."""
    logits = response_logits(model, batch, temperature)
    fields = (x.to(logits.device) for x in (batch.old_logprobs, batch.advantages, batch.mask.float()))
    loss, (clipped, kl, ratio) = policy_loss(response_logprobs(logits, batch), *fields, num_items)
    with torch.no_grad():
        entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        entropy = (entropy * batch.mask.to(logits.device)).sum() / num_items
    return loss, {
        "loss/policy_avg": loss, "policy/clipfrac_avg": clipped, "policy/kl": kl, "val/ratio": ratio,
        "policy/entropy_avg": entropy,
    }  # fmt: skip


def ppo_value_loss(model: Model, batch: Experience, num_items: float):
    """Return the clipped value loss and its metrics."""
    values = response_values(model, batch)
    fields = (x.to(values.device) for x in (batch.values, batch.returns, batch.mask.float()))
    loss, (clipped, mean, error, _) = value_loss(values, *fields, num_items)
    return loss, {"loss/value_avg": loss, "val/clipfrac_avg": clipped, "val/mean": mean, "val/error": error}


def ppo_update(state: State, experience: Experience, cfg: PPOConfig, step: int) -> dict[str, float]:
    """Take a step of both optimizers for each minibatch, those of stages/ppo.py; return the last one's metrics."""
    loss, stats = partial(ppo_policy_loss, temperature=cfg.sampling.temperature), {}
    for minibatch in minibatches(experience, cfg, seed=(cfg.seed * 1_000_003 + step) % 2**63):
        value = state.value_learner.step([(ppo_value_loss, minibatch, cfg.value_coef)])
        stats = {f"value/{name}" if name in ("loss", "grad_norm", "lr") else name: x for name, x in value.items()}
        stats |= state.policy_learner.step([(loss, minibatch, 1.0)])
    return stats
