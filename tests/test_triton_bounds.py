"""No Triton kernel reads or writes outside the tensors that its launch is given, as the interpreter sees it."""

import numpy as np
import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.bench.checks.output_hashes import SECTOR
from rlhf_fast.bench.problem import Case, Problem
from rlhf_fast.kernels._op import OPS

pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402

from rlhf_fast.kernels.triton import launch  # noqa: E402

HERE = [op for op in OPS.values() if op.can_run("triton", "cpu")]
pytestmark = pytest.mark.skipif(not HERE or torch.cuda.is_available(), reason="Triton's interpreter is not on")
BY_SECTORS = ("token_logprobs", "token_logprobs_backward")  # given logits may begin and end anywhere


class Watch:
    """Of each launch: the memory of its tensors, rounded to `grain` bytes, and what falls out of it."""

    def __init__(self, monkeypatch, grain: int):
        self.grain, self.ranges, self.outside, self.seen = grain, None, [], 0
        builder, run = type(interpreter.interpreter_builder), launch.run

        def watched(name, kind):
            before = getattr(builder, name)

            def call(of, pointers, *args):
                mask = args[1] if kind == "store" else args[0]
                self.check(pointers, mask.data, kind)
                return before(of, pointers, *args)

            monkeypatch.setattr(builder, name, call)

        watched("create_masked_load", "load")
        watched("create_masked_store", "store")

        def watched_run(kernel, grid, *args, **options):
            tensors = [x.untyped_storage() for x in args if isinstance(x, torch.Tensor) and x.numel()]
            spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in tensors)
            low = [begin // self.grain * self.grain for begin, _ in spans]
            high = [-(-end // self.grain) * self.grain for _, end in spans]
            self.name, self.ranges = kernel.fn.__name__, np.array([low, high], dtype=np.int64)
            run(kernel, grid, *args, **options)

        monkeypatch.setattr(launch, "run", watched_run)

    def check(self, pointers, mask, kind):
        at = pointers.data[np.broadcast_to(mask.astype(bool), pointers.data.shape)].astype(np.int64)
        if not at.size:
            return
        low, high = self.ranges
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        i = np.searchsorted(low, at, side="right") - 1
        beyond = (i < 0) | (at + size > high[np.maximum(i, 0)])
        self.seen += at.size
        if beyond.any():
            self.outside.append(f"{self.name}: {int(beyond.sum())} numbers of a {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("op", HERE, ids=lambda op: op.name)
def test_nothing_outside_the_tensors_is_touched(op, dtype, monkeypatch):
    watch = Watch(monkeypatch, SECTOR if op.name in BY_SECTORS else 1)
    for size in op.small_sizes[:3]:
        problem = Problem(Case(op, size, dtype, op.has_gradient), "cpu")
        problem.run_once(op.backend("triton"), problem.raw)
    assert watch.seen and not watch.outside, watch.outside[:5]


def test_a_read_outside_is_seen(monkeypatch):
    """Logits that end within a sector, watched to the byte."""
    watch = Watch(monkeypatch, 1)
    ops.token_logprobs.backend("triton")(torch.zeros(1, 33), torch.zeros(1, dtype=torch.int64))
    assert watch.outside
