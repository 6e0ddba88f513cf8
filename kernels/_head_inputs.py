"""Random inputs of the ops of a language model's head, for tests and benchmarks, and what a call at least costs."""

import torch
from torch import Tensor

from rlhf_fast.kernels._head import IGNORE_INDEX


def random_head_inputs(
    N, D, V, device, dtype, bias=False, ignored=0.3, offset=0.0, index=torch.int64,
    frozen_weight=False, frozen_hidden=False,
):  # fmt: skip
    """Return hidden (N, D), weight (V, D), targets (N,) and bias (V,) or None.

    hidden is NaN in ignored rows, a share `ignored` of all but the first. `offset` shifts every logit.
    """
    weight = torch.randn(V, D, device=device) / D**0.5
    hidden = 2 * torch.randn(N, D, device=device)
    targets = torch.randint(V, (N,), device=device, dtype=index)
    is_ignored = (torch.rand(N, device=device) < ignored) & (torch.arange(N, device=device) > 0)
    hidden = hidden.masked_fill(is_ignored[:, None], torch.nan).to(dtype).requires_grad_(not frozen_hidden)
    weight = weight.to(dtype).requires_grad_(not frozen_weight)
    targets = targets.masked_fill(is_ignored, IGNORE_INDEX)
    if not (bias or offset):
        return hidden, weight, targets, None
    return hidden, weight, targets, (offset + torch.randn(V, device=device)).to(dtype).requires_grad_()


def cost(gradient: bool, hidden: Tensor, weight: Tensor, targets: Tensor, *_others) -> tuple[float, float]:
    """Return the bytes and floating-point operations of one matrix product, and of one more for each gradient."""
    trained = [x for x in (hidden, weight) if gradient and x.requires_grad]
    num_valid = int((targets != IGNORE_INDEX).sum())
    moved = sum(x.nbytes for x in (hidden, weight, *trained))
    return moved, (1 + len(trained)) * 2.0 * num_valid * weight.numel()
