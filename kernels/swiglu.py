"""The gated activation of a feed-forward layer, silu(gate) * up."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_matrix, upcast


def _fake(gate, _up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@op(fake=_fake)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, in the shape (..., F) and dtype of both.

        silu(x) = x / (1 + exp(-x))

    (Shazeer 2020, arXiv 2002.05202.) It is computed in float32 and rounded once. Rows may be strided: the two halves of
    one matrix product are read without a copy. No gradient: for inference.

    Raises ValueError where shapes or dtypes differ.
    """
    return (torch.nn.functional.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


@swiglu.normalize
def _(gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.dim() or not gate.is_floating_point():
        given = f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        raise ValueError(f"swiglu: gate and up must have one shape (..., F) and one floating dtype, got {given}")
    return gate.detach(), up.detach()


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


@swiglu.inputs(
    small_sizes=[
        {"shape": (1, 1)},
        {"shape": (3, 17), "spread": 40.0},
        {"shape": (2, 3, 64), "halves": True},
        {"shape": (0, 5)},
    ],
    large_sizes=[{"shape": (32, 1536)}, {"shape": (2048, 1536)}],
)
def _(shape, device, dtype, spread=3.0, halves=False):
    both = spread * torch.randn(*shape[:-1], 2 * shape[-1], device=device, dtype=dtype)
    gate, up = both.chunk(2, -1)
    return (gate, up) if halves else (gate.contiguous(), up.contiguous())
