"""Matrix products on the CPU, for linear and the heads of linear_*: csrc/cpu/linear_product.cpp. Not an op."""

import functools
from types import ModuleType

from torch import Tensor

from rlhf_fast.kernels._launch import data_ptrs, stream_or_threads

BF16_DOT = 1
"""Products of bfloat16 on the CPU: 1 by the processor's instruction where it has one, 2 by emulating it (for tests),
0 in float32."""


def uses_bf16_product(kernels: ModuleType) -> bool:
    """Return whether bfloat16 is multiplied as it is, not in float32."""
    return BF16_DOT == 2 or (BF16_DOT == 1 and has_bf16_product(kernels))


@functools.cache
def has_bf16_product(kernels: ModuleType) -> bool:
    """Return whether this processor multiplies bfloat16."""
    try:
        kernels.bf16_product(0, 0, 0, 0, 0, 0, 0, 0, 0, False, 1)
    except RuntimeError:
        return False
    return True


def f32_product(
    kernels: ModuleType, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, adds: bool = False
) -> Tensor:
    """Write a b + bias (rows, columns) to `out`, or add it with `adds`; a (rows, K), b (K, columns), one of whose
    strides is 1."""
    kernels.f32_product(
        a.data_ptr(), *a.stride(), b.data_ptr(), b.stride(1), b.stride(0), *data_ptrs(bias, out), out.stride(0),
        *out.shape, a.shape[1], adds, stream_or_threads(a),
    )  # fmt: skip
    return out
