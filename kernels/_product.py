"""Matrix products on the CPU, for linear and the heads of linear_*: csrc/cpu/linear_product.cpp. Not an op."""

import functools
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.kernels._backends import COMPILED
from rlhf_fast.kernels._launch import data_ptrs, stream_or_threads

MIN_LANES = 8  # of the vectors with which our float32 products are about as fast as torch's
MIN_ROWS = 32  # for which a copy of the weight pays
BF16_DOT = 1
"""Products of bfloat16 on the CPU: 1 by the processor's instruction where it has one, 2 by emulating it (for tests),
0 in float32."""


def row_stride(columns: int) -> int:
    """Return the distance of rows in a block of logits: lines of a column would compete for a few places of the cache
    if it were a power of two."""
    return -(-columns // 16) * 16 + 16


def rows_in(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) of a flat buffer, `row_stride` apart."""
    stride = row_stride(columns)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


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


def is_fast(kernels: ModuleType) -> bool:
    """Return whether our float32 product, whose bits depend on the row alone, is about as fast as torch's for many
    rows: on a Zen 5 it is faster, on an Intel Xeon it reaches 0.8 to 0.95 of MKL's rate."""
    return kernels.vector_lanes >= MIN_LANES


def f32_product(
    kernels: ModuleType, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, adds: bool = False
) -> Tensor:
    """Write a b + bias (rows, columns) to `out`, or add it with `adds`; a (rows, K), b (K, columns), one of whose
    strides is 1. With AVX2 a row's bits depend on that row and b alone; else it is torch's product."""
    if not is_fast(kernels):
        torch.addmm(out, a, b, beta=int(adds), out=out)
        return out if bias is None else out.add_(bias)
    kernels.f32_product(
        a.data_ptr(), *a.stride(), b.data_ptr(), b.stride(1), b.stride(0), *data_ptrs(bias, out), out.stride(0),
        *out.shape, a.shape[1], adds, stream_or_threads(a),
    )  # fmt: skip
    return out


@functools.cache
def _is_fast_here() -> bool:
    """Return `is_fast` for the best instruction set."""
    built = [module for name, module in COMPILED.items() if name.startswith("cpu:")]
    return bool(built) and is_fast(built[-1])


def f32_is_ours(rows: int) -> bool:
    """Return whether a layer of so many rows takes our float32 product: a row's bits are then the same in any batch of
    MIN_ROWS or more, at about the rate of torch's (`is_fast`)."""
    return rows >= MIN_ROWS and _is_fast_here()
