"""lazy_head with an input embedding of the output layer's weight: its gradient is added to the layer's by rows."""

import contextlib
import copy
import functools
import pickle
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # which teaches ForkingPickler tensors
from architectures import V, build
from lazy_pair import assert_close, grads_of, is_freed_with_its_model
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rlhf_fast.integrations import lazy_head, tied_embedding
from rlhf_fast.integrations.switch import OwnForward

pytestmark = pytest.mark.usefixtures("one_thread")


class WeightSized(TorchDispatchMode):
    """Count the tensors of the weight's size that are made, without views and writes."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel() == V * 32]
        self.count += sum(storage(x) not in given for x in made)
        return out


def storage(x):
    return x.untyped_storage()._cdata


def tied(name="Llama", **changes):
    return build(name, tie_word_embeddings=True, **changes)().eval()


def seconded(name="Llama", **changes):
    """Return a tied model in float64 whose attention has a second derivative."""
    model = tied(name, initializer_range=0.1, **changes).double()
    model.set_attn_implementation("eager")
    return model


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


def interleaved(model, inputs):
    """The decoder's passes come first, and then the output layer's."""
    hidden = [model.model(ids).last_hidden_state for ids in (inputs["input_ids"], inputs["input_ids"][:2, :7])]
    return sum(model.lm_head(x).logsumexp(-1).mean() for x in hidden)


def mean_logit(model, inputs):
    return model(inputs["input_ids"]).logits.mean(-1).square().sum()


def of_int32(model, inputs):
    return loss(model, {"input_ids": inputs["input_ids"].int(), "labels": inputs["labels"]})


def reentrant(model, inputs):
    """The output layer's part is a backward pass of its own, within the other."""
    hidden = model.model(inputs["input_ids"]).last_hidden_state
    logits = checkpoint(lambda x: model.lm_head(x).logsumexp(-1), hidden, use_reentrant=True)
    return logits.square().mean()


READS = {loss: 2, hidden_loss: 0, both: 4, checkpointed: 1, twice: 4, with_a_penalty: 2, interleaved: 4, of_int32: 2}
"""The tensors of the weight's size that a pass is spared: an embedding's gradient, and its sum with another one. In a
checkpoint the output layer's op runs twice."""


@pytest.mark.parametrize("read", [*READS, mean_logit, reentrant])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(read, dtype):
    inputs, ours = batch(), tied(initializer_range=0.1).to(dtype)
    plain = copy.deepcopy(ours)
    for _ in range(2):  # the second pass adds to a gradient
        read(plain, inputs).backward()
    with lazy_head(ours):
        for _ in range(2):
            read(ours, inputs).backward()
    for name, grad in grads_of(plain).items():
        assert_close(grads_of(ours)[name], grad, 2e-5, name)


@pytest.mark.parametrize("read", READS)
def test_no_gradient_of_the_weights_size(read):
    inputs, model, made = batch(), tied(), []
    for context in (lazy_head(model), contextlib.nullcontext()):
        model.zero_grad()
        with context, WeightSized() as counter:
            read(model, inputs).backward()
        made.append(counter.count)
    assert made[1] - made[0] == READS[read]


@pytest.mark.parametrize(
    "name, changes",
    [("Gemma2", {"head_dim": 8}), ("Gemma3", {"head_dim": 8}), ("GPT2", {}), ("Llama", {"pad_token_id": 5})],
)
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


@pytest.mark.parametrize("part", ["the embedding", "both layers", "the logits"])
def test_second_derivatives(part):
    """The embedding alone has one, and so have both layers, and logits that were made."""
    inputs, model, found = batch()["input_ids"], seconded(pad_token_id=5), []
    inputs[0, :4] = 5
    weight, embed = model.lm_head.weight, model.get_input_embeddings()

    def logits():
        made = model.lm_head(embed(inputs) ** 3) if part == "both layers" else model(inputs).logits
        return made if type(made) is torch.Tensor else made.make()

    for context in (lazy_head(model), contextlib.nullcontext()):
        with context:
            value = (embed(inputs) ** 3).sum() if part == "the embedding" else logits().logsumexp(-1).sum()
            (grad,) = torch.autograd.grad(value, weight, create_graph=True)
            found += [grad, *torch.autograd.grad(grad.square().sum(), weight)]
    assert_close(found[0], found[2], 1e-12)
    assert_close(found[1], found[3], 1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_logits_are_read_after_a_step(ties):
    """They keep what was computed before it; shapes and parts need no numbers."""
    inputs, model = batch(), build("Llama", tie_word_embeddings=ties, initializer_range=0.1)().eval()
    plain = copy.deepcopy(model)(inputs["input_ids"]).logits
    with lazy_head(model):
        logits = model(inputs["input_ids"]).logits
        logits.log_softmax(-1).gather(-1, inputs["input_ids"][..., None]).mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        entropy = logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)
        assert logits[:, :-1].shape == plain[:, :-1].shape
    assert_close(entropy, torch.distributions.Categorical(logits=plain).entropy(), 2e-5)


