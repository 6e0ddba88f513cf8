"""ppo_loss beyond its reference: values by hand at every clip, tokens that are never read, sums over micro-batches."""

import importlib
import math
from contextlib import nullcontext

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from rlhf_fast import ops
from rlhf_fast.kernels._backends import TRITON_DEVICES
from rlhf_fast.kernels._launch import scale_in_place
from rlhf_fast.kernels._op import OPS
from rlhf_fast.kernels._ppo import kl_estimate, kl_grad
from rlhf_fast.kernels._ppo_loss import PPOStats

BACKENDS = ops.ppo_loss.backends
KERNELS = [name for name in BACKENDS if name.startswith("cpu")]
NAN = float("nan")


def device_of(backend: str) -> str:
    return "cpu" if ops.ppo_loss.can_run(backend, "cpu") else "cuda"


@pytest.fixture(params=BACKENDS)
def ppo(request):
    """Return ppo_loss for lists or tensors: both losses, and stats by name."""
    device = device_of(request.param)

    def as_tensor(x):
        return torch.as_tensor(x, device=device) if isinstance(x, (list, torch.Tensor)) else x

    def run(*args, **kwargs):
        args, kwargs = map(as_tensor, args), {k: as_tensor(v) for k, v in kwargs.items()}
        policy, value, stats = ops.ppo_loss.backend(request.param)(*args, **kwargs)
        return policy.cpu(), value.cpu(), dict(zip(ops.ppo_loss.stats, stats.tolist(), strict=True))

    return run


def one_token(ppo, log_ratio, advantage, **options):
    """Return the loss, its gradient by logprobs and stats of one token whose old log-probability is 0."""
    logprobs = torch.tensor([float(log_ratio)], requires_grad=True)
    loss, _, stats = ppo(logprobs, [0.0], [float(advantage)], [1.0], **options)
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].item(), stats


