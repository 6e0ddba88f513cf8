"""Sums of 16-bit weights and their adapters' products, split into two 16-bit weights for a GPU's products."""

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from test_fused import GPT, at_once, heads, hidden, random_rows

from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import fused, merged_linears, op_step
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.weights import LinearWeights, read_weights, split_weight

MODELS = {
    "llama, biases": build("Llama", **heads(4, 2, 8), attention_bias=True, mlp_bias=True),
    "gpt2": build("GPT2", GPT),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def adapted(make, dtype: torch.dtype) -> Model:
    """Return a model whose adapters add about a hundredth of the weights."""
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    model = Model(lora.attach(make().to(dtype), LoraConfig(rank=2), "lm", 0), cfg=ModelConfig())
    model.module.eval()
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.03)
    return model


def linears(model: Model, split_sums: bool | None) -> list[LinearWeights]:
    layers = read_weights(model, split_sums).layers
    return [linear for x in layers for linear in (*x.qkv, x.out, x.gate, x.up, x.down) if linear]


@DTYPES
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_product_is_that_of_the_float32_sum(name, dtype):
    """Against float64: within one rounding of the result and 2^-15 of the terms, which the sum rounded once is not."""
    model = adapted(MODELS[name], dtype)
    worst = 0.0
    for exact, split in zip(linears(model, False), linears(model, True), strict=True):
        assert exact.weight.dtype == torch.float32 and split.weight.dtype == dtype and split.is_split
        assert split.weight.nbytes == exact.weight.nbytes and split.out_features == exact.out_features
        weight = exact.weight.t() if exact.transposed else exact.weight
        x = torch.randn(50, weight.shape[1]).to(dtype)
        bias = 0.0 if exact.bias is None else exact.bias.double()
        theirs = F.linear(x.double(), weight.double()) + bias
        size = F.linear(x.double().abs(), weight.double().abs()) + abs(bias)
        allowed = torch.finfo(dtype).eps / 2 * theirs.abs() + 2**-15 * size + 1e-6
        assert bool(((op_step._linear(split, x).double() - theirs).abs() <= allowed).all())
        rounded = F.linear(x.double(), weight.to(dtype).double()) + bias
        worst = max(worst, float(((rounded - theirs).abs() / allowed).max()))
    if dtype == torch.bfloat16:
        assert worst > 1, "a sum rounded to the model's dtype passes too"


@pytest.mark.parametrize("name", MODELS)
def test_the_step_of_a_gpu_multiplies_no_float32(name, monkeypatch):
    model, rows = adapted(MODELS[name], torch.bfloat16), random_rows(1, 17)
    monkeypatch.setattr(fused, "find_kernels", lambda _: None)
    with forcing("reference"):
        exact = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows)))
        read = fused.read_weights
        monkeypatch.setattr(fused, "read_weights", lambda model: read(model, split_sums=True))
        dtypes, linear = [], op_step._linear
        monkeypatch.setattr(op_step, "_linear", lambda w, x: dtypes.append((w.weight.dtype, x.dtype)) or linear(w, x))
        split = torch.cat(hidden(FusedDecoder.make(model), rows, at_once(rows)))
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)} and len(dtypes) >= 8
    assert (split - exact).norm() <= 0.02 * exact.norm()


def test_only_16_bit_sums_are_split():
    make = MODELS["llama, biases"]
    assert not any(linear.is_split for linear in linears(adapted(make, torch.float32), True))
    assert not any(linear.is_split for linear in linears(Model(make().bfloat16()), True))
    assert not any(linear.is_split for linear in linears(adapted(make, torch.bfloat16), False))


def test_a_model_on_a_gpu_has_its_sums_split(monkeypatch):
    model = adapted(MODELS["llama, biases"], torch.bfloat16)
    split = [linear.is_split for linear in linears(model, None)]
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    split_on_gpu = [linear.is_split for linear in linears(model, None)]
    assert not any(split) and all(split_on_gpu)


def test_split_weights_are_multiplied_one_by_one():
    """Two that lie side by side in memory would be one product of the wrong inputs."""
    joint = torch.randn(6, 16).bfloat16()
    whole = [LinearWeights(part, None, transposed=False) for part in joint.split([4, 2])]
    assert merged_linears._merge(whole).weight.shape == (6, 16)
    assert merged_linears._merge([linear._replace(is_split=True) for linear in whole]) is None


@DTYPES
@pytest.mark.parametrize("transposed", [False, True])
def test_the_parts_add_up(dtype, transposed):
    weight = torch.randn(7, 5) * torch.logspace(-3, 3, 5)
    weight[0, 0] = 1.5 * torch.finfo(torch.float16).max  # the sum of two float16 numbers
    high, low = split_weight(weight, dtype, transposed).double().chunk(2, dim=0 if transposed else 1)
    bits = {torch.bfloat16: 16, torch.float16: 21}[dtype]
    assert bool(((high + low - weight.double()).abs() <= 2.0**-bits * weight.double().abs() + 2**-25).all())


@DTYPES
def test_what_is_not_finite_stays_so(dtype):
    weight = torch.tensor([[float("inf"), 1.0], [float("-inf"), float("nan")]])
    high, low = split_weight(weight, dtype, transposed=False).chunk(2, dim=1)
    torch.testing.assert_close((high + low).float(), weight, equal_nan=True, rtol=0, atol=0)
