"""The linear head's Triton kernels where a small size of an op does not reach: several chunks, rows in segments, who
has the memory, bits."""

import gc

import pytest
import torch
from peak import peak_bytes

from rlhf_fast import ops

if not ops.linear_logprobs.can_run("triton", "cpu"):
    pytest.skip("Triton's kernels cannot be forced on the CPU here", allow_module_level=True)

from rlhf_fast.kernels.triton import _head, _logits, _softmax, launch  # noqa: E402


def triton(name):
    return getattr(ops, name).backend("triton")


def exact(name):
    return getattr(ops, name).backend("reference")


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of some rows, of which `programs` for a processor are walked whole."""

    def set_sizes(rows, programs=4):
        monkeypatch.setattr(_head, "LEAST", rows)
        monkeypatch.setattr(_head, "BYTES", 1)
        monkeypatch.setattr(_head, "HALF_LEAST", 0)
        monkeypatch.setattr(_head, "PART_BYTES", 1 << 14)
        monkeypatch.setattr(_softmax, "SEGMENT", 1)
        monkeypatch.setattr(_logits, "A_PROCESSOR", programs)

    return set_sizes


def make(N, D, V, dtype=torch.float32, ignored=0.3):
    """hidden with NaN where a target is ignored, weight, bias, targets."""
    off = torch.rand(N) < ignored
    hidden = (2 * torch.randn(N, D)).masked_fill(off[:, None], torch.nan)
    given = hidden, torch.randn(V, D) / D**0.5, torch.randn(V)
    return *(x.to(dtype).requires_grad_() for x in given), torch.randint(V, (N,)).masked_fill(off, -100)


def double(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def calls(targets, ref):
    """Of each op its loss, and everything that it returns, from hidden, weight and bias."""
    N = len(targets)
    old, advantages, weights = -5 * torch.rand(N), torch.randn(N), torch.rand(N) / N
    up = torch.randn(3, N)

    def wide(x, like):
        return x.double() if like.dtype == torch.float64 and x.is_floating_point() else x

    def run(name, *args, **options):
        return lambda call, x, w, b: call(name)(x, w, *(wide(a, x) for a in args), bias=b, **options)

    def weighted(outputs):
        return sum((u * o).sum() for u, o in zip(up, outputs, strict=False))

    options = {"temperature": 0.7, "softcap": 20.0}
    ppo = {"kl_coef": 0.1, "entropy_coef": 0.05, "dual_clip": 3.0}
    return {
        "linear_cross_entropy": (run("linear_cross_entropy", targets, weights), lambda out: out[0]),
        "linear_logprobs": (run("linear_logprobs", targets, **options), weighted),
        "linear_ppo_loss": (
            run("linear_ppo_loss", targets, old, advantages, weights, old - 0.5, **options, **ppo),
            lambda out: out[0],
        ),
        "linear_kl": (run("linear_kl", *ref, targets, **options), lambda out: weighted([out[0], *out[2:]])),
    }


@pytest.mark.parametrize(
    "rows, programs, dtype",
    [
        (9, 4, torch.float32),
        (9, 4, torch.bfloat16),
        (20, 4, torch.bfloat16),
        (99, 9, torch.float16),
        (99, 1, torch.float32),
    ],
    ids=["split-float32", "split-bfloat16", "whole and split-bfloat16", "one-split-float16", "one-whole-float32"],
)
def test_chunks(chunks, dtype, rows, programs):
    """Chunks of some rows and of all, rows walked whole and in segments: near the truth, gradients and all."""
    hidden, weight, bias, targets = make(34, 31, 4500, dtype)
    chunks(rows, programs)
    for name, (run, loss) in calls(targets, (torch.randn(34, 6), torch.randn(4500, 6) / 3)).items():
        wide = double(hidden, weight, bias)
        outputs, truth = run(triton, hidden, weight, bias), run(exact, *wide)
        for ours, theirs in zip(outputs, truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)
        ours = torch.autograd.grad(loss(outputs), (hidden, weight, bias))
        theirs = torch.autograd.grad(loss(truth), wide)
        for a, b in zip(ours, theirs, strict=True):
            assert b.norm() > 0 and a.isfinite().all()
            assert (a.double() - b).norm() <= {4: 1e-5, 2: 2**-7}[dtype.itemsize] * b.norm(), name


def test_bits_do_not_depend_on_the_path(chunks, monkeypatch):
    """Scored or trained, by which loss, rows walked whole or in segments: the first ratio is one, and exactly, where
    the library's products make the statistics too; else within rounding."""
    hidden, weight, bias, targets = make(24, 24, 4500, torch.bfloat16)
    ours = triton("linear_logprobs")(hidden, weight, targets, bias)
    monkeypatch.setattr(_head, "SCORED", 0)
    theirs = triton("linear_logprobs")(hidden, weight, targets, bias)
    assert not torch.equal(ours[0], theirs[0]), "one way for both"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=2e-6)
    old, advantages, weights = torch.zeros(24), torch.randn(24), torch.rand(24)
    found = []
    for programs in (1, 100):
        chunks(12, programs)
        scored = triton("linear_logprobs")(hidden.detach(), weight.detach(), targets, bias.detach())
        found += [scored, triton("linear_logprobs")(hidden, weight, targets, bias)]
        found.append(triton("linear_ppo_loss")(hidden, weight, targets, old, advantages, weights, bias=bias)[1:3])
        loss, logprobs = triton("linear_cross_entropy")(hidden, weight, targets, weights, bias)
        found.append((logprobs, scored[1]))
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        again = torch.autograd.grad(
            triton("linear_cross_entropy")(hidden, weight, targets, weights, bias)[0], (hidden, weight, bias)
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    for logprobs, entropy in found[1:]:
        assert torch.equal(logprobs, found[0][0]) and torch.equal(entropy, found[0][1])
    assert found[0][0].isfinite().all() and (found[0][0] < 0).any()


def test_large_gradients_in_float16_do_not_overflow(chunks):
    """As a loss scaler sends them."""
    chunks(4)
    hidden, weight, bias, targets = make(4, 16, 33, torch.float16, ignored=0)
    up = torch.full((4,), 1000.0)
    ours = torch.autograd.grad(triton("linear_logprobs")(hidden, weight, targets, bias)[0], (hidden, weight, bias), up)
    wide = double(hidden, weight, bias)
    theirs = torch.autograd.grad(exact("linear_logprobs")(*wide[:2], targets, wide[2])[0], wide, up.double())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= 2**-8 * b.norm()


def test_small_gradients_in_float16_do_not_vanish(chunks):
    """A weight of 1e-6 times a probability of 1e-3: below float16's least number, and yet there is a gradient."""
    chunks(16)
    hidden, weight, _, _ = make(16, 24, 1000, torch.float16, ignored=0)
    targets, weights = torch.randint(1000, (16,)), torch.full((16,), 1e-6)
    (ours,) = torch.autograd.grad(1000 * triton("linear_cross_entropy")(hidden, weight, targets, weights)[0], weight)
    wide = double(hidden, weight)
    (truth,) = torch.autograd.grad(1000 * exact("linear_cross_entropy")(*wide, targets, weights.double())[0], wide[1])
    assert (ours.double() - truth).norm() <= 0.1 * truth.norm()


def test_memory(chunks, monkeypatch):
    """Beyond inputs and gradients: a chunk's logits and its copy of hidden; nothing grows with N V."""
    V, D, rows, run_kernel = 8192, 16, 6, launch.run

    def run_and_forget(*args, **options):
        run_kernel(*args, **options)
        gc.collect(0)  # the interpreter's own frames hold what they were given

    monkeypatch.setattr(launch, "run", run_and_forget)
    chunks(rows, 1)
    for N in (6, 30):
        hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        targets = torch.randint(V, (N,))
        budget = 4 * rows * (V + D) + 4 * N * (2 * D + 30) + 20_000
        runs = {
            "linear_cross_entropy": lambda x, w: triton("linear_cross_entropy")(x, w, targets)[0],  # noqa: B023
            "linear_logprobs": lambda x, w: triton("linear_logprobs")(x, w, targets)[0].sum(),  # noqa: B023
        }
        for name, run in runs.items():
            peak = peak_bytes(lambda: torch.autograd.grad(run(hidden, weight), (hidden, weight)))  # noqa: B023
            assert peak < budget + weight.nbytes, (name, N, peak)
            frozen = weight.detach()
            peak = peak_bytes(lambda: torch.autograd.grad(run(hidden, frozen), hidden))  # noqa: B023
            assert peak < budget, (name, N, peak)


def test_chunks_come_from_a_budget_and_a_floor():
    def sizes(N, V):
        head = _head.Head("", torch.empty(N, 1), torch.empty(V, 1), torch.zeros(N, dtype=torch.long))
        return [end - begin for begin, end in head.chunks()]

    assert sizes(0, 10) == [] and sizes(5, 10) == [5]
    assert sizes(8192, 151936) == [1664] * 4 + [1536]  # of 1 GiB at most
    assert sizes(2100, 262144) == [768, 768, 564]  # no less than 1024 rows at most, in even parts
    assert max(sizes(100_000, 50257)) == 5120
