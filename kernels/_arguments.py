"""The arguments that no op takes, by a sentence that names them, and the derivatives that no op has.

Kernels read dense tensors of plain numbers. torch's lazily negated, conjugated and zero tensors are made plain by its
dispatcher; the others of this file, and transforms of an op that would be silently wrong, are refused by a sentence.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from types import GenericAlias
from typing import get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

REFUSED_DTYPES = frozenset(
    getattr(torch, name)
    for name in ("complex32", "complex64", "complex128", "qint8", "quint8", "qint32", "quint4x2", "quint2x4")
)

INTEGERS = frozenset(
    getattr(torch, name) for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
)

MUST_BE_FLOATING = frozenset((
    "advantages", "bias", "bootstrap", "cos", "gamma", "gate", "hidden", "k", "k_cache", "lam", "logits", "logprobs",
    "noise", "old_logprobs", "old_values", "q", "ref_bias", "ref_hidden", "ref_logprobs", "ref_weight", "residual",
    "returns", "rewards", "sampler_logprobs", "scores", "sin", "up", "v", "v_cache", "values", "weight", "x",
))  # fmt: skip
"""The parameters, of any op, that take no tensor of integers. Weights of 0 and 1 may be integers."""


def refused_dtypes(name: str) -> frozenset[torch.dtype]:
    """Return the dtypes that no op takes for its parameter `name`."""
    return REFUSED_DTYPES | INTEGERS if name in MUST_BE_FLOATING else REFUSED_DTYPES


def tensor_parameters(signature: inspect.Signature) -> tuple[tuple[int, frozenset[torch.dtype]], ...]:
    """Return the index of each parameter that takes a tensor, alone or beside something else, and its refused
    dtypes."""
    return tuple(
        (i, refused_dtypes(p.name))
        for i, p in enumerate(signature.parameters.values())
        if p.annotation is Tensor or Tensor in get_args(p.annotation)
    )


def may_be_number(annotation: object) -> bool:
    """Return whether a parameter takes a number in a tensor's place. The op's normalizer makes a tensor of it."""
    kinds = get_args(annotation)
    return Tensor in kinds and (float in kinds or int in kinds)


def row_indices(op: str, signature: inspect.Signature, rows: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the parameters `rows`, of which a number may also be a tensor of one number per row. Raise
    ValueError where one is no `float | Tensor`."""
    parameters = signature.parameters
    for name in rows:
        if name not in parameters or set(get_args(parameters[name].annotation)) != {float, Tensor}:
            raise ValueError(f"{op}: rows names {name!r}, which is no parameter of `float | Tensor`")
    return tuple(i for i, name in enumerate(parameters) if name in rows)


def schema(body: Callable, mutates: tuple[str, ...], rows: tuple[str, ...]) -> str:
    """Return the schema of an op. A parameter that takes a number or a tensor is a tensor or None in it. torch has no
    type for one of `rows`: it is a number, and NAME_rows, a tensor or None, stands behind all other parameters."""
    signature = inspect.signature(body)
    parameters, tensors = [], []
    for p in signature.parameters.values():
        if p.name in rows:
            parameters.append(p.replace(annotation=float))
            tensors.append(p.replace(name=f"{p.name}_rows", annotation=Tensor | None, default=None))
        else:
            parameters.append(p.replace(annotation=Tensor | None) if may_be_number(p.annotation) else p)
    parameters += tensors

    def prototype() -> None:
        """Stand for the body."""

    vars(prototype)["__signature__"] = signature.replace(parameters=parameters)
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def variant_signature(
    signature: inspect.Signature, outputs: int, tensors: Sequence[str], flags: Sequence[str]
) -> inspect.Signature:
    """Return the signature of `Op.variant`, of an op with this one."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=Tensor) for name in tensors]
    parameters += [p.replace(default=p.empty) for p in signature.parameters.values()]
    parameters += [inspect.Parameter(name, kind, annotation=bool) for name in flags]
    result = Tensor if outputs == 1 else GenericAlias(tuple, (Tensor,) * outputs)
    return inspect.Signature(parameters, return_annotation=result)


def split_rows(args: tuple, indices: Sequence[int]) -> tuple:
    """Return an op's arguments as its schema takes them: with those at `indices`, where they are tensors, behind the
    others."""
    if not any(isinstance(args[i], Tensor) for i in indices):
        return args
    numbers = [0.0 if i in indices and isinstance(x, Tensor) else x for i, x in enumerate(args)]
    return *numbers, *(args[i] if isinstance(args[i], Tensor) else None for i in indices)


def join_rows(args: tuple, indices: Sequence[int], count: int) -> tuple:
    """Return the `count` arguments at most that an op has, of what `split_rows` returned."""
    joined = list(args[:count])
    for i, rows in zip(indices, args[count:], strict=False):
        joined[i] = joined[i] if rows is None else rows
    return tuple(joined)


def is_tracing() -> bool:
    """Return True under torch.compile, a dispatch or function mode (fake tensors), or a transform of torch.func."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return is_transformed()


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
    if torch.compiler.is_compiling():  # its tensors are fake, and it cannot trace what follows
        return ""
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


