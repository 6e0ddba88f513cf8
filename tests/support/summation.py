"""Another order of summation for plain torch: how far its rounding errors go is then no matter of one draw."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.bmm.default)
SUMS = (aten.sum.dim_IntList, aten.mean.dim, aten.logsumexp.default)
SOFTMAXES = (aten._softmax.default, aten._log_softmax.default)


def permutation(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.randperm(x.shape[dim], device=x.device)


def shuffled_product(product: Callable, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    order = permutation(a, -1)
    return product(a[..., order], b[..., order, :])


class RandomSummationOrder(TorchDispatchMode):
    """Within the block, products, sums, means and softmaxes add their terms in a random order."""

    def __torch_dispatch__(self, func: Callable, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            return shuffled_product(func, *args)
        if func is aten.addmm.default:
            return shuffled_product(lambda a, b: func(args[0], a, b, **kwargs), *args[1:])
        if func is aten.sum.default:
            return func(args[0].flatten()[torch.randperm(args[0].numel(), device=args[0].device)], **kwargs)
        if func in SUMS and args[0].dim():
            x, dims, *rest = args
            for dim in dims or range(x.dim()):
                x = x.index_select(dim, permutation(x, dim))
            return func(x, dims, *rest, **kwargs)
        if func in SOFTMAXES and args[0].dim():
            x, dim, *rest = args
            order = permutation(x, dim)
            return func(x.index_select(dim, order), dim, *rest).index_select(dim, order.argsort())
        return func(*args, **kwargs)
