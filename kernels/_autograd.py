"""The gradient of an op, as a torch.autograd.Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_fast.kernels._backends import forced_backend, forcing


def autograd_function(
    name: str, run: Callable, backward: Callable, setup_context: Callable | None, forward: Callable | None
) -> Callable:
    """Return an op's call with its gradient; `Op.gradient` says what the functions are. `run` is the call without one.

    A backend forced in the forward pass is forced in the backward pass too. torch.compile traces these functions: they
    keep no Op in a closure.
    """

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if ctx.backend is None:
            return _first_order_only(name, backward, ctx, grads)
        with forcing(ctx.backend):
            return _first_order_only(name, backward, ctx, grads)

    functions: dict[str, Callable] = {"backward": run_backward}
    if forward is not None:
        functions["forward"] = _keeping_backend(forward)
    elif setup_context is not None:
        functions["forward"] = run
        functions["setup_context"] = _keeping_backend(setup_context)
    methods = {name: staticmethod(function) for name, function in functions.items()}
    function: type[torch.autograd.Function] = type(name, (torch.autograd.Function,), methods)
    return function.apply


def _keeping_backend(function: Callable) -> Callable:
    """Return `function(ctx, ...)` that also stores the forced backend in `ctx` for the backward pass."""

    def run(ctx: Any, *args: Any) -> Any:
        ctx.backend = forced_backend()
        return function(ctx, *args)

    return run


def _first_order_only(name: str, backward: Callable, ctx: Any, grads: tuple) -> Any:
    """Return `backward(ctx, *grads)`, made such that differentiating it raises. torch's once_differentiable would
    silently return a zero second derivative when `grads` do not require grad, as those of a plain loss."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = backward(ctx, *grads)
        # torch.compile takes a NamedTuple's gradients for 0
        return tuple(out) if isinstance(out, tuple) else out
    with torch.no_grad():
        out = backward(ctx, *grads)
    out = out if isinstance(out, tuple) else (out,)
    raise_later = torch._C._functions.DelayedError(f"{name}: the gradient cannot be differentiated again", len(out))
    inputs: list[Any] = [x if x is None else x.detach().requires_grad_() for x in out]
    return raise_later(*inputs)
