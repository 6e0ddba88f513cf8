"""The training forward as CUDA graphs gives the states and gradients of the layers run op by op.

Without a GPU a recorder that runs the functions again stands for the graphs. It keeps their results in place, as a
graph does, so it fails where a pass depends on other tensors than those that a replay would read and write. It reads
Python's state anew, which a graph does not: tests of switches look whether a new graph was captured.
"""

import copy
import gc
import logging
import os

import pytest
import torch
from architectures import GPT, SMALL, build
from test_packed_decoder import distance, random_batch

from rlhf_fast import graph_capture, ops
from rlhf_fast.batches import Texts
from rlhf_fast.config.fields import LoraConfig, ModelConfig, OptimConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import lora, packed_graphs, packing
from rlhf_fast.model.model import Model
from rlhf_fast.training.gradient_buffers import GradientBuffers, GradientPool
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss

MODELS = {
    "llama": build("Llama", SMALL),
    "mistral, window 6": build("Mistral", SMALL, sliding_window=6),
    "qwen3": build("Qwen3", SMALL, head_dim=16),
    "gpt2": build("GPT2", GPT),
    "gpt_neox": build("GPTNeoX", SMALL, rotary_pct=0.5),
}
NO_KERNELS = ops.varlen_attention.chosen("cpu") == "reference"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(NO_KERNELS, reason="no compiled kernels")),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
pytestmark = pytest.mark.usefixtures("one_thread")


class RunAgain:
    """A recorder that keeps the function, and its result in place."""

    def capture(self, function):
        result = function().clone()
        return lambda: result.copy_(function())


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    monkeypatch.setattr(packed_graphs, "_pools", {})
    if request.param == "cpu":
        monkeypatch.setattr(packed_graphs, "captures_on", lambda _: True)
        monkeypatch.setattr(packed_graphs, "recorder_for", lambda _: RunAgain())
    return request.param


def make_model(device: str, name: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    return Model(MODELS[name]().to(device, dtype))


def without_graphs(model: Model) -> Model:
    """Return a copy with the same weights that captures nothing."""
    twin = copy.deepcopy(model)
    twin._packed_graphs.failed = True
    return twin


def batch_of(model: Model, *sizes: int):
    """Return a batch of one row for each size: tokens, first response token and length."""
    return random_batch(model, [3] * len(sizes), [[size] for size in sizes])


def states_and_gradients(model: Model, batch, seed: int = 0):
    states, _, _ = model.hidden_and_targets(*batch)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(seed)).to(states.device)
    model.module.zero_grad()
    (states.float() * weights).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.decoder.parameters()]
    return states.detach().clone(), [gradient.clone() for gradient in gradients]


def assert_same(found, expected, tolerance: float = 5e-6):
    """Compare states and gradients. A padded product may round otherwise."""
    assert distance(found[0], expected[0]) < tolerance
    largest = max(float(gradient.double().norm()) for gradient in expected[1])
    for mine, other in zip(found[1], expected[1], strict=True):
        assert float((mine.double() - other.double()).norm()) < tolerance * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_layers_op_by_op(device, name, dtype):
    """With other rows than those of the capture, of other lengths and prompts, in one bucket."""
    model = make_model(device, name, dtype)
    plain = without_graphs(model)
    for step, sizes in enumerate([(9, 14, 3), (20, 1), (5, 6, 7, 8), (2,) * 7, (31,)]):
        batch = batch_of(model, *sizes)
        found, expected = states_and_gradients(model, batch), states_and_gradients(plain, batch)
        assert_same(found, expected, 5e-6 if dtype == torch.float32 else 2e-2)
        assert model._packed_graphs.num_graphs == (step > 0)


def test_shared_prompts(device):
    model = make_model(device)
    plain = without_graphs(model)
    for responses in [[5, 9, 2], [7, 7], [1, 30, 4, 4]]:
        batch = random_batch(model, [6, 1], [responses, [3]])
        assert_same(states_and_gradients(model, batch), states_and_gradients(plain, batch))
    assert model._packed_graphs.num_graphs == 1


def test_passes_without_gradients_have_graphs_of_their_own(device):
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    with torch.no_grad():
        expected, _, _ = without_graphs(model).hidden_and_targets(*batch)
        for _ in range(3):
            states, _, _ = model.hidden_and_targets(*batch)
            assert distance(states, expected) < 2e-6
    with torch.inference_mode():
        states, _, _ = model.hidden_and_targets(*batch)
    assert model._packed_graphs.num_graphs == 1 and distance(states, expected) < 2e-6
    for _ in range(2):
        assert_same(states_and_gradients(model, batch), states_and_gradients(without_graphs(model), batch))
    assert model._packed_graphs.num_graphs == 2


