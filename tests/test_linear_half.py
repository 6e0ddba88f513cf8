"""Our bfloat16 product with float32 results, and the linear head on it, by the processor's instruction and emulated."""

import itertools

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _cpu_head as cpu_head
from rlhf_fast.kernels import _product
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
    "rows, columns, D", [(1, 1, 1), (3, 5, 31), (4, 64, 32), (9, 67, 33), (17, 130, 100), (0, 5, 8), (13, 80, 513)]
)
@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "instruction"])
def test_product(backend, rows, columns, D, emulate):
    kernels = COMPILED[backend]
    if not emulate and not _product.has_bf16_product(kernels):
        pytest.skip("this processor has no AVX512-BF16")
    x, w = (torch.randn(n, D + 5).bfloat16()[:, :D] for n in (rows, columns))
    out = multiply(kernels, x, w, emulate)
    truth = x.double() @ w.double().T
    scale = x.double().abs() @ w.double().abs().T
    assert ((out.double() - truth).abs() <= 2e-7 * (D**0.5 + 1) * scale).all()
    assert torch.equal(out, multiply(kernels, x, w, emulate, threads=3))
    if rows > 4:
        assert torch.equal(out[5:6, 1:2], multiply(kernels, x[5:6], w[1:2], emulate))  # alone as in a tile


@pytest.fixture
def emulated(monkeypatch):
    """bfloat16 products on any processor, at any size."""
    monkeypatch.setattr(_product, "BF16_DOT", 2)
    monkeypatch.setattr(cpu_head, "MIN_BF16_WEIGHT", 0)


def random_head():
    hidden = (2 * torch.randn(96, 33)).bfloat16().requires_grad_()
    weight = (torch.randn(2100, 33) / 6).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(2100, (96,)).masked_fill(torch.rand(96) < 0.3, -100)


KEPT = pytest.mark.parametrize("kept_bytes", [0, 1 << 20], ids=["logits made twice", "exponentials kept"])


@KEPT
@pytest.mark.parametrize("rows_per_block", [7, 10**6])
def test_head(monkeypatch, emulated, rows_per_block, kept_bytes):
    """Log-probabilities are exact, gradients as accurate as those of torch's own bfloat16 products."""
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_3_GEMM", 4 * 2100 * rows_per_block)
    monkeypatch.setattr(cpu_head, "LOGITS_BYTES_4_GEMM", 4 * 2100 * rows_per_block)
    monkeypatch.setattr(cpu_head, "KEPT_BYTES", kept_bytes)
    hidden, weight, targets = random_head()
    weights, bias = torch.rand(96), torch.randn(2100)
    old, advantages = -5 * torch.rand(96), torch.randn(96)
    float64_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()

    def outputs(x, w, dtype):
        half = (0.5 * x).detach(), w.detach()
        rows = old.to(dtype), advantages.to(dtype), weights.to(dtype)
        options = {"entropy_coef": 0.3, "temperature": 0.7, "bias": bias.to(dtype)}
        calls = {
            "cross_entropy": (ops.linear_cross_entropy, (x, w, targets, rows[2]), {}),
            "softcap": (ops.linear_cross_entropy, (x, w, targets, rows[2], bias.to(dtype), 3.0), {}),
            "ppo": (ops.linear_ppo_loss, (x, w, targets, *rows), options),
            "logprobs": (ops.linear_logprobs, (x, w, targets), {}),
            "kl": (ops.linear_kl, (x, w, *half, targets), {}),
        }
        run = {n: (op.reference if dtype == torch.float64 else op)(*a, **k) for n, (op, a, k) in calls.items()}
        return run | {"kl": run["kl"][3:], "ppo": run["ppo"][:3]}

    truths = outputs(*float64_inputs, torch.float64)
    for name, found in outputs(hidden, weight, torch.float32).items():
        for results, exact in zip(found, truths[name], strict=True):
            torch.testing.assert_close(results.to(exact.dtype), exact, atol=5e-6, rtol=2e-6)
        results = torch.autograd.grad(found[0].sum(), (hidden, weight))
        exact = torch.autograd.grad(truths[name][0].sum(), float64_inputs)
        for a, b in zip(results, exact, strict=True):
            assert a.dtype == torch.bfloat16
            assert (a.double() - b).norm() <= 2**-8 * b.norm(), name


