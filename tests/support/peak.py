"""Peak memory of a function on the CPU."""

import torch

from rlhf_fast.bench.timing import Cpu


def peak_bytes(run) -> int:
    """Return the peak of torch's allocations during a second call of `run`, its results included."""
    run()
    return Cpu().peak_bytes(run)


def gradient_peak(run, *inputs) -> int:
    """Return the peak memory of a loss's forward and backward pass."""
    return peak_bytes(lambda: torch.autograd.grad(run(*inputs), [x for x in inputs if x.requires_grad]))
