"""The reward model's loss over every ordered pair of a prompt's K ranked responses."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_fast.kernels._launch import data_ptrs, refuse_float64, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import check_offsets, contiguous_float32, upcast

STATS = ("pairs", "correct", "margin", "groups", "groups_without_pair")


def _fake(scores, group_offsets, ranks, weights=None):
    loss = torch.empty((), dtype=upcast(scores).dtype, device=scores.device)
    return loss, loss.new_empty(len(STATS))


@op(fake=_fake)
def ranking_loss(
    scores: Tensor, group_offsets: Tensor, ranks: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss () in nats and the statistics (5,), float32, of a reward model's scores of ranked responses.

        loss = sum_g weights_g * mean over the pairs i, j of group g with rank_i < rank_j of -log sigmoid(s_i - s_j)

    This is eq. 1 of InstructGPT (arXiv 2203.02155): all C(K, 2) pairs of a prompt are one batch element.

        scores (N,): one per response; the responses of a prompt are a group
        group_offsets (G + 1,), int32 or int64: group g is rows group_offsets[g] to group_offsets[g + 1]
        ranks (N,), integers: smaller is better; a pair of equal ranks is dropped
        weights (G,): None means 1 / (number of groups with a pair); a group without a pair adds 0

    Gradient: scores. Statistics, named in `ranking_loss.stats`, are sums that add up over batches:

        pairs: ordered pairs
        correct: pairs with s_i > s_j
        margin: s_i - s_j, summed over the pairs
        groups, groups_without_pair: groups with and without a pair

    Raises ValueError where shapes differ, ranks are not integers, or group_offsets does not rise from 0 to N (the last
    only on the CPU).
    """
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    loss, stats, _ = _loss_over_pairs(upcast(scores), group_offsets, ranks, weights)
    return loss, stats


