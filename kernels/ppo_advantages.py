"""PPO's advantages and returns from log-probabilities, values and scores, in one pass over memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels._gae import chunking, discounts, gae_reference, made_discounts, row_discounts
from rlhf_fast.kernels._launch import (
    data_ptrs,
    ptrs_and_codes,
    refuse_float64,
    stream_or_threads,
    ticket,
    ticket_ptr,
)
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._ppo import KL_ESTIMATORS, kl_estimate
from rlhf_fast.kernels._tensors import (
    as_bool,
    as_float,
    contiguous_float32,
    contiguous_floats,
    detached,
    empty_float32,
    promote_to_float64,
    upcast,
    upcast_dtype,
)

STATS = ("count", "mean", "m2", "return_mean", "return_m2")


def _fake(logprobs, *rest):
    out = torch.empty(logprobs.shape, dtype=upcast_dtype(logprobs), device=logprobs.device)
    return out, torch.empty_like(out), out.new_empty(len(STATS)), out.new_empty(out.shape[0])


@op(fake=_fake, rows=("gamma", "lam"))
def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float = 0.02,
    kl_estimator: str = "k1",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    score_clip: float = 0.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantages (B, T), returns (B, T), statistics (5,) and kl (B,), float32, of B sampled responses.

        d_t = logprobs_t - ref_logprobs_t
        kl_t = d_t ("k1"), d_t^2 / 2 ("k2"), exp(min(-d_t, 20)) - 1 + d_t ("k3") or |d_t| ("abs")
        r_t = -kl_coef kl_t, plus clamp(score, -score_clip, score_clip) at the row's last token inside the mask

    This is the reward of InstructGPT (arXiv 2203.02155, section 3.5); advantages and returns are `gae` of it. Packed
    responses are padded to (B, T), or have these rewards built by the caller for `gae_packed`.

        logprobs, ref_logprobs (B, T): nats, of the policy and of the reference model
        values (B, T): V before each token
        scores (B,): rewards of whole responses; score_clip 0 does not clip them
        mask (B, T), bool or integers (nonzero is inside): a token outside it is skipped, whatever is stored there, and
            its outputs are 0; a row without a token inside counts for nothing, its score included
        gamma, lam: numbers, or tensors (B,) with one for each row, each independently; a tensor () is a number
        bootstrap (B,): V after the last token; None means 0
        kl: sum of kl_t over each row, in nats per sequence, the unit of KL targets

    No gradient: all outputs are targets. Statistics, named in `ppo_advantages.stats`, are 0 where no token is inside
    the mask:

        count: tokens inside the mask
        mean, m2: mean of the advantages, and sum of their squared distances from it
        return_mean, return_m2: the same of the returns

    The whitened advantage is (A - mean) / sqrt(m2 / count), or with count - 1. The values' explained variance is
    1 - m2 / return_m2. Two parts of a batch merge by Chan's rule:
    m2 = m2_a + m2_b + (mean_a - mean_b)^2 n_a n_b / (n_a + n_b).

    Raises ValueError where shapes differ, mask is floating point, another tensor is of integers, gamma or lam is not
    within [0, 1] (of a tensor's numbers only on the CPU), or kl_estimator is another word.
    """
    logprobs, ref_logprobs, values, scores = map(upcast, (logprobs, ref_logprobs, values, scores))
    kl = torch.where(mask, kl_estimate(logprobs - ref_logprobs, kl_estimator), 0)
    scores = scores.clamp(-score_clip, score_clip) if score_clip > 0 else scores
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (tokens_from_here == 1)
    rewards = torch.where(is_last, scores[:, None] - kl_coef * kl, -kl_coef * kl)
    advantages, returns = gae_reference("ppo_advantages", rewards, values, mask, gamma, lam, bootstrap)
    count = mask.sum().to(rewards.dtype)
    stats = torch.stack([count, *_mean_and_m2(advantages, mask, count), *_mean_and_m2(returns, mask, count)])
    return advantages, returns, stats, kl.sum(1)


def _mean_and_m2(x: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.where(mask, x, 0).sum() / count.clamp_min(1)
    return mean, torch.where(mask, (x - mean) ** 2, 0).sum()


ppo_advantages.stats = STATS


@ppo_advantages.normalize
def _(logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap):
    shapes = [list(x.shape) for x in (logprobs, ref_logprobs, values, mask)]
    if logprobs.dim() != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"ppo_advantages: logprobs, ref_logprobs, values and mask must have one shape (B, T), got {shapes}"
        )
    for name, x in {"scores": scores, "bootstrap": bootstrap}.items():
        if x is not None and x.shape != logprobs.shape[:1]:
            raise ValueError(f"ppo_advantages: {name} must have shape ({logprobs.shape[0]},), got {list(x.shape)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"ppo_advantages: kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {kl_estimator!r}"
        )
    gamma, lam = discounts("ppo_advantages", gamma, lam, logprobs)
    tensors = detached((logprobs, ref_logprobs, values, scores, bootstrap))
    *tensors, bootstrap, gamma, lam = promote_to_float64(*tensors, gamma, lam)
    options = as_float(kl_coef), kl_estimator, gamma, lam, as_float(score_clip)
    return *tensors, as_bool("ppo_advantages", mask), *options, bootstrap


