"""Our bfloat16 product with float32 results, and the linear head on it, by the processor's instruction and emulated."""

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head
from rlhf_fast.kernels._backends import COMPILED

CPU = [name for name in COMPILED if name.startswith("cpu")]
pytestmark = pytest.mark.skipif(not CPU, reason="rlhf_fast._cpu is not built")


def multiply(kernels, x, w, emulate, threads=1):
    out = torch.full((len(x), len(w) + 3), torch.nan)[:, : len(w)]
    kernels.bf16_product(
        x.data_ptr(), w.data_ptr(), out.data_ptr(), *out.shape, x.shape[1], x.stride(0), w.stride(0), out.stride(0),
        emulate, threads,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(
    "rows, columns, D", [(1, 1, 1), (3, 5, 31), (4, 4, 32), (9, 67, 33), (17, 130, 100), (0, 5, 8)]
)
@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "instruction"])
def test_product(backend, rows, columns, D, emulate):
    kernels = COMPILED[backend]
    if not emulate and not cpu_head.has_bf16_product(kernels):
        pytest.skip("this processor has no AVX512-BF16")
    x, w = (torch.randn(n, D + 5).bfloat16()[:, :D] for n in (rows, columns))
    out = multiply(kernels, x, w, emulate)
    truth = x.double() @ w.double().T
    scale = x.double().abs() @ w.double().abs().T
    assert ((out.double() - truth).abs() <= 2e-7 * (D**0.5 + 1) * scale).all()
    assert torch.equal(out, multiply(kernels, x, w, emulate, threads=3))
    if rows > 4:
        assert torch.equal(out[5:6, 1:2], multiply(kernels, x[5:6], w[1:2], emulate))  # alone as in a tile


@pytest.mark.parametrize("rows_per_block", [7, 10**6])
def test_head(monkeypatch, rows_per_block):
    """Log-probabilities are exact, gradients as accurate as those of torch's own bfloat16 products."""
    monkeypatch.setattr(cpu_head, "EMULATE_BF16", True)
    monkeypatch.setattr(cpu_head, "MIN_BF16_LOGITS", 0)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", 4 * 2100 * rows_per_block)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_4_GEMM", 4 * 2100 * rows_per_block)
    hidden = (2 * torch.randn(24, 33)).bfloat16().requires_grad_()
    weight = (torch.randn(2100, 33) / 6).bfloat16().requires_grad_()
    targets = torch.randint(2100, (24,)).masked_fill(torch.rand(24) < 0.3, -100)
    weights = torch.rand(24)
    outputs = {
        "cross_entropy": ops.linear_cross_entropy(hidden, weight, targets, weights),
        "logprobs": ops.linear_logprobs(hidden, weight, targets),
        "kl": ops.linear_kl(hidden, weight, 0.5 * hidden, weight, targets)[3:],
    }
    float64_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    ref = (0.5 * hidden).detach().double(), weight.detach().double()
    truths = {
        "cross_entropy": ops.linear_cross_entropy.reference(*float64_inputs, targets, weights.double()),
        "logprobs": ops.linear_logprobs.reference(*float64_inputs, targets),
        "kl": ops.linear_kl.reference(*float64_inputs, *ref, targets)[3:],
    }
    for name, truth in truths.items():
        for results, exact in zip(outputs[name], truth, strict=True):
            torch.testing.assert_close(results.double(), exact, atol=5e-6, rtol=2e-6)
        results = torch.autograd.grad(outputs[name][0].sum(), (hidden, weight))
        exact = torch.autograd.grad(truth[0].sum(), float64_inputs)
        for a, b in zip(results, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert (a.double() - b).norm() <= 2**-8 * b.norm()
