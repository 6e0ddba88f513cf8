"""The sequences of varlen_attention: checked, and in the order in which the CPU's threads take them."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.kernels._tensors import check_offsets


def check_sequences(offsets: Tensor, parents: Tensor | None, N: int) -> None:
    """Raise ValueError unless the sequences are all tokens, and each parent stands before its children and has none
    itself. On a GPU nothing is checked: it would wait for the device."""
    check_offsets("varlen_attention", "offsets", offsets, N)
    if parents is None or parents.device.type != "cpu":
        return
    given = parents.tolist()
    for s, p in enumerate(given):
        if not -1 <= p < s or (p >= 0 and given[p] >= 0):
            raise ValueError(
                "varlen_attention: parents must be -1, or an earlier sequence that has no parent itself, got"
                f" parents[{s}] = {p}" + (f" and parents[{p}] = {given[p]}" if 0 <= p < s else "")
            )


class Plan(NamedTuple):
    """Trees of sequences in the order in which the CPU's threads take them, the largest first."""

    order: Tensor  # (S,): sequences; a parent is directly before its children
    tree_starts: Tensor  # (num_trees + 1,)
    max_tokens: int  # of a tree


class _Newest(NamedTuple):
    """The newest plan, which all layers of a pass share, and copies of what it was made of."""

    N: int
    offsets: Tensor
    parents: Tensor | None
    plan: Plan


_newest: _Newest | None = None


def plan_of(offsets: Tensor, parents: Tensor | None, N: int) -> Plan:
    """Return the plan of checked sequences of N tokens."""
    global _newest
    known = _newest  # other threads may exchange it
    if known is not None and known.N == N and (known.parents is None) == (parents is None):
        same_parents = parents is None or known.parents is None or torch.equal(parents, known.parents)
        if same_parents and torch.equal(offsets, known.offsets):
            return known.plan
    check_sequences(offsets, parents, N)
    plan = _make_plan(offsets, parents)
    with torch.inference_mode(False):
        _newest = _Newest(N, offsets.clone(), None if parents is None else parents.clone(), plan)
    return plan


def _make_plan(offsets: Tensor, parents: Tensor | None) -> Plan:
    ends = offsets.tolist()
    trees: dict[int, list[int]] = {}
    for s, p in enumerate([-1] * (len(ends) - 1) if parents is None else parents.tolist()):
        trees.setdefault(s if p < 0 else p, []).append(s)
    tokens = {root: sum(ends[s + 1] - ends[s] for s in tree) for root, tree in trees.items()}
    roots = sorted(trees, key=lambda root: -tokens[root])
    starts = [0]
    for root in roots:
        starts.append(starts[-1] + len(trees[root]))
    order = torch.tensor([s for root in roots for s in trees[root]], dtype=torch.int64, device="cpu")
    return Plan(order, torch.tensor(starts, dtype=torch.int64, device="cpu"), max(tokens.values(), default=0))
