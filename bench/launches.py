"""Record on a CPU what one call of an op launches on an H100: its launchers run on fake tensors, nothing computes.

A launch is a kernel of csrc/cuda (checks/runtime_stub.py), one of kernels/triton, or an op of torch itself, such as a
matrix product. A pass with gradients is the op's variant with gradients, or the op and then its backward op.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rlhf_fast.bench.card import NUM_SMS
from rlhf_fast.bench.checks.runtime_stub import Recorder
from rlhf_fast.bench.problem import Case
from rlhf_fast.kernels import _launch
from rlhf_fast.kernels._op import OPS, Op

BACKENDS = ("cuda", "triton")
ALLOCATIONS = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "resize_"}
NOT_READ = {"copy_", "fill_", "zero_", "zeros", "new_zeros", "zeros_like", "full", "scalar_tensor", "ones"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm"}
ADDRESS = 1 << 40  # of every fake tensor's memory
_TICKETS: dict = {}  # in place of the process's own


class Node(NamedTuple):
    """One launch: of a kernel of ours, with its code's key, or of a torch op, with the bytes of its tensors."""

    name: str
    kind: str  # "cuda", "triton" or "torch"
    blocks: int = 0
    threads: int = 0
    dynamic_shared: int = 0
    code: Any = None  # the mangled name, or checks.triton_resources' Launch
    num_bytes: float = 0.0
    flops: float = 0.0


class TorchOps(TorchDispatchMode):
    """Notes the torch ops that run a kernel on a GPU."""

    def __init__(self, nodes: list[Node]):
        super().__init__()
        self.nodes = nodes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        results = _tensors(out)
        if is_view or name in ALLOCATIONS or not any(x.is_cuda and x.numel() for x in results):
            return out
        read = [] if name in NOT_READ else _tensors([args, {k: v for k, v in kwargs.items() if k != "out"}])
        if name == "copy_":
            read = _tensors(args[1:])
        moved = sum(x.numel() * x.element_size() for x in read + results)
        self.nodes.append(
            _product(name, *_tensors(args)[-2:], moved) if name in PRODUCTS else Node(name, "torch", num_bytes=moved)
        )
        return out


def _product(name: str, a: torch.Tensor, b: torch.Tensor, moved: float) -> Node:
    sizes = " x ".join(map(str, (*a.shape, b.shape[-1])))
    return Node(f"{name} {sizes}", "torch", num_bytes=moved, flops=2.0 * a.numel() * b.shape[-1])


