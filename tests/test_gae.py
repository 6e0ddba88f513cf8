"""gae and gae_packed: numbers by hand, identities, and that gaps, padding and threads do not change results."""

import functools
import os

import numpy as np
import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _gae
from rlhf_fast.kernels._backends import COMPILED

BACKENDS = ops.gae.backends
ON_CPU = [name for name in ops.gae_packed.backends if ops.gae.can_run(name, "cpu")]
CPU_KERNELS = [name for name in BACKENDS if name.startswith("cpu")]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = CPU_KERNELS + [name for name in BACKENDS if name == "simt"]
GAPS = [float("nan"), float("inf"), -float("inf"), 999.0]


@pytest.fixture(params=[(b, form) for b in BACKENDS for form in ("padded", "packed")], ids=lambda p: f"{p[0]}-{p[1]}")
def gae(request):
    """gae of (B, T) tensors on one backend, computed as padded rows or as packed segments of (B * T,)."""
    backend, form = request.param
    device = "cpu" if ops.gae.can_run(backend, "cpu") else "cuda"
    if form == "packed" and backend not in ops.gae_packed.backends:
        pytest.skip(f"gae_packed has no {backend} kernel")

    def run(rewards, values, mask=None, gamma=1.0, lam=0.95, bootstrap=None):
        mask = torch.ones(rewards.shape, dtype=torch.bool) if mask is None else mask
        inputs = [x.to(device) for x in (rewards, values, mask)]
        bootstrap = bootstrap if bootstrap is None else bootstrap.to(device)
        if form == "padded":
            out = ops.gae.backend(backend)(*inputs, gamma, lam, bootstrap)
        else:
            cu_seqlens = torch.arange(rewards.shape[0] + 1, device=device) * rewards.shape[1]
            out = ops.gae_packed.backend(backend)(*(x.flatten() for x in inputs), cu_seqlens, gamma, lam, bootstrap)
        return tuple(x.view(rewards.shape).cpu() for x in out)

    run.backend, run.form = backend, form
    return run


def oracle(rewards, values, mask, gamma, lam, bootstrap):
    """The recurrence in float64, token by token."""
    rewards, values, mask = (np.asarray(x, dtype=np.float64) for x in (rewards, values, mask))
    next_value, advantage = np.asarray(bootstrap, dtype=np.float64), np.zeros(len(rewards))
    advantages = np.zeros_like(rewards)
    for t in range(rewards.shape[1] - 1, -1, -1):
        valid = mask[:, t] > 0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = np.where(valid, delta + gamma * lam * advantage, advantage)
        next_value = np.where(valid, values[:, t], next_value)
        advantages[:, t] = np.where(valid, advantage, 0)
    return torch.from_numpy(advantages), torch.from_numpy(np.where(mask > 0, advantages + values, 0))


def assert_close(ours, truth):
    for o, t in zip(ours, truth, strict=True):
        assert (o - t).abs().max() <= 1e-5 * max(1.0, t.abs().max())


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_three_tokens_by_hand(gae):
    advantages, returns = gae(torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.5, 1, 1.5]]), gamma=0.5, lam=0.5)
    # deltas: 1 + .5 - .5, 2 + .75 - 1, 3 - 1.5; decay 1 / 4
    torch.testing.assert_close(advantages, torch.tensor([[1 + (1.75 + 1.5 / 4) / 4, 1.75 + 1.5 / 4, 1.5]]))
    torch.testing.assert_close(returns, advantages + torch.tensor([[0.5, 1, 1.5]]))


def test_lambda_0_is_the_td_error_and_gamma_0_is_reward_minus_value(gae):
    rewards, values = torch.randn(2, 5, 41)
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    torch.testing.assert_close(gae(rewards, values, gamma=0.5, lam=0.0)[0], rewards + 0.5 * next_values - values)
    assert torch.equal(gae(rewards, values, gamma=0.0, lam=0.9)[0], rewards - values)


def test_gamma_and_lambda_1_are_monte_carlo(gae):
    rewards, values = torch.randn(2, 4, 75)
    torch.testing.assert_close(
        gae(rewards, values, gamma=1.0, lam=1.0)[1], rewards.flip(1).cumsum(1).flip(1), atol=2e-5, rtol=0
    )


