"""ranking_loss: it equals a loop over pairs, and groups do not affect one another."""

import itertools

import pytest
import torch

from rlhf_fast import ops

BACKENDS = ops.ranking_loss.backends
KERNELS = [name for name in BACKENDS if name.startswith("cpu")]
ON_CPU = [name for name in BACKENDS if ops.ranking_loss.can_run(name, "cpu")]


@pytest.fixture(params=BACKENDS)
def ranking(request):
    device = "cpu" if ops.ranking_loss.can_run(request.param, "cpu") else "cuda"
    op = ops.ranking_loss.backend(request.param)

    def run(scores, offsets, ranks, weights=None):
        given = (torch.as_tensor(x, device=device) for x in (offsets, ranks))
        loss, stats = op(scores.to(device), *given, None if weights is None else weights.to(device))
        return loss.cpu(), dict(zip(ops.ranking_loss.stats, stats.tolist(), strict=True))

    return run


def pairwise(scores, offsets, ranks, weights):
    """Return the loss in float64, the number of pairs, of correct pairs, and the margin, by a loop over pairs."""
    loss, pairs, correct, margin = scores.new_zeros((), dtype=torch.float64), 0, 0, 0.0
    for weight, a, b in zip(weights.tolist(), offsets, offsets[1:], strict=False):
        better = [(i, j) for i, j in itertools.permutations(range(a, b), 2) if ranks[i] < ranks[j]]
        for i, j in better:
            difference = scores[i].double() - scores[j].double()
            loss = loss + weight / len(better) * (1 + (-difference).exp()).log()
            pairs += 1
            correct += bool(difference > 0)
            margin += difference.item()
    return loss, pairs, correct, margin


@pytest.mark.parametrize("ties", [False, True])
def test_it_equals_a_loop_over_pairs(ranking, ties):
    sizes = [4, 9, 2, 7, 1, 5, 3, 8, 6, 0, 9]
    offsets = [0, *itertools.accumulate(sizes)]
    ranks = [int(r) for k in sizes for r in (torch.randint(3, (k,)) if ties else torch.randperm(k))]
    scores, weights = torch.randn(offsets[-1], requires_grad=True), torch.rand(len(sizes))
    truth, pairs, correct, margin = pairwise(scores, offsets, ranks, weights)
    loss, stats = ranking(scores, offsets, ranks, weights)
    torch.testing.assert_close(loss.double(), truth, atol=1e-6, rtol=1e-6)
    assert (stats["pairs"], stats["correct"]) == (pairs, correct)
    assert abs(stats["margin"] - margin) < 1e-4
    ours, theirs = torch.autograd.grad(loss, scores)[0], torch.autograd.grad(truth, scores)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_groups_without_a_pair_do_not_count_in_the_mean(ranking):
    scores = torch.tensor([1.0, 0.0, 5.0, 3.0, 3.0, 2.0], requires_grad=True)
    loss, stats = ranking(scores, [0, 2, 3, 5, 6, 6], [0, 1, 0, 7, 7, 0])  # one pair, one row, a tie, one row, none
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(torch.tensor(1.0)))
    assert stats == {"pairs": 1, "correct": 1, "margin": 1, "groups": 1, "groups_without_pair": 4}
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[2:].eq(0).all() and gradient[0] == -gradient[1] != 0
    loss, stats = ranking(scores[:0], [0, 0], torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and stats["groups_without_pair"] == 1


def test_order_within_a_group_does_not_matter(ranking):
    scores, ranks = torch.randn(9), torch.tensor([0, 3, 1, 1, 2, 5, 5, 4, 6])
    order = torch.randperm(9)
    loss, stats = ranking(scores, [0, 9], ranks)
    again, same = ranking(scores[order], [0, 9], ranks[order])
    torch.testing.assert_close(loss, again)
    assert stats["pairs"] == same["pairs"] == 34 and stats["correct"] == same["correct"]


def test_ranks_beyond_int32_keep_their_order(ranking):
    scores = torch.randn(5)
    for ranks in ([0, 2**32, 2**33, 1, 2**32], [-(2**40), 7, 8, -(2**31), 7]):
        ranks = torch.tensor(ranks)
        small = ranks.unique(return_inverse=True)[1]
        (loss, stats), (expected, same) = ranking(scores, [0, 5], ranks), ranking(scores, [0, 5], small)
        assert loss == expected and stats == same and stats["pairs"] == 9


def test_very_large_margins_of_either_sign_are_exact(ranking):
    for margin in (12.0, 30.0, 300.0, -300.0, 0.0):
        expected = -torch.nn.functional.logsigmoid(torch.tensor(margin).double()).item()
        scores = torch.tensor([margin, 0.0], requires_grad=True)
        loss, stats = ranking(scores, [0, 2], [0, 1])
        torch.testing.assert_close(loss.item(), expected, atol=1e-37, rtol=1e-5)
        grad = torch.autograd.grad(loss, scores)[0]
        torch.testing.assert_close(
            -grad[0].item(), torch.tensor(-margin).double().sigmoid().item(), atol=1e-37, rtol=1e-5
        )
        assert stats["correct"] == (margin > 0)


def test_a_nan_score_affects_only_its_own_group(ranking):
    scores = torch.tensor([torch.nan, 1.0, 2.0, 1.0], requires_grad=True)
    loss, _ = ranking(scores, [0, 2, 4], [0, 1, 0, 1])
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[:2].isnan().all() and gradient[2:].isfinite().all()


def test_splits_add_up_with_the_callers_weights(ranking):
    sizes = [4, 9, 5, 2]
    offsets = [0, *itertools.accumulate(sizes)]
    scores, ranks = torch.randn(20, requires_grad=True), [r for k in sizes for r in range(k)]
    weights = torch.full((4,), 0.25)
    whole = ranking(scores, offsets, ranks, weights)[0]
    assert whole == ranking(scores, offsets, ranks)[0]
    parts = [ranking(scores[a:b], [0, b - a], ranks[a:b], weights[:1])[0] for a, b in itertools.pairwise(offsets)]
    torch.testing.assert_close(whole, sum(parts))
    ours, theirs = torch.autograd.grad(whole, scores)[0], torch.autograd.grad(sum(parts), scores)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-5)