def _tensors(x) -> list[torch.Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """Return a fake CUDA tensor of x's shape and strides, within FakeTensorMode."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


class Arguments:
    """A case's arguments without memory: as the op's launchers get them, and as `op.cost` reads them."""

    def __init__(self, case: Case):
        size = case.size | ({"ignored": 0.0} if "targets" in case.op.names else {})

        def make():
            return case.op.bind(*case.op.make_inputs(device="cpu", dtype=case.dtype, **size))

        self.case, self.mode = case, FakeTensorMode(allow_non_fake_inputs=True)
        try:
            with self.mode:
                self.raw = make()
        except DataDependentOutputException:  # a seed that is drawn
            self.raw = make()
        with self.mode, torch.no_grad():
            self.args = case.op.normalized(*tree_map_only(torch.Tensor, on_gpu, self.raw))

    def minimum(self) -> tuple[float, float]:
        """Return the least bytes and operations of the case, as its bench counts them."""
        op, case = self.case.op, self.case
        known = dict(zip(op.names, self.raw, strict=True))
        if op.cost_function is None:
            with self.mode, torch.no_grad():
                outputs = _tensors(op.dispatch(*self.args))
            gradients = [x for x in _tensors(self.raw) if x.requires_grad] if case.gradient else []
            written = [self.args[i] for i in op.mutates]
            return float(sum(x.nbytes for x in _tensors([*self.args, *written, *outputs, *gradients]))), 0.0
        if "targets" in known:
            known["targets"] = torch.zeros(known["targets"].shape, dtype=known["targets"].dtype)
        if "lengths" in known:
            known["lengths"] = torch.tensor(case.size["lengths"], dtype=torch.int32)
        return op.cost_function(case.gradient, *known.values())

    def given_bytes(self) -> float:
        """Return the bytes of all arguments."""
        return float(sum(x.numel() * x.element_size() for x in _tensors(self.raw)))


def passes(op: Op, args: tuple, gradient: bool) -> list[tuple[Op, Callable[[], tuple]]]:
    """Return the ops that a pass runs, with their arguments."""
    variant, backward = OPS.get(f"{op.name}_with_gradients"), OPS.get(f"{op.name}_backward")
    if not gradient:
        return [(op, lambda: args)]
    if variant is not None:
        flags = [name.endswith(("need_grad", "needs_grad")) for name in variant.names[len(args) :]]
        given = dict(zip(op.names, args, strict=True))
        if "bias" in given and given["bias"] is None:
            flags[2] = False
        flags = [flag or name == "round_grads" for flag, name in zip(flags, variant.names[len(args) :], strict=True)]
        return [(variant, lambda: (*args, *flags))]
    if backward is None or op.name != "token_logprobs":
        raise NotImplementedError(f"{op.name} with gradients")

    def with_upstream():
        targets = args[op.names.index("targets")]
        grads = (torch.empty(targets.shape, device="cuda") for _ in range(2))
        return (*grads, *args)

    return [(op, lambda: args), (backward, with_upstream)]


def _scale(case: Case, results: tuple, backend: str) -> None:
    """Launch what the backward pass does to gradients that the forward pass has made."""
    grads = [x for x in _tensors(results[3:])[-2:] if x.numel()]
    factor = torch.empty((), device="cuda")
    if case.op.name == "ppo_loss":
        _launch.scale_in_place(grads, [factor] * 2, "simt" if backend == "cuda" else backend)
    else:
        scale = import_module("rlhf_fast.kernels.triton._scale")
        for grad in (x for x in _tensors(results)[-3:] if x.numel() and x.dim() > 1):
            scale.scale_in_place(grad, factor)


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Within the block, launchers find an H100, and fake tensors have addresses."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    properties = SimpleNamespace(multi_processor_count=NUM_SMS)

    def address(x):
        return ADDRESS + x.storage_offset() * x.element_size()

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "current_stream", lambda device=None: stream),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (_launch, "_tickets", _TICKETS),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", address, create=True))
        yield


def record(arguments: Arguments, backend: str, recorder: Recorder | None) -> list[Node] | None:
    """Return the launches of a case in their order; None where the op has no such kernel."""
    case = arguments.case
    nodes: list[Node] = []
    name = "simt" if backend == "cuda" else backend

    def take() -> None:
        for one in recorder.take() if recorder else []:
            blocks, threads = math.prod(one.grid), math.prod(one.block)
            nodes.append(Node(one.function, "cuda", blocks, threads, one.shared, one.function))

    try:
        with (
            arguments.mode,
            torch.no_grad(),
            _as_on_gpu(),
            _recorded_triton(nodes),
            _recorded_sums(nodes),
            TorchOps(nodes),
        ):
            for op, args_of in passes(case.op, arguments.args, case.gradient):
                launcher = op.implementations.get(name) if backend == "cuda" else _triton_launcher(op)
                if launcher is None:
                    return None
                args = args_of()
                nodes_before = len(nodes)
                results = launcher(*args)
                take()
                if len(nodes) == nodes_before:
                    return None
            if case.gradient and op.name.endswith("_with_gradients"):
                _scale(case, results, backend)
                take()
    except (_launch.Unsupported, NotImplementedError):
        return None
    return nodes


def _triton_launcher(op: Op) -> Callable | None:
    from rlhf_fast.bench.checks.triton_resources import KERNELS, file_stem

    if not (KERNELS / f"{file_stem(op)}.py").is_file():
        return None
    return getattr(import_module(f"rlhf_fast.kernels.triton.{file_stem(op)}"), op.name, None)


@contextlib.contextmanager
def _recorded_triton(nodes: list[Node]) -> Iterator[None]:
    from rlhf_fast.bench.checks.triton_resources import describe_launch
    from rlhf_fast.kernels.triton import launch

    def note(kernel, grid, *args, **meta):
        if all(grid):
            found = describe_launch(kernel, args, meta)
            threads = 32 * dict(found.options).get("num_warps", 4)
            nodes.append(Node(found.name, "triton", math.prod(grid), threads, 0, found))

    with mock.patch.object(launch, "run", note):
        yield


@contextlib.contextmanager
def _recorded_sums(nodes: list[Node]) -> Iterator[None]:
    """Within the block, note the products that a head adds to a float32 matrix, which fake tensors do not compute."""

    def addmm(_, a, b, *, out, **options):
        moved = sum(x.numel() * x.element_size() for x in (out, a, b, out))
        nodes.append(_product("addmm", a, b, moved))
        return out

    head = import_module("rlhf_fast.kernels.triton._head")
    with (
        mock.patch.object(head, "can_multiply_to_float32", lambda add, device: True),  # as the measured card can
        mock.patch.object(torch, "addmm", addmm),
    ):
        yield
