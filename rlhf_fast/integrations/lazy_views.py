"""Rows, shapes, dtypes and copies of lazy logits, which are noted and not computed."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.lazy_logits import LazyLogits, count, handles
from rlhf_fast.integrations.lazy_rows import Rows

FULL = slice(None)


def keeps_rows(x: LazyLogits, lead: tuple[int, ...]) -> Any:
    """Return the same rows in another shape (*lead, V)."""
    if x.form == "transposed":
        return NotImplemented
    return x.like(shape=(*lead, x.shape[-1]), shared_storage=x.shared_storage)


def other_rows(x: LazyLogits, hidden: Tensor, is_view: bool) -> LazyLogits:
    """Return logits of some of the rows. is_view: whether they are a view of x."""
    rows = Rows(hidden, x.rows.head, x.rows.source)
    shared_storage = x.shared_storage if is_view else None
    return x.like(rows=rows, shape=(*hidden.shape[:-1], x.shape[-1]), shared_storage=shared_storage)


# -- rows --------------------------------------------------------------------------------------------------------------


def _index_items(x: LazyLogits, index: Any) -> list | None:
    """Return an index with one item for each dimension (and None for a new one); None if it is of another kind."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(i, device=x.device) if isinstance(i, list) else i for i in items]
    used = 0
    for i in items:
        if isinstance(i, Tensor):
            used += i.dim() if i.dtype in (torch.bool, torch.uint8) else 1
        elif isinstance(i, bool) or not isinstance(i, (int, slice, EllipsisType, type(None))):
            return None
        else:
            used += isinstance(i, (int, slice))
    places = [k for k, i in enumerate(items) if i is Ellipsis]
    if len(places) > 1 or used > x.dim():
        return None
    at = places[0] if places else len(items)
    return [*items[:at], *[FULL] * (x.dim() - used), *items[at + 1 :]]


@handles(Tensor.__getitem__)
def index_rows(x: LazyLogits, index: Any) -> Any:
    items = None if x.form == "transposed" else _index_items(x, index)
    if not items:
        return NotImplemented
    *first, last = items
    if isinstance(last, slice) and last.indices(x.shape[-1]) == (0, x.shape[-1], 1):
        basic = not any(isinstance(i, Tensor) and i.dim() for i in first)
        return other_rows(x, x.rows.shaped(x.lead)[(*first, FULL)], basic)
    return _one_of_each_row(x, first, last)


def _one_of_each_row(x: LazyLogits, first: list, last: Any) -> Any:
    """Return x[rows, tokens], integers of one shape: one token of each row."""
    indices = [*first, last]
    if x.dim() < 2 or not all(isinstance(i, Tensor) and i.dtype == torch.int64 and i.dim() for i in indices):
        return NotImplemented
    if len({i.shape for i in indices}) > 1:
        return NotImplemented
    every = len(first) == 1 and len(last) == x.shape[0] and torch.equal(first[0].cpu(), torch.arange(x.shape[0]))
    rows = x if every else index_rows(x, tuple(first))
    tokens = torch.where(last < 0, last + x.shape[-1], last)
    return torch.gather(rows, -1, tokens[..., None])[..., 0]


def _parts(x: LazyLogits, stops: list[int]) -> tuple[LazyLogits, ...]:
    """Return x in parts along dimension 0, which have their statistics in common."""
    each = count(x.lead[1:])
    head, begin, found = x.rows.head, 0, []
    for stop in stops:
        rows = Rows(None, head, x.rows.source, x.rows, slice(begin * each, stop * each))
        found.append(x.like(rows=rows, shape=(stop - begin, *x.shape[1:]), shared_storage=x.shared_storage))
        begin = stop
    return tuple(found)


def _dim(x: LazyLogits, dim: Any) -> int:
    """Return a dimension counted from 0, or the vocabulary's for what is none."""
    return dim % x.dim() if isinstance(dim, int) and -x.dim() <= dim < x.dim() else x.dim() - 1


@handles(Tensor.__iter__, Tensor.unbind, torch.unbind)
def iterate(x: LazyLogits, dim: int = 0) -> Any:
    if x.dim() < 2 or _dim(x, dim) or x.form == "transposed":
        return NotImplemented
    parts = _parts(x, list(range(1, x.shape[0] + 1)))
    return iter([part.like(shape=tuple(x.shape[1:]), shared_storage=x.shared_storage) for part in parts])


@handles(Tensor.unbind, torch.unbind)
def unbind(x: LazyLogits, dim: int = 0) -> Any:
    found = iterate(x, dim)
    return found if found is NotImplemented else tuple(found)


