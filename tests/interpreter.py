"""Triton's interpreter, twice as fast: for tests.

At every call of a device function it looks through the whole of triton.language for what is still to be replaced by
numpy; after a launch's first call from a module there is nothing left, so that call's search is the only one kept.
"""

import functools

from triton.runtime import interpreter


def hasten() -> None:
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
