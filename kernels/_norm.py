"""Shared by rms_norm and layer_norm."""

from torch import Tensor

from rlhf_fast.kernels._tensors import empty_contiguous, empty_float32, matrix_shape


def fake(x: Tensor, *_rest: object) -> Tensor:
    """Return an empty output: contiguous, of the shape and dtype of x."""
    return empty_contiguous(x)


def check(op: str, x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None) -> None:
    """Raise ValueError unless x is (..., D > 0), the vectors are (D,) or None, and the residual is like x or None."""
    if not x.dim() or not x.shape[-1] or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point of shape (..., D > 0), got {x.dtype} {list(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must have shape ({x.shape[-1]},), got {list(vector.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        given = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"{op}: residual must have x's dtype and shape, {x.dtype} {list(x.shape)}, got {given}")


def empty_gradients(x: Tensor, *vectors: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    """Return empty gradients of x and of each vector (D,), (0,) where that is not needed."""
    lengths = [x.shape[-1] if needed else 0 for _, needed in vectors]
    pairs = zip(vectors, lengths, strict=True)
    return fake(x), *(vector.new_empty(n) for (vector, _), n in pairs)


def sum_rows(x: Tensor, like: Tensor, needed: bool) -> Tensor:
    """Return the sum over the rows of x (..., D), in the dtype of `like`, or a tensor (0,) where it is not needed."""
    return (x.reshape(-1, x.shape[-1]).sum(0) if needed else x.new_empty(0)).to(like.dtype)


def empty_sums(x: Tensor, count: int, block_rows: int) -> Tensor:
    """Return new memory for the sums (D,) of `count` vectors, one for each block of `block_rows` rows. It has at least
    one block, and so an address."""
    N, D = matrix_shape(x)
    return empty_float32(x, count, max(1, -(-N // block_rows)), D)


def cost(gradient: bool, x: Tensor, residual: Tensor | None, *vectors: Tensor | None) -> tuple[float, float]:
    """Count x, the output and the vectors once, and the residual twice; with the gradient x, those of the output and of
    x, and the vectors once more each, and their gradients."""
    vector_bytes = sum(vector.nbytes for vector in vectors if vector is not None)
    forward = 2 * x.nbytes + vector_bytes + (0 if residual is None else 2 * residual.nbytes)
    return forward + (3 * x.nbytes + 2 * vector_bytes if gradient else 0), 0.0
