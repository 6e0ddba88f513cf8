"""lazy_head under transformers' own losses and trainers: the same losses and gradients, one op call, no logits."""

import contextlib
import copy
import io
import pickle
import re

import pytest
import torch
import transformers
from accelerate import hooks
from architectures import RECURRENT, REFUSED, SERVED, V, build
from lazy_pair import assert_close, compare, grads_of, is_freed_with_its_model
from shrink import count_weights, shrunken
from torch import nn
from torch.nn import functional as F
from transformers.models.auto import modeling_auto

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import lazy_head, status
from rlhf_fast.integrations.head import LinearHead
from rlhf_fast.integrations.lazy_logits import LazyLogits

pytestmark = pytest.mark.usefixtures("one_thread")
CAPPED = {
    "gemma2, capped logits": build("Gemma2", head_dim=8, final_logit_softcapping=3.0),
    "cohere, scaled logits": build("Cohere", logit_scale=0.25),
    "granite, divided logits": build("Granite", logits_scaling=4.0),
    "mixtral, router loss": build("Mixtral", output_router_logits=True),
    "llama, tied": build("Llama", tie_word_embeddings=True),
}
MODELS = {**SERVED, **{name: make for name, (make, _) in REFUSED.items()}, **RECURRENT, **CAPPED}
LM = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
NO_BACKWARD = {"rwkv"}
"""Models of which transformers has no backward pass on a CPU: they write into what it needs."""


def llama(**changes):
    return build("Llama", initializer_range=0.1, **changes)()


def batch(rows: int = 3, length: int = 17, ignored: float = 0.4):
    ids = torch.randint(3, V, (rows, length))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(rows, length) < ignored, -100)}


def loss_of(**inputs):
    return lambda model: model(**inputs).loss


def assert_one_answer(found):
    assert (found.answered.total(), found.fallbacks.total(), found.direct) == (1, 0, 0), found


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "items", "items as a tensor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_loss(name, items):
    assert_one_answer(compare(MODELS[name]().eval(), loss_of(**batch(), num_items_in_batch=items)))


@pytest.mark.parametrize("name", sorted(MODELS.keys() - NO_BACKWARD))
def test_every_model_of_the_tests(name):
    assert_one_answer(compare(MODELS[name]().eval(), loss_of(**batch(2, 9), num_items_in_batch=torch.tensor(7))))


CANNOT_RUN = {
    "can only be called on Attention layers": (
        "BailingHybrid Bamba GraniteMoeHybrid Jamba KimiLinear Lfm3 Qwen3_5 Qwen3_5Moe Qwen3_5MoeText Qwen3_5Text"
        " Qwen3Next Qwen4Exp Qwen4ExpText RecurrentGemma"
    ),
    "list index out of range": "Bart BigBirdPegasus Blenderbot BlenderbotSmall MBart Marian Mvp PLBart Pegasus",
    "Class validation error": "GPTNeo Gemma4Assistant Mamba2 Zamba Zamba2 Zaya",
    "The set of layer types producing a cache": "Gemma3nText Gemma4UnifiedAssistant",
    "Multiple valid text configs": "Musicgen MusicgenMelody",
    "requires the timm library|weights, which is too large": "Gemma3n",
    "weights, which is too large": "Blt Fuyu Gemma3 Gemma4Unified GotOcr2 MossTranscribeDiarize",
    "'full_attention'": "CohereCompassText",
    "has no attribute 'rope_theta'": "Dbrx",
    "keys must be integer layer indices": "Dots3Note",
    "to match target batch_size": "Git",
    "'NoneType' object is not subscriptable": "Lfm2Moe",
    "Validation error for field 'audio_vocab_size'": "Moshi",
    "make sure that `is_decoder=True`": "Reformer",
    "modified by an inplace operation": "Rwkv",
    "Input language unknown": "Xmod",
    "The expanded size of the tensor": "xLSTM",
}
"""Models that the shrunken config does not fit, or that have no backward pass, by what transformers says of them."""


