"""csrc/cuda's kernels over rows, on a GPU or run on the CPU by tests/simt.

The bits of a row do not depend on its address nor on how blocks share the work. Memory outside a row is not used.
float16 works.
"""

from importlib import import_module

import pytest
import torch
from cuda_kernels import at_offset, cuda_backends, on_each_backend
from test_ops import assert_near, detached, reference, results, to
from test_simt import build, run

from rlhf_fast.kernels import _head as head
from rlhf_fast.kernels import _head_checks as head_checks
from rlhf_fast.kernels._op import OPS

NAMES = ("token_logprobs", "token_logprobs_backward", "ranking_loss_with_gradients", "rms_norm", "layer_norm")
pytestmark = pytest.mark.skipif(not cuda_backends("token_logprobs"), reason="no CUDA kernels here")
on_each_backend = on_each_backend("token_logprobs")
for_each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def forward_and_backward(backend, logits, targets, softcap=0.0):
    """Return log-probabilities, entropies, and the gradient of a weighted sum of them."""
    outs = OPS["token_logprobs"].backend(backend)(logits, targets, 0.7, softcap)
    grads = torch.linspace(-1, 2, 2 * len(targets), device=logits.device).view(2, -1)
    return *outs, OPS["token_logprobs_backward"].backend(backend)(*grads, logits, targets, 0.7, softcap)


@on_each_backend
@for_each_dtype
@pytest.mark.parametrize("V, softcap", [(8, 0.0), (41, 20.0), (9001, 0.0)])
def test_a_row_of_logits_has_the_same_bits_at_every_offset(backend, device, dtype, V, softcap):
    """Rows of a warp and rows of a block, split into parts and not."""
    logits = (4 * torch.randn(3, V, device=device)).to(dtype)
    targets = torch.tensor([0, V - 1, V // 2], device=device)
    expected = forward_and_backward(backend, logits, targets, softcap)
    assert all(x.isfinite().all() for x in expected)
    for offset in range(1, 8):
        for ours, same in zip(
            forward_and_backward(backend, at_offset(logits, offset), targets, softcap), expected, strict=True
        ):
            assert torch.equal(ours, same)


@on_each_backend
@pytest.mark.parametrize("dtype, V", [(torch.bfloat16, 20011), (torch.bfloat16, 49152), (torch.float32, 16385)])
def test_blocks_that_share_a_row_give_the_bits_of_one_block(backend, device, dtype, V, monkeypatch):
    logits = (4 * torch.randn(3, V, device=device)).to(dtype)
    logits[1, :16384] = -torch.inf  # its first part has no finite logit
    targets = torch.tensor([7, V - 1, head.IGNORE_INDEX], device=device)
    op = OPS["token_logprobs"]
    shared = op.backend(backend)(logits, targets)
    monkeypatch.setattr(import_module("rlhf_fast.kernels.token_logprobs"), "MAX_SPLIT_ROWS", 0)
    alone = op.backend(backend)(logits, targets)
    truth = op.reference(logits.double(), targets, 1.0, 0.0)
    for ours, same, exact in zip(shared, alone, truth, strict=True):
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours.double(), exact, atol=5e-6, rtol=1e-6)


@on_each_backend
@pytest.mark.parametrize("dtype, V", [(torch.bfloat16, 30000), (torch.bfloat16, 120001), (torch.float32, 60002)])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_gradients_of_rows_that_fit_and_do_not_fit_into_shared_memory(backend, device, dtype, V, softcap):
    logits = (4 * torch.randn(3, V, device=device)).to(dtype)
    targets = torch.tensor([V - 3, head.IGNORE_INDEX, 1], device=device)
    logits[1] = torch.nan
    op, grads = OPS["token_logprobs_backward"], torch.randn(2, 3, device=device)
    ours = op.backend(backend)(*grads, logits, targets, 0.7, softcap)
    truth = op.reference(*grads.double(), logits.double(), targets, 0.7, softcap)
    assert_near(ours, lambda: op.reference(*grads, logits, targets, 0.7, softcap), truth, "gradient")
    assert ours[1].eq(0).all() and truth[0].abs().max() > 1e-3


@on_each_backend
def test_a_row_whose_target_is_outside_it_is_nan_and_nothing_outside_the_row_is_loaded(backend, device, monkeypatch):
    """On a GPU targets are not checked before the launch: the check would wait for the device. All results of the row
    are NaN, the gradient too: a finite one would train on a token that does not exist."""
    monkeypatch.setattr(head_checks, "check_targets", lambda *_: None)
    logits, targets = torch.randn(3, 40, device=device), torch.tensor([40, -1, 3], device=device)
    ours = forward_and_backward(backend, logits, targets)
    assert all(x[:2].isnan().all() for x in ours)
    last = OPS["token_logprobs"].reference(logits[2:].double(), targets[2:], 0.7, 0.0)
    for x, truth in zip(ours[:2], last, strict=True):
        torch.testing.assert_close(x[2:].double(), truth, atol=5e-6, rtol=1e-6)
    row, grads = ours[2][2].double(), torch.linspace(-1, 2, 6, device=device, dtype=torch.float64).view(2, -1)
    truth = OPS["token_logprobs_backward"].reference(*grads[:, 2:], logits[2:].double(), targets[2:], 0.7, 0.0)[0]
    assert (row - truth).norm() <= 1e-6 * truth.norm()
    # float32 exponents up to 10 are rounded by up to 5e-7, each its own way
    assert row.isfinite().all() and row.sum().abs() <= 6e-7 * row.abs().sum() + 1e-6 * row.abs().max()


def test_the_gradient_from_a_row_s_coefficients(tmp_path):
    """With softcap and temperature, against kernels/_head.py. A softcap makes a logit of -inf finite."""
    if build.compiler() is None:
        pytest.skip("no g++")
    kernel = """
    #include "softmax.cuh"
    __global__ void kernel(float* out) {
      const Scaling scaling = make_scaling(0.7, 20.f);
      const int i = threadIdx.x, target = 5;
      const float x = i == 40 ? -INFINITY : 9 * sinf(i);
      SoftmaxState state = {x, origin_of<true>(x, scaling), 1.f, 0.f};
      if (i == target) state = empty_state();
      state = block_merge<true>(state, scaling, shared_memory<float>());
      const Softmax softmax = softmax_of<true>(state, 9 * sinf(target), scaling);
      const LogitGrad grad = logit_grad_of(softmax, -1.5f, 0.25f, scaling);
      out[i] = i == target ? grad.target : logit_grad<true>(x, grad, scaling);
    }"""
    status, output = run(tmp_path, kernel, shared="384")
    assert status == 0, output
    i = torch.arange(64, dtype=torch.float64)
    x = (9 * i.sin()).masked_fill(i == 40, -torch.inf)[None]
    targets, g, h = torch.tensor([5]), *torch.tensor([[-1.5], [0.25]], dtype=torch.float64)
    by_z = head.logits_grad(head.log_softmax(x, targets, 0.7, 20.0), targets, g, h)
    exact = (by_z * head.scale_logits_grad(x, 0.7, 20.0))[0]
    ours = torch.tensor([float(number) for number in output.split()], dtype=torch.float64)
    torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)
    assert exact.abs().max() > 0.1


