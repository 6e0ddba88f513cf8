"""Experience by hand: where the score stands, rules for missing ends, whitening, the gap to the rollout, rewards."""

from dataclasses import replace

import pytest
import torch
import toy

from rlhf_fast.batches import Prompts, Responses, cat, pad_rows, response_mask
from rlhf_fast.config.fields import KLConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.training.experience import collect, final_scores, minibatches, token_weights, whiten
from rlhf_fast.training.rewards import FunctionReward, checked, is_function, load_reward

END = 2


class Fixed:
    """A model that knows its numbers by heart: (B, R) log-probabilities or values, whatever the weights would say."""

    def __init__(self, numbers, last=None):
        self.numbers, self.last = numbers, last

    def rows(self, tokens, lengths):
        """Rows are told apart by their first token."""
        return tokens[:, 0] - 10

    def logprobs(self, tokens, prompt_lengths, lengths, temperature=1.0):
        width = int((lengths - prompt_lengths).max())
        return self.numbers[self.rows(tokens, lengths), :width] / temperature, None

    def values(self, tokens, prompt_lengths, lengths):
        return self.logprobs(tokens, prompt_lengths, lengths)[0]

    def last_scores(self, tokens, lengths):
        return self.last[self.rows(tokens, lengths)]


def responses(sizes=(3, 1, 4), finished=(True, True, False)):
    """Rows that begin with token 10 + row, prompts of 2, 3, 4 ... tokens; the log-probabilities are made up."""
    first = torch.arange(len(sizes)) + 2
    rows = [[10 + i] + [5] * (1 + i) + [6] * (size - 1) + [END if finished[i] else 6] for i, size in enumerate(sizes)]
    tokens, lengths = pad_rows(rows)
    mask = response_mask(first, lengths)
    numbers = [torch.where(mask, -torch.rand(mask.shape), 0) for _ in range(4)]
    reasons = torch.tensor(finished, dtype=torch.uint8)
    return Responses(tokens, first, lengths, mask, *numbers, reasons, torch.arange(70, 70 + len(sizes)))


def scores_of(*numbers):
    return lambda responses: torch.tensor([numbers[i] for i in (responses.tokens[:, 0] - 10).tolist()])


def settings(**changes):
    return replace(PPOConfig(kl=KLConfig(coef=0.1), lam=1.0, whiten="none", batch=4, minibatch=2), **changes)


def zeros(batch):
    return torch.zeros(batch.mask.shape)


def test_score_stands_on_the_last_response_token():
    """R1, R2: an end at the first place, in the middle, and none at all; lambda = gamma = 1 makes returns sums."""
    batch = responses()
    value = Fixed(torch.where(batch.mask, torch.randn(batch.mask.shape), 0))
    ref = torch.where(batch.mask, batch.logprobs + 0.3, 0)
    experience, stats = collect(batch, Fixed(batch.logprobs), Fixed(ref), value, scores_of(1.0, -2.0, 3.0), settings())
    kl = batch.logprobs - ref
    for row, (size, score) in enumerate([(3, 1.0), (1, -2.0), (4, 3.0)]):
        rewards = -0.1 * kl[row, :size]
        rewards[size - 1] += score
        returns = rewards.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(experience.returns[row, :size], returns)
        torch.testing.assert_close(experience.advantages[row, :size], returns - value.numbers[row, :size])
        assert (experience.advantages[row, size:] == 0).all()
    assert stats["objective/kl"] == pytest.approx(-0.3 * 8 / 3, rel=1e-5)
    assert stats["objective/kl_token"] == pytest.approx(-0.3, rel=1e-5)
    assert stats["objective/scores"] == pytest.approx(2 / 3, rel=1e-5)
    assert stats["tokens/eos_rate"] == pytest.approx(2 / 3) and stats["tokens/length"] == pytest.approx(8 / 3)


def test_no_kl_where_policy_is_reference():
    """R5: the reward is the score alone, whatever the coefficient."""
    batch = responses()
    same = Fixed(batch.logprobs)
    reward = scores_of(1.0, 2.0, 3.0)
    experience, stats = collect(batch, same, same, Fixed(zeros(batch)), reward, settings(), kl_coef=100.0)
    assert stats["objective/kl"] == 0
    assert torch.equal(experience.returns, torch.tensor([1.0, 2.0, 3.0])[:, None] * batch.mask)


