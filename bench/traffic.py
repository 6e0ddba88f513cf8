"""Bytes that each of our kernels moves, and how many warp instructions it issues for them.

Bytes are counted by hand, from what the kernels say of themselves: second walks and scratch too, which `op.cost` leaves
out. A kernel without an entry here moves what `op.cost` says where it is the case's largest, and nothing otherwise.

Instructions are counted in the machine code (checks/loops.py): one pass through the whole kernel by the fewest, and its
streaming loop as often as the bytes that a thread reads need it, with each way of a branch as likely. Where a kernel
walks shared memory loads say nothing, so decode_attention in CUDA C++ has a count by hand; Triton's `cutoff_kernel`,
which searches its candidates again and again, has none and is predicted too fast.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from rlhf_fast.bench.card import WARP
from rlhf_fast.bench.checks.loops import Code
from rlhf_fast.bench.launches import Arguments, Node
from rlhf_fast.bench.problem import Case

KEYS = 256  # of a split of decode_attention


class Traffic(NamedTuple):
    """Bytes that a launch reads and writes."""

    read: float
    written: float = 0.0


def _itemsize(case: Case) -> int:
    """Return the bytes of a logit: those that a head computes are float32."""
    return 4 if "D" in case.size else case.dtype.itemsize


def _logits(case: Case) -> float:
    """Return the bytes of all logits of a case."""
    rows = math.prod(case.size.get("shape", (case.size.get("B", 0),)))
    return float(rows * case.size["V"] * _itemsize(case))


def _once(case: Case, node: Node) -> Traffic:
    return Traffic(_logits(case))


def _backward(case: Case, node: Node) -> Traffic:
    """Count what shared memory does not keep of a row twice."""
    kept = min(1.0, node.dynamic_shared / (case.size["V"] * case.dtype.itemsize))
    return Traffic((2 - kept) * _logits(case), _logits(case))


def _walked(case: Case, node: Node) -> float:
    """Return the logits that a kernel of Triton's _logits.py walks: whole rows, or a segment a program."""
    constants = node.code.constexprs
    segment = constants["SEGMENT"] * constants["UNROLL"] * constants["THREADS"] * constants["VEC"]
    is_whole = node.name == "_logits.row_kernel" or not segment
    rows = node.blocks if is_whole else node.blocks / -(-(case.size["V"] + constants["VEC"] - 1) // segment)
    has_reference = dict(node.code.signature)["rows"].ref != "constexpr"
    return rows * case.size["V"] * (2 if has_reference else 1)


def _triton_row(case: Case, node: Node) -> Traffic:
    """A walk for the statistics and, where there is a gradient to store, a second one: not from the L2 cache, of which
    the rows in flight take ten times the size. Nothing where segments have been walked before."""
    signature, logits = dict(node.code.signature), _walked(case, node)
    if signature["parts"] != "constexpr":
        return Traffic(0.0)
    if signature["y"] == "constexpr":
        return Traffic(logits * _itemsize(case))
    return Traffic(2.0 * logits * _itemsize(case), node.blocks * case.size["V"] * float(case.dtype.itemsize))


def _triton_segment(case: Case, node: Node) -> Traffic:
    return Traffic(_walked(case, node) * _itemsize(case))


def _triton_gradient(case: Case, node: Node) -> Traffic:
    logits = _walked(case, node)
    return Traffic(logits * _itemsize(case), logits * case.dtype.itemsize)


def _product(case: Case, node: Node) -> Traffic:
    """Count the hidden rows and the weight once, and the logits where they are stored."""
    size = case.size
    rows, stored = size["B"], node.name.endswith("logits_kernel")
    read = float(case.dtype.itemsize * size["D"] * (rows + size["V"]))
    return Traffic(read, 4.0 * rows * size["V"] if stored else 0.0)


def _copied_rows(case: Case, node: Node) -> Traffic:
    moved = float(node.blocks * case.size["D"] * case.dtype.itemsize)
    return Traffic(moved, moved)


def _states(case: Case) -> float:
    """Return the bytes of the states that blocks sharing a row hand over."""
    splits = sum(-(-length // KEYS) for length in case.size["lengths"])
    return 4.0 * splits * case.size["H"] * (case.size.get("dv", case.size["d"]) + 2)


def _attention(case: Case, node: Node) -> Traffic:
    """Keys and values once, the queries, and the states, or the outputs (of the size of the queries)."""
    size = case.size
    keys = sum(size["lengths"]) * size["Hkv"] * 2 * size["d"] * case.dtype.itemsize
    queries = len(size["lengths"]) * size["H"] * size["d"] * case.dtype.itemsize
    return Traffic(float(keys + queries), _states(case))


def _merged_states(case: Case, node: Node) -> Traffic:
    size = case.size
    return Traffic(_states(case), float(len(size["lengths"]) * size["H"] * size["d"] * case.dtype.itemsize))


TRAFFIC: dict[str, Callable[[Case, Node], Traffic]] = {
    "token_logprobs.token_logprobs_kernel": _once,
    "token_logprobs.parts_kernel": _once,
    "token_logprobs.token_logprobs_backward_kernel": _backward,
    "sample_tokens.tiles_kernel": _once,
    "sample_tokens.histogram_kernel": _once,
    "sample_tokens.sample_kept_kernel": _once,
    "sample_tokens.sample_tokens_kernel": _once,
    "_filters.cutoff_kernel": _once,
    "_logits.row_kernel": _triton_row,
    "_logits.segment_kernel": _triton_segment,
    "_logits.gradient_kernel": _triton_gradient,
    "linear_sample_tokens.linear_sample_tokens_kernel": _product,
    "linear_sample_tokens.linear_sample_tokens_logits_kernel": _product,
    "_head.copy_rows_kernel": _copied_rows,
    "decode_attention.attend_kernel": _attention,
    "decode_attention.decode_attention_kernel": _attention,
    "decode_attention.merge_kernel": _merged_states,
    "decode_attention.decode_attention_merge_kernel": _merged_states,
}
IDLE = {"_scale.scale_kernel", "_scale.scale_two_kernel", "ppo_loss.scale_gradients_kernel"}
"""Kernels that scale gradients: by a factor of 1 they visit none."""

# Kernels that multiply the hidden rows with the weight themselves, and their share of the library's rate (estimates of
# kernels/triton/_head.py's is_scored).
OWN_PRODUCTS = {
    "_scoring.score_kernel": 0.8,
    "_scoring.score_pair_kernel": 0.65,
    "linear_sample_tokens.linear_sample_tokens_kernel": 0.8,
    "linear_sample_tokens.linear_sample_tokens_logits_kernel": 0.8,
}

# How often a block waits for memory besides its streaming loop, counted by hand: at least for its inputs and outputs.
FEWEST_VISITS = 2
VISITS = {
    "ppo_loss.ppo_loss_kernel": 5,  # weights, the other inputs, the sums, the ticket, all blocks' sums
    "ppo_advantages.scan_kernel": 5,  # the mask, the other inputs, the moments, the ticket, all blocks' moments
    "decode_attention.attend_kernel": 4,  # the length, the table, keys, values
    "decode_attention.decode_attention_kernel": 4,
}
# Warp instructions by the byte of keys and values, counted by hand in the code for sm_90: 1880 for 32 keys of 64
# numbers and as many values, 2860 of 128.
ATTENTION = {64: 1880 / 8192, 128: 2860 / 16384}


def traffic_of(arguments: Arguments, launched: list[tuple[str, Node]]) -> list[Traffic]:
    """Return the bytes of our kernels' launches (name, node) of a case."""
    case, (min_bytes, _) = arguments.case, arguments.minimum()
    read = min(arguments.given_bytes(), min_bytes)
    uncounted = [node for name, node in launched if name not in IDLE]
    is_counted = any(name in TRAFFIC for name, _ in launched)
    largest = None if is_counted else max(uncounted, key=lambda node: node.blocks * node.threads)
    return [
        TRAFFIC[name](case, node)
        if name in TRAFFIC
        else Traffic(read, min_bytes - read)
        if node is largest
        else Traffic(0.0)
        for name, node in launched
    ]


def product_of(arguments: Arguments, name: str) -> tuple[float, float]:
    """Return the operations of a launch's product, and the share of the library's rate at which it runs."""
    return (arguments.minimum()[1], OWN_PRODUCTS[name]) if name in OWN_PRODUCTS else (0.0, 1.0)


class Instructions(NamedTuple):
    """Warp instructions of a launch, the special ones among them, and how often a thread goes through the streaming
    loop."""

    all: float
    special: float
    rounds: float
    is_by_hand: bool = False


def instructions_of(case: Case, name: str, node: Node, code: Code, read: float) -> Instructions:
    """Return what a launch issues for the bytes that it reads."""
    warps = node.blocks * node.threads / WARP
    a_thread = read / (node.blocks * node.threads)
    loop = code.loop
    rounds = max(1.0, a_thread / loop.loaded) if loop else 1.0
    if name == "decode_attention.attend_kernel" and case.size["d"] in ATTENTION:
        return Instructions(ATTENTION[case.size["d"]] * read, 0.0, rounds, True)
    passed = code.whole.plus(code.mean, rounds - 1)
    return Instructions(warps * passed.instructions, warps * passed.special, rounds)