def test_advantages_telescope_to_the_td_error(gae):
    rewards, values = torch.randn(2, 6, 130)
    advantages = gae(rewards, values, gamma=0.9, lam=0.8)[0]
    deltas = rewards[:, :-1] + 0.9 * values[:, 1:] - values[:, :-1]
    torch.testing.assert_close(advantages[:, :-1] - 0.72 * advantages[:, 1:], deltas, atol=1e-5, rtol=1e-5)


SHAPES = [(1, 1), (2, 2), (4096, 3), (5, 31), (8, 32), (9, 33), (17, 127), (3, 300), (2, 520), (64, 1024), (4, 1025)]
LONG = [(2, 4097), (3, 8192), (1, 131072)]


@functools.lru_cache
def problem(B, T, gamma, lam, gaps):
    generator = torch.Generator().manual_seed(B * 1000003 + T)
    rewards, values = torch.randn(2, B, T, generator=generator)
    mask = torch.rand(B, T, generator=generator) > gaps
    bootstrap = torch.randn(B, generator=generator)
    return (rewards, values, mask), bootstrap, oracle(rewards, values, mask, gamma, lam, bootstrap)


@pytest.mark.exhaustive(4, by=("gae",))
@pytest.mark.parametrize("gamma, lam, gaps", [(1.0, 0.95, -1), (0.9, 0.5, 0.3), (1.0, 1.0, 0.02)])
@pytest.mark.parametrize("B, T", SHAPES + LONG)
def test_against_a_loop_in_float64(gae, B, T, gamma, lam, gaps):
    if (T > 1025 and gae.backend == "reference") or (T > 8192 and gaps != -1):
        pytest.skip("long rows are for the kernels, the longest for one setting")
    if gae.backend == "triton" and INTERPRETED and B * T > 10000 and (T > 8192 or gaps < 0.3 or gae.form == "packed"):
        pytest.skip("the interpreter takes minutes")
    inputs, bootstrap, truth = problem(B, T, gamma, lam, gaps)
    assert_close(gae(*inputs, gamma, lam, bootstrap), truth)


def masks_with_gaps(T):
    """One mask a row: no token, one token, and leading, trailing and interior gaps of many lengths."""
    t = torch.arange(T)
    rows = [t < 0, t == T // 2, t == 0, t == T - 1, t >= 9, t < T - 9, t < T - 16]
    rows += [(t < k) | (t >= k + 17) for k in (1, 8, 15, 20)] + [t % k > 0 for k in (2, 3, 7)]
    return torch.stack(rows)


@pytest.mark.exhaustive(3, by=("gae",))
@pytest.mark.parametrize("T", [1, 7, 16, 61])
@pytest.mark.parametrize("junk", GAPS)
def test_masked_tokens_are_not_read(gae, junk, T):
    mask = masks_with_gaps(T)
    rewards, values = torch.randn(2, *mask.shape)
    clean = gae(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask)
    dirty = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, junk), mask)
    assert same_bits(clean, dirty)
    assert all(x[~mask].eq(0).all() for x in dirty)


def test_a_gap_equals_a_row_without_its_tokens(gae):
    mask = masks_with_gaps(61)
    rewards, values = torch.randn(2, *mask.shape)
    bootstrap = torch.randn(len(mask))
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95, bootstrap)
    for i, kept in enumerate(mask):
        if kept.any():
            row = slice(i, i + 1)
            without_gaps = gae(rewards[row, kept], values[row, kept], None, 0.99, 0.95, bootstrap[row])
            assert_close((advantages[row, kept], returns[row, kept]), without_gaps)


def test_padding_behind_a_row_and_the_other_rows_do_not_change_its_bits(gae):
    rewards, values = torch.randn(2, 37, 90)
    mask = torch.arange(90) < torch.randint(0, 91, (37, 1))
    whole = gae(rewards, values, mask)
    for row in (0, 5, 36):
        assert same_bits([x[row : row + 1] for x in whole], gae(*(x[row : row + 1] for x in (rewards, values, mask))))
        n = int(mask[row].sum())
        alone = gae(*(x[row : row + 1, :n] for x in (rewards, values, mask)))
        assert same_bits([x[row : row + 1, :n] for x in whole], alone)


