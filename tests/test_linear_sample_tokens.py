"""What the reference of linear_sample_tokens cannot say: threads, tiles of the head, ties."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import linear_sample_tokens as home

COMPILED = ops.linear_sample_tokens.backends[1:]
TILE = 1024  # columns of the head that one thread visits at a time
pytestmark = pytest.mark.skipif(not COMPILED, reason="no compiled kernels for this processor")


@pytest.fixture(params=COMPILED)
def backend(request):
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(backend, hidden, weight, rows=None, **options):
    B = len(hidden)
    ids = torch.arange(B) + 7 if rows is None else rows
    return ops.linear_sample_tokens.backend(backend)(
        hidden, weight, seed=5, row_ids=ids, steps=torch.full_like(ids, 3), **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9}], ids=str)
def test_bits_do_not_depend_on_threads_or_other_rows(backend, options, dtype, threads, monkeypatch):
    """Every thread draws from its own tiles: the best of all of them counts."""
    monkeypatch.setattr(home, "LEAST", 0)
    hidden, weight = torch.randn(70, 24).to(dtype), torch.randn(5 * TILE + 17, 24).to(dtype)
    threads(1)
    alone = draw(backend, hidden, weight, **options)
    assert len(set((alone[0] // TILE).tolist())) > 3, "all tokens in few tiles: a test of nothing"
    for count in (2, 3, 5):
        threads(count)
        for _ in range(5):
            for ours, theirs in zip(draw(backend, hidden, weight, **options), alone, strict=True):
                assert torch.equal(ours, theirs)
    order = torch.randperm(70)[:33]
    for ours, theirs in zip(draw(backend, hidden[order], weight, order + 7, **options), alone, strict=True):
        assert torch.equal(ours, theirs[order])


def test_the_lowest_of_equal_logits_wins_across_tiles(backend, threads, monkeypatch):
    monkeypatch.setattr(home, "LEAST", 0)
    for V in (TILE, TILE + 1, 2 * TILE + 52, 4 * TILE):
        weight = torch.zeros(V, 8)
        equal = sorted({5, V - 1, min(V - 2, TILE + 476), V // 2})
        weight[equal] = 1.0
        for count in (1, 2, 4):
            threads(count)
            tokens, _, raw, *_ = draw(backend, torch.ones(9, 8), weight, temperature=0.0)
            assert tokens.tolist() == [equal[0]] * 9
            exact = -torch.logsumexp(torch.ones(8) @ weight.t() - 8.0, 0)
            torch.testing.assert_close(raw, exact.expand(9), rtol=1e-5, atol=1e-5)


def test_draws_are_those_of_sample_tokens(backend):
    """The same noise, the same tiles: the product's own bits drawn from a second time."""
    hidden, weight = torch.randint(-4, 5, (20, 16)) / 4, torch.randint(-4, 5, (3 * TILE + 5, 16)) / 4
    ids = torch.arange(20) + 7
    ours = draw(backend, hidden, weight, temperature=0.8)
    logits = hidden @ weight.t()  # exact: few bits each
    theirs = ops.sample_tokens.backend(backend)(logits, 0.8, seed=5, row_ids=ids, steps=torch.full_like(ids, 3))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
