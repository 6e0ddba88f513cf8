"""Exact KL divergence between the next-token distributions of a policy and a reference, without keeping logits."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _cpu_head as blocks
from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast


def _fake(hidden, weight, ref_hidden, ref_weight, targets, *rest):
    out = torch.empty(targets.shape, dtype=upcast(hidden[..., :0]).dtype, device=hidden.device)
    return out, torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


@op(fake=_fake)
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, entropy and kl = KL(policy || reference), nats, float32 in the shape of targets (...).

        kl = sum over the vocabulary of p (log p - log p_ref), of p and p_ref as `linear_logprobs` defines them

    hidden (..., D) and weight (V, D) are the policy's, ref_hidden (..., E) and ref_weight (V, E) the reference's.
    Exact, where the usual k1, k2 and k3 estimate it from the drawn token alone. targets as in `linear_logprobs`; -100
    is ignored: 0 out, 0 gradient. Gradients by hidden, weight and bias, of logprobs, entropy and kl; the reference is
    frozen. A token that only the reference rules out makes kl infinite. ValueError where shapes or the vocabularies'
    sizes do not fit, or a target is out of range (on CPU).
    """
    outputs = linear_kl_with_statistics.reference(
        hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias
    )
    return outputs[:4]


@linear_kl.normalize
def _(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    head.check_head("linear_kl", hidden, weight, targets, bias, temperature, softcap)
    head.check_head("linear_kl (reference)", ref_hidden, ref_weight, targets, ref_bias, temperature, softcap)
    if weight.shape[0] != ref_weight.shape[0]:
        sizes = f"{weight.shape[0]} and {ref_weight.shape[0]}"
        raise ValueError(f"linear_kl: weight and ref_weight must have one vocabulary, got {sizes} rows")
    ref_bias = ref_bias if ref_bias is None else ref_bias.detach()
    rest = ref_hidden.detach(), ref_weight.detach(), targets, float(temperature), float(softcap), bias, ref_bias
    return hidden, weight, *rest


def _heads(kernels, hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    scalars = temperature, softcap
    policy = blocks.Head(kernels, "linear_kl", hidden, weight, targets, bias, *scalars)
    return policy, blocks.Head(kernels, "linear_kl", ref_hidden, ref_weight, targets, ref_bias, *scalars)


@linear_kl.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    of, reference = _heads(kernels, *args)
    logprobs, entropy, _, _, ref_logprobs, kl, _, _ = of.statistics(reference)
    return tuple(map(of.expand, (logprobs, ref_logprobs, entropy, kl)))


def _fake_with_statistics(hidden, weight, ref_hidden, ref_weight, targets, *rest):
    outputs = _fake(hidden, weight, ref_hidden, ref_weight, targets)
    return *outputs, outputs[0].new_empty(4, *targets.shape)


@op(fake=_fake_with_statistics)
def linear_kl_with_statistics(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    bias: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_kl` gives, and what its backward pass needs: largest z and log sum exp(z - largest), of both."""
    head.check_targets("linear_kl", targets, weight.shape[0])
    z = head.scale(head.logits(hidden, weight, bias, targets), temperature, softcap)
    ref_z = head.scale(head.logits(ref_hidden, ref_weight, ref_bias, targets), temperature, softcap)
    logp, ref_logp = z.log_softmax(-1), ref_z.log_softmax(-1)
    kl = (logp.exp() * (head.finite(logp) - ref_logp.masked_fill(logp == -torch.inf, 0))).sum(-1)
    statistics = torch.cat([head.statistics_of(z, targets), head.statistics_of(ref_z, targets)])
    return (
        head.gathered(logp, targets),
        head.gathered(ref_logp, targets),
        head.entropy_of(logp, targets),
        kl.masked_fill(targets == head.IGNORED, 0),
        statistics,
    )


@linear_kl_with_statistics.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    of, reference = _heads(kernels, *args)
    logprobs, entropy, largest, log_sum, ref_logprobs, kl, ref_largest, ref_log_sum = map(
        of.expand, of.statistics(reference)
    )
    statistics = torch.stack([largest, log_sum, ref_largest, ref_log_sum])
    return logprobs, ref_logprobs, entropy, kl, statistics


def _fake_backward(
    grad_logprobs, grad_entropy, grad_kl, entropy, kl, statistics, hidden, weight, ref_hidden, ref_weight, targets,
    temperature, softcap, bias, ref_bias, *by,
):  # fmt: skip
    return head.empty_products(hidden, weight, bias, by)


@op(fake=_fake_backward)
def linear_kl_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_kl: Tensor,
    entropy: Tensor,
    kl: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each (0,) where not asked for; both logits are computed once more."""
    x = head.logits(hidden, weight, bias, targets)
    ref_z = head.scale(head.logits(ref_hidden, ref_weight, ref_bias, targets), temperature, softcap)
    largest, log_sum, ref_largest, ref_log_sum = upcast(statistics)[..., None]
    logp = head.scale(x, temperature, softcap) - largest - log_sum
    ref_logp = ref_z - ref_largest - ref_log_sum
    g, h, k = upcast(grad_logprobs), upcast(grad_entropy), upcast(grad_kl)
    dz = head.logits_gradient(logp, targets, g, -g - h * entropy - k * kl, -h, -k, ref_logp)
    by = by_hidden, by_weight, by_bias
    return head.products(dz * head.slope(x, temperature, softcap), hidden, weight, bias, targets, by)


@linear_kl_backward.compiled(required_symbols=blocks.KERNELS)
def _(kernels, grad_logprobs, grad_entropy, grad_kl, entropy, kl, statistics, *args):
    *args, by_hidden, by_weight, by_bias = args
    of, reference = _heads(kernels, *args)
    g, h, k, entropy, kl, largest, log_sum, *ref_statistics = (
        of.compact(x.flatten()) for x in (grad_logprobs, grad_entropy, grad_kl, entropy, kl, *statistics)
    )
    slopes = blocks.slopes(largest, log_sum, g, -g - h * entropy - k * kl, -h, -k, *ref_statistics)
    return of.gradients(slopes, (by_hidden, by_weight, by_bias), reference)


def _forward(ctx, *args):
    logprobs, ref_logprobs, entropy, kl, statistics = linear_kl_with_statistics.torch_op(*args)
    ctx.save_for_backward(entropy, kl, statistics, *(x for x in args if not isinstance(x, float)))
    ctx.scalars = args[5:7]
    ctx.mark_non_differentiable(ref_logprobs)
    return logprobs, ref_logprobs, entropy, kl


def _backward(ctx, grad_logprobs, _grad_ref_logprobs, grad_entropy, grad_kl):
    *saved, bias, ref_bias = ctx.saved_tensors
    by = [ctx.needs_input_grad[i] for i in (0, 1, 7)]
    grads = linear_kl_backward.torch_op(grad_logprobs, grad_entropy, grad_kl, *saved, *ctx.scalars, bias, ref_bias, *by)
    d_hidden, d_weight, d_bias = (grad if wanted else None for grad, wanted in zip(grads, by, strict=True))
    return d_hidden, d_weight, None, None, None, None, None, d_bias, None


linear_kl.gradient(_backward, forward=_forward)

SMALL = [
    {"N": 1, "D": 1, "E": 1, "V": 2},
    {"N": 7, "D": 17, "E": 9, "V": 33, "temperature": 0.7, "bias": True},
    {"N": 37, "D": 24, "E": 24, "V": 1031, "index": torch.int32},
    {"N": 9, "D": 8, "E": 8, "V": 2050, "softcap": 5.0, "temperature": 1.5},
    {"N": 5, "D": 3, "E": 3, "V": 11, "frozen_weight": True},
    {"N": 0, "D": 4, "E": 4, "V": 5},
]


@linear_kl.cost
def _(gradient, hidden, weight, ref_hidden, ref_weight, targets, *rest):
    moved, computed = head.cost(gradient, hidden, weight, targets)
    ref_moved, ref_computed = head.cost(False, ref_hidden, ref_weight, targets)
    return moved + ref_moved, computed + ref_computed


@linear_kl.inputs(small_sizes=SMALL, large_sizes=[{"N": 512, "D": 768, "E": 768, "V": 50257}])
def _make(
    N, D, E, V, device, dtype, bias=False, ignored=0.3, index=torch.int64, temperature=1.0, softcap=0.0,
    frozen_weight=False,
):  # fmt: skip
    """NaN stands in the hidden of ignored rows."""
    targets = torch.randint(V, (N,), device=device, dtype=index)
    off = (torch.rand(N, device=device) < ignored) & (torch.arange(N, device=device) > 0)
    hidden, ref_hidden = (2 * torch.randn(N, n, device=device).masked_fill(off[:, None], torch.nan) for n in (D, E))
    weight, ref_weight = (torch.randn(V, n, device=device) / n**0.5 for n in (D, E))
    bias, ref_bias = torch.randn(2, V, device=device, dtype=dtype) if bias else (None, None)
    return (
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen_weight), ref_hidden.to(dtype),
        ref_weight.to(dtype), targets.masked_fill(off, head.IGNORED), temperature, softcap,
        bias if bias is None else bias.detach().requires_grad_(), ref_bias,
    )  # fmt: skip


def _detached(args):
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)


@linear_kl_with_statistics.inputs(small_sizes=SMALL[1:4], large_sizes=[])
def _(**size):
    return _detached(_make(**size))


@linear_kl_backward.inputs(small_sizes=SMALL[1:5], large_sizes=[{"N": 1024, "D": 256, "E": 256, "V": 8192}])
def _(device, **size):
    args = _detached(_make(device=device, **size))
    _, _, entropy, kl, statistics = linear_kl_with_statistics.reference(*args)
    grads = torch.randn(3, *entropy.shape, device=device)
    return *grads, entropy, kl, statistics, *args, True, not size.get("frozen_weight"), args[7] is not None
