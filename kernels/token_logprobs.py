"""Log-probability and entropy of every token of given logits, in one pass over them."""

from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels import _head_checks as head_checks
from rlhf_fast.kernels._launch import data_ptrs, dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_matrix, contiguous_float32, empty_float32, upcast, upcast_dtype

MAX_SPLIT_ROWS = 256  # two blocks for each SM of an H100


def _fake(logits, targets, *_rest):
    out = torch.empty(targets.shape, dtype=upcast_dtype(logits), device=logits.device)
    return out, torch.empty_like(out)


@op(fake=_fake)
def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return log p(target) and the entropy in nats, float32 in the shape of targets.

        z = cap(logits) / temperature        cap(x) = softcap tanh(x / softcap), or x where softcap is 0
        log p = z - logsumexp(z)             entropy = -sum p log p

    log p is computed as -log1p(sum of the others' exp(z) / its own): it and its gradient keep their relative precision
    where log p is near 0.

        logits (..., V): -inf is a token that cannot be sampled
        targets (...), int64 or int32: a target of -100 is ignored: its outputs and gradients are 0, and its logits are
            not read

    Row t predicts targets[t]: of a causal model's output pass logits[:, :-1] with labels[:, 1:]. Nothing is shifted
    here.

    A log-probability is never positive. Gradients: logits, through both outputs.

    Raises ValueError where shapes differ, logits are not floating point, or a target is out of range (the last only
    on the CPU).
    """
    head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
    x = upcast(logits).masked_fill((targets == head.IGNORE_INDEX)[..., None], 0)
    softmax = head.log_softmax(x, targets, temperature, softcap)
    return head.gather_targets(softmax, targets).to(x.dtype), head.entropy(softmax, targets).to(x.dtype)


@token_logprobs.normalize
def _(logits, targets, temperature, softcap):
    if not logits.dim() or targets.shape != logits.shape[:-1] or not logits.shape[-1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_logprobs: logits must be (..., V) and targets (...), V at least 1, got {shapes}")
    head_checks.check_scalars("token_logprobs", targets, temperature, softcap)
    return logits, targets, float(temperature), float(softcap)


def _kernel_inputs(kernels, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """Return logits (N, V) with contiguous rows, contiguous targets, and both as a compiled kernel takes them."""
    (code,) = dtype_codes(kernels, logits)
    logits, targets = as_matrix(logits.detach()), targets.contiguous()
    return logits, targets, (logits.data_ptr(), code, targets.data_ptr(), targets.dtype == torch.int64)


@token_logprobs.compiled(devices=("cpu",))
def _(kernels, logits, targets, temperature, softcap):
    logits, targets, inputs = _kernel_inputs(kernels, logits, targets)
    outputs = empty_float32(logits, *targets.shape), empty_float32(logits, *targets.shape)
    scalars = *logits.shape, logits.stride(0), temperature, softcap
    try:
        kernels.token_logprobs(*inputs, *data_ptrs(*outputs), *scalars, stream_or_threads(logits))
    except RuntimeError:
        head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
        raise
    return outputs


# Before Triton: on an H100 at 8192 x 151936 in bfloat16 0.97 ms on the device, Triton 1.17.
@token_logprobs.compiled(devices=("cuda",))
def _(kernels, logits, targets, temperature, softcap):
    head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
    logits, targets, inputs = _kernel_inputs(kernels, logits, targets)
    outputs = empty_float32(logits, *targets.shape), empty_float32(logits, *targets.shape)
    split_sums = _split_sums(kernels, logits)
    scalars = *logits.shape, logits.stride(0), temperature, softcap
    kernels.token_logprobs(*inputs, *data_ptrs(*outputs, split_sums), *scalars, stream_or_threads(logits))
    return outputs


def _split_sums(kernels: ModuleType, logits: Tensor) -> Tensor | None:
    """Return a buffer for the sums of blocks that share a row, or None if each row has one block. Rows are split where
    they are long, and too few to fill a GPU."""
    N, V = logits.shape
    splits = -(-V * logits.element_size() // kernels.token_logprobs_part_bytes)
    if splits <= 1 or N > MAX_SPLIT_ROWS:
        return None
    return empty_float32(logits, N, splits, kernels.token_logprobs_state_floats)


@op(fake=lambda _grad_logprobs, _grad_entropy, logits, *_rest: torch.empty_like(logits).contiguous())
def token_logprobs_backward(
    grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, temperature: float, softcap: float
) -> Tensor:
    """Return the gradient of the logits, in their dtype. It is rounded once."""
    x = upcast(logits).masked_fill((targets == head.IGNORE_INDEX)[..., None], 0)
    softmax = head.log_softmax(x, targets, temperature, softcap)
    dz = head.logits_grad(softmax, targets, grad_logprobs, grad_entropy)
    return (dz * head.scale_logits_grad(x, temperature, softcap)).to(logits.dtype).contiguous()


# Before Triton: on an H100 at 8192 x 151936 in bfloat16, with the forward pass, 3.06 ms, Triton 4.92.
@token_logprobs_backward.compiled
def _(kernels, grad_logprobs, grad_entropy, logits, targets, temperature, softcap):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits, targets, inputs = _kernel_inputs(kernels, logits, targets)
    grads = contiguous_float32(grad_logprobs, grad_entropy)
    scalars = *logits.shape, logits.stride(0), temperature, softcap
    kernels.token_logprobs_backward(*data_ptrs(*grads), *inputs, out.data_ptr(), *scalars, stream_or_threads(logits))
    return out


def _setup_context(ctx, inputs, _output):
    logits, targets, ctx.temperature, ctx.softcap = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx, grad_logprobs, grad_entropy):
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    scalars = ctx.temperature, ctx.softcap
    grad = token_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *scalars)
    return grad, None, None, None


token_logprobs.gradient(_backward, wrt=("logits",), setup_context=_setup_context)


@token_logprobs.cost
def _(gradient, logits, targets, *_scalars):
    """Count the logits twice with the gradient: the second pass starts when the first has ended."""
    read = int((targets != head.IGNORE_INDEX).sum()) * logits.shape[-1] * logits.element_size()
    outputs = targets.nbytes + 8 * targets.numel()
    return 2 * read + logits.nbytes + 2 * outputs if gradient else read + outputs, 0.0


def _make(shape, V, device, dtype, offset=0.0, spread=3.0, masked=0, ignored=0.2, index=torch.int64, **scalars):
    """The last `masked` columns are -inf. The logits of ignored rows are NaN."""
    logits = torch.randn(*shape, V, device=device) * spread + offset
    targets = torch.randint(V - masked, shape, device=device, dtype=index)
    if masked:
        logits[..., V - masked :] = -torch.inf
    is_ignored = torch.rand(shape, device=device) < ignored
    is_ignored.view(-1)[:1] = False
    targets = targets.masked_fill(is_ignored, head.IGNORE_INDEX)
    logits = logits.masked_fill(is_ignored[..., None], torch.nan)
    return logits.to(dtype).requires_grad_(), targets, scalars.get("temperature", 1.0), scalars.get("softcap", 0.0)


SMALL = [
    {"shape": (1,), "V": 2},
    {"shape": (3, 5), "V": 17, "temperature": 0.7},
    {"shape": (4,), "V": 1031, "offset": -100.0, "index": torch.int32},
    {"shape": (4,), "V": 2049, "offset": 60.0, "spread": 30.0, "softcap": 30.0, "temperature": 1.5},
    {"shape": (5,), "V": 33, "masked": 9, "spread": 20.0},
    {"shape": (2,), "V": 17001},
    {"shape": (0, 2), "V": 7},
]
LARGE = [{"shape": (256,), "V": 32000}, {"shape": (256,), "V": 50257}]
token_logprobs.inputs(small_sizes=SMALL, large_sizes=LARGE)(_make)


@token_logprobs_backward.inputs(small_sizes=SMALL, large_sizes=LARGE[:1])
def _(device, **size):
    logits, targets, *scalars = _make(device=device, **size)
    grads = torch.randn(2, *targets.shape, device=device)
    return *grads, logits.detach(), targets, *scalars
