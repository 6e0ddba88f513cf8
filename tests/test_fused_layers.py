"""integrations.layers: our training layers in transformers' models give their losses and gradients, or step aside."""

import contextlib
import copy
import pickle
import statistics

import accelerate
import peft
import pytest
import torch
import transformers
from architectures import GPT, SERVED, V, build
from lazy_pair import is_freed_with_its_model
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast.errors import UserError
from rlhf_fast.integrations import layers, lazy_head, status

pytestmark = pytest.mark.usefixtures("one_thread")
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
FAMILIES = [
    "llama", "llama, one head of keys", "llama, as many heads of keys", "llama, scaled rotation",
    "mistral, sliding window", "qwen2", "qwen3", "smollm3", "gpt_neox",
]  # fmt: skip
MODELS = {name: SERVED[name] for name in FAMILIES} | {
    "gpt2": build("GPT2", GPT, **NO_DROPOUT),
    "gpt2, scaled by layer": build("GPT2", GPT, **NO_DROPOUT, scale_attn_by_inverse_layer_idx=True),
}
T = 13


def batch(padding: str) -> dict:
    """Return three rows, with labels on all tokens but padding: also on a row's first."""
    ids = torch.randint(3, V, (3, T))
    inputs = {"input_ids": ids, "labels": ids.clone()}
    lengths, columns = torch.tensor([[T], [6], [1]]), torch.arange(T)
    if padding in ("right", "left", "left, positions"):
        mask = columns < lengths if padding == "right" else columns >= T - lengths
        inputs["attention_mask"] = mask.long()
        inputs["labels"] = ids.masked_fill(~mask, -100)
    if padding == "left, positions":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if padding == "packed":
        positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(T - 5)])
        inputs |= {"position_ids": positions.expand(3, T), "use_cache": False}
    return inputs


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_rounding(ours, theirs, tolerance=2e-5):
    assert abs(ours[0] - theirs[0]) <= 1e-5 * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    largest = max(grad.norm() for grad in theirs[1].values())
    for name, grad in theirs[1].items():  # some are only rounding, as those of keys' biases
        assert (ours[1][name] - grad).norm() <= tolerance * grad.norm() + 1e-7 * largest, name


def compare(model, tolerance=2e-5, **inputs):
    """Compare a pass with our layers to the model's own. Return the handle."""
    theirs = loss_and_gradients(model, **inputs)
    with layers.fused(model) as handle:
        ours = loss_and_gradients(model, **inputs)
    assert_equal_to_rounding(ours, theirs, tolerance)
    return handle


def calls_of(handle):
    return handle.status.answered.total()


def reasons_of(handle) -> dict[str, int]:
    return {reason.partition(".forward: ")[2]: count for reason, count in handle.status.fallbacks.items()}


def assert_ours(handle, calls=1):
    assert calls_of(handle) == calls and not handle.status.fallbacks


