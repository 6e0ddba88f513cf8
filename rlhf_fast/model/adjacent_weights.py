"""Weights of linear layers that read the same input, next to one another: q, k and v, and gate and up.

One product is faster than two or three: it reads its input once, and a short one takes no longer than its launch.
Instead of a second copy of the weights, the module's own are moved, once:

    one tensor    | q_proj.weight | k_proj.weight | v_proj.weight |

Each parameter stays the same object and becomes a view of its part, so that optimizers, state dicts and checkpoints go
on as before. Whether weights lie so is looked up at each use. If they have been moved since, as by `module.to`, they
are multiplied one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""transformers' names of the layers that read the same input."""
ALIGNMENT = 16
"""Bytes: products are slower on weights that do not begin at a multiple."""


@torch.no_grad()
def make_adjacent(module: nn.Module) -> None:
    """Move weights of linear layers that read the same input next to one another. A layer with an adapter is left
    where it is: its weight is a sum, which is computed for each rollout. So are weights that share their memory with
    another parameter or buffer of `module`, or with other processes, which would not see the ones that are moved.

    A tensor outside of `module` that shared a weight's memory does not see it any more. torch.save of a single weight
    writes the joint tensor, and safetensors' save_model refuses it; save_file, save_pretrained and Model.save do not.
    """
    tensors = (*module.parameters(), *module.buffers())
    owners = Counter(x.untyped_storage().data_ptr() for x in tensors if type(x) in (Tensor, nn.Parameter))
    for parent in module.modules():
        for names in SAME_INPUT:
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            if all(type(linear) is nn.Linear for linear in linears):
                _move([linear.weight for linear in linears], owners)
                _move([linear.bias for linear in linears], owners)


def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
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
        rows += tensor.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def joined(linears: Sequence[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Return the weight and the bias of one linear layer with all outputs of `linears`, whose weights are (out, in); or
    None unless their weights, and their biases if one has any, are adjacent."""
    weight, biases = join([linear.weight for linear in linears]), [linear.bias for linear in linears]
    if weight is None or all(bias is None for bias in biases):
        return None if weight is None else (weight, None)
    bias = join(biases)
    return None if bias is None else (weight, bias)


def _move(parameters: Sequence[nn.Parameter | None], owners: Counter[int]) -> None:
    """Make the parameters views of one new tensor, unless they are adjacent already, or cannot be. owners: the number
    of parameters by the address of their memory."""
    present = [p for p in parameters if p is not None]
    if len(present) < len(parameters) or any(type(p) is not nn.Parameter for p in present):
        return
    if join(present) is not None:
        return
    first = present[0]
    for p in present:
        same_kind = p.dtype == first.dtype and p.device == first.device and p.shape[1:] == first.shape[1:]
        storage = p.untyped_storage()
        owns_memory = p.is_contiguous() and storage.nbytes() == p.nbytes and owners[storage.data_ptr()] == 1
        if not same_kind or not owns_memory or p.is_shared() or p.nbytes % ALIGNMENT:
            return
    with torch.inference_mode(False):  # training cannot use a tensor that was made in inference mode
        joint = torch.cat([p.detach() for p in present])
        for p, part in zip(present, joint.split([len(p) for p in present]), strict=True):
            p.data = part
