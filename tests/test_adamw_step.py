"""The compiled optimizer step against torch's fused AdamW, by every instruction set; gradients in kept memory."""

import copy
import math

import pytest
import torch
from tiny_llama import VOCABULARY, policy

from rlhf_fast.batches import Demonstrations, pad_rows
from rlhf_fast.config.fields import OptimConfig
from rlhf_fast.kernels._backends import COMPILED, forcing
from rlhf_fast.training import gradient_buffers
from rlhf_fast.training.compiled_adamw import STATE, CompiledAdamW
from rlhf_fast.training.gradient_buffers import GradientPool
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import sft_loss

ISAS = [name for name, module in COMPILED.items() if hasattr(module, "adamw_step")]
SHAPES = [(1,), (17,), (65,), (40_001,), (3, 5), (200, 170)]
BETAS, EPS, RATE = (0.9, 0.95), 1e-8, 1e-3
needs_kernels = pytest.mark.skipif(not ISAS, reason="rlhf_fast._cpu is not built")


def parameters():
    """Return masters whose gradients have many sizes, some of them 0. After each master 16 numbers are 7."""
    masters = []
    for shape in SHAPES:
        memory = torch.cat([torch.randn(math.prod(shape)), torch.full((16,), 7.0)])
        masters.append(torch.nn.Parameter(memory[:-16].view(shape)))
    for p in masters:
        p.grad = torch.randn_like(p) * 10 ** torch.randn(())
        p.grad.view(-1)[::7] = 0
    return masters


def adam_of(masters, weight_decay=0.0):
    return torch.optim.AdamW(masters, lr=RATE, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


def twin_of(adam, masters):
    """Return copies of the masters, with their gradients, and an optimizer in the same state."""
    twins = parameters()
    for twin, p in zip(twins, masters, strict=True):
        twin.data.copy_(p.detach())
        twin.grad = None if p.grad is None else p.grad.clone()
    twin_adam = adam_of(twins, adam.param_groups[0]["weight_decay"])
    for twin, p in zip(twins, masters, strict=True):
        if p in adam.state:
            twin_adam.state[twin] = copy.deepcopy(adam.state[p])
    return twin_adam, twins


def compiled_step(adam, masters, isa, copies=None, averages=(), grad_scale=1.0, average_weight=0.0, grads=None):
    CompiledAdamW(adam, masters, copies or [None] * len(masters), list(averages)).step(
        COMPILED[isa], grads_of(masters) if grads is None else grads, grad_scale, average_weight
    )


def grads_of(masters):
    return [p.grad for p in masters]


def compiled_norm(adam, masters, isa, grads=None):
    return CompiledAdamW(adam, masters, [], []).grad_norm(COMPILED[isa], grads_of(masters) if grads is None else grads)


def ulps(ours, theirs):
    """Return the largest distance in units of the last place of two float32 tensors."""
    numbers = [x.detach().view(torch.int32).long() for x in (ours, theirs)]
    ordered = [torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in numbers]
    return int((ordered[0] - ordered[1]).abs().max())


def assert_same_step(isa, ours, our_adam, theirs, their_adam):
    """Compare to 1 ulp. Without fused multiply-add, which torch uses, a result whose terms cancel is compared to 1 ulp
    of the largest."""
    for p, q in zip(ours, theirs, strict=True):
        state, expected = our_adam.state[p], their_adam.state[q]
        assert list(state) == list(expected) == list(STATE) and torch.equal(state["step"], expected["step"])
        pairs = [(p, q), *((state[name], expected[name]) for name in STATE[1:])]
        if isa != "cpu:generic" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert all(ulps(*pair) <= 1 for pair in pairs)
        for found, truth in pairs:
            scale = float(truth.detach().abs().max())
            torch.testing.assert_close(found, truth, rtol=2**-22, atol=2**-22 * scale)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("isa", ISAS)
def test_each_step_is_that_of_torchs_fused_adamw(isa, weight_decay):
    """Both start from torch's state at every step. Memory beyond the odd sizes stays as it was."""
    theirs = parameters()
    their_adam = adam_of(theirs, weight_decay)
    for _ in range(5):
        our_adam, ours = twin_of(their_adam, theirs)
        compiled_step(our_adam, ours, isa)
        their_adam.step()
        assert_same_step(isa, ours, our_adam, theirs, their_adam)
        assert all((p.detach().as_strided((16,), (1,), p.numel()) == 7).all() for p in ours)
        for p, g in zip(theirs, parameters(), strict=True):
            p.grad = g.grad


@pytest.mark.parametrize("isa", ISAS)
def test_copies_averages_and_the_gradients_factor(isa):
    """The gradients themselves stay as they are: their product is not stored."""
    theirs = parameters()
    adam = adam_of(theirs, 0.1)
    our_adam, ours = twin_of(adam, theirs)
    copies = [torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in ours]
    averages = [torch.randn_like(p).detach() for p in ours]
    for average_weight in (0.008, 0.7):
        expected = [x.clone() for x in averages]
        before = [p.grad.clone() for p in ours]
        compiled_step(our_adam, ours, isa, copies, averages, 0.3, average_weight)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
        for p in theirs:
            p.grad.mul_(0.3)
        adam.step()
        for p, g in zip(theirs, before, strict=True):
            p.grad = g
        assert all(torch.equal(x, p.detach().bfloat16()) for x, p in zip(copies, ours, strict=True))
        torch._foreach_lerp_(expected, [p.detach() for p in ours], average_weight)
        for x, truth in zip(averages, expected, strict=True):
            torch.testing.assert_close(x, truth, rtol=2**-22, atol=2**-22)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@needs_kernels
def test_infinite_and_nan_weights_round_to_the_copy_as_in_torch():
    p = torch.nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan, 3.3e38, 1e-40, 1.00390625]))
    (copied,) = copies = [torch.zeros(6, dtype=torch.bfloat16)]
    compiled_step(adam_of([p]), [p], ISAS[-1], copies)
    assert torch.equal(copied.isnan(), p.isnan()) and torch.equal(
        copied.nan_to_num(), p.detach().bfloat16().nan_to_num()
    )