def test_upstream_gradient_and_second_use(ranking):
    scores = torch.randn(12, requires_grad=True)
    loss, _ = ranking(scores, [0, 5, 12], [*range(5), *range(7)])
    once = torch.autograd.grad(loss, scores, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss, scores, torch.tensor(-2.5), retain_graph=True)[0]
    torch.testing.assert_close(scaled, -2.5 * once)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, scores)[0], 3 * once)


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_change_no_bit(backend):
    args = ops.ranking_loss.make_inputs([9, 4, 2, 7] * 100, device="cpu", dtype=torch.float32, ties=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, stats = ops.ranking_loss.backend(backend)(*args)
            results.append((loss, stats, torch.autograd.grad(loss, args[0])[0]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_arguments_name_the_rule():
    scores, ranks = torch.randn(4), torch.arange(4)
    for backend in ON_CPU:
        with pytest.raises(ValueError, match=r"ranking_loss: group_offsets must rise from 0 to 4, .* got \[0, 5\]"):
            ops.ranking_loss.backend(backend)(scores, torch.tensor([0, 5]), ranks)
    with pytest.raises(ValueError, match=r"ranking_loss: ranks must be integers, got torch\.float32"):
        ops.ranking_loss(scores, torch.tensor([0, 4]), ranks.float())
    with pytest.raises(ValueError, match=r"ranking_loss: weights must have shape \(1,\), got \[2\]"):
        ops.ranking_loss(scores, torch.tensor([0, 4]), ranks, torch.ones(2))
    with pytest.raises(ValueError, match=r"ranking_loss: scores and ranks must have one shape \(N,\)"):
        ops.ranking_loss(scores, torch.tensor([0, 4]), ranks[1:])


@pytest.mark.parametrize("backend", ON_CPU[1:])
def test_margins_that_cancel_are_summed_exactly(backend):
    """Over the pairs of 64 responses the margins nearly cancel: the sum is small beside the sum of their magnitudes."""
    worst = 0.0
    for _ in range(20):
        scores, ranks = torch.randn(64), torch.randperm(64)
        stats = ops.ranking_loss.backend(backend)(scores, torch.tensor([0, 64]), ranks)[1]
        better = ranks[:, None] < ranks
        exact = (scores[:, None] - scores).double()[better].sum()  # of margins rounded to float32
        worst = max(worst, float(abs(stats[2] - exact) / (1 + abs(exact))))
    assert worst < 1e-6