def test_a_pass_with_create_graph_writes_into_no_gradient():
    """The one that came to the weight may be needed for the second derivative."""
    weight, tokens = torch.randn(7, 3, dtype=torch.float64).requires_grad_(), torch.tensor([2, 5, 2])
    given = [torch.randn(n, 3, dtype=torch.float64).requires_grad_() for n in (7, 3)]
    shared = tied_embedding.SharedWeight.apply(weight)
    rows = tied_embedding.Embed.apply(shared, tokens, 5)
    (found,) = torch.autograd.grad([shared, rows], weight, given, create_graph=True)
    (truth,) = torch.autograd.grad(
        [weight, nn.functional.embedding(tokens, weight, 5)], weight, given, create_graph=True
    )
    assert_close(found, truth, 1e-15)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), given) for x in (found, truth)), strict=True):
        assert_close(ours, theirs, 1e-15)


def test_an_expanded_gradient_of_the_layer():
    weight, tokens = torch.randn(7, 3, requires_grad=True), torch.tensor([2, 5, 2])
    shared = tied_embedding.SharedWeight.apply(weight)
    (shared.sum() + tied_embedding.Embed.apply(shared, tokens, -1).sum()).backward()
    assert torch.equal(weight.grad, torch.tensor([1.0, 1, 3, 1, 1, 2, 1])[:, None].expand(7, 3))
    assert not shared.grad_fn.waiting


def test_a_second_derivative_of_lazy_logits_names_make():
    inputs, model = batch(), seconded()
    with lazy_head(model):
        for value in (loss(model, inputs), model(inputs["input_ids"]).logits.logsumexp(-1).sum()):
            (grad,) = torch.autograd.grad(value, model.lm_head.weight, create_graph=True)
            with pytest.raises(
                RuntimeError, match=r"differentiated again; .* \(of lazy_head's logits, logits.make\(\)\)$"
            ):
                grad.square().sum().backward()


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


def test_the_weight_has_no_hook():
    """Hooks would stay where no backward pass comes, and another process would warn that it does not get them."""
    inputs, model = batch(), tied()
    with lazy_head(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(**inputs)
        loss(model, inputs).backward()
        ForkingPickler.dumps(model)
        assert not model.lm_head.weight._backward_hooks


def test_a_second_handle():
    inputs, model = batch(), tied(initializer_range=0.1)
    plain = copy.deepcopy(model)
    with lazy_head(model):
        first = loss(model, inputs)
    with lazy_head(model):
        (loss(model, inputs) + first).backward()
    (loss(plain, inputs) * 2).backward()
    assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


def test_two_backward_passes_after_the_block():
    """A pass of something else between them takes nothing away."""
    inputs, others, ours = batch(), batch(2, 9), tied(initializer_range=0.1)
    plain = copy.deepcopy(ours)
    with lazy_head(ours):
        losses = [loss(ours, inputs), loss(ours, others), hidden_loss(ours, inputs)]
    assert "forward" not in vars(ours.get_input_embeddings())
    for value in losses:
        value.backward()
        ours.lm_head.weight.square().mean().backward()
    for value in (loss(plain, inputs), loss(plain, others), hidden_loss(plain, inputs)):
        (value + plain.lm_head.weight.square().mean()).backward()
    assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_a_graph_that_is_kept(inside):
    inputs, model = batch(), tied(initializer_range=0.1)
    weight = model.lm_head.weight
    (truth,) = torch.autograd.grad(loss(model, inputs), weight)
    handle = lazy_head(model)
    value = loss(model, inputs)
    if not inside:
        handle.remove()
    for _ in range(3):
        (found,) = torch.autograd.grad(value, weight, retain_graph=True)
        assert_close(found, truth, 2e-5)
    handle.remove()


def test_a_backward_pass_that_an_error_ends():
    """The gradients that were left waiting belong to no later pass."""
    inputs, model = batch(), tied(initializer_range=0.1)
    weight, embed = model.lm_head.weight, model.get_input_embeddings()

    (truth,) = torch.autograd.grad(loss(model, inputs), weight)
    with lazy_head(model):
        value = loss(model, inputs)
        last = value + embed(inputs["input_ids"][:1]).sum()  # whose gradient comes first

        def fail(_):
            raise ZeroDivisionError

        hook = value.grad_fn.register_prehook(fail)
        with pytest.raises(ZeroDivisionError):
            last.backward(retain_graph=True)
        hook.remove()
        (found,) = torch.autograd.grad(value, weight)
    assert_close(found, truth, 2e-5)


def test_another_thread_runs_the_embedding():
    """Forward and backward passes of threads are each whole, on one graph too."""
    inputs, model = batch(), tied(initializer_range=0.1)
    weight, found = model.lm_head.weight, []
    (truth,) = torch.autograd.grad(loss(model, inputs), weight)
    with lazy_head(model):
        value = loss(model, inputs)

        def other(*_):
            thread = threading.Thread(target=passes)
            thread.start()
            thread.join()

        def passes():
            loss(model, inputs)
            found.extend(torch.autograd.grad(value, weight, retain_graph=True))
            found.extend(torch.autograd.grad(loss(model, inputs), weight))

        embed = model.get_input_embeddings()
        rows = embed(inputs["input_ids"])
        rows.grad_fn.register_hook(other)  # between the embedding's node and the weight's
        found += torch.autograd.grad(model(inputs_embeds=rows, labels=inputs["labels"]).loss, weight)
    assert len(found) == 3
    for grad in found:
        assert_close(grad, truth, 2e-5)


CHANGES = {
    "the weight is written": lambda model: model.lm_head.weight.data.mul_(1.5),
    "an optimizer's step": lambda model: torch.optim.SGD([model.lm_head.weight], 0.1).step(),
    "other data": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data * 1.5),
    "another dtype": lambda model: model.double(),
    "another parameter": lambda model: with_weight(model, nn.Parameter(model.lm_head.weight.data * 1.5)),
    "another parameter of its memory": lambda model: with_weight(model, twin(model.lm_head.weight)),
    "an untied layer": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.data * 1.5)),
    "a frozen weight": lambda model: model.lm_head.weight.requires_grad_(False),
    "another size": lambda model: model.resize_token_embeddings(V + 3, mean_resizing=False),
    "swapped tensors": lambda model: swapped(model),
}