@handles(Tensor.split, torch.split)
def split(x: LazyLogits, split_size_or_sections: Any, dim: int = 0) -> Any:
    at, sizes = _dim(x, dim), split_size_or_sections
    if at == x.dim() - 1 or x.form == "transposed":
        return NotImplemented
    total = x.shape[at]
    if isinstance(sizes, int):
        if sizes < 1 or not total:
            return NotImplemented
        sizes = [min(sizes, total - begin) for begin in range(0, total, sizes)]
    stops = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    if stops[-1:] != [total] or min(sizes) < 0:
        return NotImplemented
    if at == 0:
        return _parts(x, stops)
    return tuple(narrow(x, at, stop - size, size) for stop, size in zip(stops, sizes, strict=True))


@handles(Tensor.chunk, torch.chunk)
def chunk(x: LazyLogits, chunks: int, dim: int = 0) -> Any:
    total = x.shape[_dim(x, dim)]
    return split(x, math.ceil(total / chunks), dim) if chunks > 0 and total else NotImplemented


@handles(Tensor.narrow, torch.narrow)
def narrow(x: LazyLogits, dim: int, start: int, length: int) -> Any:
    at = _dim(x, dim)
    if at == x.dim() - 1 or not 0 <= start <= start + length <= x.shape[at]:
        return NotImplemented
    return index_rows(x, (*[FULL] * at, slice(start, start + length)))


@handles(Tensor.select, torch.select)
def select(x: LazyLogits, dim: int, index: int) -> Any:
    at = _dim(x, dim)
    return NotImplemented if at == x.dim() - 1 else index_rows(x, (*[FULL] * at, index))


@handles(Tensor.index_select, torch.index_select)
def index_select(x: LazyLogits, dim: int, index: Tensor) -> Any:
    at = _dim(x, dim)
    return NotImplemented if at == x.dim() - 1 or index.dim() != 1 else index_rows(x, (*[FULL] * at, index))


# -- shapes ------------------------------------------------------------------------------------------------------------


def _shape_of(given: tuple) -> list[int] | None:
    shape = list(given[0]) if len(given) == 1 and not isinstance(given[0], (int, torch.dtype)) else list(given)
    return shape if shape and all(isinstance(n, int) for n in shape) else None


def _reshape(x: LazyLogits, shape: list[int] | None) -> Any:
    if shape is None or shape.count(-1) > 1 or min(shape) < -1 or not x.numel():
        return NotImplemented
    if -1 in shape:
        rest = -count(tuple(shape))
        if rest <= 0 or x.numel() % rest:
            return NotImplemented
        shape[shape.index(-1)] = x.numel() // rest
    if shape[-1] != x.shape[-1] or count(tuple(shape)) != x.numel():
        return NotImplemented
    return keeps_rows(x, tuple(shape[:-1]))


@handles(Tensor.view)
def view(x: LazyLogits, *size: Any) -> Any:
    return _reshape(x, _shape_of(size))


@handles(Tensor.reshape, torch.reshape)
def reshape(x: LazyLogits, *shape: Any) -> Any:
    return _reshape(x, _shape_of(shape))


@handles(torch.reshape)
def torch_reshape(x: LazyLogits, shape: Any) -> Any:
    return _reshape(x, _shape_of((shape,)))


@handles(Tensor.view_as, Tensor.reshape_as)
def view_as(x: LazyLogits, other: Tensor) -> Any:
    if other is x and not torch.is_grad_enabled():
        return x.as_function_output()  # an autograd.Function returns its input
    return _reshape(x, list(other.shape))


@handles(Tensor.flatten, torch.flatten)
def flatten(x: LazyLogits, start_dim: Any = 0, end_dim: Any = -1) -> Any:
    begin, end = _dim(x, start_dim), _dim(x, end_dim)
    if end == x.dim() - 1 or begin > end:
        return NotImplemented
    return keeps_rows(x, (*x.lead[:begin], count(x.lead[begin : end + 1]), *x.lead[end + 1 :]))


@handles(Tensor.unflatten, torch.unflatten)
def unflatten(x: LazyLogits, dim: int, sizes: Any) -> Any:
    at = _dim(x, dim)
    return NotImplemented if at == x.dim() - 1 else _reshape(x, [*x.shape[:at], *sizes, *x.shape[at + 1 :]])


@handles(Tensor.squeeze, torch.squeeze)
def squeeze(x: LazyLogits, dim: Any = None) -> Any:
    if x.shape[-1] == 1:
        return NotImplemented
    dims = (
        range(x.dim() - 1) if dim is None else [_dim(x, d) for d in (dim if isinstance(dim, (tuple, list)) else [dim])]
    )
    return keeps_rows(x, tuple(n for k, n in enumerate(x.lead) if n != 1 or k not in dims))


@handles(Tensor.unsqueeze, torch.unsqueeze)
def unsqueeze(x: LazyLogits, dim: int) -> Any:
    at = dim + x.dim() + 1 if dim < 0 else dim
    return keeps_rows(x, (*x.lead[:at], 1, *x.lead[at:])) if 0 <= at < x.dim() else NotImplemented


