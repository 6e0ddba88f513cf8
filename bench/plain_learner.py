"""A PPO step in plain torch and transformers, as TRL and cleanrl write it, for ppo_step.py to measure ours beside.

The logits of whole rows are stored, cut to the response and made float32; log_softmax and gather follow. Prompts are
padded on the left and responses on the right. Adam, its masters and the micro-batches are our Learner's, of torch's
fused kernel, so that the difference is in the passes and the losses.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.batches import Comparisons, Experience, Responses
from rlhf_fast.bench.plain_torch import advantages_loop, policy_loss, value_loss
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.stages.ppo import State, average_stats
from rlhf_fast.training.experience import minibatches, token_weights
from rlhf_fast.training.micro_batches import micro_batches
from rlhf_fast.training.rewards import RewardFunction


def left_padded(batch: Responses | Experience, device: torch.device) -> tuple[dict[str, Tensor], slice]:
    """Return the model's inputs (b, P + R), with each prompt at the end of its P columns and each response at the start
    of its R, and the positions that predict the responses. Rows of one shape need no mask."""
    width, size = int(batch.prompt_lengths.max()), int((batch.lengths - batch.prompt_lengths).max())
    shift = width - batch.prompt_lengths[:, None]
    columns = torch.arange(width + size) - shift
    real = (columns >= 0) & (columns < batch.lengths[:, None])
    tokens = batch.tokens.gather(1, columns.clamp(0, batch.tokens.shape[1] - 1)) * real
    inputs = {"input_ids": tokens.to(device)}
    if not real.all():
        inputs |= {"attention_mask": real.long().to(device), "position_ids": columns.clamp_min(0).to(device)}
    return inputs, slice(width - 1, width + size - 1)


def response_logits(model: Model, batch: Responses | Experience, temperature: float) -> Tensor:
    """Return float32 logits (b, R, V)."""
    inputs, span = left_padded(batch, model.device)
    return model.module(**inputs, use_cache=False).logits[:, span].float() / temperature


def response_logprobs(logits: Tensor, batch: Responses | Experience) -> Tensor:
    """Return the log-probability (b, R) of each response token, of any other where there is none."""
    inputs, span = left_padded(batch, logits.device)
    targets = inputs["input_ids"][:, span.start + 1 :]
    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def response_values(model: Model, batch: Responses | Experience) -> Tensor:
    """Return the value (b, R) before each response token."""
    inputs, span = left_padded(batch, model.device)
    hidden = model.decoder(**inputs, use_cache=False).last_hidden_state
    return model.base.score(hidden)[:, span, 0].float()


def last_scores(model: Model, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the scalar head's output (b,) at the last token of each row, padded on the right."""
    hidden = model.decoder(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    return model.base.score(hidden)[torch.arange(len(tokens)), lengths - 1, 0].float()


def reward_loss(model: Model, batch: Comparisons, num_items: float):
    """Return the mean of -log sigmoid(better - worse) over a prompt's pairs, then over prompts."""
    scores, total = last_scores(model, batch.tokens, batch.lengths), 0.0
    for first, last in pairwise(batch.group_offsets.tolist()):
        better, worse = (batch.ranks[first:last, None] < batch.ranks[None, first:last]).nonzero(as_tuple=True)
        if len(better):
            total = total - logsigmoid(scores[first:last][better] - scores[first:last][worse]).mean() / num_items
    return total, {"loss/reward": total}


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
        found = response_logprobs(response_logits(reference, part, temperature), part)
        ref_logprobs[index, : found.shape[1]] = found
        found = response_values(value, part)
        values[index, : found.shape[1]] = found
    ref_logprobs, values = (torch.where(responses.mask.to(x.device), x, 0) for x in (ref_logprobs, values))
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
    """Take a step of both optimizers for each minibatch, those of stages/ppo.py; return the metrics' averages."""
    loss, rows = partial(ppo_policy_loss, temperature=cfg.sampling.temperature), []
    for minibatch in minibatches(experience, cfg, seed=(cfg.seed * 1_000_003 + step) % 2**63):
        value = state.value_learner.step([(ppo_value_loss, minibatch, cfg.value_coef)])
        stats = {f"value/{name}" if name in ("loss", "grad_norm", "lr") else name: x for name, x in value.items()}
        rows.append(stats | state.policy_learner.step([(loss, minibatch, 1.0)]))
    return average_stats(rows)
