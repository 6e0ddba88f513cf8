"""varlen_attention with decode_order: to the bit what decode_attention gives over a cache of the same keys and values.

A cache has the keys of one token's sequence in pages, its parent's first. Each token is a query of its own there.
"""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS

op = ops.varlen_attention
CPU = [b for b in op.backends if b.startswith("cpu")]
pytestmark = pytest.mark.skipif(not CPU, reason="no compiled kernel here")
LENGTHS, P = (1, 17, 65, 0, 300), 16
PARENTS = (-1, -1, 1, 1, 2)  # the last is replaced where a parent would have one


def inputs(lengths=LENGTHS, H=3, Hkv=1, d=10):
    x = torch.randn(sum(lengths), H + 2 * Hkv, d)
    return *x.split([H, Hkv, Hkv], dim=1), torch.tensor([0, *lengths]).cumsum(0)


def whole_sequence(offsets, parents, s):
    """Return the tokens that the last token of sequence s sees, its parent's first."""
    ends, p = offsets.tolist(), -1 if parents is None else int(parents[s])
    return [*(range(ends[p], ends[p + 1]) if p >= 0 else ()), *range(ends[s], ends[s + 1])]


def decoded(backend, q, k, v, offsets, scale, window=0, softcap=0.0, parents=None, cache=torch.float32):
    """Return decode_attention of every token, over a cache that has each sequence in pages of its own."""
    sequences = [whole_sequence(offsets, parents, s) for s in range(len(offsets) - 1)]
    M = max(1, *(-(-len(tokens) // P) for tokens in sequences))
    table = torch.randperm(len(sequences) * M).view(-1, M).int()
    caches = torch.full((2, table.numel(), k.shape[1], P, k.shape[2]), torch.nan, dtype=cache)
    lengths, rows = torch.zeros(2, len(q), dtype=torch.int32)
    for s, tokens in enumerate(sequences):
        for position, token in enumerate(tokens):
            for x, pages in zip((k, v), caches, strict=True):
                pages[table[s, position // P], :, position % P] = x[token]
        own = range(int(offsets[s]), int(offsets[s + 1]))
        for token in own:
            rows[token], lengths[token] = s, len(tokens) - len(own) + token - own.start + 1
    return ops.decode_attention.backend(backend)(q, *caches, table, lengths, rows, scale, window, softcap)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("d", [8, 10, 64, 80, 128])
@pytest.mark.exhaustive(4, by=("backend",))
def test_the_bits_are_those_of_decode_attention(backend, heads, d, poisoned):
    q, k, v, offsets = inputs(LENGTHS, *heads, d)
    out = op.backend(backend)(q, k, v, offsets, d**-0.5, decode_order=True)
    assert torch.equal(out, decoded(backend, q, k, v, offsets, d**-0.5))