@pytest.mark.parametrize("padding", ["none", "right", "left", "left, positions", "packed"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.exhaustive(3, by=("padding",))
def test_losses_and_gradients(name, padding):
    assert_ours(compare(MODELS[name]().train(), **batch(padding)))


def test_padding_is_read_as_zeros_but_for_the_token_before_a_row():
    model, inputs = MODELS["llama"]().eval(), batch("left")
    own = model.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
    with layers.fused(model):
        ours = model.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[visible], own[visible])
    torch.testing.assert_close(ours[1, T - 7], own[1, T - 7])
    assert not ours[1, : T - 7].any() and own[1, : T - 7].any()


@pytest.mark.parametrize("shape, visible", [((1, 1), 1), ((1, 2), 2), ((2, 5), 0)])
def test_small_and_empty_batches(shape, visible):
    model = MODELS["qwen3"]().train()
    ids = torch.randint(3, V, shape)
    mask = (torch.arange(shape[1]) < visible).long().expand(shape)
    with layers.fused(model) as handle:
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden[mask.bool()].sum().backward()
    assert hidden.shape[:2] == shape and hidden.isfinite().all() and hidden.any() == bool(visible)
    assert_ours(handle)


def test_with_lazy_logits_one_op_answers():
    model, inputs = MODELS["llama"]().train(), batch("right")
    theirs = loss_and_gradients(model, **inputs)
    with lazy_head(model), layers.fused(model) as handle:
        assert_equal_to_rounding(loss_and_gradients(model, **inputs), theirs)
    assert_ours(handle)
    assert (status(model).answered.total(), status(model).fallbacks.total()) == (1, 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_gradient_checkpointing(name, reentrant, monkeypatch):
    """Each layer is computed again in the backward pass, whichever way torch would do it."""
    model, computed = MODELS[name]().train(), []
    layer = layers.packed_decoder._layer
    monkeypatch.setattr(layers.packed_decoder, "_layer", lambda *args: computed.append(1) or layer(*args))
    inputs = batch("right") | {"use_cache": False}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    theirs = loss_and_gradients(model, **inputs)
    with layers.fused(model) as handle:
        computed.clear()
        assert_equal_to_rounding(loss_and_gradients(model, **inputs), theirs)
        assert len(computed) == 2 * model.config.num_hidden_layers
        model.gradient_checkpointing_disable()
        computed.clear()
        assert_equal_to_rounding(loss_and_gradients(model, **inputs), theirs)
        assert len(computed) == model.config.num_hidden_layers
    assert_ours(handle, calls=2)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ddp(gloo, name, options):
    """Its hooks are called for each weight: gradients are those of a model without DDP."""
    model, inputs = MODELS[name]().train(), batch("right")
    plain, seen = copy.deepcopy(model), []
    wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
    wrapped.register_comm_hook(seen, count_gradients)
    with layers.fused(wrapped) as handle:
        for _ in range(3):
            ours = loss_and_gradients(wrapped, **inputs)
    assert_ours(handle, calls=3)
    theirs = loss_and_gradients(plain, **inputs)
    assert_equal_to_rounding(ours, (theirs[0], {f"module.{name}": grad for name, grad in theirs[1].items()}))
    assert sum(seen) == 3 * sum(p.numel() for p in model.parameters())


def count_gradients(seen, bucket):
    seen.append(bucket.buffer().numel())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_adapters():
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    assert_ours(compare(peft.get_peft_model(MODELS["llama"](), config).train(), **batch("left")))


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    """Both passes are as near a float32 copy, in the median of nine draws: of a gradient near 0 one may be far."""
    ratios = []
    for _ in range(9):
        model, inputs = MODELS[name]().bfloat16().train(), batch("right")
        exact = loss_and_gradients(copy.deepcopy(model).float(), **inputs)[1]
        theirs = loss_and_gradients(model, **inputs)[1]
        with layers.fused(model) as handle:
            ours = loss_and_gradients(model, **inputs)[1]
        assert_ours(handle)
        errors = [
            sum(((found[name].float() - grad).norm() / grad.norm()) ** 2 for name, grad in exact.items()) ** 0.5
            for found in (ours, theirs)
        ]
        ratios.append(float(errors[0] / errors[1]))
    assert statistics.median(ratios) <= 1.3, ratios


def test_the_comparison_runs_once_and_again_after_a_change(monkeypatch):
    model, compared = MODELS["llama"]().train(), []
    find = layers.packed_decoder.find_difference
    monkeypatch.setattr(layers.packed_decoder, "find_difference", lambda *args: compared.append(1) or find(*args))
    with layers.fused(model):
        for _ in range(2):
            model(**batch("right")).loss.backward()
        assert len(compared) == 1
        model.model.embed_tokens.weight.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
        model(**batch("right")).loss.backward()
        assert len(compared) == 2
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_the_comparison_runs_in_inference_mode():
    model = MODELS["llama"]().eval()
    with layers.fused(model) as handle, torch.inference_mode():
        model.model.layers[0].requires_grad_(False)
        model(**batch("right"), use_cache=False)
    assert_ours(handle)


def new_weight(module):
    module.weight = torch.nn.Parameter(torch.randn_like(module.weight))


CHANGES = {
    "weight of a linear layer": lambda m: new_weight(m.layers[0].mlp.up_proj),
    "weight of a norm": lambda m: new_weight(m.layers[1].input_layernorm),
    "weight of the last norm": lambda m: new_weight(m.norm),
    "weight of the embedding": lambda m: new_weight(m.embed_tokens),
    "linear layer": lambda m: setattr(m.layers[0].self_attn, "q_proj", torch.nn.Linear(32, 32)),
    "block": lambda m: setattr(m.layers[0], "mlp", m.layers[1].mlp),
    "embedding": lambda m: setattr(m, "embed_tokens", torch.nn.Embedding(V, 32)),
    "order of layers": lambda m: setattr(m, "layers", torch.nn.ModuleList(reversed(m.layers))),
    "values of a weight": lambda m: m.norm.weight.data.mul_(3.0),
    "epsilon": lambda m: setattr(m.norm, "variance_epsilon", 0.5),
    "scale of attention": lambda m: setattr(m.layers[1].self_attn, "scaling", 0.9),
    "window": lambda m: setattr(m.config, "sliding_window", 2),
    "training": lambda m: m.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_passes_is_noticed(name):
    model, inputs = MODELS["mistral, sliding window"]().train(), batch("right") | {"use_cache": False}
    before = loss_and_gradients(model, **inputs)
    with layers.fused(model) as handle:
        loss_and_gradients(model, **inputs)
        CHANGES[name](model.model)
        ours = loss_and_gradients(model, **inputs)
        assert_ours(handle, calls=2)
    assert_equal_to_rounding(ours, loss_and_gradients(model, **inputs), 5e-5)
    assert name == "training" or abs(ours[0] - before[0]) > 1e-4 * before[0]


def set_in_layers(module, part, name, value):
    for layer in module.layers:
        setattr(getattr(layer, part), name, value)


COMPARED = {
    "is_causal of modules": ("llama", lambda m: set_in_layers(m, "self_attn", "is_causal", False), False),
    "fewer layers": ("llama", lambda m: setattr(m.config, "num_hidden_layers", 1), True),
    "parallel residual of the config": (
        "gpt_neox", lambda m: setattr(m.config, "use_parallel_residual", not m.config.use_parallel_residual), True
    ),
    "parallel residual of a layer": (
        "gpt_neox",
        lambda m: setattr(m.layers[0], "use_parallel_residual", not m.layers[0].use_parallel_residual),
        False,
    ),
    "activation of the config": ("llama", lambda m: setattr(m.config, "hidden_act", "gelu"), True),
    "activation of modules": ("llama", lambda m: set_in_layers(m, "mlp", "act_fn", ACT2FN["gelu"]), True),
    "function of an activation": (
        "gpt_neox", lambda m: [setattr(layer.mlp.act, "act", torch.relu) for layer in m.layers], False
    ),
    "list of the config": ("qwen2", lambda m: m.config.layer_types.__setitem__(0, "another"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_a_change_of_a_number_is_compared_again(name):
    """Our layers compute it where the value is True, else the own forward. None: that one fails, and so do we."""
    family, change, is_ours = COMPARED[name]
    model, inputs = MODELS[family]().train(), batch("none") | {"use_cache": False}
    with layers.fused(model) as handle:
        loss_and_gradients(model, **inputs)
        change(model.base_model)
        if is_ours is None:
            with pytest.raises(KeyError, match="another"):
                model(**inputs)
            return
        ours = loss_and_gradients(model, **inputs)
        assert calls_of(handle) == 1 + is_ours and bool(handle.status.fallbacks) != is_ours
    assert_equal_to_rounding(ours, loss_and_gradients(model, **inputs), 5e-5)


def test_toggling_a_number_back_is_not_compared_again(monkeypatch):
    model, compared = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(target_modules=["q_proj"])).train(), []
    find = layers.packed_decoder.find_difference
    monkeypatch.setattr(layers.packed_decoder, "find_difference", lambda *args: compared.append(1) or find(*args))
    inputs = batch("right") | {"use_cache": False}
    with layers.fused(model) as handle:
        for epsilon in (1e-6, 0.5, 1e-6, 0.5):
            model.get_base_model().model.norm.variance_epsilon = epsilon
            model(**inputs)
            with model.disable_adapter(), torch.no_grad():
                model(**inputs)
            model.gradient_checkpointing_enable()
            model(**inputs)
            model.gradient_checkpointing_disable()
            model.eval()(**inputs)
            model.train()
        assert len(compared) <= 1 + 2 * 2
    assert_ours(handle, calls=16)


def test_dropout_that_is_set_between_two_passes_is_noticed():
    model, inputs = MODELS["llama"]().train(), batch("right")
    dropped = {"it trains with dropout": 1}
    with layers.fused(model) as handle:
        model(**inputs)
        model.model.layers[1].self_attn.attention_dropout = 0.1
        model(**inputs)
        assert calls_of(handle) == 1 and reasons_of(handle) == dropped
        model.eval()
        model(**inputs)
        assert calls_of(handle) == 2 and reasons_of(handle) == dropped
        model.train()
        model.model.layers[1].self_attn.attention_dropout = 0.0
        model(**inputs)
        assert calls_of(handle) == 3 and reasons_of(handle) == dropped
        model.model.layers[1].self_attn.attention_dropout = 1  # an int
        model(**inputs)
        assert calls_of(handle) == 3 and reasons_of(handle) == {"it trains with dropout": 2}
        model.model.layers[1].self_attn.attention_dropout = 0
        model.model.layers[0].mlp.act_fn = torch.nn.Sequential(model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.1))
        model(**inputs)
        assert calls_of(handle) == 3


def test_a_reward_model():
    model = transformers.LlamaForSequenceClassification(MODELS["llama"]().config)
    model.config.pad_token_id, model.config.num_labels = 0, 1
    inputs = batch("right")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    own = model(inputs["input_ids"], inputs["attention_mask"]).logits
    with layers.fused(model.model) as handle:  # the bare decoder
        torch.testing.assert_close(model(inputs["input_ids"], inputs["attention_mask"]).logits, own)
    assert_ours(handle)


def test_trainer(tmp_path):
    """Two accumulated batches a step, rows of different lengths, padded by transformers' own collator."""

    def train(name, fuse):
        torch.manual_seed(0)
        model = build("Llama", initializer_range=0.1)()
        rows = [{"input_ids": torch.randint(3, V, (n,)).tolist()} for n in (9, 4, 7, 12, 3, 8, 5, 6)]
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4,
            learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip

        def collate(rows):
            width = max(len(row["input_ids"]) for row in rows)
            ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
            mask = torch.tensor([[i < len(row["input_ids"]) for i in range(width)] for row in rows])
            return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}

        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        if not fuse:
            trainer.train()
        else:
            with layers.fused(model) as handle, lazy_head(model):
                trainer.train()
            assert_ours(handle, calls=8)
            assert (status(model).answered.total(), status(model).fallbacks.total()) == (8, 0)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], model.state_dict()

    theirs, weights = train("own", False)
    ours, our_weights = train("fused", True)
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-5)
    assert all((our_weights[k] - x).norm() <= 1e-4 * x.norm() for k, x in weights.items())


def test_a_transform_of_torch_func_has_the_models_own_forward():
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(3, V, (2, 7))

    def grads():
        def loss(weights):
            return torch.func.functional_call(model, weights, args=(), kwargs={"input_ids": ids, "labels": ids}).loss

        return torch.func.grad(loss)(weights)

    theirs = grads()
    with layers.fused(model) as handle:
        loss_and_gradients(model, input_ids=ids, labels=ids)
        ours = grads()
    assert_ours(handle)
    assert all(torch.equal(ours[name], grad) for name, grad in theirs.items())


def test_generation_and_evaluation_are_the_models_own():
    model = MODELS["llama"]().eval()
    ids = torch.randint(3, V, (2, 5))
    own, own_logits = model.generate(ids, max_new_tokens=6, do_sample=False), model(ids).logits
    with layers.fused(model) as handle:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), own)
        with torch.no_grad():
            assert calls_of(handle) == 0 and set(reasons_of(handle)) == {"it reads a cache"}
            assert model(ids).past_key_values.get_seq_length() == 5
            torch.testing.assert_close(model(ids, use_cache=False).logits, own_logits)
    assert calls_of(handle) == 1 and reasons_of(handle)["it writes a cache"] == 1


