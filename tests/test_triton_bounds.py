"""No Triton kernel reads or writes outside the tensors of its launch, as the interpreter records it."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from rlhf_fast import ops
from rlhf_fast.bench.checks.output_hashes import SECTOR
from rlhf_fast.bench.problem import Case, Problem
from rlhf_fast.kernels._op import OPS

pytest.importorskip("triton")
from triton.runtime import interpreter

from rlhf_fast.kernels.triton import launch

TRITON_OPS = [op for op in OPS.values() if op.can_run("triton", "cpu")]
pytestmark = pytest.mark.skipif(not TRITON_OPS or torch.cuda.is_available(), reason="Triton's interpreter is not on")
READS_WHOLE_SECTORS = ("token_logprobs", "token_logprobs_backward")  # the caller's logits may start and end anywhere


class Watch:
    """Record the masked loads and stores of each launch that are outside its tensors, rounded to `grain` bytes."""

    def __init__(self, monkeypatch, grain: int):
        self.grain = grain
        self.ranges = None
        self.outside: list[str] = []
        self.num_accesses = 0
        builder_class = type(interpreter.interpreter_builder)
        run = launch.run

        def watched(name, kind):
            original = getattr(builder_class, name)

            def call(builder, pointers, *args):
                mask = args[1] if kind == "store" else args[0]
                self.check(pointers, mask.data, kind)
                return original(builder, pointers, *args)

            monkeypatch.setattr(builder_class, name, call)

        watched("create_masked_load", "load")
        watched("create_masked_store", "store")

        def watched_run(kernel, grid, *args, **meta):
            tensors = [x.untyped_storage() for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.numel()]
            spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in tensors)
            low = [begin // self.grain * self.grain for begin, _ in spans]
            high = [-(-end // self.grain) * self.grain for _, end in spans]
            self.name, self.ranges = kernel.fn.__name__, np.array([low, high], dtype=np.int64)
            run(kernel, grid, *args, **meta)

        monkeypatch.setattr(launch, "run", watched_run)

    def check(self, pointers, mask, kind):
        pointer_values = pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)].astype(np.int64)
        if not pointer_values.size:
            return
        low, high = self.ranges
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        i = np.searchsorted(low, pointer_values, side="right") - 1
        is_outside = (i < 0) | (pointer_values + size > high[np.maximum(i, 0)])
        self.num_accesses += pointer_values.size
        if is_outside.any():
            self.outside.append(f"{self.name}: {int(is_outside.sum())} elements of a {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("op", TRITON_OPS, ids=lambda op: op.name)
@pytest.mark.exhaustive(16)
def test_nothing_outside_the_tensors_is_touched(op, dtype, monkeypatch):
    watch = Watch(monkeypatch, SECTOR if op.name in READS_WHOLE_SECTORS else 1)
    for size in op.small_sizes[:3]:
        problem = Problem(Case(op, size, dtype, op.has_gradient_at(size)), "cpu")
        problem.run_once(op.backend("triton"), problem.raw)
    assert watch.num_accesses and not watch.outside, watch.outside[:5]


def test_a_read_outside_is_recorded(monkeypatch):
    """These logits end within a sector, which the kernel reads whole; here the watch is exact to a byte."""
    watch = Watch(monkeypatch, 1)
    ops.token_logprobs.backend("triton")(torch.zeros(1, 33), torch.zeros(1, dtype=torch.int64))
    assert watch.outside
