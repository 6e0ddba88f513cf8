"""ratio_level and clip_mode of ppo_loss and linear_ppo_loss: gradients of formulas that autograd takes, in float64, and
those of GSPO and CISPO as TRL computes them."""

import importlib
import itertools

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head
from rlhf_fast.kernels.ppo_loss import ppo_loss_with_gradients

BACKENDS = ops.ppo_loss.backends
LINEAR_BACKENDS = ops.linear_ppo_loss.backends
SHAPES = [(1, 1), (3, 17), (9, 33), (2, 0), (0, 5), (2, 700)]
MODES = list(itertools.product(["ppo", "cispo"], ["token", "sequence"]))
IMPORTANCE = [None, "truncate", "mask"]
VARIANTS = [
    (mode, level, dual, importance)
    for mode, level, dual, importance in itertools.product(
        ["ppo", "cispo"], ["token", "sequence"], [0.0, 3.0], IMPORTANCE
    )
    if not (mode == "cispo" and dual)
]
NAN = float("nan")


def device_of(op, backend):
    return "cpu" if op.can_run(backend, "cpu") else "cuda"


def log_ratio_of(logprobs, old, valid, level):
    difference = torch.where(valid, logprobs, 0) - torch.where(valid, old, 0)
    if level == "token":
        return difference
    mean = difference.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return mean.expand_as(difference)


def clipped_terms(logprobs, old, advantages, valid, clip_mode, ratio_level, low, high, dual, clamp):
    """Return the terms of the loss and the ratios, as the formula says it."""
    ratio = log_ratio_of(logprobs, old, valid, ratio_level).clamp(-clamp, clamp).exp()
    if clip_mode == "cispo":
        return -advantages * ratio.detach().clamp(max=1 + high) * logprobs, ratio
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual:
        terms = torch.where(advantages < 0, torch.minimum(terms, -advantages * dual), terms)
    return terms, ratio


def importance_of(old, sampler, mode, cap, floor):
    if sampler is None:
        return torch.ones_like(old)
    weight = (old - sampler).exp()
    if mode == "truncate":
        return weight.clamp(floor, cap)
    return torch.where((weight <= cap) & (weight >= floor), weight, 0)


def random_tokens(shape, scale=0.3, dtype=torch.float32):
    """Return logprobs, old_logprobs, advantages, weights and sampler_logprobs; NaN where the weight is 0. One row is
    all so."""
    valid = torch.rand(shape) > 0.3
    if shape[0] > 2:
        valid[1] = False
    weights = ((torch.rand(shape) + 0.1) * valid).to(dtype)
    old = -3 * torch.rand(shape)
    logprobs = old + scale * torch.randn(shape)
    fields = [logprobs, old, torch.randn(shape), old + 0.5 * torch.randn(shape)]
    logprobs, old, advantages, sampler = (x.masked_fill(~valid, NAN).to(dtype) for x in fields)
    return logprobs, old, advantages, weights, sampler


def truth_of(tokens, mode, level, dual, importance, low=0.2, high=0.2, clamp=20.0, cap=1.3, floor=0.8):
    """Return the loss, its gradient by logprobs, and the statistics of the policy, in float64."""
    logprobs, old, advantages, weights, sampler = (x.double() for x in tokens)
    valid = weights != 0
    logprobs = logprobs.nan_to_num(0).requires_grad_()
    old, advantages, sampler = (x.nan_to_num(0) for x in (old, advantages, sampler))
    terms, ratio = clipped_terms(logprobs, old, advantages, valid, mode, level, low, high, dual, clamp)
    w = importance_of(old, sampler if importance else None, importance, cap, floor)
    loss = (weights * w * terms)[valid].sum()
    (grad,) = torch.autograd.grad(loss, logprobs)
    ratio, raw = ratio.detach(), (old - sampler).exp()
    is_beyond = (raw > cap) | (raw < floor) if importance else torch.zeros_like(valid)
    stats = {
        "weight": torch.ones_like(ratio),
        "kl_k1": -ratio.log(),
        "kl_k3": ratio - 1 - ratio.log(),
        "ratio": ratio,
        "ratio_square": ratio**2,
        "importance": w,
        "importance_capped": is_beyond.double(),
    }
    if mode == "cispo":
        stats |= {"clipped_low": 0 * ratio, "clipped_high": (ratio > 1 + high).double(), "clipped_dual": 0 * ratio}
    else:
        stats["clipped_low"] = ((ratio < 1 - low) & (advantages < 0)).double()
        stats["clipped_high"] = ((ratio > 1 + high) & (advantages > 0)).double()
        stats["clipped_dual"] = ((ratio > dual) & (advantages < 0) & (dual > 0)).double()
    stats = {name: (weights * x)[valid].sum().item() for name, x in stats.items()}
    stats["ratio_max"] = ratio[valid].max().item() if valid.any() else -torch.inf
    stats["ratio_min"] = ratio[valid].min().item() if valid.any() else torch.inf
    return loss.detach(), grad, stats