def test_rows_are_padded_by_less_than_a_step():
    """To a multiple of 256 tokens and of an eighth of the power of two below, by sequences that fit in their bucket."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    for _ in range(200):
        count = int(torch.randint(1, 70, (), generator=generator))
        lengths = torch.randint(1, int(torch.randint(2, 300, (), generator=generator)), (count,), generator=generator)
        N, offsets = int(lengths.sum()), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        zeros = torch.zeros(N, dtype=torch.int64)
        rows = packing.PackedRows(zeros, zeros, offsets, None, lengths, lengths, lengths)
        num_tokens, num_sequences = packed_graphs.bucket_of(rows)
        padded = packing.pad(rows, num_tokens, num_sequences)
        assert N <= num_tokens < N + max(256, N / 8)
        assert len(padded.tokens) == len(padded.positions) == padded.offsets[-1] == num_tokens
        sizes = padded.offsets.diff()
        assert len(sizes) == num_sequences and sizes.min() >= 0
        assert (sizes[count:] <= packing.PADDING_LENGTH).all()
        assert torch.equal(sizes[:count], lengths)


def test_a_step_in_place_keeps_the_graph_and_new_weights_do_not(device):
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    for _ in range(2):
        states_and_gradients(model, batch)
    with torch.no_grad():
        for p in model.module.parameters():
            p.mul_(1.25)
    assert_same(states_and_gradients(model, batch), states_and_gradients(without_graphs(model), batch))
    assert model._packed_graphs.num_graphs == 1
    layer = model.decoder.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    assert_same(states_and_gradients(model, batch), states_and_gradients(without_graphs(model), batch))
    assert model._packed_graphs.num_graphs == 0
    assert copy.deepcopy(model)._packed_graphs is not model._packed_graphs


def test_two_passes_before_their_gradients(device):
    """The second of them runs op by op, also of another model: activations are not overwritten."""
    model, other = make_model(device), make_model(device, "qwen3")
    batches = [batch_of(model, 9, 14), batch_of(model, 12, 8)]
    for chosen, batch in ((model, batches[0]), (other, batches[1])):
        for _ in range(2):
            states_and_gradients(chosen, batch)
    for second in (model, other):
        expected = [
            states_and_gradients(without_graphs(chosen), batch)
            for chosen, batch in zip((model, second), batches, strict=True)
        ]
        states = [chosen.hidden_and_targets(*batch)[0] for chosen, batch in zip((model, second), batches, strict=True)]
        for chosen, found, wanted in zip((model, second), states, expected, strict=True):
            chosen.module.zero_grad()
            weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(found.device)
            (found.float() * weights).sum().backward()
            assert_same((found, [p.grad for p in chosen.decoder.parameters()]), wanted)


def test_a_pass_that_is_dropped_frees_the_memory(device):
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    for _ in range(2):
        states_and_gradients(model, batch)
    states, _, _ = model.hidden_and_targets(*batch)
    pool = packed_graphs._pools[model.device]
    assert pool.has_pending_backward
    del states
    assert not pool.has_pending_backward


def test_a_second_backward_pass_raises(device):
    """The first writes where the activations were."""
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    for _ in range(2):
        states_and_gradients(model, batch)
    states, _, _ = model.hidden_and_targets(*batch)
    states.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="RLHF_FAST_CUDA_GRAPHS=0"):
        states.sum().backward()


def test_adapters(device):
    """Graphs with them and without them share the weights."""
    model = Model(MODELS["llama"]().to(device), cfg=ModelConfig(lora=LoraConfig(rank=2)))
    model.module = lora.attach(model.module, model.cfg.lora, "lm", 0)
    model.module.eval()
    with torch.no_grad():
        for p in model.trainable().values():
            p.copy_(0.1 * torch.randn(p.shape))
    assert model.packed_refusal is None
    reference, batch = model.reference(), batch_of(model, 9, 14)
    plain = without_graphs(model)
    for _ in range(3):
        assert_same(states_and_gradients(model, batch), states_and_gradients(plain, batch))
        with torch.no_grad():
            found, expected = (m.hidden_and_targets(*batch)[0] for m in (reference, plain.reference()))
            own = model.hidden_and_targets(*batch)[0]
        assert distance(found, expected) < 2e-6 < distance(own, found)
    assert model._packed_graphs.num_graphs == 3


@pytest.mark.parametrize("change", ["scaling", "merge", "dropout", "active adapter", "disabled"])
def test_a_change_of_an_adapter_is_seen(device, change):
    """Also without gradients, in place or by a switch that leaves all addresses as they are."""
    model = Model(MODELS["llama"]().to(device), cfg=ModelConfig(lora=LoraConfig(rank=2, dropout=0.5)))
    model.module = lora.attach(model.module, model.cfg.lora, "lm", 0)
    if change == "active adapter":
        model.module.add_adapter("other", model.module.peft_config["default"])
    model.module.eval()
    batch = batch_of(model, 9, 14)
    with torch.no_grad():
        for name, p in model.module.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape))
        before = [model.hidden_and_targets(*batch)[0] for _ in range(3)][-1]
        assert model._packed_graphs.num_graphs == 1
        layers = [module for module in model.module.modules() if hasattr(module, "lora_A")]
        if change == "scaling":
            for layer in layers:
                layer.scaling["default"] *= 3
        elif change == "merge":
            for layer in layers:
                layer.scaling["default"] *= 3
                layer.merge()
                layer.scaling["default"] /= 3
        elif change == "active adapter":
            model.module.set_adapter("other")
        elif change == "disabled":
            model.module.base_model.disable_adapter_layers()
        for step in range(3):
            with model.train_mode(0.0) if change == "dropout" else model.eval_mode():
                found = model.hidden_and_targets(*batch)[0]
            assert model._packed_graphs.num_graphs == 1 + (step > 0)
            assert distance(found, before) > 1e-3
            if change != "dropout":
                assert distance(found, without_graphs(model).hidden_and_targets(*batch)[0]) < 5e-6


def test_gradient_checkpointing_runs_op_by_op(device):
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    model.module.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        with model.train_mode():
            states_and_gradients(model, batch)
    assert model._packed_graphs.num_graphs == 0


def test_dropout_is_drawn_anew_by_each_replay(device):
    """And by torch's generator: the same seed gives the same states and gradients, as it does op by op."""
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    found = []
    with model.train_mode(0.5):
        for seed in (1, 0, 1, 2, 1, None):
            if seed is not None:
                torch.manual_seed(seed)
            found.append(states_and_gradients(model, batch))
    assert model._packed_graphs.num_graphs == 1
    assert_same(found[2], found[0])
    distances = [[distance(a[0], b[0]) for b in found] for a in found]
    assert distances[2][4] == 0 and all(torch.equal(a, b) for a, b in zip(found[2][1], found[4][1], strict=True))
    assert min(distances[i][j] for i, j in ((2, 3), (2, 5), (3, 4), (3, 5), (4, 5))) > 0.1
    plain = states_and_gradients(model, batch)
    assert distance(plain[0], found[0][0]) > 0.1 and model._packed_graphs.num_graphs == 1


