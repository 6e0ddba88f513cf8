"""A call on a GPU can be captured in a CUDA graph; the graph, replayed on other numbers, gives the results of a call.

Without a GPU, tests/test_triton_resources.py checks that no Triton launcher waits for the device.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rlhf_fast import ops  # noqa: F401  registers them
from rlhf_fast.kernels import _backends
from rlhf_fast.kernels._op import OPS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def cases():
    for op in OPS.values():
        for backend in [b for b in ("triton", "cuda") if torch.cuda.is_available() and op.can_run(b, "cuda")]:
            for size in op.small_sizes:
                for gradient in [False] + [True] * op.has_gradient_at(size):
                    name = f"{op.name}-{'-'.join(f'{k}{v}' for k, v in size.items())}-{backend}-{gradient}"
                    yield pytest.param(op, size, backend, gradient, id=name)


class Call:
    """A call on arguments whose addresses do not change."""

    def __init__(self, op, backend, args, gradient):
        self.op, self.call, self.gradient = op, op.backend(backend), gradient
        self.args = [copy(a) if isinstance(a, torch.Tensor) else a for a in args]

    def fill(self, args):
        """Copy the numbers of other tensors of the same shapes; other arguments are constants of the graph."""
        with torch.no_grad():
            for mine, given in zip(self.args, args, strict=True):
                if isinstance(mine, torch.Tensor):
                    mine.copy_(given)

    def run(self):
        """Return outputs, gradients of their sum, and the arguments written in place."""
        with torch.set_grad_enabled(self.gradient):
            outputs = [x for x in tree_leaves(self.call(*self.args)) if isinstance(x, torch.Tensor)]
        grads, wrt = (), [a for a in self.args if isinstance(a, torch.Tensor) and a.requires_grad]
        if self.gradient and wrt:
            sources = [x for x in outputs if x.requires_grad]
            ones = [torch.ones_like(x) for x in sources]
            grads = torch.autograd.grad(sources, wrt, ones, allow_unused=True, materialize_grads=True)
        return [
            *(x.detach() for x in outputs),
            *grads,
            *(self.args[i] for i in self.op.mutates if self.args[i] is not None),
        ]


def copy(x):
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)


def captured(call):
    """Return the graph of a call, and its result tensors."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels before the capture
        for _ in range(2):
            call.run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        results = call.run()
    return graph, results


@pytest.mark.parametrize("op, size, backend, gradient", list(cases()))
def test_a_replayed_graph_gives_the_results_of_a_call(op, size, backend, gradient, monkeypatch):
    monkeypatch.setattr(_backends, "_strict", True)
    first, second = (op.bind(*op.make_inputs(device="cuda", dtype=torch.float32, **size)) for _ in range(2))
    if not any(isinstance(a, torch.Tensor) and a.numel() for a in first):
        pytest.skip("nothing to compute")
    fixed = [a if isinstance(a, torch.Tensor) else b for a, b in zip(second, first, strict=True)]
    call = Call(op, backend, first, gradient)
    graph, results = captured(call)
    for args in (fixed, first):
        call.fill(args)
        graph.replay()
        torch.cuda.synchronize()
        expected = Call(op, backend, args, gradient).run()
        for i, (ours, fresh) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(ours.nan_to_num(), fresh.nan_to_num()), f"result {i} differs"
