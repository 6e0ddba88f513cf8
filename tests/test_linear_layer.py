"""The op `linear`: a row's bits beside other rows, odd sizes, strides, the order of the decode step."""

import sys
from importlib import import_module

import pytest
import torch

from rlhf_fast import ops
from rlhf_fast.kernels import _product
from rlhf_fast.kernels._backends import COMPILED

AVX = [backend for backend in COMPILED if backend.startswith("cpu:avx")]
SIZES = [(1, 1, 1), (5, 7, 17), (13, 64, 31), (49, 130, 65), (96, 171, 3), (385, 33, 70), (12, 4100, 9)]
"""(rows, in, out)"""


def inputs(rows, size, out, dtype, transposed):
    x = torch.randn(rows, size + 3)[:, :size]
    weight = torch.randn((size, out) if transposed else (out, size)).to(dtype)
    return x, weight, torch.randn(out).to(dtype)


@pytest.mark.parametrize("backend", AVX)
@pytest.mark.parametrize("rows, size, out", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype, decode_order", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_a_row_has_the_bits_that_it_has_alone(backend, rows, size, out, transposed, dtype, decode_order):
    linear = ops.linear.backend(backend)
    x, weight, bias = inputs(rows, size, out, dtype, transposed)
    found = linear(x, weight, bias, transposed, decode_order)
    matrix = weight.t() if transposed else weight
    rounded = dtype == torch.bfloat16
    truth = x.double() @ matrix.double().t() + bias.double()
    scale = x.double().abs() @ matrix.double().abs().t() + bias.double().abs()
    assert ((found.double() - truth).abs() <= (2**-8 if rounded else 3e-7 * (size**0.5 + 1)) * scale).all()
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(linear(x[row : row + 1], weight, bias, transposed, decode_order), found[row : row + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(linear(x, weight, bias, transposed, decode_order), found)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", AVX)
@pytest.mark.parametrize("size", [1, 127, 128, 129, 300, 1031])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_order_of_the_decode_step_is_that_of_its_kernel(backend, size, transposed):
    """With a transposed weight a training step multiplies by another kernel, which sums in the same order."""
    home = import_module("rlhf_fast.kernels.linear")
    for rows in (1, 7, 50):
        x, weight, bias = inputs(rows, size, 45, torch.float32, transposed)
        decoded = home._decode_product(COMPILED[backend], x, weight, bias, transposed, False, None)
        assert torch.equal(ops.linear.backend(backend)(x, weight, bias, transposed, True), decoded)


@pytest.mark.parametrize("how", [0, 1, 2], ids=["in float32", "by the instruction", "emulated"])
def test_strided_rows_in_bfloat16(how, monkeypatch):
    """The rounded copy of x is dense, x need not be."""
    monkeypatch.setattr(_product, "BF16_DOT", how)
    x, weight, bias = inputs(40, 64, 48, torch.bfloat16, False)
    assert x.stride(0) == 67
    assert torch.equal(ops.linear(x, weight, bias, False, True), ops.linear(x.clone(), weight, bias, False, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, out", [((7, 0), 5), ((2, 5, 0), 3), ((4, 8), 0), ((0, 8), 3), ((0, 0), 0)])
@pytest.mark.parametrize("decode_order", [False, True])
def test_nothing_to_multiply(dtype, shape, out, decode_order):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(size).to(dtype).requires_grad_() for size in ((out, shape[-1]), (out,)))
    if dtype == torch.bfloat16 and not decode_order:
        x = x.detach().bfloat16().requires_grad_()
    found = ops.linear(x, weight, bias, decode_order=decode_order)
    assert torch.equal(found, bias.detach().to(x.dtype).expand(*shape[:-1], out))
    found.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape and not weight.grad.any()


@pytest.mark.parametrize("how", [1, 2], ids=["by the instruction", "emulated"])
@pytest.mark.parametrize("rows, size, out", [(1, 1, 1), (65, 172, 17), (96, 80, 65), (385, 33, 70), (129, 64, 344)])
def test_sums_over_lanes_are_those_of_a_row_alone_in_bfloat16(rows, size, out, how, monkeypatch):
    """Many rows are multiplied by a panel whose lanes are columns; one row by a tile that adds over its lanes."""
    monkeypatch.setattr(_product, "BF16_DOT", how)
    x, weight, bias = inputs(rows, size, out, torch.bfloat16, False)
    found = ops.linear(x, weight, bias, False, True)
    alone = torch.cat([ops.linear(row[None], weight, bias, False, True) for row in x])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("how", [0, 1, 2, "torch's"], ids=["in float32", "by the instruction", "emulated", "torch's"])
@pytest.mark.parametrize("rows, size, out", [(1, 1, 1), (5, 7, 17), (49, 130, 65), (385, 33, 70), (800, 172, 64)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_a_weight_in_bfloat16(rows, size, out, transposed, how, monkeypatch, poisoned):
    """They are those of the rounded upstream in float64, have the dtypes of the inputs, and no thread changes a bit."""
    is_ours = how == 2 or (how == 1 and COMPILED and _product.has_bf16_product(list(COMPILED.values())[-1]))
    if how == "torch's":
        monkeypatch.setattr(sys.modules["rlhf_fast.kernels.linear"], "MAX_BF16_WEIGHT", 0)
    else:
        monkeypatch.setattr(_product, "BF16_DOT", how)
    x, weight, bias = (t.detach().requires_grad_() for t in inputs(rows, size, out, torch.bfloat16, transposed))
    upstream = torch.randn(rows, out)

    def gradients():
        return torch.autograd.grad(ops.linear(x, weight, bias, transposed, True), (x, weight, bias), upstream)

    g, rounded, matrix = upstream.bfloat16().double(), x.detach().bfloat16().double(), weight.detach().double()
    to_weight = rounded.t() @ g if transposed else g.t() @ rounded
    truth = g @ (matrix.t() if transposed else matrix), to_weight, upstream.double().sum(0)
    found = gradients()
    assert [f.dtype for f in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    # our kernel rounds the gradient of x to no bfloat16, and that of the weight once
    bounds = (2e-5, 0.004, 0.01) if is_ours else (0.01, 0.01, 0.01)
    for f, t, bound in zip(found, truth, bounds, strict=True):
        assert f.shape == t.shape and (f.double() - t).abs().max() <= bound * t.abs().max()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert all(map(torch.equal, found, gradients()))
    finally:
        torch.set_num_threads(threads)