@pytest.mark.parametrize(
    "rule, value, wanted",
    [
        ("keep", -1.0, [1, 2, 3]),
        ("replace", -1.0, [1, 2, -1]),
        ("subtract", 0.5, [1, 2, 2.5]),
        ("drop", -1.0, [1, 2, None]),
    ],
)
def test_missing_end(rule, value, wanted):
    """R3: row 2 has no end token."""
    batch = responses()
    same, cfg = Fixed(batch.logprobs), settings(missing_eos=rule, missing_eos_value=value)
    experience, _ = collect(batch, same, same, Fixed(zeros(batch)), scores_of(1.0, 2.0, 3.0), cfg)
    for row, score in enumerate(wanted):
        if score is None:
            assert not experience.mask[row].any() and (experience.weights[row] == 0).all()
            assert (experience.advantages[row] == 0).all()
        else:
            assert experience.mask[row].sum() == batch.mask[row].sum()
            assert (experience.returns[row][batch.mask[row]] == score).all()
    assert experience.units() == (4 if rule == "drop" else 8)
    assert experience.scores.tolist() == [1, 2, 3]


def test_scale_then_clip_then_rule():
    """R4"""
    cfg = settings(score_scale=2.0, score_clip=3.0, missing_eos="subtract", missing_eos_value=1.0)
    final, kept = final_scores(torch.tensor([1.0, -4.0, 5.0]), torch.tensor([True, True, False]), cfg)
    assert final.tolist() == [2, -3, 2] and kept.all()


def test_bootstrap_is_for_rows_without_end():
    """The value after the last token enters once, and only where the row was cut."""
    batch = responses()
    same, value = Fixed(batch.logprobs), Fixed(zeros(batch), last=torch.tensor([100.0, 200.0, 10.0]))
    experience, _ = collect(batch, same, same, value, scores_of(1.0, 2.0, 3.0), settings(), bootstrap=True)
    assert [float(row[0]) for row in experience.returns] == [1, 2, 13]


def test_old_logprobs_and_the_gap():
    batch = responses((3, 1, 4), (True, True, True))
    gap = torch.where(batch.mask, 0.0, 0.0)
    gap[2, 3] = 0.2
    own = Fixed(batch.logprobs + gap)
    for source, wanted in [("rollout", batch.logprobs), ("recompute", own.numbers)]:
        cfg = settings(old_logprobs=source)
        experience, stats = collect(batch, own, own, Fixed(zeros(batch)), scores_of(0.0, 0.0, 0.0), cfg)
        torch.testing.assert_close(experience.old_logprobs, wanted)
        assert stats["rollout/gap_mean"] == pytest.approx(0.2 / 8, rel=1e-4)
        assert stats["rollout/gap_p99"] == pytest.approx(0.2, rel=1e-4)
        assert stats["rollout/ratio_outside"] == pytest.approx(1 / 8)


def test_logprobs_are_taken_at_the_sampling_temperature():
    batch = responses()
    own = Fixed(batch.logprobs)
    cfg = settings(old_logprobs="recompute", sampling=SamplingConfig(temperature=0.5))
    experience, _ = collect(batch, own, own, Fixed(zeros(batch)), scores_of(0.0, 0.0, 0.0), cfg)
    torch.testing.assert_close(experience.old_logprobs, batch.logprobs / 0.5)


