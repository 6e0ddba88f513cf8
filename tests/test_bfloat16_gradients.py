"""Gradients of bfloat16 weights on the CPU: in bfloat16 after one backward pass, float32 sums after several."""

import copy

import pytest
import torch
from test_adamw_step import demonstrations, llama, needs_kernels, optim

from rlhf_fast.errors import BadRows
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.training.gradient_buffers import GradientBuffers, GradientPool
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss, sft_loss

ONE_PASS, SEVERAL = 1000, 20
"""Budgets of tokens of a micro-batch, for `demonstrations`."""


def bfloat16_learner(budget=ONE_PASS):
    return Learner(llama(torch.bfloat16), optim(micro_batch_tokens=budget), 10, ema=0.9)


def converting(learner):
    """Make a learner convert each gradient to float32 as it comes."""
    kept = learner.gradients.kept
    learner.gradients.kept = lambda converting: kept(converting=True)
    return learner


def terms(seed=0, count=1):
    return [(loss, demonstrations(seed + i), 1.0) for i, loss in enumerate((sft_loss, pretrain_loss)[:count])]


def state_of(learner):
    """Return a copy of all that the next steps depend on, as a flat list."""
    state = learner.state_dict()
    moments = [x for tensors in state["adam"].values() for x in tensors.values()]
    return [x.clone() for x in (*state["weights"].values(), *moments, *state["ema"].values(), *learner.params.values())]


@needs_kernels
@pytest.mark.parametrize(("budget", "count"), [(ONE_PASS, 1), (ONE_PASS, 2), (SEVERAL, 1)])
def test_steps_have_the_bits_of_gradients_that_were_converted_first(budget, count):
    """They have them also after another learner has loaded the state."""
    ours, theirs = bfloat16_learner(budget), converting(bfloat16_learner(budget))
    for step in range(4):
        found, expected = (learner.step(terms(step, count)) for learner in (ours, theirs))
        assert found == expected and found["grad_norm"] > 0
        assert all(torch.equal(a, b) for a, b in zip(state_of(ours), state_of(theirs), strict=True))
        if step == 1:
            state = copy.deepcopy(ours.state_dict())
            ours = bfloat16_learner(budget)
            ours.load_state_dict(state)


@needs_kernels
def test_only_gradients_of_one_backward_pass_stay_in_bfloat16():
    """They take no float32 memory, and none is left after the step."""
    for budget, count, expected in [(ONE_PASS, 1, torch.bfloat16), (ONE_PASS, 2, torch.float32)]:
        learner = bfloat16_learner(budget)
        learner._backward(terms(count=count))
        grads = learner._gradients()
        assert all(g is not None and g.dtype == expected for g in grads) and len(grads) == len(learner.masters)
        assert bool(learner.gradients.taken) == (expected == torch.float32)
        learner.apply_gradient(learner._grad_norm())
        assert not any(g is not None for g in learner._gradients()) and not learner.gradients.unconverted


@needs_kernels
def test_no_bfloat16_gradient_is_held_through_another_forward_pass():
    learner = bfloat16_learner(ONE_PASS)
    held = []

    def watching(loss):
        return lambda *args: held.append(len(learner.gradients.unconverted)) or loss(*args)

    learner._backward([(watching(loss), batch, coefficient) for loss, batch, coefficient in terms(count=2)])
    assert held == [0, 0]


@needs_kernels
def test_the_reference_has_float32_gradients_of_the_same_numbers():
    """It is forced for the whole step, or only for what follows the backward pass."""
    whole, late, ours = (bfloat16_learner() for _ in range(3))
    with forcing("reference"):
        whole._backward(terms())
        assert not whole.gradients.unconverted
    late._backward(terms())
    with forcing("reference"):
        norms = [learner._grad_norm() for learner in (whole, late)]
        assert all(p.grad.dtype == torch.float32 for learner in (whole, late) for p in learner.masters.values())
        rates = [learner.apply_gradient(norm) for learner, norm in zip((whole, late), norms, strict=True)]
    assert rates[0] == rates[1]
    ours.step(terms())
    for a, b, c in zip(state_of(whole), state_of(late), state_of(ours), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(a, c, rtol=1e-2, atol=1e-4)


def test_a_learners_gradient_is_float32():
    """It has autograd's numbers, and stays as it is during the next steps."""
    learner = bfloat16_learner()
    found = learner.gradient(terms())
    before = {name: x.clone() for name, x in found.items()}
    plain = llama(torch.bfloat16)
    plain.prepare_training()
    with plain.train_mode(None):
        sft_loss(plain, demonstrations(), demonstrations().num_items())[0].backward()
    for name, p in plain.trainable().items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], p.grad.float())
    learner.step(terms(1))
    assert all(torch.equal(x, before[name]) for name, x in found.items())


def test_two_gradients_of_one_block_are_added_in_float32():
    """Checkpointing may start a backward pass within another, for a weight that several layers share."""
    buffers, p = GradientBuffers(GradientPool()), torch.nn.Parameter(torch.randn(33).bfloat16())
    master = buffers.attach("p", p)
    given = [torch.randn(33).bfloat16() for _ in range(3)]
    with buffers.kept(converting=False):
        for g in given:
            (p * g).sum().backward()
    assert p.grad is None and buffers.of("p", master) is master.grad
    assert torch.equal(master.grad, given[0].float() + given[1] + given[2])


def test_a_gradient_that_is_not_finite_names_its_rows():
    learner = bfloat16_learner()
    learner.step(terms())
    before = state_of(learner)

    def damaged_loss(model, part, num_items):
        loss, stats = sft_loss(model, part, num_items)
        return loss + (loss * 0).sqrt(), stats

    with pytest.raises(BadRows, match="gradient norm nan, from rows 0, 1, 2, 3; the weights are as before"):
        learner.step([(damaged_loss, demonstrations(), 1.0)])
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(learner), strict=True))
    assert not learner.gradients.unconverted
