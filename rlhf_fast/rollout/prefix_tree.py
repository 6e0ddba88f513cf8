"""The radix tree of token sequences: each prefix that several of them share is one node.

sequences   a b c d e f      a b c d g      a b h i
nodes       [a b] -> [c d] -> [e f]         a sequence is the tokens of the nodes from a root to its own node
               |        +---> [g]
               +-----> [h i]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(eq=False)
class PrefixNode:
    """Tokens at positions start to end - 1 of every sequence that passes through the node."""

    tokens: Sequence[int]
    parent: PrefixNode | None
    start: int = field(init=False)
    end: int = field(init=False)
    level: int = field(init=False)
    """Number of nodes above it."""

    def __post_init__(self) -> None:
        self.start = 0 if self.parent is None else self.parent.end
        self.end = self.start + len(self.tokens)
        self.level = 0 if self.parent is None else self.parent.level + 1

    def path(self) -> list[PrefixNode]:
        """Return the nodes from the root to this one."""
        nodes, node = [self], self.parent
        while node is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def build_prefix_tree(
    sequences: Sequence[Sequence[int]], min_shared: int = 1, multiple: int = 1
) -> list[PrefixNode | None]:
    """Return the node in which each sequence ends, for different sequences in sorted order.

    min_shared: a prefix becomes a node if at least so many of its tokens are not those of its parent.
    multiple: shared prefixes end at a multiple of so many tokens. The rest of a sequence is a node of its own; None for
        a sequence without tokens.
    """
    lengths = [common_prefix(a, b) // multiple * multiple for a, b in pairwise(sequences)]
    ends: list[PrefixNode | None] = [None] * len(sequences)
    # ranges of sequences that share the tokens of `parent`, which end at `start`
    ranges: list[tuple[int, int, PrefixNode | None]] = [(0, len(sequences), None)]
    while ranges:
        first, stop, parent = ranges.pop()
        start = 0 if parent is None else parent.end
        while first < stop and len(sequences[first]) == start:
            ends[first] = parent
            first += 1
        while first < stop:
            last = first
            shared = len(sequences[first])
            while last + 1 < stop and min(shared, lengths[last]) - start >= min_shared:
                shared = min(shared, lengths[last])
                last += 1
            node = PrefixNode(sequences[first][start:shared], parent)
            if first == last:
                ends[first] = node
            else:
                ranges.append((first, last + 1, node))
            first = last + 1
    return ends