@pytest.mark.exhaustive(6, slow=40)
@pytest.mark.parametrize("kind", LM, ids=lambda kind: kind.__name__)
def test_every_architecture(kind):
    """Under transformers' own loss the op answers for a linear head. Other models are refused, or as they were."""
    architecture = LM[kind][0] if isinstance(LM[kind], tuple) else LM[kind]
    try:
        config = shrunken(kind)
        config = config if architecture.config_class is kind else config.get_text_config()
        if (weights := count_weights(architecture, config)) > 20_000_000:
            raise ValueError(f"{weights} weights, which is too large")
        model = architecture(config).eval()
        inputs = batch(2, 9)
        inputs["input_ids"] %= 60
        inputs["labels"] = torch.where(inputs["labels"] < 0, -100, inputs["input_ids"])
        model(**inputs).loss.backward()
    except Exception as error:  # whatever transformers says of the shrunken config
        name = kind.__name__.removesuffix("Config")
        said = [text for text, names in CANNOT_RUN.items() if name in names.split()]
        if not any(re.search(text, str(error)) for text in said):
            raise
        pytest.skip(f"does not run: {type(error).__name__}: {error}")
    try:
        found = compare(model, loss_of(**inputs), grad_tolerance=5e-5)
    except UserError as error:
        assert "output" in str(error) and "\n" not in str(error)
        return
    assert found.answered.total() + found.fallbacks.total() >= 1


# -- what a model may be wrapped in, before or after -------------------------------------------------------------------


def logprobs_of(ids):
    """A loss outside the model."""
    return lambda model: model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("outside", [False, True], ids=["loss inside", "loss outside"])
def test_ddp(gloo, options, outside):
    inputs, model = batch(), llama()
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model, **options)
    reader = logprobs_of(inputs["input_ids"]) if outside else loss_of(**inputs)
    with lazy_head(wrapped):  # static_graph counts passes: no first one without lazy logits
        for _ in range(3):
            ours = reader(wrapped)
            wrapped.zero_grad()
            ours.sum().backward()
    theirs = reader(plain)
    theirs.sum().backward()
    assert_close(ours, theirs, 1e-5)
    for name, grad in grads_of(plain).items():
        assert_close(grads_of(model)[name], grad, 2e-5, name)
    assert (status(wrapped).answered.total(), status(wrapped).fallbacks.total()) == (3, 0)


def test_collectives(gloo):
    """As accelerate gathers an evaluation's logits."""
    model, inputs = llama(), batch()
    with lazy_head(model), torch.no_grad():
        logits = model(**inputs).logits
        found = torch.empty(logits.shape)
        torch.distributed.all_gather_into_tensor(found, logits)
        (listed,) = lists = [torch.empty(logits.shape)]
        torch.distributed.all_gather(lists, logits)
        with pytest.raises(NotImplementedError, match="writes into logits that are not made"):
            torch.distributed.all_reduce(logits)
    assert torch.equal(found, model(**inputs).logits) and torch.equal(listed, found)


@pytest.mark.parametrize("outside", [False, True], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("reshard", [False, True], ids=["layers stay", "layers resharded"])
def test_fsdp2(gloo, outside, reshard):
    from torch.distributed.fsdp import fully_shard

    inputs, model = batch(), llama(tie_word_embeddings=False)
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model)
    reader = logprobs_of(inputs["input_ids"]) if outside else loss_of(**inputs)
    with lazy_head(model):
        for _ in range(2):
            model.zero_grad()
            ours = reader(model)
            ours.sum().backward()
    theirs = reader(plain)
    theirs.sum().backward()
    assert_close(ours, theirs, 1e-5)
    for name, grad in grads_of(plain).items():
        assert_close(grads_of(model)[name].full_tensor(), grad, 2e-5, name)
    assert (status(model).answered.total(), status(model).fallbacks.total()) == (2, 0)


def test_a_weight_that_fsdp2_has_freed(gloo):
    from torch.distributed.fsdp import fully_shard

    inputs, model = batch(), llama()
    fully_shard(model, reshard_after_forward=True)
    with lazy_head(model):
        with pytest.raises(RuntimeError, match="weight was freed between the forward pass"):
            logprobs_of(inputs["input_ids"])(model)
        model(**inputs).loss.backward()


def lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **options})
    wrapped = peft.get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return wrapped


@pytest.mark.parametrize("pass_wrapped", [False, True])
def test_lora(pass_wrapped):
    model = llama()
    wrapped = lora(model)
    assert_one_answer(compare(wrapped, loss_of(**batch()), wrapped if pass_wrapped else model))