OPTIONS = [
    {},
    {"dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.28, "whiten": True},
    {"value_clip": 0.0, "log_ratio_clamp": 0.0},
    {"far": True, "log_ratio_clamp": 2.0, "dual_clip": 3.0},
    {"value": False, "sampler": "truncate"},
    {"value": False, "sampler": "mask"},
    {"policy": False},
    {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.05, "sampler": "mask", "importance_floor": 0.8},
    {"ratio_level": "sequence", "far": True, "log_ratio_clamp": 2.0, "dual_clip": 3.0, "whiten": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck_in_float64(options):
    args = ops.ppo_loss.make_inputs((4, 5), device="cpu", dtype=torch.float64, **options)
    args = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args]
    wrt = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    weights, value_weights = args[3], args[3] if args[7] is None else args[7]
    for x in wrt:  # gradcheck moves every element, also those of weight 0
        x.data[(weights if x is args[0] else value_weights) == 0] = 0.5

    def losses(*moved):
        moved_args = list(args)
        for x, new in zip(wrt, moved, strict=True):
            moved_args[next(i for i, y in enumerate(args) if y is x)] = new
        return tuple(x for x in ops.ppo_loss(*moved_args)[:2] if x.requires_grad)

    assert torch.autograd.gradcheck(losses, wrt, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.79, 0.81, 1.19, 1.21, 1.5])
def test_the_clip_by_hand(ppo, ratio, advantage):
    loss, grad, stats = one_token(ppo, math.log(ratio), advantage)
    low, high = ratio < 0.8 and advantage < 0, ratio > 1.2 and advantage > 0
    clipped = min(ratio, 1.2) if advantage > 0 else max(ratio, 0.8)
    assert loss == pytest.approx(-advantage * clipped, rel=1e-5)
    assert grad == pytest.approx(0 if low or high else -advantage * ratio, rel=1e-5)
    assert (stats["clipped_low"], stats["clipped_high"], stats["clipped_dual"]) == (low, high, 0)
    assert stats["ratio"] == stats["ratio_max"] == stats["ratio_min"] == pytest.approx(ratio, rel=1e-5)
    assert stats["kl_k1"] == pytest.approx(-math.log(ratio), rel=1e-5, abs=1e-6)
    assert stats["kl_k3"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4, abs=1e-6)


def test_a_ratio_at_the_bound_has_a_gradient(ppo):
    """With ratio 1 and a clip of width 0 the bound is reached exactly. As with torch.clamp the gradient is kept."""
    for advantage in (1.5, -1.5):
        loss, grad, stats = one_token(ppo, 0.0, advantage, clip_low=0.0, clip_high=0.0)
        assert (loss, grad) == (-advantage, -advantage)
        assert stats["clipped_low"] == stats["clipped_high"] == 0


@pytest.mark.parametrize("log_ratio", [25.0, -25.0, 100.0, -100.0, float("inf")])
def test_log_ratios_beyond_the_clamp_have_no_gradient(ppo, log_ratio):
    for advantage in (1.0, -1.0):
        loss, grad, stats = one_token(ppo, log_ratio, advantage)
        assert grad == 0 and math.isfinite(loss)
        assert stats["ratio"] == pytest.approx(math.exp(math.copysign(20, log_ratio)), rel=1e-5)
    loss, _, _ = one_token(ppo, 2.5, -1.0, log_ratio_clamp=2.0)
    assert loss == pytest.approx(math.exp(2), rel=1e-5)


def test_dual_clip_and_clip_high(ppo):
    for ratio, bounded in ((2.0, False), (5.0, True)):
        loss, grad, stats = one_token(ppo, math.log(ratio), -2.0, dual_clip=3.0)
        assert loss == pytest.approx(6 if bounded else 4, rel=1e-5) and stats["clipped_dual"] == bounded
        assert grad == pytest.approx(0 if bounded else 4, rel=1e-5)
    assert one_token(ppo, math.log(5.0), 2.0, dual_clip=3.0)[0] == pytest.approx(-2.4, rel=1e-5)
    assert one_token(ppo, 0.0, -2.0, dual_clip=1.0)[1] == 1  # the tie at ratio = c: half the gradient
    assert one_token(ppo, math.log(1.25), 1.0, clip_high=0.28)[1] == pytest.approx(-1.25, rel=1e-5)
    assert one_token(ppo, math.log(1.25), 1.0, clip_low=0.28)[1] == 0
    assert one_token(ppo, math.log(0.75), -1.0, clip_low=0.28)[1] == pytest.approx(0.75, rel=1e-5)


@pytest.mark.parametrize(
    "value, old, target, clip, loss, grad, is_clipped",
    [
        (0.5, 0.0, 1.0, 0.0, 0.125, -0.5, 0),  # off
        (0.25, 0.125, 1.0, 0.25, 0.28125, -0.75, 0),  # inside
        (0.5, 0.0, 1.0, 0.25, 0.28125, 0.0, 1),  # moved too far towards the target: the clipped error is larger
        (0.5, 0.0, -1.0, 0.25, 1.125, 1.5, 0),  # moved away from it
        (0.25, 0.0, 1.0, 0.25, 0.28125, -0.75, 0),  # at the bound itself
        (0.5, 0.0, 0.375, 0.25, 0.0078125, 0.0625, 0),  # tie: half
    ],
)
def test_the_value_clip_by_hand(ppo, value, old, target, clip, loss, grad, is_clipped):
    values = torch.tensor([value], requires_grad=True)
    policy_loss, value_loss, stats = ppo(None, None, None, [1.0], values, [old], [target], value_clip=clip)
    assert policy_loss == 0 and value_loss == loss
    assert torch.autograd.grad(value_loss, values)[0].item() == grad
    assert stats["value_clipped"] == is_clipped and stats["value_error"] == (value - target) ** 2
    assert (stats["value"], stats["return"], stats["value_weight"], stats["weight"]) == (value, target, 1, 0)


def test_importance_weights(ppo):
    """Ratio 1, advantage 1, importance weights 1/2, 2 and 8, cap 4."""
    logprobs = torch.zeros(3, requires_grad=True)
    sampler = [math.log(2), -math.log(2), -math.log(8)]
    for mode, last in (("truncate", 4.0), ("mask", 0.0)):
        options = {"sampler_logprobs": sampler, "importance_cap": 4.0, "importance_mode": mode}
        loss, _, stats = ppo(logprobs, [0.0] * 3, [1.0] * 3, [1.0] * 3, **options)
        grad = torch.autograd.grad(loss, logprobs)[0]
        torch.testing.assert_close(grad, torch.tensor([-0.5, -2.0, -last]))
        assert loss.item() == pytest.approx(-2.5 - last, rel=1e-6)
        assert stats["importance"] == pytest.approx(2.5 + last) and stats["importance_capped"] == 1
        assert stats["weight"] == stats["ratio"] == 3


def test_importance_weights_have_a_floor(ppo):
    """Importance weights 1/2, 2, 8 and 1, with bounds of 1 and 4; the two at a bound are not beyond it."""
    logprobs = torch.zeros(4, requires_grad=True)
    sampler = [math.log(2), -math.log(2), -math.log(8), 0.0]
    for mode, first, third in (("truncate", 1.0, 4.0), ("mask", 0.0, 0.0)):
        options = {"sampler_logprobs": sampler, "importance_cap": 4.0, "importance_floor": 1.0}
        loss, _, stats = ppo(logprobs, [0.0] * 4, [1.0] * 4, [3.0, 1.0, 1.0, 1.0], **options, importance_mode=mode)
        grad = torch.autograd.grad(loss, logprobs)[0]
        torch.testing.assert_close(grad, torch.tensor([-3 * first, -2.0, -third, -1.0]))
        assert loss.item() == pytest.approx(-3 * first - 3 - third, rel=1e-6)
        assert stats["importance"] == pytest.approx(3 * first + 3 + third) and stats["importance_capped"] == 4
        assert stats["weight"] == stats["ratio"] == 6


@pytest.mark.parametrize("number", [0.25, 3, True])
def test_a_number_is_the_weight_of_every_token(ppo, number):
    """Also a tensor of no dimension, for either loss."""
    logprobs, old, advantages, _, values, old_values, returns = random_args((3, 17))
    full = torch.full((3, 17), float(number))
    for dtype in (torch.float32, torch.bfloat16):
        policy_args = [logprobs.detach().to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype)]
        value_args = [values.detach().to(dtype).requires_grad_(), old_values.to(dtype), returns.to(dtype)]
        found = []
        for weights in (full, number, torch.tensor(float(number)), torch.tensor(number)):
            out = ppo(*policy_args, weights, *value_args, 2 * number if weights is number else 2 * full)
            alone = ppo(None, None, None, weights, *value_args)
            grads = torch.autograd.grad(out[0] + out[1] + alone[1], [policy_args[0], value_args[0]])
            found.append((*out[:2], alone[1], *grads, out[2]))
        assert found[0][0] != 0 and found[0][1].item() == pytest.approx(2 * found[0][2].item(), rel=1e-6)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other[:5], found[0][:5], strict=True))
            assert other[5] == found[0][5]


