"""Log-probability and entropy of every token of given logits, in one visit of them."""

import torch
from torch import Tensor

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels import _head_checks as head_checks
from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_matrix, upcast

FEW_ROWS = 256  # two blocks a processor of an H100


def _fake(logits, targets, *rest):
    out = torch.empty(targets.shape, dtype=upcast(logits[..., :0]).dtype, device=logits.device)
    return out, torch.empty_like(out)


@op(fake=_fake)
def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy, nats, float32 in the shape of targets (...), of logits (..., V).

        z = softcap(logits) / temperature, softcap(x) = c tanh(x / c), c = 0 for none      log p = z - logsumexp z
        entropy = -sum p log p

    targets int64 or int32; -100 is ignored: 0 out, 0 gradient, its logits are not looked at. Logits of -inf are tokens
    that cannot be drawn. A log-probability is never positive. Both outputs have a gradient. ValueError where shapes
    differ, or a target is out of range (on CPU).
    """
    head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
    x = upcast(logits).masked_fill((targets == head.IGNORE_INDEX)[..., None], 0)
    logp = head.scale_logits(x, temperature, softcap).log_softmax(-1)
    return head.gather_targets(logp, targets), head.entropy(logp, targets)


@token_logprobs.normalize
def _(logits, targets, temperature, softcap):
    if not logits.dim() or targets.shape != logits.shape[:-1] or not logits.shape[-1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"token_logprobs: logits must be (..., V) and targets (...), V at least 1, got {shapes}")
    head_checks.check_scalars("token_logprobs", targets, temperature, softcap)
    return logits, targets, float(temperature), float(softcap)


def _prepared(kernels, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple]:
    """logits (N, V) with their last dimension dense, N targets, and how a kernel is told of both."""
    (code,) = dtype_codes(kernels, logits)
    x, targets = as_matrix(logits.detach()), targets.contiguous()
    return x, targets, (x.data_ptr(), code, targets.data_ptr(), targets.dtype == torch.int64)


@token_logprobs.compiled(devices=("cpu",))
def _(kernels, logits, targets, temperature, softcap):
    x, targets, given = _prepared(kernels, logits, targets)
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    entropy = torch.empty_like(logprobs)
    try:
        kernels.token_logprobs(
            *given,
            logprobs.data_ptr(),
            entropy.data_ptr(),
            *x.shape,
            x.stride(0),
            temperature,
            softcap,
            stream_or_threads(x),
        )
    except RuntimeError:
        head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
        raise
    return logprobs, entropy


@token_logprobs.compiled(devices=("cuda",))
def _(kernels, logits, targets, temperature, softcap):
    head_checks.check_targets("token_logprobs", targets, logits.shape[-1])
    x, targets, given = _prepared(kernels, logits, targets)
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    entropy, parts = torch.empty_like(logprobs), _parts(x)
    kernels.token_logprobs(
        *given, logprobs.data_ptr(), entropy.data_ptr(), 0 if parts is None else parts.data_ptr(), *x.shape,
        x.stride(0), temperature, softcap, stream_or_threads(x),
    )  # fmt: skip
    return logprobs, entropy


def _parts(x: Tensor) -> Tensor | None:
    """Where the blocks that share a row leave their sums, for long rows too few to fill a GPU with a block each.
    csrc/cuda/token_logprobs.cu has these numbers too: 2048 words of 16 bytes a part, 256 threads, 3 sums of each."""
    N, V = x.shape
    parts = -(-V * x.element_size() // (2048 * 16))
    return torch.empty(N, parts, 3, 256, dtype=torch.float32, device=x.device) if parts > 1 and N <= FEW_ROWS else None


@op(fake=lambda grad_logprobs, grad_entropy, logits, *rest: torch.empty_like(logits).contiguous())
def token_logprobs_backward(
    grad_logprobs: Tensor, grad_entropy: Tensor, logits: Tensor, targets: Tensor, temperature: float, softcap: float
) -> Tensor:
    """Gradient of the logits, in their dtype: formed in float32, rounded once."""
    x = upcast(logits).masked_fill((targets == head.IGNORE_INDEX)[..., None], 0)
    logp = head.scale_logits(x, temperature, softcap).log_softmax(-1)
    g, h = upcast(grad_logprobs), upcast(grad_entropy)
    dz = head.logits_grad(logp, targets, g, -g - h * head.entropy(logp, targets), -h)
    return (dz * head.scale_logits_grad(x, temperature, softcap)).to(logits.dtype).contiguous()


@token_logprobs_backward.compiled
def _(kernels, grad_logprobs, grad_entropy, logits, targets, temperature, softcap):
    x, targets, given = _prepared(kernels, logits, targets)
    grad_logprobs, grad_entropy = grad_logprobs.float().contiguous(), grad_entropy.float().contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kernels.token_logprobs_backward(
        grad_logprobs.data_ptr(), grad_entropy.data_ptr(), *given, out.data_ptr(), *x.shape, x.stride(0), temperature,
        softcap, stream_or_threads(x),
    )  # fmt: skip
    return out


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.softcap = inputs
    ctx.save_for_backward(logits, targets)


def _backward(ctx, grad_logprobs, grad_entropy):
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    rest = ctx.temperature, ctx.softcap
    return token_logprobs_backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *rest), None, None, None


token_logprobs.gradient(_backward, setup_context=_setup_context)


@token_logprobs.cost
def _(gradient, logits, targets, *rest):
    """The gradient's pass begins after the other has ended: it reads the logits once more, and writes as much."""
    read = int((targets != head.IGNORE_INDEX).sum()) * logits.shape[-1] * logits.element_size()
    outputs = targets.nbytes + 8 * targets.numel()
    return 2 * read + logits.nbytes + 2 * outputs if gradient else read + outputs, 0.0


def _make(shape, V, device, dtype, offset=0.0, spread=3.0, masked=0, ignored=0.2, index=torch.int64, **scalars):
    """masked: so many columns of -inf. NaN stands in the logits of ignored rows."""
    logits = torch.randn(*shape, V, device=device) * spread + offset
    targets = torch.randint(V - masked, shape, device=device, dtype=index)
    if masked:
        logits[..., V - masked :] = -torch.inf
    off = torch.rand(shape, device=device) < ignored
    off.view(-1)[:1] = False
    targets, logits = targets.masked_fill(off, head.IGNORE_INDEX), logits.masked_fill(off[..., None], torch.nan)
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
token_logprobs.inputs(small_sizes=SMALL, large_sizes=[{"shape": (256,), "V": 32000}, {"shape": (256,), "V": 50257}])(
    _make
)


@token_logprobs_backward.inputs(small_sizes=SMALL, large_sizes=[{"shape": (256,), "V": 32000}])
def _(device, **size):
    logits, targets, *scalars = _make(device=device, **size)
    grads = torch.randn(2, *targets.shape, device=device)
    return *grads, logits.detach(), targets, *scalars
