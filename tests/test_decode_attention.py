"""decode_attention: a token's bits do not depend on the batch, and nothing of other sequences is read."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._backends import TRITON_DEVICES
from rlhf_fast.kernels._op import OPS

BACKENDS = [b for b in OPS["decode_attention"].backends if b.startswith(("cpu", "simt", "triton"))]
TRITON_DEVICE = TRITON_DEVICES[0] if TRITON_DEVICES else "cpu"
"""The interpreter's CPU, or a GPU. test_cuda_decode.py has CUDA's kernels."""
pytestmark = pytest.mark.skipif(not BACKENDS, reason="no compiled kernel here")
triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot run here")


class Sequences:
    """Keys and values of some sequences, and their layout in pages."""

    def __init__(self, lengths, H=6, Hkv=2, d=64, dv=None, dtype=torch.float32):
        self.lengths, self.dtype, self.H, dv = lengths, dtype, H, dv or d
        self.keys = [torch.randn(n, Hkv, d).to(dtype) for n in lengths]
        self.values = [torch.randn(n, Hkv, dv).to(dtype) for n in lengths]
        self.q = torch.randn(len(lengths), H, d)

    def paged(self, P, spare=3):
        """Return caches and a block table, with pages in a random order. Positions without a key hold NaN."""
        M = max(1, -(-max(self.lengths) // P))
        num_pages = len(self.lengths) * M + spare
        table = torch.randperm(num_pages)[: len(self.lengths) * M].view(-1, M).int()
        caches = []
        for sequences in (self.keys, self.values):
            _, heads, head_size = sequences[0].shape
            cache = torch.full((num_pages, heads, P, head_size), torch.nan, dtype=self.dtype)
            for pages, rows in zip(table, sequences, strict=True):
                for position, row in enumerate(rows):
                    cache[pages[position // P], :, position % P] = row
            caches.append(cache)
        return *caches, table

    def expected(self, n, length=None, window=0, softcap=0.0):
        """Return attention of query n over its own keys, in float64."""
        length = self.lengths[n] if length is None else length
        start = max(0, length - window) if window else 0
        repeat = self.H // self.keys[n].shape[1]
        k, v = (x[n][start:length].double().repeat_interleave(repeat, 1) for x in (self.keys, self.values))
        scores = torch.einsum("hd,khd->hk", self.q[n].double(), k) * self.q.shape[2] ** -0.5
        scores = softcap * (scores / softcap).tanh() if softcap else scores
        return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


def attention(s, paged, rows=None, backend="cpu", lengths=None, **options):
    rows = list(range(len(s.lengths))) if rows is None else rows
    lengths = [s.lengths[n] for n in rows] if lengths is None else lengths
    tables = torch.tensor(lengths, dtype=torch.int32), torch.tensor(rows, dtype=torch.int32)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    args = [x.to(device) for x in (s.q[rows], *paged, *tables)]
    return ops.decode_attention.backend(backend)(*args, s.q.shape[2] ** -0.5, **options).cpu()


def assert_right(out, s, rows=None, lengths=None, **options):
    rows = range(len(s.lengths)) if rows is None else rows
    for i, n in enumerate(rows):
        truth = s.expected(n, lengths[i] if lengths else None, **options)
        torch.testing.assert_close(out[i].double(), truth, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("P", [1, 16, 64])
@pytest.mark.exhaustive(2, by=("backend",))
def test_lengths_around_the_ends_of_pages_and_splits(backend, dtype, P):
    lengths = sorted({n for end in (P, 2 * P, 64, 256, 512) for n in (end - 1, end, end + 1) if n})
    s = Sequences(lengths, dtype=dtype)
    assert_right(attention(s, s.paged(P), backend=backend), s)


@pytest.mark.exhaustive(4, by=("backend",))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 37])
def test_grouped_heads_of_every_size(backend, group, d):
    s = Sequences([1, 50, 259], H=2 * group, Hkv=2, d=d, dv=d if d % 8 else d + 3)
    assert_right(attention(s, s.paged(16), backend=backend), s)


@pytest.mark.exhaustive(2, by=("backend",))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window, softcap", [(1, 0.0), (5, 2.0), (256, 0.0), (300, 30.0), (10_000, 0.5)])
def test_window_and_softcap(backend, window, softcap):
    s = Sequences([3, 255, 256, 257, 600])
    options = {"window": window, "softcap": softcap}
    assert_right(attention(s, s.paged(16), backend=backend, **options), s, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_position_of_a_prompt_in_one_call(backend):
    """Many tokens of one sequence, each with its own length, as in a prefill."""
    s = Sequences([70, 40])
    rows, lengths = [0] * 70 + [1] * 3, [*range(1, 71), 38, 39, 40]
    assert_right(attention(s, s.paged(16), rows, backend, lengths), s, rows, lengths)


def test_pages_before_the_window_need_not_exist():
    s = Sequences([100, 90])
    k, v, table = s.paged(16)
    table[:, 0] = -1
    assert_right(attention(s, (k, v, table), window=70), s, window=70)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_tokens_bits_do_not_depend_on_the_batch(backend, dtype):
    """Tokens alone and in a batch, in another order, in other pages, with any number of threads."""
    lengths = [1, 17, 256, 700, 1025, 64, 300, 513, 40]
    s = Sequences(lengths, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([attention(s, s.paged(16), [n], backend) for n in range(len(lengths))])
        assert_right(alone, s)
        for threads in (1, 2, 3, 8):  # with 8, single tokens are split among the threads
            torch.set_num_threads(threads)
            for P in (1, 16, 64):
                paged, order = s.paged(P), torch.randperm(len(lengths)).tolist()
                assert torch.equal(attention(s, paged, order, backend), alone[order])
                assert torch.equal(attention(s, paged, [4], backend), alone[4:5])
                assert torch.equal(attention(s, paged, [3, 8], backend), alone[[3, 8]])
                windowed = attention(s, paged, [4, 3], backend, window=400)
                torch.set_num_threads(1)
                assert torch.equal(attention(s, paged, [3], backend, window=400), windowed[1:])
                torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(before)


@triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 400])
@pytest.mark.exhaustive(2)
def test_tritons_bits_do_not_depend_on_the_batch_or_the_programs(dtype, window, monkeypatch):
    from rlhf_fast.kernels.triton import decode_attention

    s = Sequences([300, 17, 0, 600], H=4, d=32, dtype=dtype)
    s.q = s.q.to(dtype)
    assert decode_attention.choose_programs_per_head(4, 4, 2, 32, 3, s.q) == 3, "the splits do not each have a program"
    alone = torch.cat([attention(s, s.paged(64), [n], "triton", window=window) for n in range(4)])
    bound = max(torch.finfo(dtype).eps, 2e-6)  # it sums in float32
    for n in (0, 1, 3):
        torch.testing.assert_close(alone[n].double(), s.expected(n, window=window), rtol=bound, atol=bound)
    monkeypatch.setattr(decode_attention, "choose_programs_per_head", lambda *sizes: 1)
    for P in (16, 64):
        assert torch.equal(attention(s, s.paged(P), [3, 2, 0, 1], "triton", window=window), alone[[3, 2, 0, 1]])


@triton
def test_the_memory_of_splits_is_bounded():
    """A decode step's few tokens are split; thousands of tokens of a prefill are not, and long tables stay cheap."""
    from rlhf_fast.kernels.triton import decode_attention

    q = torch.empty(0)
    few = 4 * 2  # programs that fill the interpreter's 4 SMs twice
    for N in (1, 3, 60, 5000):
        for splits in (1, 8, 4096):
            parts = decode_attention.choose_programs_per_head(N, 32, 8, 128, splits, q)
            partial_bytes = 4 * N * 32 * splits * 130
            assert parts in (1, splits)
            assert parts == 1 or N * 8 < few or partial_bytes <= decode_attention.MAX_PARTIAL_BYTES
            assert parts == splits or N * 8 >= few


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_or_infinity_affects_only_its_own_token_and_head(backend):
    s = Sequences([20, 300, 30])
    k, v, table = s.paged(16)
    k[table[0, 0], 0, 3] = torch.nan
    v[table[1, 17], 1, 2] = torch.inf
    out = attention(s, (k, v, table), backend=backend)
    assert out[0, :3].isnan().all() and out[0, 3:].isfinite().all()
    assert out[1, :3].isfinite().all() and (out[1, 3:] == torch.inf).all()
    assert out[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_outweighs_all_others(backend):
    """The ratio exceeds the range of float32; the key is in each of three splits."""
    for best in (0, 300, 599):
        s = Sequences([600], H=1, Hkv=1)
        s.q *= 100
        s.keys[0][best] = s.q[0, 0] / 10
        out = attention(s, s.paged(64), backend=backend)
        torch.testing.assert_close(out[0], s.values[0][best])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_positions_out_of_range_are_refused(backend):
    """On a GPU they are not checked: the check would wait for the device."""
    if backend == "triton" and TRITON_DEVICE == "cuda":
        pytest.skip("not checked on a GPU")
    s = Sequences([20, 9])
    k, v, table = s.paged(16)
    with pytest.raises(ValueError, match=r"decode_attention: lengths must be from 0 to 32, .* got 9 to 33"):
        attention(s, (k, v, table), backend=backend, lengths=[33, 9])
    with pytest.raises(ValueError, match=r"decode_attention: lengths must be from 0 to 32, .* got -1 to 20"):
        attention(s, (k, v, table), backend=backend, lengths=[20, -1])
    with pytest.raises(ValueError, match=r"decode_attention: pages must be from 0 to 6 .* got"):
        attention(s, (k, v, torch.where(table == table[0, 1], 7, table)), backend=backend)
    with pytest.raises(ValueError, match=r"decode_attention: rows must be from 0 to 0, .* got 0 to 1"):
        attention(s, (k, v, table[:1]), backend=backend)
    table[1, 1] = -1  # after the nine keys of that row, so it is not read
    attention(s, (k, v, table), backend=backend)


def test_shapes_that_do_not_fit_are_refused():
    s = Sequences([4])
    k, v, table = s.paged(2)
    for bad in ((k[:, :, :, 1:], v, table), (k, v[:, :1], table), (k, v, table[0]), (k[:, :0], v[:, :0], table)):
        with pytest.raises(ValueError, match=r"decode_attention: q .* must fit together, H a multiple of Hkv, got"):
            attention(s, bad)
    with pytest.raises(ValueError, match="decode_attention: both caches must have one dtype, got"):
        attention(s, (k, v.half(), table))
    for option in ({"window": -1}, {"softcap": -1.0}, {"softcap": float("nan")}, {"softcap": float("inf")}):
        with pytest.raises(ValueError, match=r"decode_attention: window and softcap must be 0 .* got"):
            attention(s, (k, v, table), **option)
