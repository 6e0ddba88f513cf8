"""An op is a plain-torch function. `@op` gives it a schema and lets faster kernels replace it.

    signature -> schema     body -> reference, and the last backend tried     body on fake tensors -> output shapes

At import each op gets its backends by device, best first: a compiled kernel (csrc/), Triton's (kernels/triton/), the
reference. `op.backends` lists those that can run here, `op.why(device)` gives the chosen one and the reason,
`op.backend("reference")` forces one; kernels/_backends.py lists the environment variables.

An op is kernels/<op>.py: signature, reference, checks, launchers of compiled kernels, inputs for tests. Its kernels are
in csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu and kernels/triton/<op>.py. Files of kernels/ that begin with _ are shared:

    _op, _autograd, _backends, _launch, _tensors    every op
    _head, _head_checks, _head_inputs               token_logprobs, linear_{logprobs,cross_entropy,kl,ppo_loss}
    _cpu_head                                       these linear_* ops on the CPU
    _ppo                                            ppo_loss, linear_ppo_loss; KL estimates of ppo_advantages
    _ppo_loss                                       ppo_loss
    _gae                                            gae, gae_packed, ppo_advantages
    _sampling                                       sample_tokens, linear_sample_tokens
    _norm                                           rms_norm, layer_norm

kernels/triton/ has _head, _ppo and _norm of its own, and launch for every op, _logits and _softmax for token_logprobs
and linear_*, _scoring for linear_* without gradient, _scale for the gradients of linear_cross_entropy and
linear_ppo_loss, _scan for the ops of _gae, _gumbel and _filters for _sampling's.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import GenericAlias
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.kernels._autograd import autograd_function
from rlhf_fast.kernels._backends import (
    COMPILED,
    DEVICES,
    TRITON_DEFAULT_DEVICES,
    TRITON_DEVICES,
    WHY_MISSING,
    forced_backend,
    forcing,
    is_strict,
)
from rlhf_fast.kernels._launch import NOT_COMPILED_FOR_GPU, Unsupported

log = logging.getLogger("rlhf_fast")
OPS: dict[str, Op] = {}
_library = torch.library.Library("rlhf_fast", "FRAGMENT")
_TRITON_FILES = Path(__file__).parent / "triton"


def is_tracing() -> bool:
    """Return True under torch.compile, a dispatch or function mode (fake tensors), or a functorch transform (vmap)."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