def run(backend, tokens, mode, level, dual, importance, low=0.2, high=0.2, clamp=20.0, cap=1.3, floor=0.8, **more):
    device = device_of(ops.ppo_loss, backend)
    logprobs, old, advantages, weights, sampler = (x.detach().to(device) for x in tokens)
    logprobs.requires_grad_()
    options = {"clip_low": low, "clip_high": high, "dual_clip": dual, "log_ratio_clamp": clamp}
    if importance:
        options |= {"importance_mode": importance, "importance_cap": cap, "importance_floor": floor}
        options["sampler_logprobs"] = sampler
    loss, _, stats = ops.ppo_loss.backend(backend)(
        logprobs, old, advantages, weights, **options, clip_mode=mode, ratio_level=level, **more
    )
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach().cpu(), grad.cpu(), dict(zip(ops.ppo_loss.stats, stats.tolist(), strict=True))


@pytest.mark.exhaustive(4, by=("backend",), slow=8)
@pytest.mark.parametrize("mode, level, dual, importance", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_loss_is_the_formula(backend, mode, level, dual, importance):
    for shape, scale, low, high, clamp in itertools.product(SHAPES, (0.3, 3.0), (0.2, 0.02), (0.28, 0.01), (20.0, 0.7)):
        if (low, high, clamp) not in ((0.2, 0.28, 20.0), (0.02, 0.01, 20.0), (0.2, 0.28, 0.7)):
            continue
        tokens = random_tokens(shape, scale)
        options = (mode, level, dual, importance, low, high, clamp)
        loss, grad, stats = truth_of(tokens, *options)
        found, found_grad, found_stats = run(backend, tokens, *options)
        tolerance = 3e-6 * (1 + sum(abs(x) for x in stats.values() if abs(x) < 1e30))
        assert found.item() == pytest.approx(loss.item(), rel=1e-5, abs=tolerance)
        torch.testing.assert_close(found_grad.double(), grad, rtol=2e-5, atol=2e-6 * (1 + grad.abs().sum().item()))
        for name, value in stats.items():
            assert found_stats[name] == pytest.approx(value, rel=2e-5, abs=tolerance), name
        if grad.numel() > 10:
            assert grad.any() or clamp < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode, level", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_dtypes_are_read_as_they_are(backend, mode, level, dtype):
    tokens = random_tokens((5, 47), dtype=dtype)
    options = (mode, level, 0.0, "truncate", 0.1, 0.05)
    loss, grad, stats = truth_of(tokens, *options)
    found, found_grad, found_stats = run(backend, tokens, *options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and found_grad.dtype == dtype
    assert found.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(found_grad.double(), grad, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6)
    assert found_stats["ratio"] == pytest.approx(stats["ratio"], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_ratio_at_the_bound_is_not_clipped(backend, level):
    """The first epoch's ratio is 1, and a clip of width 0 reaches exactly to it."""
    old, weights = -torch.rand(2, 5), torch.rand(2, 5) + 0.1
    for sign in (1.0, -1.0):
        tokens = (old, old, torch.full((2, 5), sign), weights, old)
        loss, grad, stats = run(backend, tokens, "ppo", level, 0.0, None, 0.0, 0.0)
        expected = -sign * (weights if level == "token" else weights.mean(1, keepdim=True).expand(2, 5))
        torch.testing.assert_close(grad, expected)
        assert stats["clipped_low"] == stats["clipped_high"] == 0 and stats["ratio_max"] == stats["ratio_min"] == 1
        loss, grad, stats = run(backend, tokens, "cispo", level, 0.0, None, 0.0, 0.0)
        torch.testing.assert_close(grad, -sign * weights)
        torch.testing.assert_close(loss, (-sign * weights * old).sum())
        assert stats["clipped_high"] == 0
        tie = run(backend, tokens, "ppo", level, 1.0, None)[1]  # the dual clip's: half where A < 0
        torch.testing.assert_close(tie, expected if sign > 0 else expected / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cispo_by_hand(backend):
    """Ratios 2, 1/2 and e^30, A = 1, and A = -1, where PPO would clip nothing above; the cap is 1.5."""
    old = torch.tensor([-4.0, -1.0, -35.0])
    logprobs = old + torch.tensor([2.0, 0.5, 1.0]).log() + torch.tensor([0.0, 0.0, 30.0])
    for sign in (1.0, -1.0):
        tokens = (logprobs, old, torch.full((3,), sign), torch.tensor([1.0, 2.0, 1.0]), old)
        loss, grad, stats = run(backend, tokens, "cispo", "token", 0.0, None, -0.5, 0.5)
        torch.testing.assert_close(grad, -sign * torch.tensor([1.5, 1.0, 1.5]))
        assert loss.item() == pytest.approx((grad * logprobs).sum().item(), rel=1e-6)
        assert stats["clipped_high"] == 2 and stats["clipped_low"] == stats["clipped_dual"] == 0


def trl_loss(logps, old, advantages, mask, level, low, high, loss_type):
    """Return GRPOTrainer._compute_loss's, trl 1.16, for advantages (B,): the lines of GSPO and of CISPO."""
    log_ratio = logps - old
    if level == "token":
        log_importance_weights = log_ratio
    else:
        log_importance_weights = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        log_importance_weights = log_importance_weights.unsqueeze(-1)
    coef_1 = torch.exp(log_importance_weights)
    if loss_type == "cispo":
        clamped_ratios = torch.clamp(coef_1, max=high).detach()
        per_token_loss = -clamped_ratios * advantages.unsqueeze(1) * logps
    else:
        coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
        per_token_loss = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    return (per_token_loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gspo_and_cispo_are_trls(backend):
    mask = (torch.arange(29) < torch.tensor([[29], [3], [11], [1], [20]] * 6)).double()
    old = -2 * torch.rand(30, 29).double()
    logprobs = (old + 0.4 * torch.randn(30, 29).double()).requires_grad_()
    advantages = torch.randn(30).double()
    for level, high, kind in (("sequence", 0.04, "grpo"), ("token", 1.2, "cispo"), ("sequence", 1.03, "cispo")):
        theirs = trl_loss(logprobs, old, advantages, mask, level, 0.03, high, kind)
        (grad,) = torch.autograd.grad(theirs, logprobs)
        rows = advantages[:, None].expand(30, 29)
        tokens = [x.float() for x in (logprobs, old, rows, mask / mask.sum())]
        mode, clip_high = ("cispo", high - 1) if kind == "cispo" else ("ppo", high)
        loss, found, stats = run(backend, [*tokens, old.float()], mode, level, 0.0, None, 0.03, clip_high)
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(found.double(), grad, rtol=2e-5, atol=1e-7)
        assert 0 < stats["clipped_high"] < 1


@pytest.mark.parametrize("mode, level", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend, mode, level):
    """The token counts; those of weight 0 are NaN already."""
    tokens = random_tokens((4, 13))
    row, column = 2, int((tokens[3][2] != 0).int().argmax())
    clean = run(backend, tokens, mode, level, 0.0, "mask")[1]
    assert not clean.isnan().any() and clean[1].eq(0).all() and clean[tokens[3] == 0].eq(0).all()
    for field in range(3):
        changed = [x.clone() for x in tokens]
        changed[field][row, column] = NAN
        loss, grad, stats = run(backend, changed, mode, level, 0.0, "mask", floor=0.0, cap=1e9)
        reached = (tokens[3] != 0) & (torch.arange(4) == row)[:, None]
        if level == "token" or (mode == "cispo" and field == 2):
            reached &= torch.arange(13) == column
        assert torch.equal(grad.isnan(), reached) and loss.isnan()
        assert (field == 2) == (stats["ratio"] == stats["ratio"])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])
@pytest.mark.parametrize("mode", ["ppo", "cispo"])
def test_threads_change_no_bit_of_rows(backend, mode):
    """Rows in many chunks: longer and shorter than a chunk, more than there are chunks, and few whose tokens the
    threads share, the last part of which has no weight."""
    before = torch.get_num_threads()
    for shape in ((11, 9000), (300, 1031), (40000, 3), (17, 9000), (3, 70001), (1, 131069)):
        tokens, found = random_tokens(shape), []
        tokens[3][-1, -9000:] = 0
        truth = truth_of(tokens, mode, "sequence", 0.0, None)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(run(backend, tokens, mode, "sequence", 0.0, None))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x[1], found[0][1]) and x[0] == found[0][0] and x[2] == found[0][2] for x in found)
        assert found[0][0].item() == pytest.approx(truth[0].item(), rel=1e-4, abs=1e-5 * truth[2]["weight"])
        torch.testing.assert_close(found[0][1].double(), truth[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu")])
@pytest.mark.parametrize("mode, level", MODES)
def test_the_number_of_rows_changes_no_bit_of_a_row(backend, mode, level):
    """Up to 16 rows of 8,192 tokens are shared by the threads, 17 are not. Prime lengths end within a vector, and a
    row's last segment may be short or have no weight."""
    for length in (8192, 4099, 8191, 8209, 12289, 70001):
        tokens = [x * 0.03 if i == 2 else x for i, x in enumerate(random_tokens((17, length)))]
        tokens[3][2, -4100:] = 0
        expected = run(backend, tokens, mode, level, 0.0, "truncate")[1]
        assert expected[tokens[3] != 0].ne(0).float().mean() > 0.5
        for rows in (16, 3, 1):
            found = run(backend, [x[:rows] for x in tokens], mode, level, 0.0, "truncate")[1]
            assert torch.equal(found, expected[:rows]), (length, rows, (found != expected[:rows]).any(1).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_shorter_than_what_a_thread_reads(backend):
    """Several sequences are in one load of a GPU's thread, and the last one ends within it."""
    for shape in ((7, 1), (5, 2), (3, 3), (3, 5), (2, 4)):
        tokens = random_tokens(shape)
        for mode in ("ppo", "cispo"):
            loss, grad, stats = truth_of(tokens, mode, "sequence", 0.0, None)
            found, found_grad, found_stats = run(backend, tokens, mode, "sequence", 0.0, None)
            assert found.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
            torch.testing.assert_close(found_grad.double(), grad, rtol=2e-5, atol=1e-5)
            assert found_stats["ratio"] == pytest.approx(stats["ratio"], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_pass_and_the_values_part(backend):
    """The value's loss is that of token-level ratios."""
    args = ops.ppo_loss.make_inputs((6, 31), device_of(ops.ppo_loss, backend), torch.bfloat16)
    op = ops.ppo_loss.backend(backend)
    expected, values = op(*args)[1], args[4]
    for mode in ("ppo", "cispo"):
        policy, value, _ = op(*args[:-2], mode, "sequence")
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        loss = 3 * policy + 0.5 * value
        first = [x.clone() for x in torch.autograd.grad(loss, (args[0], values), retain_graph=True)]
        second = torch.autograd.grad(loss, (args[0], values))
        assert all(
            torch.equal(a, b) and a.any() and a.dtype == torch.bfloat16 for a, b in zip(first, second, strict=True)
        )
        alone = torch.autograd.grad(op(args[0].detach(), *args[1:-2], mode, "sequence")[1], values)[0]
        torch.testing.assert_close(alone * 0.5, first[1], rtol=0.01, atol=1e-6)


def test_bad_modes_name_the_rule():
    x = torch.zeros(2, 3)
    head = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    calls = {
        "ppo_loss": lambda x, **options: ops.ppo_loss(x, x, x, x, **options),
        "linear_ppo_loss": lambda x, **options: ops.linear_ppo_loss(*head, *[torch.zeros(3)] * 3, **options),
    }
    for name, call in calls.items():
        for options, message in (
            ({"clip_mode": "gspo"}, "clip_mode must be one of ppo, cispo, got 'gspo'"),
            ({"ratio_level": 3}, "ratio_level must be one of token, sequence, got 3"),
            ({"clip_mode": "cispo", "dual_clip": 3.0}, r"clip_mode='cispo' has no dual clip, got dual_clip=3\.0"),
            ({"ratio_level": "sequence"}, r"ratio_level='sequence' needs a row for each sequence, \(B, T\), got \[3\]"),
        ):
            with pytest.raises(ValueError, match=f"^{name}: {message}$"):
                call(x[0], **options)


def random_rows(shape, D, V, dtype=torch.float32):
    hidden, weight = 2 * torch.randn(*shape, D), torch.randn(V, D) / D**0.5
    targets = torch.randint(V, shape).masked_fill(torch.rand(shape) < 0.2, -100)
    weights = (torch.rand(shape) + 0.1) * (torch.rand(shape) > 0.2)
    if shape[0] > 2:
        weights[1] = 0
    invalid = (targets == -100) | (weights == 0)
    logprobs = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    rows = [logprobs + 0.3 * torch.randn(shape), torch.randn(shape), logprobs + 0.2 * torch.randn(shape)]
    old, advantages, ref = (x.masked_fill(invalid, NAN) for x in rows)
    hidden = hidden.masked_fill((targets == -100)[..., None], NAN)
    return hidden.to(dtype), weight.to(dtype), targets, old, advantages, weights, ref


def linear_truth(rows, mode, level, dual, low, high, clamp, kl_coef, entropy_coef):
    hidden, weight, targets, old, advantages, weights, ref = (x.double() if x.is_floating_point() else x for x in rows)
    valid = (targets != -100) & (weights != 0)
    hidden = hidden.nan_to_num(0).requires_grad_()
    weight = weight.clone().requires_grad_()
    old, advantages, ref = (x.nan_to_num(0) for x in (old, advantages, ref))
    logp = torch.log_softmax(hidden @ weight.T, -1)
    logprobs = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    terms, ratio = clipped_terms(logprobs, old, advantages, valid, mode, level, low, high, dual, clamp)
    kl = (logprobs - ref) ** 2 / 2
    loss = (weights * (terms + kl_coef * kl - entropy_coef * entropy))[valid].sum()
    sums = {"ratio": ratio, "policy_loss": terms, "ref_kl": kl, "entropy": entropy}
    if mode == "cispo":
        sums["clipped_high"] = (ratio > 1 + high).double()
    stats = {name: (weights * x)[valid].sum().item() for name, x in sums.items()}
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight)), stats


@pytest.mark.exhaustive(3, by=("backend",), slow=6)
@pytest.mark.parametrize("mode, level, dual", [v[:3] for v in VARIANTS if v[3] is None])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_linear_ppo_loss_is_the_formula(backend, mode, level, dual):
    device = device_of(ops.linear_ppo_loss, backend)
    for shape, V in (((4, 9), 67), ((3, 1), 1030), ((1, 1), 2), ((2, 0), 5), ((0, 3), 5)):
        for low, high, kl_coef, entropy_coef in ((0.2, 0.28, 0.0, 0.0), (0.02, 0.01, 0.3, 0.1)):
            rows = random_rows(shape, 12, V)
            loss, grads, stats = linear_truth(rows, mode, level, dual, low, high, 20.0, kl_coef, entropy_coef)
            hidden, weight, targets, *others, ref = (x.to(device) for x in rows)
            hidden.requires_grad_(), weight.requires_grad_()
            options = {"clip_low": low, "clip_high": high, "dual_clip": dual, "clip_mode": mode, "ratio_level": level}
            options |= {"kl_coef": kl_coef, "entropy_coef": entropy_coef}
            op = ops.linear_ppo_loss.backend(backend)
            found, _, _, sums = op(hidden, weight, targets, *others, ref, **options)
            found_grads = torch.autograd.grad(found, (hidden, weight))
            sums = dict(zip(ops.linear_ppo_loss.stats, sums.tolist(), strict=True))
            assert found.item() == pytest.approx(loss.item(), rel=2e-5, abs=1e-5)
            for ours, truth in zip(found_grads, grads, strict=True):
                torch.testing.assert_close(ours.double().cpu(), truth, rtol=1e-4, atol=1e-5)
            for name, value in stats.items():
                assert sums[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
            with torch.no_grad():
                assert op(hidden, weight, targets, *others, ref, **options)[0].item() == pytest.approx(
                    found.item(), rel=1e-5, abs=1e-6
                )


@pytest.mark.parametrize("backend", [name for name in LINEAR_BACKENDS if name.startswith(("cpu", "triton"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_whose_logits_are_not_kept(backend, dtype, monkeypatch):
    """Four products give what three do."""
    rows = random_rows((5, 8), 40, 1031, dtype)
    found = []
    for kept in (1 << 30, 1 << 14):
        if backend == "triton":
            gpu_head = importlib.import_module("rlhf_fast.kernels.triton._head")
            monkeypatch.setattr(gpu_head, "CHUNK_BYTES", kept)
            monkeypatch.setattr(gpu_head, "MIN_CHUNK_ROWS", 16)
        monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", kept)
        monkeypatch.setattr(cpu_head, "KEPT_BYTES", kept)
        hidden, weight = (x.clone().requires_grad_() for x in rows[:2])
        loss, logprobs, _, _ = ops.linear_ppo_loss.backend(backend)(
            hidden, weight, *rows[2:], kl_coef=0.1, clip_high=0.02, ratio_level="sequence"
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight)), logprobs))
    if backend == "triton":  # by the library's products both times, whatever the number of chunks
        assert torch.equal(found[0][-1], found[1][-1])
    bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-3}
    torch.testing.assert_close(*found, **bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_transposed_sequences_is_contiguous(backend):
    """As the op tells torch.compile, whose code would read it at other places."""
    logprobs, old, advantages = (torch.randn(6, 4).t() for _ in range(3))
    weights = torch.rand(6, 4).t()
    options = [ops.ppo_loss.defaults.get(name) for name in ops.ppo_loss.names[4:]]
    options[ops.ppo_loss.names[4:].index("ratio_level")] = "sequence"
    args = ops.ppo_loss.normalized(logprobs, old, advantages, weights, *options)
    grad = ppo_loss_with_gradients.backend(backend)(*args, True, False, True)[3]
    if backend != "reference":
        assert grad.is_contiguous()
    x = logprobs.clone(memory_format=torch.contiguous_format).requires_grad_()
    whole = (t.contiguous() for t in (old, advantages, weights))
    loss = ops.ppo_loss.reference(*ops.ppo_loss.normalized(x, *whole, *options))[0]
    torch.testing.assert_close(grad, torch.autograd.grad(loss, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["ppo", "cispo"])
@pytest.mark.parametrize("backend", LINEAR_BACKENDS)
def test_a_nan_stays_in_its_sequence(backend, mode):
    hidden, weight, targets, old, advantages, weights, _ = random_rows((4, 7), 8, 33)
    counts = (targets != -100) & (weights != 0)
    row = 3
    targets[row, 2], weights[row, 2], old[row, 2], advantages[row, 2], hidden[row, 2] = 1, 0.5, -2.0, 1.0, 0.1
    counts[row, 2] = True
    for field in (old, advantages):
        changed = [old.clone(), advantages.clone()]
        changed[0 if field is old else 1][row, 2] = NAN
        x = hidden.clone().requires_grad_()
        loss, _, _, _ = ops.linear_ppo_loss.backend(backend)(
            x, weight, targets, *changed, weights, clip_mode=mode, ratio_level="sequence"
        )
        reached = counts & (torch.arange(4) == row)[:, None]
        if mode == "cispo" and field is advantages:
            reached &= torch.arange(7) == 2
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.isnan() and torch.equal(grad.isnan().all(-1), reached)
        assert torch.equal(grad.isnan().any(-1), reached)
