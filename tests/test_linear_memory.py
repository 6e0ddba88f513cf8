"""The peak memory of the linear head's ops."""

import pytest
import torch
from peak import gradient_peak

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head

COMPILED = ops.linear_logprobs.backends[1:][-1:]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.exhaustive(1)
def test_memory(backend, dtype, monkeypatch):
    """Beyond inputs and gradients only the logits' budget and tensors of hidden's size are allocated."""
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", 1 << 20)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_4_GEMM", 1 << 20)
    monkeypatch.setattr(cpu_head, "KEPT_BYTES", 1 << 20)
    V, D = 8192, 48

    def cross_entropy(hidden, weight):
        return ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)[0]

    def logprobs(hidden, weight):
        return ops.linear_logprobs.backend(backend)(hidden, weight, targets)[0].sum()

    for N in (128, 512):
        buffers = 0
        if dtype == torch.bfloat16:  # a block of the weight, and the sums of its gradient
            buffers = 4096 * D * (4 + 4)
            if D * V >= cpu_head.MIN_BF16_WEIGHT:  # the sums, a product, torch's own sums, and the logits' gradient
                buffers = 4096 * D * (4 + 2 + 4) + (1 << 19)
        hidden = torch.randn(N, D).to(dtype).requires_grad_()
        weight = (torch.randn(V, D) / D**0.5).to(dtype).requires_grad_()
        targets = torch.randint(V, (N,))
        budget = (1 << 20) + buffers + 200_000 + N * D * hidden.element_size() + 4 * N * (2 * D + 50)
        for run in (cross_entropy, logprobs):
            assert gradient_peak(run, hidden, weight) < budget + weight.nbytes, (run.__name__, N)
            assert gradient_peak(run, hidden, weight.detach()) < budget, (run.__name__, N)
