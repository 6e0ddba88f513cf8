"""The gated activation of a feed-forward layer, silu(gate) * up, with its gradients."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_matrix, detached, empty_contiguous, upcast


def _fake(gate, _up):
    return empty_contiguous(gate)


@op(fake=_fake)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, in the shape (..., F) and dtype of both.

        silu(x) = x / (1 + exp(-x))

    (Shazeer 2020, arXiv 2002.05202.) It is computed in float32 and rounded once. Rows may be strided: the two halves of
    one matrix product are read without a copy. Gradients: gate and up, as the two halves of one tensor (..., 2 F).

    Raises ValueError where shapes or dtypes differ.
    """
    return (torch.nn.functional.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


@swiglu.normalize
def _(gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.dim() or not gate.is_floating_point():
        given = f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        raise ValueError(f"swiglu: gate and up must have one shape (..., F) and one floating dtype, got {given}")
    return gate, up


@swiglu.compiled
def _(kernels, gate, up):
    (code,) = dtype_codes(kernels, gate)
    out = _fake(gate, up)
    gate, up = as_matrix(gate), as_matrix(up)
    kernels.swiglu(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), code, out.data_ptr(), *gate.shape,
        stream_or_threads(gate),
    )  # fmt: skip
    return out


def _fake_gradients(_grad, gate, _up):
    return torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device)


@op(fake=_fake_gradients)
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Return the gradients (..., 2 F) of gate, then of up, given that of the output: the gradient of the one matrix
    product whose halves they are."""
    g, x = upcast(grad), upcast(gate)
    s = torch.sigmoid(x)
    return torch.cat([g * upcast(up) * (s * (1 + x * (1 - s))), g * (x * s)], dim=-1).to(gate.dtype)


@swiglu_backward.compiled
def _(kernels, grad, gate, up):
    (code,) = dtype_codes(kernels, gate)
    out = _fake_gradients(grad, gate, up)
    grad, gate, up = as_matrix(grad), as_matrix(gate), as_matrix(up)
    kernels.swiglu_backward(
        grad.data_ptr(), grad.stride(0), gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), code,
        out.data_ptr(), *gate.shape, stream_or_threads(gate),
    )  # fmt: skip
    return out


def _setup_context(ctx, inputs, _output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    grads = swiglu_backward(grad, *ctx.saved_tensors).chunk(2, -1)
    return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))


swiglu.gradient(_backward, wrt=("gate", "up"), setup_context=_setup_context)


@swiglu.cost
def _(gradient, gate, up):
    return (8 if gradient else 3) * gate.nbytes, 0.0


SMALL = [
    {"shape": (1, 1)},
    {"shape": (3, 17), "spread": 40.0},
    {"shape": (2, 3, 64), "halves": True},
    {"shape": (0, 5)},
]


@swiglu.inputs(small_sizes=SMALL, large_sizes=[{"shape": (32, 1536)}, {"shape": (2048, 1536)}])
def _make_inputs(shape, device, dtype, spread=3.0, halves=False):
    both = spread * torch.randn(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
    gate, up = both.chunk(2, -1)
    gate, up = (gate, up) if halves else (gate.contiguous(), up.contiguous())
    return gate.detach().requires_grad_(), up.detach().requires_grad_()


@swiglu_backward.inputs(small_sizes=SMALL, large_sizes=[{"shape": (2048, 1536), "halves": True}])
def _(**size):
    gate, up = detached(_make_inputs(**size))
    return torch.randn_like(gate), gate, up