@pytest.mark.parametrize("fill", [NAN, float("inf"), -float("inf"), 1e38])
def test_nothing_is_read_where_the_weight_is_0(ppo, fill):
    n = 67
    valid = torch.rand(n) > 0.4
    fields = torch.randn(7, n)
    weights = torch.rand(n) * valid
    results = []
    for filled in (fields.masked_fill(~valid, 0), fields.masked_fill(~valid, fill)):
        logprobs, old, advantages, values, old_values, returns, sampler = filled
        logprobs, values = logprobs.clone().requires_grad_(), values.clone().requires_grad_()
        out = ppo(logprobs, old, advantages, weights, values, old_values, returns, sampler_logprobs=sampler)
        results.append((*out[:2], *torch.autograd.grad(out[0] + out[1], [logprobs, values]), out[2]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:4], results[1][:4], strict=True))
    assert results[0][4] == results[1][4]
    assert results[0][2][~valid].eq(0).all() and results[0][3][~valid].eq(0).all()


def test_minus_infinity_as_old_logprob(ppo):
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    for weights in ([1.0, 0.0], [1.0, 1.0]):
        loss, _, stats = ppo(logprobs, [-1.0, -float("inf")], [1.0, 1.0], weights)
        assert torch.equal(torch.autograd.grad(loss, logprobs)[0], torch.tensor([-1.0, 0.0]))
        assert loss.item() == pytest.approx(-1 - 1.2 * weights[1])
    assert stats["ratio_max"] == pytest.approx(math.exp(20), rel=1e-5)


def test_an_all_masked_batch_is_zero_and_not_nan(ppo):
    nans = torch.full((3, 11), NAN)
    logprobs, values = nans.clone().requires_grad_(), nans.clone().requires_grad_()
    policy, value, stats = ppo(logprobs, nans, nans, torch.zeros(3, 11), values, nans, nans)
    assert policy == 0 and value == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(policy + value, [logprobs, values]))
    assert (stats.pop("ratio_max"), stats.pop("ratio_min")) == (-math.inf, math.inf)
    assert set(stats.values()) == {0}


