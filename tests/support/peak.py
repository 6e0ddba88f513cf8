"""Peak memory of a function on the CPU."""

from rlhf_fast.bench.timing import Cpu


def peak_bytes(run) -> int:
    """Return the peak of torch's allocations during a second call of `run`, its results included."""
    run()
    return Cpu().peak_bytes(run)
