"""A faster version of Triton's interpreter, for tests.

For every call of a device function the interpreter searches all of triton.language for functions to replace by numpy.
After the first call from a module there is nothing left to replace, so only that call's search is kept. The interpreter
also scans one element after the other, with a call for each; here a scan doubles its distance, as on a GPU.

Its product is numpy's, whose library on some processors adds up the last rows of a matrix in another order than the
others. Here all elements of a product are summed in one order, as on a GPU.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class NothingPatched:
    """The result of a search that has replaced nothing."""

    def restore(self) -> None:
        pass


def speed_up() -> None:
    """Replace the interpreter's search, its scan and its product."""
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

    interpreter._patch_lang = patch_lang_once
    interpreter.GridExecutor.__call__ = run_grid_and_forget
    interpreter.ScanOps.generic_scan = scan_by_doubling
    interpreter.InterpreterBuilder.create_dot = dot_in_order


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