def test_a_nan_in_a_valid_token_reaches_the_outputs(ppo):
    good, bad = torch.zeros(20), torch.zeros(20)
    bad[13] = NAN
    weights = torch.ones(20)
    for field in range(3):
        fields = [bad if i == field else good for i in range(3)]
        loss, _, stats = ppo(*fields, weights, dual_clip=3.0)
        assert loss.isnan()
        if field < 2:
            assert all(math.isnan(stats[name]) for name in ("ratio", "ratio_max", "ratio_min")), stats
        assert ppo(None, None, None, weights, *fields)[1].isnan() or field == 1
    logprobs = good.clone().requires_grad_()
    assert torch.autograd.grad(ppo(logprobs, good, bad, weights)[0], logprobs)[0][13].isnan()


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_nan_log_ratio_has_a_nan_gradient(ppo, advantage, dual_clip):
    """Its neighbours keep theirs."""
    logprobs, weights, advantages = torch.zeros(20), torch.ones(20), torch.full((20,), advantage)
    logprobs[13] = NAN
    logprobs.requires_grad_()
    loss = ppo(logprobs, torch.zeros(20), advantages, weights, dual_clip=dual_clip)[0]
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.isnan() and grad[13].isnan()
    assert grad[torch.arange(20) != 13].eq(-advantage).all()


def test_the_first_minibatch_has_ratio_1(ppo):
    logprobs = -torch.rand(4, 30)
    weights = torch.rand(4, 30) / 60
    _, _, stats = ppo(logprobs, logprobs, torch.randn(4, 30), weights)
    assert stats["ratio_max"] == stats["ratio_min"] == 1 and stats["kl_k1"] == stats["kl_k3"] == 0
    assert stats["clipped_low"] == stats["clipped_high"] == 0 and stats["ratio"] == stats["weight"]


def random_args(shape=(8, 37)):
    weights = torch.rand(shape) * (torch.arange(shape[-1]) < torch.randint(1, shape[-1], (shape[0], 1)))
    old = -torch.rand(shape) * 3
    logprobs = (old + 0.3 * torch.randn(shape)).requires_grad_()
    values = torch.randn(shape, requires_grad=True)
    rest = torch.randn(3, *shape)
    return logprobs, old, rest[0], weights / weights.sum(), values, rest[1], rest[2]


def test_micro_batches_add_up(ppo):
    args = random_args()
    policy, value, stats = ppo(*args)
    whole = torch.autograd.grad(policy + 0.5 * value, [args[0], args[4]])
    for sizes in ([8], [1] * 8, [3, 5], [2, 5, 1]):
        parts = [ppo(*rows) for rows in zip(*(x.split(sizes) for x in args), strict=True)]
        torch.testing.assert_close(sum(p[0] for p in parts), policy, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sum(p[1] for p in parts), value, atol=1e-6, rtol=1e-5)
        split = torch.autograd.grad(sum(p[0] + 0.5 * p[1] for p in parts), [args[0], args[4]])
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6)
        for name in ops.ppo_loss.stats[:-2]:
            assert sum(p[2][name] for p in parts) == pytest.approx(stats[name], rel=1e-5, abs=1e-6)
        assert max(p[2]["ratio_max"] for p in parts) == stats["ratio_max"]
        assert min(p[2]["ratio_min"] for p in parts) == stats["ratio_min"]


def test_whitening_on_the_fly_is_whitening_before(ppo):
    logprobs, old, advantages, weights, *_ = random_args()
    valid_advantages = advantages[weights > 0]
    shift, scale = valid_advantages.mean(), valid_advantages.std().reciprocal()
    before = ppo(logprobs, old, (advantages - shift) * scale, weights)[0]
    for options in ((shift, scale), (shift.view(1), scale.view(1, 1)), (shift.item(), scale.item())):
        on_the_fly = ppo(logprobs, old, advantages, weights, advantage_shift=options[0], advantage_scale=options[1])[0]
        torch.testing.assert_close(on_the_fly, before, atol=1e-7, rtol=1e-6)
    assert before != ppo(logprobs, old, advantages, weights)[0]