@torch.no_grad()
def twin(weight):
    """Return a parameter of the same memory, which was written as often."""
    found = nn.Parameter(weight.data)
    while found._version < weight._version:
        found.mul_(1)
    return found


def with_weight(model, weight):
    model.lm_head.weight = model.get_input_embeddings().weight = weight


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


REFUSED = "swapped tensors", "another size"
"""torch refuses these changes of a plain model too, while the graph of an earlier pass is there."""


@pytest.mark.parametrize(
    "change, kept", [(change, kept) for change in CHANGES for kept in (True, False) if not (kept and change in REFUSED)]
)
def test_a_weight_that_changes_inside_the_block(change, kept):
    """Also while the graph of an earlier pass is there, which has the weight as it was."""
    inputs, ours = batch(), tied(initializer_range=0.1)
    plain, found = copy.deepcopy(ours), []
    with lazy_head(ours):
        for model in (plain, ours):
            first = loss(model, inputs)
            first.backward()
            if not kept:
                del first
            torch.manual_seed(1)  # of a weight that grows
            CHANGES[change](model)
            model.zero_grad()
            loss(model, inputs).backward()
            found.append(grads_of(model))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, 2e-5, name)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_copies_are_plain(how):
    inputs, model = batch(), tied()
    with lazy_head(model):
        other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
        hidden_loss(other, inputs).backward()
    assert type(other.get_input_embeddings().forward) is OwnForward
    with lazy_head(other):
        assert "EmbedBackward" in name_of_node(other, inputs)
    assert "forward" not in vars(other.get_input_embeddings())


def name_of_node(model, inputs):
    return type(model.get_input_embeddings()(inputs["input_ids"]).grad_fn).__name__


def test_a_model_that_is_frozen_inside_the_block():
    inputs, model = batch(), tied()
    with lazy_head(model):
        first = loss(model, inputs)
        model.requires_grad_(False)
        assert first.requires_grad and not loss(model, inputs).requires_grad


class Mine(nn.Parameter):
    """A parameter that does something of its own."""


def with_own_forward(model):
    embedding = model.get_input_embeddings()
    embedding.forward = functools.partial(torch.nn.functional.embedding, weight=embedding.weight)


def set_on_embedding(name, value):
    return lambda model: setattr(model.get_input_embeddings(), name, value)


STAYS = {
    "untied": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach() * 1.5)),
    "16 bits": lambda model: model.bfloat16(),
    "frozen": lambda model: model.lm_head.weight.requires_grad_(False),
    "a kind of parameter": lambda model: with_weight(model, Mine(model.lm_head.weight.detach())),
    "a forward of somebody else": with_own_forward,
    "sparse": set_on_embedding("sparse", True),
    "scale_grad_by_freq": set_on_embedding("scale_grad_by_freq", True),
    "max_norm": set_on_embedding("max_norm", 0.2),
}