@handles(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    a, b = sorted((_dim(x, dim0), _dim(x, dim1)))
    last = x.dim() - 1
    if x.form == "transposed" or x.dim() < 3:
        return NotImplemented
    if b < last:
        return other_rows(x, x.rows.shaped(x.lead).transpose(a, b), True)
    if a != last - 1 or x.form != "logits" or x.factor != 1:
        return NotImplemented
    return x.like(shape=(*x.shape[:-2], x.shape[-1], x.shape[-2]), form="transposed", shared_storage=x.shared_storage)


@handles(Tensor.permute)
def permute(x: LazyLogits, *dims: Any) -> Any:
    order = _shape_of(dims)
    if order is None or x.form == "transposed" or len(order) != x.dim():
        return NotImplemented
    order = [_dim(x, d) for d in order]
    if order[-1] == x.dim() - 1:
        return other_rows(x, x.rows.shaped(x.lead).permute(order), True)
    return transpose(x, 1, 2) if order == [0, 2, 1] else NotImplemented


@handles(torch.permute)
def torch_permute(x: LazyLogits, dims: Any) -> Any:
    return permute(x, dims)


@handles(Tensor.mT.__get__)  # type: ignore[attr-defined]
def matrix_transpose(x: LazyLogits) -> Any:
    return transpose(x, -2, -1)


# -- dtypes and copies -------------------------------------------------------------------------------------------------


def with_dtype(x: LazyLogits, dtype: torch.dtype) -> Any:
    """Return x itself if it has this dtype, as torch does, else a copy."""
    if not dtype.is_floating_point:
        return NotImplemented
    return x if dtype == x.dtype else x.like(dtype=dtype, copied=True)


for _name, _to in (("float", torch.float32), ("bfloat16", torch.bfloat16), ("half", torch.float16),
                   ("double", torch.float64)):  # fmt: skip
    handles(getattr(Tensor, _name))(lambda x, _to=_to: with_dtype(x, _to))


@handles(Tensor.type_as)
def type_as(x: LazyLogits, other: Tensor) -> Any:
    return with_dtype(x, other.dtype) if other.device == x.device else NotImplemented


@handles(Tensor.type)
def type_(x: LazyLogits, dtype: Any) -> Any:
    return with_dtype(x, dtype) if isinstance(dtype, torch.dtype) else NotImplemented


@handles(Tensor.to)
def to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, copy = x.dtype, kwargs.pop("copy", False)
    kwargs.pop("non_blocking", None), kwargs.pop("memory_format", None)
    for wanted in (*args, *kwargs.values()):
        if isinstance(wanted, torch.dtype):
            dtype = wanted
        elif isinstance(wanted, Tensor):
            if wanted.device != x.device:
                return NotImplemented
            dtype = wanted.dtype
        elif isinstance(wanted, (str, int, torch.device)) and not isinstance(wanted, bool):
            if not _same_device(torch.device(wanted), x.device):
                return NotImplemented
        elif wanted is not None:
            return NotImplemented
    found = with_dtype(x, dtype)
    return clone(x) if copy and found is x else found


def _same_device(wanted: torch.device, here: torch.device) -> bool:
    if wanted.type != here.type or wanted.type == "cpu" or wanted.index == here.index:
        return wanted.type == here.type
    return wanted.index is None and torch.accelerator.current_device_index() == here.index


@handles(Tensor.cpu)
def cpu(x: LazyLogits) -> Any:
    return x if x.device.type == "cpu" else NotImplemented


@handles(Tensor.contiguous)
def contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return x if memory_format == torch.contiguous_format and x.form != "transposed" else NotImplemented


@handles(Tensor.clone, torch.clone)
def clone(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    del memory_format
    if not torch.is_grad_enabled() and not x.rows.is_detached():
        return x.as_function_output(shared_storage=None, copied=True)  # as DDP's sink copies its input
    return x.like(copied=True)


@handles(Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
def detach(x: LazyLogits) -> LazyLogits:
    return x.like(rows=x.rows.detach(), shared_storage=x.shared_storage, hooked_inputs=())


@handles(Tensor.register_hook)
def register_hook(x: LazyLogits, hook: Any) -> Any:
    """FSDP's hooks only hear of the backward pass. A user's would have the gradient, which is never made."""
    if not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch."):
        raise NotImplementedError("lazy_head: a hook on logits would have no gradient to see; put it on logits.make()")
    x.has_backward_hook = True
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.register_hook(x, hook)


def _empty_like(function: Any) -> None:
    def handler(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return function(torch.empty((), dtype=x.dtype, device=x.device).expand(x.shape), *args, **kwargs)

    handles(function)(handler)


for _function in (
    torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
):  # fmt: skip
    _empty_like(_function)