def test_upstream_gradients_and_second_use(ppo):
    args = random_args()
    policy, value, _ = ppo(*args)
    logprob_grad = torch.autograd.grad(policy, args[0], retain_graph=True)[0]
    value_grad = torch.autograd.grad(value, args[4], retain_graph=True)[0]
    assert logprob_grad.abs().max() > 0 and value_grad.abs().max() > 0
    for scale in (1.0, -3.0, 27.8):
        both = torch.autograd.grad(scale * policy + 2 * scale * value, [args[0], args[4]], retain_graph=True)
        torch.testing.assert_close(both, (scale * logprob_grad, 2 * scale * value_grad))
    assert torch.equal(torch.autograd.grad(policy, args[0])[0], logprob_grad)
    alone = ppo(*(x.detach() for x in args[:4]), *args[4:])
    assert not alone[0].requires_grad and torch.equal(torch.autograd.grad(alone[1], args[4])[0], value_grad)


def test_without_gradient_no_gradient_is_made(ppo, monkeypatch):
    args = random_args()

    def fail(*_):
        raise AssertionError("gradients were computed though not needed")

    monkeypatch.setattr(OPS["ppo_loss_with_gradients"], "run", fail)
    with torch.no_grad():
        ppo(*args)
    ppo(*(x.detach() for x in args))


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_change_no_bit(backend):
    args = ops.ppo_loss.make_inputs((61, 1031), device="cpu", dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            policy, value, stats = ops.ppo_loss.backend(backend)(*args)
            results.append((policy, value, stats, *torch.autograd.grad(policy + value, [args[0], args[4]])))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_large_batches_keep_their_digits(backend):
    """With more tokens than 256 chunks of 4096, chunks get longer."""
    n = 256 * 4096 + 12345
    old, logprobs, values = torch.zeros(n), torch.full((n,), 0.1), torch.full((n,), 0.1)
    args = logprobs, old, torch.full((n,), -0.1), torch.full((n,), 1 / n), values, old, torch.full((n,), 3.1)
    policy, value, stats = ops.ppo_loss.backend(backend)(*args)
    assert policy.item() == pytest.approx(0.1 * math.exp(0.1), rel=2e-6) and value.item() == pytest.approx(
        4.5, rel=2e-6
    )
    assert stats[0].item() == pytest.approx(1, rel=2e-6)


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("n", [5 * 1024, 4 * 1024 + 37])
def test_split_into_few_blocks_or_many_nothing_is_left_out(n, monkeypatch):
    module = importlib.import_module("rlhf_fast.kernels.ppo_loss")
    args = ops.ppo_loss.make_inputs((n,), device="cpu", dtype=torch.float32, sampler="truncate")
    results = []
    for blocks in (module.MAX_BLOCKS, 2, 1):
        monkeypatch.setattr(module, "MAX_BLOCKS", blocks)
        policy, value, stats = ops.ppo_loss.backend("simt")(*args)
        results.append((policy, value, *torch.autograd.grad(policy + value, [args[0], args[4]]), stats))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(other[2:4], results[0][2:4], strict=True))


