"""Triton's interpreter made faster, for tests.

At every call of a device function the interpreter searches triton.language for functions that numpy must replace. After
the first call from a module in a launch there are none left, so only that call searches here. The interpreter also
scans one number after the other, with a call for each; here a scan is done by doubling, as a GPU does it.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    search, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[str] = set()

    class Nothing:
        def restore(self):
            pass

    def patch_lang(fn):
        module = fn.__globals__["__name__"]
        if module in seen:
            return Nothing()
        seen.add(module)
        return search(fn)

    @functools.wraps(launch)
    def run(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, run
    interpreter.ScanOps.generic_scan = scan


def scan(self, given):
    """Every element joined with those before it on the axis: 1, then 2, 4, ... of them."""
    types, data = [x.dtype for x in given], [x.handle.data for x in given]
    at = np.arange(data[0].shape[self.axis]).reshape([-1 if i == self.axis else 1 for i in range(data[0].ndim)])
    distance = 1
    while distance < at.size:
        before = [self.to_tensor(np.roll(x, distance, self.axis), t) for x, t in zip(data, types, strict=True)]
        here = [self.to_tensor(x, t) for x, t in zip(data, types, strict=True)]
        joined = self.combine_fn.fn(*before, *here)
        joined = joined if isinstance(joined, tuple | tl.tuple) else (joined,)
        data = [np.where(at < distance, x, new.handle.data) for x, new in zip(data, joined, strict=True)]
        distance *= 2
    return [self.to_tensor(x, t) for x, t in zip(data, types, strict=True)]
