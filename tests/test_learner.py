"""The Learner: schedule, micro-batches, several terms, master copies, moving average, bad rows, resuming."""

import copy
import gc
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny_llama import VOCABULARY, assert_same_gradients, policy

from rlhf_fast.batches import Demonstrations, Texts, pad_rows
from rlhf_fast.config.fields import KLConfig, OptimConfig
from rlhf_fast.errors import UserError
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.training import gradient_buffers
from rlhf_fast.training.kl import KLController
from rlhf_fast.training.learner import Learner, learning_rate
from rlhf_fast.training.losses import pretrain_loss, sft_loss


def llama(dtype=torch.float32):
    """Return the same policy at every call."""
    torch.manual_seed(11)
    return policy(dtype)


def optim(**settings):
    return OptimConfig(**{"lr": 1e-3, "schedule": "constant", "micro_batch_tokens": 1000, **settings})


def demonstrations(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 13, (count,), generator=generator).tolist()
    tokens, lengths = pad_rows([torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in sizes])
    return Demonstrations(tokens, torch.randint(1, 3, (count,), generator=generator), lengths)


def texts(count=4):
    whole = demonstrations(count, seed=9)
    return Texts(whole.tokens, whole.lengths)


def weights(model):
    return {name: p.detach().clone() for name, p in model.trainable().items()}


on_both_paths = pytest.mark.parametrize(
    "path", [nullcontext, lambda: forcing("reference")], ids=["default", "reference"]
)
"""Runs a test with the step that this machine takes, compiled if it can, and with torch's."""


@on_both_paths
def test_a_step_without_items_has_no_gradient(path):
    """As a minibatch of comparisons that are all ties."""
    learner = Learner(llama(), optim(), 10)
    before = weights(learner.model)
    with path():
        found = learner.step([])
    assert found["loss"] == found["grad_norm"] == 0 and learner.steps == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner.model).items())


def test_schedule():
    cfg = OptimConfig(lr=2.0, schedule="constant", warmup_steps=10, warmup_start=0.1)
    assert learning_rate(cfg, 0, 100) == pytest.approx(0.2)
    assert learning_rate(cfg, 5, 100) == pytest.approx(1.1)
    assert [learning_rate(cfg, step, 100) for step in (10, 99)] == [2.0, 2.0]
    cfg = OptimConfig(lr=2.0, schedule="cosine", final_ratio=0.1)
    assert learning_rate(cfg, 0, 101) == 2.0
    assert learning_rate(cfg, 50, 101) == pytest.approx(1.1)
    assert learning_rate(cfg, 100, 101) == learning_rate(cfg, 500, 101) == pytest.approx(0.2)
    assert learning_rate(cfg, 0, 1) == 2.0


def test_any_micro_batches_give_the_same_loss_and_gradient():
    """Rows of different lengths: one row at a time, a few, all."""
    batch, found = demonstrations(), []
    for budget in (1, 20, 40, 10_000):
        learner = Learner(llama(), optim(micro_batch_tokens=budget), 10)
        stats = learner.step([(sft_loss, batch, 1.0)])
        learner = Learner(llama(), optim(micro_batch_tokens=budget), 10)
        found.append((stats, learner.gradient([(sft_loss, batch, 1.0)])))
    whole_stats, whole_gradient = found[-1]
    for stats, gradient in found[:-1]:
        assert stats == pytest.approx(whole_stats, rel=1e-5)
        assert_same_gradients(gradient, whole_gradient, atol=1e-7)


def test_the_gradients_of_several_terms_add_up_in_one_step():
    """The gradient of PPO-ptx is g + 27.8 g_pretrain (InstructGPT C.4)."""
    terms = [(sft_loss, demonstrations(), 1.0), (pretrain_loss, texts(), 27.8)]
    learner = Learner(llama(), optim(), 10)
    parts = [learner.gradient([(loss, batch, 1.0)]) for loss, batch, _ in terms]
    expected = {name: g + 27.8 * parts[1][name] for name, g in parts[0].items()}
    assert_same_gradients(learner.gradient(terms), expected, atol=1e-5)
    stats = learner.step(terms)
    assert stats["loss"] == pytest.approx(stats["loss/sft"] + 27.8 * stats["loss/pretrain"], rel=1e-5)
    assert learner.steps == 1


