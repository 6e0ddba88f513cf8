"""csrc/cuda's decode_attention and rope_store, on a GPU or run on the CPU: the bits of a token are its own, however its
splits are shared and wherever its keys lie, and heads and dtypes of every kind are served."""

from importlib import import_module

import pytest
import torch
from test_decode_attention import Sequences
from test_ops import answer, assert_near, detached, to

from rlhf_fast.kernels._op import OPS

HERE = [(b, d) for b, d in (("simt", "cpu"), ("cuda", "cuda")) if b in OPS["decode_attention"].backends]
pytestmark = pytest.mark.skipif(not HERE, reason="no CUDA kernels here")
on = pytest.mark.parametrize("backend, device", HERE, ids=[b for b, _ in HERE])
NUMBERS = [torch.float32, torch.bfloat16, torch.float16]
floats = pytest.mark.parametrize("dtype", NUMBERS, ids=lambda d: str(d)[6:])


def attention(s, paged, rows, backend, device, **options):
    """By the kernel itself: what it declined would go to the reference."""
    tables = [torch.tensor(x, dtype=torch.int32) for x in ([s.lengths[n] for n in rows], rows)]
    args = [x.to(device) for x in (s.q[rows], *paged, *tables)]
    op = OPS["decode_attention"]
    return op.implementations[backend](*op.normalized(*args, s.q.shape[2] ** -0.5, **options)).cpu()


def assert_right(out, s, rows, **options):
    eps = torch.finfo(out.dtype).eps
    for mine, n in zip(out, rows, strict=True):
        torch.testing.assert_close(mine.double(), s.expected(n, **options), rtol=max(2e-5, eps), atol=max(2e-6, eps))


@on
@floats
@pytest.mark.parametrize("window", [0, 400])
def test_bits_hang_neither_on_company_nor_on_who_takes_a_split(backend, device, dtype, window, monkeypatch):
    """One block for all splits, one for two or three of them, one for each; pages of several sizes."""
    file = import_module("rlhf_fast.kernels.decode_attention")
    s = Sequences([300, 17, 0, 1100, 256], H=4, d=32, dtype=dtype)
    rows = [3, 2, 0, 4, 1]
    paged = s.paged(64)
    assert file._blocks_per_head(5, 4, 2, 32, 5, s.q) == 5, "not a block a split"
    alone = torch.cat([attention(s, paged, [n], backend, device, window=window) for n in rows])
    assert_right(alone[[0, 2, 3, 4]], s, [3, 0, 4, 1], window=window)
    assert not alone[1].any()
    for parts in (1, 2, 3, 5):
        monkeypatch.setattr(file, "_blocks_per_head", lambda *sizes, parts=parts: min(parts, sizes[4]))
        for P in (16, 7):
            assert torch.equal(attention(s, s.paged(P), rows, backend, device, window=window), alone)


@on
@pytest.mark.parametrize("d, dv", [(64, 64), (112, 112), (192, 128), (256, 256), (8, 256), (250, 3)])
@pytest.mark.parametrize("group", [1, 5, 17])
@pytest.mark.parametrize("dtype", NUMBERS[:2], ids=lambda d: str(d)[6:])
def test_heads_of_every_width(backend, device, dtype, group, d, dv):
    """Teams of 8, 16 and 32 lanes, words of a row that no lane has, and more query heads than a block takes."""
    s = Sequences([270, 3], H=group, Hkv=1, d=d, dv=dv, dtype=dtype)
    assert_right(attention(s, s.paged(16), [0, 1], backend, device, window=268), s, [0, 1], window=268)


@on
@floats
def test_caches_that_begin_anywhere_and_queries_of_another_dtype(backend, device, dtype):
    s = Sequences([70, 20], d=64, dtype=dtype)
    k, v, table = s.paged(16)
    expected = attention(s, (k, v, table), [0, 1], backend, device)
    moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (k, v)]
    assert torch.equal(attention(s, (*moved, table), [0, 1], backend, device), expected)
    s.q = torch.cat([s.q, s.q], 2)[:, :, :64]  # as it lies
    for number in NUMBERS:
        s.q = s.q.to(number)
        assert_right(attention(s, (k, v, table), [0, 1], backend, device), s, [0, 1])


@on
def test_shares_come_from_shapes_and_what_they_leave_behind_is_bounded(backend, device):
    file = import_module("rlhf_fast.kernels.decode_attention")
    q = torch.empty(0)  # a CPU's four processors
    for N in (1, 3, 15, 60, 5000):
        for splits in (1, 8, 4096):
            parts, blocks = file._blocks_per_head(N, 32, 8, 128, splits, q), 8 * N
            assert 1 <= parts <= splits and (parts == 1 or parts * blocks <= 4 * file.BLOCKS_PER_SM)
            assert parts == 1 or blocks < 2 * 4 or 4 * N * 32 * splits * 130 <= file.MAX_STATE_BYTES
            assert parts == splits or parts * blocks > 4 * file.BLOCKS_PER_SM / 2 or blocks >= 2 * 4


@on
@pytest.mark.parametrize("name", ["decode_attention", "rope_store"])
def test_float16_is_served(backend, device, name):
    op = OPS[name]
    for size in op.small_sizes:
        args = detached(op.make_inputs(device=device, dtype=torch.float16, **size))

        def reference(*given):
            return op.reference(*op.normalized(*given))

        def ours(*given):
            return op.implementations[backend](*op.normalized(*given))

        truth, plain = answer(op, reference, to(args, torch.float64)), answer(op, reference, args)
        assert_near(answer(op, ours, args), plain, truth, name)


@on
@pytest.mark.parametrize("given", NUMBERS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("held", NUMBERS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("r", [0, 32, 64])
def test_rope_store_by_eights_gives_the_bits_that_it_gives_one_by_one(backend, device, given, held, r):
    """Of every dtype into caches of every other: rows that lie apart by an odd number are read number by number."""
    op = OPS["rope_store"]
    args = op.make_inputs(N=3, H=3, Hkv=2, d=64, dv=40, P=4, r=r, device=device, dtype=given, cache=held)
    args = [*args[:3], args[3].to(given), args[4].to(held), *args[5:]]
    eights, ones = detached(args), detached(args)
    ones[0] = torch.cat([ones[0], ones[0][:, :, :1]], 2)[:, :, :-1]
    outs = [op.implementations[backend](*op.normalized(*mine)) for mine in (eights, ones)]
    for one, other in ((outs), (eights[5], ones[5]), (eights[6], ones[6])):
        assert torch.equal(one, other)
    truth = detached(args)
    with torch.no_grad():
        bound = {"rtol": torch.finfo(given).eps, "atol": 1e-6}
        torch.testing.assert_close(outs[0], op.reference(*truth), **bound)
        bound["rtol"] = torch.finfo(held).eps
        for mine, exact in zip(eights[5:7], truth[5:7], strict=True):
            torch.testing.assert_close(mine, exact, **bound)


@on
def test_a_slot_that_is_no_place_writes_nothing(backend, device, monkeypatch):
    """On a GPU nobody looks at the slots beforehand."""
    monkeypatch.setattr(import_module("rlhf_fast.kernels.rope_store"), "_check_slots", lambda *given: None)
    op = OPS["rope_store"]
    *args, slots = op.make_inputs(N=2, H=1, Hkv=1, d=8, P=2, device=device, dtype=torch.float32)
    before = [cache.clone() for cache in args[5:7]]
    places = before[0].shape[0] * 2
    op.implementations[backend](*args, torch.tensor([-1, places], device=device))
    assert all(torch.equal(a, b) for a, b in zip(args[5:7], before, strict=True))
