"""A problem: an op at one size, its arguments, and the check whether a provider solves it.

Every provider (a kernel, torch.compile, another library) must agree with the op's reference, which computes in float32
whatever the dtype: in outputs, gradients, and what is written in place.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from rlhf_fast import ops  # noqa: F401  registers them
from rlhf_fast.bench.targets import TARGETS, Target
from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels._op import OPS, Op

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the largest value, and of the norm


class Case(NamedTuple):
    """An op at a size, forward only or with its gradients."""

    op: Op
    size: dict
    dtype: torch.dtype
    gradient: bool
    target: Target = Target("", {})

    def __str__(self) -> str:
        return f"{self.op.name} {label(self.size)} {str(self.dtype)[6:]} {self.direction}"

    @property
    def direction(self) -> str:
        return "forward+backward" if self.gradient else "forward"


def label(size: dict) -> str:
    """Return a size in few words; (1024, 1024, ...) is 32 x 1024."""

    def shown(value) -> str:
        if isinstance(value, tuple) and len(value) > 3:
            value = (len(value), value[0] if len(set(value)) == 1 else f"{min(value)}..{max(value)}")
        return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    words = {name: f"{name} {shown(value)}" for name, value in size.items()}
    words |= {name: shown(value) for name, value in size.items() if name in ("shape", "sizes")}
    words |= {name: name for name, value in size.items() if value is True}
    return ", ".join(words.values())


def shrunk(target: Target) -> Target:
    """Return a target of a size that takes no time, without a goal: it shows whether the bench runs."""

    def few(value):
        if isinstance(value, tuple):
            return tuple(min(v, 7) for v in value[:5])
        return min(value, 8) if isinstance(value, int) else value

    size = {name: few(value) for name, value in target.size.items()}
    if "N" in size:
        size["N"] = 5
    if "Hkv" in size:
        size |= {"H": 6, "Hkv": 2}
    return target._replace(size=size, of="", chunk=2 if target.chunk else 0)


def cases(
    device: str, op_names: list[str], dtypes: list[torch.dtype], small: bool = False, targets: bool = False
) -> Iterator[Case]:
    """Yield on a GPU the targets first, then every op's large sizes (or its small ones).

    With `targets` only these, on any device, shrunk where `small` is set.
    """
    selected = [op for op in OPS.values() if not op_names or op.name in op_names]
    for target in TARGETS if targets or (device == "cuda" and not small) else []:
        if OPS[target.op] in selected:
            for dtype in target.dtypes:
                chosen = shrunk(target) if small else target
                yield Case(OPS[target.op], chosen.size, dtype, target.gradient, chosen)
    for op in [] if targets else selected:
        for size in op.small_sizes if small else op.large_sizes:
            for dtype in dtypes:
                yield Case(op, size, dtype, False)
                if op.has_gradient_at(size):
                    yield Case(op, size, dtype, True)


def tensors(x) -> list[torch.Tensor]:
    """Return the tensors in nested tuples and lists."""
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


class Problem:
    """A case with its arguments: what a provider runs, and what it must return.

    `raw` are the arguments as a user gives them, `args` the op's normal forms, `wrt` the indices in `args` of the
    tensors that gradients are taken by.
    """

    def __init__(self, case: Case, device: str):
        self.case, self.op = case, case.op
        # No row is ignored: other libraries and the bare products do not skip rows, which may hold NaN.
        size = case.size | ({"ignored": 0.0} if "targets" in self.op.names else {})
        self.raw = self.op.bind(*self.op.make_inputs(device=device, dtype=case.dtype, **size))
        self.args = self.op.normalized(*self.raw)
        self.wrt = [i for i, a in enumerate(self.args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(self, call: Callable, args: tuple, upstream: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Call once; return the outputs, then, where the case has them, the gradients of the outputs' sum."""
        with torch.set_grad_enabled(self.case.gradient):
            outputs = tensors(call(*args))
        if not self.case.gradient:
            return outputs
        sources = [o for o in outputs if o.requires_grad]
        upstream = [torch.ones_like(o) for o in sources] if upstream is None else upstream
        grads = torch.autograd.grad(sources, [args[i] for i in self.wrt], upstream)
        return [*(o.detach() for o in outputs), *grads]

    def timed(self, call: Callable, args: tuple) -> Callable[[], list[torch.Tensor]]:
        """Return the call as it is timed: the gradients of its outputs exist already."""
        upstream = None
        if self.case.gradient:
            upstream = [torch.ones_like(o) for o in tensors(call(*args)) if o.requires_grad]
        return lambda: self.run(call, args, upstream)

    def run_once(self, call: Callable, args: tuple) -> list[torch.Tensor]:
        """Return what one call returns, then what it writes into its arguments, of which it gets copies."""
        copies = list(args)
        for i in self.op.mutates:
            copies[i] = copies[i] if copies[i] is None else copies[i].clone()
        return self.run(call, tuple(copies)) + tensors([copies[i] for i in self.op.mutates])

    @functools.cached_property
    def expected(self) -> list[torch.Tensor | None]:
        """The reference's results, computed a chunk of rows at a time where the target says so.

        Rows are joined then, losses and gradients of the weights are added, and sums of another kind are left out
        (None).
        """
        step, args = self.case.target.chunk, self.args
        if not step:
            return self.run_once(self.op.reference, args)
        given = dict(zip(self.op.names, args, strict=True))
        if "weights" in given:  # the default is by the whole batch, not by a chunk
            given["weights"] = head.default_weights(given["weights"], given["targets"])
        rows, results = len(args[0]), []
        for first in range(0, rows, step):
            part = tuple(
                a[first : first + step].detach().requires_grad_(a.requires_grad)
                if isinstance(a, torch.Tensor) and a.shape[:1] == (rows,) else a
                for a in given.values()
            )  # fmt: skip
            results.append(self.run_once(self.op.reference, part))
        joined, first_gradient = [], len(results[0]) - self.num_gradients
        for i, parts in enumerate(zip(*results, strict=True)):
            if parts[0].shape[:1] == (step,):
                joined.append(torch.cat(parts))
            else:
                joined.append(sum(parts) if i >= first_gradient or not parts[0].dim() else None)
        return joined

    @property
    def num_gradients(self) -> int:
        return len(self.wrt) if self.case.gradient else 0

    def error(self, found: list[torch.Tensor], tolerance: float, first_output: bool = False) -> str:
        """Return what is not as expected, or an empty string.

        With `first_output` a provider returns only the first output and the gradients.
        """
        expected = self.expected
        if first_output:
            expected = [*expected[:1], *expected[len(expected) - self.num_gradients :]]
        if len(found) != len(expected):
            return f"{len(found)} tensors, the reference gives {len(expected)}"
        for i, (ours, truth) in enumerate(zip(found, expected, strict=True)):
            if truth is None:
                continue
            if ours.shape != truth.shape:
                return f"output {i} has the shape {list(ours.shape)}, the reference's {list(truth.shape)}"
            if not truth.is_floating_point():
                if not torch.equal(ours, truth):
                    return f"output {i} differs in {int((ours != truth).sum())} of {truth.numel()}"
                continue
            bound = max(tolerance, TOLERANCE[ours.dtype])  # a cache may be of another dtype than the case
            ours, truth, finite = ours.float(), truth.float(), truth.isfinite()
            if not torch.equal(ours.nan_to_num(0).where(~finite, 0), truth.nan_to_num(0).where(~finite, 0)):
                return f"output {i} has other values that are not finite"
            difference, size = (ours - truth).where(finite, 0), truth.where(finite, 0)
            for norm in (torch.linalg.vector_norm, _max_abs):
                off, whole = norm(difference).item(), norm(size).item()
                if not off <= bound * whole + 1e-6:
                    return f"output {i} is {off / max(whole, 1e-30):.2g} of its size from the reference"
        return ""


def _max_abs(x: torch.Tensor) -> torch.Tensor:
    return x.abs().max() if x.numel() else x.sum()