def check_floating(op: str, names: Sequence[str], args: Sequence) -> None:
    """Raise ValueError for the first tensor of integers that must be one of floating-point numbers."""
    for name, x in zip(names, args, strict=False):
        if isinstance(x, Tensor) and x.dtype in INTEGERS and name in MUST_BE_FLOATING:
            dtype = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{op}: {name} must be floating point, got {dtype}; pass {name}.float()")


def check_readable(op: str, names: Sequence[str], args: Sequence) -> None:
    """Raise ValueError for the first tensor that kernels cannot read."""
    check_floating(op, names, args)
    for name, x in zip(names, args, strict=False):
        if isinstance(x, Tensor) and (why := why_unreadable(x)):
            raise ValueError(f"{op}: {name} {why}")


def check_tensors(op: str, signature: inspect.Signature, args: Sequence, error: Exception | None = None) -> None:
    """Raise TypeError for the first argument that must be a tensor and is none, from the `error` that it has caused."""
    for (name, parameter), x in zip(signature.parameters.items(), args, strict=False):
        kinds = get_args(parameter.annotation) or (parameter.annotation,)
        if Tensor not in kinds:
            continue
        number_too, may_be_none = may_be_number(parameter.annotation), type(None) in kinds
        if isinstance(x, Tensor) or (x is None and may_be_none):
            continue
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if number_too:
            if is_number:
                continue
            raise TypeError(f"{op}: {name} must be a number or a torch.Tensor, got {_shown(x)}") from error
        can_be_one = is_number or isinstance(x, (list, tuple)) or hasattr(x, "__array__")
        mend = "; torch.as_tensor makes one" if can_be_one else ""
        if name == "weight" and isinstance(getattr(x, name, None), Tensor):  # a module
            mend = "; give its .weight"
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}{mend}") from error


def check_numbers(op: str, signature: inspect.Signature, args: Sequence, error: Exception) -> None:
    """Raise TypeError for the first argument that must be a number and is none, from the `error` that it has caused.
    Normalizers compare it, or convert it by `as_float`: float(".9") would read the text."""
    for (name, parameter), x in zip(signature.parameters.items(), args, strict=False):
        kinds = get_args(parameter.annotation) or (parameter.annotation,)
        if kinds[0] not in (float, int, bool) or Tensor in kinds or (x is None and len(kinds) > 1):
            continue
        if not hasattr(x, "__float__"):
            kind = "True or False" if kinds[0] is bool else "a number"
            raise TypeError(f"{op}: {name} must be {kind}, got {_shown(x)}") from error


def _shown(x: object) -> str:
    return f"the text {x!r}" if isinstance(x, (str, bytes)) else type(x).__name__


def explain(op: str, signature: inspect.Signature, args: Sequence, error: Exception) -> None:
    """Raise a clearer error in place of one that an argument has caused which no kernel can read. Where this returns,
    the caller raises the `error` itself."""
    if not isinstance(error, RuntimeError):
        check_tensors(op, signature, args, error)
        check_numbers(op, signature, args, error)
    check_readable(op, tuple(signature.parameters), args)
    check_transformed(op, error)


def unexpected_argument(op: str, names: Sequence[str], given: str) -> str:
    """Return the error for a keyword that the op does not take, or that an argument by position has given before."""
    if given in names:
        return f"{op}: {given} was given twice, by its position and by its name"
    near = difflib.get_close_matches(given, names, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"{op} has no argument {given!r}{meant}; it takes {', '.join(names)}"


unexpected_argument._dynamo_marked_constant = True  # type: ignore[attr-defined]  # difflib cannot be traced


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
