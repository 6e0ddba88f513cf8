"""The mathematics that the ops of a language model's head share, in plain torch. Nothing here is an op.

    z = softcap(hidden . weight' + bias) / temperature,  softcap(x) = c tanh(x / c)        log p = z - logsumexp z

Every loss of a row's log-probability, entropy and exact KL to a reference has one form of gradient by its z:
p (a + b log p + c (log p_ref - log p)) + g 1[target], four numbers a row.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import upcast

IGNORED = -100


def scale(x: Tensor, temperature: float, softcap: float) -> Tensor:
    """z of raw logits x."""
    x = softcap * torch.tanh(x / softcap) if softcap else x
    return x / temperature if temperature != 1 else x


def slope(x: Tensor, temperature: float, softcap: float) -> Tensor | float:
    """dz/dx of raw logits x."""
    return (1 - torch.tanh(x / softcap) ** 2 if softcap else 1.0) / temperature


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Raw logits (..., V) in float32; what stands in an ignored row of hidden, even NaN, is not looked at."""
    with torch.autocast(hidden.device.type, enabled=False):
        x = upcast(hidden).masked_fill((targets == IGNORED)[..., None], 0) @ upcast(weight).T
    return x if bias is None else x + upcast(bias)


def gathered(logp: Tensor, targets: Tensor) -> Tensor:
    """log p of the targets, 0 where they are ignored."""
    here = targets != IGNORED
    return logp.gather(-1, targets.where(here, 0)[..., None].long()).squeeze(-1).masked_fill(~here, 0)


def entropy_of(logp: Tensor, targets: Tensor) -> Tensor:
    """-sum p log p, nats; a token of probability 0 adds 0."""
    return -(logp.exp() * finite(logp)).sum(-1).masked_fill(targets == IGNORED, 0)


def finite(logp: Tensor) -> Tensor:
    return logp.masked_fill(logp == -torch.inf, 0)


def statistics_of(z: Tensor, targets: Tensor) -> Tensor:
    """(2, ...) float32: largest z, log of the sum of exp(z - largest); 0 in ignored rows."""
    largest = z.amax(-1)
    return torch.stack([largest, (z - largest[..., None]).logsumexp(-1)]).masked_fill(targets == IGNORED, 0)


def logits_gradient(
    logp: Tensor,
    targets: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    ref_logp: Tensor | None = None,
) -> Tensor:
    """p (a + b log p + c (log p_ref - log p)) + g 1[target] by z, 0 in ignored rows."""
    here = targets != IGNORED
    a, b, g = (x.where(here, 0).to(logp.dtype)[..., None] for x in (a, b, g))
    inner = a + b * finite(logp)
    if c is not None:
        inner = inner + c.where(here, 0).to(logp.dtype)[..., None] * (finite(ref_logp) - finite(logp))
    return (
        (logp.exp() * inner)
        .masked_fill(~here[..., None], 0)
        .scatter_add(-1, targets.where(here, 0)[..., None].long(), g)
    )