@pytest.mark.parametrize("outside", [False, True], ids=["loss inside", "loss outside"])
def test_autocast(outside):
    """Products are in bfloat16 though the loss is read after autocast has ended."""
    model, inputs = llama(), batch()
    labels = {"labels": inputs.pop("labels")}

    def reader(model):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**inputs, **({} if outside else labels))
        logits = out.logits.float()[:, :-1]
        return logits.log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None]) if outside else out.loss

    found = compare(model, reader, out_tolerance=1e-2, grad_tolerance=3e-2)
    assert (found.answered.total(), found.fallbacks.total()) == (1, 0)
    with lazy_head(model), torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16 and logits.rows.head.weight.dtype == torch.bfloat16


def test_a_bfloat16_model_and_accelerates_float32_outputs():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = llama().bfloat16(), batch()
    forward = accelerate.utils.convert_outputs_to_fp32(model.forward)
    found = compare(model, lambda _: forward(**inputs).loss, out_tolerance=5e-3, grad_tolerance=3e-2)
    assert_one_answer(found)
    with lazy_head(model):
        logits = forward(**inputs).logits
    assert type(logits) is LazyLogits and logits.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_one_answer(compare(model, loss_of(**batch())))


def test_float64():
    found = compare(llama().double(), loss_of(**batch()), out_tolerance=1e-6, grad_tolerance=1e-6)
    assert_one_answer(found)  # transformers casts logits to float32


def test_packed_rows():
    ids = torch.randint(3, V, (1, 20))
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    labels = ids.clone()
    labels[0, [0, 7]] = -100
    assert_one_answer(compare(llama(), loss_of(input_ids=ids, position_ids=positions, labels=labels)))


def test_logits_to_keep_and_tuples():
    model, inputs = llama(), batch()
    inputs.pop("labels")
    reader = lambda model: model(**inputs, logits_to_keep=5, return_dict=False)[0][:, :-1].logsumexp(-1)  # noqa: E731
    assert_one_answer(compare(model, reader))


@pytest.mark.parametrize("items", [None, 5])
def test_no_token_has_a_label(items):
    model, inputs = llama(), batch(ignored=1.1)
    theirs = model(**inputs, num_items_in_batch=items).loss
    with lazy_head(model):
        ours = model(**inputs, num_items_in_batch=items).loss
        ours.backward()
    assert ours.isnan() if items is None else ours == theirs == 0
    assert theirs.isnan() == ours.isnan()
    assert all((grad == 0).all() for grad in grads_of(model).values())


def test_the_compiled_model():
    """Traced, the layer gives the logits themselves: the graph has the same product as without lazy_head."""
    model, inputs = llama(), batch()
    compiled = torch.compile(model, backend="eager")
    found = compare(compiled, loss_of(**inputs), patched=compiled)
    assert found.fallbacks.total() == 0


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_reader(dynamic):
    """OpenRLHF and verl compile their entropy: it is given lazy logits, and reads them as if it were not compiled."""

    def entropy(z):
        return torch.logsumexp(z, -1) - (F.softmax(z, -1) * z).sum(-1)

    ids, read = batch()["input_ids"], torch.compile(entropy, backend="eager", dynamic=dynamic)
    assert_one_answer(compare(llama(), lambda model: read(model(input_ids=ids).logits[:, :-1] / 0.8)))


def test_a_compiled_decoder():
    model, inputs = llama(), batch()
    model.model = torch.compile(model.model, backend="eager")
    assert_one_answer(compare(model, loss_of(**inputs)))


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_trainer(tmp_path, tied):
    """Two accumulated batches a step, of different numbers of labels: the same losses, gradients' norms and weights."""
    pytest.importorskip("accelerate")
    rows = [{name: row[0] for name, row in batch(1, 12, ignored).items()} for ignored in torch.rand(24).tolist()]
    runs = []
    for lazy in (False, True):
        torch.manual_seed(0)
        model = llama(tie_word_embeddings=tied)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6,
            learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, options, train_dataset=rows, eval_dataset=rows[:4])
        with lazy_head(model) if lazy else contextlib.nullcontext():
            trainer.train()
            found = status(model)
            evaluation = trainer.evaluate()["eval_loss"]
        logged = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        runs.append((logged, evaluation, model.state_dict()))
    assert (found.answered.total(), found.fallbacks.total(), found.direct) == (12, 0, 0)
    (logged, evaluation, weights), (their_logged, their_evaluation, their_weights) = runs[1], runs[0]
    assert len(logged) == 6 and torch.allclose(torch.tensor(logged), torch.tensor(their_logged), rtol=1e-5)
    assert evaluation == pytest.approx(their_evaluation, rel=1e-5)
    for name, weight in weights.items():
        assert (weight - their_weights[name]).abs().max() < 1e-4, name  # AdamW enlarges rounding


