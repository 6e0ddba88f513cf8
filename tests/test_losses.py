"""Losses by hand and by plain torch: PPO, value, ranking; masked rows; the same in any micro-batches."""

import itertools
from functools import partial

import pytest
import torch
from tiny_llama import VOCABULARY, assert_same_gradients, gradients, policy, scorer
from torch.nn.functional import logsigmoid

from rlhf_fast import ops
from rlhf_fast.batches import Comparisons, Experience, pad_rows, response_mask
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.training.experience import token_weights, whiten
from rlhf_fast.training.learner import evaluate
from rlhf_fast.training.losses import ppo_policy_loss, ppo_value_loss, reward_loss
from rlhf_fast.training.micro_batches import micro_batches


def experience(model=None, rows=5, loss_mean="token"):
    """Return random experience; the old log-probabilities are near the model's, so that some ratios are clipped."""
    first = torch.randint(1, 4, (rows,))
    tokens, lengths = pad_rows([torch.randint(3, VOCABULARY, (int(n) + 1 + i,)).tolist() for i, n in enumerate(first)])
    mask = response_mask(first, lengths)
    noise = torch.randn(6, *mask.shape)
    old = model.logprobs(tokens, first, lengths)[0].detach() if model else noise[4]
    old = torch.where(mask, old + 0.3 * noise[0], 0)
    numbers = [torch.where(mask, x, 0) for x in noise[1:]]
    return Experience(
        tokens,
        first,
        lengths,
        mask,
        old,
        ref_logprobs=numbers[0],
        values=numbers[1],
        advantages=numbers[2],
        returns=numbers[3],
        weights=token_weights(mask, loss_mean),
        scores=torch.randn(rows),
        finished=torch.ones(rows, dtype=torch.bool),
        uids=torch.arange(rows),
    )


@pytest.mark.parametrize("dual", [0.0, 2.0])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_policy_loss_by_plain_torch(loss_mean, dual):
    model = policy()
    batch = experience(model, loss_mean=loss_mean)
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": dual, "entropy_coef": 0.01, "temperature": 0.8}
    loss, stats = ppo_policy_loss(model, batch, batch.num_items(), **options)
    ours = gradients(model, loss)
    logprobs, entropy = model.logprobs(*batch[:3], temperature=0.8)
    ratio = (logprobs - batch.old_logprobs).exp()
    terms = torch.maximum(-batch.advantages * ratio, -batch.advantages * ratio.clamp(0.9, 1.3))
    if dual:
        terms = torch.where(batch.advantages < 0, torch.minimum(terms, -batch.advantages * dual), terms)
    terms = (terms - 0.01 * entropy)[batch.mask]
    rows = batch.mask.nonzero()[:, 0]
    if loss_mean == "token":
        truth = terms.mean()
    else:
        truth = torch.stack([terms[rows == row].mean() for row in rows.unique()]).mean()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model, truth))
    ratio = ratio.detach()[batch.mask]
    assert float(stats["val/ratio_max"]) == pytest.approx(float(ratio.max()), rel=1e-4)
    if loss_mean == "token":
        assert float(stats["val/ratio"]) == pytest.approx(float(ratio.mean()), rel=1e-4)
        kl = 0.5 * (logprobs - batch.old_logprobs)[batch.mask] ** 2
        assert float(stats["policy/approxkl_avg"]) == pytest.approx(float(kl.detach().mean()), rel=1e-4)


