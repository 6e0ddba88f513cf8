"""csrc/cuda's decode_attention and rope_store, on a GPU or run on the CPU by tests/simt.

The bits of a token do not depend on its batch, on how blocks share its splits, nor on the addresses of its keys. Heads
of all widths and all dtypes work.
"""

from importlib import import_module

import pytest
import torch
from cuda_kernels import cuda_backends, on_each_backend
from test_decode_attention import Sequences
from test_ops import assert_near, detached, reference, results, to

from rlhf_fast.kernels._op import OPS

pytestmark = pytest.mark.skipif(not cuda_backends("decode_attention"), reason="no CUDA kernels here")
on_each_backend = on_each_backend("decode_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
for_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def attention(s, paged, rows, backend, device, **options):
    """Call the kernel itself: the op would fall back to the reference if the kernel is unsupported."""
    tables = [torch.tensor(x, dtype=torch.int32) for x in ([s.lengths[n] for n in rows], rows)]
    args = [x.to(device) for x in (s.q[rows], *paged, *tables)]
    op = OPS["decode_attention"]
    return op.implementations[backend](*op.normalized(*args, s.q.shape[2] ** -0.5, **options)).cpu()


def assert_right(out, s, rows, **options):
    eps = torch.finfo(out.dtype).eps
    for mine, n in zip(out, rows, strict=True):
        torch.testing.assert_close(mine.double(), s.expected(n, **options), rtol=max(2e-5, eps), atol=max(2e-6, eps))


@on_each_backend
@for_each_dtype
@pytest.mark.parametrize("window", [0, 400])
@pytest.mark.exhaustive(2, by=("backend",))
def test_bits_do_not_depend_on_the_batch_nor_on_the_blocks_that_share_the_splits(
    backend, device, dtype, window, monkeypatch
):
    """Try one block for all splits, blocks of two or three, and one for each; pages of several sizes."""
    file = import_module("rlhf_fast.kernels.decode_attention")
    s = Sequences([300, 17, 0, 1100, 256], H=4, d=32, dtype=dtype)
    rows = [3, 2, 0, 4, 1]
    paged = s.paged(64)
    assert file._blocks_per_head(5, 4, 2, 32, 5, s.q) == 5, "not one block for each split"
    alone = torch.cat([attention(s, paged, [n], backend, device, window=window) for n in rows])
    assert_right(alone[[0, 2, 3, 4]], s, [3, 0, 4, 1], window=window)
    assert not alone[1].any()
    for num_parts in (1, 2, 3, 5):
        monkeypatch.setattr(file, "_blocks_per_head", lambda *sizes, num_parts=num_parts: min(num_parts, sizes[4]))
        for P in (16, 7):
            assert torch.equal(attention(s, s.paged(P), rows, backend, device, window=window), alone)


@on_each_backend
@pytest.mark.parametrize("d, dv", [(64, 64), (112, 112), (192, 128), (256, 256), (8, 256), (250, 3)])
@pytest.mark.parametrize("group", [1, 5, 17])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
def test_heads_of_every_width(backend, device, dtype, group, d, dv):
    """Values take 8, 16 or 32 lanes; a row may have fewer vectors than lanes, a group more query heads than a block."""
    s = Sequences([270, 3], H=group, Hkv=1, d=d, dv=dv, dtype=dtype)
    assert_right(attention(s, s.paged(16), [0, 1], backend, device, window=268), s, [0, 1], window=268)


@on_each_backend
@for_each_dtype
def test_unaligned_caches_and_queries_of_another_dtype(backend, device, dtype):
    s = Sequences([70, 20], d=64, dtype=dtype)
    k, v, table = s.paged(16)
    expected = attention(s, (k, v, table), [0, 1], backend, device)
    moved = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (k, v)]
    assert torch.equal(attention(s, (*moved, table), [0, 1], backend, device), expected)
    s.q = torch.cat([s.q, s.q], 2)[:, :, :64]  # strided
    for number in DTYPES:
        s.q = s.q.to(number)
        assert_right(attention(s, (k, v, table), [0, 1], backend, device), s, [0, 1])


def test_the_number_of_parts_depends_on_shapes_and_its_scratch_memory_is_bounded():
    file = import_module("rlhf_fast.kernels.decode_attention")
    q = torch.empty(0)  # a CPU's four processors
    for N in (1, 3, 15, 60, 5000):
        for splits in (1, 8, 4096):
            parts, blocks = file._blocks_per_head(N, 32, 8, 128, splits, q), 8 * N
            assert 1 <= parts <= splits and (parts == 1 or parts * blocks <= 4 * file.BLOCKS_PER_SM)
            assert parts == 1 or blocks < 2 * 4 or 4 * N * 32 * splits * 130 <= file.MAX_STATE_BYTES
            assert parts == splits or parts * blocks > 4 * file.BLOCKS_PER_SM / 2 or blocks >= 2 * 4


@on_each_backend
@pytest.mark.parametrize("name", ["decode_attention", "rope_store"])
def test_float16_works(backend, device, name):
    op = OPS[name]
    for size in op.small_sizes:
        args = detached(op.make_inputs(device=device, dtype=torch.float16, **size))

        def kernel(*args):
            return op.implementations[backend](*op.normalized(*args))

        truth = results(op, reference(op), to(args, torch.float64))
        assert_near(results(op, kernel, args), lambda args=args: results(op, reference(op), args), truth, name)


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("r", [0, 32, 64])
def test_rope_store_has_the_same_bits_by_eights_and_by_single_numbers(backend, device, dtype, cache_dtype, r):
    """Every dtype into caches of every other. Rows whose stride is odd are loaded one number at a time."""
    op = OPS["rope_store"]
    args = op.make_inputs(N=3, H=3, Hkv=2, d=64, dv=40, P=4, r=r, device=device, dtype=dtype, cache=cache_dtype)
    args = [*args[:3], args[3].to(dtype), args[4].to(cache_dtype), *args[5:]]
    eights, ones = detached(args), detached(args)
    ones[0] = torch.cat([ones[0], ones[0][:, :, :1]], 2)[:, :, :-1]
    outs = [op.implementations[backend](*op.normalized(*mine)) for mine in (eights, ones)]
    for one, other in ((outs), (eights[5], ones[5]), (eights[6], ones[6])):
        assert torch.equal(one, other)
    truth = detached(args)
    with torch.no_grad():
        bound = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
        torch.testing.assert_close(outs[0], op.reference(*truth), **bound)
        bound["rtol"] = torch.finfo(cache_dtype).eps
        for mine, exact in zip(eights[5:7], truth[5:7], strict=True):
            torch.testing.assert_close(mine, exact, **bound)


@on_each_backend
def test_a_slot_outside_the_caches_stores_nothing(backend, device, monkeypatch):
    """On a GPU the slot mapping is not checked before the launch."""
    monkeypatch.setattr(import_module("rlhf_fast.kernels.rope_store"), "_check_slot_mapping", lambda *_: None)
    op = OPS["rope_store"]
    *args, _slot_mapping = op.make_inputs(N=2, H=1, Hkv=1, d=8, P=2, device=device, dtype=torch.float32)
    before = [cache.clone() for cache in args[5:7]]
    num_slots = before[0].shape[0] * 2
    op.implementations[backend](*args, torch.tensor([-1, num_slots], device=device))
    assert all(torch.equal(a, b) for a, b in zip(args[5:7], before, strict=True))
