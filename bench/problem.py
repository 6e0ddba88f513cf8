"""What is measured of an op: its cases, the arguments of one, and whether an answer to it is right.

The reference, which computes in float32 whatever the dtype, is what all must agree with: outputs, gradients and what is
written in place.
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
    """An op at a size, without its gradients or with them."""

    op: Op
    size: dict
    dtype: torch.dtype
    gradient: bool
    target: Target = Target("", {})

    def __str__(self) -> str:
        return f"{self.op.name} {label(self.size)} {str(self.dtype)[6:]} {self.visit}"

    @property
    def visit(self) -> str:
        return "forward+backward" if self.gradient else "forward"


def label(size: dict) -> str:
    """A size in few words; (1024, 1024, ...) is 32 x 1024."""

    def said(value) -> str:
        if isinstance(value, tuple) and len(value) > 3:
            value = (len(value), value[0] if len(set(value)) == 1 else f"{min(value)}..{max(value)}")
        return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    words = {name: f"{name} {said(value)}" for name, value in size.items()}
    words |= {name: said(value) for name, value in size.items() if name in ("shape", "sizes")}
    words |= {name: name for name, value in size.items() if value is True}
    return ", ".join(words.values())


def cases(device: str, wanted: list[str], dtypes: list[torch.dtype], small: bool = False) -> Iterator[Case]:
    """On a GPU the targets first, then every op's `large` inputs (`small` ones where asked for)."""
    for target in TARGETS if device == "cuda" and not small else []:
        if not wanted or target.op in wanted:
            for dtype in target.dtypes:
                yield Case(OPS[target.op], target.size, dtype, target.gradient, target)
    for op in OPS.values():
        for size in (op.small_sizes if small else op.large_sizes) if not wanted or op.name in wanted else []:
            for dtype in dtypes:
                for gradient in [False] + [True] * op.has_gradient:
                    yield Case(op, size, dtype, gradient)


def tensors(x) -> list[torch.Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


class Bout:
    """A case with its arguments made: what a contestant runs, and what must come out."""

    def __init__(self, case: Case, device: str):
        self.case, self.op = case, case.op
        # No row is ignored: other libraries and the bare products do not skip them, and NaN stands in them.
        size = case.size | ({"ignored": 0.0} if "targets" in self.op.names else {})
        self.raw = self.op.bind(*self.op.make_inputs(device=device, dtype=case.dtype, **size))
        self.args = self.op.normalized(*self.raw)
        self.wrt = [i for i, a in enumerate(self.args) if isinstance(a, torch.Tensor) and a.requires_grad]

    def run(self, call: Callable, args: tuple, upstream: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """One call: its outputs, then, where the case has them, the gradients of the outputs' sum."""
        with torch.set_grad_enabled(self.case.gradient):
            outputs = tensors(call(*args))
        if not self.case.gradient:
            return outputs
        sources = [o for o in outputs if o.requires_grad]
        upstream = [torch.ones_like(o) for o in sources] if upstream is None else upstream
        grads = torch.autograd.grad(sources, [args[i] for i in self.wrt], upstream)
        return [*(o.detach() for o in outputs), *grads]

    def timed(self, call: Callable, args: tuple) -> Callable[[], list[torch.Tensor]]:
        """The call as it is timed: the gradients of its outputs are there already."""
        upstream = None
        if self.case.gradient:
            upstream = [torch.ones_like(o) for o in tensors(call(*args)) if o.requires_grad]
        return lambda: self.run(call, args, upstream)

    def once(self, call: Callable, args: tuple) -> list[torch.Tensor]:
        """What one call gives, and then what it wrote into its arguments, of which it has copies."""
        mine = list(args)
        for i in self.op.mutates:
            mine[i] = mine[i] if mine[i] is None else mine[i].clone()
        return self.run(call, tuple(mine)) + tensors([mine[i] for i in self.op.mutates])

    @functools.cached_property
    def expected(self) -> list[torch.Tensor | None]:
        """What the reference gives, a chunk of rows at a time where the target says so: rows are joined then, losses
        and gradients of the weights added, and sums of another kind (None) left out."""
        step, args = self.case.target.chunk, self.args
        if not step:
            return self.once(self.op.reference, args)
        given = dict(zip(self.op.names, args, strict=True))
        if "weights" in given:  # of the whole, not of a chunk
            given["weights"] = head.default_weights(given["weights"], given["targets"])
        rows, found = len(args[0]), []
        for first in range(0, rows, step):
            part = tuple(
                a[first : first + step].detach().requires_grad_(a.requires_grad)
                if isinstance(a, torch.Tensor) and a.shape[:1] == (rows,) else a
                for a in given.values()
            )  # fmt: skip
            found.append(self.once(self.op.reference, part))
        joined, gradients = [], len(found[0]) - len(self.wrt) * self.case.gradient
        for i, parts in enumerate(zip(*found, strict=True)):
            if parts[0].shape[:1] == (step,):
                joined.append(torch.cat(parts))
            else:
                joined.append(sum(parts) if i >= gradients or not parts[0].dim() else None)
        return joined

    def wrong(self, found: list[torch.Tensor], tolerance: float, first: bool = False) -> str:
        """What is not as expected, or nothing. `first`: only the first output is given, and the gradients."""
        expected = self.expected
        if first:
            expected = [*expected[:1], *expected[len(expected) - len(self.wrt) * self.case.gradient :]]
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
            error, size = (ours - truth).where(finite, 0), truth.where(finite, 0)
            for measure in (torch.linalg.vector_norm, lambda x: x.abs().max() if x.numel() else x.sum()):
                off, whole = measure(error).item(), measure(size).item()
                if not off <= bound * whole + 1e-6:
                    return f"output {i} is {off / max(whole, 1e-30):.2g} of its size from the reference"
        return ""
