"""k3, exp(-d) - 1 + d, and its gradient near d = 0, where float32's difference is a negative number or half of it."""

from importlib.util import find_spec

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels._ppo import kl_estimate, kl_grad

if find_spec("triton"):
    import triton
    import triton.language as tl

    from rlhf_fast.kernels.triton import _ppo as ppo

D = torch.tensor([1e-4, -1e-4, 3e-6, -2.5e-3, 0.0099, 0.0101, -0.099, 0.101, 0.49, -0.51, 2.0, -3.0, 0.0, -1e-12])


def k3(d):
    """Return exp(-d) - 1 + d in float64 without cancellation."""
    d = d.double()
    terms = [torch.ones_like(d)]
    for k in range(3, 40):
        terms.append(terms[-1] * -d / k)
    return d * d / 2 * torch.stack(terms).sum(0)


def check(found, d, rtol=2e-6):
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), k3(d), rtol=rtol, atol=0)


@pytest.mark.parametrize("bound", [None, 20.0])
def test_the_reference(bound):
    check(kl_estimate(D, "k3", bound), D)
    check(kl_estimate(D.double(), "k3", bound), D, rtol=1e-13)
    d = D.clone().requires_grad_()
    truth = -torch.expm1(-D.double())
    (grad,) = torch.autograd.grad(kl_estimate(d, "k3", bound).sum(), d)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl_grad(D, "k3", 20.0).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ops.ppo_advantages.backends)
def test_rewards(backend):
    """The KL of a row with one token."""
    device = "cpu" if ops.ppo_advantages.can_run(backend, "cpu") else "cuda"
    d = D[:, None].to(device)
    zeros, mask = torch.zeros_like(d), torch.ones_like(d, dtype=torch.bool)
    kl = ops.ppo_advantages.backend(backend)(d, zeros, zeros, zeros[:, 0], mask, 1.0, "k3")[3]
    check(kl.cpu(), D)


@pytest.mark.parametrize("backend", ops.ppo_loss.backends)
def test_statistics(backend):
    device = "cpu" if ops.ppo_loss.can_run(backend, "cpu") else "cuda"
    one = torch.ones(1, device=device)
    found = []
    for d in D.to(device):
        stats = ops.ppo_loss.backend(backend)(-d * one, 0 * one, one, one)[2]
        found.append(stats[ops.ppo_loss.stats.index("kl_k3")].cpu())
    check(torch.stack(found), D)


def test_the_gradient_by_triton():
    """The KL is part of the loss of linear_ppo_loss."""
    pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton's interpreter is off")

    @triton.jit
    def kernel(d, kl, grad, clip):
        index = tl.arange(0, 16)
        x = tl.load(d + index)
        tl.store(kl + index, ppo.ref_kl(x, clip, "k3"))
        tl.store(grad + index, ppo.ref_kl_grad(x, clip, "k3"))

    d = torch.cat([D, D[:2]])
    kl, grad = torch.empty_like(d), torch.empty_like(d)
    kernel[(1,)](d, kl, grad, ppo.ClipBounds(0.8, 1.2, 0.0, 20.0))
    check(kl, d)
    torch.testing.assert_close(grad.double(), -torch.expm1(-d.double()), rtol=2e-6, atol=0)