# -- transforms of torch.func ------------------------------------------------------------------------------------------


def grad_of_parameters(model, inputs):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, args=(), kwargs=inputs).loss)(weights)
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def functional_call(model, inputs):
    """Without a transform the logits are lazy."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, weights, args=(), kwargs=inputs).loss
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(found, list(weights.values()))])


def vmap_of_the_head(model, inputs):
    hidden = torch.randn(3, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.func.vmap(lambda x: model.lm_head(x).logsumexp(-1))(hidden)


def vmap_of_the_embedding(model, inputs):
    return torch.func.vmap(lambda ids: model.get_input_embeddings()(ids).sum(-1))(inputs["input_ids"])


def jvp(model, inputs):
    rows = model.get_input_embeddings()(inputs["input_ids"]).detach()
    return torch.func.jvp(lambda x: model(inputs_embeds=x).logits.logsumexp(-1), (rows,), (torch.ones_like(rows),))[1]


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    "transform", [grad_of_parameters, functional_call, vmap_of_the_head, vmap_of_the_embedding, jvp]
)
def test_transforms_of_torch_func(transform, is_tied):
    model, inputs = llama(tie_word_embeddings=is_tied).double(), batch()
    model.set_attn_implementation("eager")  # which has a forward derivative
    theirs = transform(model, inputs).detach()
    with lazy_head(model):
        ours = transform(model, inputs).detach()
    assert_close(ours, theirs, 1e-6 if transform is functional_call else 1e-14)
    assert status(model).answered.total() == (transform is functional_call)


# -- without a gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}], ids=str)
def test_generate(options):
    model, ids = llama(), torch.randint(3, V, (3, 5))
    options = {"max_new_tokens": 9, "pad_token_id": 0, **options}
    torch.manual_seed(1)
    theirs = model.generate(ids, **options)
    torch.manual_seed(1)
    with lazy_head(model):
        ours = model.generate(ids, **options)
    assert torch.equal(ours, theirs)
    assert status(model).fallbacks.total() == 0


def test_evaluation():
    """The loss needs no logits; whoever asks for them gets them."""
    model, inputs = llama(), batch()
    theirs = model(**inputs)
    with lazy_head(model), torch.no_grad():
        ours = model(**inputs)
        assert status(model).fallbacks.total() == 0 and not ours.loss.requires_grad and not ours.logits.requires_grad
    assert_close(ours.loss, theirs.loss, 1e-5)
    assert torch.equal(ours.logits + 0, theirs.logits)
    assert (ours.logits.numpy() == theirs.logits.detach().numpy()).all()
    assert not (ours.logits + 0).requires_grad and status(model).fallbacks.total() == 1


# -- the handle, the status, and what is refused -----------------------------------------------------------------------


def test_the_handle_and_the_status():
    model, inputs = llama(), batch()
    names = list(model.state_dict())
    handle = lazy_head(model)
    assert list(model.state_dict()) == names and status(model).lazy
    model(**inputs).loss.backward()
    model(**inputs).logits.max().backward()
    found = status(model)
    assert (found.answered.total(), found.fallbacks.total(), list(found.fallbacks.values())) == (2, 1, [1])
    (line,) = found.fallbacks
    assert line.startswith(f"output layer: {__file__}:") and line.endswith(" reads its logits, which no op answers")
    assert str(found).splitlines() == [
        "LlamaForCausalLM: answered by rlhf_fast: linear_cross_entropy 2; lazy now, logits given at once 0 times",
        f"  1 times its own {line}",
    ]
    assert handle.status == found
    handle.remove()
    handle.remove()
    assert not status(model).lazy and status(model).fallbacks.total() == 1
    assert type(model(**inputs).logits) is torch.Tensor and "forward" not in vars(model.lm_head)
    with lazy_head(model):
        assert status(model).fallbacks.total() == 0


@pytest.mark.parametrize("handle_is", ["removed", "forgotten", "held"])
def test_weights_are_freed_with_the_model(handle_is):
    """Without a garbage collection; also while somebody holds the handle."""
    inputs = batch()
    assert is_freed_with_its_model(llama, lazy_head, lambda model: model(**inputs).loss.backward(), handle_is)


def test_a_forward_that_outlives_its_layer():
    handle = lazy_head(llama())
    with pytest.raises(RuntimeError, match="the output layer of this forward was freed; call the model"):
        handle.forward(torch.randn(2, 3, 32))
    assert not handle.status.answered
    handle.remove()


def test_a_handle_that_was_removed_leaves_the_next_one():
    model = llama()
    first = lazy_head(model)
    first.remove()
    second = lazy_head(model)
    first.remove()
    assert status(model).lazy and type(model(**batch()).logits) is LazyLogits
    second.remove()
    assert not status(model).lazy


def test_a_forward_that_was_wrapped_afterwards():
    """By accelerate's hooks, as offloading sets them. They stay, and call the layer's own forward."""
    model, inputs = llama(), batch()
    handle = lazy_head(model)
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert status(model).lazy and type(model(**inputs).logits) is LazyLogits
    with pytest.raises(UserError, match="has lazy logits already"):
        lazy_head(model)
    handle.remove()
    assert not status(model).lazy and type(model(**inputs).logits) is torch.Tensor
    hooks.remove_hook_from_module(model.lm_head)
    assert type(model(**inputs).logits) is torch.Tensor
    with lazy_head(model):
        assert status(model).lazy and type(model(**inputs).logits) is LazyLogits
    assert "forward" not in vars(model.lm_head)


def test_a_copy_that_outlives_the_block():
    """A reference model, for one: it is plain then, and may have lazy logits of its own."""
    model, inputs = llama(), batch()
    with lazy_head(model):
        other = copy.deepcopy(model)
        saved = pickle.loads(pickle.dumps(model))
    assert not status(other).lazy and type(other(**inputs).logits) is torch.Tensor
    for found in (other, saved):
        with lazy_head(found):
            assert type(found(**inputs).logits) is LazyLogits and not status(model).lazy
        assert "forward" not in vars(found.lm_head)


def test_another_output_layer_inside(caplog):
    model = llama()
    with lazy_head(model):
        model.resize_token_embeddings(V + 8)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "rlhf_fast"]
    assert "LlamaForCausalLM has another output layer now, as after resize_token_embeddings" in message
    caplog.clear()
    with lazy_head(model):
        lora(model, target_modules=["q_proj", "lm_head"])
        model(**batch()).loss.backward()
        assert status(model).lazy and status(model).fallbacks.total() == 1
    assert "has another output layer" not in caplog.text


def test_an_adapter_inside_that_copies_the_output_layer(caplog):
    model = llama()
    with lazy_head(model):
        lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    (message,) = [record.getMessage() for record in caplog.records if record.name == "rlhf_fast"]
    assert "has another output layer now" in message and "modules_to_save" in message


def test_a_removed_handle_is_refused():
    model = llama()
    with lazy_head(model) as handle:
        pass
    with pytest.raises(UserError, match="this handle of lazy_head was removed"), handle:
        pass
    with pytest.raises(UserError, match="LlamaForCausalLM is a class: pass a model"):
        lazy_head(transformers.LlamaForCausalLM)


def test_an_error_inside_restores_the_model():
    model = llama()
    with pytest.raises(ZeroDivisionError), lazy_head(model):
        1 / 0  # noqa: B018
    assert "forward" not in vars(model.lm_head)


def test_strict(monkeypatch):
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    model, inputs = llama(), batch()
    with lazy_head(model):
        model(**inputs).loss.backward()
        with pytest.raises(RuntimeError, match=r"1 and LlamaForCausalLM calls its own output layer: .*_head.py:\d+"):
            model(**inputs).logits.max()
        with torch.no_grad():
            model(**inputs).logits.max()
        model(**inputs).logits.detach().max()


def test_copies_and_files():
    """A copy has its own weights under its lazy logits. A saved model is a plain one."""
    model, inputs = llama(), batch()
    with lazy_head(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight *= 2.0
        ours, theirs = other(**inputs).loss, model(**inputs).loss
        saved = io.BytesIO()
        torch.save(model, saved)
        pickled = pickle.loads(pickle.dumps(model))
        assert status(other).lazy and status(other).answered.total() == 1
    assert not torch.equal(ours, theirs)
    weights, hidden = other.lm_head.weight, other.model(inputs["input_ids"]).last_hidden_state
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    assert_close(ours, F.cross_entropy((hidden @ weights.T).transpose(1, 2), labels), 1e-5)
    saved.seek(0)
    for found in (torch.load(saved, weights_only=False), pickled):
        assert type(found(**inputs).logits) is torch.Tensor and not status(found).lazy
        assert_close(found(**inputs).loss, theirs, 1e-5)


class Scaled(nn.Linear):
    """A linear layer that is not plain."""


def with_head(change):
    model = llama()
    change(model)
    return model


def quantized(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)


BAD = {
    "no model": (lambda: nn.Linear(2, 2), "has no get_output_embeddings"),
    "no head": (lambda: llama().model, "has no output embedding"),
    "another layer": (lambda: with_head(lambda m: setattr(m, "lm_head", Scaled(32, V))), r"is a \w+\.Scaled; the ops"),
    "an adapter": (lambda: lora(llama(), target_modules=["q_proj", "lm_head"]), "has an adapter on its output layer"),
    "a trained copy": (
        lambda: lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]), "has an adapter on its output"
    ),
    "no weights": (lambda: llama().to("meta"), "meta device"),
    "quantized": (lambda: with_head(quantized), r"quantized \(float8_e4m3fn\)"),
    "ZeRO-3": (lambda: with_head(lambda m: setattr(m.lm_head.weight, "ds_id", 3)), "ZeRO-3 has split"),
    "replaced": (lambda: with_head(lambda m: setattr(m.lm_head, "forward", lambda x: x)), "something else replaced"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    make, sentence = BAD[case]
    model = make()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(UserError, match=sentence) as error:
        lazy_head(model)
    assert "\n" not in str(error.value)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_refused_twice():
    model, inputs = llama(), batch()
    with lazy_head(model):
        with pytest.raises(UserError, match="has lazy logits already"):
            lazy_head(model)
        with pytest.raises(UserError, match="has lazy logits already"):
            lazy_head(lora(model))
        assert type(model(**inputs).logits) is LazyLogits


def test_zero_3_after_the_patch_gives_logits():
    """Split after it was patched, the weight is whole only within the layer's own hooks."""
    model, inputs = llama(), batch()
    with lazy_head(model):
        model.lm_head.weight.ds_id = 3
        assert type(model(**inputs).logits) is torch.Tensor and status(model).direct == 1