def products(
    dx: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, by: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, from the gradient of the raw logits; empty where not asked for."""
    hidden_rows = upcast(hidden).masked_fill((targets == IGNORED)[..., None], 0).flatten(0, -2)
    rows, nothing = dx.flatten(0, -2), hidden.new_empty(0)
    d_hidden = (dx @ upcast(weight)).to(hidden.dtype) if by[0] else nothing
    d_weight = (rows.T @ hidden_rows).to(weight.dtype) if by[1] else nothing.clone()
    d_bias = rows.sum(0).to(bias.dtype) if by[2] else nothing.clone()
    return d_hidden, d_weight, d_bias


def empty_products(hidden: Tensor, weight: Tensor, bias: Tensor | None, by: tuple[bool, bool, bool]):
    """Where those gradients go: new memory, (0,) for what is not asked for."""
    return tuple(
        x.new_empty(x.shape) if wanted else hidden.new_empty(0)
        for x, wanted in zip((hidden, weight, bias), by, strict=True)
    )


def default_weights(weights: Tensor | None, targets: Tensor) -> Tensor:
    """Weights of the tokens, float32 (bool becomes 0 and 1); None: one over the number of targets not ignored."""
    here = targets != IGNORED
    if weights is None:
        return here.float() / here.sum().clamp(min=1)
    return upcast(weights).where(here, 0)


def check_targets(name: str, targets: Tensor, V: int) -> None:
    """Targets in [0, V) or ignored. On CPU only: on a GPU the check would wait for the device."""
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= V)
        if wrong.any():
            at = int(wrong.flatten().int().argmax())
            raise ValueError(
                f"{name}: targets must be in [0, {V}) or {IGNORED} (ignored), got {int(targets.flatten()[at])} at {at}"
            )


def check_head(
    name: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float
) -> None:
    """The rules that every op of the linear family has."""
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
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: targets must be int64 or int32, got {str(targets.dtype)[6:]}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive and finite, got {temperature}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, or 0 for none, got {softcap}")


def check_rows(name: str, targets: Tensor, **rows: Tensor | None) -> None:
    """Tensors with one number a token."""
    for key, x in rows.items():
        if x is not None and x.shape != targets.shape:
            raise ValueError(f"{name}: {key} must have the shape of targets {list(targets.shape)}, got {list(x.shape)}")


def keep(ctx, grads: list[Tensor], by: list[bool], args: tuple) -> None:
    """For a loss that makes its gradients in the forward pass: keep them, and what a second backward pass needs."""
    ctx.grads, ctx.by, ctx.order = grads, by, [isinstance(x, Tensor) for x in args]
    ctx.save_for_backward(*(x for x in args if isinstance(x, Tensor)))
    ctx.others = [x for x in args if not isinstance(x, Tensor)]


def scaled(ctx, grad_loss: Tensor, with_gradients) -> list[Tensor | None]:
    """Those gradients times grad_loss. They are given away, not copied: a second backward pass computes them again."""
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        args = [next(tensors if is_tensor else others) for is_tensor in ctx.order]
        grads = list(with_gradients(*args, *ctx.by)[-3:])
    on_cpu = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
    if not (on_cpu and grad_loss.item() == 1):
        grads = [grad.mul_(grad_loss) for grad in grads]
    return [grad if wanted else None for grad, wanted in zip(grads, ctx.by, strict=True)]


def cost(gradient: bool, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float]:
    """Bytes and operations that a head cannot do without: one product, and one for each gradient."""
    wanted = [x for x in (hidden, weight) if gradient and x.requires_grad]
    rows = int((targets != IGNORED).sum())
    moved = sum(x.nbytes for x in (hidden, weight, *wanted))
    return moved, (1 + len(wanted)) * 2.0 * rows * weight.numel()


def make_head(
    N, D, V, device, dtype, bias=False, ignored=0.3, offset=0.0, index=torch.int64,
    frozen_weight=False, frozen_hidden=False,
):  # fmt: skip
    """hidden, weight, targets, bias. NaN stands in the hidden of ignored rows; offset moves every logit."""
    weight = torch.randn(V, D, device=device) / D**0.5
    hidden = 2 * torch.randn(N, D, device=device)
    targets = torch.randint(V, (N,), device=device, dtype=index)
    off = (torch.rand(N, device=device) < ignored) & (torch.arange(N, device=device) > 0)
    hidden, targets = hidden.masked_fill(off[:, None], torch.nan), targets.masked_fill(off, IGNORED)
    hidden = hidden.to(dtype).requires_grad_(not frozen_hidden)
    weight = weight.to(dtype).requires_grad_(not frozen_weight)
    bias = (offset + torch.randn(V, device=device)).to(dtype).requires_grad_() if bias or offset else None
    return hidden, weight, targets, bias
