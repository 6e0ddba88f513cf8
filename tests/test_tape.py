"""Decoder layers on a tape: the gradients are autograd's, and what the tape keeps, frees and refuses."""

import gc
import re
import weakref

import pytest
import torch
from architectures import build
from test_fused import MODELS
from test_packed_decoder import distance, random_batch
from torch import nn
from torch.autograd.graph import Node

from rlhf_fast import ops
from rlhf_fast.config.fields import LoraConfig, OptimConfig
from rlhf_fast.model import packed_decoder, tape
from rlhf_fast.model.adjacent_weights import join
from rlhf_fast.model.model import Model
from rlhf_fast.model.modules import all_modules
from rlhf_fast.model.tape import Tape
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.losses import pretrain_loss

pytestmark = pytest.mark.skipif(ops.varlen_attention.chosen("cpu") == "reference", reason="no compiled kernels")


def nodes(x) -> list[Node]:
    """Return all nodes of autograd's graph that led to x."""
    found, left = {}, [x.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found[node] = None
            left += [following for following, _ in node.next_functions]
    return list(found)


def taped_nodes(x) -> list[Node]:
    return [node for node in nodes(x) if "TapedLayer" in node.name()]


def gradients(model, batch, weights):
    hidden, _, _ = model.hidden_and_targets(*batch)
    parameters = [p for p in model.module.base_model.parameters() if p.requires_grad]
    found = torch.autograd.grad((hidden.double() * weights).sum(), parameters, allow_unused=True)
    return hidden, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def prepared(name: str, dtype=torch.float32) -> tuple[Model, tuple, torch.Tensor]:
    """Return a model with adjacent weights, a batch whose rows share prompts, and factors of the states' sum."""
    model = Model((MODELS[name]() if name in MODELS else build(name)()).to(dtype))
    model.prepare_training()
    batch = random_batch(model, [17, 5], [[11, 1, 25], [16]])
    width = model.head_layer.weight.shape[1]
    return model, batch, torch.randn(int((batch[2] - batch[1]).sum()), width, dtype=torch.float64)


@pytest.mark.parametrize("frozen", ["nothing", "the embedding", "norms", "attention"])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_frozen_parameters_change_no_gradient_of_the_others(name, frozen, monkeypatch):
    model, batch, weights = prepared(name)
    words = {"nothing": "nothing", "the embedding": "embed|wte|wpe", "norms": "norm|ln_", "attention": "attn"}[frozen]
    for parameter_name, p in model.module.named_parameters():
        p.requires_grad_(re.search(words, parameter_name) is None)
    states, ours = gradients(model, batch, weights)
    assert taped_nodes(states)
    monkeypatch.setattr(packed_decoder, "_can_be_taped", lambda *_: False)
    _, expected = gradients(model, batch, weights)
    for actual, right in zip(ours, expected, strict=True):
        assert (actual - right).norm() < 1e-5 * right.norm() + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.exhaustive(14)
def test_gradients_are_those_of_autograd(name, dtype, monkeypatch):
    """Each family with one node a layer, products that read the same input merged, beside the same ops by autograd."""
    model, batch, weights = prepared(name, dtype)
    assert model.packed_refusal is None
    states, ours = gradients(model, batch, weights)
    assert len(taped_nodes(states)) == len(packed_decoder.read_decoder(model.decoder).layers)
    monkeypatch.setattr(packed_decoder, "_can_be_taped", lambda *_: False)
    expected_states, expected = gradients(model, batch, weights)
    assert not taped_nodes(expected_states)
    bound = 2e-6 if dtype == torch.float32 else 0.02
    assert distance(states, expected_states) < bound
    largest = max(g.double().norm() for g in expected)
    for actual, right in zip(ours, expected, strict=True):
        assert (actual.double() - right.double()).norm() < 5 * bound * max(right.double().norm(), 0.05 * largest)


def test_layers_that_read_the_same_input_are_one_product(monkeypatch):
    model, batch, weights = prepared("Llama")
    assert model.packs_rows
    shapes = []
    run = ops.linear.autograd.forward
    monkeypatch.setattr(
        ops.linear.autograd, "forward", staticmethod(lambda ctx, x, w, *a: shapes.append(len(w)) or run(ctx, x, w, *a))
    )
    gradients(model, batch, weights)
    layer = model.decoder.layers[0]
    qkv = sum(len(p.weight) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))
    one_layer = [
        qkv,
        len(layer.self_attn.o_proj.weight),
        2 * len(layer.mlp.up_proj.weight),
        len(layer.mlp.down_proj.weight),
    ]
    assert shapes == one_layer * len(model.decoder.layers)


