"""The reward model's loss: every ordered pair of a prompt's K ranked responses."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.kernels._gae import check_offsets
from rlhf_fast.kernels._launch import Unsupported, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast

STATS = ("pairs", "correct", "margin", "groups", "groups_without_pair")


def _fake(scores, group_offsets, ranks, weights=None):
    loss = torch.empty((), dtype=upcast(scores).dtype, device=scores.device)
    return loss, loss.new_empty(len(STATS))


@op(fake=_fake)
def ranking_loss(
    scores: Tensor, group_offsets: Tensor, ranks: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss (nats, float32) and stats (5,) of scores (N,) that a reward model gave to the ranked responses of G prompts.

        loss = sum_g weights_g * mean over the pairs i, j of group g with rank_i < rank_j of -log sigmoid(s_i - s_j)

    (InstructGPT, arXiv 2203.02155, eq. 1: all C(K, 2) pairs of a prompt are one batch element.) Group g is rows
    group_offsets[g] to group_offsets[g + 1]; group_offsets (G + 1,) int32 or int64 rises from 0 to N, K differs from
    group to group. ranks (N,) integers, smaller is better; equal ranks are a tie, and a tied pair is dropped. A group
    without a pair (one response, or all tied) gives 0. weights (G,); None means 1 / (number of groups with a pair).

    stats, named in `ranking_loss.stats`, are sums that add up over batches: pairs; correct, the pairs with s_i > s_j;
    margin, the sum of s_i - s_j over the pairs; groups with a pair; groups without one. Gradient: by scores.
    ValueError where shapes differ, ranks are no integers, or group_offsets does not rise from 0 to N (on CPU).
    """
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    loss, stats, _ = _pairs(upcast(scores), group_offsets, ranks, weights)
    return loss, stats


def _pairs(scores: Tensor, group_offsets: Tensor, ranks: Tensor, weights: Tensor | None):
    """Loss, stats and the loss's gradient by scores, over an N x N table of pairs."""
    N, G = scores.shape[0], group_offsets.shape[0] - 1
    group = torch.bucketize(torch.arange(N, device=scores.device), group_offsets[1:].long().contiguous(), right=True)
    pair = (group[:, None] == group) & (ranks[:, None] < ranks)
    margin = torch.where(pair, scores[:, None] - scores, 0)
    per_group = scores.new_zeros(G).index_add(0, group, pair.sum(1).to(scores.dtype))
    has_pair = per_group > 0
    weights = 1 / has_pair.sum().clamp_min(1).to(scores.dtype) if weights is None else weights.to(scores.dtype)
    coefficient = torch.where(has_pair, weights / per_group.clamp_min(1), 0)[group][:, None]
    loss = -torch.where(pair, coefficient * logsigmoid(margin), 0).sum()
    slope = torch.where(pair, coefficient * torch.sigmoid(-margin), 0).detach()
    counts = [pair.sum(), (pair & (margin > 0)).sum(), margin.detach().sum(), has_pair.sum(), (~has_pair).sum()]
    return loss, torch.stack([c.to(scores.dtype) for c in counts]), slope.sum(0) - slope.sum(1)


ranking_loss.stats = STATS


@ranking_loss.normalize
def _(scores, group_offsets, ranks, weights):
    if scores.dim() != 1 or scores.shape != ranks.shape:
        raise ValueError(
            f"ranking_loss: scores and ranks must have one shape (N,), got {list(scores.shape)}, {list(ranks.shape)}"
        )
    if group_offsets.dim() != 1 or not group_offsets.shape[0] or group_offsets.dtype not in (torch.int32, torch.int64):
        came = f"{list(group_offsets.shape)} {group_offsets.dtype}"
        raise ValueError(f"ranking_loss: group_offsets must be int32 or int64 of shape (G + 1,), got {came}")
    if ranks.is_floating_point() or ranks.dtype == torch.bool:
        raise ValueError(f"ranking_loss: ranks must be integers, got {ranks.dtype}")
    if weights is not None and weights.shape != (group_offsets.shape[0] - 1,):
        raise ValueError(
            f"ranking_loss: weights must have shape ({group_offsets.shape[0] - 1},), got {list(weights.shape)}"
        )
    return scores, group_offsets, ranks, weights


def _fake_with_gradients(scores, group_offsets, ranks, weights=None):
    return *_fake(scores, group_offsets, ranks), torch.empty_like(scores, dtype=upcast(scores).dtype)


