"""What the linear head's ops hold in memory."""

import pytest
import torch
from peak import peak_bytes

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head

COMPILED = ops.linear_logprobs.backends[1:][-1:]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(backend, dtype, monkeypatch):
    """Beyond inputs and gradients: the budget of logits and what is of the size of hidden; nothing grows with N V."""
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", 1 << 20)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_4_GEMM", 1 << 20)
    V, D = 8192, 48
    scratch = (1 << 20) + (4096 * D * 8 if dtype == torch.bfloat16 else 0) + 200_000
    for N in (128, 512):
        hidden = torch.randn(N, D).to(dtype).requires_grad_()
        weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
        targets = torch.randint(V, (N,))
        heads = {
            "cross_entropy": lambda x, w: ops.linear_cross_entropy.backend(backend)(x, w, targets)[0],  # noqa: B023
            "logprobs": lambda x, w: ops.linear_logprobs.backend(backend)(x, w, targets)[0].sum(),  # noqa: B023
        }
        budget = scratch + N * D * hidden.element_size() + 4 * N * (4 * D + 200)
        for name, run in heads.items():
            frozen = weight.detach()
            peak = peak_bytes(lambda: torch.autograd.grad(run(hidden, weight), (hidden, weight)))  # noqa: B023
            assert peak < budget + weight.nbytes, (name, N, peak)
            peak = peak_bytes(lambda: torch.autograd.grad(run(hidden, frozen), hidden))  # noqa: B023
            assert peak < budget, (name, N, peak)
