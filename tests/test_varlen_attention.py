"""varlen_attention beside dense attention in float64: sizes, windows, soft caps, parents, bits, strides, errors."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._op import OPS

op = ops.varlen_attention
BACKENDS = [b for b in op.backends if op.can_run(b, "cpu")]
CPU = [b for b in BACKENDS if b.startswith("cpu")]
FAST = [b for b in BACKENDS if b not in ("reference", "triton")]
if "triton" in BACKENDS:
    import triton
    import triton.language as tl

    from rlhf_fast.kernels.triton import varlen_attention as kernels
PARENTS = (-1, 0, 0, -1, 3, 0)


def inputs(lengths, H=4, Hkv=2, d=8, dtype=torch.float32):
    x = torch.randn(sum(lengths), H + 2 * Hkv, d, dtype=dtype)
    return *x.split([H, Hkv, Hkv], dim=1), torch.tensor([0, *lengths]).cumsum(0)


def dense(q, k, v, offsets, scale, window=0, softcap=0.0, parents=None):
    """Return attention of all tokens to all, with a mask (N, N) made token by token."""
    N, H, _ = q.shape
    ends = offsets.tolist()
    mask = torch.zeros(N, N, dtype=torch.bool)
    for s in range(len(ends) - 1):
        parent = -1 if parents is None else int(parents[s])
        prompt = list(range(ends[parent], ends[parent + 1])) if parent >= 0 else []
        row = prompt + list(range(ends[s], ends[s + 1]))
        for i in range(len(prompt), len(row)):
            mask[row[i], row[max(0, i + 1 - window) if window else 0 : i + 1]] = True
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def with_gradients(call, tensors, upstream, *rest, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves, *rest, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_dense(backend, q, k, v, offsets, scale, **options):
    upstream = torch.randn(q.shape, dtype=torch.float64)
    in_float64 = [x.double() for x in (q, k, v)]
    truth = with_gradients(dense, in_float64, upstream, offsets, scale, **options)
    ours = with_gradients(op.backend(backend), (q, k, v), upstream, offsets, scale, **options)
    bound = 3e-5 if q.dtype == torch.float32 else 3e-2
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [(3, 1), (8, 2), (2, 2), (5, 1)])
@pytest.mark.parametrize("d", [8, 10, 64, 80, 96, 128])
@pytest.mark.exhaustive(3, by=("backend",))
def test_heads_and_sizes(backend, heads, d, poisoned):
    assert_dense(backend, *inputs((1, 17, 65, 0, 2), *heads, d), d**-0.5)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 70])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("parents", [None, PARENTS])
@pytest.mark.exhaustive(4, by=("backend",))
def test_windows_soft_caps_and_parents(backend, window, softcap, parents, poisoned):
    lengths = (33, 17, 1, 40, 65, 9)
    options = {"window": window, "softcap": softcap, "parents": None if parents is None else torch.tensor(parents)}
    assert_dense(backend, *inputs(lengths), 0.4, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton interpreter")
@pytest.mark.parametrize("window, parents", [(0, PARENTS), (20, (-1, 0, -1, -1, 3, 2)), (0, None)])
def test_triton(window, parents, poisoned):
    options = {"window": window, "parents": None if parents is None else torch.tensor(parents)}
    assert_dense("triton", *inputs((40, 17, 1, 70, 5, 9), 2, 1, 10), 0.3, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(backend, dtype):
    assert_dense(backend, *inputs((3, 50), d=20, dtype=dtype), 0.2)


@pytest.mark.parametrize("backend", FAST)
def test_a_parent_is_its_tokens_before_each_child(backend):
    """The same outputs as whole sequences have, and the sum of their gradients."""
    q, k, v, offsets = inputs((30, 20, 7), 6, 3, 16)
    repeated = torch.cat([torch.arange(0, 50), torch.arange(0, 30), torch.arange(50, 57)])
    upstream = torch.randn(q.shape)
    again = upstream[repeated]
    again[50:80] = 0  # the prompt's own outputs count once
    shared = with_gradients(op.backend(backend), (q, k, v), upstream, offsets, 0.3, parents=torch.tensor([-1, 0, 0]))
    whole = with_gradients(op.backend(backend), [x[repeated] for x in (q, k, v)], again, torch.tensor([0, 50, 87]), 0.3)
    torch.testing.assert_close(shared[0][repeated], whole[0])
    for a, b in zip(shared[1:], whole[1:], strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a).index_add(0, repeated, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", CPU)
def test_bits_depend_neither_on_threads_nor_on_the_call(backend):
    """Also where few long sequences are split."""
    before = torch.get_num_threads()
    for lengths, parents in ((300,), None), ((20, 33, 150, 41), (-1, 0, 0, -1)):
        q, k, v, offsets = inputs(lengths, 3, 1, 16)
        parents = None if parents is None else torch.tensor(parents)
        upstream = torch.randn(q.shape)
        assert_dense(backend, q, k, v, offsets, 0.25, parents=parents)
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(op.backend(backend), (q, k, v), upstream, offsets, 0.25, parents=parents))
        torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_slices_of_one_product_are_read_in_place(backend):
    q, k, v, offsets = inputs((9, 30), 4, 2, 12)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not q.is_contiguous() and by_head[0].stride(1) > by_head[0].stride(0)
    dense_inputs = [x.contiguous() for x in (q, k, v)]
    upstream = torch.randn(q.shape)
    expected = with_gradients(op.backend(backend), dense_inputs, upstream, offsets, 0.3)
    for given in (q, k, v), by_head:
        found = with_gradients(op.backend(backend), given, upstream, offsets, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_the_statistics_are_the_log_sum_exp(backend):
    q, k, v, offsets = inputs((70,), 2, 1, 8)
    args = op.normalized(q, k, v, offsets, 0.5)
    lse = OPS["varlen_attention_with_statistics"].backend(backend)(*args)[1]
    scores = 0.5 * torch.einsum("nhd,md->hnm", q.double(), k[:, 0].double())
    causal = torch.ones(70, 70, dtype=torch.bool).tril()
    truth = scores.masked_fill(~causal, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_sequences_are_refused(backend):
    q, k, v, offsets = inputs((3, 4, 2))
    call = op.backend(backend)
    for bad in ([1, 3, 7, 9], [0, 5, 4, 9], [0, 3, 7, 8]):
        with pytest.raises(ValueError, match="varlen_attention: offsets must rise from 0 to 9, the number"):
            call(q, k, v, torch.tensor(bad), 0.3, parents=torch.full((len(bad) - 1,), -1))
    for bad in ([-1, 1, 0], [-1, 2, -1], [-1, -2, 0], [-1, 0, 1]):
        with pytest.raises(ValueError, match=r"varlen_attention: parents must be -1, or an earlier .*, got parents\["):
            call(q, k, v, offsets, 0.3, parents=torch.tensor(bad))


def test_wrong_shapes_dtypes_and_numbers_are_refused():
    q, k, v, offsets = inputs((3, 4))
    for bad in ((q[:, :3], k, v), (q, k, v[1:]), (q, k[..., 1:], v[..., 1:]), (q[0], k, v)):
        with pytest.raises(ValueError, match=r"varlen_attention: q must be \(N, H, d\), k and v \(N, Hkv, d\)"):
            op(*bad, offsets, 0.3)
    with pytest.raises(ValueError, match="varlen_attention: q, k and v must have one floating dtype, got"):
        op(q.bfloat16(), k, v, offsets, 0.3)
    with pytest.raises(ValueError, match=r"varlen_attention: offsets must be int32 or int64 of shape \(S \+ 1,\), got"):
        op(q, k, v, offsets.float(), 0.3)
    with pytest.raises(ValueError, match=r"varlen_attention: parents must be int32 or int64 of shape \(2,\), got"):
        op(q, k, v, offsets, 0.3, parents=torch.tensor([-1]))
    for options in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("inf")}):
        with pytest.raises(ValueError, match=r"varlen_attention: window and softcap must be 0 \(off\) or more"):
            op(q, k, v, offsets, 0.3, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton interpreter")
@pytest.mark.parametrize("num_sequences", [1, 5, 127, 128, 129, 300])
def test_triton_finds_the_sequence_of_each_block(num_sequences):
    lengths = torch.randint(0, 100, (num_sequences,))
    lengths[0] = 70
    offsets, block = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), 16
    N = int(offsets[-1])
    found = kernels.split_sequences(offsets, None, N, block)
    expected = [(s, first) for s, length in enumerate(lengths.tolist()) for first in range(0, length, block)]
    blocks = list(zip(found.block_sequence.tolist(), found.block_first.tolist(), strict=True))
    assert blocks[: len(expected)] == expected
    assert blocks[len(expected) :] == [(num_sequences - 1, N)] * (len(blocks) - len(expected))


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton interpreter")
@pytest.mark.parametrize("window", [0, 1, 20, 64, 100])
def test_triton_visits_the_tiles_that_are_seen_and_no_other(window):
    """An unused block, which begins behind the last sequence, visits none."""

    @triton.jit
    def kernel(out, first, length, parent_length, window, M: tl.constexpr, N: tl.constexpr):
        begin, whole_begin, whole_end, end = kernels.key_tiles(first, length, parent_length, window, M, N)
        tl.store(out, begin)
        tl.store(out + 1, whole_begin)
        tl.store(out + 2, whole_end)
        tl.store(out + 3, end)

    M, N = 32, 16
    for first, length, parent_length in [(0, 5, 0), (0, 90, 0), (64, 90, 0), (32, 64, 37), (96, 110, 16), (500, 90, 3)]:
        out = torch.full((4,), -1, dtype=torch.int64)
        kernel[(1,)](out, first, length, parent_length, window, M, N)
        begin, whole_begin, whole_end, end = out.tolist()
        queries = [parent_length + q for q in range(first, min(first + M, length))]
        seen = {
            start: [all(start + i <= q and (not window or q - start - i < window) for q in queries) for i in range(N)]
            for start in range(0, parent_length + length, N)
            if any(start <= q and (not window or q - min(start + N - 1, q) < window) for q in queries)
        }
        visited = [*range(begin, whole_begin, N), *range(whole_begin, whole_end, N), *range(whole_end, end, N)]
        assert visited == sorted(seen)
        assert all(all(seen[start]) for start in range(whole_begin, whole_end, N))