def test_more_sizes_than_graphs_run_op_by_op(device, monkeypatch):
    monkeypatch.setattr(packed_graphs, "MAX_GRAPHS", 2)
    model = make_model(device)
    plain = without_graphs(model)
    for _ in range(3):
        for size in (9, 300, 600):
            batch = batch_of(model, size)
            assert_same(states_and_gradients(model, batch), states_and_gradients(plain, batch))
    assert model._packed_graphs.num_graphs == 2


class Refuses:
    def capture(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_warns_once_and_runs_op_by_op(device, monkeypatch, caplog):
    monkeypatch.setattr(packed_graphs, "recorder_for", lambda _: Refuses())
    monkeypatch.setattr(graph_capture, "_warned", set())
    model = make_model(device)
    batch = batch_of(model, 9, 14)
    expected = states_and_gradients(without_graphs(model), batch)
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        for _ in range(4):
            assert_same(states_and_gradients(model, batch), expected)
    assert len(caplog.records) == 1 and "cannot be captured as a CUDA graph" in caplog.text
    model = make_model(device)
    monkeypatch.setitem(os.environ, "RLHF_FAST_STRICT", "1")
    states_and_gradients(model, batch)
    with pytest.raises(UserError, match="RLHF_FAST_CUDA_GRAPHS=0 turns graphs off"):
        states_and_gradients(model, batch)


def test_a_failed_capture_leaves_other_models_their_graphs(device, monkeypatch):
    """And they capture with another recorder."""
    model, other = make_model(device), make_model(device, "qwen3")
    batch, later = batch_of(model, 9, 14), batch_of(model, 300)
    for _ in range(2):
        states_and_gradients(other, batch)
    pool = packed_graphs._pools[model.device]
    before = pool._recorder
    with monkeypatch.context() as patch:
        patch.setattr(before, "capture", Refuses().capture)
        for _ in range(2):
            states_and_gradients(model, batch)
    assert model._packed_graphs.failed and not other._packed_graphs.failed
    for _ in range(2):
        assert_same(states_and_gradients(other, batch), states_and_gradients(without_graphs(other), batch))
        assert_same(states_and_gradients(other, later), states_and_gradients(without_graphs(other), later))
    assert other._packed_graphs.num_graphs == 2 and pool._recorder not in (None, before)


class OutOfMemory:
    def capture(self, function):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_size_without_memory_runs_op_by_op_and_others_do_not(device, monkeypatch):
    model = make_model(device)
    plain = without_graphs(model)
    large, small = batch_of(model, 600), batch_of(model, 9, 14)
    with monkeypatch.context() as patch:
        patch.setattr(packed_graphs, "recorder_for", lambda _: OutOfMemory())
        for _ in range(2):
            assert_same(states_and_gradients(model, large), states_and_gradients(plain, large))
    for _ in range(3):
        assert_same(states_and_gradients(model, large), states_and_gradients(plain, large))
        assert_same(states_and_gradients(model, small), states_and_gradients(plain, small))
    assert model._packed_graphs.num_graphs == 1 and not model._packed_graphs.failed


def test_nothing_is_captured_where_graphs_are_off(monkeypatch):
    monkeypatch.setattr(packed_graphs, "_pools", {})
    model = make_model("cpu")
    batch = batch_of(model, 9, 14)
    for _ in range(3):
        states_and_gradients(model, batch)
    assert model._packed_graphs.num_graphs == 0 and not packed_graphs._pools
    assert graph_capture.captures_on(torch.device("cuda")) and not graph_capture.captures_on(torch.device("cpu"))
    monkeypatch.setitem(os.environ, "RLHF_FAST_CUDA_GRAPHS", "0")
    assert not graph_capture.captures_on(torch.device("cuda"))


def test_a_parameter_of_two_modules_gets_the_sum_of_its_gradients(device):
    model = make_model(device)
    layer = model.decoder.layers[0]
    layer.post_attention_layernorm.weight = layer.input_layernorm.weight
    layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    plain, batch = without_graphs(model), batch_of(model, 9, 14)
    for _ in range(3):
        assert_same(states_and_gradients(model, batch), states_and_gradients(plain, batch))
    assert model._packed_graphs.num_graphs == 1


def test_a_pool_whose_graphs_are_gone_is_not_used_again(device, monkeypatch):
    recorders, make = [], packed_graphs.recorder_for

    def recorder_for(device):
        recorders.append(make(device))
        return recorders[-1]

    monkeypatch.setattr(packed_graphs, "recorder_for", recorder_for)
    for round in range(2):
        models = [make_model(device), make_model(device, "qwen3")]
        for model in models:
            for _ in range(2):
                states_and_gradients(model, batch_of(model, 9, 14))
            assert model._packed_graphs.num_graphs == 1
        assert len(recorders) == round + 1
        del models, model
        gc.collect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_learner_takes_the_same_steps(device, dtype):
    """Several micro-batches each, of which the gradients add up."""
    models = [make_model(device, dtype=dtype)]
    models.append(without_graphs(models[0]))
    learners = [Learner(model, OptimConfig(lr=1e-3, micro_batch_tokens=40), 10) for model in models]
    for _ in range(4):
        tokens, _first, lengths = batch_of(models[0], 9, 14, 11, 16, 3)
        texts = Texts(tokens, lengths)
        found, expected = (learner.step([(pretrain_loss, texts, 1.0)]) for learner in learners)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
    assert models[0]._packed_graphs.num_graphs >= 1 and models[1]._packed_graphs.num_graphs == 0


def test_gradients_of_several_backward_passes_are_added_in_float32():
    """As those of parameters on a GPU are: after each backward pass, without their rounding."""
    buffers = GradientBuffers(GradientPool())
    weights = [torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    masters = [p.detach().float() for p in weights]
    buffers.gathered = list(zip(weights, masters, strict=True))
    total = [torch.zeros_like(master) for master in masters]
    for step in range(3):
        used = weights if step == 1 else weights[:1]
        for i, p in enumerate(used):
            gradient = torch.randn(3, 5).bfloat16()
            p.grad = gradient.clone()
            total[i] += gradient
        buffers.gather()
        assert all(p.grad is None for p in weights)
    assert all(torch.equal(master.grad, wanted) for master, wanted in zip(masters, total, strict=True))


def test_a_gradient_of_no_step_is_not_added_to_the_next():
    """As one that a backward pass left which did not end."""
    buffers = GradientBuffers(GradientPool())
    p = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    master = p.detach().float()
    buffers.gathered = [(p, master)]
    p.grad = torch.ones_like(p)
    buffers.release()
    assert p.grad is None
    p.grad = torch.ones_like(p)
    buffers.gather()
    assert torch.equal(master.grad, torch.ones(3, 5))
