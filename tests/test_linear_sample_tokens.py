"""linear_sample_tokens beyond its reference: threads, tiles of the head, ties, bans."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import linear_sample_tokens as module

COMPILED = ops.linear_sample_tokens.backends[1:]
pytestmark = pytest.mark.skipif(not COMPILED, reason="no compiled kernels for this processor, and no Triton")


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


@pytest.fixture
def tile(backend):
    """Return the number of vocabulary columns in a tile."""
    return 128 if backend == "triton" else 1024


def numbers_of_threads(backend, *counts):
    return counts[:1] if backend == "triton" else counts


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def sample(backend, hidden, weight, rows=None, **options):
    B = len(hidden)
    ids = torch.arange(B) + 7 if rows is None else rows
    return ops.linear_sample_tokens.backend(backend)(
        hidden, weight, seed=5, row_ids=ids, steps=torch.full_like(ids, 3), **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}], ids=str)
@pytest.mark.exhaustive(2, by=("backend",))
def test_bits_do_not_depend_on_threads_or_other_rows(backend, tile, options, dtype, threads, monkeypatch):
    """Each thread samples from its own tiles, and the best of all tiles wins."""
    monkeypatch.setattr(module, "MIN_NANOSECONDS_TO_THREAD", 0)
    B = 15 if backend == "triton" and "top_p" in options else 70
    hidden, weight = (0.4 * torch.randn(B, 24)).to(dtype), torch.randn(5 * tile + 17, 24).to(dtype)
    threads(1)
    alone = sample(backend, hidden, weight, **options)
    assert len(set((alone[0] // tile).tolist())) > 3, "all tokens are in few tiles: nothing is tested"
    for count in numbers_of_threads(backend, 2, 3, 5):
        threads(count)
        for _ in range(1 if backend == "triton" else 5):
            for ours, theirs in zip(sample(backend, hidden, weight, **options), alone, strict=True):
                assert torch.equal(ours, theirs)
    order = torch.randperm(B)[: B // 2]
    for ours, theirs in zip(sample(backend, hidden[order], weight, order + 7, **options), alone, strict=True):
        assert torch.equal(ours, theirs[order])


def test_the_lowest_of_equal_logits_wins_across_tiles(backend, tile, threads, monkeypatch):
    monkeypatch.setattr(module, "MIN_NANOSECONDS_TO_THREAD", 0)
    for V in (tile, tile + 1, 2 * tile + 52, 4 * tile):
        weight = torch.zeros(V, 8)
        equal = sorted({5, V - 1, min(V - 2, tile + tile // 2), V // 2})
        weight[equal] = 1.0
        for count in numbers_of_threads(backend, 1, 2, 4):
            threads(count)
            tokens, _, raw, *_ = sample(backend, torch.ones(9, 8), weight, temperature=0.0)
            assert tokens.tolist() == [equal[0]] * 9
            exact = -torch.logsumexp(torch.ones(8) @ weight.t() - 8.0, 0)
            torch.testing.assert_close(raw, exact.expand(9), rtol=1e-5, atol=1e-5)


def test_samples_are_those_of_sample_tokens(backend, tile):
    """The logits are exact, so both ops sample from the same numbers with the same noise."""
    hidden, weight = torch.randint(-4, 5, (20, 16)) / 4, torch.randint(-4, 5, (3 * tile + 5, 16)) / 4
    ids = torch.arange(20) + 7
    ours = sample(backend, hidden, weight, temperature=0.8)
    logits = hidden @ weight.t()
    theirs = ops.sample_tokens.backend(backend)(logits, 0.8, seed=5, row_ids=ids, steps=torch.full_like(ids, 3))
    bound = 5e-7 if backend == "triton" else 0  # it sums in tiles of another size
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)


@pytest.mark.skipif("triton" not in COMPILED, reason="no Triton here")
@pytest.mark.parametrize("options", [{}, {"top_k": 40, "temperature": 1.5}], ids=str)
def test_chunks_of_rows_with_bans_and_a_float32_hidden(options, monkeypatch):
    """Logits of a few rows are in memory at a time. Each row has its own options; weight is bfloat16."""
    module = pytest.importorskip("rlhf_fast.kernels.triton.linear_sample_tokens")
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 4 * 320)
    hidden, weight = torch.randint(-4, 5, (5, 24)) / 4, (torch.randint(-4, 5, (300, 24)) / 4).bfloat16()
    bans = {"banned": torch.tensor([3, 299, 7]), "ban_rows": torch.tensor([True, False, True, False, True])}
    options = options | bans | {"bias": torch.randint(-4, 5, (300,)) / 4.0}
    if "temperature" in options:
        options["temperature"] = torch.tensor([1.0, 0.0, 0.5, 2.0, 1e-3])
    ours, truth = (sample(x, hidden, weight, **options) for x in ("triton", "reference"))
    assert torch.equal(ours[0], truth[0])
    torch.testing.assert_close(ours[1:], truth[1:], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, -7])
def test_a_seed_on_the_device_is_the_seed(seed, options):
    """On every backend, the reference included, and not the number that is passed beside it."""
    hidden, weight, ids = torch.randn(6, 16), torch.randn(300, 16), torch.arange(6)
    for backend in ops.linear_sample_tokens.backends:
        op = ops.linear_sample_tokens.backend(backend)
        expected = op(hidden, weight, seed=seed, row_ids=ids, steps=ids, **options)
        found = op(hidden, weight, seed=5, row_ids=ids, steps=ids, device_seed=torch.tensor([seed]), **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), backend


def test_a_seed_on_the_device_is_one_int64():
    hidden, ids = torch.randn(2, 4), torch.arange(2)
    with pytest.raises(ValueError, match=r"device_seed must be int64 of shape \(1,\), got torch.int32 \[1\]"):
        ops.linear_sample_tokens(hidden, hidden, row_ids=ids, steps=ids, device_seed=torch.ones(1, dtype=torch.int32))
