"""Logits that are made only where somebody reads them.

`LazyLogits` stands in for a model's logits (..., V), and has the hidden states (..., D) and the head behind them. What
trainers do to logits before they take a log-probability is noted (lazy_views.py), and what they want of them is
answered by the ops (lazy_reads.py). Anything else makes the logits, once, and goes on with them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_fast.integrations.head import LinearHead
from rlhf_fast.integrations.lazy_rows import Rows, Source, version_of
from rlhf_fast.integrations.record import caller
from rlhf_fast.integrations.torch_functions import COMMUTATIVE, GATHERS, IDENTITIES, NATIVE, REFUSED, WRITES

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda z: z,
    "log_softmax": lambda z: z.log_softmax(-1),
    "softmax": lambda z: z.softmax(-1),
    "softmax * logits": lambda z: z.softmax(-1) * z,
    "softmax * log_softmax": lambda z: z.softmax(-1) * z.log_softmax(-1),
    "transposed": lambda z: z.transpose(-1, -2),
}
"""Name the tensors that a LazyLogits may stand for; each function makes one of logits."""


class SharedStorage:
    """Count the writes into the storage that views of the same logits would share.

    written_at: the line of the last write.
    exposed: tensors of which a part was given away as a plain tensor, by their storage, and their versions then."""

    def __init__(self) -> None:
        self.writes, self.written_at = 0, ""
        self.exposed: dict[int, tuple[Tensor, int]] = {}


class LazyLogits(Tensor):
    """Stand in for logits (..., V), or for what FORMS has of them, times `factor`."""

    rows: Rows
    form: str
    factor: float
    shared_storage: SharedStorage
    seen_writes: int
    copied: bool
    cache: Tensor | None
    cache_version: int
    own: Tensor | None
    hooked_inputs: tuple[Tensor, ...]
    has_backward_hook: bool
    is_function_output: bool

    @staticmethod
    def of(
        rows: Rows, shape: tuple[int, ...], dtype: torch.dtype, form: str = "logits", factor: float = 1.0,
        shared_storage: SharedStorage | None = None, copied: bool = False, hooked_inputs: tuple[Tensor, ...] = (),
        attached: bool = True,
    ) -> LazyLogits:  # fmt: skip
        """Return lazy logits of a shape. shared_storage: of those that these are a view of. copied: the storage would
        be a copy of that of rows. hooked_inputs: see `hooked_tensors`. attached: as a node of autograd, under no_grad
        without a gradient."""
        if attached and not torch.is_grad_enabled():
            rows = rows.detach()
        device = rows.head.weight.device
        x = Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        x.rows, x.form, x.factor = rows, form, factor
        x.hooked_inputs, x.has_backward_hook, x.is_function_output = hooked_inputs, False, False
        x.shared_storage = shared_storage or SharedStorage()
        x.seen_writes, x.own, x.copied, x.cache, x.cache_version = x.shared_storage.writes, None, copied, None, 0
        if attached and rows.needs_grad():
            return _Node.apply(rows.hidden, rows.head.weight, rows.head.bias, lambda: x)
        return x

    def like(self, **changes: Any) -> LazyLogits:
        """Return lazy logits with some attributes changed."""
        given: dict[str, Any] = {"rows": self.rows, "shape": tuple(self.shape), "dtype": self.dtype, "form": self.form}
        given |= {"factor": self.factor, "copied": self.copied, "hooked_inputs": self.hooked_tensors()}
        return LazyLogits.of(**{**given, **changes})

    def as_function_output(self, **changes: Any) -> LazyLogits:
        """Return these logits as an autograd.Function does that returns its input, whose backward pass is to be called.
        torch makes it a node of autograd afterwards. Where it did not, it was only called under no_grad."""
        found = self.like(**{"shared_storage": self.shared_storage, "attached": False, **changes})
        found.has_backward_hook = found.is_function_output = True
        return found

    def hooked_tensors(self) -> tuple[Tensor, ...]:
        """Return the nodes of autograd whose backward pass wrappers such as DDP wait for. has_backward_hook: this is
        one of them."""
        return (*self.hooked_inputs, self) if self.has_backward_hook else self.hooked_inputs

    def replace_in_place(self, rows: Rows, factor: float) -> LazyLogits:
        """Be other logits, after a write in place."""
        self.rows, self.factor = rows, factor
        self.note_write()
        return self

    def note_write(self) -> None:
        """Note that this one was written in place. The other views of its storage are not good any more."""
        self.shared_storage.writes, self.shared_storage.written_at = self.shared_storage.writes + 1, caller()
        self.seen_writes = self.shared_storage.writes

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape without the vocabulary."""
        return tuple(self.shape[:-1])

    def check(self) -> None:
        """Raise where a write into other views of the same logits did not reach this one.

        An autograd.Function may have noted what it does with lazy logits and given them back. Their gradient has to
        pass it, so that they are made here."""
        if self.seen_writes != self.shared_storage.writes:
            raise RuntimeError(
                "lazy_head: these logits were written in place through another view, at"
                f" {self.shared_storage.written_at}; read that view, or write into logits.clone()"
            )
        written = self.cache is not None and version_of(self.cache) != self.cache_version
        written |= any(version_of(whole) != version for whole, version in self.shared_storage.exposed.values())
        if self.own is None and (written or self.rows.written_through_a_view()):
            raise RuntimeError(
                "lazy_head: these logits were written in place through a view of a part of the vocabulary; write by"
                " logits[...] = value, or into logits.make().clone()"
            )
        if self.is_function_output and not self.requires_grad:
            self.rows = self.rows.detach()
        if self.own is None and self.requires_grad and self.rows.is_detached() and torch.is_grad_enabled():
            self.own = _Make.apply(self)

    def make(self) -> Tensor:
        """Return the tensor itself. Its storage stays for later readers."""
        self.check()
        return self.computed() if self.own is None else self.own

    def computed(self) -> Tensor:
        """Return the tensor as `rows` and `form` say."""
        need = self.rows.needs_grad()
        if self.cache is not None and (self.cache.requires_grad or not need):
            return self.cache if need else self.cache.detach()
        shape = tuple(self.shape)
        if self.form == "transposed":
            shape = (*shape[:-2], shape[-1], shape[-2])
        with torch.autocast(self.device.type, enabled=False):
            logits = self.rows.logits().view(shape)
            made = FORMS[self.form](logits.to(self.dtype))
            made = made if self.factor == 1 else made * self.factor
        if made.data_ptr() == logits.data_ptr():
            if not self.copied:
                return made
            made = made.clone()
        self.cache, self.cache_version = made, version_of(made)
        return made

    def answered(self, out: Tensor) -> Tensor:
        """Return an op's answer, through whose backward pass the wrappers of these logits hear of it."""
        hooked = [x for x in self.hooked_tensors() if x.requires_grad]
        return _CallBackwardHooks.apply(out, *hooked) if hooked and out.requires_grad else out

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({self.form}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    @torch.compiler.disable  # a compiled function that is given lazy logits reads them as it would uncompiled
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in NATIVE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in REFUSED:
            raise NotImplementedError(f"lazy_head: {REFUSED[func]} has no effect on logits that are not made; {REMEDY}")
        if any(isinstance(x, LazyLogits) for x in tree_leaves(kwargs.get("out"))):
            raise NotImplementedError(f"lazy_head: out= cannot be logits that are not made; {REMEDY}")
        answer = _handled(func, args, kwargs)
        return _on_made(func, args, kwargs) if answer is NotImplemented else answer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Answer calls that do not reach __torch_function__, such as collectives: by the logits, whose gradient _Node
        has. torch's wrappers pass outputs through an autograd.Function as they are."""
        is_view = func is torch.ops.aten.view.default
        if func in IDENTITIES and (not is_view or tuple(args[1]) == tuple(args[0].shape)):
            return args[0].as_function_output()
        schema, kwargs = func._schema, kwargs or {}
        if any(x.alias_info is not None for x in schema.returns) or _written_lazy(schema, args, kwargs):
            raise NotImplementedError(
                f"lazy_head: {func} writes into logits that are not made, or shares their memory, and was called past"
                f" torch's Python functions; {REMEDY}"
            )
        with torch.no_grad():
            args, kwargs = tree_map(lambda x: x.make() if isinstance(x, LazyLogits) else x, (args, kwargs))
        return func(*args, **kwargs)


def _written_lazy(schema: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether an operator writes into lazy logits. Collectives do not say so: those of GATHERS read all but the
    first argument."""
    if schema.name.startswith("c10d::"):
        return schema.name not in GATHERS or any(isinstance(x, LazyLogits) for x in tree_leaves(args[0]))
    given = {argument.name: x for argument, x in zip(schema.arguments, args, strict=False)} | kwargs
    written = [x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write]
    return any(isinstance(x, LazyLogits) for x in tree_leaves([given.get(name) for name in written]))


REMEDY = "pass logits.make() instead"


def handles(*functions: Any) -> Callable[[Callable], Callable]:
    """Register a function that answers for torch's `functions`, of the lazy logits and the other arguments.
    NotImplemented leaves them to `_on_made`."""

    def register(handler: Callable) -> Callable:
        for function in functions:
            HANDLERS[function] = handler, inspect.signature(handler)
        return handler

    return register


HANDLERS: dict[Any, tuple[Callable, inspect.Signature]] = {}


def _handled(func: Any, args: tuple, kwargs: dict) -> Any:
    if func not in HANDLERS:
        return NotImplemented
    given = dict(kwargs)
    if not args:
        name = next((name for name in ("input", "self") if name in given), None)
        if name is None:
            return NotImplemented
        args = (given.pop(name),)
    if func in COMMUTATIVE and not isinstance(args[0], LazyLogits):
        second = given.pop("other") if "other" in given else args[1] if len(args) == 2 else None
        args = (second, args[0])
    x = args[0]
    if not isinstance(x, LazyLogits):
        return NotImplemented
    x.check()
    if x.own is not None:
        return NotImplemented
    handler, signature = HANDLERS[func]
    try:
        signature.bind(*args, **given)
    except TypeError:
        return NotImplemented
    return handler(*args, **given)


def _on_made(func: Any, args: tuple, kwargs: dict) -> Any:
    """Call a function with the logits themselves. What it writes into them belongs to the LazyLogits that it had."""
    lazy = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)}
    made = {key: x.make() for key, x in lazy.items()}
    versions = {key: version_of(x) for key, x in made.items()}
    first = args[0] if args else None
    if isinstance(first, LazyLogits) and str(getattr(func, "__module__", "")).startswith("torch.distributed"):
        raise NotImplementedError(f"lazy_head: {func.__name__} writes into logits that are not made; {REMEDY}")
    args, kwargs = tree_map(lambda x: made.get(id(x), x), (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        out = func(*args, **kwargs)
    given = {_storage(x) for x in tree_leaves(out) if type(x) is Tensor and x.device.type != "meta"}
    for key, x in lazy.items():
        if _storage(made[key]) in given:
            x.shared_storage.exposed[_storage(made[key])] = made[key].detach(), version_of(made[key])
    written = [x for key, x in lazy.items() if version_of(made[key]) != versions[key]]
    if isinstance(first, LazyLogits) and made[id(first)].is_inference() and _writes(func):
        written = [first]
    for x in written[:1] if len({id(x.shared_storage) for x in written}) < 2 else written:
        if x.requires_grad and not torch.is_grad_enabled():
            raise NotImplementedError(f"lazy_head: logits with a gradient were written under no_grad; {REMEDY}")
        if x.shared_storage.exposed.keys() - {_storage(made[id(x)])}:
            raise NotImplementedError(
                f"lazy_head: logits were written of which a part was taken before, by another view; {REMEDY}, once"
            )
        if x.own is None:
            x.rows.forget_logits()
        x.own = made[id(x)]
        exposed = x.shared_storage.exposed
        exposed.update({at: (whole, version_of(whole)) for at, (whole, _) in exposed.items()})
        x.note_write()
        out = x if out is x.own else out
    return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


def _writes(func: Any) -> bool:
    """Say whether a function writes into its first argument. Tensors of inference mode count no versions."""
    name = getattr(func, "__name__", "")
    return name in WRITES or (name.endswith("_") and not name.endswith("__"))


class _Node(torch.autograd.Function):
    """Give lazy logits their place in autograd's graph: wrappers walk it, and a gradient that comes to the logits
    themselves, from an autograd.Function that read them, goes on to the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, build: Callable) -> Tensor:
        ctx.set_materialize_grads(False)
        x = build()
        ctx.save_for_backward(hidden, weight, bias)
        ctx.shared_storage, ctx.seen_writes = x.shared_storage, x.seen_writes
        ctx.head, ctx.form, ctx.factor, ctx.size, ctx.kind = x.rows.head, x.form, x.factor, tuple(x.shape), x.dtype
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is None:
            return None, None, None, None
        if ctx.shared_storage.writes != ctx.seen_writes:
            raise NotImplementedError(
                "lazy_head: logits that were written in place were read by an autograd.Function; write into a copy:"
                " logits = logits / temperature"
            )
        inputs: list[Any] = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        hidden, weight, bias = inputs
        with torch.enable_grad():
            head = LinearHead(weight, bias, ctx.head.scale, ctx.head.inner, ctx.head.capped)
            rows = Rows(hidden, head, Source(None, hidden, head))
            z = LazyLogits.of(rows, ctx.size, ctx.kind, ctx.form, ctx.factor, attached=False).make()
        wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        grads = iter(torch.autograd.grad(z, wanted, grad))
        return *(next(grads) if need else None for need in ctx.needs_input_grad[:3]), None


class _Make(torch.autograd.Function):
    """Make lazy logits whose gradient goes to another autograd.Function."""

    @staticmethod
    def forward(_ctx: Any, x: LazyLogits) -> Tensor:
        return x.computed().clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _CallBackwardHooks(torch.autograd.Function):
    """Let the backward pass of an answer reach those who wrapped the logits (DDP's sink, FSDP's hooks). They get no
    gradient from it: it went past the logits."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *hooked: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(hooked)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return grad, *[None] * ctx.count


@functools.cache
def _dtype_of(func: Any, dtype: torch.dtype, device: str, _autocast: Any, options: tuple) -> torch.dtype:
    with torch.no_grad():
        return func(torch.zeros(1, 2, dtype=dtype, device=device), *options).dtype


def result_dtype(func: Any, x: Tensor, *options: Any) -> torch.dtype:
    """Return the dtype that torch's function would give of such logits, as autocast has it now."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return _dtype_of(func, x.dtype, device, autocast, options)


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return prod(shape)
