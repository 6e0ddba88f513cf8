"""Other libraries' kernels for our ops, where they are installed: adapters that take our op's arguments.

An adapter returns the first of our op's outputs; `serves` says for which arguments it can. `tolerance` is the library's
own: Liger sums the weight's gradient in the weight's dtype, cut-cross-entropy leaves out gradients too small for it.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple


class Rival(NamedTuple):
    """A library's answer to an op. It runs on CUDA tensors."""

    name: str
    package: str
    op: str
    call: Callable
    tolerance: float
    serves: Callable[..., bool] = lambda *args: True


def liger_cross_entropy(hidden, weight, targets, weights=None, bias=None, softcap=0.0):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap or None)


def liger_gate(gate, up):
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def cut_cross_entropy(hidden, weight, targets, weights=None, bias=None, softcap=0.0):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, bias=bias, softcap=softcap or None)


def _takes_the_mean(hidden, weight, targets, weights=None, *rest) -> bool:
    return weights is None


def _halves(hidden, weight, *rest) -> bool:
    return hidden.element_size() == 2 and _takes_the_mean(hidden, weight, *rest)


RIVALS = [
    Rival("Liger", "liger_kernel", "linear_cross_entropy", liger_cross_entropy, 0.1, _takes_the_mean),
    Rival("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", cut_cross_entropy, 0.1, _halves),
    Rival("Liger", "liger_kernel", "swiglu", liger_gate, 0.02),
]


def rivals_of(op: str, device: str, args: tuple) -> list[Rival]:
    """Those installed that serve these arguments."""
    return [r for r in RIVALS if r.op == op and device == "cuda" and find_spec(r.package) and r.serves(*args)]
