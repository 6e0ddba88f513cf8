"""rms_norm, layer_norm, swiglu, gelu and rope_store: bits, strides, rounding, extreme values, errors."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._backends import TRITON_DEVICES
from rlhf_fast.kernels._op import OPS

BACKENDS = [
    b for b in OPS["rms_norm"].backends if b.startswith(("cpu", "simt")) or (b == "triton" and "cpu" in TRITON_DEVICES)
]
ROPE = [b for b in BACKENDS if b in OPS["rope_store"].backends]
compiled = pytest.mark.skipif(not BACKENDS, reason="no compiled kernel here")


def ulps(ours, truth):
    """Return the distance from the float64 truth in float32 units in the last place."""
    unit = torch.ldexp(torch.ones_like(truth), torch.frexp(truth).exponent - 24)
    return ((ours.double() - truth).abs() / unit)[truth.abs() > 1e-37]


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [64, 577, 4096])
def test_a_rows_bits_do_not_depend_on_the_batch(backend, D):
    """Norms of single rows and of a batch, with any number of threads."""
    x, w, b = torch.randn(9 if backend == "triton" else 65, D), torch.randn(D), torch.randn(D)
    before = torch.get_num_threads()
    try:
        for call in (lambda r: ops.rms_norm.backend(backend)(r, w), lambda r: ops.layer_norm.backend(backend)(r, w, b)):
            torch.set_num_threads(1)
            alone = torch.cat([call(row) for row in x.split(1)])
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(call(x), alone)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rounded_sum_is_normalized(backend):
    """A model in bfloat16 computes it so: the residual stream is rounded before it is read."""
    x, residual, weight = torch.randn(2, 4, 96).bfloat16(), torch.randn(4, 96).bfloat16(), torch.randn(96)
    for op, rest in ((OPS["rms_norm"], {}), (OPS["layer_norm"], {"bias": torch.randn(96)})):
        op, updated = op.backend(backend), residual.clone()
        out = op(x[0], weight, residual=updated, **rest)
        assert torch.equal(updated, residual + x[0])
        assert torch.equal(out, op(residual + x[0], weight, **rest))


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_residual_is_written_through_its_strides(backend):
    larger, x, weight = torch.randn(4, 2, 33), torch.randn(4, 33), torch.randn(33)
    before = larger.clone()
    for op, i in (ops.rms_norm, 0), (ops.layer_norm, 1):
        op.backend(backend)(x, weight, residual=larger[:, i])
        torch.testing.assert_close(larger[:, i], before[:, i] + x, rtol=0, atol=0)
        assert torch.equal(larger[:, i + 1 :], before[:, i + 1 :])


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_variance_is_exact_where_the_mean_is_large(backend):
    x = 3000 + torch.randn(3, 512)
    truth = torch.nn.functional.layer_norm(x.double(), (512,))
    ours = ops.layer_norm.backend(backend)(x, torch.ones(512))
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-3)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot be forced on the CPU here")
@pytest.mark.parametrize("op", [ops.rms_norm, ops.layer_norm], ids=lambda op: op.name)
def test_rows_larger_than_a_tile(op, monkeypatch):
    from rlhf_fast.kernels.triton import _norm

    x, residual, weight = torch.randn(3, 577), torch.randn(3, 577), torch.randn(577)
    one_tile, many_tiles = residual.clone(), residual.clone()
    expected = op.backend("triton")(5 + x, weight, residual=one_tile)
    monkeypatch.setattr(_norm, "MAX_ROW_BYTES", 256)
    torch.testing.assert_close(op.backend("triton")(5 + x, weight, residual=many_tiles), expected)
    assert torch.equal(many_tiles, one_tile)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's kernels cannot be forced on the CPU here")
def test_triton_serves_float16_and_rounds_once():
    x, y, weight = torch.randn(3, 65).half(), torch.randn(3, 65).half(), torch.randn(65).half()
    for op, args in (
        (ops.rms_norm, (x, weight)),
        (ops.layer_norm, (x, weight, weight)),
        (ops.gelu, (x,)),
        (ops.swiglu, (x, y)),
    ):
        op = op.backend("triton")
        assert torch.equal(op(*args), op(*(a.float() for a in args)).half())


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_accurate_to_a_few_ulps(backend):
    x = torch.cat([torch.linspace(-13, 13, 100_001), torch.logspace(-30, 1, 20_000), -torch.logspace(-30, 1, 20_000)])
    d = x.double()
    gelu, truth = ops.gelu.backend(backend)(x), d * 0.5 * torch.erfc(-d * 0.5**0.5)
    near = d > -4
    bound = 16 if backend in ("simt", "cuda") else 12  # hardware's fast division is off by 2
    assert ulps(gelu[near], truth[near]).max() < bound
    assert ulps(gelu, truth).max() < (120 if backend == "triton" else bound)  # it computes exp(-x^2 / 2) directly
    assert ulps(ops.swiglu.backend(backend)(x, torch.ones_like(x)), d / (1 + (-d).exp())).max() < 4
    right = d > -0.5
    u = 2 * (2 / torch.pi) ** 0.5 * (d + 0.044715 * d**3)
    assert ulps(ops.gelu.backend(backend)(x, "tanh")[right], (d / (1 + (-u).exp()))[right]).max() < 5


@compiled
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_of_extreme_values(backend):
    x = torch.tensor([-3e38, -1e30, -1e4, -100.0, 100.0, 1e4, 1e30, 3e38, torch.inf, torch.nan])
    expected = torch.tensor([0.0] * 4 + [100.0, 1e4, 1e30, 3e38, torch.inf, torch.nan])
    for y in (
        ops.gelu.backend(backend)(x),
        ops.gelu.backend(backend)(x, "tanh"),
        ops.swiglu.backend(backend)(x, torch.ones_like(x)),
    ):
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)


@compiled
@pytest.mark.parametrize("backend", ROPE)
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rope_store_writes_only_its_slots(backend, cache):
    q, k, v, cos, sin, k_cache, v_cache, slot_mapping = ops.rope_store.make_inputs(
        N=5, H=6, Hkv=2, d=64, P=16, device="cpu", dtype=torch.float32, cache=cache
    )
    k_cache.fill_(torch.nan), v_cache.fill_(torch.nan)
    ops.rope_store.backend(backend)(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
    for cache_tensor, expected in ((k_cache, None), (v_cache, v)):
        flat = cache_tensor.transpose(1, 2).flatten(0, 1)  # (slots, heads, d)
        written = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, slot_mapping, True)
        assert flat[~written].isnan().all() and flat[written].isfinite().all()
        if expected is not None:
            assert torch.equal(flat[slot_mapping], expected.to(cache))


@compiled
@pytest.mark.parametrize("backend", ROPE)
def test_rope_store_reads_and_writes_strided_views(backend):
    """q, k and v are columns of one tensor, both caches of another."""
    q, k, v, cos, sin, k_cache, v_cache, slot_mapping = ops.rope_store.make_inputs(
        N=5, H=6, Hkv=2, d=20, P=4, r=12, device="cpu", dtype=torch.float32
    )
    call = ops.rope_store.backend(backend)
    views = torch.cat([q, k, v], 1).split([6, 2, 2], 1)
    caches = torch.cat([k_cache, v_cache], 3).split([20, 20], 3)
    out = call(*views, cos, sin, *caches, slot_mapping)
    assert torch.equal(out, call(q, k, v, cos, sin, k_cache, v_cache, slot_mapping))
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


def test_rotations_keep_length_and_depend_only_on_distance():
    half = 10_000 ** -(torch.arange(16) / 16)
    q, k, v = torch.randn(1, 1, 32), torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def rotated(x, position):
        k_cache, v_cache = torch.zeros(2, 1, 1, 1, 32)
        angles = (half * position)[None]
        ops.rope_store(x, k, v, angles.cos(), angles.sin(), k_cache, v_cache, torch.zeros(1))
        return ops.rope_store(x, k, v, angles.cos(), angles.sin(), k_cache, v_cache, torch.zeros(1)).flatten()

    torch.testing.assert_close(rotated(q, 7).norm(), q.norm())
    near, far = (rotated(q, position + 3) @ rotated(k, position) for position in (2, 40))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [*ROPE, "reference"])
def test_slots_out_of_range_are_refused_before_anything_is_written(backend):
    *args, slot_mapping = ops.rope_store.make_inputs(N=3, H=1, Hkv=1, d=8, P=2, device="cpu", dtype=torch.float32)
    before = [cache.clone() for cache in args[5:7]]
    for bad in (-1, 6):
        with pytest.raises(ValueError, match=r"rope_store: slot_mapping must be from 0 to 5, got"):
            ops.rope_store.backend(backend)(*args, slot_mapping.index_fill(0, torch.tensor(2), bad))
    assert all(torch.equal(a, b) for a, b in zip(args[5:7], before, strict=True))


def test_arguments_that_do_not_fit_are_refused():
    x, w = torch.randn(3, 8), torch.randn(8)
    for op in (ops.rms_norm, ops.layer_norm):
        with pytest.raises(ValueError, match=rf"{op.name}: weight must have shape \(8,\), got \[7\]"):
            op(x, w[1:])
        with pytest.raises(ValueError, match=f"{op.name}: residual must have x's dtype and shape, .* got"):
            op(x, w, residual=x.bfloat16())
        with pytest.raises(ValueError, match=f"{op.name}: x must be floating point of shape .* got"):
            op(x[:, :0], w[:0])
    with pytest.raises(ValueError, match=r"swiglu: gate and up must have one shape .* got"):
        ops.swiglu(x, x[:2])
    with pytest.raises(ValueError, match="gelu: approximate must be 'none' or 'tanh', got 'erf'"):
        ops.gelu(x, "erf")
    args = ops.rope_store.make_inputs(N=3, H=2, Hkv=1, d=8, P=2, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"rope_store: q .* must fit together, got"):
        ops.rope_store(*args[:3], args[3][:, 1:], *args[4:])
    with pytest.raises(ValueError, match="rope_store: q, k and v must have one dtype, and both caches one, got"):
        ops.rope_store(args[0].bfloat16(), *args[1:])