@pytest.mark.parametrize("backend", KERNELS + [name for name in BACKENDS if name == "simt"])
def test_pointers_need_no_alignment(backend):
    args = [
        x.detach() if isinstance(x, torch.Tensor) else x for x in ops.ppo_loss.make_inputs((777,), "cpu", torch.float32)
    ]
    shifted = [torch.cat([x[:1], x])[1:] if isinstance(x, torch.Tensor) and x.dim() else x for x in args]
    assert shifted[0].data_ptr() % 16 and not args[0].data_ptr() % 16
    for inputs in (args, shifted):
        inputs[0].requires_grad_(), inputs[4].requires_grad_()
    results = [ops.ppo_loss.backend(backend)(*inputs) for inputs in (args, shifted)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(r[0] + r[1], [x[0], x[4]]) for r, x in zip(results, (args, shifted), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.skipif("cpu" not in TRITON_DEVICES, reason="Triton's kernels cannot be forced on the CPU here")
@pytest.mark.parametrize("n", [5 * 512, 4 * 512 + 37])
def test_a_program_that_walks_several_tiles_leaves_none_out(n, monkeypatch):
    from rlhf_fast.kernels.triton import ppo_loss

    args = ops.ppo_loss.make_inputs((n,), device="cpu", dtype=torch.float32, sampler="truncate")
    results = []
    for programs in (ppo_loss.MAX_PROGRAMS, 2, 1):
        monkeypatch.setattr(ppo_loss, "MAX_PROGRAMS", programs)
        policy, value, stats = ops.ppo_loss.backend("triton")(*args)
        results.append((policy, value, *torch.autograd.grad(policy + value, [args[0], args[4]]), stats))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(other[2:4], results[0][2:4], strict=True))


def test_stats_have_names():
    args = ops.ppo_loss.make_inputs((40,), device="cpu", dtype=torch.float32)
    stats = ops.ppo_loss(*args)[2]
    by_name = dict(zip(ops.ppo_loss.stats, stats, strict=True))
    assert PPOStats(*stats).ratio_max == by_name["ratio_max"] and PPOStats(*stats).return_ == by_name["return"]


def test_kl_estimates_by_hand():
    d = torch.tensor([0.0, 0.5, -2.0])
    for estimator, values in (
        ("k1", [0.0, 0.5, -2.0]),
        ("k2", [0.0, 0.125, 2.0]),
        ("k3", [0.0, math.exp(-0.5) - 0.5, math.exp(2.0) - 3.0]),
        ("abs", [0.0, 0.5, 2.0]),
    ):
        for clamp in (None, 20.0):
            torch.testing.assert_close(kl_estimate(d, estimator, clamp), torch.tensor(values))


def test_k3_is_bounded_in_one_of_two_ways():
    """A loss clamps d in both terms; the rewards of ppo_advantages bound the exponent alone."""
    d = torch.tensor([-30.0, 5.0], dtype=torch.float64)
    exact = torch.tensor([math.exp(20) - 1 - 30, math.exp(-5) - 1 + 5], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(d, "k3"), exact, rtol=1e-14, atol=0)
    clamped = torch.tensor([math.exp(3) - 1 - 3, math.exp(-3) - 1 + 3], dtype=torch.float64)
    torch.testing.assert_close(kl_estimate(d, "k3", 3.0), clamped, rtol=1e-14, atol=0)
    assert kl_grad(d, "k3", 3.0).tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_gradients_are_autograds(estimator):
    d = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(kl_estimate(d, estimator, 2.0).sum(), d)
    torch.testing.assert_close(kl_grad(d, estimator, 2.0), grad)


def test_bad_arguments_name_the_rule():
    x, short = torch.zeros(2, 3), torch.zeros(2, 2)
    for args, options, message in (
        ((x, None, x, x), {}, "the policy part needs logprobs, old_logprobs and advantages, or none"),
        ((None, None, None, x), {}, "there is neither logprobs nor values"),
        ((x, x, x, x, x), {}, "the value part needs values and returns, or none"),
        ((x, x, x, x, x, None, x), {}, "value_clip=0.2 needs old_values; value_clip=0 does without"),
        ((x, x, short, x), {}, r"all must have the shape of weights, \[2, 3\], got .*\[2, 2\]"),
        ((x, x, x, x), {"importance_floor": -1.0}, "importance_floor must be positive, or 0 for none, got -1.0"),
        ((x, x, x, x), {"importance_floor": float("nan")}, "importance_floor must be positive, or 0 for none, got nan"),
        ((x, x, x, x), {"importance_floor": 2.5}, "importance_floor=2.5 is above importance_cap=2.0; no importance"),
        ((x, x, x, short), {}, r"all must have the shape of weights, \[2, 2\], got .*\[2, 3\]"),
        ((x, x, x, x), {"importance_mode": "drop"}, "importance_mode must be one of truncate, mask, got 'drop'"),
        ((x, x, x, x), {"advantage_shift": x}, r"advantage_shift must be a number or one element, got shape \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=f"ppo_loss: {message}"):
            ops.ppo_loss(*args, **options)


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("dtypes", ["bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("n", [1, 3, 1021, 3 * 1024 + 4])
def test_16_bit_inputs_are_read_as_they_are(dtypes, n):
    """The results are those of float32 copies, bit for bit; a gradient is rounded to its input's dtype."""
    names = ("bfloat16", "float32", "float16") if dtypes == "mixed" else (dtypes,)
    args = list(ops.ppo_loss.make_inputs((n,), "cpu", torch.float32, sampler="truncate", whiten=True, grad=False))
    given = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
    for k, i in enumerate(given):
        args[i] = args[i].to(getattr(torch, names[k % len(names)]))
    run = OPS["ppo_loss_with_gradients"].backend("simt")
    ours = run(*args, True, True, True)
    copies = run(*(x.float() if isinstance(x, torch.Tensor) else x for x in args), True, True, True)
    again = run(*args, True, True, True)
    assert [x.dtype for x in ours[3:]] == [args[0].dtype, args[4].dtype]
    for a, b, c in zip(ours, copies, again, strict=True):
        assert torch.equal(a, b.to(a.dtype)) and torch.equal(a, c)


GPU_KERNELS = [name for name in BACKENDS if name in ("simt", "triton", "cuda")]


@pytest.mark.parametrize("backend", GPU_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 1.0), (1.0, -3.0), (2.0, 0.25)])
def test_gradients_are_scaled_in_place_unless_the_factor_is_1(backend, dtype, factors):
    device = device_of(backend)
    n = 3 * 1024 + 5
    x, y = torch.randn(2, n, device=device).to(dtype)
    x_factor, y_factor = torch.tensor(factors, device=device)
    expected = [(x.float() * x_factor).to(dtype), (y.float() * y_factor).to(dtype)]
    alone = y.clone()
    scale_in_place([x, y], [x_factor, y_factor], backend)
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    scale_in_place([None, alone], [None, y_factor], backend)
    assert torch.equal(alone, expected[1])


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_calls_torch_for_nothing_but_memory(dtype):
    """Both losses, stats, two gradients and the blocks' sums forward, nothing backward: for the host each call of torch
    costs as much as a launch."""
    args = ops.ppo_loss.make_inputs((4, 40), "cpu", dtype)
    op = ops.ppo_loss.backend("simt")
    op(*args)
    ones = [torch.ones(()), torch.ones(())]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        policy, value, _ = op(*args)
        torch.autograd.grad([policy, value], [args[0], args[4]], ones)
    called = {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}
    assert called == {"aten::empty": 6}


@pytest.mark.skipif("simt" not in BACKENDS, reason="CUDA's kernels do not run here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_loss_scale_keeps_small_gradients(dtype):
    """A token's gradient may be too small for float16 before the loss is multiplied by a GradScaler's scale."""
    grads = []
    for backend in ("reference", "simt"):
        torch.manual_seed(1)
        args = ops.ppo_loss.make_inputs((300,), "cpu", dtype)
        args[3].mul_(1e-5)
        policy, value, _ = ops.ppo_loss.backend(backend)(*args)
        grads.append(torch.autograd.grad(2**14 * (policy + value), [args[0], args[4]]))
    for expected, ours in zip(*grads, strict=True):
        assert ours.dtype == dtype and expected.any()
        torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts_flops", [False, True])
def test_a_second_backward_pass_gives_the_same_gradients(backend, counts_flops):
    """Also if the forward pass ran within a mode of torch and the backward pass does not."""
    args = ops.ppo_loss.make_inputs((40,), device_of(backend), torch.bfloat16)
    with FlopCounterMode(display=False) if counts_flops else nullcontext():
        policy, value, _ = ops.ppo_loss.backend(backend)(*args)
    loss, inputs = 3 * policy + 0.5 * value, [args[0], args[4]]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    expected = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c) and b.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_tensors_without_memory_of_their_own(backend):
    """Kernels cannot scale them in place: those of a subclass, and those of several factors at once."""
    args = ops.ppo_loss.make_inputs((40,), device_of(backend), torch.float32)
    op = ops.ppo_loss.backend(backend)
    policy, value, _ = op(*args)
    expected = torch.autograd.grad(3 * policy + 2 * value, [args[0], args[4]], retain_graph=True)
    factors = torch.tensor([1.0, 3.0], device=args[0].device)
    batched = torch.autograd.grad(policy, args[0], factors, is_grads_batched=True)[0]
    torch.testing.assert_close(batched[1], expected[0])
    pairs = [TwoTensor(x.detach(), x.detach()) if isinstance(x, torch.Tensor) else x for x in args]
    inputs = [pairs[0].requires_grad_(), pairs[4].requires_grad_()]
    policy, value, _ = op(*pairs)
    found = torch.autograd.grad(3 * policy + 2 * value, inputs)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is TwoTensor
        torch.testing.assert_close(a.a, b)
