"""ppo_advantages: where the score is added, what the KL estimators are, statistics that whiten."""

import importlib

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _gae

BACKENDS = ops.ppo_advantages.backends
KERNELS = [name for name in BACKENDS if name.startswith("cpu") or name == "simt"]


@pytest.fixture(params=BACKENDS)
def advantages(request):
    device = "cpu" if ops.ppo_advantages.can_run(request.param, "cpu") else "cuda"
    op = ops.ppo_advantages.backend(request.param)

    def run(*args, **kwargs):
        args = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
        return tuple(x.cpu() for x in op(*args, **kwargs))

    return run


def batch(B=9, T=45):
    logprobs = -torch.rand(B, T) * 3
    mask = torch.rand(B, T) > 0.2
    return logprobs, logprobs + 0.3 * torch.randn(B, T), torch.randn(B, T), torch.randn(B), mask


def named(stats):
    return dict(zip(ops.ppo_advantages.stats, stats.tolist(), strict=True))


def test_the_score_is_added_only_at_the_last_token(advantages):
    """Rows with left, right and interior padding, one token or none; NaN is stored outside the mask."""
    T = 21
    t = torch.arange(T)
    mask = torch.stack([t < 5, t >= 16, t == 7, t < 0, t >= 0, t % 3 == 1, t == T - 1])
    scores = torch.arange(1.0, 8.0)
    scores[3] = torch.nan  # of the row without a token
    zeros = torch.zeros(mask.shape).masked_fill(~mask, torch.nan)
    got, returns, stats, kl = advantages(zeros, zeros, zeros, scores, mask, 0.1, "k1", 0.5, 1.0)
    tokens_from_here = mask.flip(1).cumsum(1).flip(1)
    expected = torch.where(mask, scores[:, None] * 0.5 ** (tokens_from_here - 1), 0)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got, returns) and torch.equal(kl, torch.zeros(7)) and stats.isfinite().all()
    assert named(stats)["count"] == mask.sum()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_no_kl_where_policy_and_reference_agree(advantages, estimator):
    logprobs, _, values, scores, mask = batch()
    args = (values, scores, mask, 0.7, estimator, 1.0, 0.95)
    with_kl = advantages(logprobs, logprobs, *args)
    assert torch.equal(with_kl[3], torch.zeros(9))
    rewards = torch.where(mask & (mask.flip(1).cumsum(1).flip(1) == 1), scores[:, None], 0)
    plain = ops.gae.backend("reference")(rewards, values, mask, 1.0, 0.95)
    torch.testing.assert_close(with_kl[:2], plain, atol=1e-5, rtol=1e-5)


def test_the_estimators_match_their_formulas(advantages):
    """The mean over all 5 tokens of a vocabulary, weighted by the policy, is KL(policy || reference) for k1 and k3."""
    policy, reference = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    logprobs, ref = policy.log()[:, None], reference.log()[:, None]
    truth = (policy * (policy.log() - reference.log())).sum()
    ones = torch.ones(5, 1, dtype=torch.bool)
    d = (policy.log() - reference.log()).double()
    forms = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}
    for estimator, form in forms.items():
        got, _, _, kl = advantages(logprobs, ref, torch.zeros(5, 1), torch.zeros(5), ones, 0.25, estimator)
        torch.testing.assert_close(kl.double(), form, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got[:, 0], -0.25 * kl, atol=1e-7, rtol=1e-6)
        if estimator in ("k1", "k3"):
            torch.testing.assert_close((policy * kl).sum(), truth)


def test_kl_is_summed_over_each_row_and_k3_does_not_overflow(advantages):
    logprobs, ref, values, scores, mask = batch()
    kl = advantages(logprobs, ref, values, scores, mask)[3]
    torch.testing.assert_close(kl, torch.where(mask, logprobs - ref, 0).sum(1), atol=1e-5, rtol=1e-5)
    far = advantages(logprobs - 200, ref, values, scores, mask, 0.02, "k3")
    assert all(x.isfinite().all() for x in far)


def test_scores_are_clipped(advantages):
    zero, mask = torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool)
    scores = torch.tensor([-7.0, 7.0, 1.5, -0.5])
    got = advantages(zero, zero, zero, scores, mask, score_clip=2.0)[0]
    assert torch.equal(got[:, 0], scores.clamp(-2, 2))
    assert torch.equal(advantages(zero, zero, zero, scores, mask)[0][:, 0], scores)


@pytest.mark.parametrize("unbiased", [False, True])
def test_statistics_whiten(advantages, unbiased):
    *inputs, mask = batch(16, 130)
    got, returns, stats, _ = advantages(*inputs, mask)
    s = named(stats)
    white = (got - s["mean"]) * (s["m2"] / (s["count"] - unbiased)) ** -0.5
    inside = white[mask].double()
    assert inside.mean().abs() < 1e-6 and (inside.var(correction=int(unbiased)) - 1).abs() < 1e-5
    assert got[~mask].eq(0).all() and returns[~mask].eq(0).all()
    torch.testing.assert_close(s["return_mean"], returns[mask].double().mean().item(), atol=1e-6, rtol=1e-5)
    m2 = (returns[mask].double().var(correction=0) * mask.sum()).item()
    torch.testing.assert_close(s["return_m2"], m2, atol=0, rtol=1e-6)