def test_the_first_step_has_ratio_1():
    """The old log-probabilities are those of the same weights: nothing is clipped, and the KL is 0."""
    model = policy()
    batch = experience(model)
    logprobs = model.logprobs(*batch[:3])[0].detach()
    _, stats = ppo_policy_loss(model, batch._replace(old_logprobs=logprobs), batch.num_items())
    assert float(stats["val/ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(stats["val/ratio_max"]) == pytest.approx(1, abs=1e-4)
    assert float(stats["policy/clipfrac_avg"]) == 0
    assert float(stats["policy/approxkl_avg"]) < 1e-8


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_the_gap_by_hand_in_any_micro_batches(loss_mean):
    """One row is left out of the losses, and so of the gap. Each token counts once, whatever its weight."""
    model = policy()
    batch = experience(model, rows=7, loss_mean=loss_mean)
    mask = batch.mask & (torch.arange(7) != 4)[:, None]
    batch = batch._replace(mask=mask, weights=token_weights(mask, loss_mean))
    logprobs = model.logprobs(*batch[:3], temperature=0.8)[0].detach()
    in_band = torch.arange(mask.numel()).view(mask.shape) % 2 == 0
    gap = torch.where(in_band, 0.08 * torch.rand(mask.shape), 0.2 + torch.rand(mask.shape))
    gap = torch.where(torch.rand(mask.shape) < 0.5, -gap, gap)
    batch = batch._replace(old_logprobs=logprobs - gap)
    gap, outside = gap[mask].double(), (~in_band)[mask].double().mean()
    expected = {"rollout/gap_mean": gap.abs().mean(), "rollout/gap_max": gap.abs().max()}
    expected = {name: float(value) for name, value in (expected | {"rollout/ratio_outside": outside}).items()}
    for budget in (1, 12, 10_000):
        loss = partial(ppo_policy_loss, temperature=0.8, entropy_coef=0.01, measure_gap=True)
        found = evaluate(model, loss, [batch], budget)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_without_a_valid_token_no_gap_is_reported():
    model = policy()
    batch = experience(model)
    batch = batch._replace(mask=torch.zeros_like(batch.mask), weights=torch.zeros_like(batch.weights))
    _, stats = ppo_policy_loss(model, batch, 1.0, measure_gap=True)
    assert "loss/policy_avg" in stats and not any(name.startswith("rollout/") for name in stats)


def test_value_loss_by_hand():
    model = scorer()
    batch = experience()
    loss, stats = ppo_value_loss(model, batch, batch.num_items(), value_clip=0.2)
    ours = gradients(model, loss)
    values = model.values(*batch[:3])
    clipped = batch.values + (values - batch.values).clamp(-0.2, 0.2)
    terms = 0.5 * torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    truth = terms[batch.mask].mean()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model, truth))
    assert float(stats["val/mean"]) == pytest.approx(float(values.detach()[batch.mask].mean()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("make, loss", [(policy, ppo_policy_loss), (scorer, ppo_value_loss)], ids=["policy", "value"])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_any_micro_batches_give_the_same_loss_and_gradient(make, loss, loss_mean):
    """One row of the batch is masked."""
    model = make()
    batch = experience(rows=7, loss_mean=loss_mean)
    mask = batch.mask & (torch.arange(7) != 4)[:, None]
    batch = batch._replace(mask=mask, weights=token_weights(mask, loss_mean))
    found = []
    for budget in (1, 12, 10_000):
        parts = [loss(model, part, batch.num_items()) for _, part in micro_batches(batch, budget, packed=True)]
        total = sum(value for value, _ in parts)
        found.append((total.detach(), gradients(model, total)))
    for value, gradient in found[:-1]:
        torch.testing.assert_close(value, found[-1][0], rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradient, found[-1][1])


@pytest.mark.parametrize("make, loss", [(policy, ppo_policy_loss), (scorer, ppo_value_loss)], ids=["policy", "value"])
def test_a_masked_batch_gives_0(make, loss):
    """Masked tokens may hold NaN."""
    model = make()
    batch = experience()
    nan = torch.full_like(batch.old_logprobs, torch.nan)
    batch = batch._replace(mask=torch.zeros_like(batch.mask), weights=torch.zeros_like(batch.weights))
    batch = batch._replace(old_logprobs=nan, advantages=nan, returns=nan, values=nan)
    value, _ = loss(model, batch, 10)
    assert float(value.detach()) == 0
    if value.requires_grad:
        assert all((g == 0).all() for g in gradients(model, value).values())


def test_a_masked_row_changes_nothing():
    model = policy()
    batch = experience(model)
    mask = batch.mask & (torch.arange(5) != 2)[:, None]
    masked = batch._replace(mask=mask, weights=token_weights(mask, "token"))
    without = batch.take([0, 1, 3, 4])
    one, _ = ppo_policy_loss(model, masked, masked.num_items())
    other, _ = ppo_policy_loss(model, without, without.num_items())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, one), gradients(model, other))


