"""Weights that are moved next to one another: merged products give the separate ones' results, and training, saving and
checkpoints go on as before."""

import copy

import pytest
import torch
import toy
import transformers
from architectures import build, prompts, sampling
from test_fused import heads

from rlhf_fast.batches import Texts, pad_rows
from rlhf_fast.config.fields import LoraConfig, ModelConfig, OptimConfig
from rlhf_fast.kernels._backends import forcing
from rlhf_fast.model.adjacent_weights import make_adjacent
from rlhf_fast.model.model import Model
from rlhf_fast.rollout import op_step
from rlhf_fast.rollout.cuda_graphs import DecodeGraphs
from rlhf_fast.rollout.fused import FusedDecoder
from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.merged_linears import merge_adjacent
from rlhf_fast.rollout.op_step import OpStep
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.rollout.sampler import Sampler
from rlhf_fast.rollout.weights import read_weights
from rlhf_fast.run import checkpoint
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss

pytestmark = pytest.mark.usefixtures("one_thread")
MERGED = {
    "llama": build("Llama", **heads(4, 2, 8)),
    "llama, biases": build("Llama", **heads(4, 1, 24), attention_bias=True, mlp_bias=True),
    "llama, gelu": build("Llama", hidden_act="gelu"),
    "qwen2": build("Qwen2"),
    "qwen3": build("Qwen3", **heads(4, 2, 80)),
}
LAYERS = 2


def counts(model: Model) -> tuple[int, int]:
    """Return how many layers have merged q, k and v, and merged gate and up."""
    layers = merge_adjacent(read_weights(model)).layers
    return sum(len(layer.qkv) == 1 for layer in layers), sum(layer.gate_up is not None for layer in layers)


