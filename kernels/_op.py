"""An op is a plain-torch function. `@op` gives it a schema and lets faster kernels replace it.

    signature -> schema     body -> reference, and the last backend tried     body on fake tensors -> output shapes

At import each op gets its backends by device, best first: a compiled kernel (csrc/), Triton's (kernels/triton/), the
reference. `op.backends` lists those that can run here, `op.why(device)` gives the chosen one and the reason,
`op.backend("reference")` forces one; kernels/_backends.py lists the environment variables.

`op.gradient(wrt=...)` declares once which inputs have a gradient; no other has one, on no backend. A second derivative
raises, and so does the first of a call that writes an argument in place. In forward mode and in torch.func's transforms
of gradients the reference runs, which torch differentiates.

A NaN reaches what is computed from it, and nothing else (tests/test_nan.py tries every op on every backend). It makes
NaN of the outputs and gradients of its own token or row, and of sums and extremes over the batch, such as losses and
statistics. A comparison with it is false: a count (of clipped tokens, of ordered pairs) leaves it out. A NaN of a token
that is masked out, ignored, or of weight 0 reaches nothing. One in a tensor that all rows share, such as a weight
matrix, may also reach the gradients of ignored rows. `sample_tokens` has no token for a row with a NaN: -1.

An op is kernels/<op>.py: signature, reference, checks, launchers of compiled kernels, inputs for tests. Its kernels are
in csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu and kernels/triton/<op>.py. Files of kernels/ that begin with _ are shared:

    _op, _op_backends, _arguments, _autograd, _backends, _launch, _openmp, _tensors     every op
    _head, _head_checks, _head_inputs               token_logprobs, linear_{logprobs,cross_entropy,kl,ppo_loss}
    _cpu_head                                       these linear_* ops on the CPU
    _product                                        linear, linear_sample_tokens and _cpu_head; switch of bfloat16
    _ppo                                            ppo_loss, linear_ppo_loss; KL estimates of ppo_advantages
    _ppo_loss                                       ppo_loss
    _gae                                            gae, gae_packed, ppo_advantages
    _sampling                                       sample_tokens, linear_sample_tokens
    _norm, _rope                                    rms_norm, layer_norm; rope, rope_store
    _varlen_plan                                    varlen_attention

kernels/triton/ has _head, _ppo, _norm and _rope of its own, and launch for every op, _logits, _softmax and _target for
token_logprobs and linear_*, _scoring for linear_* without gradient, _scale for the gradients of linear_cross_entropy
and linear_ppo_loss, _norm_backward for those of _norm's ops, _scan for the ops of _gae, _gumbel and _filters for
_sampling's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from rlhf_fast.kernels._arguments import (
    check_floating,
    check_readable,
    check_tensors,
    explain,
    has_tangents,
    is_tracing,
    is_transformed,
    join_rows,
    row_indices,
    schema,
    split_rows,
    tensor_parameters,
    unexpected_argument,
    variant_signature,
)
from rlhf_fast.kernels._autograd import autograd_function, refuse_backward, refuse_gradient
from rlhf_fast.kernels._backends import DEVICES, forced_backend, forcing, is_backward
from rlhf_fast.kernels._launch import NOT_COMPILED_FOR_GPU, Unsupported
from rlhf_fast.kernels._op_backends import Backends

Names = tuple[str, ...]
OPS: dict[str, Op] = {}
META = torch.device("meta")
TRANSFORMS = "forward-mode derivatives, and gradients in torch.func's transforms, are plain torch's"
_library = torch.library.Library("rlhf_fast", "FRAGMENT")


class Op(Backends):
    """Call an op to run the best kernel for its tensors' device; `.reference` is its definition in plain torch."""

    signature: inspect.Signature
    names: tuple[str, ...]  # of the parameters
    defaults: dict[str, Any]
    default_args: tuple  # one per parameter; None for a parameter without a default
    num_required: int  # parameters without a default, which stand before the others
    required_tensors: tuple[int, ...]  # indices of the arguments that may not be None
    tensors: tuple[tuple[int, frozenset[torch.dtype]], ...]  # indices of those that may be one, with refused dtypes
    rows: tuple[int, ...]  # indices of the arguments that are numbers, or tensors of one number per row
    mutates: tuple[int, ...]  # indices of the arguments that the op writes in place
    normalizer: Callable | None  # registered by `normalize`
    cost_function: Callable | None  # registered by `cost`
    make_inputs: Callable[..., tuple]  # registered by `inputs`, with two lists of its keyword arguments:
    small_sizes: list[dict]
    large_sizes: list[dict]
    stats: tuple[str, ...]  # the names of the op's statistics, if it returns any
    gradient_inputs: tuple[int, ...]  # indices of the arguments that have a gradient, on every backend
    torch_op: Callable  # torch.ops.rlhf_fast.<name>
    autograd: type[torch.autograd.Function]  # torch_op with the gradient that `gradient` registered
    differentiable: Callable  # its apply, or torch_op without a gradient

    def __init__(self, body: Callable, fake: Callable | None = None, mutates: Names = (), rows: Names = ()):
        functools.update_wrapper(self, body)
        self.signature = inspect.signature(body)
        parameters = self.signature.parameters
        self.names = tuple(parameters)
        self.defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        self.default_args = tuple(self.defaults.get(name) for name in self.names)
        self.num_required = len(self.names) - len(self.defaults)
        self.tensors = tensor_parameters(self.signature)
        self.required_tensors = tuple(i for i, p in enumerate(parameters.values()) if p.annotation is Tensor)
        self.rows = row_indices(body.__name__, self.signature, rows)
        self.mutates = tuple(i for i, name in enumerate(self.names) if name in mutates)
        super().__init__(body.__name__, body)
        self.normalizer = None
        self.cost_function = None
        self.stats = self.gradient_inputs = ()
        _library.define(self.name + schema(body, mutates, rows))
        for device in DEVICES:
            _library.impl(self.name, functools.partial(self._run_dispatched, device), device.upper())
        torch.library.register_fake(f"rlhf_fast::{self.name}", self._on_one_device(fake or body), lib=_library)
        self.torch_op = self.differentiable = getattr(torch.ops.rlhf_fast, self.name).default
        OPS[self.name] = self

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != len(self.names):
            args = self.bind(*args, **kwargs)
        try:
            for i in self.required_tensors:
                if args[i] is None:
                    check_tensors(self.name, self.signature, args)
            in_forward_mode = forward_ad._current_level >= 0 and has_tangents(
                self.name, self.names, self.gradient_inputs, args
            )
            if self.normalizer is not None:
                args = self.normalizer(*args)
            if in_forward_mode:
                return self._run_plain(*args)
            if self.gradient_inputs and torch.is_grad_enabled():
                for i in self.gradient_inputs + self.mutates:
                    a = args[i]
                    if a is not None and a.requires_grad:
                        return self._run_differentiable(*args)
                # where torch.compile traces a transform of torch.func, no tensor says that it requires a gradient
                if torch.compiler.is_compiling() and is_transformed():
                    return self._run_plain(*args)
            return self.run(*args)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # perhaps of what is no dense tensor
            explain(self.name, self.signature, args, error)
            raise

    def __get__(self, instance: object, owner: type | None = None) -> Op:
        """Return the op itself when it is an attribute of a class. With this method inspect takes it for a routine, so
        help() prints its signature."""
        return self

    def __repr__(self) -> str:
        return f"<op {self.name}{self.signature}>"

    def bind(self, *args, **kwargs) -> tuple:
        """Return one argument per parameter, in order, with the defaults filled in."""
        if not kwargs and self.num_required <= len(args) <= len(self.names):
            return args + self.default_args[len(args) :]
        if len(args) > len(self.names):
            raise TypeError(f"{self.name} takes {len(self.names)} arguments, got {len(args)}")
        bound = list(args)
        for name in self.names[len(args) :]:
            if name in kwargs:
                bound.append(kwargs.pop(name))
            elif name in self.defaults:
                bound.append(self.defaults[name])
            else:
                raise TypeError(f"{self.name} misses the argument {name!r}")
        if kwargs:
            raise TypeError(unexpected_argument(self.name, self.names, next(iter(kwargs))))
        return tuple(bound)

    def _run_differentiable(self, *args):
        """Run the op with its gradient."""
        self._check_nothing_is_written(args)
        if not torch.compiler.is_compiling() and is_transformed():
            return self._run_plain(*args)
        return self.differentiable(*args)

    def _run_plain(self, *args):
        """Run the reference, which torch differentiates itself, in forward mode and in functorch's transforms."""
        self._check_nothing_is_written(args)
        self._report_fallback(TRANSFORMS, of_transforms=True)
        return self.reference(*self._without_other_gradients(args))

    def _check_nothing_is_written(self, args: tuple) -> None:
        """Raise ValueError where an argument would be written in place: the gradient needs what it was before."""
        for i in self.mutates:
            if args[i] is not None:
                raise ValueError(
                    f"{self.name}: there is no gradient where {self.names[i]} is written in place; add it to x before"
                    " the call, or call within torch.no_grad()"
                )

    def _without_other_gradients(self, args: tuple) -> list:
        return [
            a.detach() if isinstance(a, Tensor) and i not in self.gradient_inputs else a for i, a in enumerate(args)
        ]

    def normalized(self, *args, **kwargs) -> tuple:
        """Return the arguments that the reference and the kernels receive for this call: bound, checked, converted."""
        args = self.bind(*args, **kwargs)
        return args if self.normalizer is None else self.normalizer(*args)

    def run(self, *args):
        """Run the chosen kernel on normalized arguments, without gradient. The call goes through torch's dispatcher
        only for tracing, tensor subclasses, other devices, and tensors that are lazily negative or zero: it would
        double the time of a small call."""
        if is_tracing():
            return self.dispatch(*args)
        device = None
        has_cpu = False
        try:
            for i, refused in self.tensors:
                a = args[i]
                kind = type(a)
                if kind is Tensor or kind is Parameter:
                    if a.is_cpu:
                        has_cpu = True
                    elif device is None:
                        device = a.device
                    elif a.device != device:
                        raise self._mixed_devices_error(args)
                    if a.dtype in refused or a.is_neg() or (not a.data_ptr() and a.numel() and a.device != META):
                        check_readable(self.name, self.names, args)
                        return self.dispatch(*args)
                elif a is not None and isinstance(a, Tensor):
                    return self.dispatch(*args)
        except RuntimeError:  # of data_ptr(): the gradients of `is_grads_batched` have none
            check_readable(self.name, self.names, args)
            return self.dispatch(*args)
        if device is None:
            return self._run_kernel("cpu", *args) if has_cpu else self.dispatch(*args)
        if has_cpu:
            raise self._mixed_devices_error(args)
        return self._run_kernel(device.type, *args) if device.type in DEVICES else self.dispatch(*args)

    def dispatch(self, *args):
        """Call torch_op, by its schema, on normalized arguments."""
        return self.torch_op(*split_rows(args, self.rows))

    def _run_dispatched(self, device: str, *args):
        """Run the chosen kernel for torch's dispatcher, which looks at the device of only one tensor."""
        args = join_rows(args, self.rows, len(self.names))
        if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
            raise self._mixed_devices_error(args)
        check_readable(self.name, self.names, args)
        return self._run_kernel(device, *args)

    def _on_one_device(self, fake: Callable) -> Callable:
        """Return `fake` with a check: if one tensor is on the device "meta", the dispatcher asks for shapes alone."""

        @functools.wraps(fake)
        def run(*args):
            args = join_rows(args, self.rows, len(self.names))
            if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
                raise self._mixed_devices_error(args)
            check_floating(self.name, self.names, args)
            return fake(*args)

        return run

    def _mixed_devices_error(self, args: tuple) -> ValueError:
        devices = ", ".join(str(a.device) for a in args if isinstance(a, Tensor))
        return ValueError(f"{self.name}: all tensors must be on one device, got {devices}")

    def _run_kernel(self, device: str, *args):
        """Run the forced backend, or the first one of `preference` that serves these tensors of type `device`."""
        args += self.default_args[len(args) :]  # the dispatcher drops trailing arguments that equal their defaults
        forced = forced_backend()
        for i in self.mutates:  # autograd does not see a kernel's writes
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        if forced is not None and not self.can_run(forced, device):
            if not is_backward():
                raise ValueError(self._missing_backend_error(forced, f" for {device} tensors"))
            forced = None
        why = None
        for backend in self.preference[device] if forced is None else (forced,):
            if backend == "reference":
                break
            try:
                if device == "cpu":
                    return self.implementations[backend](*args)
                with torch.cuda.device(next(a.device for a in args if isinstance(a, Tensor))):
                    return self.implementations[backend](*args)
            except Unsupported as unsupported:
                why = why or str(unsupported)
            except RuntimeError as error:
                if forced is not None or not any(text in str(error) for text in NOT_COMPILED_FOR_GPU):
                    raise
                reason = self._drop_backend(backend, device, error)
                why = why or reason
        if forced != "reference":
            self._report_fallback(why or self.why(device))
        return self._run_reference(*args)

    @torch.no_grad()
    def _run_reference(self, *args):
        """Run the reference without gradient, as every other backend runs."""
        return self.reference(*args)

    def backend(self, name: str) -> Callable:
        """Return this op, forced to one backend: `gae.backend("cpu:avx2")(...)`. "cpu" means the best instruction
        set."""
        name = self.chosen("cpu") if name == "cpu" else name
        if name not in self.implementations:
            raise ValueError(self._missing_backend_error(name))

        def run(*args, **kwargs):
            with forcing(name):
                return self(*args, **kwargs)

        return run

    def normalize(self, normalizer: Callable) -> Callable:
        """Register `normalizer(*args) -> args`. It checks the arguments and raises ValueError (the op, the rule, the
        value it got), and converts them to the one form that the reference and the kernels receive."""
        self.normalizer = normalizer
        return normalizer

    def gradient(
        self,
        backward: Callable,
        *,
        wrt: tuple[str, ...],
        setup_context: Callable | None = None,
        forward: Callable | None = None,
    ) -> None:
        """Register the gradient, in torch.autograd.Function's terms, with respect to the inputs `wrt`. No other input
        has a gradient, on no backend.

        Give `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)`; or, where the forward pass itself
        computes the gradients, `forward(ctx, *args)` and `backward(ctx, *grads)`. A second derivative raises: the
        kernels do not record one.
        """
        name = self.name

        def run(*args):
            return OPS[name].run(*args)

        self.gradient_inputs = tuple(self.names.index(input_name) for input_name in wrt)
        if self.mutates:  # torch registers no gradient of an op that writes
            _library.impl(name, refuse_gradient(name, self.torch_op), "Autograd")
        else:
            refuse = functools.partial(refuse_backward, name)
            torch.library.register_autograd(f"rlhf_fast::{name}", refuse, lib=_library)
        self.autograd = autograd_function(name, run, backward, setup_context, forward)
        self.differentiable = self.autograd.apply

    @property
    def has_gradient(self) -> bool:
        return bool(self.gradient_inputs)

    def has_gradient_at(self, size: dict) -> bool:
        """Return whether the op has a gradient at one of its sizes: not where an argument is written in place, which a
        size asks for by the argument's name."""
        return self.has_gradient and not any(size.get(self.names[i]) for i in self.mutates)

    def variant(
        self, *, outputs: int, tensors: Names = (), flags: Names = (), fake: Callable | None = None
    ) -> Callable[[Callable], Op]:
        """Return a decorator that makes another op, which this op's forward or backward pass runs.

        Its parameters are the Tensors `tensors`, then this op's parameters without their defaults, then the bools
        `flags`. It returns a tensor, or a tuple of `outputs` tensors. The decorated function has its name."""

        def register(body: Callable) -> Op:
            vars(body)["__signature__"] = variant_signature(self.signature, outputs, tensors, flags)
            return Op(body, fake, rows=tuple(self.names[i] for i in self.rows))

        return register

    def cost(self, cost_function: Callable) -> Callable:
        """Register `cost_function(gradient, *args) -> (bytes, flops)`: the least that a call on normalized arguments
        must move and compute, with its gradients or without. Without it, benches count each tensor once."""
        self.cost_function = cost_function
        return cost_function

    def inputs(self, *, small_sizes: list[dict], large_sizes: list[dict]):
        """Register `make_inputs(device, dtype, **size) -> args`. Tests run the small sizes, benches the large ones."""

        def register(make_inputs: Callable) -> Callable:
            self.make_inputs = make_inputs
            self.small_sizes = small_sizes
            self.large_sizes = large_sizes
            return make_inputs

        return register


def op(body: Callable | None = None, *, fake: Callable | None = None, mutates: Names = (), rows: Names = ()):
    """Make an op of a plain-torch function with a typed signature. `fake` returns empty outputs, for a body slow to
    trace. `mutates` names arguments that are written in place, `rows` numbers that may be a tensor, one per row."""
    return Op(body, fake, mutates, rows) if body else functools.partial(Op, fake=fake, mutates=mutates, rows=rows)
