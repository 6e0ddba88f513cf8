"""Experience by hand: rewards, rules for missing end tokens, whitening, the gap to the rollout; reward functions."""

import math
import re
from dataclasses import replace

import pytest
import torch
import toy

from rlhf_fast.batches import Prompts, Responses, cat, pad_rows, response_mask
from rlhf_fast.config.fields import KLConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.rewards import is_function
from rlhf_fast.config.stages import PPOConfig
from rlhf_fast.errors import UserError, row_locations
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.training.experience import final_scores, make_experience, minibatches, token_weights, whiten
from rlhf_fast.training.reward_functions import FunctionReward
from rlhf_fast.training.rewards import Reward, check_scores, load_reward

END = 2


class FixedModel:
    """A model that returns given numbers: (B, R) log-probabilities or values, and (B,) scores of the last token."""

    def __init__(self, numbers, last=None, packs_rows=True):
        self.numbers, self.last, self.packs_rows = numbers, last, packs_rows

    def logprobs(self, tokens, prompt_lengths, lengths, temperature=1.0, sampled_tokens_only=True):
        assert sampled_tokens_only
        width = int((lengths - prompt_lengths).max())
        return self.numbers[row_numbers(tokens), :width] / temperature, None

    def values(self, tokens, prompt_lengths, lengths):
        return self.logprobs(tokens, prompt_lengths, lengths)[0]

    def last_scores(self, tokens, _lengths, _prompt_lengths):
        return self.last[row_numbers(tokens)]


def row_numbers(tokens):
    """Return the row numbers that `responses` writes into the first tokens."""
    return tokens[:, 0] - 10


def responses(sizes=(3, 1, 4), finished=(True, True, False)):
    """Return responses whose rows begin with token 10 + row, with prompts of 2, 3, 4 ... tokens and random numbers."""
    first = torch.arange(len(sizes)) + 2
    rows = [[10 + i] + [5] * (1 + i) + [6] * (size - 1) + [END if finished[i] else 6] for i, size in enumerate(sizes)]
    tokens, lengths = pad_rows(rows)
    mask = response_mask(first, lengths)
    numbers = [torch.where(mask, -torch.rand(mask.shape), 0) for _ in range(4)]
    reasons = torch.tensor(finished, dtype=torch.uint8)
    return Responses(tokens, first, lengths, mask, *numbers, reasons, torch.arange(70, 70 + len(sizes)))


def scores_of(*numbers):
    """Return a reward function with a fixed score for each row."""
    return lambda responses: torch.tensor(numbers)[row_numbers(responses.tokens)]


def settings(**changes):
    return replace(PPOConfig(kl=KLConfig(coef=0.1), lam=1.0, whiten="none", batch=4, minibatch=2), **changes)


def zeros(batch):
    return torch.zeros(batch.mask.shape)


def random_numbers(batch):
    """Return (B, R) random numbers, 0 outside the mask."""
    return torch.where(batch.mask, torch.randn(batch.mask.shape), 0)


def test_the_score_is_added_at_the_last_response_token():
    """The reward of a token is -kl_coef * KL, at the last token plus the score (InstructGPT, equation 2).

    One response has a single token, one ends early, one has no end token. With lambda = gamma = 1 returns are sums.
    """
    batch = responses()
    value = FixedModel(random_numbers(batch))
    ref = torch.where(batch.mask, batch.logprobs + 0.3, 0)
    policy, reference = FixedModel(batch.logprobs), FixedModel(ref)
    experience, stats = make_experience(batch, policy, reference, value, scores_of(1.0, -2.0, 3.0), settings())
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
    assert stats["tokens/eos_rate"] == pytest.approx(2 / 3)
    assert stats["tokens/length"] == pytest.approx(8 / 3)


def test_the_kl_is_0_if_the_policy_is_the_reference():
    """The reward is then the score alone, whatever the coefficient."""
    batch = responses()
    same = FixedModel(batch.logprobs)
    reward = scores_of(1.0, 2.0, 3.0)
    experience, stats = make_experience(batch, same, same, FixedModel(zeros(batch)), reward, settings(), kl_coef=100.0)
    assert stats["objective/kl"] == 0
    assert torch.equal(experience.returns, torch.tensor([1.0, 2.0, 3.0])[:, None] * batch.mask)