@needs_kernels
def test_a_master_without_gradient_is_left_out():
    """Its copy and its average are written all the same, and its state does not begin."""
    masters = parameters()
    masters[3].grad = None
    adam = adam_of(masters, 0.1)
    before = masters[3].detach().clone()
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in masters]
    averages = [torch.zeros_like(p) for p in masters]
    compiled_step(adam, masters, ISAS[-1], copies, averages, average_weight=0.25)
    assert masters[3] not in adam.state and len(adam.state) == len(masters) - 1
    assert torch.equal(masters[3], before) and torch.equal(copies[3], before.bfloat16())
    torch.testing.assert_close(averages[3], 0.25 * before)


@pytest.mark.parametrize("isa", ISAS)
def test_the_norm_is_that_of_float64(isa):
    """Squares that float32 cannot hold are no matter."""
    masters = parameters()
    for factor in (1.0, 1e20, 1e-25):
        for p in masters:
            p.grad *= factor
        norm = compiled_norm(adam_of(masters), masters, isa)
        truth = torch.cat([p.grad.flatten().double() for p in masters]).norm()
        assert norm.dtype == torch.float32 and float(norm) == pytest.approx(float(truth), rel=1e-7)
    masters[1].grad[3] = math.inf
    masters[2].grad = None
    assert compiled_norm(adam_of(masters), masters, isa) == math.inf