def test_parts_do_not_change_experience():
    batch = responses((3, 1, 4, 2), (True, True, False, True))
    models = [Fixed(torch.where(batch.mask, torch.randn(batch.mask.shape), 0)) for _ in range(3)]
    reward, found = scores_of(1.0, 2.0, 3.0, 4.0), []
    for budget in (1, 9, 1000):
        found.append(collect(batch, *models, reward, settings(optim=OptimConfig(micro_batch_tokens=budget)))[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def collected(rows=6, **changes):
    batch = responses(tuple(range(1, rows + 1)), (True,) * rows)
    numbers = [torch.where(batch.mask, torch.randn(batch.mask.shape), 0) for _ in range(2)]
    scores = scores_of(*torch.randn(rows).tolist())
    cfg = settings(**changes)
    return collect(batch, Fixed(batch.logprobs), Fixed(numbers[0]), Fixed(numbers[1]), scores, cfg)[0], cfg


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening(unbiased):
    """W1, W4, W6"""
    raw, _ = collected()
    white = whiten(raw, settings(whiten_unbiased=unbiased))
    tokens = white.advantages[raw.mask].double()
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens.var(correction=int(unbiased))) == pytest.approx(1, rel=1e-5)
    assert (white.advantages[~raw.mask] == 0).all()
    unmoved = whiten(raw, settings(whiten_unbiased=unbiased, whiten_shift_mean=False))
    mean = float(raw.advantages[raw.mask].mean())
    torch.testing.assert_close(unmoved.advantages[raw.mask], white.advantages[raw.mask] + mean, rtol=1e-5, atol=1e-5)


def test_whitening_of_none_one_and_far_away():
    """W2: zeros, no NaN. W3: mean 1e4, deviation 1."""
    raw, cfg = collected()
    nothing = whiten(raw._replace(mask=torch.zeros_like(raw.mask)), cfg)
    assert (nothing.advantages == 0).all()
    one = torch.zeros_like(raw.mask)
    one[3, 1] = True
    for unbiased in (False, True):
        assert (whiten(raw._replace(mask=one), settings(whiten_unbiased=unbiased)).advantages == 0).all()
    mask = torch.ones(40, 50, dtype=torch.bool)
    far = raw._replace(mask=mask, advantages=1e4 + torch.randn(40, 50))
    tokens = whiten(far, cfg).advantages.double()
    assert abs(float(tokens.mean())) < 1e-4 and float(tokens.std(correction=0)) == pytest.approx(1, rel=1e-3)


def test_scope_of_whitening():
    """ "batch" whitens all rows together, "minibatch" those of one step, "none" nothing."""
    seed = torch.get_rng_state()
    found = {}
    for scope in ("batch", "minibatch", "none"):
        torch.set_rng_state(seed)
        experience, cfg = collected(whiten=scope)
        found[scope] = experience, list(minibatches(experience, cfg, seed=1))
    raw = found["none"][0]
    torch.testing.assert_close(found["batch"][0].advantages, whiten(raw, settings()).advantages)
    assert torch.equal(found["minibatch"][0].advantages, raw.advantages)
    for scope, per_part in [("minibatch", True), ("batch", False), ("none", False)]:
        for part in found[scope][1]:
            tokens = part.advantages[part.mask]
            assert (abs(float(tokens.mean())) < 1e-5) == per_part


def test_minibatches():
    """Every row once an epoch, in an order that the seed makes; rows that do not count never come."""
    experience, cfg = collected(inner_epochs=2)
    experience = experience._replace(mask=experience.mask & (torch.arange(6) != 3)[:, None])
    parts = list(minibatches(experience, cfg, seed=4))
    assert [len(part.lengths) for part in parts] == [2, 2, 1] * 2
    epochs = [cat(parts[:3]), cat(parts[3:])]
    assert all(sorted(epoch.uids.tolist()) == [70, 71, 72, 74, 75] for epoch in epochs)
    assert all(torch.equal(epoch.weights.sum(1), (epoch.lengths - epoch.prompt_lengths).float()) for epoch in epochs)
    again = list(minibatches(experience, cfg, seed=4))
    assert all(torch.equal(a.uids, b.uids) for a, b in zip(parts, again, strict=True))
    orders = {tuple(cat(list(minibatches(experience, cfg, seed=seed))).uids.tolist()) for seed in range(8)}
    assert len(orders) > 4


def test_token_weights():
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert token_weights(mask, "token").tolist() == mask.float().tolist()
    assert token_weights(mask, "sequence").tolist() == [[0.5, 0.5, 0], [1, 0, 0], [0, 0, 0]]


class Words:
    """A tokenizer whose tokens are numbers; 2 is special."""

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(str(token) for token in row if token != END) for row in rows]


