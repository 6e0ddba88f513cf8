"""From log-probabilities, values and scores to what PPO learns from, in one visit of memory."""

import torch
from torch import Tensor

from rlhf_fast.kernels._gae import pieces, scan
from rlhf_fast.kernels._launch import Unsupported, data_ptrs, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._ppo import KL_ESTIMATORS, kl_estimate
from rlhf_fast.kernels._tensors import promote_to_float64, upcast

STATS = ("count", "mean", "m2", "return_mean", "return_m2")


def _fake(logprobs, ref_logprobs, values, scores, mask, *rest):
    out = torch.empty(logprobs.shape, dtype=upcast(logprobs).dtype, device=logprobs.device)
    return out, torch.empty_like(out), out.new_empty(len(STATS)), out.new_empty(out.shape[0])


def moments(x: Tensor, mask: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and sum of squared distances from it, over the tokens inside the mask."""
    mean = torch.where(mask, x, 0).sum() / count.clamp_min(1)
    return mean, torch.where(mask, (x - mean) ** 2, 0).sum()


@op(fake=_fake)
def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float = 0.02,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    score_clip: float = 0.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages (B, T), returns (B, T), stats (5,) and kl (B,), all float32, of B sampled responses.

    The reward of a token is -kl_coef * kl_t, and at the last token inside `mask` (B, T) bool also the row's score,
    clipped to [-score_clip, score_clip] where score_clip > 0 (InstructGPT, arXiv 2203.02155, section 3.5). Then `gae`:
    tokens outside the mask do not exist, whatever is stored there, and get 0; `bootstrap` (B,) is V after the last
    token. A row without a token gives nothing, its score included.

    kl_t in nats, with d = logprobs - ref_logprobs: "k1" d, "k2" d^2 / 2, "k3" e^-d - 1 + d (the exponent at most 20),
    "abs" |d|. `kl` is its sum over each row: the unit of KL targets, nats per sequence.

    stats, named in `ppo_advantages.stats`: count of tokens, mean and m2 (sum of squared distances from the mean) of the
    advantages, and mean and m2 of the returns; all 0 where there is no token. The whitened advantage is
    (A - mean) / sqrt(m2 / count), or over count - 1; 1 - m2 / return_m2 is the variance that the values explain.
    Two parts of a batch join by Chan's rule: m2 = m2_a + m2_b + (mean_a - mean_b)^2 n_a n_b / (n_a + n_b).
    ValueError where shapes differ, or kl_estimator is another word. No gradient: all of these are targets.
    """
    logprobs, ref_logprobs, values, scores = upcast(logprobs), upcast(ref_logprobs), upcast(values), upcast(scores)
    kl = torch.where(
        mask, kl_estimate(logprobs - ref_logprobs, kl_estimator), 0
    )  # no clamp: k3's exponent is at most 20
    scores = scores.clamp(-score_clip, score_clip) if score_clip > 0 else scores
    later = mask.flip(1).cumsum(1).flip(1)
    is_last = mask & (later == 1)
    rewards = torch.where(is_last, scores[:, None] - kl_coef * kl, -kl_coef * kl)
    advantages, returns = scan(rewards, values, mask, gamma, lam, bootstrap)
    count = mask.sum().to(rewards.dtype)
    stats = torch.stack([count, *moments(advantages, mask, count), *moments(returns, mask, count)])
    return advantages, returns, stats, kl.sum(1)


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
    tensors = (x if x is None else x.detach() for x in (logprobs, ref_logprobs, values, scores, bootstrap))
    *tensors, bootstrap = promote_to_float64(*tensors)
    numbers = float(kl_coef), kl_estimator, float(gamma), float(lam), float(score_clip)
    return *tensors, mask.bool(), *numbers, bootstrap


def _dense(logprobs, ref_logprobs, values, scores, mask, bootstrap):
    """As a compiled kernel reads them, then its outputs."""
    if logprobs.dtype == torch.float64:
        raise Unsupported("float64 has no compiled kernel")
    given = [x.float().contiguous() for x in (logprobs, ref_logprobs, values, scores)]
    bootstrap = bootstrap if bootstrap is None else bootstrap.float().contiguous()
    B, T = logprobs.shape
    out = (given[0].new_empty(shape) for shape in ((B, T), (B, T), len(STATS), B))
    return *given, mask.contiguous(), bootstrap, *out


@ppo_advantages.compiled(devices=("cpu",))
def _(
    kernels, logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):  # fmt: skip
    tensors = _dense(logprobs, ref_logprobs, values, scores, mask, bootstrap)
    B, T = logprobs.shape
    moments = torch.empty(B, 6, dtype=torch.float64, device=logprobs.device)
    kernels.ppo_advantages(
        *data_ptrs(*tensors, moments), B, T, kl_coef, KL_ESTIMATORS.index(kl_estimator), gamma, lam, score_clip,
        stream_or_threads(logprobs),
    )  # fmt: skip
    return tensors[-4:]


BLOCKS = 2048  # at most: their moments join in a second launch


@ppo_advantages.compiled(devices=("cuda",))
def _(
    kernels, logprobs, ref_logprobs, values, scores, mask, kl_coef, kl_estimator, gamma, lam, score_clip, bootstrap
):  # fmt: skip
    tensors = _dense(logprobs, ref_logprobs, values, scores, mask, bootstrap)
    B, T = logprobs.shape
    parts = torch.empty(6, BLOCKS, dtype=torch.float64, device=logprobs.device)
    piece, folds = pieces(B, B * T, T, logprobs)
    kernels.ppo_advantages(
        *data_ptrs(*tensors, parts), BLOCKS, *data_ptrs(folds), piece, B, T, kl_coef,
        KL_ESTIMATORS.index(kl_estimator), gamma, lam, score_clip, stream_or_threads(logprobs),
    )  # fmt: skip
    return tensors[-4:]


@ppo_advantages.inputs(
    small_sizes=[
        {"B": 1, "T": 1},
        {"B": 3, "T": 17, "estimator": "k2", "clip": 0.5},
        {"B": 17, "T": 33, "bootstrap": True, "estimator": "k3"},
        {"B": 9, "T": 5, "gaps": False, "estimator": "abs"},
        {"B": 2, "T": 600, "gaps": False},
        {"B": 3, "T": 521},
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
def _(B, T, device, dtype, gaps=True, bootstrap=False, estimator="k1", clip=0.0):
    values = torch.randn(B, T, device=device, dtype=dtype)
    logprobs = -torch.rand(B, T, device=device, dtype=dtype) * 3
    ref_logprobs = logprobs + 0.2 * torch.randn(B, T, device=device, dtype=dtype)
    scores = torch.randn(B, device=device, dtype=dtype)
    lengths = torch.randint(0, T + 1, (B, 1), device=device)
    mask = torch.rand(B, T, device=device) > 0.2 if gaps else torch.arange(T, device=device) < lengths
    last = torch.randn(B, device=device, dtype=dtype) if bootstrap else None
    return logprobs, ref_logprobs, values, scores, mask, 0.05, estimator, 0.99, 0.95, clip, last
