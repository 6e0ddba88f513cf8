"""Launch the Triton kernels: the one way to start them, and the functions and constants that they share. Not an op.

kernels/triton/<op>.py has a launcher with the op's name, which kernels/_op.py imports when it is first called. Every
launcher starts its kernels by `run`, so that a tool can replace it (bench/checks/triton_resources.py compiles the
kernels instead).

Kernels take related arguments as one NamedTuple: Triton and its interpreter pass each field as an argument of its own.

With TRITON_INTERPRET=1 in the environment when Triton is imported, kernels run on CPU tensors, one program after the
other, in numpy: for tests. The interpreter cannot multiply bfloat16, truncates when it converts to bfloat16, and has no
libdevice. `dot`, `cast`, `sum_threads` and `tanh` therefore replace Triton's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels import _head
from rlhf_fast.kernels._launch import Unsupported

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
IGNORE_INDEX = tl.constexpr(_head.IGNORE_INDEX)
MIN_EXPONENT = tl.constexpr(-1000.0)  # exp and exp2 of it are 0 in float32, and MIN_EXPONENT times that 0 is not NaN
AMD = bool(torch.version.hip)


def run(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Launch `kernel` on the current stream over a grid of programs, unless the grid is empty.

    Only the first dimension of the grid may exceed 65535. Kernels compute addresses in int64."""
    if all(grid):
        kernel[grid](*args, **meta)


def require_dtypes(*tensors: Tensor | None) -> None:
    """Raise Unsupported unless all tensors are float32, bfloat16 or float16."""
    for x in tensors:
        if x is not None and x.dtype not in FLOATS:
            raise Unsupported(f"no Triton kernel for {str(x.dtype)[6:]}")


def num_sms(x: Tensor) -> int:
    """Return the number of streaming multiprocessors of x's device; on a CPU 4, so that tests cover split rows."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def sm_arch(x: Tensor) -> int:
    """Return the compute capability of x's NVIDIA GPU, 90 for sm_90, and 0 for any other device."""
    if not x.is_cuda or AMD:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def num_stages_for(stages: int) -> int:
    """Return the number of pipeline stages of a product: at most 2 on AMD GPUs, with their 64 KiB of shared memory."""
    return min(stages, 2) if AMD else stages


def block_size(n: int, max_size: int = 4096) -> int:
    """Return the smallest power of two that is at least n, between 16 and max_size."""
    return max(16, min(triton.next_power_of_2(n), max_size))


def num_warps_for(block: int, elements_per_thread: int = 16) -> int:
    """Return the number of warps for a tile of `block` elements, between 1 and 16."""
    return max(1, min(16, block // (32 * elements_per_thread)))


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b, computed by tensor cores for 16-bit a and b and in float32, without TF32, for float32."""
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Return float32 x in `dtype`, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def sum_threads(x):
    """Return the sum of x (threads,): a tree's, which numpy's, one number after the other, has only in float64."""
    return tl.sum(x.to(tl.float64), axis=0).to(tl.float32) if INTERPRETED else tl.sum(x, axis=0)


@triton.jit
def clamp(x, low, high):
    """Return x between low and high. NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def tanh(x):
    """Return tanh(x) to a few units in the last place. Near 0, where 1 - e^-2x cancels, it is a continued fraction."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    return tl.where(square < 0.25, near, far)
