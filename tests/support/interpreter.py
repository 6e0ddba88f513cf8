"""A faster version of Triton's interpreter, for tests.

For every call of a device function the interpreter searches all of triton.language for functions to replace by numpy.
After the first call from a module there is nothing left to replace, so only that call's search is kept. The interpreter
also scans one element after the other, with a call for each; here a scan doubles its distance, as on a GPU.

Most of its time goes into types: the shape of each result becomes a list of constants anew, and a conversion makes a
table of all dtypes. Both are kept here. Sums of integers are not repeated in 64 bits: what that finds of an overflow
the interpreter does not tell, nor does a GPU.

Its product is numpy's, whose library on some processors adds up the last rows of a matrix in another order than the
others. Here all elements of a product are summed in one order, as on a GPU.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class NothingPatched:
    """The result of a search that has replaced nothing."""

    def restore(self) -> None:
        pass


def speed_up() -> None:
    """Replace the interpreter's search, its types, its scan and its product."""
    patch_lang = interpreter._patch_lang
    run_grid = interpreter.GridExecutor.__call__
    searched: set[str] = set()  # modules, within one launch

    def patch_lang_once(fn):
        module = fn.__globals__["__name__"]
        if module in searched:
            return NothingPatched()
        searched.add(module)
        return patch_lang(fn)

    @functools.wraps(run_grid)
    def run_grid_and_forget(self, *args, **kwargs):
        searched.clear()
        return run_grid(self, *args, **kwargs)

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter._get_np_dtype = numpy_dtype
    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor
    TritonSemantic.broadcast_impl_value = broadcast
    TritonSemantic.cast = cast
    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = run_grid_and_forget
    interpreter.ScanOps.generic_scan = scan_by_doubling
    interpreter.InterpreterBuilder.create_dot = dot_in_order


SHAPES: dict[tuple[int, ...], tuple[tl.core.tuple, int, str]] = {}
CONSTANTS: dict[tuple[int, ...], tuple[tl.core.tuple, tl.constexpr]] = {}
DTYPES: dict[str, np.dtype] = {}
BLOCK_TYPE_INIT, TENSOR_INIT, NUMPY_DTYPE = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
BROADCAST, CAST = TritonSemantic.broadcast_impl_value, TritonSemantic.cast


def init_block_type(self, element_ty, shape):
    """Make a block's type, its shape as that of an earlier one."""
    sizes = tuple([x.value if isinstance(x, tl.constexpr) else x for x in shape])
    if sizes not in SHAPES:
        BLOCK_TYPE_INIT(self, element_ty, shape)
        SHAPES[sizes] = self.shape, self.numel, str(self.shape)
    self.shape, self.numel, text = SHAPES[sizes]
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


def init_tensor(self, handle, type):
    """Make a tensor, its shape of constants as that of an earlier one."""
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in CONSTANTS:
        TENSOR_INIT(self, handle, type)
        CONSTANTS[sizes] = self.shape, self.numel
    self.shape, self.numel = CONSTANTS[sizes]
    self.handle, self.type, self.dtype = handle, type, type.scalar


def broadcast(self, left, right):
    """Return both in one shape: as they are where they have it already, as most do."""
    types = left.type, right.type
    if all(kind.is_block() for kind in types) and types[0].shape is types[1].shape:
        return left, right
    return BROADCAST(self, left, right)


def cast(self, x, kind, *rounding):
    """Return x in another dtype: as it is where it has it already, as most do."""
    return x if x.type.scalar is kind.scalar else CAST(self, x, kind, *rounding)


def numpy_dtype(kind):
    """Return numpy's dtype of a type of Triton's."""
    if isinstance(kind, tl.block_type):
        kind = kind.element_ty
    if kind.name not in DTYPES:
        DTYPES[kind.name] = NUMPY_DTYPE(kind)
    return DTYPES[kind.name]


def scan_by_doubling(self, inputs):
    """Combine every element with those before it on the axis, at distances 1, 2, 4, ..."""
    types = [x.dtype for x in inputs]
    data = [x.handle.data for x in inputs]
    index = np.arange(data[0].shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(data[0].ndim)])

    def to_tensors(arrays):
        return [self.to_tensor(x, dtype) for x, dtype in zip(arrays, types, strict=True)]

    distance = 1
    while distance < index.size:
        earlier = [np.roll(x, distance, self.axis) for x in data]
        combined = self.combine_fn.fn(*to_tensors(earlier), *to_tensors(data))
        if not isinstance(combined, tuple | tl.tuple):
            combined = (combined,)
        data = [np.where(index < distance, x, new.handle.data) for x, new in zip(data, combined, strict=True)]
        distance *= 2
    return to_tensors(data)


def dot_in_order(self, a, b, d, *_):
    """Return a @ b + d in the dtype of d: multiply-adds along the rows of b, one row after the other."""
    x, y = (z.data.astype(d.data.dtype) for z in (a, b))
    return interpreter.TensorHandle(np.einsum("...ij,...jk->...ik", x, y) + d.data, d.dtype.scalar)
