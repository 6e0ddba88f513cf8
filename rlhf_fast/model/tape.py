"""The operations of a decoder layer, by autograd or on a tape of our own.

Autograd makes a node for each op, which costs a small model on a CPU as much time as some kernels. On a tape a layer is
one node: `Tape` runs the same ops, records them, and calls their gradients in the reverse order. Only what the
gradients read is kept. Layer code takes an `Autograd` or a `Tape` and computes with its methods alone.

    TapedLayer      forward    run(tape, x): y = tape.apply(ops.rms_norm, x, weight, eps), ...
                    backward   the gradient functions of these ops (Op.gradient), last op first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from rlhf_fast import ops
from rlhf_fast.kernels._op import Op
from rlhf_fast.kernels._product import f32_is_ours
from rlhf_fast.model.adjacent_weights import joined
from rlhf_fast.model.architectures import Norm


class Autograd:
    """Operations whose gradients are autograd's."""

    def apply(self, op: Op, *args: Any) -> Tensor:
        """Call an op with one output."""
        return op(*args)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        """Return the RMSNorm or LayerNorm of x."""
        op, *args = _norm_call(norm)
        return self.apply(op, x, *args)

    def add_norm(self, norm: Norm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + y and its norm. y may be overwritten."""
        x = x + y
        return x, self.norm(norm, x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def silu(self, x: Tensor, exact: bool) -> Tensor:
        """Return x / (1 + exp(-x)). exact: as the decode step computes it."""
        return ops.swiglu(x, torch.ones_like(x)) if exact else F.silu(x)

    def rows(self, x: Tensor, index: Tensor, is_unique: bool) -> Tensor:  # noqa: ARG002
        """Return the rows of x (N, D) at `index` (n,). is_unique: none comes twice."""
        return x[index]

    def view(self, x: Tensor, *shape: int) -> Tensor:
        return x.view(*shape)

    def split(self, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """Split dimension 1."""
        return x.split(sizes, 1)

    def unbind(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        return x.unbind(dim)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x with the values of `dtype`."""
        return x.to(dtype).to(x.dtype)

    def linear(self, module: Any, x: Tensor, exact: bool) -> Tensor:
        """Multiply x (N, D) by a linear layer: by our product where it is about as fast as torch's (`f32_is_ours`), for
        the same bits of a row in any batch, and there is no adapter. exact: in the order of sums of the decode step."""
        if not is_plain(module) or not (exact or _is_ours(x)):
            return module(x)
        return self.apply(ops.linear, x, module.weight, module.bias, type(module) is Conv1D, exact)

    def linears(self, modules: Sequence[Any], x: Tensor, exact: bool) -> Sequence[Tensor]:
        """Multiply x (N, D) by linear layers that read the same input: one output for each, or all as one."""
        return [self.linear(module, x, exact) for module in modules]


class Tape(Autograd):
    """Operations that are recorded, without autograd. leaves: the tensors whose gradients are wanted.

    Linear layers have no adapters. Those with adjacent weights (model/adjacent_weights.py) are one product.
    """

    def __init__(self, leaves: Sequence[Tensor]):
        self._numbers: dict[int, int] = {}
        """id of a tensor that depends on the leaves -> its number. The newest tensor with an id has it."""
        self._count = 0
        self._steps: list[tuple[Callable[..., Sequence[Tensor | None]], list[int | None], list[int]]] = []
        """Gradient function, numbers of the inputs, numbers of the outputs."""
        self._num_leaves = len(leaves)
        for leaf in leaves:
            self._number(leaf)

    def gradients(self, output: int, grad: Tensor) -> list[Tensor | None]:
        """Return the gradients of the leaves, given that of the tensor with number `output`. The tape is empty then."""
        grads: dict[int, Tensor] = {output: grad}
        while self._steps:
            gradient, inputs, outputs = self._steps.pop()
            of_outputs = [grads.pop(number, None) for number in outputs]
            if all(g is None for g in of_outputs):  # nothing that `output` depends on
                continue
            found = gradient(*of_outputs)
            for number, g in zip(inputs, found if isinstance(found, tuple) else (found,), strict=True):
                if number is not None and g is not None:
                    grads[number] = grads[number] + g if number in grads else g
        return [grads.get(number) for number in range(self._num_leaves)]

    def number_of(self, x: Tensor) -> int:
        return self._numbers[id(x)]

    def has_read_all(self, leaves: Sequence[Tensor]) -> bool:
        """Return whether a step has read each of these leaves."""
        read = {number for _, inputs, _ in self._steps for number in inputs}
        return all(self._numbers[id(leaf)] in read for leaf in leaves)

    def apply(self, op: Op, *args: Any) -> Tensor:
        inputs = self._inputs(op, args)
        context = _Context([number is not None for number in inputs])
        out = op.autograd.forward(context, *op.normalized(*args))
        return self._record(partial(op.autograd.backward, context), inputs, out)

    def norm(self, norm: Norm, x: Tensor) -> Tensor:
        op, *args = _norm_call(norm)
        inputs = self._inputs(op, (x, *args))
        context = _Context([number is not None for number in inputs])
        out = op.autograd.forward(context, *op.normalized(x, *args))
        if inputs[0] is None:  # nothing to add to: only the weight has a gradient
            return self._record(partial(op.autograd.backward, context), inputs, out)
        # x goes through this step, under a new number: what reads it later leaves a gradient, which the op adds
        self._record_all(partial(_norm_gradients, op, context), inputs, (x, out))
        return out

    def add_norm(self, norm: Norm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        op, *args = _norm_call(norm)
        inputs = self._inputs(op, (x, *args))
        # the sum's gradient is needed for y even where x has none
        context = _Context([True, *(number is not None for number in inputs[1:])])
        out = op.autograd.forward(context, *op.normalized(x, *args, residual=y))  # y is the sum then

        def gradient(g: Tensor | None, g_out: Tensor | None) -> Sequence[Tensor | None]:
            found = _norm_gradients(op, context, g, g_out)
            return found[0], *found

        self._record_all(gradient, [*self._of(y), *inputs], (y, out))
        return y, out

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return self._record(lambda g: (g, g), self._of(x, y), x + y)

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return self._record(lambda g: (g * y, g * x), self._of(x, y), x * y)

    def silu(self, x: Tensor, exact: bool) -> Tensor:  # noqa: ARG002, it is the decode step's anyway
        ones = torch.ones_like(x)
        self._numbers.pop(id(ones), None)
        return self.apply(ops.swiglu, x, ones)

    def rows(self, x: Tensor, index: Tensor, is_unique: bool) -> Tensor:
        shape = x.shape

        def gradient(g: Tensor) -> Tensor:
            zeros = g.new_zeros(shape)
            return zeros.index_copy_(0, index, g) if is_unique else zeros.index_put_((index,), g, accumulate=True)

        return self._record(gradient, self._of(x), x[index])

    def view(self, x: Tensor, *shape: int) -> Tensor:
        before = x.shape
        return self._record(lambda g: g.reshape(before), self._of(x), x.view(*shape))

    def split(self, x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        return self._record_all(lambda *grads: _whole(grads), self._of(x), x.split(sizes, 1))

    def unbind(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        return self._record_all(lambda *grads: torch.stack(grads, dim), self._of(x), x.unbind(dim))

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        return self._record(lambda g: g, self._of(x), x.to(dtype).to(x.dtype))

    def linear(self, module: Any, x: Tensor, exact: bool) -> Tensor:
        return self._product(x, module.weight, module.bias, type(module) is Conv1D, exact)

    def linears(self, modules: Sequence[Any], x: Tensor, exact: bool) -> Sequence[Tensor]:
        separate = len(modules) == 1 or any(type(module) is not nn.Linear for module in modules)
        joint = None if separate else joined(modules)
        if joint is None:
            return [self.linear(module, x, exact) for module in modules]
        weight, bias = joint
        self._record_parts([module.weight for module in modules], weight)
        if bias is not None:
            self._record_parts([module.bias for module in modules], bias)
        return [self._product(x, weight, bias, False, exact)]

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, exact: bool) -> Tensor:
        if exact or _is_ours(x):
            return self.apply(ops.linear, x, weight, bias, transposed, exact)
        inputs = self._of(x, weight, bias)

        def gradient(g: Tensor) -> Sequence[Tensor | None]:
            to_x, to_weight, to_bias = (number is not None for number in inputs)
            return (
                (g @ weight.t() if transposed else g @ weight) if to_x else None,
                (x.t() @ g if transposed else g.t() @ x) if to_weight else None,
                g.sum(0) if to_bias else None,
            )

        return self._record(gradient, inputs, F.linear(x, weight.t() if transposed else weight, bias))

    def _record_parts(self, parameters: Sequence[Tensor], joint: Tensor) -> None:
        """Record that `joint` has the rows of the parameters."""
        sizes = [p.shape[0] for p in parameters]
        self._record(lambda g: g.split(sizes), self._of(*parameters), joint)

    def _inputs(self, op: Op, args: Sequence[Any]) -> list[int | None]:
        """Return the numbers of an op's arguments that depend on the leaves, None for others."""
        inputs: list[int | None] = [None] * len(op.names)
        for i in op.gradient_inputs:
            if i < len(args):
                inputs[i] = self._numbers.get(id(args[i]))
        return inputs

    def _of(self, *tensors: Tensor | None) -> list[int | None]:
        return [self._numbers.get(id(x)) for x in tensors]

    def _number(self, x: Tensor) -> int:
        self._numbers[id(x)] = self._count
        self._count += 1
        return self._count - 1

    def _record(self, gradient: Callable[..., Any], inputs: list[int | None], out: Tensor) -> Tensor:
        return self._record_all(gradient, inputs, (out,))[0]

    def _record_all(
        self, gradient: Callable[..., Any], inputs: list[int | None], outputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Record a step, unless no input depends on a leaf."""
        if any(number is not None for number in inputs):
            self._steps.append((gradient, inputs, [self._number(out) for out in outputs]))
        else:
            for out in outputs:  # the tensor that had this id is gone
                self._numbers.pop(id(out), None)
        return outputs


class TapedLayer(torch.autograd.Function):
    """run(tape, x) as one node of autograd. parameters: those that it reads. recompute: keep x alone, and run again in
    the backward pass, as a second backward pass does (retain_graph)."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tape, Tensor], Tensor], recompute: bool, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.run = run
        ctx.wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        ctx.save_for_backward(x, *parameters)
        tape = Tape([] if recompute else _leaves(ctx, x, *parameters))
        out = run(tape, x)
        ctx.recorded = None if recompute else (tape, tape.number_of(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # raises after a backward pass without retain_graph
        if ctx.recorded is None:
            leaves = _leaves(ctx, *saved)
            tape = Tape(leaves)
            output = tape.number_of(ctx.run(tape, saved[0]))
            if not tape.has_read_all(leaves):
                raise RuntimeError("a layer's parameters were exchanged between its forward and its backward pass")
        else:
            tape, output = ctx.recorded
            ctx.recorded = None  # a tape serves once
        found = dict(zip(ctx.wanted, tape.gradients(output, grad), strict=True))
        return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _leaves(ctx: Any, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Return the inputs that need a gradient."""
    return [(x, *parameters)[i - 2] for i in ctx.wanted]


class _Context:
    """An op's context in the place of autograd's."""

    def __init__(self, needs_input_grad: Sequence[bool]):
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _norm_call(norm: Norm) -> tuple[Any, ...]:
    """Return the op of a norm and its arguments behind x."""
    if norm.centered:
        return ops.layer_norm, norm.weight, norm.bias, norm.eps
    return ops.rms_norm, norm.weight, norm.eps


def _norm_gradients(op: Op, context: _Context, of_sum: Tensor | None, of_out: Tensor | None) -> tuple[Any, ...]:
    """Return the gradients of a norm's arguments, given those of what it reads and of its output."""
    if of_out is None:
        return of_sum, *[None] * (len(op.names) - 1)
    return op.autograd.backward(context, of_out, of_sum)


def is_plain(module: Any) -> bool:
    """Return whether a linear layer has no adapter."""
    return type(module) in (nn.Linear, Conv1D)


def _is_ours(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and f32_is_ours(x.shape[0])


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """Return torch.cat(parts, 1); without a copy where they stand side by side in the rows of one tensor."""
    first, begin = parts[0], parts[0].data_ptr()
    storage, width = first.untyped_storage().data_ptr(), sum(part.shape[1] for part in parts)
    rest = first.shape[2:]
    stride = torch.empty(0, width, *rest, device="meta").stride()
    for part in parts:
        is_next = part.data_ptr() == begin and part.untyped_storage().data_ptr() == storage
        if not is_next or part.stride() != stride:
            return torch.cat(list(parts), 1)
        begin += part.shape[1] * stride[1] * part.element_size()
    return first.as_strided((first.shape[0], width, *rest), stride)
