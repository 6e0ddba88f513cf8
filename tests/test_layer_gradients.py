"""Gradients of the ops that a decoder's layers are made of: rms_norm, layer_norm, swiglu, gelu and rope.

The truth is autograd through torch's own functions, in float64, which share nothing with the ops' references.
"""

import pytest
import torch
import torch.nn.functional as F

from rlhf_fast import ops
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.kernels._op import OPS
from rlhf_fast.model.tape import _whole

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the largest value; half of its rounding
NAMES = ("rms_norm", "layer_norm", "swiglu", "gelu", "rope")
BACKENDS = [b for b in OPS["rms_norm"].backends if b.startswith("cpu")]


def rotated(x, cos, sin):
    """Rotate as transformers does: x cos + rotate_half(x) sin."""
    half = cos.shape[1]
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return torch.cat([x * cos.repeat(1, 2)[:, None] + turned * sin.repeat(1, 2)[:, None], rest], -1)


def problem(name, N, D, dtype):
    """Return a call of an op, the same in plain torch, and arguments: of odd strides where the op says that it reads
    them."""
    both = 2 * torch.randn(N, 2 * D, dtype=dtype)
    x, weight, bias = both[:, :D], torch.randn(D, dtype=dtype), torch.randn(D, dtype=dtype)
    angles = 6 * torch.rand(N, D // 2)
    heads = torch.randn(N, 5, D, dtype=dtype)[:, 1:4]
    return {
        "rms_norm": (
            lambda x, w: ops.rms_norm(x, w, 1e-6, None, 1.0),
            lambda x, w: F.rms_norm(x, (D,), w + 1, 1e-6),
            (x, weight),
        ),
        "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (D,), w, b), (x, weight, bias)),
        "swiglu": (ops.swiglu, lambda gate, up: F.silu(gate) * up, (x, both[:, D:])),
        "gelu": (ops.gelu, F.gelu, (x,)),
        "gelu_tanh": (lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), (x,)),
        "rope": (
            lambda x: ops.rope(x, angles.cos(), angles.sin()),
            lambda x: rotated(x, angles.double().cos(), angles.double().sin()),
            (heads,),
        ),
    }[name]


