"""Log-probability and entropy of every token under a linear head, without keeping the logits."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _cpu_head as blocks
from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast


def _fake(hidden, weight, targets, *rest):
    out = torch.empty(targets.shape, dtype=upcast(hidden[..., :0]).dtype, device=hidden.device)
    return out, torch.empty_like(out)


@op(fake=_fake)
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy, nats, float32, of targets (...), from hidden (..., D), weight (V, D), bias (V,).

        z = softcap(hidden . weight' + bias) / temperature, softcap(x) = c tanh(x / c), c = 0 for none
        log p = z - logsumexp z        entropy = -sum p log p

    The logits are float32 whatever the inputs, and only a block of them exists at a time. targets int64 or int32; -100
    is ignored: 0 out, 0 gradient, its hidden is not looked at. Such a row costs a CPU no products; on a GPU the
    library multiplies every row, unless 16-bit ones of at most 2048 are scored without a gradient: index them away
    first where they are many. Gradients of hidden, weight and bias, in their dtypes, summed in float32; a frozen one
    costs nothing. ValueError where shapes do not fit, or a target is out of range (on CPU).
    """
    return linear_logprobs_with_statistics.reference(hidden, weight, targets, bias, temperature, softcap)[:2]


@linear_logprobs.normalize
def _(hidden, weight, targets, bias, temperature, softcap):
    head.check_head("linear_logprobs", hidden, weight, targets, bias, temperature, softcap)
    return hidden, weight, targets, bias, float(temperature), float(softcap)


@linear_logprobs.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    of = blocks.Head(kernels, "linear_logprobs", *args)
    logprobs, entropy, _, _ = of.statistics()
    return of.expand(logprobs), of.expand(entropy)


def _fake_with_statistics(hidden, weight, targets, *rest):
    logprobs, entropy = _fake(hidden, weight, targets)
    return logprobs, entropy, logprobs.new_empty(2, *targets.shape)


@op(fake=_fake_with_statistics)
def linear_logprobs_with_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear_logprobs` gives, and what its backward pass needs: the largest z, log sum exp(z - largest)."""
    head.check_targets("linear_logprobs", targets, weight.shape[0])
    z = head.scale(head.logits(hidden, weight, bias, targets), temperature, softcap)
    logp = z.log_softmax(-1)
    return head.gathered(logp, targets), head.entropy_of(logp, targets), head.statistics_of(z, targets)


@linear_logprobs_with_statistics.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    of = blocks.Head(kernels, "linear_logprobs", *args)
    logprobs, entropy, largest, log_sum = map(of.expand, of.statistics())
    return logprobs, entropy, torch.stack([largest, log_sum])


def _fake_backward(grad_logprobs, grad_entropy, entropy, statistics, hidden, weight, targets, bias, *rest):
    return head.empty_products(hidden, weight, bias, rest[2:])


@op(fake=_fake_backward)
def linear_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    entropy: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, each (0,) where not asked for; the logits are computed once more."""
    x = head.logits(hidden, weight, bias, targets)
    largest, log_sum = upcast(statistics)[..., None]
    logp = head.scale(x, temperature, softcap) - largest - log_sum
    g, h = upcast(grad_logprobs), upcast(grad_entropy)
    dx = head.logits_gradient(logp, targets, g, -g - h * entropy, -h) * head.slope(x, temperature, softcap)
    return head.products(dx, hidden, weight, bias, targets, (by_hidden, by_weight, by_bias))


@linear_logprobs_backward.compiled(required_symbols=blocks.KERNELS)
def _(kernels, grad_logprobs, grad_entropy, entropy, statistics, *args):
    *args, by_hidden, by_weight, by_bias = args
    of = blocks.Head(kernels, "linear_logprobs", *args)
    g, h, entropy, largest, log_sum = (
        of.compact(x.flatten()) for x in (grad_logprobs, grad_entropy, entropy, *statistics)
    )
    slopes = blocks.slopes(largest, log_sum, g, -g - h * entropy, -h)
    return of.gradients(slopes, (by_hidden, by_weight, by_bias))


def _forward(ctx, hidden, weight, targets, bias, temperature, softcap):
    logprobs, entropy, statistics = linear_logprobs_with_statistics.torch_op(
        hidden, weight, targets, bias, temperature, softcap
    )
    ctx.save_for_backward(hidden, weight, targets, bias, entropy, statistics)
    ctx.scalars = temperature, softcap
    return logprobs, entropy


def _backward(ctx, grad_logprobs, grad_entropy):
    hidden, weight, targets, bias, entropy, statistics = ctx.saved_tensors
    by = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_logprobs_backward.torch_op(
        grad_logprobs, grad_entropy, entropy, statistics, hidden, weight, targets, bias, *ctx.scalars, *by
    )
    d_hidden, d_weight, d_bias = (grad if wanted else None for grad, wanted in zip(grads, by, strict=True))
    return d_hidden, d_weight, None, d_bias, None, None


linear_logprobs.gradient(_backward, forward=_forward)

SMALL = [
    {"N": 1, "D": 1, "V": 2},
    {"N": 7, "D": 17, "V": 33, "temperature": 0.7, "bias": True},
    {"N": 37, "D": 24, "V": 1031, "offset": -100.0, "index": torch.int32},
    {"N": 9, "D": 8, "V": 2050, "softcap": 5.0, "temperature": 1.5, "bias": True},
    {"N": 5, "D": 3, "V": 11, "frozen_weight": True},
    {"N": 5, "D": 3, "V": 11, "frozen_hidden": True},
    {"N": 0, "D": 4, "V": 5},
]
LARGE = [{"N": 512, "D": 768, "V": 50257}, {"N": 2048, "D": 256, "V": 8192}]


@linear_logprobs.cost
def _(gradient, hidden, weight, targets, *rest):
    return head.cost(gradient, hidden, weight, targets)


@linear_logprobs.inputs(small_sizes=SMALL, large_sizes=LARGE)
def _make(N, D, V, device, dtype, temperature=1.0, softcap=0.0, **options):
    return *head.make_head(N, D, V, device, dtype, **options), temperature, softcap


@linear_logprobs_with_statistics.inputs(small_sizes=SMALL[1:4], large_sizes=[])
def _(device, **size):
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in _make(device=device, **size))


@linear_logprobs_backward.inputs(small_sizes=SMALL[1:5], large_sizes=[{"N": 1024, "D": 256, "V": 8192, "bias": True}])
def _(device, **size):
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in _make(device=device, **size)]
    _, entropy, statistics = linear_logprobs_with_statistics.reference(*args)
    grads = torch.randn(2, *entropy.shape, device=device)
    return *grads, entropy, statistics, *args, True, not size.get("frozen_weight"), args[3] is not None