def texts() -> Texts:
    return Texts(*pad_rows([row * 2 for row in prompts(9, 4, 7).tokens]))


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rollouts_are_those_of_separate_weights(name, dtype, monkeypatch):
    model, batch = Model(MERGED[name]().to(dtype)), prompts(5, 9, 1)
    products = []
    linear = op_step._linear
    monkeypatch.setattr(op_step, "_linear", lambda *args: products.append(1) or linear(*args))

    def generate():
        with forcing("reference"):
            rollout = Rollout(model, sampling(temperature=0.0, max_new_tokens=4), decode_path="fused")
            products.clear()  # those of the comparison with the module, which is made once
            found = rollout.generate(batch)
        return found, len(products)

    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    assert counts(model) == (0, 0)
    separate, calls = generate()
    make_adjacent(model.decoder)
    assert counts(model) == (0 if name == "qwen3" else LAYERS, LAYERS)
    merged, fewer_calls = generate()
    assert fewer_calls * 7 == calls * (6 if name == "qwen3" else 4)
    after = model.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    torch.testing.assert_close(merged.logprobs, separate.logprobs, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.3)
    if dtype == torch.float32:
        assert torch.equal(merged.tokens, separate.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learner_first", [True, False])
def test_training_goes_on(dtype, learner_first):
    """Bit for bit, whether the optimizer was there before the weights were moved or not."""
    module = MERGED["qwen2"]().to(dtype)
    plain, moved = Model(copy.deepcopy(module)), Model(module)
    optim = OptimConfig(lr=1e-2, schedule="constant")
    expected = Learner(plain, optim, 10, ema=0.9)
    if not learner_first:
        make_adjacent(moved.decoder)
    learner = Learner(moved, optim, 10, ema=0.9)
    batch = texts()
    for step in range(3):
        for one in (expected, learner):
            one.step([(pretrain_loss, batch, 1.0)])
        if step == 0:
            make_adjacent(moved.decoder)
    with learner.averaged():
        assert counts(moved) == (LAYERS, LAYERS)
    assert counts(moved) == (LAYERS, LAYERS), "the optimizer moved the weights"
    ours, theirs = moved.module.state_dict(), plain.module.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    saved, expected_saved = learner.state_dict(), expected.state_dict()
    for part in ("weights", "ema"):
        assert all(torch.equal(saved[part][key], value) for key, value in expected_saved[part].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_and_a_saved_folder_hold_plain_weights(tmp_path, dtype):
    model = Model.load(ModelConfig(toy.model(tmp_path / "base"), dtype=dtype))
    expected = {key: value.clone() for key, value in model.module.state_dict().items()}
    make_adjacent(model.decoder)
    assert counts(model)[0]
    learner = Learner(model, OptimConfig(lr=1e-2), 10)
    checkpoint.save(tmp_path, 1, {"learner": learner.state_dict()})
    model.save(tmp_path / "out")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in plain.state_dict().items())
    learner.step([(pretrain_loss, Texts(*pad_rows([[3, 4, 5, 6], [5, 3]])), 1.0)])
    assert not all(torch.equal(value, expected[key]) for key, value in model.module.state_dict().items())
    learner.load_state_dict(checkpoint.load(tmp_path / "step_1")["learner"])
    assert all(torch.equal(value, expected[key]) for key, value in model.module.state_dict().items())
    assert counts(model)[0], "loading moved the weights"


def test_moved_and_copied_weights_are_multiplied_one_by_one():
    model = Model(MERGED["llama"]())
    make_adjacent(model.decoder)
    addresses = [p.data_ptr() for p in model.module.parameters()]
    make_adjacent(model.decoder)
    assert [p.data_ptr() for p in model.module.parameters()] == addresses, "they were adjacent already"
    twin = Model(copy.deepcopy(model.module))
    assert counts(twin) == (0, 0)
    twin.decoder.layers[0].mlp.up_proj.weight.data.zero_()
    assert model.decoder.layers[0].mlp.up_proj.weight.any() and model.decoder.layers[0].mlp.gate_proj.weight.any()
    mlp = model.decoder.layers[0].mlp
    mlp.up_proj.weight.data = mlp.up_proj.weight.data.clone()
    assert counts(model) == (LAYERS, LAYERS - 1)
    model.module.to(torch.bfloat16)
    assert counts(model) == (0, 0)
    make_adjacent(model.decoder)
    assert counts(model)[0] == LAYERS


def test_weights_that_share_memory_stay_where_they_are():
    model = Model(MERGED["llama"]())
    first, second = (layer.self_attn.q_proj.weight for layer in model.decoder.layers)
    second.data = first.data
    make_adjacent(model.decoder)
    assert second.data_ptr() == first.data_ptr() and counts(model) == (0, LAYERS)


def test_a_sum_with_an_adapter_is_multiplied_alone():
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    module = MERGED["llama"]()
    make_adjacent(module)
    wrapped = lora.attach(module, LoraConfig(rank=2), "lm", 0)
    model = Model(wrapped)
    assert counts(model) == (0, 0)
    assert counts(model.reference()) == (LAYERS, LAYERS), "without its adapters they are the module's own weights"
    untouched = lora.attach(MERGED["llama"](), LoraConfig(rank=2), "lm", 0)
    addresses = [p.data_ptr() for p in untouched.parameters()]
    make_adjacent(untouched)
    assert [p.data_ptr() for p in untouched.parameters()] == addresses


def test_graphs_know_merged_weights_as_the_modules_own():
    model = Model(MERGED["llama"]())
    make_adjacent(model.decoder)
    decoder = FusedDecoder.make(model)
    cache = PagedKVCache(decoder.shapes, decoder.dtype, torch.device("cpu"), 2, 1, 2, 4)
    sampler = Sampler(model, sampling(), [2], 3)
    step = OpStep(merge_adjacent(read_weights(model)), cache, None)
    graphs = DecodeGraphs(step, sampler, None)
    assert graphs.reads_parameters() and graphs.fit(step, sampler)
    assert not graphs.fit(OpStep(read_weights(model), cache, None), sampler)


def test_weights_that_are_moved_in_inference_mode_can_be_trained():
    model = Model(MERGED["llama"]())
    with torch.inference_mode():
        make_adjacent(model.decoder)
        assert counts(model) == (LAYERS, LAYERS)
    assert not any(p.is_inference() for p in model.module.parameters())
    Learner(model, OptimConfig(lr=1e-2), 10).step([(pretrain_loss, texts(), 1.0)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_on_a_gpu_are_moved_when_the_decoder_is_made():
    model = Model(MERGED["llama"]().cuda())
    FusedDecoder.make(model)
    assert counts(model) == (LAYERS, LAYERS)
    model.module.cpu()
    assert counts(model) == (0, 0)
    FusedDecoder.make(model)
    assert counts(model) == (0, 0)