@pytest.mark.parametrize(
    "rule, value, expected",
    [
        ("keep", -1.0, [1, 2, 3]),
        ("replace", -1.0, [1, 2, -1]),
        ("subtract", 0.5, [1, 2, 2.5]),
        ("drop", -1.0, [1, 2, None]),
    ],
)
def test_missing_eos(rule, value, expected):
    """Row 2 has no end token."""
    batch = responses()
    same, cfg = FixedModel(batch.logprobs), settings(missing_eos=rule, missing_eos_value=value)
    experience, _ = make_experience(batch, same, same, FixedModel(zeros(batch)), scores_of(1.0, 2.0, 3.0), cfg)
    for row, score in enumerate(expected):
        if score is None:
            assert not experience.mask[row].any()
            assert (experience.weights[row] == 0).all()
            assert (experience.advantages[row] == 0).all()
        else:
            assert experience.mask[row].sum() == batch.mask[row].sum()
            assert (experience.returns[row][batch.mask[row]] == score).all()
    assert experience.num_items() == (4 if rule == "drop" else 8)
    assert experience.scores.tolist() == [1, 2, 3]


def test_scores_are_scaled_then_clipped_then_changed_by_missing_eos():
    cfg = settings(score_scale=2.0, score_clip=3.0, missing_eos="subtract", missing_eos_value=1.0)
    final, in_loss = final_scores(torch.tensor([1.0, -4.0, 5.0]), torch.tensor([True, True, False]), cfg)
    assert final.tolist() == [2, -3, 2]
    assert in_loss.all()


def test_bootstrap_truncated_adds_the_value_after_the_last_token():
    """It is the future of row 2 only, which has no end token: return = score + value."""
    batch = responses()
    policy = FixedModel(batch.logprobs)
    value = FixedModel(zeros(batch), last=torch.tensor([100.0, 200.0, 10.0]))
    cfg = settings(bootstrap_truncated=True)
    experience, _ = make_experience(batch, policy, policy, value, scores_of(1.0, 2.0, 3.0), cfg)
    assert [float(row[0]) for row in experience.returns] == [1, 2, 13]