def gradients(call, args, upstream):
    args = [a.detach().requires_grad_() for a in args]
    return torch.autograd.grad(call(*args), args, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", [*NAMES, "gelu_tanh"])
def test_gradients_are_those_of_torchs_own_functions_in_float64(name, dtype, poisoned):
    for N, D in ((1, 6), (3, 17), (65, 80), (33, 129), (70, 10)):
        ours, plain, args = problem(name, N, D, dtype)
        doubles = [a.double() for a in args]
        upstream = torch.randn(args[0].shape, dtype=dtype)
        expected = gradients(plain, doubles, upstream.double())
        for backend in BACKENDS if dtype != torch.float16 else ["reference"]:
            with forcing(backend):
                found = gradients(ours, args, upstream)
            for grad, truth, arg in zip(found, expected, args, strict=True):
                assert grad.dtype == dtype and grad.shape == arg.shape
                error = (grad.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-2)
                assert error < BOUND[dtype], (N, D, backend, error)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_derivative_of_gelu_is_exact_everywhere(approximate):
    x = torch.cat([torch.linspace(-20, 20, 40001), torch.tensor([-1e30, -100.0, 100.0, 1e30])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.gelu(exact, approximate=approximate).sum(), exact)
    truth = truth.nan_to_num(0).where(exact.abs() < 1e29, (exact > 0).double())  # torch multiplies infinity by 0
    for backend in ["reference", *BACKENDS]:
        (found,) = torch.autograd.grad(ops.gelu.backend(backend)(x, approximate).sum(), x)
        kept = slice(None) if backend != "reference" else slice(0, 40001)
        atol = 3e-7 if backend != "reference" else 3e-6
        torch.testing.assert_close(found[kept].double(), truth[kept], rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_one_and_two_threads_give_the_same_bits(name):
    ours, _, args = problem(name, 1043, 66, torch.float32)
    upstream = torch.randn(args[0].shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(ours, args, upstream))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_with_a_residual_a_gradient_is_refused_and_nothing_is_written(name):
    op, x, weight = OPS[name], torch.randn(3, 8), torch.randn(8)
    for asks in (0, 1, 2):
        given = [x.clone(), weight.clone(), torch.randn(3, 8)]
        given[asks].requires_grad_()
        before = given[2].detach().clone()
        with pytest.raises(ValueError, match=f"{name}: there is no gradient where residual is written in place; add"):
            op(given[0], given[1], residual=given[2])
        assert torch.equal(given[2], before)
        with torch.no_grad():
            op(given[0], given[1], residual=given[2])
        assert torch.equal(given[2], before + x)
    with pytest.raises(ValueError, match=f"{name}: there is no gradient where residual"):
        torch.func.jvp(lambda x: op(x, weight, residual=torch.zeros(3, 8)), (x,), (x,))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_frozen_vector_has_no_gradient_and_changes_no_other(name):
    op, x, vectors = OPS[name], torch.randn(40, 19), [torch.randn(19) for _ in range(1 + (name == "layer_norm"))]
    upstream = torch.randn(40, 19)
    whole = gradients(op, (x, *vectors), upstream)
    for asked in range(len(vectors) + 1):
        given = [a.clone().requires_grad_(i == asked) for i, a in enumerate((x, *vectors))]
        (found,) = torch.autograd.grad(op(*given), given[asked], upstream)
        assert torch.equal(found, whole[asked])


def test_swiglu_gives_the_gradient_of_one_product_without_a_copy():
    both, grad = torch.randn(7, 2 * 19), torch.randn(7, 19)
    gate, up = (half.detach().requires_grad_() for half in both.chunk(2, -1))
    found = torch.autograd.grad(ops.swiglu(gate, up), (gate, up), grad)
    whole = OPS["swiglu_backward"](grad, gate.detach(), up.detach())
    assert whole.shape == both.shape and torch.equal(torch.cat(found, -1), whole)
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


def test_rope_copies_the_heads_that_it_does_not_rotate():
    both = torch.randn(7, 9, 10)
    x, angles = both[:, 1:].requires_grad_(), 6 * torch.rand(7, 4)
    upstream = torch.randn(7, 8, 10)
    out = ops.rope(x, angles.cos(), angles.sin(), 5)
    rotated = ops.rope(x[:, :5], angles.cos(), angles.sin())
    assert torch.equal(out[:, :5], rotated) and torch.equal(out[:, 5:], x[:, 5:])
    (found,) = torch.autograd.grad(out, x, upstream)
    (expected,) = torch.autograd.grad(rotated, x, upstream[:, :5])
    assert torch.equal(found[:, :5], expected[:, :5]) and torch.equal(found[:, 5:], upstream[:, 5:])
    for count in (-1, 9):
        with pytest.raises(ValueError, match="rope: num_rotated must be 0 to 8"):
            ops.rope(x, angles.cos(), angles.sin(), count)


def test_attention_gives_the_gradients_of_one_product_without_a_copy():
    product = torch.randn(9, 8, 16).requires_grad_()
    q, k, v = product.split([4, 2, 2], 1)
    offsets = torch.tensor([0, 4, 9])
    found = torch.autograd.grad(ops.varlen_attention(q, k, v, offsets, 0.25), (q, k, v), torch.randn(9, 4, 16))
    whole = _whole(found)
    assert whole.data_ptr() == found[0].data_ptr() and torch.equal(whole, torch.cat(found, 1))
    for others in (found[1:], found[::-1]):
        copied = _whole(others)
        assert torch.equal(copied, torch.cat(others, 1)) and copied.is_contiguous()


def test_a_backward_pass_runs_on_the_best_backend_where_the_forced_one_has_no_kernel(monkeypatch):
    op, backward = OPS["rms_norm"], OPS["rms_norm_backward"]
    monkeypatch.setitem(op.implementations, "cpu:forward", op.reference)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    expected = torch.autograd.grad(op(x, weight).sum(), (x, weight))
    found = torch.autograd.grad(op.backend("cpu:forward")(x, weight).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with forcing("cpu:forward"), pytest.raises(ValueError, match="rms_norm_backward: no backend 'cpu:forward' here"):
        backward(torch.ones(3, 8), None, x.detach(), weight.detach(), 1e-6, 0.0, True)