def test_data_parallel():
    """Its copies share the first one's layer, to which hidden states come from another device."""
    model = llama()
    with lazy_head(model):
        copied = model.lm_head._replicate_for_data_parallel()
        with pytest.raises(UserError, match=r"states on meta came to an output layer on cpu; nn.DataParallel") as error:
            copied(torch.empty(3, 17, 32, device="meta"))
    assert "\n" not in str(error.value)


def test_wrong_shapes_get_the_layers_error():
    model = llama()
    for hidden in (torch.randn(2, 3, 31), torch.randn(2, 3, 32, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as theirs:
            model.lm_head(hidden)
        with lazy_head(model), pytest.raises(RuntimeError) as ours:
            model.lm_head(hidden)
        assert str(ours.value) == str(theirs.value)


# -- the head ----------------------------------------------------------------------------------------------------------


def test_a_head_is_the_ops_form():
    """Any chain of scales around one tanh: the ops' softcap and temperature give the same logits."""
    head = LinearHead(torch.randn(7, 4), torch.randn(7)).scaled(0.5).soft_capped(3.0).scaled(-2.0).scaled(-0.7)
    hidden = torch.randn(5, 4)
    raw = F.linear(hidden, head.weight, head.bias)
    expected = 1.4 * 3 * torch.tanh(raw / 6)
    torch.testing.assert_close(head.logits(hidden), expected)
    torch.testing.assert_close(head.softcap * torch.tanh(raw / head.softcap) / head.temperature, expected)
    torch.testing.assert_close(head.chosen(hidden, torch.tensor([[3, 1]] * 5)), expected[:, [3, 1]])
    targets = torch.randint(7, (5,))
    logprobs, entropy, log_z, top1 = head.logprobs(hidden, targets)
    p = expected.log_softmax(-1)
    torch.testing.assert_close(logprobs, p.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(p.exp() * p).sum(-1))
    torch.testing.assert_close(log_z, expected.logsumexp(-1))
    assert torch.equal(top1, expected.argmax(-1) == targets)
    torch.testing.assert_close(
        head.cross_entropy(hidden, targets, 1.0), F.cross_entropy(expected, targets, reduction="sum")
    )
    assert head.tanh() is None and not head.scaled(-1.0).fits_ops and head.fits_ops
    assert LinearHead.of(llama()).weight.shape == (V, 32)
