"""The tensors that a kernel cannot read by their data pointer, and the derivatives that no op has.

Kernels read dense tensors of plain numbers. torch's lazily negated, conjugated and zero tensors are made plain by its
dispatcher; the others of this file, and transforms of an op that would be silently wrong, are refused by a sentence.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFUSED_DTYPES = frozenset(
    getattr(torch, name)
    for name in ("complex32", "complex64", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4")
)

MAY_BE_NUMBERS = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "steps", "advantage_shift", "advantage_scale")
)  # parameters of type Tensor that also take a number


def is_transformed() -> bool:
    """Return True within a transform of torch.func (vmap, grad, jvp)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second. Traced,
# the comparison with None would always be true.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_unreadable(x: Tensor) -> str:
    """Return why kernels cannot read x, and what to do; "" if they can."""
    if x.is_nested:
        return "is a nested tensor; pad it, or pack its rows"
    if x.layout != torch.strided:
        return f"has the layout {str(x.layout).removeprefix('torch.')}; pass a dense tensor, by x.to_dense()"
    if x.dtype in REFUSED_DTYPES:
        kind = "complex; pass its real part" if x.is_complex() else "quantized; pass x.dequantize()"
        return f"is {kind}"
    if torch._is_functional_tensor(x):
        return "is functionalized by torch.func.functionalize; call the op outside of it"
    if type(x) in (Tensor, torch.nn.Parameter) and x.device.type in ("cpu", "cuda") and not _has_memory(x):
        return "has no memory: its storage was freed or shrunk, as of a sharded parameter that is not gathered"
    return ""


def _has_memory(x: Tensor) -> bool:
    if not x.numel() or x._is_zerotensor() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return True
    return x.untyped_storage().nbytes() > 0


def check_readable(op: str, names: Sequence[str], args: Sequence) -> None:
    """Raise ValueError for the first tensor that kernels cannot read."""
    for name, x in zip(names, args, strict=False):
        if isinstance(x, Tensor) and (why := why_unreadable(x)):
            raise ValueError(f"{op}: {name} {why}")


def check_tensors(op: str, signature: inspect.Signature, args: Sequence, error: Exception | None = None) -> None:
    """Raise TypeError for the first argument that must be a tensor and is none, from the `error` that it has caused."""
    for (name, parameter), x in zip(signature.parameters.items(), args, strict=False):
        may_be_none = parameter.annotation == (Tensor | None)
        if not may_be_none and parameter.annotation is not Tensor:
            continue
        if isinstance(x, Tensor) or (x is None and may_be_none):
            continue
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if is_number and name in MAY_BE_NUMBERS:
            continue
        can_be_one = is_number or isinstance(x, (list, tuple)) or hasattr(x, "__array__")
        mend = "; torch.as_tensor makes one" if can_be_one else ""
        if name == "weight" and isinstance(getattr(x, name, None), Tensor):  # a module
            mend = "; give its .weight"
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}{mend}") from error


def check_transformed(op: str, error: Exception) -> None:
    """Raise NotImplementedError in place of an error of torch's that is about its own machinery."""
    if "get value out of a tracing tensor" in str(error):
        raise NotImplementedError(
            f"{op}: torch.func.linearize and make_fx cannot trace the checks of its values; call torch.func.jvp,"
            " or trace with fake tensors"
        ) from error
    reads_values = str(error).startswith("vmap: It looks like you're") and ".item()" in str(error)
    hides_memory = is_transformed() and "Cannot access data pointer of Tensor that doesn't have storage" in str(error)
    if reads_values or hides_memory:
        raise NotImplementedError(
            f"{op}: torch.vmap hides the values that the op checks; call it for the whole batch"
        ) from error
    if f"Batching rule not implemented for rlhf_fast::{op}" in str(error):
        raise NotImplementedError(
            f"{op}: torch.vmap cannot split an op that writes its arguments in place; call it for the whole batch"
        ) from error


def has_tangents(op: str, names: Sequence[str], gradient_inputs: Sequence[int], args: Sequence) -> bool:
    """Return whether a tensor has a forward-mode derivative, of a dual number or of torch.func.jvp. Raise
    NotImplementedError where it is one that the op has no derivative by."""
    found = False
    for i, x in enumerate(args):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        if forward_ad.unpack_dual(_unbatched(x)).tangent is not None or _is_of_outer_jvp(x):
            found = True
            if i not in gradient_inputs:
                raise NotImplementedError(
                    f"{op}: there is no derivative by {names[i]}, in forward mode (torch.func.jvp, dual numbers) as in"
                    f" reverse; detach {names[i]}, or call {op}.reference, which is plain torch"
                )
    return found


def _unbatched(x: Tensor) -> Tensor:
    """Return what torch.vmap splits: it has no rule for unpack_dual."""
    while torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _is_of_outer_jvp(x: Tensor) -> bool:
    """Return whether x is of a torch.func.jvp around the innermost transform, where its tangent cannot be seen."""
    outer = list(torch._C._functorch.get_interpreter_stack() or ())[:-1]
    levels = {interpreter.level() for interpreter in outer if interpreter.key().name == "Jvp"}
    while levels and torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.maybe_get_level(x) in levels:
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False
