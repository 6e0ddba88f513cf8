"""The mathematics of a language model's head, shared by its ops, in plain torch. Not an op.

    z = softcap(hidden . weight' + bias) / temperature,  softcap(x) = c tanh(x / c)        log p = z - logsumexp z

The gradient with respect to z of every loss of a row's log-probability, entropy and exact KL to a reference has the
form p (a + b log p + c (log p_ref - log p)) + g 1[target], with four numbers a, b, c and g for each row.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from rlhf_fast.kernels._backends import TRITON_DEFAULT_DEVICES
from rlhf_fast.kernels._tensors import upcast, upcast_dtype

IGNORE_INDEX = -100
"""The target of rows that do not count."""

NeedsGrad = tuple[bool, bool, bool]
"""Flags of a variant: hidden, weight and bias need a gradient."""
NEEDS_GRAD = ("hidden_needs_grad", "weight_needs_grad", "bias_needs_grad")


def empty_rows(hidden: Tensor, targets: Tensor) -> Tensor:
    """Return new memory for one statistic of each row."""
    return hidden.new_empty(targets.shape, dtype=upcast_dtype(hidden))


def raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return hidden . weight' + bias (..., V) in float32. Ignored rows of hidden may hold anything, even NaN."""
    with torch.autocast(hidden.device.type, enabled=False):
        x = upcast(hidden).masked_fill((targets == IGNORE_INDEX)[..., None], 0) @ upcast(weight).T
    return x if bias is None else x + upcast(bias)


def scale_logits(x: Tensor, temperature: float, softcap: float) -> Tensor:
    """Return z of raw logits x."""
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x / temperature if temperature != 1 else x


def scale_logits_grad(x: Tensor, temperature: float, softcap: float) -> Tensor | float:
    """Return dz/dx of raw logits x."""
    return (1 - torch.tanh(x / softcap) ** 2 if softcap else 1.0) / temperature


def gather_targets(logp: Tensor, targets: Tensor) -> Tensor:
    """Return log p of the targets, 0 in ignored rows."""
    valid = targets != IGNORE_INDEX
    return logp.gather(-1, targets.where(valid, 0)[..., None].long()).squeeze(-1).masked_fill(~valid, 0)


def entropy(logp: Tensor, targets: Tensor) -> Tensor:
    """Return -sum p log p in nats, 0 in ignored rows; a token of probability 0 adds 0."""
    return -(logp.exp() * zero_where_minus_inf(logp)).sum(-1).masked_fill(targets == IGNORE_INDEX, 0)


def zero_where_minus_inf(logp: Tensor) -> Tensor:
    return logp.masked_fill(logp == -torch.inf, 0)


def row_statistics(z: Tensor, targets: Tensor) -> Tensor:
    """Return (2, ...) float32: the largest z and log sum exp(z - largest), 0 in ignored rows."""
    largest = z.amax(-1)
    return torch.stack([largest, (z - largest[..., None]).logsumexp(-1)]).masked_fill(targets == IGNORE_INDEX, 0)


def logits_grad(
    logp: Tensor,
    targets: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    ref_logp: Tensor | None = None,
) -> Tensor:
    """Return p (a + b log p + c (log p_ref - log p)) + g 1[target], the gradient with respect to z; 0 in ignored rows.

    g, a, b and c hold one number for each row.
    """
    valid = targets != IGNORE_INDEX
    a, b, g = (x.where(valid, 0).to(logp.dtype)[..., None] for x in (a, b, g))
    inner = a + b * zero_where_minus_inf(logp)
    if c is not None and ref_logp is not None:
        difference = zero_where_minus_inf(ref_logp) - zero_where_minus_inf(logp)
        inner = inner + c.where(valid, 0).to(logp.dtype)[..., None] * difference
    grad = (logp.exp() * inner).masked_fill(~valid[..., None], 0)
    return grad.scatter_add(-1, targets.where(valid, 0)[..., None].long(), g)


def input_grads(
    raw_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    needs_grad: NeedsGrad,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias, given that of the raw logits; (0,) where not needed."""
    rows = raw_grad.flatten(0, -2)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) for _ in range(3))
    if needs_grad[0]:
        d_hidden = (raw_grad @ upcast(weight)).to(hidden.dtype)
    if needs_grad[1]:
        hidden_rows = upcast(hidden).masked_fill((targets == IGNORE_INDEX)[..., None], 0).flatten(0, -2)
        d_weight = (rows.T @ hidden_rows).to(weight.dtype)
    if needs_grad[2] and bias is not None:
        d_bias = rows.sum(0).to(bias.dtype)
    return d_hidden, d_weight, d_bias


def empty_input_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: NeedsGrad
) -> tuple[Tensor, Tensor, Tensor]:
    """Return new memory for the gradients of hidden, weight and bias; (0,) where not needed."""
    d_hidden, d_weight, d_bias = (
        x.new_empty(x.shape) if needed and x is not None else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), needs_grad, strict=True)
    )
    return d_hidden, d_weight, d_bias


def drop_unneeded(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """Return None for the gradients that are not needed, as autograd wants it."""
    return [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]


def default_weights(weights: Tensor | None, targets: Tensor) -> Tensor:
    """Return the tokens' weights in float32, 0 in ignored rows; None stands for 1 / (number of valid targets)."""
    valid = targets != IGNORE_INDEX
    if weights is None:
        return valid.float() / valid.sum().clamp(min=1)
    return upcast(weights).where(valid, 0)


def save_grads(ctx, grads: list[Tensor], needs_grad: list[bool], args: tuple) -> None:
    """Keep the gradients that the forward pass made, and the op's arguments for a second backward pass."""
    ctx.grads, ctx.needs_grad = grads, needs_grad
    ctx.is_tensor = [isinstance(x, Tensor) for x in args]
    ctx.save_for_backward(*(x for x in args if isinstance(x, Tensor)))
    ctx.others = [x for x in args if not isinstance(x, Tensor)]


def scale_grads(ctx, grad_loss: Tensor, with_gradients) -> list[Tensor | None]:
    """Scale the saved gradients by grad_loss in place and hand them over; a second backward pass recomputes them."""
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        args = [next(tensors if is_tensor else others) for is_tensor in ctx.is_tensor]
        grads = list(with_gradients(*args, *ctx.needs_grad)[-3:])
    on_cpu = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (on_cpu and grad_loss.item() == 1):
        grads = [scale_grad(grad, grad_loss) for grad in grads]
    return drop_unneeded(grads, ctx.needs_grad)


def scale_grad(grad: Tensor, factor: Tensor) -> Tensor:
    """Return grad times a factor () of the same device, in place. On a GPU a factor of 1 costs no visit of memory."""
    if type(grad) is Tensor and grad.is_cuda and "cuda" in TRITON_DEFAULT_DEVICES and not torch.compiler.is_compiling():
        scale = import_module("rlhf_fast.kernels.triton._scale")
        if scale.can_scale(grad):
            with torch.cuda.device(grad.device):
                scale.scale_in_place(grad, factor)
            return grad
    return grad.mul_(factor)
