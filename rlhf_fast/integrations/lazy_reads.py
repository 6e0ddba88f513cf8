"""The ops answer for logits: cross-entropy, log-probabilities, logsumexp, entropy, argmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_fast.integrations.head import IGNORED
from rlhf_fast.integrations.lazy_logits import FORMS, LazyLogits, handles, result_dtype

BLOCK = 2**23
"""Logits that argmax makes at a time."""


def _answers(x: LazyLogits, *forms: str) -> bool:
    """Return whether the ops know these logits."""
    return x.form in forms and x.rows.head.fits_ops


def _is_last(x: LazyLogits, dim: Any) -> bool:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, x.dim() - 1)


def _rowwise(x: LazyLogits, out: Tensor, dtype: torch.dtype, keepdim: bool = False) -> Tensor:
    out = out.view(*x.lead, 1) if keepdim else out.view(x.lead)
    return x.answered(out.to(dtype))


# -- losses ------------------------------------------------------------------------------------------------------------


@handles(F.cross_entropy)
def cross_entropy(
    x: LazyLogits, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = IGNORED,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    return _loss(_cross_entropy, x, target, ignore_index, reduction) if plain else NotImplemented


@handles(F.nll_loss)
def nll_loss(
    x: LazyLogits, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = IGNORED,
    reduce: Any = None, reduction: str = "mean",
) -> Any:  # fmt: skip
    plain = weight is None and size_average is None and reduce is None and x.form == "log_softmax" and x.factor == 1
    return _loss(_nll_loss, x, target, ignore_index, reduction) if plain and x.dim() == 2 else NotImplemented


def _loss(function: Any, x: LazyLogits, target: Any, ignore_index: int, reduction: str) -> Any:
    form = "log_softmax" if function is _nll_loss else "transposed" if x.dim() == 3 else "logits"
    if not isinstance(target, Tensor) or isinstance(target, LazyLogits) or target.dtype != torch.int64:
        return NotImplemented
    lead = (x.shape[0], *x.shape[2:])
    if x.dim() not in (2, 3) or target.shape != lead or target.device != x.rows.head.weight.device:
        return NotImplemented
    if not _answers(x, form) or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if ignore_index != IGNORED:
        if target.device.type == "cpu" and bool((target == IGNORED).any()):
            return NotImplemented  # torch says that it is out of range
        target = torch.where(target == ignore_index, IGNORED, target)
    dtype = result_dtype(function, x)
    rows = target.reshape(-1)
    if reduction == "none":
        return x.answered(-x.rows.statistics(rows, some_ignored=True)[0].view(target.shape).to(dtype))
    x.rows.note_answer("linear_cross_entropy")
    loss = x.rows.head.cross_entropy(x.rows.hidden, rows, 1.0 if reduction == "sum" else None)
    if reduction == "mean":  # torch's mean of no tokens is nan, and its gradient 0
        loss = torch.where((rows != IGNORED).any(), loss, torch.nan)
    return x.answered(loss.to(dtype))


def _cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.zeros(1, dtype=torch.int64, device=z.device))


def _nll_loss(z: Tensor) -> Tensor:
    return F.nll_loss(z, torch.zeros(1, dtype=torch.int64, device=z.device))


# -- log-probabilities -------------------------------------------------------------------------------------------------


@handles(F.log_softmax)
def functional_log_softmax(x: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(torch.log_softmax, x, dim, dtype)


@handles(Tensor.log_softmax, torch.log_softmax, torch.special.log_softmax)
def log_softmax(x: LazyLogits, dim: Any, dtype: Any = None) -> Any:
    return _softmax(torch.log_softmax, x, dim, dtype)


@handles(F.softmax)
def functional_softmax(x: LazyLogits, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(torch.softmax, x, dim, dtype)


@handles(Tensor.softmax, torch.softmax, torch.special.softmax)
def softmax(x: LazyLogits, dim: Any, dtype: Any = None) -> Any:
    return _softmax(torch.softmax, x, dim, dtype)


def _softmax(function: Any, x: LazyLogits, dim: Any, dtype: Any) -> Any:
    if x.form != "logits" or not _is_last(x, dim):
        return NotImplemented
    form = "softmax" if function is torch.softmax else "log_softmax"
    return x.like(form=form, dtype=dtype or result_dtype(function, x, -1))


@handles(torch.exp, Tensor.exp)
def exp(x: LazyLogits) -> Any:
    if x.form != "log_softmax" or x.factor != 1:
        return NotImplemented
    return x.like(form="softmax", dtype=result_dtype(torch.exp, x))


@handles(Tensor.gather, torch.gather)
def gather(x: LazyLogits, dim: Any, index: Any, *, sparse_grad: bool = False) -> Any:
    if not _answers(x, "logits", "log_softmax") or not _is_last(x, dim) or not isinstance(index, Tensor):
        return NotImplemented
    if index.dtype != torch.int64 or index.shape[:-1] != x.shape[:-1] or index.device != x.device:
        return NotImplemented
    del sparse_grad  # the gradient of hidden states and weight is not sparse
    tokens = index.shape[-1] if index.dim() else 0
    rows, width = x.rows, x.rows.hidden.shape[-1]
    if not tokens or (tokens > 1 and tokens * width > x.shape[-1]):
        return NotImplemented
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < x.shape[-1]:
        return NotImplemented  # torch says that it is out of range
    index = index.reshape(-1, tokens)
    one = index[:, 0] if tokens == 1 else None
    if one is not None and x.form == "log_softmax" and (rows.has_statistics_of(one) or not rows.has_statistics()):
        out = rows.statistics(one)[0]
    elif one is not None and (rows.has_statistics_of(one) or not rows.has_statistics()):
        logprobs, _, log_z, _ = rows.statistics(one)
        out = logprobs + log_z
    else:
        rows.source.check()
        out = rows.head.chosen(rows.hidden, index)
        out = out - rows.statistics()[2][:, None] if x.form == "log_softmax" else out
    out = out.reshape(*x.lead, tokens).to(x.dtype)
    return x.answered(out if x.factor == 1 else out * x.factor)


@handles(Tensor.take_along_dim, torch.take_along_dim)
def take_along_dim(x: LazyLogits, indices: Any, dim: Any = None) -> Any:
    return gather(x, dim, indices) if dim is not None else NotImplemented


@handles(Tensor.logsumexp, torch.logsumexp, torch.special.logsumexp)
def logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if not _answers(x, "logits") or not _is_last(x, dim):
        return NotImplemented
    return _rowwise(x, x.rows.statistics()[2], result_dtype(torch.logsumexp, x, -1), keepdim)


# -- what sums over the vocabulary -------------------------------------------------------------------------------------


@handles(Tensor.sum, torch.sum)
def total(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    """Return the sums of which entropies are made: sum p z = log_z - entropy, sum p log p = -entropy."""
    dim = axis if dim is None else dim
    if not _answers(x, "softmax * logits", "softmax * log_softmax") or not _is_last(x, dim):
        return NotImplemented
    _, entropy, log_z, _ = x.rows.statistics()
    out = (log_z - entropy if x.form == "softmax * logits" else -entropy) * x.factor
    return _rowwise(x, out, dtype or result_dtype(torch.sum, x, -1), keepdim)


@handles(Tensor.mean, torch.mean)
def mean(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None) -> Any:
    """Return the mean logit of each row, hidden . mean W, unless a soft cap bends it."""
    dim, head = axis if dim is None else dim, x.rows.head
    if x.form != "logits" or head.capped or not _is_last(x, dim) or x.rows.has_logits():
        return NotImplemented
    x.rows.note_answer("mean")
    return _rowwise(x, head.mean_logit(x.rows.hidden), dtype or x.dtype, keepdim)


@handles(Tensor.argmax, torch.argmax)
def argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    """Return the likeliest token of each row. Logits of some rows exist at a time, and none of them stays."""
    if x.form not in ("logits", "log_softmax", "softmax") or not _is_last(x, dim) or x.rows.has_logits():
        return NotImplemented
    rows, found = x.rows, []
    rows.note_answer("argmax")
    with torch.no_grad():
        for hidden in rows.hidden.split(max(1, BLOCK // x.shape[-1])):
            made = FORMS[x.form](rows.head.logits(hidden).to(x.dtype)) * x.factor
            found.append(made.argmax(-1))
    out = torch.cat(found)
    return out.view(*x.lead, 1) if keepdim else out.view(x.lead)