def test_whitening_inside_ppo_loss_equals_whitening_before_it():
    batch = experience()
    before = whiten(batch, PPOConfig())
    tokens = batch.advantages[batch.mask].double()
    scale = (tokens.var(correction=0) + 1e-8).rsqrt()
    new = batch.old_logprobs + 0.1 * torch.randn_like(batch.old_logprobs)
    call = partial(ops.ppo_loss, new, batch.old_logprobs)
    inside = call(batch.advantages, batch.weights, advantage_shift=tokens.mean().float(), advantage_scale=scale.float())
    torch.testing.assert_close(inside[0], call(before.advantages, batch.weights)[0], rtol=1e-5, atol=1e-5)


def comparisons(sizes):
    widths = torch.randint(3, 12, (sum(sizes),)).tolist()
    rows = [torch.randint(3, VOCABULARY, (width,)).tolist() for width in widths]
    tokens, lengths = pad_rows(rows)
    ranks = torch.cat([torch.randint(0, 4, (size,)) for size in sizes])
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return Comparisons(tokens, torch.ones_like(lengths), lengths, offsets, ranks)


def test_the_ranking_loss_is_the_mean_over_pairs():
    """Groups of 2 to 9 responses in one batch, ties dropped, against one pair at a time; then in micro-batches."""
    model = scorer()
    batch = comparisons([2, 9, 4, 3, 5])
    batch.ranks[0:2] = 3
    loss, stats = reward_loss(model, batch, batch.num_items())
    ours = gradients(model, loss)
    truth, pairs, correct = 0.0, 0, 0

    def score(row):
        return model.last_scores(batch.tokens[row : row + 1, : batch.lengths[row]], batch.lengths[row : row + 1])

    offsets = batch.group_offsets.tolist()
    for start, end in itertools.pairwise(offsets):
        terms = []
        for i, j in itertools.permutations(range(start, end), 2):
            if batch.ranks[i] < batch.ranks[j]:
                better, worse = score(i), score(j)
                terms.append(-logsigmoid(better - worse)[0])
                correct += bool(better > worse)
        pairs += len(terms)
        truth = truth + (torch.stack(terms).mean() if terms else 0.0)
    num_groups = sum(len(batch.ranks[a:b].unique()) > 1 for a, b in itertools.pairwise(offsets))
    assert batch.num_items() == num_groups < 5
    torch.testing.assert_close(loss, truth / num_groups, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model, truth / num_groups))
    assert stats["reward/accuracy"].tolist() == [correct, pairs]
    split = [reward_loss(model, part, batch.num_items()) for _, part in micro_batches(batch, 30, packed=True)]
    assert len(split) > 1
    torch.testing.assert_close(sum(value for value, _ in split), loss, rtol=1e-5, atol=1e-6)
    assert sum(s["reward/accuracy"] for _, s in split).tolist() == [correct, pairs]


def test_micro_batches_hold_every_row_once():
    batch = experience(rows=6)
    parts = list(micro_batches(batch, 20))
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(6))
    assert all(len(part.lengths) == 1 or part.tokens.numel() <= 20 for _, part in parts)
    for index, part in parts:
        for i, row in enumerate(index.tolist()):
            length, response = int(batch.lengths[row]), int((batch.lengths - batch.prompt_lengths)[row])
            assert torch.equal(part.tokens[i, :length], batch.tokens[row, :length])
            assert torch.equal(part.values[i, :response], batch.values[row, :response])
            assert int(part.mask[i].sum()) == response


def test_take_returns_whole_groups_of_comparisons():
    groups = comparisons([3, 2, 4])
    taken = groups.take(torch.tensor([2, 0]))
    assert taken.group_offsets.tolist() == [0, 4, 7]
    assert torch.equal(taken.lengths, groups.lengths[[5, 6, 7, 8, 0, 1, 2]])
