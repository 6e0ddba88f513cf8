"""Checks of the arguments of the ops of a language model's head. Each raises a ValueError that says what came."""

import math

import torch
from torch import Tensor

from rlhf_fast.kernels._head import IGNORE_INDEX


def check_targets(name: str, targets: Tensor, vocab_size: int) -> None:
    """Check that targets are in [0, vocab_size) or ignored. On CPU only: a GPU would have to be waited for."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= vocab_size)
    if wrong.any():
        first = int(wrong.flatten().int().argmax())
        raise ValueError(
            f"{name}: targets must be in [0, {vocab_size}) or {IGNORE_INDEX} (ignored),"
            f" got {int(targets.flatten()[first])} at {first}"
        )


def check_head(
    name: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float
) -> None:
    """Check the arguments that all ops of the linear family share."""
    if weight.dim() != 2 or not hidden.dim() or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(
            f"{name}: hidden (..., D) and weight (V, D) must share D, and D and V be at least 1, got {shapes}"
        )
    if targets.shape != hidden.shape[:-1]:
        shapes = f"{list(targets.shape)} and {list(hidden.shape)}"
        raise ValueError(f"{name}: targets must have hidden's shape without its last dimension, got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape ({weight.shape[0]},), got {list(bias.shape)}")
    check_scalars(name, targets, temperature, softcap)
    floats = [x for x in (hidden, weight, bias) if x is not None]
    if not all(x.is_floating_point() for x in floats) or len({x.dtype == torch.float64 for x in floats}) > 1:
        dtypes = ", ".join(str(x.dtype)[6:] for x in floats)
        raise ValueError(f"{name}: hidden, weight and bias must be floating point, float64 only together, got {dtypes}")


def check_scalars(name: str, targets: Tensor, temperature: float, softcap: float) -> None:
    """Check the dtype of targets, and the ranges of temperature and softcap."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: targets must be int64 or int32, got {str(targets.dtype)[6:]}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, or 0 for none, got {softcap}")


def check_rows(name: str, targets: Tensor, **rows: Tensor | None) -> None:
    """Check that tensors with one number for each row have the shape of targets."""
    for key, x in rows.items():
        if x is not None and x.shape != targets.shape:
            raise ValueError(f"{name}: {key} must have the shape of targets {list(targets.shape)}, got {list(x.shape)}")