def test_no_token_and_one_token(advantages):
    logprobs, ref, values, scores, mask = batch()
    stats = advantages(logprobs, ref, values, scores, mask & False)[2]
    assert torch.equal(stats, torch.zeros(5))
    one = torch.zeros_like(mask)
    one[4, 30] = True
    got, returns, stats, _ = advantages(logprobs, ref, values, scores, one)
    assert named(stats) == {"count": 1, "mean": got[4, 30], "m2": 0, "return_mean": returns[4, 30], "return_m2": 0}


@pytest.mark.parametrize("B, T", [(1, 4096), (64, 64), (3, 1001), (2, 400)])
def test_a_mean_far_larger_than_the_spread_keeps_the_variance(advantages, B, T):
    zero, scores = torch.zeros(B, T), torch.zeros(B)
    values = -(1e4 + torch.randn(B, T))
    mask = torch.rand(B, T) > 0.1
    got, _, stats, _ = advantages(zero, zero, values, scores, mask, 0.0, "k1", 0.0, 0.0)
    truth = got[mask].double()
    torch.testing.assert_close(named(stats)["mean"], truth.mean().item(), atol=0, rtol=1e-6)
    torch.testing.assert_close(named(stats)["m2"], ((truth - truth.mean()) ** 2).sum().item(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_statistics_of_shards_merge(advantages, shards):
    """They merge by the rule in the op's docstring."""
    inputs = batch(16, 33)
    inputs[-1][5] = False
    whole = named(advantages(*inputs)[2])
    n, mean, m2 = 0, 0, 0
    for part in zip(*(x.chunk(shards) for x in inputs), strict=True):
        s = named(advantages(*part)[2])
        difference, total = s["mean"] - mean, n + s["count"]
        m2 += s["m2"] + difference**2 * n * s["count"] / max(total, 1)
        mean, n = mean + difference * s["count"] / max(total, 1), total
    torch.testing.assert_close([n, mean, m2], [whole["count"], whole["mean"], whole["m2"]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_and_other_rows_change_no_bit(backend):
    args = ops.ppo_advantages.make_inputs(67, 1000, device="cpu", dtype=torch.float32, bootstrap=True)
    op, threads, results = ops.ppo_advantages.backend(backend), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(op(*args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    row = op(*(x[7:8] if isinstance(x, torch.Tensor) else x for x in args))
    for i in (0, 1, 3):
        assert torch.equal(row[i], results[0][i][7:8])


@pytest.mark.skipif(not ops.ppo_advantages.can_run("triton", "cpu"), reason="Triton cannot be forced on the CPU here")
@pytest.mark.parametrize("T, estimator", [(66, "k1"), (100, "k2"), (129, "k3"), (80, "abs")])
@pytest.mark.exhaustive(1)
def test_rows_split_over_programs_or_not_give_the_same_bits(monkeypatch, T, estimator):
    """Triton's tiles have 16 tokens, as on a GPU with 1 or 1000 SMs; masked tokens hold NaN."""
    from rlhf_fast.kernels.triton import _scan, launch

    monkeypatch.setattr(_scan, "TILE", 16)
    monkeypatch.setattr(_scan, "MAPS_AT_ONCE", type(_scan.MAPS_AT_ONCE)(3))
    *inputs, scores, mask = batch(10, T)
    mask[3], mask[4, 20:], mask[5, :-3] = False, False, False
    inputs = [x.masked_fill(~mask, torch.nan) for x in inputs]
    args = (*inputs, scores, mask, 0.05, estimator, 0.99, 0.95, 1.0, torch.randn(10))
    op, results = ops.ppo_advantages.backend("triton"), {}
    for num_sms in (1, 1000):
        monkeypatch.setattr(launch, "num_sms", lambda x, n=num_sms: n)
        results[num_sms] = op(*args)
    unsplit, split = results.values()
    for i in (0, 1, 3):
        assert torch.equal(unsplit[i], split[i])
    truth = ops.ppo_advantages.reference(
        *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
    )
    for got, exact in zip((*unsplit, split[2]), (*truth, truth[2]), strict=True):
        torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-6)
    alone = op(*(x[7:8] if torch.is_tensor(x) else x for x in args))
    for i in (0, 1, 3):
        assert torch.equal(alone[i], unsplit[i][7:8])


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("T", [37, 300, 1500])
def test_the_number_of_blocks_does_not_change_a_rows_bits(T, monkeypatch):
    """A block loops over several rows. Only the order in which moments merge changes."""
    module = importlib.import_module("rlhf_fast.kernels.ppo_advantages")
    op = ops.ppo_advantages.backend("simt")
    args = ops.ppo_advantages.make_inputs(27, T, "cpu", torch.float32, bootstrap=True)
    many = op(*args)
    for blocks in (1, 3):
        monkeypatch.setattr(module, "MAX_BLOCKS", blocks)
        few = op(*args)
        assert all(torch.equal(few[i], many[i]) for i in (0, 1, 3))
        torch.testing.assert_close(few[2], many[2], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_long_rows_split_over_blocks(estimator, monkeypatch):
    """The score is added at the last token, chunks before the row's end; moments and kl cover the whole row."""
    T = 4500
    t = torch.arange(T)
    mask = torch.stack([t < 0, t < 1000, t == 2000, torch.rand(T) > 0.3, t >= 3100, t < 4097])
    logprobs = -torch.rand(mask.shape) * 3
    ref, values, scores = logprobs + 0.3 * torch.randn(mask.shape), torch.randn(mask.shape), torch.randn(len(mask))
    inputs = [x.masked_fill(~mask, torch.nan) for x in (logprobs, ref, values)]
    truth = ops.ppo_advantages.reference(
        *(x.double().nan_to_num() for x in (*inputs, scores)), mask, 0.05, estimator, 0.99, 0.95, 0.0, None
    )
    op = ops.ppo_advantages.backend("simt")
    for min_length in (10000, 1024):
        monkeypatch.setattr(_gae, "MIN_LENGTH", min_length)
        assert bool(_gae.chunking(len(mask), mask.numel(), T, scores)[0]) == (min_length == 1024)
        ours = op(*inputs, scores, mask, 0.05, estimator, 0.99, 0.95)
        for x, t in zip(ours, truth, strict=True):
            torch.testing.assert_close(x.double(), t, rtol=2e-6, atol=2e-5)
        again = op(*inputs, scores, mask, 0.05, estimator, 0.99, 0.95)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_bad_arguments_name_the_rule():
    logprobs, ref, values, scores, mask = batch()
    with pytest.raises(ValueError, match="ppo_advantages: kl_estimator must be one of k1, k2, k3, abs, got 'full'"):
        ops.ppo_advantages(logprobs, ref, values, scores, mask, kl_estimator="full")
    with pytest.raises(ValueError, match=r"ppo_advantages: scores must have shape \(9,\), got \[9, 1\]"):
        ops.ppo_advantages(logprobs, ref, values, scores[:, None], mask)
    with pytest.raises(ValueError, match="must have one shape"):
        ops.ppo_advantages(logprobs, ref[1:], values, scores, mask)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if ops.ppo_advantages.can_run(b, "cpu")])
def test_a_nan_of_a_token_shows_in_the_statistics(backend):
    inputs = torch.zeros(3, 1, 3)
    inputs[2, 0, 0] = torch.nan
    stats = ops.ppo_advantages.backend(backend)(*inputs, torch.zeros(1), torch.ones(1, 3, dtype=torch.bool))[2]
    assert stats[0] == 3 and stats[1].isnan() and stats[2].isnan()


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("B, T", [(1, 1), (5, 33), (9, 260), (3, 516), (2, 1031)])
def test_16_bit_inputs_are_read_as_they_are(dtypes, B, T, monkeypatch):
    """The results are those of float32 copies, bit for bit, and the same in a second call."""
    monkeypatch.setattr(_gae, "MIN_LENGTH", 1024)
    names = ("bfloat16", "float32", "float16") if dtypes == "mixed" else (dtypes,)
    args = list(ops.ppo_advantages.make_inputs(B, T, "cpu", torch.float32, bootstrap=True, estimator="k3"))
    given = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for k, i in enumerate(given):
        args[i] = args[i].to(getattr(torch, names[k % len(names)]))
    copies = [x.float() if i in given else x for i, x in enumerate(args)]
    op = ops.ppo_advantages.backend("simt")
    ours, again = op(*args), op(*args)
    for a, b, c in zip(ours, op(*copies), again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_mask_of_integers_is_read_and_one_of_weights_is_refused():
    """A tokenizer's attention_mask is int64. A mask of 0.5 would count as whole tokens."""
    logprobs, ref, values, scores, mask = batch()
    cu_seqlens = torch.arange(0, mask.numel() + 1, mask.shape[1])
    flat = [x.flatten() for x in (ref, values)]
    calls = {
        "ppo_advantages": lambda m: ops.ppo_advantages(logprobs, ref, values, scores, m),
        "gae": lambda m: ops.gae(ref, values, m),
        "gae_packed": lambda m: ops.gae_packed(*flat, m.flatten(), cu_seqlens),
    }
    for name, call in calls.items():
        for dtype in (torch.int64, torch.int32, torch.uint8):
            assert all(map(torch.equal, call(mask), call(mask.to(dtype))))
        for weights in (mask * 0.5, mask.float(), mask.bfloat16()):
            dtype = str(weights.dtype).removeprefix("torch.")
            with pytest.raises(ValueError, match=f"^{name}: mask must be bool or integers, got {dtype}; pass"):
                call(weights)
