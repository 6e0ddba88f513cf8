"""The ops, ready to call from any trainer. What an op means is said in kernels/<op>.py, and by `help(ops.gae)`."""

from rlhf_fast.kernels.gae import gae

__all__ = [
    "gae",
]
