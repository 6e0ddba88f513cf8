"""The gradient of an op, as a torch.autograd.Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.kernels._backends import forced_backend, forcing

READ_LAZILY = "linear_cross_entropy", "linear_logprobs"
"""Ops that rlhf_fast.integrations.lazy_head calls for users who know of logits, and of no op."""
SMALL = 1 << 22
"""Elements of an input that is kept until the backward pass only for the graph that led to it."""


def autograd_function(
    name: str, run: Callable, backward: Callable, setup_context: Callable | None, forward: Callable | None
) -> type[torch.autograd.Function]:
    """Return the function whose `apply` is an op's call with its gradient; `Op.gradient` says what the arguments are.
    `run` is the call without one.

    A backend forced in the forward pass is forced in the backward pass too, where that has a kernel of it.
    torch.compile traces these functions: they keep no Op in a closure.
    """

    def run_backward(ctx: Any, *grads: Any) -> Any:
        if ctx.backend is None:
            return _first_order_only(name, backward, ctx, grads)
        with forcing(ctx.backend, in_backward=True):
            return _first_order_only(name, backward, ctx, grads)

    functions: dict[str, Callable] = {"backward": run_backward}
    if forward is not None:
        functions["forward"] = _keeping_edges(_keeping_backend(forward))
    elif setup_context is not None:
        functions["forward"] = _keeping_backend(_with_context(run, setup_context))
    methods = {name: staticmethod(function) for name, function in functions.items()}
    return type(name, (torch.autograd.Function,), methods)


def refuse_backward(name: str, *_args: Any) -> Any:
    """Raise: torch.ops.rlhf_fast.<name> has no gradient. Without this, torch would give None or 0 for one."""
    raise NotImplementedError(f"{name}: torch.ops.rlhf_fast.{name} has no gradient; call rlhf_fast.ops.{name}")


def refuse_gradient(name: str, torch_op: Callable) -> Callable:
    """Return `torch_op` as a kernel for the dispatcher's key "Autograd", which raises where a tensor requires a
    gradient."""

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            refuse_backward(name)
        with torch._C._AutoDispatchBelowAutograd():
            return torch_op(*args)

    return run


def _with_context(run: Callable, setup_context: Callable) -> Callable:
    """Return a forward pass that runs the op and then `setup_context`. As a method of its own torch would call that
    with arguments which it binds by a signature, and so double the time of a small call."""

    def forward(ctx: Any, *args: Any) -> Any:
        out = run(*args)
        setup_context(ctx, args, out)
        return out

    return forward


def _keeping_backend(function: Callable) -> Callable:
    """Return `function(ctx, ...)` that also stores the forced backend in `ctx` for the backward pass."""

    def run(ctx: Any, *args: Any) -> Any:
        ctx.backend = forced_backend()
        return function(ctx, *args)

    return run


def _keeping_edges(forward: Callable) -> Callable:
    """Return `forward(ctx, ...)` that also stores what depends on the inputs with a gradient, for a second derivative.

    A forward pass that computes the gradients need not save its inputs, and the gradients depend on them all the same.
    A small input is kept itself, which costs nothing; of a large one an empty copy, which frees its memory.
    """

    def run(ctx: Any, *args: Any) -> Any:
        out = forward(ctx, *args)
        if not torch.compiler.is_compiling():
            ctx.edges = [
                x if x.is_leaf or x.numel() <= SMALL else _empty_copy(x)
                for x in args
                if (type(x) is Tensor or type(x) is Parameter) and x.requires_grad
            ]
        return out

    return run


def _empty_copy(x: Tensor) -> Tensor:
    """Return a tensor of no elements that depends on x."""
    with torch.enable_grad():
        return torch.as_strided_copy(x, (0,), (1,))


def _first_order_only(name: str, backward: Callable, ctx: Any, grads: tuple) -> Any:
    """Return `backward(ctx, *grads)`, made such that differentiating it raises. torch's once_differentiable would
    silently return a zero second derivative when `grads` do not require grad, as those of a plain loss."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        out = backward(ctx, *grads)
        # torch.compile takes a NamedTuple's gradients for 0
        return tuple(out) if isinstance(out, tuple) else out
    depends_on = (*grads, *ctx.saved_tensors, *getattr(ctx, "edges", ()))
    with torch.no_grad():
        out = backward(ctx, *grads)
    out = out if isinstance(out, tuple) else (out,)
    return _NotDifferentiable.apply(name, len(out), *out, *depends_on)


class _NotDifferentiable(torch.autograd.Function):
    """The identity of an op's gradients, whose derivative raises. They and all that they depend on are its inputs: the
    engine visits only nodes that lead to an input whose derivative is asked for."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Any) -> Any:
        ctx.name = name
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        made = " (of lazy_head's logits, logits.make())" if ctx.name in READ_LAZILY else ""
        raise RuntimeError(
            f"{ctx.name}: the gradient cannot be differentiated again; {ctx.name}.reference, which is plain torch,"
            f" can{made}"
        )
