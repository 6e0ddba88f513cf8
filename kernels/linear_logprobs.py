"""Log-probability, entropy, log_z and top1 of every token under a linear head, without keeping the logits."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._cpu_head import KERNELS, CpuHead, pack_row_grads
from rlhf_fast.kernels._head_checks import check_head, check_targets
from rlhf_fast.kernels._head_inputs import cost, random_head_inputs
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import detached


def _fake(hidden, _weight, targets, *_options):
    rows = [head.empty_rows(hidden, targets) for _ in range(3)]
    return *rows, torch.empty_like(rows[0], dtype=torch.bool)


@op(fake=_fake)
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p(target), the entropy and log_z of each row, in nats, float32, and top1, bool. All have the shape of
    targets (...).

        z = softcap(hidden . weight' + bias) / temperature, softcap(x) = c tanh(x / c), c = 0 for none
        log_z = logsumexp z        log p = z - log_z        entropy = -sum p log p

    top1 is True where no raw logit, hidden . weight' + bias, is larger than the target's: also in a tie.

    log p and its gradient keep their relative precision where log p is near 0, as in `token_logprobs`.

    Row t predicts targets[t]: of a causal model's output pass hidden[:, :-1] with labels[:, 1:]. Nothing is shifted
    here.

    hidden (..., D), weight (V, D), bias (V,): floating point; the logits are float32 whatever their dtype. Only a block
        of logits exists at a time. Dtypes may differ, as of a bfloat16 hidden and a float32 weight: the products are
        then in float32, and nothing is rounded. torch.autocast does not change them; a hidden that it has made bfloat16
        is such a case. For products in bfloat16 pass weight.bfloat16().
    targets (...): int64 or int32. Rows of target -100 are ignored: their outputs are 0 and False, their gradients 0,
        their hidden is not read. On a CPU they take no products. On a GPU the library multiplies them too, unless
        16-bit rows of at most 2048 numbers are scored without a gradient: where many are ignored, index them away
        first.

    Gradients: of log p, entropy and log_z with respect to hidden, weight and bias, in their dtypes, summed in float32.
    A frozen tensor costs nothing.
    Raises ValueError where shapes do not fit, or a target is out of range (on CPU only).
    """
    return linear_logprobs_with_statistics.reference(hidden, weight, targets, bias, temperature, softcap)[:4]


@linear_logprobs.normalize
def _(hidden, weight, targets, bias, temperature, softcap):
    check_head("linear_logprobs", hidden, weight, targets, bias, temperature, softcap)
    return hidden, weight, targets, bias, float(temperature), float(softcap)


@linear_logprobs.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    cpu_head = CpuHead(kernels, "linear_logprobs", *args)
    logprobs, entropy, _, _, log_z, top1 = cpu_head.statistics()
    logprobs, entropy, log_z, top1 = map(cpu_head.scatter_valid, (logprobs, entropy, log_z, top1))
    return logprobs, entropy, log_z, top1.bool()


def _fake_with_statistics(hidden, weight, targets, *_options):
    outputs = _fake(hidden, weight, targets)
    return *outputs, outputs[0].new_empty(2, *targets.shape)


@linear_logprobs.variant(outputs=5, fake=_fake_with_statistics)
def linear_logprobs_with_statistics(hidden, weight, targets, bias, temperature, softcap):
    """Return the outputs of `linear_logprobs` and (2, ...) for its gradient, of all tokens but the target: the largest
    raw logit, and the sum of exp(z - its z)."""
    check_targets("linear_logprobs", targets, weight.shape[0])
    x = head.raw_logits(hidden, weight, bias, targets)
    softmax = head.log_softmax(x, targets, temperature, softcap)
    rows = (
        head.gather_targets(softmax, targets),
        head.entropy(softmax, targets),
        head.log_z(x, softmax, targets, temperature, softcap),
    )
    statistics = head.row_statistics(softmax, targets).to(x.dtype)
    return *(row.to(x.dtype) for row in rows), head.is_top1(x, softmax, targets), statistics


@linear_logprobs_with_statistics.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    cpu_head = CpuHead(kernels, "linear_logprobs", *args)
    logprobs, entropy, largest, sums, log_z, top1 = map(cpu_head.scatter_valid, cpu_head.statistics())
    return logprobs, entropy, log_z, top1.bool(), torch.stack([largest, sums])


