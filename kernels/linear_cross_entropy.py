"""Cross-entropy of a linear head, its gradients made in the forward pass: three products, no kept logits."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _cpu_head as blocks
from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import upcast


def _fake(hidden, weight, targets, *rest):
    logprobs = torch.empty(targets.shape, dtype=upcast(hidden[..., :0]).dtype, device=hidden.device)
    return logprobs.new_empty(()), logprobs


@op(fake=_fake)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """loss () and log p(target) of targets (...), nats, float32, from hidden (..., D), weight (V, D), bias (V,).

        loss = -sum weights * log p(target), log p as `linear_logprobs` defines it

    weights, in the shape of targets, belong to the caller: with 1 / (tokens of the whole optimizer batch) the losses of
    micro-batches add up. None means 1 / (targets not ignored) of this call. targets of -100 are ignored, as in
    `linear_logprobs`. Gradients of hidden, weight and bias come with the loss, in their dtypes, summed in float32; a
    frozen one costs nothing. logprobs has no gradient (for that, `linear_logprobs`), nor have weights. ValueError where
    shapes do not fit, or a target is out of range (on CPU).
    """
    head.check_targets("linear_cross_entropy", targets, weight.shape[0])
    logp = head.scale(head.logits(hidden, weight, bias, targets), 1.0, softcap).log_softmax(-1)
    logprobs = head.gathered(logp, targets)
    weights = head.default_weights(weights, targets)
    return -torch.where(weights != 0, weights * logprobs, 0).sum(), logprobs.detach()


@linear_cross_entropy.normalize
def _(hidden, weight, targets, weights, bias, softcap):
    head.check_head("linear_cross_entropy", hidden, weight, targets, bias, 1.0, softcap)
    head.check_rows("linear_cross_entropy", targets, weights=weights)
    return hidden, weight, targets, weights if weights is None else weights.detach(), bias, float(softcap)


@linear_cross_entropy.compiled(required_symbols=blocks.KERNELS)
def _(kernels, *args):
    return _train(kernels, *args, False, False, False)[:2]


def _train(kernels, hidden, weight, targets, weights, bias, softcap, *by):
    of = blocks.Head(kernels, "linear_cross_entropy", hidden, weight, targets, bias, 1.0, softcap)
    g = of.compact(-head.default_weights(weights, targets).flatten())

    def slopes(results, rows):
        _, _, largest, log_sum = results
        return blocks.slopes(largest, log_sum, g[rows], -g[rows])

    results, grads = of.train(slopes, by)
    return torch.where(g != 0, g * results[0], 0).sum(), of.expand(results[0]), *grads


def _fake_with_gradients(hidden, weight, targets, weights, bias, softcap, *by):
    return *_fake(hidden, weight, targets), *head.empty_products(hidden, weight, bias, by)


@op(fake=_fake_with_gradients)
def linear_cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    by_hidden: bool,
    by_weight: bool,
    by_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `linear_cross_entropy` gives, then the loss's gradients by hidden, weight and bias, (0,) if unwanted."""
    head.check_targets("linear_cross_entropy", targets, weight.shape[0])
    x = head.logits(hidden, weight, bias, targets)
    logp = head.scale(x, 1.0, softcap).log_softmax(-1)
    logprobs, g = head.gathered(logp, targets), -head.default_weights(weights, targets)
    dz = head.logits_gradient(logp, targets, g, -g, torch.zeros_like(g))
    grads = head.products(
        dz * head.slope(x, 1.0, softcap), hidden, weight, bias, targets, (by_hidden, by_weight, by_bias)
    )
    return torch.where(g != 0, g * logprobs, 0).sum(), logprobs, *grads


linear_cross_entropy_with_gradients.compiled(_train, required_symbols=blocks.KERNELS)


def _forward(ctx, *args):
    by = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    loss, logprobs, *grads = linear_cross_entropy_with_gradients.torch_op(*args, *by)
    head.keep(ctx, grads, by, args)
    ctx.mark_non_differentiable(logprobs)
    return loss, logprobs


def _backward(ctx, grad_loss, _grad_logprobs):
    d_hidden, d_weight, d_bias = head.scaled(ctx, grad_loss, linear_cross_entropy_with_gradients.torch_op)
    return d_hidden, d_weight, None, None, d_bias, None


linear_cross_entropy.gradient(_backward, forward=_forward)

SMALL = [
    {"N": 1, "D": 1, "V": 2},
    {"N": 7, "D": 17, "V": 33, "bias": True, "weighted": True},
    {"N": 37, "D": 24, "V": 1031, "offset": -100.0, "index": torch.int32},
    {"N": 9, "D": 8, "V": 2050, "softcap": 5.0, "bias": True},
    {"N": 5, "D": 3, "V": 11, "frozen_weight": True},
    {"N": 5, "D": 3, "V": 11, "frozen_hidden": True, "weighted": True},
    {"N": 0, "D": 4, "V": 5},
]


@linear_cross_entropy.cost
def _(gradient, hidden, weight, targets, *rest):
    return head.cost(gradient, hidden, weight, targets)


@linear_cross_entropy.inputs(
    small_sizes=SMALL, large_sizes=[{"N": 512, "D": 768, "V": 50257}, {"N": 2048, "D": 256, "V": 8192}]
)
def _make(N, D, V, device, dtype, softcap=0.0, weighted=False, **options):
    """weighted: NaN stands in the weights of ignored rows."""
    hidden, weight, targets, bias = head.make_head(N, D, V, device, dtype, **options)
    weights = torch.rand(N, device=device).masked_fill(targets == head.IGNORED, torch.nan) if weighted else None
    return hidden, weight, targets, weights, bias, softcap


@linear_cross_entropy_with_gradients.inputs(
    small_sizes=SMALL[1:4], large_sizes=[{"N": 1024, "D": 256, "V": 8192, "bias": True}]
)
def _(**size):
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in _make(**size))
    return *args, True, True, args[4] is not None
