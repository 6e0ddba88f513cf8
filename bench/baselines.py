"""Adapters to other libraries' kernels for our ops, where these are installed.

An adapter takes our op's arguments and returns the first of its outputs; `supports` says for which arguments it can.
`tolerance` is the library's own: Liger sums the weight's gradient in the weight's dtype, and cut-cross-entropy leaves
out gradients that are too small for it.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple


class Baseline(NamedTuple):
    """A library's implementation of an op, for CUDA tensors."""

    name: str
    package: str
    op: str
    call: Callable
    tolerance: float
    supports: Callable[..., bool] = lambda *args: True


def liger_cross_entropy(hidden, weight, targets, weights=None, bias=None, softcap=0.0):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap or None)


def liger_swiglu_adapter(gate, up):
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def cut_cross_entropy(hidden, weight, targets, weights=None, bias=None, softcap=0.0):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap or None)


def _is_mean(hidden, weight, targets, weights=None, *rest) -> bool:
    return weights is None


def _is_half_precision_mean(hidden, weight, *rest) -> bool:
    return hidden.element_size() == 2 and _is_mean(hidden, weight, *rest)


BASELINES = [
    Baseline("Liger", "liger_kernel", "linear_cross_entropy", liger_cross_entropy, 0.1, _is_mean),
    Baseline(
        "cut-cross-entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        cut_cross_entropy,
        0.1,
        _is_half_precision_mean,
    ),
    Baseline("Liger", "liger_kernel", "swiglu", liger_swiglu_adapter, 0.02),
]


def baselines_of(op: str, device: str, args: tuple) -> list[Baseline]:
    """Return the installed libraries that support these arguments."""
    return [r for r in BASELINES if r.op == op and device == "cuda" and find_spec(r.package) and r.supports(*args)]