def _fake_backward(*args):
    hidden, weight, _targets, bias, *options = args[6:]
    return head.empty_input_grads(hidden, weight, bias, options[2:])


@linear_logprobs.variant(
    outputs=3,
    tensors=("grad_logprobs", "grad_entropy", "grad_log_z", "logprobs", "entropy", "statistics"),
    flags=head.NEEDS_GRAD,
    fake=_fake_backward,
)
def linear_logprobs_backward(
    grad_logprobs, grad_entropy, grad_log_z, _logprobs, _entropy, _statistics, hidden, weight, targets, bias,
    temperature, softcap, *needs_grad,
):  # fmt: skip
    """Return the gradients of hidden, weight and bias, (0,) where not needed. The logits are computed again; kernels
    take p from logprobs, entropy and statistics, the outputs of the forward pass."""
    x = head.raw_logits(hidden, weight, bias, targets)
    softmax = head.log_softmax(x, targets, temperature, softcap)
    z_grad = head.logits_grad(softmax, targets, grad_logprobs, grad_entropy, log_z_grad=grad_log_z)
    raw_grad = (z_grad * head.scale_logits_grad(x, temperature, softcap)).to(x.dtype)
    return head.input_grads(raw_grad, hidden, weight, bias, targets, needs_grad)


@linear_logprobs_backward.compiled(required_symbols=KERNELS)
def _(kernels, grad_logprobs, grad_entropy, grad_log_z, logprobs, entropy, statistics, *args):
    cpu_head = CpuHead(kernels, "linear_logprobs", *args[:-3])
    rows = (grad_logprobs, grad_entropy, grad_log_z, logprobs, entropy, *statistics)
    g, h, log_z_grad, logprobs, entropy, largest, sums = (cpu_head.gather_valid(x.flatten()) for x in rows)
    grads = head.row_grads(g, h, logprobs, entropy, sums, log_z_grad=log_z_grad)
    return cpu_head.grads(pack_row_grads(largest, grads), args[-3:])


def _forward(ctx, *args):
    logprobs, entropy, log_z, top1, statistics = linear_logprobs_with_statistics.torch_op(*args)
    ctx.save_for_backward(logprobs, entropy, statistics, *args[:4])
    ctx.scalars = args[4:]
    ctx.mark_non_differentiable(top1)
    ctx.set_materialize_grads(False)
    return logprobs, entropy, log_z, top1


def _backward(ctx, *grads):
    logprobs = ctx.saved_tensors[0]
    zeros = None if all(grad is not None for grad in grads[:3]) else torch.zeros_like(logprobs)
    grad_logprobs, grad_entropy, grad_log_z = (zeros if grad is None else grad for grad in grads[:3])
    needs_grad = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = linear_logprobs_backward.torch_op(
        grad_logprobs, grad_entropy, grad_log_z, *ctx.saved_tensors, *ctx.scalars, *needs_grad
    )
    d_hidden, d_weight, d_bias = head.drop_unneeded(grads, needs_grad)
    return d_hidden, d_weight, None, d_bias, None, None


linear_logprobs.gradient(_backward, wrt=("hidden", "weight", "bias"), forward=_forward)

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
linear_logprobs.cost(cost)


@linear_logprobs.inputs(small_sizes=SMALL, large_sizes=LARGE)
def _make_inputs(N, D, V, device, dtype, temperature=1.0, softcap=0.0, **options):
    return *random_head_inputs(N, D, V, device, dtype, **options), temperature, softcap


@linear_logprobs_with_statistics.inputs(small_sizes=SMALL[1:4], large_sizes=[])
def _(**size):
    return detached(_make_inputs(**size))


@linear_logprobs_backward.inputs(small_sizes=SMALL[1:5], large_sizes=[{"N": 1024, "D": 256, "V": 8192, "bias": True}])
def _(device, **size):
    args = detached(_make_inputs(device=device, **size))
    logprobs, entropy, _, _, statistics = linear_logprobs_with_statistics.reference(*args)
    grads = torch.randn(3, *logprobs.shape, device=device)
    return *grads, logprobs, entropy, statistics, *args, True, not size.get("frozen_weight"), args[3] is not None