def _outputs(logprobs):
    B, T = logprobs.shape
    return tuple(empty_float32(logprobs, *shape) for shape in ((B, T), (B, T), (len(STATS),), (B,)))


@ppo_advantages.compiled(devices=("cpu",))
def _(
    kernels, logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):  # fmt: skip
    refuse_float64(logprobs)
    gamma, lam, *rows = row_discounts("ppo_advantages", gamma, lam)
    *inputs, bootstrap = contiguous_float32(logprobs, ref_logprobs, values, scores, bootstrap)
    mask = mask.contiguous()
    B, T = logprobs.shape
    outputs = _outputs(logprobs)
    row_moments = torch.empty(B, 6, dtype=torch.float64, device=logprobs.device)
    kernels.ppo_advantages(
        *data_ptrs(*inputs, mask, bootstrap, *rows, *outputs, row_moments), B, T, kl_coef,
        KL_ESTIMATORS.index(kl_estimator), gamma, lam, score_clip, stream_or_threads(logprobs),
    )  # fmt: skip
    return outputs


MAX_BLOCKS = 2048  # of csrc/cuda's launch; the last one of them merges their moments


# Before Triton: on an H100 at 8192 x 2048 in float32 148 us on the device, Triton 174.
@ppo_advantages.compiled(devices=("cuda",))
def _(
    kernels, logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):  # fmt: skip
    refuse_float64(logprobs)
    gamma, lam, *rows = row_discounts("ppo_advantages", gamma, lam)
    *inputs, bootstrap = contiguous_floats(logprobs, ref_logprobs, values, scores, bootstrap)
    mask = mask.contiguous()
    B, T = logprobs.shape
    outputs = _outputs(logprobs)
    block_moments = torch.empty(6, MAX_BLOCKS, dtype=torch.float64, device=logprobs.device)
    chunk, chunk_maps = chunking(B, B * T, T, logprobs)
    numbers, index = ticket(logprobs)
    kernels.ppo_advantages(
        *ptrs_and_codes(kernels, *inputs), *data_ptrs(mask, *rows), *ptrs_and_codes(kernels, bootstrap),
        *data_ptrs(*outputs, block_moments), MAX_BLOCKS, ticket_ptr(numbers, index), *data_ptrs(chunk_maps), chunk,
        B, T, kl_coef, KL_ESTIMATORS.index(kl_estimator), gamma, lam, score_clip,
        stream_or_threads(logprobs),
    )  # fmt: skip
    return outputs


@ppo_advantages.inputs(
    small_sizes=[
        {"B": 1, "T": 1},
        {"B": 3, "T": 17, "estimator": "k2", "clip": 0.5},
        {"B": 17, "T": 33, "bootstrap": True, "estimator": "k3"},
        {"B": 9, "T": 5, "gaps": False, "estimator": "abs"},
        {"B": 2, "T": 600, "gaps": False},
        {"B": 3, "T": 521},
        {"B": 17, "T": 33, "per_row": "lam"},
        {"B": 2, "T": 600, "per_row": "gamma", "bootstrap": True, "estimator": "k3"},
        {"B": 3, "T": 521, "per_row": "gamma and lam", "gaps": False},
        {"B": 0, "T": 4},
        {"B": 4, "T": 0},
    ],
    large_sizes=[
        {"B": 64, "T": 128},
        {"B": 64, "T": 1024},
        {"B": 512, "T": 1024},
        {"B": 512, "T": 1001},
        {"B": 4, "T": 16384},
    ],
)
def _(B, T, device, dtype, gaps=True, bootstrap=False, estimator="k1", clip=0.0, per_row=""):
    values = torch.randn(B, T, device=device, dtype=dtype)
    logprobs = -torch.rand(B, T, device=device, dtype=dtype) * 3
    ref_logprobs = logprobs + 0.2 * torch.randn(B, T, device=device, dtype=dtype)
    scores = torch.randn(B, device=device, dtype=dtype)
    lengths = torch.randint(0, T + 1, (B, 1), device=device)
    mask = torch.rand(B, T, device=device) > 0.2 if gaps else torch.arange(T, device=device) < lengths
    bootstrap_values = torch.randn(B, device=device, dtype=dtype) if bootstrap else None
    gamma, lam = made_discounts(per_row, B, device, dtype)
    return logprobs, ref_logprobs, values, scores, mask, 0.05, estimator, gamma, lam, clip, bootstrap_values