def test_reward_functions_get_texts():
    batch, seen = responses((3, 1), (True, False)), {}

    def whole(texts):
        seen["whole"] = texts
        return [len(text) for text in texts]

    def two(prompts, answers, *, scale=1):
        seen["two"] = (prompts, answers)
        return torch.tensor([0.5, 1.5])

    assert FunctionReward(whole, Words())(batch).tolist() == [8, 8]
    assert seen["whole"] == ["10 5 6 6", "11 5 5 6"]
    assert FunctionReward(two, Words())(batch).tolist() == [0.5, 1.5]
    assert seen["two"] == (["10 5", "11 5 5"], ["6 6", "6"])


@pytest.mark.parametrize(
    "returned, words",
    [
        ([1.0, float("nan"), 2.0], "nan for prompt 71"),
        ([float("inf"), 1.0, float("-inf")], "inf for prompt 70 .*-inf for prompt 72"),
        ([1.0, 2.0], "2 rewards for 3 responses"),
        ([1.0, None, 2.0], "one number for each response"),
        (3.0, "one number for each response"),
    ],
)
def test_a_bad_reward_names_the_rows(returned, words):
    with pytest.raises(UserError, match=words):
        FunctionReward(lambda texts: returned, Words(), "mine")(responses())


def test_reward_by_name(tmp_path, monkeypatch):
    (tmp_path / "scores_for_test.py").write_text("def length(texts):\n    return [len(t) for t in texts]\nsize = 3\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("scores_for_test:length", Words())
    assert reward(responses((1,), (False,))).tolist() == [6]
    for spec, words in [
        ("scores_for_test:width", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("scores_for_test:size", "not a function"),
    ]:
        with pytest.raises(UserError, match=words):
            load_reward(spec, Words())
    with pytest.raises(UserError, match="takes 3 arguments"):
        FunctionReward(lambda a, b, c: a, Words())
    assert not is_function(str(tmp_path)) and is_function("a.b:c")


def test_reward_model_must_share_the_tokenizer(tmp_path):
    policy = Model.load(ModelConfig(toy.model(tmp_path / "policy")))
    start = Model.load(ModelConfig(toy.model(tmp_path / "base")), head="scalar", fresh_head=True)
    start.score_bias = -0.5
    start.save(tmp_path / "reward")
    reward = load_reward(str(tmp_path / "reward"), policy.tokenizer)
    prompts = Prompts([5, 9], [[3, 4, 2], [6, 2]], ["", ""])
    batch = Rollout(policy, SamplingConfig(max_new_tokens=5)).generate(prompts, samples=2)
    scores = reward(batch)
    for row, tokens in enumerate(batch.tokens):
        length = int(batch.lengths[row])
        alone = start.token_scores(tokens[None, :length])[0, -1]
        torch.testing.assert_close(scores[row], alone.detach(), rtol=1e-5, atol=1e-6)
    toy.tokenizer("abcdefgx").save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="its tokenizer is not the policy's"):
        load_reward(str(tmp_path / "reward"), policy.tokenizer)


def test_checked_scores_are_float32():
    scores = checked(torch.tensor([1, 2], dtype=torch.int64), [0, 1], "mine")
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 2]


@pytest.mark.parametrize("changes", [{}, {"whiten_unbiased": True}, {"whiten_shift_mean": False}], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_whitening_by_the_ops_moments_is_whitening_by_ones_own(changes, rows):
    """The batch's statistics are not taken twice: `collect` whitens by those that came with the advantages."""
    seed = torch.get_rng_state()
    raw, _ = collected(rows, whiten="none")
    torch.set_rng_state(seed)
    batch, cfg = collected(rows, whiten="batch", **changes)
    torch.testing.assert_close(batch.advantages, whiten(raw, cfg).advantages, rtol=1e-5, atol=1e-6)
    number, mean = float(raw.mask.sum()), 3.0
    given = whiten(raw, settings(whiten_eps=1e-12), torch.tensor([number, mean, 4 * number, 0.0, 0.0]))
    torch.testing.assert_close(given.advantages[raw.mask], (raw.advantages[raw.mask] - mean) / 2)
