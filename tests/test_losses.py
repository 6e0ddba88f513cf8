"""Losses by hand and by plain torch: PPO, value, ranking; masked rows; the same in any split."""

import itertools
from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_fast import ops
from rlhf_fast.batches import Comparisons, Experience, micro_batches, pad_rows, response_mask
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.model.model import Model
from rlhf_fast.training.experience import token_weights, whiten
from rlhf_fast.training.losses import policy_loss, reward_loss, value_loss

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip


def policy():
    return Model(LlamaForCausalLM(LlamaConfig(**SMALL)))


def scorer():
    return Model(LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=1)), head="scalar")


def experience(model=None, rows=5, loss_mean="token"):
    """Random experience; old log-probabilities near the model's own, so that some ratios are clipped and some not."""
    first = torch.randint(1, 4, (rows,))
    tokens, lengths = pad_rows([torch.randint(3, 61, (int(n) + 1 + i,)).tolist() for i, n in enumerate(first)])
    mask = response_mask(first, lengths)
    noise = torch.randn(6, *mask.shape)
    old = model.logprobs(tokens, first, lengths)[0].detach() if model else noise[4]
    old = torch.where(mask, old + 0.3 * noise[0], 0)
    numbers = [torch.where(mask, x, 0) for x in noise[1:]]
    return Experience(
        tokens, first, lengths, mask, old, numbers[0], numbers[1], numbers[2], numbers[3],
        token_weights(mask, loss_mean), torch.randn(rows), torch.ones(rows, dtype=torch.bool), torch.arange(rows),
    )  # fmt: skip


def gradients(model, loss):
    model.module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dual", [0.0, 2.0])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_policy_loss_by_plain_torch(loss_mean, dual):
    model = policy()
    batch = experience(model, loss_mean=loss_mean)
    options = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": dual, "entropy_coef": 0.01, "temperature": 0.8}
    loss, stats = policy_loss(model, batch, batch.units(), **options)
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
    inside = ratio[batch.mask]
    assert float(stats["val/ratio_max"]) == pytest.approx(float(inside.detach().max()), rel=1e-4)
    if loss_mean == "token":
        assert float(stats["val/ratio"]) == pytest.approx(float(inside.detach().mean()), rel=1e-4)
        kl = 0.5 * (logprobs - batch.old_logprobs)[batch.mask] ** 2
        assert float(stats["policy/approxkl_avg"]) == pytest.approx(float(kl.detach().mean()), rel=1e-4)


def test_first_step_has_ratio_one():
    """L10: log-probabilities of the same weights: ratio 1, nothing clipped, no KL."""
    model = policy()
    batch = experience(model)
    own = model.logprobs(*batch[:3])[0].detach()
    _, stats = policy_loss(model, batch._replace(old_logprobs=own), batch.units())
    assert float(stats["val/ratio"]) == pytest.approx(1, abs=1e-5)
    assert float(stats["val/ratio_max"]) == pytest.approx(1, abs=1e-4)
    assert float(stats["policy/clipfrac_avg"]) == 0 and float(stats["policy/approxkl_avg"]) < 1e-8


def test_value_loss_by_hand():
    model = scorer()
    batch = experience()
    loss, stats = value_loss(model, batch, batch.units(), value_clip=0.2)
    ours = gradients(model, loss)
    values = model.values(*batch[:3])
    clipped = batch.values + (values - batch.values).clamp(-0.2, 0.2)
    terms = 0.5 * torch.maximum((values - batch.returns) ** 2, (clipped - batch.returns) ** 2)
    truth = terms[batch.mask].mean()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model, truth))
    assert float(stats["val/mean"]) == pytest.approx(float(values.detach()[batch.mask].mean()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("make, loss", [(policy, policy_loss), (scorer, value_loss)], ids=["policy", "value"])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_any_split_gives_the_same_loss_and_gradient(make, loss, loss_mean):
    """L9 for the PPO losses, a masked row among the others."""
    model = make()
    batch = experience(rows=7, loss_mean=loss_mean)
    mask = batch.mask & (torch.arange(7) != 4)[:, None]
    batch = batch._replace(mask=mask, weights=token_weights(mask, loss_mean))
    found = []
    for budget in (1, 12, 10_000):
        parts = [loss(model, part, batch.units()) for _, part in micro_batches(batch, budget)]
        total = sum(value for value, _ in parts)
        found.append((total.detach(), gradients(model, total)))
    for value, gradient in found[:-1]:
        torch.testing.assert_close(value, found[-1][0], rtol=1e-5, atol=1e-6)
        assert_same_gradients(gradient, found[-1][1])


@pytest.mark.parametrize("make, loss", [(policy, policy_loss), (scorer, value_loss)], ids=["policy", "value"])
def test_a_masked_part_gives_zero(make, loss):
    """L8: also where the tokens that do not count hold NaN."""
    model = make()
    batch = experience()
    nothing = torch.full_like(batch.old_logprobs, torch.nan)
    batch = batch._replace(
        mask=torch.zeros_like(batch.mask), weights=torch.zeros_like(batch.weights), old_logprobs=nothing,
        advantages=nothing, returns=nothing, values=nothing,
    )  # fmt: skip
    value, _ = loss(model, batch, 10)
    assert float(value.detach()) == 0
    if value.requires_grad:
        assert all((g == 0).all() for g in gradients(model, value).values())


def test_a_left_out_row_is_as_if_it_were_not_there():
    model = policy()
    batch = experience(model)
    mask = batch.mask & (torch.arange(5) != 2)[:, None]
    masked = batch._replace(mask=mask, weights=token_weights(mask, "token"))
    without = batch.take([0, 1, 3, 4])
    one, _ = policy_loss(model, masked, masked.units())
    other, _ = policy_loss(model, without, without.units())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, one), gradients(model, other))