def test_kept_exponentials_of_rising_tiles_and_banned_tokens(emulated):
    """The largest logit comes last, a tile has no logit, and a token's probability is 0."""
    hidden = torch.ones(3, 2).bfloat16().requires_grad_()
    weight = torch.zeros(3000, 2).bfloat16().requires_grad_()
    bias = torch.linspace(-60, 3, 3000).index_fill(0, torch.cat([torch.arange(1024), torch.tensor([2999])]), -torch.inf)
    bias.requires_grad_()
    targets = torch.tensor([1500, 2990, 2047])
    ops.linear_cross_entropy(hidden, weight, targets, torch.ones(3), bias)[0].backward()
    exact = bias.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(exact.expand(3, -1), targets, reduction="sum").backward()
    assert (bias.grad[exact.grad == 0] == 0).all() and (exact.grad == 0).sum() == 1025
    assert ((bias.grad.double() - exact.grad).abs() <= 2**-7 * exact.grad.abs() + 1e-30).all()


def torch_reads_the_next_row():
    """Return whether torch's own bfloat16 product of 2100 columns makes NaN of a row before one that is NaN: oneDNN's
    does by AMX, which multiplies what lies behind a row by 0 where the columns are no multiple of 32."""
    x = torch.zeros(96, 2100, dtype=torch.bfloat16)
    x[1] = torch.nan
    return bool((x @ torch.ones(2100, 33, dtype=torch.bfloat16))[0].isnan().any())


def test_kept_exponentials_of_a_bad_row(emulated):
    """A NaN in a row of hidden makes NaN of its own gradient, and of the weight's, which all rows share."""
    hidden, weight, targets = random_head()
    targets[:3] = torch.tensor([5, 7, -100])
    with torch.no_grad():
        hidden[1] = hidden[2] = torch.nan
    ops.linear_cross_entropy(hidden, weight, targets, torch.ones(96))[0].backward()
    assert hidden.grad[1].isnan().all() and weight.grad.isnan().all()
    others = [0] * (not torch_reads_the_next_row()) + [*range(3, 96)]
    assert (hidden.grad[2] == 0).all() and hidden.grad[others].isfinite().all()


def with_threads(threads, function, *args):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)


def torch_depends_on_the_threads():
    """Return whether torch's own bfloat16 product of 96 rows by 2100 columns has other bits with two threads: by AMX
    oneDNN gives each a part of the columns. After rounding one number in some thousands shows it."""
    weight = torch.randn(2100, 33).bfloat16()
    inputs = torch.randn(64, 96, 2100).bfloat16()
    products = ([with_threads(threads, torch.mm, x, weight) for threads in (1, 2)] for x in inputs)
    return not all(itertools.starmap(torch.equal, products))


@KEPT
def test_bits_of_the_head_do_not_depend_on_the_threads(monkeypatch, emulated, kept_bytes):
    monkeypatch.setattr(cpu_head, "KEPT_BYTES", kept_bytes)
    hidden, weight, targets = random_head()

    def run():
        loss, logprobs = ops.linear_cross_entropy(hidden, weight, targets)
        return loss, logprobs, *torch.autograd.grad(loss, (weight, hidden))

    (*one, one_hidden), (*two, two_hidden) = (with_threads(threads, run) for threads in (1, 2))
    assert all(map(torch.equal, one, two))
    if torch_depends_on_the_threads():
        torch.testing.assert_close(one_hidden, two_hidden)
    else:
        assert torch.equal(one_hidden, two_hidden)
