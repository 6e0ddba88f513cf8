"""Cross-entropy of a linear head. The forward pass makes the gradients: three matrix products, no logits are kept."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._cpu_head import KERNELS, CpuHead, pack_row_grads
from rlhf_fast.kernels._head_checks import check_head, check_rows, check_targets
from rlhf_fast.kernels._head_inputs import cost, random_head_inputs
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import detached, token_weights


def _fake(hidden, _weight, targets, *_options):
    logprobs = head.empty_rows(hidden, targets)
    return logprobs.new_empty(()), logprobs


@op(fake=_fake)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | float | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss () and log p(target) of each row (...), in nats, float32.

        loss = -sum weights * log p(target), log p as `linear_logprobs` defines it

    hidden (..., D), weight (V, D), bias (V,), softcap, temperature: as in `linear_logprobs`, with its rules of dtypes
        and torch.autocast.
    targets (...): as in `linear_logprobs`. Row t predicts targets[t]: of a causal model's output pass hidden[:, :-1]
        with labels[:, 1:]. Rows of target -100 are ignored.
    weights (...), or a number or tensor () for all rows: with 1 / (tokens of the whole optimizer batch) the losses of
        micro-batches add up. None stands for 1 / (targets of this call that are not ignored).

    Gradients: of the loss with respect to hidden, weight and bias, in their dtypes, summed in float32. A frozen tensor
    costs nothing. logprobs and weights have none (use `linear_logprobs`).
    Raises ValueError where shapes do not fit, or a target is out of range (on CPU only).
    """
    check_targets("linear_cross_entropy", targets, weight.shape[0])
    x = head.raw_logits(hidden, weight, bias, targets)
    logprobs = head.gather_targets(head.log_softmax(x, targets, temperature, softcap), targets).to(x.dtype)
    weights = head.default_weights(weights, targets)  # type: ignore[arg-type]  # no number: `normalize` made a tensor
    return -torch.where(weights != 0, weights * logprobs, 0).sum(), logprobs.detach()


@linear_cross_entropy.normalize
def _(hidden, weight, targets, weights, bias, softcap, temperature):
    check_head("linear_cross_entropy", hidden, weight, targets, bias, temperature, softcap)
    if weights is not None:
        weights = token_weights(weights, hidden, targets.shape).detach()
    check_rows("linear_cross_entropy", targets, weights=weights)
    return hidden, weight, targets, weights, bias, float(softcap), float(temperature)


@linear_cross_entropy.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    return _launch(kernels, *args, False, False, False)[:2]


def _launch(kernels, hidden, weight, targets, weights, bias, softcap, temperature, *needs_grad):
    cpu_head = CpuHead(kernels, "linear_cross_entropy", hidden, weight, targets, bias, temperature, softcap)
    g = cpu_head.gather_valid(-head.default_weights(weights, targets).flatten())

    def coefficients_of(results, rows):
        logprobs, entropy, largest, sums, *_ = results
        return pack_row_grads(largest, head.row_grads(g[rows], torch.zeros_like(g[rows]), logprobs, entropy, sums))

    results, grads = cpu_head.results_and_grads(coefficients_of, needs_grad)
    logprobs = results[0]
    return torch.where(g != 0, g * logprobs, 0).sum(), cpu_head.scatter_valid(logprobs), *grads


def _fake_with_gradients(hidden, weight, targets, _weights, bias, _softcap, _temperature, *needs_grad):
    return *_fake(hidden, weight, targets), *head.empty_input_grads(hidden, weight, bias, needs_grad)


@linear_cross_entropy.variant(outputs=5, flags=head.NEEDS_GRAD, fake=_fake_with_gradients)
def linear_cross_entropy_with_gradients(hidden, weight, targets, weights, bias, softcap, temperature, *needs_grad):
    """Return the outputs of `linear_cross_entropy` and the loss's gradients of hidden, weight and bias, (0,) where not
    needed."""
    check_targets("linear_cross_entropy", targets, weight.shape[0])
    x = head.raw_logits(hidden, weight, bias, targets)
    softmax = head.log_softmax(x, targets, temperature, softcap)
    logprobs, g = head.gather_targets(softmax, targets).to(x.dtype), -head.default_weights(weights, targets)
    z_grad = head.logits_grad(softmax, targets, g, torch.zeros_like(g))
    raw_grad = (z_grad * head.scale_logits_grad(x, temperature, softcap)).to(x.dtype)
    grads = head.input_grads(raw_grad, hidden, weight, bias, targets, needs_grad)
    return torch.where(g != 0, g * logprobs, 0).sum(), logprobs, *grads


linear_cross_entropy_with_gradients.compiled(_launch, required_symbols=KERNELS)


def _forward(ctx, *args):
    needs_grad = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    loss, logprobs, *grads = linear_cross_entropy_with_gradients.torch_op(*args, *needs_grad)
    head.save_grads(ctx, grads, needs_grad, args)
    ctx.mark_non_differentiable(logprobs)
    return loss, logprobs


def _backward(ctx, grad_loss, _grad_logprobs):
    d_hidden, d_weight, d_bias = head.scale_grads(ctx, grad_loss, linear_cross_entropy_with_gradients.torch_op)
    return d_hidden, d_weight, None, None, d_bias, None, None


linear_cross_entropy.gradient(_backward, wrt=("hidden", "weight", "bias"), forward=_forward)
linear_cross_entropy.cost(cost)

SMALL = [
    {"N": 1, "D": 1, "V": 2},
    {"N": 7, "D": 17, "V": 33, "bias": True, "weighted": True},
    {"N": 37, "D": 24, "V": 1031, "offset": -100.0, "index": torch.int32, "weights": 0.03, "temperature": 0.7},
    {"N": 9, "D": 8, "V": 2050, "softcap": 5.0, "bias": True, "temperature": 1.5},
    {"N": 5, "D": 3, "V": 11, "frozen_weight": True},
    {"N": 5, "D": 3, "V": 11, "frozen_hidden": True, "weighted": True},
    {"N": 0, "D": 4, "V": 5},
]
LARGE = [{"N": 512, "D": 768, "V": 50257}, {"N": 2048, "D": 256, "V": 8192}]


@linear_cross_entropy.inputs(small_sizes=SMALL, large_sizes=LARGE)
def _make_inputs(N, D, V, device, dtype, softcap=0.0, temperature=1.0, weights=None, weighted=False, **options):
    """weighted: with weights of each row, which are NaN in ignored rows."""
    hidden, weight, targets, bias = random_head_inputs(N, D, V, device, dtype, **options)
    if weighted:
        weights = torch.rand(N, device=device).masked_fill(targets == head.IGNORE_INDEX, torch.nan)
    return hidden, weight, targets, weights, bias, softcap, temperature


@linear_cross_entropy_with_gradients.inputs(
    small_sizes=SMALL[1:4], large_sizes=[{"N": 1024, "D": 256, "V": 8192, "bias": True}]
)
def _(**size):
    args = list(detached(_make_inputs(**size)))
    if isinstance(args[3], float):
        args[3] = torch.full(args[2].shape, args[3], device=args[2].device)
    return *args, True, True, args[4] is not None
