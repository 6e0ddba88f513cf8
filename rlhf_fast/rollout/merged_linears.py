"""Linear layers that read the same input, as one product: q, k and v, and gate and up.

On a GPU a decode step of a small model is a chain of products that take no longer than a launch. Instead of a second
copy of the weights, the module's own are moved next to one another, once:

    one tensor    | q_proj.weight | k_proj.weight | v_proj.weight |

Each parameter stays the same object and becomes a view of its part, so that optimizers, state dicts and checkpoints go
on as before. Whether weights lie so is looked up at each rollout. If they have been moved since, as by `module.to`,
they are multiplied one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.rollout.weights import DecoderWeights, LayerWeights, LinearWeights

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""transformers' names of the layers that read the same input."""
ALIGNMENT = 16
"""Bytes: products are slower on weights that do not begin at a multiple."""


@torch.no_grad()
def make_adjacent(module: nn.Module) -> None:
    """Move weights of linear layers that read the same input next to one another. A layer with an adapter is left
    where it is: its weight is a sum, which is computed for each rollout. So are weights that share their memory with
    another parameter, which would not see the ones that are moved."""
    owners = Counter(p.untyped_storage().data_ptr() for p in module.parameters() if type(p) is nn.Parameter)
    for parent in module.modules():
        for names in SAME_INPUT:
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _move([linear.weight for linear in linears], owners)
                _move([linear.bias for linear in linears], owners)


def merge_adjacent(weights: DecoderWeights) -> DecoderWeights:
    """Return the weights with those products merged whose weights are adjacent. Nothing is copied."""
    return weights._replace(layers=[_merge_layer(layer) for layer in weights.layers])


def _merge_layer(layer: LayerWeights) -> LayerWeights:
    gate_up = None if layer.gate is None else _merge((layer.gate, layer.up))
    qkv = None
    if layer.q_norm is None and layer.k_norm is None:  # a norm of each head would copy its part of the product
        qkv = _merge(layer.qkv)
    return layer._replace(qkv=layer.qkv if qkv is None else (qkv,), gate_up=gate_up)


def _merge(linears: Sequence[LinearWeights]) -> LinearWeights | None:
    """Return one layer with all outputs, or None if the weights or biases are not adjacent."""
    separate = any(linear.transposed or linear.is_split for linear in linears)
    weight = None if separate else _join([linear.weight for linear in linears])
    if weight is None or all(linear.bias is None for linear in linears):
        return None if weight is None else LinearWeights(weight, None, transposed=False)
    bias = _join([linear.bias for linear in linears])
    return None if bias is None else LinearWeights(weight, bias, transposed=False)


def _join(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Return a view of all rows of the tensors, or None unless each begins where the one before it ends."""
    first = tensors[0]
    if first is None:
        return None
    storage, end, rows = first.untyped_storage().data_ptr(), first.data_ptr(), 0
    for tensor in tensors:
        if tensor is None or tensor.dtype != first.dtype or tensor.shape[1:] != first.shape[1:]:
            return None
        in_place = tensor.data_ptr() == end and tensor.untyped_storage().data_ptr() == storage
        if not in_place or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
        rows += len(tensor)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _move(parameters: Sequence[nn.Parameter | None], owners: Counter[int]) -> None:
    """Make the parameters views of one new tensor, unless they are adjacent already, or cannot be. owners: the number
    of parameters by the address of their memory."""
    present = [p for p in parameters if p is not None]
    if len(present) < len(parameters) or any(type(p) is not nn.Parameter for p in present):
        return
    if _join(present) is not None:
        return
    first = present[0]
    for p in present:
        same_kind = p.dtype == first.dtype and p.device == first.device and p.shape[1:] == first.shape[1:]
        storage = p.untyped_storage()
        owns_memory = p.is_contiguous() and storage.nbytes() == p.nbytes and owners[storage.data_ptr()] == 1
        if not same_kind or not owns_memory or p.nbytes % ALIGNMENT:
            return
    with torch.inference_mode(False):  # training cannot use a tensor that was made in inference mode
        joint = torch.cat([p.detach() for p in present])
        for p, part in zip(present, joint.split([len(p) for p in present]), strict=True):
            p.data = part