def test_the_bootstrap_value_is_added_once(gae):
    rewards, values = torch.randn(2, 3, 20)
    bootstrap = torch.tensor([0.0, 2.0, -3.0])
    truncated = gae(rewards, values, gamma=0.9, bootstrap=bootstrap)
    with_bootstrap = rewards.clone()
    with_bootstrap[:, -1] += 0.9 * bootstrap
    assert_close(truncated, gae(with_bootstrap, values, gamma=0.9))
    assert same_bits([x[:1] for x in truncated], [x[:1] for x in gae(rewards, values, gamma=0.9)])


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_padded(backend, index):
    lengths = [5, 0, 33, 1, 0, 64, 17, 0]
    mask = torch.arange(64) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(2, *mask.shape)
    bootstrap = torch.randn(len(lengths))
    valid = mask & (torch.rand(mask.shape) > 0.3)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index)
    scalars = 1.0, 0.95, bootstrap
    padded = ops.gae.backend(backend)(rewards, values, valid, *scalars)
    packed = ops.gae_packed.backend(backend)(rewards[mask], values[mask], valid[mask], cu_seqlens, *scalars)
    assert same_bits([x[mask] for x in padded], packed)


@pytest.mark.parametrize("B, T", [(5, 23), (2, 1300)])
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != "reference"])
def test_any_alignment_and_strides_give_the_same_bits(backend, B, T):
    rewards, values = torch.randn(2, B, T)
    mask = (torch.rand(B, T) > 0.2) | (torch.arange(T) % 512 < 256)
    plain = ops.gae.backend(backend)(rewards, values, mask)

    def shifted(x, by):
        return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)

    def transposed(x):
        return x.T.contiguous().T

    for move in (lambda x: shifted(x, 1), lambda x: shifted(x, 3), transposed, lambda x: x.flip(1).flip(1)):
        assert same_bits(plain, ops.gae.backend(backend)(*map(move, (rewards, values, mask))))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_rows_bits_depend_only_on_its_tokens(backend):
    """They do not depend on the padding, which decides how many warps share a row, nor on where the row starts."""
    rewards, values = torch.randn(2, 1, 1500)
    for n in (1, 100, 128, 250, 256, 300, 512, 600, 1024, 1029, 1500):
        mask = torch.arange(1500)[None] < n
        mask[0, 40 : 40 + n // 3] = n % 2 == 0  # masks a third of a row of odd length
        padded = ops.gae.backend(backend)(rewards, values, mask)
        alone = ops.gae.backend(backend)(*(x[:, :n] for x in (rewards, values, mask)))
        assert same_bits([x[:, :n] for x in padded], alone)
        flat = [torch.cat([x[0, :3], x[0, :n], x[0, :9]]) for x in (rewards, values, mask)]
        packed = ops.gae_packed.backend(backend)(*flat, torch.tensor([0, 3, n + 3, n + 12]))
        assert same_bits([x[3 : n + 3] for x in packed], [x[0] for x in alone])


@pytest.fixture
def split_rows_over_1024(monkeypatch):
    """CUDA's kernels split rows of more than 1024 tokens into chunks."""
    monkeypatch.setattr(_gae, "MIN_LENGTH", 1024)


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("max_chunks", [512, 20])
def test_long_rows_split_over_blocks(split_rows_over_1024, max_chunks, monkeypatch):
    """Gaps longer than a chunk, chunks without a token, rows that end anywhere; chunks of 1024 and 4096 tokens."""
    monkeypatch.setattr(_gae, "MAX_CHUNKS", max_chunks)
    T = 7001
    t = torch.arange(T)
    mask = torch.stack([t < 0, t >= 0, t == 3000, t % 1024 == 1023, t % 1024 == 0, t < 1024])
    mask = torch.cat([mask, (t < 900)[None] | (t > 5200), torch.rand(3, T) > 0.3])
    rewards, values = torch.randn(2, *mask.shape)
    bootstrap = torch.randn(len(mask))
    assert _gae.chunking(len(mask), mask.numel(), T, rewards)[0] == {512: 1024, 20: 4096}[max_chunks]
    dirty = [x.masked_fill(~mask, torch.nan) for x in (rewards, values)]
    for rows in (slice(None), slice(1, 4), slice(8, 9)):
        inputs = *(x[rows] for x in dirty), mask[rows]
        ours = ops.gae.backend("simt")(*inputs, 1.0, 0.95, bootstrap[rows])
        truth = oracle(*(x[rows].nan_to_num() for x in dirty), mask[rows], 1.0, 0.95, bootstrap[rows])
        assert_close(ours, truth)
        assert all(x[~mask[rows]].eq(0).all() for x in ours)
        assert same_bits(ours, ops.gae.backend("simt")(*inputs, 1.0, 0.95, bootstrap[rows]))


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize(
    "lengths", [(5000,), (0, 3, 2049, 0, 1024, 4100, 1, 0), (40,) * 37 + (2500,) + (0, 7, 1025) * 3]
)
def test_long_segments_split_over_blocks(split_rows_over_1024, lengths):
    """Also more segments than a warp has threads, and blocks without a chunk."""
    lengths = torch.tensor(lengths)
    N = int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    inside = torch.arange(int(lengths.max())) < lengths[:, None]
    rewards, values, mask = torch.randn(N), torch.randn(N), torch.rand(N) > 0.3
    bootstrap = torch.randn(len(lengths))
    assert _gae.chunking(len(lengths), N, N, rewards)[0] == 1024
    ours = ops.gae_packed.backend("simt")(rewards, values, mask, cu_seqlens, 0.99, 0.95, bootstrap)
    padded = [x.new_zeros(inside.shape).masked_scatter(inside, x) for x in (rewards, values, mask)]
    assert_close(ours, [x[inside] for x in oracle(*padded, 0.99, 0.95, bootstrap)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats_are_computed_in_float32(gae, dtype):
    rewards, values = torch.randn(2, 4, 29).to(dtype)
    ours, from_float32 = gae(rewards, values), gae(rewards.float(), values.float())
    assert ours[0].dtype == torch.float32 and same_bits(ours, from_float32)


@pytest.mark.parametrize("backend", CPU_KERNELS)
def test_threads_change_no_bit(backend):
    args = ops.gae.make_inputs(B=67, T=1031, device="cpu", dtype=torch.float32)
    lengths = torch.randint(1000, 2048, (67,)).tolist()
    packed = ops.gae_packed.make_inputs(lengths, device="cpu", dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([*ops.gae.backend(backend)(*args), *ops.gae_packed.backend(backend)(*packed)])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_2_to_the_31(backend):
    """The segment starts at token 2^31 + 5. The memory before it does not exist: reading it would crash."""
    n, start = 100, 2**31 + 5
    rewards, values = torch.randn(2, n)
    mask = torch.rand(n) > 0.2
    out = torch.full((2, n), torch.nan)
    cu_seqlens = torch.tensor([start, start + n])
    far = [x.data_ptr() - start * x.element_size() for x in (rewards, values, mask)]
    far_out = [out[i].data_ptr() - start * 4 for i in (0, 1)]
    kernel = COMPILED[backend].gae_packed
    if backend == "simt":  # float32 has number 0
        inputs = (far[0], 0, far[1], 0, far[2], 0, 0, cu_seqlens.data_ptr(), False, 0, 0, *far_out, 0, 0)
    else:
        inputs = (*far, cu_seqlens.data_ptr(), 0, 0, 0, *far_out)
    kernel(*inputs, 1, start + n, 1.0, 0.95, 1)
    near = ops.gae_packed.backend(backend)(rewards, values, mask, torch.tensor([0, n]))
    assert same_bits(tuple(out), near)


@pytest.fixture
def gpu_with_small_tiles(monkeypatch):
    """Triton's tiles have 16 tokens, and rows are split over programs as on a GPU with `num_sms`."""
    if "triton" not in ON_CPU:
        pytest.skip("Triton's kernels cannot be forced on the CPU here")
    from rlhf_fast.kernels.triton import _scan, launch

    monkeypatch.setattr(_scan, "TILE", 16)
    monkeypatch.setattr(_scan, "PROBES", 4)
    monkeypatch.setattr(_scan, "MAPS_AT_ONCE", type(_scan.MAPS_AT_ONCE)(3))

    def set_sms(num_sms):
        monkeypatch.setattr(launch, "num_sms", lambda x: num_sms)

    return set_sms


@pytest.mark.parametrize("T, junk", [(80, float("nan")), (129, float("inf"))])
@pytest.mark.exhaustive(1)
def test_rows_in_one_program_split_or_packed_give_the_same_bits(gpu_with_small_tiles, T, junk):
    mask = torch.cat([masks_with_gaps(T)[::2], torch.rand(2, T) > 0.3])
    rewards, values = torch.randn(2, *mask.shape).masked_fill(~mask, junk)
    bootstrap = torch.randn(len(mask))
    op = ops.gae.backend("triton")
    truth = oracle(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask, 0.99, 0.95, bootstrap)
    gpu_with_small_tiles(num_sms=1)
    unsplit = op(rewards, values, mask, 0.99, 0.95, bootstrap)
    assert_close(unsplit, truth)
    for row in (slice(3, 4), slice(8, 9)):  # a single row is split even on a GPU with one SM
        alone = op(rewards[row], values[row], mask[row], 0.99, 0.95, bootstrap[row])
        assert same_bits(alone, [x[row] for x in unsplit])
    gpu_with_small_tiles(num_sms=1000)
    assert same_bits(unsplit, op(rewards, values, mask, 0.99, 0.95, bootstrap))
    cu_seqlens = torch.arange(len(mask) + 1) * T
    flat = (x.flatten() for x in (rewards, values, mask))
    packed = ops.gae_packed.backend("triton")(*flat, cu_seqlens, 0.99, 0.95, bootstrap)
    assert same_bits(unsplit, [x.view(mask.shape) for x in packed])


def test_packed_segments_of_any_lengths_find_their_tiles(gpu_with_small_tiles):
    """Some segments are empty, at both ends and several in a row, and one is far longer than the others."""
    for lengths in ([0, 0, 16, 0, 200, 1, 15, 17, 0], [1] * 40, [0] * 30 + [33], [33] + [0] * 30, [64, 64]):
        args = ops.gae_packed.make_inputs(lengths, device="cpu", dtype=torch.float32, bootstrap=True)
        truth = ops.gae_packed.reference(*ops.gae_packed.normalized(*args))
        assert_close(ops.gae_packed.backend("triton")(*args), truth)


@pytest.mark.skipif("triton" not in ON_CPU, reason="Triton's kernels cannot be forced on the CPU here")
@pytest.mark.parametrize("center", [0.0, 3.0])
def test_a_long_undiscounted_row_is_as_accurate_as_the_loop(center):
    rewards, values = torch.randn(2, 1, 8192)
    values, mask = values + center, torch.rand(1, 8192) > 0.01
    truth = oracle(rewards, values, mask, 1.0, 1.0, torch.zeros(1))

    def error(name):
        ours = ops.gae.backend(name)(rewards, values, mask, 1.0, 1.0)
        return max((o - t).abs().max() for o, t in zip(ours, truth, strict=True))

    assert error("triton") <= error("reference")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_every_integer_but_0_is_inside_the_mask(gae, dtype):
    """Also 256, whose low byte is 0."""
    rewards, values = torch.randn(2, 3, 9)
    mask = torch.rand(3, 9) > 0.4
    mask[:, 3:6] = True
    numbers = torch.tensor([2, 255 if dtype == torch.uint8 else -1, 256 if dtype.itemsize > 1 else 64])[:, None] * mask
    assert same_bits(gae(rewards, values, numbers.to(dtype)), gae(rewards, values, mask))


def test_discounts_out_of_range_are_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    calls = {
        "gae": lambda **options: ops.gae(x, x, mask, **options),
        "gae_packed": lambda **options: ops.gae_packed(*map(torch.flatten, (x, x, mask)), offsets, **options),
        "ppo_advantages": lambda **options: ops.ppo_advantages(x, x, x, x[:, 0], mask, **options),
    }
    offsets = torch.tensor([0, 6])
    for name, call in calls.items():
        for key in ("gamma", "lam"):
            for bad in (float("nan"), 2.0, -0.1, float("inf")):
                with pytest.raises(ValueError, match=rf"^{name}: gamma and lam must be within \[0, 1\], got .*{bad}"):
                    call(**{key: bad})
            call(**{key: 0})
            call(**{key: 1})


def test_bad_arguments_name_the_rule():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gae: rewards, values and mask must have one shape \(B, T\), got \[\[2, 3\]"):
        ops.gae(x, x[:, :2], mask)
    with pytest.raises(ValueError, match=r"gae: bootstrap must have shape \(2,\), got \[3\]"):
        ops.gae(x, x, mask, bootstrap=torch.zeros(3))
    flat = x.flatten(), x.flatten(), mask.flatten()
    for backend in ON_CPU:
        for cu_seqlens in ([0, 4], [1, 6], [0, 5, 3, 6], [0, 7, 6]):
            with pytest.raises(ValueError, match="gae_packed: cu_seqlens must rise from 0 to 6"):
                ops.gae_packed.backend(backend)(*flat, torch.tensor(cu_seqlens))
    with pytest.raises(ValueError, match="gae_packed: cu_seqlens must be int32 or int64"):
        ops.gae_packed(*flat, torch.tensor([0.0, 6.0]))
