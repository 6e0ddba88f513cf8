"""How the Triton kernels are launched, and the few device functions that they share.

kernels/triton/<op>.py has, by the op's name, the function that answers for it; kernels/_op.py finds it there. Every
kernel is launched by `run`, so that a tool may look at a launch instead (bench/triton_resources.py compiles what it
sees).

With TRITON_INTERPRET=1 in the environment before Triton is imported, kernels run on CPU tensors, one program at a time,
in numpy: for tests. The interpreter multiplies bfloat16 by its bits, does not round when it stores, and knows no
libdevice: hence `dot`, `cast` and `tanh`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast.kernels._launch import Unsupported

INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AMD = bool(torch.version.hip)


def run(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch `kernel` on the current stream over a grid of programs; none of them, nothing happens.

    Of the grid only the first dimension may pass 65535. A kernel computes addresses in int64.
    """
    if all(grid):
        kernel[grid](*args, **options)


def serves(*tensors: Tensor | None) -> None:
    """Raise Unsupported unless all are float32, bfloat16 or float16."""
    for x in tensors:
        if x is not None and x.dtype not in FLOATS:
            raise Unsupported(f"no Triton kernel for {str(x.dtype)[6:]}")


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device: what a grid should fill. A few under the interpreter, so that tests see
    kernels split their work."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def capability(x: Tensor) -> int:
    """Of x's device, if it is NVIDIA's: 90 for sm_90. 0 elsewhere."""
    if not x.is_cuda or AMD:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def stages(many: int) -> int:
    """Tiles of a product that are under way at a time; two where a block has 64 KiB of shared memory, on AMD's."""
    return min(many, 2) if AMD else many


def block(columns: int, most: int = 4096) -> int:
    """The size of a row's tile: the least power of two that holds the row, `most` at most, 16 at least."""
    return max(16, min(triton.next_power_of_2(columns), most))


def warps(block: int, each: int = 16) -> int:
    """Warps for a tile of `block` elements: `each` for a thread, from 1 warp to 16."""
    return max(1, min(16, block // (32 * each)))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, of tensor cores where they are; float32 is multiplied as such, without TF32."""
    if _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """tanh to a few units in the last place: near 0 by its continued fraction, where 1 - e^-2x would cancel."""
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    return tl.where(square < 0.25, near, far)
