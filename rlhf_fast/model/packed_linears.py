"""Linear layers of the training forward: by our product or by torch's, and those that read the same input as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf_fast import ops
from rlhf_fast.kernels._product import f32_is_ours
from rlhf_fast.model.adjacent_weights import join


def linear(module: Any, x: Tensor, exact: bool) -> Tensor:
    """Multiply x (N, D) by a linear layer: by our product where that is the faster one and there is no adapter. exact:
    in the order of sums of the decode step."""
    kind = type(module)
    if kind not in (nn.Linear, Conv1D) or not (exact or _is_ours(x)):
        return module(x)
    return ops.linear(x, module.weight, module.bias, kind is Conv1D, decode_order=exact)


def linears(modules: Sequence[Any], x: Tensor, exact: bool) -> Sequence[Tensor]:
    """Multiply x (N, D) by linear layers that read the same input; on the CPU by one product, where their weights are
    adjacent."""
    joint = _join(modules) if x.is_cpu and len(modules) > 1 else None
    if joint is None:
        return [linear(module, x, exact) for module in modules]
    if exact or _is_ours(x):
        out = ops.linear(x, joint.weight, joint.bias, decode_order=exact)
    else:
        out = F.linear(x, joint.weight, joint.bias)
    return _Split.apply(out, joint.sizes)


class _JointLayer(NamedTuple):
    """Linear layers with adjacent weights."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]
    """Their numbers of outputs."""


def _join(modules: Sequence[Any]) -> _JointLayer | None:
    """Return the layers as one, None where weights or biases are not adjacent or a layer has an adapter."""
    if not all(type(module) is nn.Linear for module in modules):
        return None
    weight = _joint_view([module.weight for module in modules])
    if weight is None:
        return None
    sizes = [module.out_features for module in modules]
    if all(module.bias is None for module in modules):
        return _JointLayer(weight, None, sizes)
    bias = _joint_view([module.bias for module in modules])
    return None if bias is None else _JointLayer(weight, bias, sizes)


def _joint_view(parameters: Sequence[Tensor | None]) -> Tensor | None:
    """Return the view of adjacent parameters whose gradient is theirs, None if they are not adjacent."""
    view = join(parameters)
    return None if view is None else _JointView.apply(view.detach(), *parameters)


def _is_ours(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and f32_is_ours(len(x))


class _JointView(torch.autograd.Function):
    """The view of all rows of adjacent parameters."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, *parameters: Tensor) -> Tensor:
        ctx.sizes = [len(p) for p in parameters]
        return view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.sizes)


class _Split(torch.autograd.Function):
    """x.split(sizes, -1) of x (N, D). Gradients that lie as the parts do are joined without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return x.split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        joint = join([grad.T for grad in grads])
        return torch.cat(grads, -1) if joint is None else joint.T, None