def test_bootstrap_truncated_changes_the_advantages_of_truncated_rows_only():
    batch = responses((3, 1, 4, 2), (True, False, False, True))
    policy, value = (
        FixedModel(batch.logprobs),
        FixedModel(random_numbers(batch), last=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    )
    reward = scores_of(1.0, 2.0, 3.0, 4.0)
    off, on = (
        make_experience(batch, policy, policy, value, reward, settings(bootstrap_truncated=setting, lam=0.9))[0]
        for setting in (False, True)
    )
    for row, finished in enumerate(batch.finished.tolist()):
        valid = batch.mask[row]
        assert torch.equal(on.advantages[row], off.advantages[row]) == finished
        assert finished or (on.advantages[row] > off.advantages[row])[valid].all()


def test_old_logprobs_and_the_gap():
    batch = responses((3, 1, 4), (True, True, True))
    gap = zeros(batch)
    gap[2, 3] = 0.2
    policy = FixedModel(batch.logprobs + gap)
    for source, expected in [("rollout", batch.logprobs), ("recompute", policy.numbers)]:
        cfg = settings(old_logprobs=source)
        experience, stats = make_experience(
            batch, policy, policy, FixedModel(zeros(batch)), scores_of(0.0, 0.0, 0.0), cfg
        )
        torch.testing.assert_close(experience.old_logprobs, expected)
        gap = {name: value for name, value in stats.items() if name.startswith("rollout/")}
        if source == "rollout":
            assert not gap, "the policy's first step measures it"
        else:
            assert gap == pytest.approx(
                {"rollout/gap_mean": 0.2 / 8, "rollout/gap_max": 0.2, "rollout/ratio_outside": 1 / 8}, rel=1e-4
            )


@pytest.mark.parametrize("source, calls", [("rollout", 0), ("recompute", 3)])
def test_the_policy_makes_a_forward_pass_only_for_old_logprobs(source, calls):
    """With one row in a micro-batch it is called once a row."""
    batch, count = responses(), []
    policy = FixedModel(batch.logprobs)
    policy.logprobs = lambda *args, **kwargs: count.append(1) or FixedModel.logprobs(policy, *args, **kwargs)
    other, cfg = FixedModel(batch.logprobs), settings(old_logprobs=source, optim=OptimConfig(micro_batch_tokens=1))
    make_experience(batch, policy, other, FixedModel(zeros(batch)), scores_of(0.0, 0.0, 0.0), cfg)
    assert len(count) == calls


def test_logprobs_are_taken_at_the_sampling_temperature():
    batch = responses()
    policy = FixedModel(batch.logprobs)
    cfg = settings(old_logprobs="recompute", sampling=SamplingConfig(temperature=0.5))
    experience, _ = make_experience(batch, policy, policy, FixedModel(zeros(batch)), scores_of(0.0, 0.0, 0.0), cfg)
    torch.testing.assert_close(experience.old_logprobs, batch.logprobs / 0.5)


@pytest.mark.parametrize("packs_rows", [False, True])
def test_micro_batches_do_not_change_the_experience(packs_rows):
    batch = responses((3, 1, 4, 2), (True, True, False, True))
    models = [FixedModel(random_numbers(batch), packs_rows=packs_rows) for _ in range(3)]
    reward = scores_of(1.0, 2.0, 3.0, 4.0)
    budgets = [OptimConfig(micro_batch_tokens=tokens) for tokens in (1, 9, 1000)]
    found = [make_experience(batch, *models, reward, settings(optim=optim))[0] for optim in budgets]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def collected(rows=6, **changes):
    """Return the experience of responses with 1, 2, ... tokens, and its settings."""
    batch = responses(tuple(range(1, rows + 1)), (True,) * rows)
    reference, value = FixedModel(random_numbers(batch)), FixedModel(random_numbers(batch))
    reward = scores_of(*torch.randn(rows).tolist())
    cfg = settings(**changes)
    return make_experience(batch, FixedModel(batch.logprobs), reference, value, reward, cfg)[0], cfg


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitened_advantages_have_mean_0_and_variance_1(unbiased):
    raw, _ = collected()
    white = whiten(raw, settings(whiten_unbiased=unbiased))
    tokens = white.advantages[raw.mask].double()
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float(tokens.var(correction=int(unbiased))) == pytest.approx(1, rel=1e-5)
    assert (white.advantages[~raw.mask] == 0).all()
    unmoved = whiten(raw, settings(whiten_unbiased=unbiased, whiten_shift_mean=False))
    mean = float(raw.advantages[raw.mask].mean())
    torch.testing.assert_close(unmoved.advantages[raw.mask], white.advantages[raw.mask] + mean, rtol=1e-5, atol=1e-5)


def test_whitening_of_no_token_of_one_token_and_of_a_large_mean():
    """No token or one gives zeros, not NaN. A mean of 1e4 costs no precision."""
    raw, cfg = collected()
    empty = whiten(raw._replace(mask=torch.zeros_like(raw.mask)), cfg)
    assert (empty.advantages == 0).all()
    one = torch.zeros_like(raw.mask)
    one[3, 1] = True
    for unbiased in (False, True):
        assert (whiten(raw._replace(mask=one), settings(whiten_unbiased=unbiased)).advantages == 0).all()
    mask = torch.ones(40, 50, dtype=torch.bool)
    far = raw._replace(mask=mask, advantages=1e4 + torch.randn(40, 50))
    tokens = whiten(far, cfg).advantages.double()
    assert abs(float(tokens.mean())) < 1e-4
    assert float(tokens.std(correction=0)) == pytest.approx(1, rel=1e-3)


def test_scope_of_whitening():
    """With "batch" all rows are whitened together, with "minibatch" those of one step, with "none" nothing."""
    rng_state = torch.get_rng_state()
    found = {}
    for scope in ("batch", "minibatch", "none"):
        torch.set_rng_state(rng_state)
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
    """Every row comes once an epoch, in an order that depends on the seed; masked rows are left out."""
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


class NumberTokenizer:
    """A tokenizer whose tokens are numbers; 2 is special."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(str(token) for token in row if token != END) for row in rows]


def test_reward_functions_get_texts():
    batch, calls = responses((3, 1), (True, False)), []

    def score_texts(texts):
        calls.append(texts)
        return [len(text) for text in texts]

    def score_answers(prompts, answers, *, _scale=1):
        calls.append((prompts, answers))
        return torch.tensor([0.5, 1.5])

    assert Reward([FunctionReward(score_texts, NumberTokenizer())])(batch).tolist() == [8, 8]
    assert Reward([FunctionReward(score_answers, NumberTokenizer())])(batch).tolist() == [0.5, 1.5]
    assert calls == [["10 5 6 6", "11 5 5 6"], (["10 5", "11 5 5"], ["6 6", "6"])]


@pytest.mark.parametrize(
    "returned, words",
    [
        ([1.0, float("nan"), 2.0], r"returned nan; 1 of 3 .* \(prompt 71, row 1 of the batch\)$"),
        ([float("inf"), 1.0, float("-inf")], "returned inf and -inf; 2 of 3 .*prompt 70, row 0 .*prompt 72, row 2 "),
        ([1.0, 2.0], rf"^mine \({re.escape(__file__)}:\d+\): returned 2 rewards for 3 responses"),
        ([1.0, None, 2.0], "returned None; 1 of 3 .*needs a number from one function at least .prompt 71, row 1 "),
        (3.0, "one number for each response"),
    ],
)
def test_a_bad_reward_names_the_rows(returned, words):
    with pytest.raises(UserError, match=words):
        Reward([FunctionReward(lambda _texts: returned, NumberTokenizer(), "mine")])(responses())


def test_rows_of_a_file_are_named_once():
    """Eight rows stood there by their number in the batch, and again by file and line."""
    reward = Reward([FunctionReward(lambda texts: [math.nan] * len(texts), NumberTokenizer(), "mine")])
    with pytest.raises(UserError) as info, row_locations(Responses=lambda uid: f"p.jsonl:{uid}"):
        reward(responses())
    said = str(info.value)
    assert said.endswith("3 of 3 rewards are not finite numbers (p.jsonl:70, p.jsonl:71, p.jsonl:72)")
    assert "of the batch" not in said


def test_reward_by_name(tmp_path, monkeypatch):
    (tmp_path / "scores_for_test.py").write_text("def length(texts):\n    return [len(t) for t in texts]\nsize = 3\n")
    (tmp_path / "faulty_for_test.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("scores_for_test:length", NumberTokenizer())
    assert reward(responses((1,), (False,))).tolist() == [6]
    for spec, words in [
        ("scores_for_test:width", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        ("faulty_for_test:f", r"cannot be imported \(SyntaxError: .*; mend faulty_for_test"),
        ("scores_for_test:size", "not a function"),
    ]:
        with pytest.raises(UserError, match=words):
            load_reward(spec, NumberTokenizer())
    with pytest.raises(UserError, match="takes 3 arguments"):
        FunctionReward(lambda a, b, c: (a, b, c), NumberTokenizer())
    assert is_function("a.b:c")
    assert not is_function(str(tmp_path))


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
        alone = start.score_hidden(start.hidden(tokens[None, :length]))[0, -1]
        torch.testing.assert_close(scores[row], alone.detach(), rtol=1e-5, atol=1e-6)
    toy.tokenizer("abcdefgx").save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match="its tokenizer is not the policy's"):
        load_reward(str(tmp_path / "reward"), policy.tokenizer)


def test_scores_are_float32():
    scores = check_scores(torch.tensor([1, 2], dtype=torch.int64), [0, 1], "mine")
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 2]


@pytest.mark.parametrize("changes", [{}, {"whiten_unbiased": True}, {"whiten_shift_mean": False}], ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_whitening_by_the_ops_moments_equals_whitening_by_computed_ones(changes, rows):
    """`make_experience` does not compute the batch's moments again: ops.ppo_advantages returns them."""
    rng_state = torch.get_rng_state()
    raw, _ = collected(rows, whiten="none")
    torch.set_rng_state(rng_state)
    batch, cfg = collected(rows, whiten="batch", **changes)
    torch.testing.assert_close(batch.advantages, whiten(raw, cfg).advantages, rtol=1e-5, atol=1e-6)
    count, mean = float(raw.mask.sum()), 3.0
    whitened = whiten(raw, settings(whiten_eps=1e-12), torch.tensor([count, mean, 4 * count, 0.0, 0.0]))
    torch.testing.assert_close(whitened.advantages[raw.mask], (raw.advantages[raw.mask] - mean) / 2)
