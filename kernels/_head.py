"""The mathematics of a language model's head, shared by its ops, in plain torch. Not an op.

    z = softcap(hidden . weight' + bias) / temperature,  softcap(x) = c tanh(x / c)        log p = z - logsumexp z

log p of the target is computed as -log1p(sum of the others' exp(z) / its own), and 1 - p as -expm1(log p): both keep
their relative precision where p rounds to 1. The gradient with respect to z of every loss of a row's log-probability,
entropy and exact KL to a reference has the form p (a + b log p + c (log p_ref - log p)), with three numbers a, b and c
for each row, but for the target, which has a number of its own.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

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
    return (torch.cosh(x.double() / softcap) ** -2 if softcap else 1.0) / temperature


def target_index(targets: Tensor) -> Tensor:
    """Return the targets as columns (..., 1), 0 in ignored rows."""
    return targets.where(targets != IGNORE_INDEX, 0)[..., None].long()


class Softmax(NamedTuple):
    """The softmax of rows of raw logits. A row's own numbers (..., 1) are float64. The origin is the z of the others'
    largest logit, so that no sum loses the others beside a target that is far ahead.

        log p of the others = distance - log_total        p of the others = scale exp
    """

    distance: Tensor  # (..., V): z - origin of the tokens but the target, -inf there
    exp: Tensor  # (..., V): of the distances
    column: Tensor  # (..., 1): the target's
    largest: Tensor  # (..., 1): the others' largest raw logit
    sums: Tensor  # of exp
    log_total: Tensor  # log of the sum of exp(z - origin), with the target
    logprob: Tensor  # of the target

    @property
    def scale(self) -> Tensor:
        rest = -torch.expm1(self.logprob)
        return torch.where(self.sums == 0, rest, rest / self.sums)

    def finite_distance(self) -> Tensor:
        return self.distance.clamp(min=-1e30)  # its product with an exp of 0 is 0; a NaN stays a NaN


def log_softmax(x: Tensor, targets: Tensor, temperature: float, softcap: float) -> Softmax:
    """Return the softmax of raw logits x (..., V), computed in their dtype, but in float64 under a softcap: a float32
    tanh is off the same way in all equal logits."""
    index = target_index(targets)
    own, others = x.gather(-1, index), x.scatter(-1, index, -torch.inf)
    largest = others.amax(-1, keepdim=True)
    origin = largest
    if softcap:
        own, others, origin = (softcap * torch.tanh(y.double() / softcap) for y in (own, others, origin))
        others = others.scatter(-1, index, -torch.inf)
    origin = origin.masked_fill(origin == -torch.inf, 0)
    distance = others - origin  # first, as float32 has it nearly exactly
    distance = distance / temperature if temperature != 1 else distance
    exp = distance.exp()
    sums = exp.double().sum(-1, keepdim=True)  # a float32 sum would lose digits of log p
    lead = (own.double() - origin.double()) / temperature
    lead = lead.masked_fill(lead == torch.inf, torch.nan)  # of a logit of inf
    log_sums = torch.where(sums == 0, 1, sums).log()
    logprob = torch.where(sums == 0, lead - lead, -softplus(log_sums - lead))
    log_total = torch.where(sums == 0, 0, torch.logaddexp(log_sums, lead))
    return Softmax(distance, exp, index, largest, sums, log_total, logprob)


def one_logprob(z: Tensor, index: Tensor) -> Tensor:
    """Return log p (..., 1) of the tokens `index` (..., 1), -log1p(sum of the others' exp(z) / its own)."""
    others, own = z.scatter(-1, index, -torch.inf), z.gather(-1, index)
    has_others = (others > -torch.inf).any(-1, keepdim=True) | others.isnan().any(-1, keepdim=True)
    log_others = others.masked_fill(~has_others, 0).logsumexp(-1, keepdim=True)
    is_bad = (own == torch.inf) | ~log_others.isfinite()  # softplus would hide it
    return -softplus(log_others - own).where(has_others, own - own).masked_fill(is_bad, torch.nan)


def gather_targets(softmax: Softmax, targets: Tensor) -> Tensor:
    """Return log p of the targets, 0 in ignored rows."""
    return softmax.logprob.squeeze(-1).masked_fill(targets == IGNORE_INDEX, 0)


def log_z(x: Tensor, softmax: Softmax, targets: Tensor, temperature: float, softcap: float) -> Tensor:
    """Return logsumexp z of raw logits x in float64, 0 in ignored rows."""
    is_alone = softmax.sums == 0
    origin = torch.where(is_alone, x.gather(-1, softmax.column), softmax.largest).double()
    log_z = scale_logits(origin, temperature, softcap) + torch.where(is_alone, softmax.logprob, softmax.log_total)
    return log_z.squeeze(-1).masked_fill(targets == IGNORE_INDEX, 0)


def is_top1(x: Tensor, softmax: Softmax, targets: Tensor) -> Tensor:
    """Return whether the target has the largest of raw logits x; False in ignored rows and in those with a NaN."""
    largest = x.gather(-1, softmax.column) >= softmax.largest
    return (largest & ~softmax.logprob.isnan()).squeeze(-1) & (targets != IGNORE_INDEX)


def entropy(softmax: Softmax, targets: Tensor) -> Tensor:
    """Return -sum p log p in nats, 0 in ignored rows; a token of probability 0 adds 0."""
    moment = (softmax.exp * softmax.finite_distance()).sum(-1, keepdim=True).double()
    of_others = softmax.scale * (softmax.log_total * softmax.sums - moment)
    of_target = softmax.logprob.exp() * zero_where_minus_inf(softmax.logprob)
    return (of_others - of_target).squeeze(-1).masked_fill(targets == IGNORE_INDEX, 0)


class KL(NamedTuple):
    """The exact KL of rows to a reference: log p - log p_ref where p is not 0, and its parts."""

    difference: Tensor  # (..., V): of the tokens but the target
    of_others: Tensor  # (..., 1)
    target_difference: Tensor
    of_target: Tensor


def exact_kl(softmax: Softmax, ref: Softmax) -> KL:
    p, exp = softmax.logprob.exp(), softmax.exp
    difference = (softmax.distance - ref.distance) - (softmax.log_total - ref.log_total).to(exp.dtype)
    difference = torch.where(exp == 0, 0, difference)
    of_others = softmax.scale * (exp * difference).sum(-1, keepdim=True)
    target_difference = torch.where(p == 0, 0, zero_where_minus_inf(softmax.logprob) - ref.logprob)
    return KL(difference, of_others, target_difference, p * target_difference)


def zero_where_minus_inf(logp: Tensor) -> Tensor:
    return logp.masked_fill(logp == -torch.inf, 0)


def row_statistics(softmax: Softmax, targets: Tensor) -> Tensor:
    """Return (2, ...), of all tokens but the target: the largest raw logit, and the sum of exp(z - its z); 0 in ignored
    rows. log p of the target and these two give p of every token without a sum that has lost the others."""
    statistics = torch.stack([softmax.largest.double().squeeze(-1), softmax.sums.squeeze(-1)])
    return statistics.masked_fill(targets == IGNORE_INDEX, 0)


class RowGrads(NamedTuple):
    """Coefficients (...) of the gradient by z of a loss of log p, entropy and the exact KL to a reference.

        of the target    target
        of the others    p (a + b log p + c (log p_ref - log p)),    p = scale exp(z - its origin)

    The origin is the z of the others' largest raw logit, log p = z - its origin + log_scale; of the reference alike.
    """

    scale: Tensor
    log_scale: Tensor
    a: Tensor
    b: Tensor
    target: Tensor
    c: Tensor | None = None
    ref_log_scale: Tensor | None = None


def row_grads(
    g: Tensor,
    h: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    sums: Tensor,
    kl: "KLRows | None" = None,
    log_z_grad: Tensor | None = None,
) -> RowGrads:
    """Return the coefficients in float64, given the gradients g, h and log_z_grad of log p, entropy and log_z of each
    row.

    sums: the second of `row_statistics`.
    """
    g, h, logprobs, entropy, sums = (x.double() for x in (g, h, logprobs, entropy, sums))
    rest, p = -torch.expm1(logprobs), logprobs.exp()  # 1 - p, without cancellation
    scale = torch.where(sums == 0, rest, rest / sums)  # of no others 0, or NaN
    logp = zero_where_minus_inf(logprobs)
    target = g * rest - h * p * (entropy + logp)
    a = -g - h * entropy
    if log_z_grad is not None:
        target = target + log_z_grad.double() * p
        a = a + log_z_grad.double()
    if kl is None:
        return RowGrads(scale, _log_scale(scale), a, -h, target)
    k, ref_logprobs, ref_sums, value, of_others = (x.double() for x in kl)
    ref_scale = torch.where(ref_sums > 0, -torch.expm1(ref_logprobs) / ref_sums, 0)
    difference = torch.where(p > 0, logp - ref_logprobs, 0)
    target = target + torch.where(k != 0, k * p * (rest * difference - of_others), 0)  # an unused KL may be infinite
    a = a - torch.where(k != 0, k * value, 0)
    return RowGrads(scale, _log_scale(scale), a, -h, target, -k, _log_scale(ref_scale))


def _log_scale(scale: Tensor) -> Tensor:
    return scale.log().clamp(min=-1e30)  # finite: its product with p = 0 must be 0


class KLRows(NamedTuple):
    """The KL of each row (...): the gradient by it, the reference's log p and sum, its value, and the part of the value
    that is of all tokens but the target."""

    grad: Tensor
    ref_logprobs: Tensor
    ref_sums: Tensor
    value: Tensor
    of_others: Tensor


def logits_grad(
    softmax: Softmax,
    targets: Tensor,
    g: Tensor,
    h: Tensor,
    k: Tensor | None = None,
    ref: Softmax | None = None,
    log_z_grad: Tensor | None = None,
) -> Tensor:
    """Return the gradient by z (..., V) of g log p(target) + h entropy + k KL + log_z_grad log_z; 0 in ignored rows.

        g (1[target] - p) - h p (log p + entropy) + k p (log p - log p_ref - KL) + log_z_grad p

    At the target, 1 - p is -expm1(log p), and log p - log p_ref - KL leaves its share of the KL out.
    """
    valid, dtype = targets != IGNORE_INDEX, softmax.exp.dtype
    g, h = (x.where(valid, 0).double()[..., None] for x in (g, h))
    p, rest, row_entropy = softmax.logprob.exp(), -torch.expm1(softmax.logprob), entropy(softmax, targets)[..., None]
    of_target = g * rest - h * p * (zero_where_minus_inf(softmax.logprob) + row_entropy)
    inner = softmax.finite_distance() * (-h).to(dtype) + (h * (softmax.log_total - row_entropy) - g).to(dtype)
    if log_z_grad is not None:
        log_z_grad = log_z_grad.where(valid, 0).double()[..., None]
        of_target, inner = of_target + log_z_grad * p, inner + log_z_grad.to(dtype)
    if k is not None and ref is not None:
        k = k.where(valid, 0).double()[..., None]
        kl = exact_kl(softmax, ref)
        of_target = of_target + (k * p * (rest * kl.target_difference - kl.of_others)).where(k != 0, 0)
        difference = kl.difference - (kl.of_others + kl.of_target).to(dtype)
        inner = inner + (k.to(dtype) * difference).where(k != 0, 0)  # an unused KL may be infinite
    scale = softmax.scale.to(dtype)
    rounding = torch.where(scale > torch.finfo(dtype).tiny, scale / softmax.scale, 1)  # so that the row sums to 0
    grad = softmax.exp * inner * scale
    return grad.scatter(-1, softmax.column, (of_target * rounding).to(dtype)).masked_fill(~valid[..., None], 0)


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
    with torch.autocast(hidden.device.type, enabled=False):
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
