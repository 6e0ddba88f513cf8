"""An op is a plain-torch function. `@op` lets a faster kernel answer for it on a device that has one.

    signature -> schema     body -> reference, and the kernel of last resort     body on fake tensors -> shapes

Who answers on a device is settled once, at import: a compiled kernel (csrc/), then Triton's (kernels/triton/), then the
body. `op.backends` lists what can run here, `op.why(device)` says who answers and why nobody better does,
`op.backend("reference")` forces one.

    RLHF_FAST_BACKEND=reference    one backend for a whole run
    RLHF_FAST_ISA=generic|avx2|avx512    the instruction set of the CPU kernels (default: the best that runs here)
    RLHF_FAST_STRICT=1             an error where the reference would answer in a kernel's place
    TRITON_INTERPRET=1             Triton's kernels can be forced on CPU tensors, run by its interpreter: for tests
    RLHF_FAST_SIMT=PATH            so can csrc/cuda's, from a module that tests/simt compiles for the CPU
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from rlhf_fast.kernels._backends import COMPILED, DEVICES, MISSING, TRITON_ANSWERS, TRITON_FORCED

log = logging.getLogger("rlhf_fast")
OPS: dict[str, Op] = {}
_library = torch.library.Library("rlhf_fast", "FRAGMENT")


class Declined(Exception):
    """Raised by a launcher for inputs that its kernel does not serve (a dtype, mostly): the reference answers."""


_TRITON_FILES = Path(__file__).parent / "triton"
_FORCED_BY_ENVIRONMENT = os.environ.get("RLHF_FAST_BACKEND") or None
_STRICT = os.environ.get("RLHF_FAST_STRICT") == "1"


class _Choice(threading.local):
    """The backend that this thread forces; a thread starts with the environment's."""

    forced: str | None = _FORCED_BY_ENVIRONMENT


_choice = _Choice()


@contextlib.contextmanager
def forcing(backend: str | None) -> Iterator[None]:
    """Every op that this thread calls inside runs on `backend`; an op without it raises."""
    before, _choice.forced = _choice.forced, backend
    try:
        yield
    finally:
        _choice.forced = before


def forced_backend() -> str | None:
    """The backend that this thread forces, by `forcing` or RLHF_FAST_BACKEND."""
    return _choice.forced


def lane(x: Tensor) -> int:
    """What a kernel runs on, its last argument: the number of threads for a CPU tensor, the stream for a CUDA one."""
    return torch.get_num_threads() if x.device.type == "cpu" else torch.cuda.current_stream(x.device).cuda_stream


def addresses(*tensors: Tensor | None) -> list[int]:
    """Of what a compiled kernel reads and writes; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def wide(x: Tensor) -> Tensor:
    """float32 for statistics; float64 stays, so that a reference on float64 inputs is the truth."""
    return x if x.dtype == torch.float64 else x.float()


def one_width(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in float64 if one of them is (the kernels decline it): what the reference computes, seen from its inputs."""
    if any(x is not None and x.dtype == torch.float64 for x in tensors):
        return tuple(x if x is None else x.double() for x in tensors)
    return tensors


def _traced() -> bool:
    """True while somebody traces or transforms calls: torch.compile, a dispatch mode (fake tensors), vmap."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _once(name: str, backward: Callable, ctx, grads: tuple):
    """The gradients, such that their own derivative raises. torch's once_differentiable lets it pass, as a zero, where
    the incoming gradients have no gradient themselves (those of a plain loss)."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return backward(ctx, *grads)
    with torch.no_grad():
        out = backward(ctx, *grads)
    out = out if isinstance(out, tuple) else (out,)
    refuse = torch._C._functions.DelayedError(f"{name}: the gradient cannot be differentiated again", len(out))
    return refuse(*(x if x is None else x.detach().requires_grad_() for x in out))


