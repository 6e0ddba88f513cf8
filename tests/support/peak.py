"""How much memory a stretch of work holds at a time."""

from rlhf_fast.bench.timing import Cpu


def peak_bytes(run) -> int:
    """The most memory that torch held at a time for what a second `run` allocated, its results included."""
    run()
    return Cpu().peak(run)