def test_a_learner_moves_weights_next_to_one_another():
    model = Model(build("Llama")())
    weights = [model.decoder.layers[1].mlp.gate_proj.weight, model.decoder.layers[1].mlp.up_proj.weight]
    assert join(weights) is None
    Learner(model, OptimConfig(), 10)
    assert join(weights) is not None
    shared = build("Llama")().share_memory()
    Learner(Model(shared), OptimConfig(), 10)
    assert all(p.is_shared() for p in shared.parameters()), "other processes would not see the next steps"
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    wrapped = Model(lora.attach(build("Llama")(), LoraConfig(rank=2), "lm", 0))
    before = [p.data_ptr() for p in wrapped.module.parameters()]
    Learner(wrapped, OptimConfig(), 10)
    assert [p.data_ptr() for p in wrapped.module.parameters()] == before


def test_adapters_and_dropout_stay_on_autograd():
    pytest.importorskip("peft")
    from rlhf_fast.model import lora

    wrapped = Model(lora.attach(build("Llama")(), LoraConfig(rank=2), "lm", 0))
    batch = random_batch(wrapped, [5], [[4, 9]])
    assert not taped_nodes(wrapped.hidden_and_targets(*batch)[0])
    model = Model(build("Llama")())
    with model.train_mode(0.3):
        assert not taped_nodes(model.hidden_and_targets(*batch)[0])
    with model.train_mode():
        assert taped_nodes(model.hidden_and_targets(*batch)[0])


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_backward_pass_can_be_repeated(checkpoints):
    """The first one takes the tape's activations; each later one computes the layers again from their inputs."""
    model, batch, _ = prepared("Llama")
    assert model.packs_rows
    if checkpoints:
        model.module.gradient_checkpointing_enable()
    parameters = list(model.decoder.layers.parameters())
    with model.train_mode():
        hidden, _, _ = model.hidden_and_targets(*batch)
        total = hidden.square().sum()
        first, second = (torch.autograd.grad(total, parameters, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
        torch.autograd.grad(total, parameters)
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            torch.autograd.grad(total, parameters)


def test_a_parameter_that_is_exchanged_before_a_layer_is_computed_again_is_refused():
    model, batch, _ = prepared("Llama")
    assert model.packs_rows
    model.module.gradient_checkpointing_enable()
    with model.train_mode():
        hidden, _, _ = model.hidden_and_targets(*batch)
        projection = model.decoder.layers[1].self_attn.q_proj
        projection.weight = nn.Parameter(projection.weight.detach().clone())
        with pytest.raises(RuntimeError, match="parameters were exchanged between"):
            hidden.sum().backward()


def test_weights_that_changed_since_the_forward_pass_are_refused():
    model, batch, _ = prepared("Llama")
    hidden, _, _ = model.hidden_and_targets(*batch)
    with torch.no_grad():
        model.decoder.layers[0].mlp.down_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_a_second_derivative_is_refused():
    model, batch, _ = prepared("Llama")
    weight = model.decoder.layers[0].mlp.down_proj.weight
    hidden, _, _ = model.hidden_and_targets(*batch)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_activations_are_freed_during_the_backward_pass():
    model, batch, _ = prepared("Llama")
    hidden, _, _ = model.hidden_and_targets(*batch)
    first = taped_nodes(hidden)[0]
    recorded = weakref.ref(first.recorded[0])
    assert recorded()._steps
    gc.disable()
    try:
        hidden.sum().backward()
        assert recorded() is None, "a tape is in a circle of references"
    finally:
        gc.enable()


def test_a_tensor_that_takes_the_id_of_another_is_not_taken_for_it():
    """A tape knows tensors by id, which a later tensor may have."""
    leaf, other = torch.ones(3), torch.ones(3)
    for _ in range(200):
        record = Tape([leaf])
        record.add(leaf, leaf)  # gone at once
        untracked = record.add(other, other)
        out = record.add(record.add(leaf, untracked), untracked)
        (gradient,) = record.gradients(record.number_of(out), torch.ones(3))
        assert torch.equal(gradient, torch.ones(3))


def test_columns_of_one_matrix_are_joined_without_a_copy():
    whole = torch.randn(5, 12)
    parts = whole.split([4, 6, 2], 1)
    assert tape._whole(parts).data_ptr() == whole.data_ptr() and torch.equal(tape._whole(parts), whole)
    for wrong in (parts[:2], parts[::-1], [part.clone() for part in parts], [parts[0], parts[0]]):
        joined = tape._whole(wrong)
        assert joined.data_ptr() != whole.data_ptr() and torch.equal(joined, torch.cat(list(wrong), 1))


@pytest.mark.parametrize("is_unique", [True, False])
def test_rows_of_a_tape(is_unique):
    x = torch.randn(6, 3)
    index = torch.tensor([4, 1, 5] if is_unique else [4, 1, 4, 5])
    record = Tape([x])
    out = record.rows(x, index, is_unique)
    grad = torch.randn_like(out)
    (found,) = record.gradients(record.number_of(out), grad)
    assert torch.equal(out, x[index]) and torch.allclose(found, torch.zeros_like(x).index_add(0, index, grad))


def test_walk_over_modules_is_torchs():
    module = MODELS["gpt2"]() if "gpt2" in MODELS else build("GPT2")()
    shared = nn.Linear(2, 2)
    module.first, module.second, module.none = shared, nn.Sequential(shared, nn.Dropout()), None
    assert all_modules(module) == list(module.modules())


def test_training_mode_is_set_and_restored_module_by_module():
    model = Model(build("Llama")())
    model.decoder.layers[0].mlp.train()
    before = {name: module.training for name, module in model.module.named_modules()}
    with pytest.raises(KeyError), model.train_mode():
        assert all(module.training for module in model.module.modules())
        raise KeyError
    assert {name: module.training for name, module in model.module.named_modules()} == before


def test_a_module_with_a_mode_of_its_own_keeps_it():
    class Frozen(nn.Dropout):
        def train(self, _mode=True):
            return super().train(False)

    model = Model(build("Llama")())
    model.decoder.frozen = Frozen().train()
    with model.train_mode(0.1):
        assert model.decoder.training and not model.decoder.frozen.training


def test_no_garbage_is_collected_within_a_step(monkeypatch):
    model = Model(build("Llama")())
    learner = Learner(model, OptimConfig(lr=1e-3), 10)
    from test_merged_linears import texts

    states = []

    def loss(*args):
        states.append(gc.isenabled())
        return pretrain_loss(*args)

    learner.step([(loss, texts(), 1.0)])
    assert states == [False] and gc.isenabled()

    def failing(*_):
        raise KeyError

    with pytest.raises(KeyError):
        learner.step([(failing, texts(), 1.0)])
    assert gc.isenabled()
    gc.disable()
    try:
        learner.step([(pretrain_loss, texts(), 1.0)])
        assert not gc.isenabled(), "whoever has turned it off does so for longer"
    finally:
        gc.enable()


def in_place(offsets, end):
    offsets[1] = end


def through_numpy(offsets, end):
    offsets.numpy()[1] = end


def by_data(offsets, end):
    offsets.data = torch.tensor([0, end, int(offsets[2])])


@pytest.mark.parametrize("change", [in_place, through_numpy, by_data])
def test_plans_of_attention_follow_offsets_that_change(change):
    N = 12
    q, k, v = (torch.randn(N, 2, 8) for _ in range(3))
    offsets = torch.tensor([0, 5, N])
    parents = torch.tensor([-1, -1])
    for end, parent in ((5, -1), (8, -1), (8, 0)):
        change(offsets, end)
        parents[1] = parent
        actual = ops.varlen_attention(q, k, v, offsets, 0.3, parents=parents)
        expected = ops.varlen_attention.reference(q, k, v, offsets, 0.3, 0, 0.0, parents, False)
        torch.testing.assert_close(actual, expected)
    change(offsets, 20)
    with pytest.raises(ValueError, match="offsets must rise"):
        ops.varlen_attention(q, k, v, offsets, 0.3, parents=parents)