@on_both_paths
def test_the_whole_gradient_is_clipped(path):
    """Adam's step does not show a constant factor, so the test reads the first moment, (1 - beta1) of the gradient."""
    learner = Learner(llama(), optim(grad_clip=0.01, betas=(0.75, 0.95)), 10)
    with path():
        stats = learner.step([(sft_loss, demonstrations(), 1.0)])
    moments = [state["exp_avg"].double() for state in learner.adam.state.values()]
    norm = 4 * math.sqrt(sum(float((m**2).sum()) for m in moments))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert stats["grad_norm"] > 0.1


def test_weight_decay_is_for_matrices():
    learner = Learner(llama(), optim(weight_decay=0.5), 10)
    decayed = {id(p): group["weight_decay"] for group in learner.adam.param_groups for p in group["params"]}
    assert {decayed[id(p)] for p in learner.masters.values() if p.dim() > 1} == {0.5}
    assert {decayed[id(p)] for p in learner.masters.values() if p.dim() <= 1} == {0.0}


def test_the_loss_falls():
    learner, batch = Learner(llama(), optim(lr=3e-3), 30, dropout=0.0), demonstrations()
    losses = [learner.step([(sft_loss, batch, 1.0)])["loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_batch_without_items_changes_nothing():
    model, batch = llama(), demonstrations()
    learner, before = Learner(model, optim(), 10), weights(model)
    stats = learner.step([(sft_loss, batch._replace(prompt_lengths=batch.lengths), 1.0)])
    assert stats["loss"] == stats["grad_norm"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_names_the_rows(where):
    """The weights and the average stay as they were, bit for bit."""
    model, batch = llama(), demonstrations()._replace(uids=torch.arange(40, 47))
    learner = Learner(model, optim(micro_batch_tokens=30), 10, ema=0.9)
    learner.step([(sft_loss, batch, 1.0)])
    before = {**weights(model), **{f"ema {name}": p.clone() for name, p in learner.average.items()}}

    def damaged_loss(model, part, num_items):
        loss, stats = sft_loss(model, part, num_items)
        for uid in part.uids.tolist():
            if uid in (41, 45):
                loss = loss + (math.inf if where == "loss" else (loss * 0).sqrt())
        return loss, stats

    with pytest.raises(UserError, match=r"from rows 41, 45; the weights are as before"):
        learner.step([(damaged_loss, batch, 1.0)])
    after = {**weights(model), **{f"ema {name}": p for name, p in learner.average.items()}}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert learner.steps == 1
    assert all(p.grad is None for p in learner.masters.values())


def test_bfloat16_weights_have_float32_masters():
    """Each of 400 steps is too small to change a bfloat16 weight; together they do."""
    model = llama(torch.bfloat16)
    learner, before = Learner(model, optim(lr=1e-5), 400), weights(model)
    learner.step([(sft_loss, demonstrations(), 1.0)])
    assert all(torch.equal(p, before[n]) for n, p in model.trainable().items() if "norm" in n)
    for _ in range(400):
        learner.apply_gradient(torch.zeros(()))  # momentum alone: no gradient, the same direction
        for p in learner.masters.values():
            p.grad = torch.full_like(p, 1e-3)
    norm = "model.norm.weight"
    assert float(learner.masters[norm].mean()) == pytest.approx(1 - 400 * 1e-5, abs=5e-4)
    assert float(model.trainable()[norm].detach().float().mean()) < 1 - 1e-3
    assert torch.equal(model.trainable()[norm], learner.masters[norm].bfloat16())


def test_bfloat16_gradients_add_up_in_float32():
    batch, found = demonstrations(), []
    for budget in (1, 10_000):
        learner = Learner(llama(torch.bfloat16), optim(micro_batch_tokens=budget), 10)
        found.append(learner.gradient([(sft_loss, batch, 1.0)]))
    assert all(g.dtype == torch.float32 for g in found[0].values())
    for name, one in found[0].items():
        assert float((one - found[1][name]).norm()) < 0.02 * float(found[1][name].norm()) + 1e-6, name


def test_float16_is_refused():
    with pytest.raises(UserError, match="use bfloat16"):
        Learner(llama(torch.float16), optim(), 10)


@on_both_paths
def test_moving_average_in_closed_form(path):
    """After n steps it is decay^n w_0 + (1 - decay) sum decay^(n - i) w_i."""
    model, decay, batch = llama(), 0.992, demonstrations()
    learner, seen = Learner(model, optim(), 10, ema=decay), [weights(model)]
    for _ in range(5):
        with path():
            learner.step([(sft_loss, batch, 1.0)])
        seen.append(weights(model))
    for name, average in learner.average.items():
        truth = decay**5 * seen[0][name].double()
        truth += (1 - decay) * sum(decay ** (5 - i) * seen[i][name].double() for i in range(1, 6))
        torch.testing.assert_close(average.double(), truth, rtol=1e-5, atol=1e-7)
    with learner.averaged():
        assert all(torch.equal(p, learner.average[name]) for name, p in model.trainable().items())
    assert all(torch.equal(p, seen[-1][name]) for name, p in model.trainable().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_learner_is_the_uninterrupted_one(dtype):
    """To the bit, with dropout: three steps, then the state is loaded into another Learner, then two steps."""
    batches = [demonstrations(seed=i) for i in range(5)]
    learner = Learner(llama(dtype), optim(schedule="cosine"), 5, dropout=0.1, ema=0.9)
    for batch in batches[:3]:
        learner.step([(sft_loss, batch, 1.0)])
    state, rng_state = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    for batch in batches[3:]:
        learner.step([(sft_loss, batch, 1.0)])
    again = Learner(llama(dtype), optim(schedule="cosine"), 5, dropout=0.1, ema=0.9)
    again.load_state_dict(state)
    torch.set_rng_state(rng_state)
    for batch in batches[3:]:
        again.step([(sft_loss, batch, 1.0)])
    assert again.steps == 5
    for ours, theirs in [(learner.params, again.params), (learner.average, again.average)]:
        assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_another_models_state_is_refused():
    learner = Learner(llama(), optim(), 5)
    state = learner.state_dict()
    state["weights"] = dict(list(state["weights"].items())[1:])
    with pytest.raises(UserError, match="weights are of another model"):
        learner.load_state_dict(state)
    with pytest.raises(UserError, match="ema are of another model"):
        Learner(llama(), optim(), 5, ema=0.9).load_state_dict(learner.state_dict())


def test_adaptive_kl_by_hand():
    """lm-human-preferences' controller: the error is clipped to +-0.2, the unit is nats per sequence."""
    control = KLController(KLConfig(coef=0.15, controller="adaptive", target=6.0, horizon=10_000))
    control.update(kl_per_sequence=6.6, kl_per_token=0.1, episodes=512)
    assert control.coef == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    control = KLController(KLConfig(coef=0.15, controller="adaptive", target=6.0, horizon=10_000))
    control.update(60.0, 0.1, 1000)
    assert control.coef == pytest.approx(0.15 * 1.02)
    control.update(0.0, 0.0, 1000)
    assert control.coef == pytest.approx(0.15 * 1.02 * 0.98)
    other = KLController(KLConfig())
    other.load_state_dict(control.state_dict())
    assert other.coef == control.coef
    by_token = KLConfig(coef=0.1, controller="adaptive", target=0.1, target_unit="token", horizon=1000)
    by_token = KLController(by_token)
    by_token.update(6.0, 0.09, 100)
    assert by_token.coef == pytest.approx(0.1 * 0.99)
    fixed = KLController(KLConfig(coef=0.02))
    fixed.update(100.0, 10.0, 512)
    assert fixed.coef == 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_learner_that_is_gone_holds_no_gradients(dtype, monkeypatch):
    """Its hooks stay on the parameters, and leave the gradients to the next learner of the same model."""
    monkeypatch.setattr(gradient_buffers, "MIN_KEPT_SIZE", 1)
    model, steps = llama(dtype), []
    for _ in range(2):
        learner = Learner(model, optim(lr=1e-30, micro_batch_tokens=20), 10)
        steps.append(learner.step([(sft_loss, demonstrations(), 1.0)])["grad_norm"])
        buffers = [weakref.ref(x) for free in learner.gradients.pool.free.values() for x in free]
        assert buffers
        del learner
        gc.collect()
        assert not any(buffer() is not None for buffer in buffers)
    assert steps[0] == steps[1] > 0
