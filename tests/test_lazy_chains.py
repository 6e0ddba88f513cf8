"""Random chains of what may be done to logits, and readings between: lazy logits give what logits give."""

import random

import pytest
import torch
from architectures import SMALL, build
from lazy_pair import assert_close, grads_of
from torch.nn import functional as F

from rlhf_fast.integrations import lazy_head

pytestmark = pytest.mark.usefixtures("one_thread")
V = 53
SIZES = {**SMALL, "vocab_size": V, "initializer_range": 0.2, "num_hidden_layers": 1}
HEADS = {
    "plain": build("Llama", SIZES),
    "bias": build("Phi", SIZES),
    "soft cap": build("Gemma2", SIZES, head_dim=8, final_logit_softcapping=2.0),
}


def targets_of(z):
    """The same tokens for the same shape."""
    return torch.arange(z[..., 0].numel()).mul(7).remainder(V).view(z.shape[:-1])


def rows_of(z):
    return torch.linspace(0.5, 2.0, z.shape[-2])[:, None]


STEPS = [
    lambda z: z[1:], lambda z: z[:-1], lambda z: z[..., 1:, :], lambda z: z[:, :-1], lambda z: z[..., None, :],
    lambda z: z[None], lambda z: z[0], lambda z: z[:, 0], lambda z: z[[1, 0]], lambda z: z[::2],
    lambda z: z[targets_of(z) > 20], lambda z: z[torch.tensor([1, 1, 0])], lambda z: z[torch.tensor(1)],
    lambda z: z.reshape(-1, V), lambda z: z.flatten(0, 1), lambda z: z.unsqueeze(1), lambda z: z.squeeze(),
    lambda z: z.squeeze(0), lambda z: z.transpose(0, 1), lambda z: z.split(2)[0], lambda z: z.chunk(2)[-1],
    lambda z: list(z)[-1], lambda z: z.unbind(0)[0], lambda z: z.split(1, 1)[1], lambda z: z.contiguous(),
    lambda z: z.clone(), lambda z: z.float(), lambda z: z.double(), lambda z: z.to(torch.float32), lambda z: z.detach(),
    lambda z: z / 0.7, lambda z: z * 1.3, lambda z: 0.5 * z, lambda z: z / torch.tensor(1.1), lambda z: z / rows_of(z),
    lambda z: z * rows_of(z), lambda z: torch.tanh(z / 4) * 4, lambda z: z.narrow(0, 1, 1), lambda z: z.view_as(z),
    lambda z: z.select(0, 1), lambda z: z.index_select(0, torch.tensor([0, 0])), lambda z: z.permute(1, 0, 2),
    lambda z: z.div_(0.8), lambda z: z.mul_(1.2), lambda z: z.mul_(rows_of(z)), lambda z: z.add_(0.3),
    lambda z: z.masked_fill_(torch.arange(V) < 3, -5.0), lambda z: z + 1, lambda z: -z,
]  # fmt: skip
LAID_OUT = STEPS[13], STEPS[14], STEPS[24]
"""reshape, flatten, contiguous: views or, of transposed logits and of slices, copies. A copy under no_grad has no
gradient, and lazy logits have a layout of their own."""
READINGS = [
    lambda z: z.logsumexp(-1), lambda z: z.log_softmax(-1).gather(-1, targets_of(z)[..., None]),
    lambda z: z.gather(-1, targets_of(z)[..., None]), lambda z: (z.softmax(-1) * z).sum(-1),
    lambda z: -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1, keepdim=True),
    lambda z: F.cross_entropy(z.reshape(-1, V), targets_of(z).flatten()),
    lambda z: F.cross_entropy(z.reshape(-1, V), targets_of(z).flatten(), reduction="none", ignore_index=7),
    lambda z: F.cross_entropy(z.transpose(1, 2), targets_of(z), reduction="sum"), lambda z: z.max(-1).values,
    lambda z: z.mean(-1), lambda z: z.softmax(-1)[..., 2], lambda z: z.square().sum(-1), lambda z: z[..., 3],
    lambda z: torch.gather(z.log_softmax(-1), -1, torch.tensor([1, 4]).expand(*z.shape[:-1], 2)),
    lambda z: torch.stack([row.logsumexp(-1) for row in z]), lambda z: z.argmax(-1).double(),
    lambda z: F.nll_loss(z.reshape(-1, V).log_softmax(-1), targets_of(z).flatten()),
]  # fmt: skip


def run(model, ids, plan, known=None):
    """Run a plan; return its readings and gradients. known: which steps and readings are possible, None to find out.

    Whatever torch refuses is left out of the plan. A reading that another view's write has spoilt is None."""
    model.zero_grad()
    alive, readings, possible = [model(input_ids=ids).logits], [], []
    for number, (place, what, call, no_grad) in enumerate(plan):
        z = alive[place % len(alive)]
        if known is not None and not known[number]:
            continue
        try:
            with torch.set_grad_enabled(not no_grad):
                found = call(z)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:  # TypeError: no iteration over a 0-d tensor
            if known is not None and not (what == "read" and "written in place" in str(error)):
                if "written in place" in str(error) or "were written" in str(error):
                    return [], None, possible  # torch's earlier readings are views, which the write changes
                raise
            possible.append(False)
            readings += [None] * (what == "read" and known is not None)
            continue
        possible.append(found.numel() > 0)
        if found.numel() and what == "read":
            readings.append(found)
        elif found.numel():
            alive.append(found)
    with_grad = [x for x in readings if x is not None and x.requires_grad and x.isfinite().all()]
    whole = len(readings) == sum(x is not None for x in readings)
    if with_grad:
        sum(x.double().square().sum() for x in with_grad).backward()
    return readings, grads_of(model) if whole else None, possible


@pytest.mark.parametrize("number", [pytest.param(n, marks=[pytest.mark.slow] * (n >= 40)) for n in range(400)])
def test_a_chain(number, seed):
    draw = random.Random(f"{seed} {number}")
    model = HEADS[draw.choice(list(HEADS))]().eval()
    ids = torch.randint(3, V, (3, 5))
    plan = []
    for _ in range(draw.randint(3, 9)):
        what, calls = draw.choice([("do", STEPS), ("do", STEPS), ("read", READINGS)])
        call = draw.choice(calls)
        no_grad = draw.random() < 0.1 and call not in LAID_OUT
        plan.append((draw.choice([-1, -1, -1, draw.randint(0, 9)]), what, call, no_grad))
    plan.append((-1, "read", draw.choice(READINGS), False))
    try:
        theirs, their_grads, possible = run(model, ids, plan)
    except RuntimeError as error:
        pytest.skip(f"torch refuses the gradient: {error}")
    with lazy_head(model):
        ours, our_grads, _ = run(model, ids, plan, possible)
    for mine, other in zip(ours, theirs, strict=False):
        if mine is not None:
            assert other.requires_grad or not mine.requires_grad  # a view under no_grad is a leaf of autograd in torch
            assert_close(mine.detach(), other.detach(), 1e-5, floor=1e-5)
    if our_grads is not None:
        floor = 1e-6 * (1 + float(sum(grad.double().norm() for grad in their_grads.values())))
        assert our_grads.keys() == their_grads.keys()
        for name, grad in their_grads.items():
            assert_close(our_grads[name], grad, 5e-5, name, floor)