def test_lazy_whitening_is_eager_whitening():
    """L11: ppo_loss with a shift and a scale against advantages whitened beforehand."""
    batch = experience()
    eager = whiten(batch, PPOConfig())
    tokens = batch.advantages[batch.mask].double()
    scale = (tokens.var(correction=0) + 1e-8).rsqrt()
    new = batch.old_logprobs + 0.1 * torch.randn_like(batch.old_logprobs)
    call = partial(ops.ppo_loss, new, batch.old_logprobs)
    lazy = call(batch.advantages, batch.weights, advantage_shift=tokens.mean().float(), advantage_scale=scale.float())
    torch.testing.assert_close(lazy[0], call(eager.advantages, batch.weights)[0], rtol=1e-5, atol=1e-5)


def comparisons(sizes):
    widths = torch.randint(3, 12, (sum(sizes),)).tolist()
    rows = [torch.randint(3, 61, (width,)).tolist() for width in widths]
    tokens, lengths = pad_rows(rows)
    ranks = torch.cat([torch.randint(0, 4, (size,)) for size in sizes])
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    return Comparisons(tokens, torch.ones_like(lengths), lengths, offsets, ranks)


def test_ranking_is_the_mean_over_pairs_one_by_one():
    """S8: K from 2 to 9 in one batch, ties dropped, one forward pass a response; any split of the prompts."""
    model, batch = scorer(), comparisons([2, 9, 4, 3, 5])
    batch.ranks[0:2] = 3
    loss, stats = reward_loss(model, batch, batch.units())
    ours = gradients(model, loss)
    truth, pairs, correct = 0.0, 0, 0

    def alone(row):
        return model.last_scores(batch.tokens[row : row + 1, : batch.lengths[row]], batch.lengths[row : row + 1])

    offsets = batch.group_offsets.tolist()
    for start, end in itertools.pairwise(offsets):
        terms = []
        for i, j in itertools.permutations(range(start, end), 2):
            if batch.ranks[i] < batch.ranks[j]:
                two = [alone(k) for k in (i, j)]
                terms.append(-logsigmoid(two[0] - two[1])[0])
                correct += bool(two[0] > two[1])
        pairs += len(terms)
        truth = truth + (torch.stack(terms).mean() if terms else 0.0)
    counted = sum(len(batch.ranks[a:b].unique()) > 1 for a, b in itertools.pairwise(offsets))
    assert batch.units() == counted < 5
    torch.testing.assert_close(loss, truth / counted, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(model, truth / counted))
    assert stats["reward/accuracy"].tolist() == [correct, pairs]
    split = [reward_loss(model, part, batch.units()) for _, part in micro_batches(batch, 30)]
    assert len(split) > 1
    torch.testing.assert_close(sum(value for value, _ in split), loss, rtol=1e-5, atol=1e-6)
    assert sum(s["reward/accuracy"] for _, s in split).tolist() == [correct, pairs]


def test_batches_cut_and_join():
    batch = experience(rows=6)
    parts = list(micro_batches(batch, 20))
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(6))
    assert all(len(part.lengths) == 1 or part.tokens.numel() <= 20 for _, part in parts)
    for index, part in parts:
        for place, row in enumerate(index.tolist()):
            size, response = int(batch.lengths[row]), int((batch.lengths - batch.prompt_lengths)[row])
            assert torch.equal(part.tokens[place, :size], batch.tokens[row, :size])
            assert torch.equal(part.values[place, :response], batch.values[row, :response])
            assert int(part.mask[place].sum()) == response
    groups = comparisons([3, 2, 4])
    taken = groups.take(torch.tensor([2, 0]))
    assert taken.group_offsets.tolist() == [0, 4, 7]
    assert torch.equal(taken.lengths, groups.lengths[[5, 6, 7, 8, 0, 1, 2]])
