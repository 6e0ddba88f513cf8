"""varlen_attention with decode_order: to the bit what decode_attention gives over a cache of the same keys and values.

In the cache each sequence has pages of its own, with its parent's tokens first. Each token is a query there.
"""

import itertools

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS

op = ops.varlen_attention
CPU = [b for b in op.backends if b.startswith("cpu")]
pytestmark = pytest.mark.skipif(not CPU, reason="no compiled kernel here")
P = 16
LENGTHS, PARENTS = (1, 17, 65, 0, 200, 70), torch.tensor([-1, -1, 1, 1, -1, 4])  # the last has two splits of keys


def inputs(lengths=LENGTHS, H=3, Hkv=1, d=10, dtype=torch.float32):
    x = torch.randn(sum(lengths), H + 2 * Hkv, d).to(dtype)
    return *x.split([H, Hkv, Hkv], dim=1), torch.tensor([0, *lengths]).cumsum(0)


def decoded(backend, q, k, v, offsets, scale, window=0, softcap=0.0, parents=None, cache=None):
    """Return decode_attention of every token."""
    S, ends = len(offsets) - 1, offsets.tolist()
    spans = [range(*pair) for pair in itertools.pairwise(ends)]
    parent_of = [-1] * S if parents is None else parents.tolist()
    tokens = [[*(spans[p] if p >= 0 else ()), *span] for p, span in zip(parent_of, spans, strict=True)]
    M = -(-max(map(len, tokens)) // P)
    table = torch.randperm(S * M).view(S, M).int()
    caches = torch.full((2, S * M, P, *k.shape[1:]), torch.nan, dtype=cache or k.dtype)
    lengths, rows = torch.zeros(2, len(q), dtype=torch.int32)
    for s, span in enumerate(spans):
        for pages, x in zip(caches, (k, v), strict=True):
            places = pages[table[s].long()].flatten(0, 1)
            places[: len(tokens[s])] = x[tokens[s]].to(places.dtype)
            pages[table[s].long()] = places.unflatten(0, (M, P))
        rows[span.start : span.stop] = s
        lengths[span.start : span.stop] = torch.arange(len(span)) + len(tokens[s]) - len(span) + 1
    caches = caches.transpose(2, 3)
    return ops.decode_attention.backend(backend)(q, *caches, table, lengths, rows, scale, window, softcap)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("d", [8, 10, 64, 80, 128])
@pytest.mark.exhaustive(4, by=("backend",))
def test_the_bits_are_those_of_decode_attention(backend, heads, d, poisoned):
    q, k, v, offsets = inputs((1, 17, 65, 0, 300), *heads, d)
    expected = decoded(backend, q, k, v, offsets, d**-0.5)
    assert torch.equal(op.backend(backend)(q, k, v, offsets, d**-0.5, decode_order=True), expected)
    assert not torch.equal(op.backend(backend)(q, k, v, offsets, d**-0.5), expected), "a test of nothing"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("window", [0, 1, 20, 260, 1000])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("parents", [None, PARENTS], ids=["alone", "parents"])
@pytest.mark.exhaustive(5, by=("backend",))
def test_windows_soft_caps_and_parents(backend, window, softcap, parents, poisoned):
    q, k, v, offsets = inputs(H=6, Hkv=2, d=20)
    options = {"window": window, "softcap": softcap, "parents": parents}
    ours = op.backend(backend)(q, k, v, offsets, 0.4, decode_order=True, **options)
    assert torch.equal(ours, decoded(backend, q, k, v, offsets, 0.4, **options))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_cache_in_bfloat16(backend, dtype):
    """Queries in float32 or bfloat16, over keys and values that bfloat16 has exactly."""
    q, k, v, offsets = inputs(H=8, Hkv=2, d=32, dtype=torch.bfloat16)
    q = torch.randn(q.shape).to(dtype)
    ours = op.backend(backend)(q, k.to(dtype), v.to(dtype), offsets, 0.2, parents=PARENTS, decode_order=True)
    assert torch.equal(ours, decoded(backend, q, k, v, offsets, 0.2, parents=PARENTS, cache=torch.bfloat16))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("window", [0, 90])
def test_bits_depend_neither_on_the_batch_nor_on_threads(backend, window):
    """A sequence alone, with a copy of its prompt, has the bits that it has beside the others."""
    q, k, v, offsets = inputs(H=8, Hkv=4, d=8)
    before, call = torch.get_num_threads(), op.backend(backend)
    options = {"window": window, "decode_order": True}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = call(q, k, v, offsets, 0.3, parents=PARENTS, **options)
            for s, p in enumerate(PARENTS.tolist()):
                own = torch.arange(offsets[s], offsets[s + 1])
                tokens = own if p < 0 else torch.cat([torch.arange(offsets[p], offsets[p + 1]), own])
                alone = call(*(x[tokens] for x in (q, k, v)), torch.tensor([0, len(tokens)]), 0.3, **options)
                assert torch.equal(alone[len(tokens) - len(own) :], together[own])
                assert together[own].isfinite().all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("window", [0, 30])
def test_slices_of_one_product_are_read_in_place(backend, window):
    q, k, v, offsets = inputs(H=4, Hkv=2, d=12)
    dense = [x.contiguous() for x in (q, k, v)]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    padded = [torch.nn.functional.pad(x, (0, 5))[..., :12] for x in (q, k, v)]
    expected = op.backend(backend)(*dense, offsets, 0.3, window, decode_order=True)
    for given in (q, k, v), by_head, padded, (q, dense[1], v):
        assert torch.equal(op.backend(backend)(*given, offsets, 0.3, window, decode_order=True), expected)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("window", [0, 12])
def test_statistics_and_gradients(backend, window, poisoned):
    q, k, v, offsets = inputs((1, 17, 290), d=12)
    with_statistics = OPS["varlen_attention_with_statistics"]
    args = op.normalized(q, k, v, offsets, 0.3, window, decode_order=True)
    in_float64 = [x.double() for x in (q, k, v)]
    lse, truth = with_statistics.backend(backend)(*args)[1], with_statistics.reference(*in_float64, *args[3:])[1]
    torch.testing.assert_close(lse.double(), truth, rtol=1e-6, atol=1e-6)
    upstream, found = torch.randn(q.shape), []
    for name, tensors in (backend, (q, k, v)), ("reference", in_float64):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = op.backend(name)(*leaves, *args[3:])
        found.append(torch.autograd.grad(out, leaves, upstream.to(out.dtype)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("window", [0, 7])
def test_a_nan_reaches_only_the_tokens_that_see_it(backend, window):
    q, k, v, offsets = inputs((20, 30, 280), 2, 1, 8)
    k[40], v[49], k[300] = torch.nan, torch.inf, torch.nan
    out = op.backend(backend)(q, k, v, offsets, 0.3, window, decode_order=True)
    is_finite = out.isfinite().all(-1).all(-1)
    expected = torch.ones(330, dtype=torch.bool)
    for first, last in (40, 50), (49, 50), (300, 330):
        expected[first : min(last, first + window) if window else last] = False
    assert torch.equal(is_finite, expected)


@pytest.mark.parametrize("backend", CPU)
def test_wrong_sequences_are_refused(backend):
    q, k, v, _ = inputs((3, 6))
    with pytest.raises(ValueError, match="varlen_attention: offsets must rise from 0 to 9, the number"):
        op.backend(backend)(q, k, v, torch.tensor([0, 3, 10]), 0.3, decode_order=True)
    with pytest.raises(ValueError, match="varlen_attention: parents must be -1, or an earlier sequence"):
        op.backend(backend)(q, k, v, torch.tensor([0, 3, 9]), 0.3, parents=torch.tensor([-1, 1]), decode_order=True)