def norms(backend, x, weight, bias, residual):
    out = []
    for name, rest in (("rms_norm", {"offset": 1.0}), ("layer_norm", {"bias": bias})):
        stream = None if residual is None else residual.clone()
        out += [OPS[name].backend(backend)(x, weight, residual=stream, **rest)]
        out += [] if stream is None else [stream]
    return out


@on_each_backend
@for_each_dtype
@pytest.mark.parametrize("D", [24, 1040, 6000, 20000], ids=["warp", "block", "large block", "beyond registers"])
def test_a_row_of_a_norm_has_the_same_bits_at_every_offset(backend, device, dtype, D):
    x, residual = torch.randn(2, 3, D, device=device).to(dtype)
    weight, bias = torch.randn(2, D, device=device)
    for stream in (None, residual):
        expected = norms(backend, x, weight, bias, stream)
        for ours, same in zip(
            norms(backend, at_offset(x, 1), at_offset(weight, 3), bias, stream), expected, strict=True
        ):
            assert torch.equal(ours, same)
        summed = (x if stream is None else x + residual).double()
        centred = summed - summed.mean(-1, keepdim=True)
        rms = summed * (summed.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight + 1).double()
        layer = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double() + bias.double()
        bound = {"rtol": {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype], "atol": 4e-6}
        torch.testing.assert_close(expected[0].double(), rms, **bound)
        torch.testing.assert_close(expected[-1 if stream is None else 2].double(), layer, **bound)


@on_each_backend
@for_each_dtype
def test_activations_have_the_same_bits_at_every_offset(backend, device, dtype):
    for F in (2048, 33):
        gate, up = (3 * torch.randn(2, 3, F, device=device)).to(dtype)
        for op, args in ((OPS["swiglu"], (gate, up)), (OPS["gelu"], (gate,)), (OPS["gelu"], (up, "tanh"))):
            expected = op.backend(backend)(*args)
            moved = [at_offset(x, 1) if isinstance(x, torch.Tensor) else x for x in args]
            assert torch.equal(op.backend(backend)(*moved), expected) and expected.isfinite().all()


@on_each_backend
@pytest.mark.parametrize("name", [*NAMES, "swiglu", "gelu"])
def test_float16_works(backend, device, name):
    op = OPS[name]
    for size in op.small_sizes:
        args = detached(op.make_inputs(device=device, dtype=torch.float16, **size))
        with torch.no_grad():
            truth = results(op, reference(op), to(args, torch.float64))
            ours = results(op, op.implementations[backend], op.bind(*args))
            assert_near(ours, lambda op=op, args=args: results(op, reference(op), args), truth, name)