REASONS = {
    "dropout": lambda m: (build("GPT2", GPT)().train(), {}, "it trains with dropout"),
    "attention dropout": lambda m: (build("Llama", attention_dropout=0.1)().train(), {}, "it trains with dropout"),
    "cache": lambda m: (m, {"use_cache": True}, "it writes a cache"),
    "hidden states": lambda m: (m, {"output_hidden_states": True}, "it was given output_hidden_states"),
    "embeddings": lambda m: (
        m, {"inputs_embeds": torch.randn(3, T, 32), "input_ids": None}, "it was given inputs_embeds"
    ),
    "4-dimensional mask": lambda m: (
        m, {"attention_mask": torch.ones(3, 1, T, T).tril()}, r"its attention mask is not \(B, T\)"
    ),
    "mask with holes": lambda m: (
        m, {"attention_mask": torch.tensor([1, 0, 1, 1] + [0] * (T - 4)).expand(3, T)}, "its attention mask has holes"
    ),
    "packed rows with a cache": lambda m: (
        m, {"position_ids": torch.tensor([0, 1, *range(T - 2)]).expand(3, T)}, "pass use_cache=False"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_other_passes_are_the_models_own_and_say_why(name, monkeypatch):
    model, options, why = REASONS[name](MODELS["llama"]().train())
    inputs = {**batch("none"), **options}

    def run():
        torch.manual_seed(1)
        return loss_and_gradients(model, **inputs)

    theirs = run()
    with layers.fused(model) as handle:
        ours = run()
        assert torch.equal(ours[0], theirs[0]) and all(torch.equal(ours[1][k], g) for k, g in theirs[1].items())
        assert calls_of(handle) == 0 and sum(reasons_of(handle).values()) == 1
        monkeypatch.setenv("RLHF_FAST_STRICT", "1")
        with pytest.raises(RuntimeError, match=f"RLHF_FAST_STRICT=1 and .* calls its own .*Model.forward: .*{why}"):
            run()
    assert torch.equal(run()[0], theirs[0])


def test_a_pass_without_a_gradient_is_no_error_under_strict(monkeypatch):
    """Also outside of no_grad: what is frozen has none, but inputs or a trained prefix may."""
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    model, inputs = MODELS["llama"]().train().requires_grad_(False), batch("none")
    embeddings = torch.randn(3, T, 32)
    with layers.fused(model) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
        model(inputs_embeds=embeddings)
        assert sum(reasons_of(handle).values()) == 2
        with pytest.raises(RuntimeError, match="it was given inputs_embeds"):
            model(inputs_embeds=embeddings.requires_grad_())
        cache.layers[0].keys.requires_grad_()
        with pytest.raises(RuntimeError, match="it reads a cache"):
            model(inputs["input_ids"], past_key_values=cache)


def test_global_hooks_are_called():
    model, inputs, seen = MODELS["llama"]().train(), batch("right"), []
    with layers.fused(model) as handle:
        hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            model(**inputs)
            with pytest.raises(UserError, match="its modules have hooks"):
                layers.fused(MODELS["llama"]())
        finally:
            hook.remove()
        assert model.model.layers[0].mlp in seen and reasons_of(handle) == {
            "its modules have hooks, which ours would not call": 1
        }
        model(**inputs)
    assert calls_of(handle) == 1


def test_hooks_autocast_eager_padding_and_tuples_are_the_models_own():
    model, inputs = MODELS["llama"]().train(), batch("left")
    with layers.fused(model) as handle:
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        model(**inputs)
        hook.remove()
        with torch.autocast("cpu"):
            model(**inputs)
        assert isinstance(model.model(inputs["input_ids"], return_dict=False), tuple)
        model.set_attn_implementation("eager")
        model(**inputs)
        assert [why.split(",")[0] for why in reasons_of(handle)] == [
            "its modules have hooks", "autocast is on", "it was given return_dict", "a row begins with padding",
        ]  # fmt: skip
        model(**batch("right"))
    assert calls_of(handle) == 1


def test_a_copy_has_layers_of_its_own_until_the_handle_is_removed():
    model = MODELS["llama"]().train()
    with layers.fused(model) as handle:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.model.embed_tokens.weight.zero_()
        twin(**batch("none")).loss.backward()
        assert calls_of(handle) == 0 and calls_of(vars(twin.model)["forward"]) == 1
        assert twin.model.embed_tokens.weight.grad is not None and model.model.embed_tokens.weight.grad is None
    twin(**batch("none"))
    assert calls_of(vars(twin.model)["forward"]) == 1
    with layers.fused(twin) as second:
        twin(**batch("none"))
    assert calls_of(second) == 1


@pytest.mark.parametrize("handle_is", ["removed", "forgotten", "held"])
def test_weights_are_freed_with_the_model(handle_is):
    """Without a garbage collection; also while somebody holds the handle."""
    inputs = batch("right")
    assert is_freed_with_its_model(
        MODELS["llama"], layers.fused, lambda model: model(**inputs).loss.backward(), handle_is
    )


@pytest.mark.slow
def test_a_compiled_model_has_its_own_layers():
    model, inputs = MODELS["llama"]().train(), batch("right")
    own = loss_and_gradients(model, **inputs)
    with layers.fused(model) as handle:
        compiled = torch.compile(model, backend="eager")
        loss = compiled(**inputs).loss
        assert not handle.status.answered and not handle.status.fallbacks
    torch.testing.assert_close(loss.detach(), own[0])


def test_a_pickle_is_a_plain_model():
    model, inputs = MODELS["llama"]().eval(), batch("none")
    with layers.fused(model) as handle:
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(**inputs).logits, type(model).forward(twin, **inputs).logits)
        assert calls_of(handle) == 0 and not isinstance(vars(twin.model)["forward"], layers.FusedForward)
    assert "forward" not in vars(model.model)


def test_an_unpickled_model_is_fused_again_and_freed():
    """Also one that was copied or pickled again before."""
    model, inputs = MODELS["llama"]().train(), batch("none")
    with layers.fused(model), lazy_head(model):
        twin = pickle.loads(pickle.dumps(model))
    for copied in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        with torch.no_grad():
            copied.model.norm.weight.mul_(1.5)
        theirs = loss_and_gradients(copied, **inputs)
        with layers.fused(copied) as handle, lazy_head(copied):
            assert_equal_to_rounding(loss_and_gradients(copied, **inputs), theirs)
        assert_ours(handle)
        assert "forward" not in vars(copied.model) and "forward" not in vars(copied.lm_head)

    def unpickled():
        model = MODELS["llama"]()
        with layers.fused(model), lazy_head(model):
            return pickle.loads(pickle.dumps(model))

    assert "forward" in vars(unpickled().model) and "forward" in vars(unpickled().lm_head)
    assert is_freed_with_its_model(unpickled, lambda model: None, lambda model: model(**inputs), "held")


def test_a_removed_handle_is_refused():
    model = MODELS["llama"]()
    with layers.fused(model) as handle:
        pass
    with pytest.raises(UserError, match=r"this handle of layers\.fused was removed"), handle:
        pass


def test_removed_below_another_wrapper():
    """accelerate's hooks keep the forward that they found."""
    model = MODELS["llama"]().train()
    handle = layers.fused(model)
    accelerate.hooks.add_hook_to_module(model.model, accelerate.hooks.ModelHook())
    model(**batch("none"))
    assert calls_of(handle) == 1
    handle.remove()
    model(**batch("none"))
    assert calls_of(handle) == 1


def test_another_attention_or_a_patched_class_is_the_models_own(monkeypatch):
    def half(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 0.5, weights

    transformers.AttentionInterface.register("half", half)
    model, inputs = MODELS["llama"]().train(), batch("none")
    with layers.fused(model) as handle:
        model(**inputs)
        model.set_attn_implementation("half")
        patched = model(**inputs).loss
        model.set_attn_implementation("sdpa")
        model.config.is_causal = False
        model(**inputs)
        model.config.is_causal = True
        assert calls_of(handle) == 1
        of_half = "its attention is half; load it with attn_implementation='sdpa'"
        assert dict(reasons_of(handle)) == {of_half: 1, "its attention is not causal": 1}
        monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x)))
        model(**inputs)
        why = "the forward of LlamaMLP is not that of transformers, torch or peft"
        assert calls_of(handle) == 1 and reasons_of(handle)[why] == 1
    model.set_attn_implementation("half")
    with pytest.raises(UserError, match="its attention is half; load it with attn_implementation='sdpa'"):
        layers.fused(model)
    assert patched.isfinite()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_labels_on_padding_are_noticed_and_later_passes_are_the_models_own(padding, caplog, monkeypatch):
    model, inputs = MODELS["llama"]().train(), batch(padding)
    on_padding = inputs | {"labels": inputs["input_ids"]}
    own = model(**on_padding).loss
    with layers.fused(model) as handle, lazy_head(model):
        model(**inputs).loss.backward()
        loss = model(**on_padding).loss
        assert not reasons_of(handle) and abs(loss - own) > 1e-3
        loss.backward()
        (why,) = reasons_of(handle)
        assert why.startswith("a loss read padding") and "-100" in why
        assert why in caplog.text
        torch.testing.assert_close(model(**on_padding).loss, own, rtol=1e-5, atol=0)
        assert reasons_of(handle) == {why: 1, "an earlier loss read padding": 1}
        model(**batch("packed"))
        assert calls_of(handle) == 3
    monkeypatch.setenv("RLHF_FAST_STRICT", "1")
    with layers.fused(model), pytest.raises(RuntimeError, match="a loss read padding"):
        model(**on_padding).loss.backward()