class Op:
    """Call an op to run the best kernel for its tensors' device; `.reference` is its definition in plain torch."""

    name: str
    reference: Callable
    signature: inspect.Signature
    names: tuple[str, ...]  # of the parameters
    defaults: dict[str, Any]
    default_args: tuple  # one per parameter; None for a parameter without a default
    mutates: tuple[int, ...]  # indices of the arguments that the op writes in place
    implementations: dict[str, Callable]  # backend -> kernel, on normalized arguments
    preference: dict[str, list[str]]  # device -> backends in the order in which they are tried
    required_symbols: dict[str, tuple[str, ...]]  # device -> names of the compiled kernels that its launcher calls
    normalizer: Callable | None  # registered by `normalize`
    cost_function: Callable | None  # registered by `cost`
    make_inputs: Callable[..., tuple]  # registered by `inputs`, with two lists of its keyword arguments:
    small_sizes: list[dict]
    large_sizes: list[dict]
    stats: tuple[str, ...]  # the names of the op's statistics, if it returns any
    has_gradient: bool
    has_warned: bool
    torch_op: Callable  # torch.ops.rlhf_fast.<name>
    differentiable: Callable  # torch_op with the gradient that `gradient` registered

    def __init__(self, body: Callable, fake: Callable | None = None, mutates: tuple[str, ...] = ()):
        functools.update_wrapper(self, body)
        self.name = body.__name__
        self.reference = body
        self.signature = inspect.signature(body)
        self.names = tuple(self.signature.parameters)
        self.defaults = {k: p.default for k, p in self.signature.parameters.items() if p.default is not p.empty}
        self.default_args = tuple(self.defaults.get(name) for name in self.names)
        self.mutates = tuple(i for i, name in enumerate(self.names) if name in mutates)
        self.implementations = {"reference": body}
        self.preference = {device: ["reference"] for device in DEVICES}
        self.required_symbols = {}
        self.normalizer = None
        self.cost_function = None
        self.stats = ()
        self.has_gradient = False
        self.has_warned = False
        self._register_triton()
        _library.define(self.name + torch.library.infer_schema(body, mutates_args=mutates))
        for device in DEVICES:
            _library.impl(self.name, functools.partial(self._run_dispatched, device), device.upper())
        torch.library.register_fake(f"rlhf_fast::{self.name}", fake or body, lib=_library)
        self.torch_op = self.differentiable = getattr(torch.ops.rlhf_fast, self.name).default
        OPS[self.name] = self

    def _register_triton(self) -> None:
        """Register the function with the op's name in the file of kernels/triton/ with the name of the op's own file.
        That file is imported by the first call."""
        stem = Path(self.reference.__code__.co_filename).stem
        if TRITON_DEVICES and (_TRITON_FILES / f"{stem}.py").is_file():
            module = f"rlhf_fast.kernels.triton.{stem}"
            self.implementations["triton"] = lambda *args: getattr(import_module(module), self.name)(*args)
            for device in TRITON_DEFAULT_DEVICES:
                self.preference[device].insert(0, "triton")

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != len(self.names):
            args = self.bind(*args, **kwargs)
        if self.normalizer is not None:
            args = self.normalizer(*args)
        if forced_backend() == "reference":
            return self.reference(*args) if self.has_gradient else self._run_reference(*args)
        needs_grad = self.has_gradient and torch.is_grad_enabled()
        if needs_grad and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return self.differentiable(*args)
        return self.run(*args)

    def __get__(self, instance: object, owner: type | None = None) -> Op:
        """Return the op itself when it is an attribute of a class. With this method inspect takes it for a routine, so
        help() prints its signature."""
        return self

    def __repr__(self) -> str:
        return f"<op {self.name}{self.signature}>"

    def bind(self, *args, **kwargs) -> tuple:
        """Return one argument per parameter, in order, with the defaults filled in."""
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
            raise TypeError(
                f"{self.name} has no argument {next(iter(kwargs))!r}, or it was given twice; it takes {self.names}"
            )
        return tuple(bound)

    def normalized(self, *args, **kwargs) -> tuple:
        """Return the arguments that the reference and the kernels receive for this call: bound, checked, converted."""
        args = self.bind(*args, **kwargs)
        return args if self.normalizer is None else self.normalizer(*args)

    def run(self, *args):
        """Run the chosen kernel on normalized arguments, without gradient. The call goes through torch's dispatcher
        only for tracing, tensor subclasses and other devices: it would double the time of a small call."""
        device = None
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                if device is None:
                    device = a.device
                elif a.device != device:
                    raise self._mixed_devices_error(args)
            elif isinstance(a, Tensor):
                return self.torch_op(*args)
        if device is None or device.type not in DEVICES or is_tracing():
            return self.torch_op(*args)
        return self._run_kernel(device.type, *args)

    def _run_dispatched(self, device: str, *args):
        """Run the chosen kernel for torch's dispatcher, which looks at the device of only one tensor."""
        if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
            raise self._mixed_devices_error(args)
        return self._run_kernel(device, *args)

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
            raise ValueError(self._missing_backend_error(forced, f" for {device} tensors"))
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

    def _drop_backend(self, backend: str, device: str, error: RuntimeError) -> str:
        """Do not try a backend again that was not compiled for this GPU, and return the reason."""
        self.preference[device] = [other for other in self.preference[device] if other != backend]
        reason = f"csrc/cuda was not compiled for this GPU ({error}); set RLHF_FAST_CUDA_ARCHS and install again"
        WHY_MISSING[device] = reason
        return reason

    def _report_fallback(self, why: str) -> None:
        """Warn once that the reference runs in a kernel's place, or raise within `strict`."""
        if is_strict():
            raise RuntimeError(f"{self.name}: RLHF_FAST_STRICT=1 and no kernel answers: {why}")
        if not self.has_warned:
            self.has_warned = True
            log.warning("%s runs on its plain-torch reference: %s", self.name, why)

    @torch.no_grad()
    def _run_reference(self, *args):
        """Run the reference without gradient, as every other backend runs."""
        return self.reference(*args)

    def _missing_backend_error(self, backend: str, where: str = "") -> str:
        why = WHY_MISSING.get(backend.partition(":")[0])
        error = f"{self.name}: no backend {backend!r} here{where}; there are: {', '.join(self.backends)}"
        return f"{error} ({backend}: {why})" if why else error

    def can_run(self, backend: str, device: str) -> bool:
        """Return whether `backend` can be forced on tensors of `device`."""
        if backend not in self.implementations:
            return False
        family = backend.partition(":")[0]
        if family == "triton":
            return device in TRITON_DEVICES
        return family in ("reference", device) or (family == "simt" and device == "cpu")

    @property
    def backends(self) -> list[str]:
        """The backends that can run here, best last: "reference", "triton", "cpu:generic", "cpu:avx2", ..., "cuda"."""
        return list(self.implementations)

    def chosen(self, device: str) -> str:
        """Return the backend that runs for tensors of `device`."""
        return self.preference[device][0] if device in self.preference else "reference"

    def why(self, device: str) -> str:
        """Return one line: the backend that runs on `device`, and why there is no better one."""
        chosen = self.chosen(device)
        if chosen == "triton":
            return f"Triton; no compiled kernel: {self._why_not_compiled(device)}"
        if chosen != "reference":
            return f"compiled kernel {chosen}"
        why = self._why_not_compiled(device)
        if device == "cuda" and "triton" in WHY_MISSING:
            why += f"; no Triton: {WHY_MISSING['triton']}"
        return why

    def _why_not_compiled(self, device: str) -> str:
        symbols = ", ".join(self.required_symbols.get(device, (self.name,)))
        return WHY_MISSING.get(device) or f"csrc/{device} has no kernel {symbols}"

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

    def compiled(
        self,
        launch: Callable | None = None,
        *,
        required_symbols: tuple[str, ...] | None = None,
        devices: tuple[str, ...] = DEVICES,
    ):
        """Register `launch(kernels, *args)` for tensors of `devices`, where csrc/ has all of `required_symbols` (by
        default the op's name). The backend "simt" runs the launcher for "cuda" on CPU tensors."""
        if launch is None:
            return functools.partial(self.compiled, required_symbols=required_symbols, devices=devices)
        symbols = required_symbols or (self.name,)
        self.required_symbols |= dict.fromkeys(devices, symbols)
        for backend, module in COMPILED.items():
            family = backend.partition(":")[0]
            device = "cuda" if family == "simt" else family
            if device not in devices or not all(hasattr(module, symbol) for symbol in symbols):
                continue
            self.implementations[backend] = functools.partial(launch, module)
            if family == "simt":  # runs only where it is forced
                continue
            if self.preference[device][0] in COMPILED:  # an older instruction set
                self.preference[device].pop(0)
            self.preference[device].insert(0, backend)
        return launch

    def gradient(
        self, backward: Callable, *, setup_context: Callable | None = None, forward: Callable | None = None
    ) -> None:
        """Register the gradient, in torch.autograd.Function's terms.

        Give `setup_context(ctx, inputs, output)` and `backward(ctx, *grads)`; or, where the forward pass itself
        computes the gradients, `forward(ctx, *args)` and `backward(ctx, *grads)`. A second derivative raises: the
        kernels do not record one.
        """
        name = self.name

        def run(*args):
            return OPS[name].run(*args)

        self.has_gradient = True
        self.differentiable = autograd_function(name, run, backward, setup_context, forward)

    def variant(
        self,
        *,
        outputs: int,
        tensors: tuple[str, ...] = (),
        flags: tuple[str, ...] = (),
        fake: Callable | None = None,
    ) -> Callable[[Callable], Op]:
        """Return a decorator that makes another op, which this op's forward or backward pass runs.

        Its parameters are the Tensors `tensors`, then this op's parameters without their defaults, then the bools
        `flags`. It returns `outputs` tensors. The decorated function has its name and takes the arguments by position.
        """
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=Tensor) for name in tensors]
        parameters += [p.replace(default=p.empty) for p in self.signature.parameters.values()]
        parameters += [inspect.Parameter(name, kind, annotation=bool) for name in flags]
        signature = inspect.Signature(parameters, return_annotation=GenericAlias(tuple, (Tensor,) * outputs))

        def register(body: Callable) -> Op:
            vars(body)["__signature__"] = signature
            return Op(body, fake)

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


def op(body: Callable | None = None, *, fake: Callable | None = None, mutates: tuple[str, ...] = ()):
    """Make an op of a plain-torch function with a typed signature. `fake` returns empty outputs, for a body that is too
    slow to trace. `mutates` names the arguments that the body writes in place."""
    return Op(body, fake, mutates) if body else functools.partial(Op, fake=fake, mutates=mutates)