class Op:
    """Call it to run the best kernel for the tensors' device; `.reference` is the definition."""

    def __init__(self, body: Callable, fake: Callable | None = None, mutates: tuple[str, ...] = ()):
        functools.update_wrapper(self, body)
        self.name, self.reference, self.signature = body.__name__, body, inspect.signature(body)
        self.names = tuple(self.signature.parameters)
        self.defaults = {k: p.default for k, p in self.signature.parameters.items() if p.default is not p.empty}
        self.mutates = tuple(i for i, name in enumerate(self.names) if name in mutates)
        self.tail = tuple(self.defaults.get(name) for name in self.names)
        self.implementations: dict[str, Callable] = {"reference": body}
        self.lines = {device: ["reference"] for device in DEVICES}  # who answers, best first
        self._find_triton()
        self.needs: dict[str, tuple[str, ...]] = {}  # by device
        self.prepare: Callable | None = None
        self.warned = False
        self.has_gradient = False
        self.count: Callable | None = None
        _library.define(self.name + torch.library.infer_schema(body, mutates_args=mutates))
        for device in DEVICES:
            _library.impl(self.name, functools.partial(self._dispatched, device), device.upper())
        torch.library.register_fake(f"rlhf_fast::{self.name}", fake or body, lib=_library)
        self.torch_op = self.differentiable = getattr(torch.ops.rlhf_fast, self.name).default
        OPS[self.name] = self

    def _find_triton(self) -> None:
        """kernels/triton/ has a file by the name of the op's own, with a function by the op's name: import it late."""
        stem = Path(self.reference.__code__.co_filename).stem
        if TRITON_FORCED and (_TRITON_FILES / f"{stem}.py").is_file():
            room = f"rlhf_fast.kernels.triton.{stem}"
            self.implementations["triton"] = lambda *args: getattr(import_module(room), self.name)(*args)
            for device in TRITON_ANSWERS:
                self.lines[device].insert(0, "triton")

    def __call__(self, *args, **kwargs):
        if kwargs or len(args) != len(self.names):
            args = self._bind(args, kwargs)
        if self.prepare is not None:
            args = self.prepare(*args)
        if _choice.forced == "reference":
            return self.reference(*args) if self.has_gradient else self._plain(*args)
        if self.has_gradient and torch.is_grad_enabled():
            if any(isinstance(a, Tensor) and a.requires_grad for a in args):
                return self.differentiable(*args)
        return self.run(*args)

    def __get__(self, instance: object, owner: type | None = None) -> Op:
        """Found on a class an op stays itself. Having this it counts as a routine: help() prints its signature."""
        return self

    def __repr__(self) -> str:
        return f"<op {self.name}{self.signature}>"

    def run(self, *args):
        """The chosen kernel on prepared arguments, without gradient. Goes through torch's dispatcher where that matters
        (tracing, tensor subclasses, other devices); for plain tensors it would double the cost of a small call."""
        device = None
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                if device is None:
                    device = a.device
                elif a.device != device:
                    raise self._scattered(args)
            elif isinstance(a, Tensor):
                return self.torch_op(*args)
        if device is None or device.type not in DEVICES or _traced():
            return self.torch_op(*args)
        return self._answer(device.type, *args)

    def _dispatched(self, device: str, *args):
        """What torch's dispatcher calls, on real tensors; it looks at the device of one of them."""
        if len({a.device for a in args if isinstance(a, Tensor)}) > 1:
            raise self._scattered(args)
        return self._answer(device, *args)

    def _scattered(self, args: tuple) -> ValueError:
        came = ", ".join(str(a.device) for a in args if isinstance(a, Tensor))
        return ValueError(f"{self.name}: all tensors must be on one device, got {came}")

    def _bind(self, args: tuple, kwargs: dict) -> tuple:
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

    def _answer(self, device: str, *args):
        """The chosen kernel, on real tensors of one device, of the type `device`."""
        args = args + self.tail[len(args) :]  # the dispatcher drops trailing arguments that equal their defaults
        forced = _choice.forced
        for i in self.mutates:  # a kernel writes behind torch's back
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        if forced is not None and not self.can_run(forced, device):
            raise ValueError(self._not_here(forced, f" for {device} tensors"))
        why = None
        for backend in self.lines[device] if forced is None else (forced,):
            if backend == "reference":
                break
            try:
                if device == "cpu":
                    return self.implementations[backend](*args)
                with torch.cuda.device(next(a.device for a in args if isinstance(a, Tensor))):
                    return self.implementations[backend](*args)
            except Declined as declined:
                why = why or str(declined)
            except RuntimeError as error:
                if forced is not None or "no kernel image" not in str(error):
                    raise
                tried = f"csrc/cuda was not compiled for this GPU ({error}); set RLHF_FAST_CUDA_ARCHS and install again"
                self.lines[device] = [other for other in self.lines[device] if other != backend]
                MISSING[device], why = tried, why or tried
        why = why or self.why(device)
        if _STRICT and forced != "reference":
            raise RuntimeError(f"{self.name}: RLHF_FAST_STRICT=1 and no kernel answers: {why}")
        if not self.warned and forced != "reference":
            self.warned = True
            log.warning("%s runs on its plain-torch reference: %s", self.name, why)
        return self._plain(*args)

    @torch.no_grad()
    def _plain(self, *args):
        """The reference without gradient, as every other backend has none."""
        return self.reference(*args)

    def _not_here(self, backend: str, where: str = "") -> str:
        """The sentence for a backend that cannot be forced."""
        why = MISSING.get(backend.partition(":")[0])
        there = f"{self.name}: no backend {backend!r} here{where}; there are: {', '.join(self.backends)}"
        return f"{there} ({backend}: {why})" if why else there

    def can_run(self, backend: str, device: str) -> bool:
        """Whether `backend` can be forced on tensors of `device`."""
        if backend not in self.implementations:
            return False
        home = backend.partition(":")[0]
        if home == "triton":
            return device in TRITON_FORCED
        return home in ("reference", device) or (home == "simt" and device == "cpu")

    @property
    def backends(self) -> list[str]:
        """The backends that can run here, best last: "reference", "triton", "cpu:generic", "cpu:avx2", ..., "cuda"."""
        return list(self.implementations)

    def chosen(self, device: str) -> str:
        """The backend that answers for tensors of `device`."""
        return self.lines[device][0] if device in self.lines else "reference"

    def why(self, device: str) -> str:
        """One line: who answers on `device`, and why nobody better does."""
        chosen = self.chosen(device)
        if chosen == "triton":
            return f"Triton; no compiled kernel: {self._why_not_compiled(device)}"
        if chosen != "reference":
            return f"compiled kernel {chosen}"
        why = self._why_not_compiled(device)
        if device == "cuda" and "triton" in MISSING:
            why += f"; no Triton: {MISSING['triton']}"
        return why

    def _why_not_compiled(self, device: str) -> str:
        return MISSING.get(device) or f"csrc/{device} has no kernel {', '.join(self.needs.get(device, (self.name,)))}"

    def backend(self, name: str) -> Callable:
        """This op, forced to one backend: `gae.backend("cpu:avx2")(...)`. "cpu" means the best instruction set."""
        name = self.chosen("cpu") if name == "cpu" else name
        if name not in self.implementations:
            raise ValueError(self._not_here(name))

        def run(*args, **kwargs):
            with forcing(name):
                return self(*args, **kwargs)

        return run

    def arguments(self, prepare: Callable) -> Callable:
        """Register `prepare(*args) -> args`: checks (ValueError: the op, the rule, what came) and normal forms."""
        self.prepare = prepare
        return prepare

    def compiled(
        self, launch: Callable | None = None, *, needs: tuple[str, ...] | None = None, on: tuple[str, ...] = DEVICES
    ):
        """Register `launch(kernels, *args)`, run where csrc/ has the kernels `needs` (by default the op's name): for
        tensors of the devices `on`. csrc/cuda's kernels are run on the CPU by the backend "simt"."""
        if launch is None:
            return functools.partial(self.compiled, needs=needs, on=on)
        needs = needs or (self.name,)
        self.needs |= dict.fromkeys(on, needs)
        for backend, module in COMPILED.items():
            home = "cuda" if backend == "simt" else backend.partition(":")[0]
            if home in on and all(hasattr(module, name) for name in needs):
                self.implementations[backend] = functools.partial(launch, module)
                line = self.lines.get(backend.partition(":")[0])
                if line is None:  # forced only
                    continue
                if line[0] in COMPILED:
                    line.pop(0)
                line.insert(0, backend)
        return launch

    def gradient(self, backward: Callable, *, save: Callable | None = None, forward: Callable | None = None) -> None:
        """Register the gradient, in torch.autograd.Function's terms.

        `save(ctx, inputs, output)` and `backward(ctx, *grads)`, or, where the forward pass itself makes the gradients,
        `forward(ctx, *args)` and `backward(ctx, *grads)`. A backend forced in forward stays forced in backward.
        Differentiable once: a derivative of the gradient raises, rather than miss what the kernels do not record.
        """
        self.has_gradient = True
        name = self.name  # torch.compile traces these steps: it finds an op by its name, not in a closure

        def run_backward(ctx, *grads):
            if ctx.backend is None:
                return _once(name, backward, ctx, grads)
            with forcing(ctx.backend):
                return _once(name, backward, ctx, grads)

        def setup_context(ctx, inputs, output):
            ctx.backend = _choice.forced
            save(ctx, inputs, output)

        def run_forward(ctx, *args):
            ctx.backend = _choice.forced
            return forward(ctx, *args)

        def run_plain(*args):
            return OPS[name].run(*args)

        steps = {"backward": run_backward}
        if forward is None:
            steps |= {"forward": run_plain, "setup_context": setup_context}
        else:
            steps |= {"forward": run_forward}
        methods = {name: staticmethod(step) for name, step in steps.items()}
        self.differentiable = type(self.name, (torch.autograd.Function,), methods).apply

    def cost(self, count: Callable) -> Callable:
        """Register `count(gradient, *args) -> (bytes, flops)`: the least that a call on prepared arguments, with its
        gradients or without, must move and compute, where that is not each tensor once. Benches measure by it."""
        self.count = count
        return count

    def inputs(self, *, small: list[dict], large: list[dict]):
        """Register `make(device, dtype, **size) -> args`: tests run the small sizes, benches the large ones."""

        def keep(make: Callable) -> Callable:
            self.make, self.small, self.large = make, small, large
            return make

        return keep


def op(body: Callable | None = None, *, fake: Callable | None = None, mutates: tuple[str, ...] = ()):
    """Make an op of a plain-torch function with a typed signature. `fake` gives the shapes where the body is dear;
    `mutates` names the arguments that the body writes in place."""
    return Op(body, fake, mutates) if body else functools.partial(Op, fake=fake, mutates=mutates)