@pytest.mark.parametrize("change", STAYS)
@pytest.mark.parametrize("when", ["before the block", "inside it"])
def test_an_embedding_that_stays(change, when):
    if (change, when) == ("a kind of parameter", "before the block"):
        pytest.skip("lazy_head refuses it")
    inputs, found = batch(), []
    for lazy in (False, True):
        torch.manual_seed(0)
        model = tied(initializer_range=0.1)
        if when == "before the block":
            STAYS[change](model)
        with lazy_head(model) if lazy else contextlib.nullcontext():
            if when == "inside it":
                STAYS[change](model)
            loss(model, inputs).backward()
            found.append((grads_of(model), name_of_node(model, inputs)))
    (truth, their_node), (grads, node) = found
    assert node == their_node or (change, when) == ("untied", "inside it")
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert_close(grads[name].to_dense(), grad.to_dense(), 3e-2 if change == "16 bits" else 2e-5, name)


def test_a_negative_padding():
    inputs, ours = batch(), tied(initializer_range=0.1)
    inputs["input_ids"][0, :4] = V - 2
    plain = copy.deepcopy(ours)
    with lazy_head(ours):
        for model in (plain, ours):
            model.get_input_embeddings().padding_idx = -2
            loss(model, inputs).backward()
        assert "EmbedBackward" in name_of_node(ours, inputs)
    assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


def test_decoding_has_torchs_embedding(monkeypatch):
    monkeypatch.setattr(tied_embedding, "Embed", None)
    inputs, model = batch(), tied()
    with lazy_head(model), torch.no_grad():
        assert torch.equal(model.get_input_embeddings()(inputs["input_ids"]), model.lm_head.weight[inputs["input_ids"]])


def test_a_forward_that_was_wrapped_afterwards():
    """It runs torch's embedding after the end of the block, and another handle leaves it."""
    inputs, model = batch(), tied()
    embedding = model.get_input_embeddings()
    with lazy_head(model):
        forward = embedding.forward
        embedding.forward = lambda ids: forward(ids)
    wrapped = embedding.forward
    assert name_of_node(model, inputs) == "EmbeddingBackward0"
    with lazy_head(model):
        assert embedding.forward is wrapped
        loss(model, inputs).backward()
    assert embedding.forward is wrapped


def compiled(model, inputs):
    """The embedding alone."""
    embed = torch.compile(lambda ids: model.get_input_embeddings()(ids), fullgraph=True, backend="eager")
    return model(inputs_embeds=embed(inputs["input_ids"]), labels=inputs["labels"]).loss


def traced(model, inputs):
    trace = torch.jit.trace(model.get_input_embeddings(), inputs["input_ids"][:1], check_trace=False)
    assert "aten::embedding" in str(trace.inlined_graph) and "^" not in str(trace.inlined_graph)
    return model(inputs_embeds=trace(inputs["input_ids"]), labels=inputs["labels"]).loss


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("read", [compiled, traced])
def test_an_embedding_that_torch_traces(read):
    inputs, ours = batch(), tied(initializer_range=0.1)
    plain = copy.deepcopy(ours)
    loss(plain, inputs).backward()
    with lazy_head(ours):
        read(ours, inputs).backward()
    assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


def test_compiled_autograd():
    """Its second pass runs what the first one compiled."""
    inputs, ours = batch()["input_ids"], tied(initializer_range=0.1)
    plain = copy.deepcopy(ours)
    with lazy_head(ours), torch._dynamo.config.patch(compiled_autograd=True):
        for _ in range(2):
            theirs, value = (m.lm_head(m.get_input_embeddings()(inputs)).logsumexp(-1).sum() for m in (plain, ours))
            theirs.backward()
            with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
                value.backward()
    assert_close(ours.lm_head.weight.grad, plain.lm_head.weight.grad, 2e-5)


@pytest.mark.parametrize("part", ["the embedding", "both layers"])
def test_a_batch_of_gradients(part):
    """torch.func.vmap runs the backward pass."""
    inputs, model, found = batch(1)["input_ids"][0], tied(initializer_range=0.1), []
    for context in (lazy_head(model), contextlib.nullcontext()):
        with context:
            rows = model.get_input_embeddings()(inputs)
            out = rows.sum(-1)
            if part == "both layers":
                made = model.lm_head(rows)
                out = (made if type(made) is torch.Tensor else made.make())[:, :17].sum(0) * out
            (grad,) = torch.autograd.grad(out, model.lm_head.weight, torch.eye(17), is_grads_batched=True)
            found.append(grad)
    assert_close(*found, 2e-5)


@pytest.mark.parametrize("handle_is", ["removed", "forgotten", "held"])
def test_the_weight_is_freed_with_its_model(handle_is):
    assert is_freed_with_its_model(tied, lazy_head, lambda model: loss(model, batch()).backward(), handle_is)