@pytest.mark.parametrize("isa", ISAS)
def test_the_bits_do_not_depend_on_the_number_of_threads(isa):
    masters, found = parameters(), []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            adam, twins = twin_of(adam_of(masters), masters)
            norm = compiled_norm(adam, twins, isa)
            compiled_step(adam, twins, isa)
            found.append([norm, *twins, *(x for state in adam.state.values() for x in state.values())])
    finally:
        torch.set_num_threads(threads)
    assert sum(p.numel() for p in masters) > 65536, "the smallest number of weights that threads share"
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def bfloat16_parameters():
    """Return masters with gradients in float32 that bfloat16 holds, and the same ones in bfloat16; one has none, and
    one that is float32 only. Sizes are at the edges of vectors and chunks."""
    sizes = [1, 17, 16383, 16384, 16385, 40_001, 33, 5, 70_000]
    masters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    for p in masters:
        p.grad = (torch.randn_like(p) * 10 ** torch.randn(())).bfloat16().float()
        p.grad[::7] = 0
    masters[6].grad = None
    masters[7].grad = torch.randn(5) / 3
    return masters, [p.grad if i in (6, 7) else p.grad.bfloat16() for i, p in enumerate(masters)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bfloat16_gradient_gives_the_bits_of_the_same_in_float32(isa, threads):
    """Weights, moments, copies, averages and norms, through steps that begin and continue the state. No byte beyond a
    gradient is read."""
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for as_bfloat16 in (True, False):
            torch.manual_seed(7)
            masters, grads = bfloat16_parameters()
            adam = adam_of(masters, 0.1)
            copies = [torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in masters]
            averages = [torch.randn_like(p).detach() for p in masters]
            for step in range(3):
                given = [g if g is None or g.dtype == torch.float32 else followed_by_nan(g) for g in grads]
                given = given if as_bfloat16 else grads_of(masters)
                norm = compiled_norm(adam, masters, isa, given)
                compiled_step(adam, masters, isa, copies, averages, 0.3, 0.2, given)
                assert norm.isfinite() and float(norm) > 0
                if step == 0:
                    assert all((p in adam.state) == (g is not None) for p, g in zip(masters, grads, strict=True))
                found.append([norm, *(x.detach().clone() for x in (*masters, *copies, *averages))])
                found[-1] += [x.clone() for state in adam.state.values() for x in state.values()]
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def followed_by_nan(x):
    """Return a copy of x (n,) in memory where 16 NaN follow."""
    return torch.cat([x, torch.full((16,), torch.nan, dtype=x.dtype)])[: len(x)]


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_and_nan_bfloat16_gradients_make_the_norm_so(isa):
    for value, position in ((math.inf, 16_384), (math.nan, 3)):
        masters, grads = bfloat16_parameters()
        grads[4][position] = value
        norm = float(compiled_norm(adam_of(masters), masters, isa, grads))
        assert norm == value or (math.isnan(norm) and math.isnan(value))


@needs_kernels
def test_tensors_that_the_kernel_cannot_read_are_left_to_torch():
    masters = parameters()
    for copies, averages in [([torch.zeros(3, dtype=torch.float16)], []), ([], [torch.zeros(3).double()])]:
        assert CompiledAdamW(adam_of(masters), masters, copies, averages).kernels() is None
    assert CompiledAdamW(adam_of(masters), masters, [None], []).kernels() is COMPILED[ISAS[-1]]
    masters[5].data = torch.randn(170, 200).t()
    assert CompiledAdamW(adam_of(masters), masters, [], []).kernels() is None
    with forcing("reference"):
        assert CompiledAdamW(adam_of(parameters()), [], [], []).kernels() is None


@needs_kernels
def test_a_gradient_that_is_a_view_is_read_by_its_strides():
    ours = parameters()
    ours[5].grad = torch.randn(170, 200).t()
    adam = adam_of(ours)
    their_adam, theirs = twin_of(adam, ours)
    theirs[5].grad = theirs[5].grad.contiguous()  # torch reads it as if it were
    compiled_step(adam, ours, ISAS[-1])
    their_adam.step()
    assert_same_step(ISAS[-1], ours, adam, theirs, their_adam)


def llama(dtype=torch.float32):
    """Return the same policy at every call."""
    torch.manual_seed(12)
    return policy(dtype)


def demonstrations(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, lengths = pad_rows([torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in range(4)])
    return Demonstrations(tokens, torch.full((4,), 2), lengths)


def optim(**settings):
    return OptimConfig(**{"lr": 1e-3, "schedule": "constant", "weight_decay": 0.1, "grad_clip": 0.5, **settings})


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_steps_as_by_torch_and_takes_over_its_state(dtype, monkeypatch):
    """Two steps by torch, as an older checkpoint has them, then the state is loaded and both take three more."""
    theirs = Learner(llama(dtype), optim(), 10, ema=0.9)
    monkeypatch.setattr(theirs.compiled, "kernels", lambda: None)  # the model's kernels stay, for equal gradients
    for seed in range(2):
        theirs.step([(sft_loss, demonstrations(seed), 1.0)])
    ours = Learner(llama(dtype), optim(), 10, ema=0.9)
    state = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(state)
    for seed in range(2, 5):
        found = ours.step([(sft_loss, demonstrations(seed), 1.0)])
        assert found == pytest.approx(theirs.step([(sft_loss, demonstrations(seed), 1.0)]), rel=1e-3)
    for name, master in ours.masters.items():
        torch.testing.assert_close(master, theirs.masters[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.average[name], theirs.average[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.params[name], master.to(dtype))
    assert {name: list(x) for name, x in ours.state_dict()["adam"].items()} == {
        name: list(x) for name, x in theirs.state_dict()["adam"].items()
    }
    assert all(int(x["step"]) == 5 for x in ours.state_dict()["adam"].values())


@pytest.mark.parametrize(("dtype", "budgets"), [(torch.float32, (9, 1000)), (torch.bfloat16, (9, 20))])
def test_gradients_are_kept_in_the_same_memory(monkeypatch, dtype, budgets):
    """Learners that share a pool use the same, in turn. Several micro-batches add up in it."""
    monkeypatch.setattr(gradient_buffers, "MIN_KEPT_SIZE", 1)
    pool, found = GradientPool(), []
    learners = [Learner(llama(dtype), optim(micro_batch_tokens=budget), 10, pool=pool) for budget in budgets]
    for learner in [*learners, *learners]:
        learner._backward([(sft_loss, demonstrations(), 1.0)])
        assert not any(pool.free.values())
        found.append({p.grad.data_ptr() for p in learner.masters.values()})
        assert all(p.grad.dtype == torch.float32 for p in learner.masters.values())
        learner._zero_grad()
        assert all(p.grad is None for p in [*learner.masters.values(), *learner.params.values()])
    assert all(addresses == found[0] for addresses in found) and len(found[0]) == len(learners[0].masters)
    gradients = [learner.gradient([(sft_loss, demonstrations(), 1.0)]) for learner in learners]
    for name, one in gradients[0].items():
        assert float((one - gradients[1][name]).norm()) < 0.02 * float(one.norm()) + 1e-6, name


def test_gradients_that_a_caller_has_are_not_overwritten(monkeypatch):
    """They come from `gradient`, or from a backward pass outside the Learner."""
    monkeypatch.setattr(gradient_buffers, "MIN_KEPT_SIZE", 1)
    model = llama()
    learner = Learner(model, optim(), 10)
    learner.step([(sft_loss, demonstrations(), 1.0)])
    held = learner.gradient([(sft_loss, demonstrations(), 1.0)])
    sft_loss(model, demonstrations(), 1.0)[0].backward()
    held |= {f"outside {name}": p.grad for name, p in model.trainable().items()}
    model.module.zero_grad(set_to_none=True)
    before = {name: x.clone() for name, x in held.items()}
    for seed in range(2):
        learner.step([(sft_loss, demonstrations(seed), 1.0)])
    assert all(torch.equal(x, before[name]) for name, x in held.items())
