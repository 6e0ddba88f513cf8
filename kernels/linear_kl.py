"""Exact KL divergence between the next-token distributions of a policy and a reference, without keeping logits."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._cpu_head import KERNELS, CpuHead, pack_row_grads
from rlhf_fast.kernels._head_checks import check_head, check_targets
from rlhf_fast.kernels._head_inputs import cost
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import detached


def _fake(hidden, _weight, _ref_hidden, _ref_weight, targets, *_options):
    return tuple(head.empty_rows(hidden, targets) for _ in range(4))


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
    """Return logprobs, ref_logprobs, entropy and kl = KL(policy || reference), nats, float32 in the shape of targets.

        kl = sum over the vocabulary of p (log p - log p_ref), p and p_ref as `linear_logprobs` defines them

    The value is exact; k1, k2 and k3 estimate it from the sampled token alone. It is infinite where the reference gives
    probability 0 to a token that the policy may sample.

    hidden (..., D), weight (V, D), bias (V,): the policy's. Dtypes and torch.autocast: as in `linear_logprobs`.
    ref_hidden (..., E), ref_weight (V, E), ref_bias (V,): the reference's.
    targets (...): as in `linear_logprobs`. Row t predicts targets[t]: of a causal model's output pass hidden[:, :-1]
        with labels[:, 1:]. Rows of target -100 are ignored: their outputs and gradients are 0.

    Gradients: of logprobs, entropy and kl with respect to hidden, weight and bias; the reference is frozen.
    Raises ValueError where shapes or vocabulary sizes do not fit, or a target is out of range (on CPU only).
    """
    outputs = linear_kl_with_statistics.reference(
        hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias
    )
    return outputs[:4]


@linear_kl.normalize
def _(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    check_head("linear_kl", hidden, weight, targets, bias, temperature, softcap)
    check_head("linear_kl (reference)", ref_hidden, ref_weight, targets, ref_bias, temperature, softcap)
    if weight.shape[0] != ref_weight.shape[0]:
        sizes = f"{weight.shape[0]} and {ref_weight.shape[0]}"
        raise ValueError(f"linear_kl: weight and ref_weight must have one vocabulary, got {sizes} rows")
    ref_hidden, ref_weight, ref_bias = detached((ref_hidden, ref_weight, ref_bias))
    return hidden, weight, ref_hidden, ref_weight, targets, float(temperature), float(softcap), bias, ref_bias


def _cpu_heads(kernels, hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    policy = CpuHead(kernels, "linear_kl", hidden, weight, targets, bias, temperature, softcap)
    return policy, CpuHead(kernels, "linear_kl", ref_hidden, ref_weight, targets, ref_bias, temperature, softcap)


@linear_kl.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    policy, reference = _cpu_heads(kernels, *args)
    logprobs, entropy, _, _, _, _, ref_logprobs, kl, *_ = policy.statistics(reference)
    return tuple(map(policy.scatter_valid, (logprobs, ref_logprobs, entropy, kl)))


def _fake_with_statistics(hidden, weight, ref_hidden, ref_weight, targets, *_options):
    outputs = _fake(hidden, weight, ref_hidden, ref_weight, targets)
    return *outputs, outputs[0].new_empty(5, *targets.shape)


@linear_kl.variant(outputs=5, fake=_fake_with_statistics)
def linear_kl_with_statistics(hidden, weight, ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias):
    """Return the outputs of `linear_kl` and (5, ...) for its gradient, of all tokens but the target: the largest raw
    logit and the sum of exp(z - its z), of the policy and of the reference, and the sum of p (log p - log p_ref)."""
    check_targets("linear_kl", targets, weight.shape[0])
    x = head.raw_logits(hidden, weight, bias, targets)
    ref_x = head.raw_logits(ref_hidden, ref_weight, ref_bias, targets)
    policy, reference = (head.log_softmax(logits, targets, temperature, softcap) for logits in (x, ref_x))
    kl = head.exact_kl(policy, reference)
    of_others, of_target = (
        part.squeeze(-1).masked_fill(targets == head.IGNORE_INDEX, 0) for part in (kl.of_others, kl.of_target)
    )
    statistics = [head.row_statistics(softmax, targets) for softmax in (policy, reference)]
    rows = (
        head.gather_targets(policy, targets),
        head.gather_targets(reference, targets),
        head.entropy(policy, targets),
        of_others + of_target,
        torch.cat([*statistics, of_others[None]]),
    )
    return tuple(row.to(x.dtype) for row in rows)


@linear_kl_with_statistics.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    policy, reference = _cpu_heads(kernels, *args)
    rows = map(policy.scatter_valid, policy.statistics(reference))
    logprobs, entropy, largest, sums, _, _, ref_logprobs, kl, *others = rows
    return logprobs, ref_logprobs, entropy, kl, torch.stack([largest, sums, *others])


_ROWS = ("logprobs", "ref_logprobs", "entropy", "kl")


def _fake_backward(*args):
    hidden, weight, bias = args[8], args[9], args[15]
    return head.empty_input_grads(hidden, weight, bias, args[-3:])


@linear_kl.variant(
    outputs=3,
    tensors=("grad_logprobs", "grad_entropy", "grad_kl", *_ROWS, "statistics"),
    flags=head.NEEDS_GRAD,
    fake=_fake_backward,
)
def linear_kl_backward(
    grad_logprobs, grad_entropy, grad_kl, _logprobs, _ref_logprobs, _entropy, _kl, _statistics, hidden, weight,
    ref_hidden, ref_weight, targets, temperature, softcap, bias, ref_bias, *needs_grad,
):  # fmt: skip
    """Return the gradients of hidden, weight and bias, (0,) where not needed. Both logits are computed again; kernels
    take p from the outputs of the forward pass."""
    x = head.raw_logits(hidden, weight, bias, targets)
    ref_x = head.raw_logits(ref_hidden, ref_weight, ref_bias, targets)
    policy, reference = (head.log_softmax(logits, targets, temperature, softcap) for logits in (x, ref_x))
    z_grad = head.logits_grad(policy, targets, grad_logprobs, grad_entropy, grad_kl, reference)
    raw_grad = (z_grad * head.scale_logits_grad(x, temperature, softcap)).to(x.dtype)
    return head.input_grads(raw_grad, hidden, weight, bias, targets, needs_grad)


@linear_kl_backward.compiled(required_symbols=KERNELS)
def _(kernels, *args):
    policy, reference = _cpu_heads(kernels, *args[8:-3])
    g, h, k, logprobs, ref_logprobs, entropy, kl, largest, sums, ref_largest, ref_sums, kl_of_others = (
        policy.gather_valid(x.flatten()) for x in (*args[:7], *args[7])
    )
    kl_rows = head.KLRows(k, ref_logprobs, ref_sums, kl, kl_of_others)
    grads = head.row_grads(g, h, logprobs, entropy, sums, kl_rows)
    # The reference's log p of a target more than 103 nats ahead is 0 in float32: its logit says how far it is.
    rows, columns = reference.hidden.float(), reference.weight[reference.targets].float()
    own = (rows * columns).sum(-1) + (0 if reference.bias is None else reference.bias[reference.targets])
    z, z_largest = (head.scale_logits(x.double(), *reference.scalars) for x in (own, ref_largest))
    log_total = torch.logaddexp(z - z_largest, ref_sums.double().log())
    grads = grads._replace(ref_log_scale=(-log_total).clamp(min=-1e30))
    return policy.grads(pack_row_grads(largest, grads, ref_largest), args[-3:], reference)


def _forward(ctx, *args):
    logprobs, ref_logprobs, entropy, kl, statistics = linear_kl_with_statistics.torch_op(*args)
    ctx.save_for_backward(logprobs, ref_logprobs, entropy, kl, statistics, *args[:5], *args[7:])
    ctx.scalars = args[5:7]
    ctx.mark_non_differentiable(ref_logprobs)
    return logprobs, ref_logprobs, entropy, kl


def _backward(ctx, grad_logprobs, _grad_ref_logprobs, grad_entropy, grad_kl):
    *saved, bias, ref_bias = ctx.saved_tensors
    needs_grad = [ctx.needs_input_grad[i] for i in (0, 1, 7)]
    grads = linear_kl_backward.torch_op(
        grad_logprobs, grad_entropy, grad_kl, *saved, *ctx.scalars, bias, ref_bias, *needs_grad
    )
    d_hidden, d_weight, d_bias = head.drop_unneeded(grads, needs_grad)
    return d_hidden, d_weight, None, None, None, None, None, d_bias, None


linear_kl.gradient(_backward, wrt=("hidden", "weight", "bias"), forward=_forward)

SMALL = [
    {"N": 1, "D": 1, "E": 1, "V": 2},
    {"N": 7, "D": 17, "E": 9, "V": 33, "temperature": 0.7, "bias": True},
    {"N": 37, "D": 24, "E": 24, "V": 1031, "index": torch.int32},
    {"N": 9, "D": 8, "E": 8, "V": 2050, "softcap": 5.0, "temperature": 1.5},
    {"N": 5, "D": 3, "E": 3, "V": 11, "frozen_weight": True},
    {"N": 0, "D": 4, "E": 4, "V": 5},
]


@linear_kl.cost
def _(gradient, hidden, weight, ref_hidden, ref_weight, targets, *_options):
    moved, computed = cost(gradient, hidden, weight, targets)
    ref_moved, ref_computed = cost(False, ref_hidden, ref_weight, targets)
    return moved + ref_moved, computed + ref_computed


@linear_kl.inputs(small_sizes=SMALL, large_sizes=[{"N": 512, "D": 768, "E": 768, "V": 50257}])
def _make_inputs(
    N, D, E, V, device, dtype, bias=False, ignored=0.3, index=torch.int64, temperature=1.0, softcap=0.0,
    frozen_weight=False,
):  # fmt: skip
    """hidden and ref_hidden are NaN in ignored rows."""
    targets = torch.randint(V, (N,), device=device, dtype=index)
    is_ignored = (torch.rand(N, device=device) < ignored) & (torch.arange(N, device=device) > 0)
    targets = targets.masked_fill(is_ignored, head.IGNORE_INDEX)
    hidden, ref_hidden = (
        2 * torch.randn(N, n, device=device).masked_fill(is_ignored[:, None], torch.nan).to(dtype) for n in (D, E)
    )
    weight, ref_weight = ((torch.randn(V, n, device=device) / n**0.5).to(dtype) for n in (D, E))
    bias, ref_bias = map(torch.clone, torch.randn(2, V, device=device, dtype=dtype)) if bias else (None, None)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(not frozen_weight),
        ref_hidden,
        ref_weight,
        targets,
        temperature,
        softcap,
        bias if bias is None else bias.requires_grad_(),
        ref_bias,
    )


@linear_kl_with_statistics.inputs(small_sizes=SMALL[1:4], large_sizes=[])
def _(**size):
    return detached(_make_inputs(**size))


@linear_kl_backward.inputs(small_sizes=SMALL[1:5], large_sizes=[{"N": 1024, "D": 256, "E": 256, "V": 8192}])
def _(device, **size):
    args = detached(_make_inputs(device=device, **size))
    outputs = linear_kl_with_statistics.reference(*args)
    grads = torch.randn(3, *outputs[0].shape, device=device)
    return *grads, *outputs, *args, True, not size.get("frozen_weight"), args[7] is not None
