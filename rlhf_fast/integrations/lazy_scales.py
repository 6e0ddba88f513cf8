"""Scales and the soft cap of lazy logits, which are noted and not computed, and products with their softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.lazy_logits import LazyLogits, handles
from rlhf_fast.integrations.lazy_rows import Rows


def _number(by: Any) -> float | None:
    """Return a factor that is one number and has no gradient.

    The value of a tensor decides which head the ops get, and their scales are numbers. A tensor on a GPU is therefore
    waited for: once for each scaling by a tensor, which is mostly once a pass. A number is not waited for."""
    if isinstance(by, (int, float)):
        return float(by)
    if not isinstance(by, Tensor) or isinstance(by, LazyLogits) or by.requires_grad or not by.numel():
        return None
    by = by.detach().flatten()
    if by.numel() == 1:
        return float(by)
    first, are_equal = torch.stack([by[0], (by == by[0]).all().to(by.dtype)]).tolist()  # both by one copy
    return float(first) if are_equal else None


def _scaled(x: LazyLogits, by: Any, inverse: bool) -> tuple[Rows, float, torch.dtype] | None:
    """Return the rows and the factor of x times `by` (or over it), and its dtype; None if it has no such form."""
    if x.form == "transposed" or not isinstance(by, (int, float, Tensor)) or not _is_factor_of_rows(x, by):
        return None
    dtype = torch.result_type(torch.empty(1, dtype=x.dtype), _stand_in(by))
    number = _number(by)
    if number is not None:
        number = (1 / number if number else 0.0) if inverse else number
        if not number or not math.isfinite(number):
            return None
        if x.form != "logits":
            return x.rows, x.factor * number, dtype
        return x.rows.with_head(x.rows.head.scaled(number)), 1.0, dtype
    head = x.rows.head
    if x.form != "logits" or head.capped or head.bias is not None or not isinstance(by, Tensor):
        return None
    common = torch.promote_types(x.dtype, by.dtype)  # bfloat16 would round it once more
    if common == torch.float64 != head.weight.dtype:
        return None  # the ops take no float64 beside another dtype
    hidden = x.rows.shaped(x.lead).to(common)
    return Rows(hidden / by if inverse else hidden * by, head, x.rows.source), 1.0, dtype


def _is_factor_of_rows(x: LazyLogits, by: Any) -> bool:
    """Return whether `by` is one number or one for each row, of x's device."""
    if not isinstance(by, Tensor):
        return True
    if isinstance(by, LazyLogits) or by.is_complex() or (by.dim() and by.device != x.device) or by.dim() > x.dim():
        return False
    return not by.dim() or (by.shape[-1] == 1 and _expands_to(by.shape[:-1], x.lead))


def _expands_to(shape: tuple[int, ...], lead: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(lead), strict=False))


def _stand_in(by: Any) -> Any:
    return torch.empty([1] * min(by.dim(), 1), dtype=by.dtype) if isinstance(by, Tensor) else by


def _scale(x: LazyLogits, by: Any, inverse: bool) -> Any:
    found = _scaled(x, by, inverse)
    if found is None:
        return NotImplemented
    rows, factor, dtype = found
    return x.like(rows=rows, factor=factor, dtype=dtype)


def _scale_in_place(x: LazyLogits, by: Any, inverse: bool) -> Any:
    made = x.rows.has_logits() or x.cache is not None or x.shared_storage.exposed
    to_tensor = made or (x.requires_grad and not torch.is_grad_enabled())
    found = None if to_tensor else _scaled(x, by, inverse)
    return NotImplemented if found is None else x.replace_in_place(*found[:2])


@handles(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def multiply(x: LazyLogits, other: Any) -> Any:
    return product(x, other) if isinstance(other, LazyLogits) else _scale(x, other, inverse=False)


def product(x: LazyLogits, other: LazyLogits) -> Any:
    """Return softmax times logits or times log_softmax of the same logits, whose sum is made of their entropy."""
    first, second = (x, other) if x.form == "softmax" else (other, x)
    forms = {"logits": "softmax * logits", "log_softmax": "softmax * log_softmax"}
    rows, others = first.rows, second.rows
    if not torch.is_grad_enabled():
        rows, others = rows.detach(), others.detach()
    same = rows is others and x.shape == other.shape
    if first.form != "softmax" or second.form not in forms or not same or other.own is not None:
        return NotImplemented
    other.check()
    dtype = torch.promote_types(x.dtype, other.dtype)
    return x.like(rows=rows, form=forms[second.form], factor=x.factor * other.factor, dtype=dtype)


@handles(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
def divide(x: LazyLogits, other: Any, *, rounding_mode: Any = None) -> Any:
    return NotImplemented if rounding_mode is not None else _scale(x, other, inverse=True)


@handles(Tensor.mul_, Tensor.multiply_, Tensor.__imul__)
def multiply_(x: LazyLogits, other: Any) -> Any:
    return _scale_in_place(x, other, inverse=False)


@handles(Tensor.div_, Tensor.divide_, Tensor.true_divide_, Tensor.__itruediv__, Tensor.__idiv__)
def divide_(x: LazyLogits, other: Any, *, rounding_mode: Any = None) -> Any:
    return NotImplemented if rounding_mode is not None else _scale_in_place(x, other, inverse=True)


@handles(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__)
def negative(x: LazyLogits) -> Any:
    return NotImplemented if x.form in ("logits", "transposed") else x.like(factor=-x.factor)


@handles(torch.tanh, Tensor.tanh)
def tanh(x: LazyLogits) -> Any:
    head = x.rows.head.tanh() if x.form == "logits" and x.factor == 1 else None
    return NotImplemented if head is None else x.like(rows=x.rows.with_head(head))