@op(fake=_fake_with_gradients)
def ranking_loss_with_gradients(
    scores: Tensor, group_offsets: Tensor, ranks: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `ranking_loss` gives, and the loss's gradient by scores (N,) float32."""
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    return _pairs(upcast(scores), group_offsets, ranks, weights)


def _launch(kernels, scores, group_offsets, ranks, weights, with_slope):
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    scores, ranks, group_offsets = _float32(scores), _int32(ranks), group_offsets.long().contiguous()
    weights = weights if weights is None else _float32(weights)
    G, N, loss, stats, slope = _outputs(scores, group_offsets, with_slope)
    groups, padded = torch.empty(G, 3, dtype=torch.float64, device=scores.device), scores.new_empty(3, N + 16 * G)
    kernels.ranking_loss(
        scores.data_ptr(), group_offsets.data_ptr(), ranks.data_ptr(), 0 if weights is None else weights.data_ptr(),
        groups.data_ptr(), padded.data_ptr(), loss.data_ptr(), stats.data_ptr(), slope.data_ptr(), G, N, N + 16 * G,
        stream_or_threads(scores),
    )  # fmt: skip
    return loss, stats, slope


def _launch_cuda(kernels, scores, group_offsets, ranks, weights, with_slope):
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    scores, group_offsets = _float32(scores), group_offsets.contiguous()
    ranks = ranks.contiguous() if ranks.dtype in (torch.int32, torch.int64) else ranks.long()
    weights = weights if weights is None else _float32(weights)
    G, N, loss, stats, slope = _outputs(scores, group_offsets, with_slope)
    parts = torch.empty(4, G, dtype=torch.float64, device=scores.device)
    kernels.ranking_loss(
        scores.data_ptr(), group_offsets.data_ptr(), group_offsets.dtype == torch.int64, ranks.data_ptr(),
        ranks.dtype == torch.int64, 0 if weights is None else weights.data_ptr(), parts.data_ptr(), loss.data_ptr(),
        stats.data_ptr(), slope.data_ptr(), G, N, stream_or_threads(scores),
    )  # fmt: skip
    return loss, stats, slope


def _float32(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise Unsupported("float64 has no compiled kernel")
    return x.float().contiguous()


def _outputs(scores: Tensor, group_offsets: Tensor, with_slope: bool) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """G, N, and where loss, stats and slopes go."""
    G, N = group_offsets.shape[0] - 1, scores.shape[0]
    return G, N, scores.new_empty(()), scores.new_empty(len(STATS)), scores.new_empty(N if with_slope else 0)


def _int32(ranks: Tensor) -> Tensor:
    """Ranks in their order, as int32, dense: only the order matters, so numbers that do not fit are renumbered."""
    narrow = ranks.int()
    if ranks.dtype != torch.int32 and (narrow != ranks).any():
        narrow = ranks.unique(return_inverse=True)[1].int()
    return narrow.contiguous()


@ranking_loss.compiled(devices=("cpu",))
def _(kernels, *args):
    return _launch(kernels, *args, False)[:2]


@ranking_loss_with_gradients.compiled(required_symbols=("ranking_loss",), devices=("cpu",))
def _(kernels, *args):
    return _launch(kernels, *args, True)


@ranking_loss.compiled(devices=("cuda",))
def _(kernels, *args):
    return _launch_cuda(kernels, *args, False)[:2]


@ranking_loss_with_gradients.compiled(required_symbols=("ranking_loss",), devices=("cuda",))
def _(kernels, *args):
    return _launch_cuda(kernels, *args, True)


def _forward(ctx, scores, group_offsets, ranks, weights):
    loss, stats, slope = ranking_loss_with_gradients.run(scores, group_offsets, ranks, weights)
    ctx.save_for_backward(slope)
    ctx.dtype = scores.dtype
    ctx.mark_non_differentiable(stats)
    return loss, stats


def _backward(ctx, grad_loss, _grad_stats):
    (slope,) = ctx.saved_tensors
    return (grad_loss * slope).to(ctx.dtype), None, None, None


ranking_loss.gradient(_backward, forward=_forward)


def _make(sizes, device, dtype, ties=False, weights=False, index="int64", grad=True):
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).to(getattr(torch, index))
    scores = (2 * torch.randn(sum(sizes), device=device, dtype=dtype)).requires_grad_(grad)
    orders = [torch.randint(3, (k,)) if ties else torch.randperm(k) for k in sizes]
    ranks = torch.cat([torch.zeros(0, dtype=torch.int64), *orders]).to(device, offsets.dtype)
    weight = torch.rand(len(sizes), device=device, dtype=dtype) if weights else None
    return scores, offsets, ranks, weight


SMALL = [
    {"sizes": (2,)},
    {"sizes": (9, 4, 1, 2, 0, 7), "weights": True},
    {"sizes": (5, 6, 5, 9, 17, 3, 2, 33), "ties": True, "index": "int32"},
]
ranking_loss.inputs(small_sizes=[*SMALL, {"sizes": ()}], large_sizes=[{"sizes": (9,) * 64}, {"sizes": (2,) * 1024}])(
    _make
)
ranking_loss_with_gradients.inputs(small_sizes=[{**size, "grad": False} for size in SMALL], large_sizes=[])(_make)
