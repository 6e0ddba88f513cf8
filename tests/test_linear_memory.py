"""The peak memory of the linear head's ops."""

import pytest
import torch
from peak import gradient_peak

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head
from rlhf_fast.kernels._product import rows_in

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


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("V", [2, 17, 1031, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_counts_as_logits(backend, V, dtype, monkeypatch):
    """A row's logits are followed by 16 to 31 floats that nobody reads: with two columns, most of the buffer."""
    limit, sizes = 1 << 18, []

    def measured(buffer, rows, columns):
        sizes.append(buffer.nbytes)
        return rows_in(buffer, rows, columns)

    monkeypatch.setattr(cpu_head, "rows_in", measured)
    for name in ("LOGITS_BYTES_3_GEMM", "LOGITS_BYTES_4_GEMM"):
        monkeypatch.setattr(cpu_head, name, limit)
    monkeypatch.setattr(cpu_head, "KEPT_BYTES", 0)
    hidden = torch.randn(5000, 40).to(dtype).requires_grad_()
    weight = torch.randn(V, 40).to(dtype).requires_grad_()
    targets = torch.randint(V, (5000,))
    ops.linear_cross_entropy.backend(backend)(hidden, weight, targets)[0].backward()
    three, sizes[:] = max(sizes), []
    ops.linear_logprobs.backend(backend)(hidden.detach(), weight.detach(), targets)
    for found in (three, max(sizes)):
        assert limit / 2 < found <= limit
