"""The gate of a feed-forward layer: silu(gate) * up."""

import torch
from torch import Tensor

from rlhf_fast.kernels._launch import dtype_codes, stream_or_threads
from rlhf_fast.kernels._op import op
from rlhf_fast.kernels._tensors import as_matrix, upcast


def _fake(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@op(fake=_fake)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(x) = x / (1 + e^-x), of two tensors (..., F) of one shape and dtype, which the result has.

    (Shazeer 2020, arXiv 2002.05202.) Computed in float32, rounded once. Rows may be strided: the halves of one product
    are read where they lie. ValueError where shapes or dtypes differ. No gradient: for inference.
    """
    return (torch.nn.functional.silu(upcast(gate)) * upcast(up)).to(gate.dtype)


@swiglu.normalize
def _(gate, up):
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.dim() or not gate.is_floating_point():
        came = f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        raise ValueError(f"swiglu: gate and up must have one shape (..., F) and one floating dtype, got {came}")
    return gate.detach(), up.detach()


@swiglu.compiled
def _(kernels, gate, up):
    (code,) = dtype_codes(kernels, gate)
    a, b, y = as_matrix(gate), as_matrix(up), _fake(gate, up)
    kernels.swiglu(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), code, y.data_ptr(), *a.shape, stream_or_threads(a),
    )  # fmt: skip
    return y


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