def test_a_loss_that_multiplies_padding_by_0_does_not_read_it():
    model, inputs = MODELS["llama"]().train(), batch("right")
    with layers.fused(model) as handle:
        states = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        (states.square().sum(-1).sqrt() * inputs["attention_mask"]).sum().backward()  # NaN times 0 on padding
    assert_ours(handle)


def test_a_batch_of_gradients():
    model, inputs = MODELS["llama"]().train(), batch("right")
    weight, found = model.model.norm.weight, []
    for context in (contextlib.nullcontext(), layers.fused(model)):
        with context:
            states = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
            out = states[inputs["attention_mask"].bool()].mean(0)[:3]
            found += torch.autograd.grad(out, weight, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(*found)


def test_a_handle_that_no_pass_reaches_warns(caplog):
    model = MODELS["llama"]()
    with layers.fused(model), lazy_head(model):
        pass
    lazy, ours = (record.getMessage() for record in caplog.records if record.name == "rlhf_fast")
    assert lazy.startswith("lazy_head: no pass of LlamaForCausalLM came") and "integrations.trl.fused()" in lazy
    assert ours.startswith("layers.fused: no pass of LlamaForCausalLM came")
    caplog.clear()
    with layers.fused(model), lazy_head(model):
        copy.deepcopy(model)(**batch("none"))
    with layers.fused(model), lazy_head(model):
        model(batch("none")["input_ids"])
    with pytest.raises(ZeroDivisionError), layers.fused(model), lazy_head(model):
        raise ZeroDivisionError
    assert "no pass" not in caplog.text


def test_packed_rows_of_trl_have_a_seq_idx():
    """TRL's collator gives it with packed rows and padding_free; position_ids say the same."""
    model, inputs = MODELS["llama"]().train(), batch("packed")
    expected = loss_and_gradients(model, **inputs)
    inputs["seq_idx"] = (inputs["position_ids"] == 0).cumsum(1, dtype=torch.int32) - 1
    with layers.fused(model) as handle:
        assert_equal_to_rounding(loss_and_gradients(model, **inputs), expected)
        assert calls_of(handle) == 1 and not reasons_of(handle)


def test_an_adapter_that_is_attached_later_is_compared_with_weights(monkeypatch):
    model, found = MODELS["llama"]().train(), []
    find = layers.packed_decoder.find_difference

    def spy(decoder, *args):
        found.append([bool(p.any()) for name, p in decoder.named_parameters() if "lora_B" in name])
        return find(decoder, *args)

    monkeypatch.setattr(layers.packed_decoder, "find_difference", spy)
    with layers.fused(model) as handle:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        wrapped(**batch("right")).loss.backward()
        assert calls_of(handle) == 1 and found[1:] == [[True, True]]
        assert not any(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name)


def test_a_model_that_is_refused_stays_as_it_was(monkeypatch):
    def refused(model, why):
        before, training = dict(vars(model.base_model)), model.training
        with pytest.raises(UserError, match=why):
            layers.fused(model)
        assert vars(model.base_model) == before and model.training == training

    refused(SERVED["gemma"](), "GemmaForCausalLM: our layers do not run here, there is no step for GemmaModel")
    refused(MODELS["llama"]().double(), "its weights are float64; load it in float32 or bfloat16")
    refused(MODELS["llama"]().to("meta"), "its weights are not on the CPU, whole")
    hooked = MODELS["llama"]()
    seen = []
    hooked.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    refused(hooked, "its modules have hooks")
    assert not seen
    model = MODELS["llama"]().train()
    with layers.fused(model):
        refused(model, "LlamaForCausalLM: has our layers already; call remove")
    model.model.forward = model.model.forward
    refused(model, "something else replaced its decoder's forward")
    with pytest.raises(UserError, match="Linear: has no get_output_embeddings; pass a model of transformers"):
        layers.fused(torch.nn.Linear(2, 2))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused(build("Llama", rope_parameters=rope)(), "its rotary embedding depends on the longest row")
    monkeypatch.setattr(layers.packed_decoder, "_difference", lambda *_: 0.5)
    refused(MODELS["llama"](), "its hidden states differ from the module's by 5.0e-01")
