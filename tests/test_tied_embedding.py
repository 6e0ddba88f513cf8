"""lazy_head with an input embedding of the output layer's weight: its gradient is added to the layer's by rows."""

import contextlib
import copy
import functools
import pickle

import pytest
import torch
from architectures import V, build
from lazy_pair import assert_close, grads_of, is_freed_with_its_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rlhf_fast.integrations import lazy_head
from rlhf_fast.integrations.switch import OwnForward

pytestmark = pytest.mark.usefixtures("one_thread")


class DenseGradients(TorchDispatchMode):
    """Count the tensors of the weight's size that embeddings make."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.embedding_dense_backward.default
        return function(*args, **(kwargs or {}))


def tied(name="Llama", **changes):
    return build(name, tie_word_embeddings=True, **changes)().eval()


def batch(rows=3, length=17):
    """Few tokens, so that they repeat."""
    ids = torch.randint(3, V, (5,))[torch.randint(5, (rows, length))]
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(rows, length) < 0.4, -100)}


def hidden_loss(model, inputs):
    return model.model(inputs["input_ids"]).last_hidden_state.square().mean()


def loss(model, inputs):
    return model(**inputs).loss


def both(model, inputs):
    return loss(model, inputs) + hidden_loss(model, inputs)


def checkpointed(model, inputs):
    return checkpoint(loss, model, inputs, use_reentrant=False)


def twice(model, inputs):
    """Two forward passes in one backward pass, as DPO's."""
    return loss(model, inputs) + 0.5 * loss(model, {name: ids[:2, :7] for name, ids in inputs.items()})


def with_a_penalty(model, inputs):
    """The weight itself has a gradient, which is that of another tensor too."""
    other = torch.zeros_like(model.lm_head.weight).requires_grad_()
    penalty = model.lm_head.weight + other
    return loss(model, inputs) + penalty.square().mean()


DENSE = {hidden_loss: 1, both: 1}
"""The dense gradients of the embedding in a pass, of hidden states that the output layer did not read."""


@pytest.mark.parametrize("read", [loss, hidden_loss, both, checkpointed, twice, with_a_penalty])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(read, dtype):
    inputs, ours = batch(), tied(initializer_range=0.1).to(dtype)
    plain = copy.deepcopy(ours)
    for _ in range(2):  # the second pass adds to a gradient
        read(plain, inputs).backward()
    with lazy_head(ours), DenseGradients() as made:
        for _ in range(2):
            read(ours, inputs).backward()
    assert made.count <= 2 * DENSE.get(read, 0)
    for name, grad in grads_of(plain).items():
        assert_close(grads_of(ours)[name], grad, 2e-5, name)
    assert not ours.lm_head.weight.grad.is_sparse


@pytest.mark.parametrize("name, changes", [("Gemma2", {"head_dim": 8}), ("GPT2", {}), ("Llama", {"pad_token_id": 5})])
def test_scaled_added_and_padded_embeddings(name, changes):
    inputs, ours = batch(), tied(name, **changes)
    inputs["input_ids"][0, :4] = 5
    plain = copy.deepcopy(ours)
    loss(plain, inputs).backward()
    with lazy_head(ours):
        loss(ours, inputs).backward()
    for parameter, grad in grads_of(plain).items():
        assert_close(grads_of(ours)[parameter], grad, 2e-5, parameter)


@pytest.mark.parametrize("read", [loss, hidden_loss])
def test_gradients_that_are_asked_for(read):
    inputs, ours = batch(), tied(initializer_range=0.1)
    (truth,) = torch.autograd.grad(read(ours, inputs), ours.lm_head.weight)
    with lazy_head(ours):
        (found,) = torch.autograd.grad(read(ours, inputs), ours.lm_head.weight)
    assert_close(found, truth, 2e-5)


def test_second_derivatives():
    inputs, model, found = batch()["input_ids"], tied(), []
    weight, embed = model.lm_head.weight, model.get_input_embeddings()
    for context in (lazy_head(model), contextlib.nullcontext()):
        with context:
            (grad,) = torch.autograd.grad((embed(inputs) ** 3).sum(), weight, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert_close(*found, 2e-5)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_masks_rows(before):
    """It sees the whole gradient, as where only new tokens are trained."""
    inputs, ours = batch(), tied(initializer_range=0.1)
    plain, mask = copy.deepcopy(ours), torch.rand(V, 1).round()
    plain.lm_head.weight.register_hook(lambda grad: grad * mask)
    if before:
        ours.lm_head.weight.register_hook(lambda grad: grad * mask)
    loss(plain, inputs).backward()
    for round in range(2):
        ours.zero_grad()
        with lazy_head(ours):
            if not before and round == 0:
                ours.lm_head.weight.register_hook(lambda grad: grad * mask)
            loss(ours, inputs).backward()
        assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


def test_a_second_handle():
    """The first one's hook is still there, as no backward pass came."""
    inputs, model = batch(), tied()
    with lazy_head(model):
        loss(model, inputs)
    with lazy_head(model), DenseGradients() as made:
        for _ in range(2):
            loss(model, inputs).backward()
    assert made.count == 0 and len(model.lm_head.weight._backward_hooks) == 1


def test_a_backward_pass_after_the_block():
    inputs, ours = batch(), tied(initializer_range=0.1)
    plain = copy.deepcopy(ours)
    with lazy_head(ours):
        late = hidden_loss(ours, inputs)
    late.backward()
    hidden_loss(plain, inputs).backward()
    assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)
    assert "forward" not in vars(ours.get_input_embeddings())


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_are_plain(how):
    inputs, model = batch(), tied()
    with lazy_head(model):
        other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
        hidden_loss(other, inputs).backward()
    assert not other.lm_head.weight.grad.is_sparse
    assert type(other.get_input_embeddings().forward) is OwnForward
    with DenseGradients() as made, lazy_head(other):
        loss(other, inputs).backward()
    assert made.count == 0 and "forward" not in vars(other.get_input_embeddings())


def test_an_embedding_that_stays():
    """An embedding of another weight, of bfloat16, frozen, or with a forward of somebody else."""
    for model in (build("Llama")().eval(), tied().bfloat16(), tied()):
        if model.dtype == torch.float32 and model.config.tie_word_embeddings:
            embedding = model.get_input_embeddings()
            embedding.forward = functools.partial(torch.nn.functional.embedding, weight=embedding.weight)
        with lazy_head(model), DenseGradients() as made:
            loss(model, batch()).backward()
        assert made.count == 1
    frozen = tied()
    frozen.lm_head.weight.requires_grad_(False)
    with lazy_head(frozen):
        loss(frozen, batch()).backward()
    assert frozen.lm_head.weight.grad is None and not frozen.get_input_embeddings().sparse


@pytest.mark.parametrize("handle_is", ["removed", "forgotten", "held"])
def test_the_weight_is_freed_with_its_model(handle_is):
    assert is_freed_with_its_model(tied, lazy_head, lambda model: loss(model, batch()).backward(), handle_is)