def _loss_over_pairs(
    scores: Tensor, group_offsets: Tensor, ranks: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, stats and d loss / d scores, computed on an N x N table of pairs."""
    N, G = scores.shape[0], group_offsets.shape[0] - 1
    group = torch.bucketize(torch.arange(N, device=scores.device), group_offsets[1:].long().contiguous(), right=True)
    is_pair = (group[:, None] == group) & (ranks[:, None] < ranks)
    margin = torch.where(is_pair, scores[:, None] - scores, 0)
    pairs_per_group = scores.new_zeros(G).index_add(0, group, is_pair.sum(1).to(scores.dtype))
    has_pair = pairs_per_group > 0
    weights = 1 / has_pair.sum().clamp_min(1).to(scores.dtype) if weights is None else weights.to(scores.dtype)
    coefficient = torch.where(has_pair, weights / pairs_per_group.clamp_min(1), 0)[group][:, None]
    loss = -torch.where(is_pair, coefficient * logsigmoid(margin), 0).sum()
    pair_grad = torch.where(is_pair, coefficient * torch.sigmoid(-margin), 0).detach()
    stats = [is_pair.sum(), (is_pair & (margin > 0)).sum(), margin.detach().sum(), has_pair.sum(), (~has_pair).sum()]
    return loss, torch.stack([x.to(scores.dtype) for x in stats]), pair_grad.sum(0) - pair_grad.sum(1)


ranking_loss.stats = STATS


@ranking_loss.normalize
def _(scores, group_offsets, ranks, weights):
    if scores.dim() != 1 or scores.shape != ranks.shape:
        raise ValueError(
            f"ranking_loss: scores and ranks must have one shape (N,), got {list(scores.shape)}, {list(ranks.shape)}"
        )
    if group_offsets.dim() != 1 or not group_offsets.shape[0] or group_offsets.dtype not in (torch.int32, torch.int64):
        given = f"{list(group_offsets.shape)} {group_offsets.dtype}"
        raise ValueError(f"ranking_loss: group_offsets must be int32 or int64 of shape (G + 1,), got {given}")
    if ranks.is_floating_point() or ranks.dtype == torch.bool:
        raise ValueError(f"ranking_loss: ranks must be integers, got {ranks.dtype}")
    G = group_offsets.shape[0] - 1
    if weights is not None and weights.shape != (G,):
        raise ValueError(f"ranking_loss: weights must have shape ({G},), got {list(weights.shape)}")
    return scores, group_offsets, ranks, weights


def _fake_with_gradients(scores, group_offsets, ranks, weights):
    return *_fake(scores, group_offsets, ranks), torch.empty_like(scores, dtype=upcast(scores).dtype)


@ranking_loss.variant(outputs=3, fake=_fake_with_gradients)
def ranking_loss_with_gradients(scores, group_offsets, ranks, weights):
    """Return `ranking_loss`'s outputs and d loss / d scores (N,), float32."""
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    return _loss_over_pairs(upcast(scores), group_offsets, ranks, weights)


def _launch_cpu(kernels, scores, group_offsets, ranks, weights, needs_grad):
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    refuse_float64(scores, weights)
    scores, weights = contiguous_float32(scores, weights)
    ranks, group_offsets = _as_int32(ranks), group_offsets.long().contiguous()
    N, G = scores.shape[0], group_offsets.shape[0] - 1
    padded_N = N + kernels.ranking_loss_padding * G  # each group is padded to whole vectors
    group_sums = scores.new_empty(G, 3, dtype=torch.float64)
    padded = scores.new_empty(3, padded_N)
    outputs = _empty_outputs(scores, needs_grad)
    kernels.ranking_loss(
        *data_ptrs(scores, group_offsets, ranks, weights, group_sums, padded, *outputs), G, N, padded_N,
        stream_or_threads(scores),
    )  # fmt: skip
    return outputs


def _launch_cuda(kernels, scores, group_offsets, ranks, weights, needs_grad):
    check_offsets("ranking_loss", "group_offsets", group_offsets, scores.shape[0])
    refuse_float64(scores, weights)
    scores, weights = contiguous_float32(scores, weights)
    group_offsets = group_offsets.contiguous()
    ranks = ranks.contiguous() if ranks.dtype in (torch.int32, torch.int64) else ranks.long()
    N, G = scores.shape[0], group_offsets.shape[0] - 1
    group_sums = scores.new_empty(4, G, dtype=torch.float64)
    outputs = _empty_outputs(scores, needs_grad)
    kernels.ranking_loss(
        *data_ptrs(scores, group_offsets), group_offsets.dtype == torch.int64,
        *data_ptrs(ranks), ranks.dtype == torch.int64,
        *data_ptrs(weights, group_sums, *outputs), G, N, stream_or_threads(scores),
    )  # fmt: skip
    return outputs


def _empty_outputs(scores: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    return scores.new_empty(()), scores.new_empty(len(STATS)), scores.new_empty(len(scores) if needs_grad else 0)


def _as_int32(ranks: Tensor) -> Tensor:
    """Return contiguous int32 ranks in the same order. Only the order matters: what does not fit is renumbered."""
    int32 = ranks.int()
    if ranks.dtype != torch.int32 and (int32 != ranks).any():
        int32 = ranks.unique(return_inverse=True)[1].int()
    return int32.contiguous()


def _register_compiled(device, launch):
    @ranking_loss.compiled(devices=(device,))
    def _(kernels, *args):
        return launch(kernels, *args, False)[:2]

    @ranking_loss_with_gradients.compiled(required_symbols=("ranking_loss",), devices=(device,))
    def _(kernels, *args):
        return launch(kernels, *args, True)


_register_compiled("cpu", _launch_cpu)
_register_compiled("cuda", _launch_cuda)


def _forward(ctx, *args):
    loss, stats, grad = ranking_loss_with_gradients.run(*args)
    ctx.save_for_backward(grad)
    ctx.dtype = args[0].dtype
    ctx.mark_non_differentiable(stats)
    return loss, stats


def _backward(ctx, grad_loss, _grad_stats):
    (grad,) = ctx.saved_tensors
    return (grad_loss * grad).to(ctx.dtype), None, None, None


ranking_loss.gradient(_backward, wrt=("scores",), forward=_forward)

SMALL: list[dict[str, Any]] = [
    {"sizes": (2,)},
    {"sizes": (9, 4, 1, 2, 0, 7), "weights": True},
    {"sizes": (5, 6, 5, 9, 17, 3, 2, 33), "ties": True, "index": "int32"},
]
LARGE = [{"sizes": (9,) * 64}, {"sizes": (2,) * 1024}]


@ranking_loss_with_gradients.inputs(small_sizes=[{**size, "grad": False} for size in SMALL], large_sizes=[])
@ranking_loss.inputs(small_sizes=[*SMALL, {"sizes": ()}], large_sizes=LARGE)
def _(sizes, device, dtype, ties=False, weights=False, index="int64", grad=True):
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).to(getattr(torch, index))
    scores = (2 * torch.randn(sum(sizes), device=device, dtype=dtype)).requires_grad_(grad)
    orders = [torch.randint(3, (k,)) if ties else torch.randperm(k) for k in sizes]
    ranks = torch.cat([torch.zeros(0, dtype=torch.int64), *orders]).to(device, offsets.dtype)
    weight = torch.rand(len(sizes), device=device, dtype=dtype) if weights else None
    return scores, offsets, ranks, weight
