"""The model: our head against the module's own logits, packing, dropout, LoRA, scalar heads, saving, errors."""

import pytest
import torch
import toy
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_fast.batches import Demonstrations, pad_rows
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import checks
from rlhf_fast.model.model import Model
from rlhf_fast.training.losses import sft_loss

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {
    "vocab_size": 61,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODULES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT, initializer_range=0.2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, initializer_range=0.2)),
    "gemma2 (soft cap)": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, sliding_window=4, initializer_range=0.2)
    ),
    "cohere (scale)": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, initializer_range=0.2)),
    "granite (divisor)": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0, initializer_range=0.2)),
    "gptj (bias)": lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4, initializer_range=0.2)),
}


def test_a_model_is_loaded_from_its_path_alone(tmp_path):
    folder = toy.model(tmp_path / "model")
    settings = ModelConfig(folder)
    for given in (folder, tmp_path / "model", settings):
        model = Model.load(given)
        assert model.cfg == settings and model.tokenizer is not None
    weight = Model.load(tmp_path / "model", tokenizer=False).head_weight
    assert torch.equal(weight, Model.load(settings, tokenizer=False).head_weight)


def test_what_is_no_path_and_no_module_is_named():
    module = MODULES["llama"]()
    for given, name in ((3, "int"), ({"path": "x"}, "dict"), (module, "LlamaForCausalLM")):
        with pytest.raises(UserError, match=rf"takes a folder, .* got {name}; write .* or Model\(module, tokenizer\)"):
            Model.load(given)
    with pytest.raises(UserError, match=r"wraps a module that is in memory, got str; Model.load\(path\) loads"):
        Model("runs/first/sft")


def demonstrations(*shapes, vocabulary=61):
    """Return rows of random tokens, one for each (prompt length, length)."""
    tokens, lengths = pad_rows([torch.randint(3, vocabulary, (length,)).tolist() for _, length in shapes])
    return Demonstrations(tokens, torch.tensor([first for first, _ in shapes]), lengths)


def gradients(model, loss):
    model.module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@torch.no_grad()
def test_logprobs_are_those_of_the_modules_own_logits(make):
    module = make()
    if module.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(module.get_output_embeddings().bias)
    model, batch = Model(module), demonstrations((1, 9), (4, 5), (3, 12), (2, 2))
    logprobs, entropy = model.logprobs(*batch[:3], temperature=0.7)
    for row, (tokens, first, length) in enumerate(zip(*batch[:3], strict=True)):
        truth = (module(input_ids=tokens[None, :length]).logits[0].double() / 0.7).log_softmax(-1)
        for j in range(int(length - first)):
            at = int(first) + j
            assert abs(float(logprobs[row, j] - truth[at - 1, tokens[at]])) < 1e-4
            assert abs(float(entropy[row, j]) + float((truth[at - 1].exp() * truth[at - 1]).sum())) < 1e-4
        assert (logprobs[row, int(length - first) :] == 0).all()


def test_a_head_that_does_more_than_a_linear_map_is_refused():
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_decoder=True)
    with pytest.raises(UserError, match="not a linear map"):
        Model(BertLMHeadModel(config))


def test_a_model_that_sees_the_future_is_refused():
    config = BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UserError, match="only causal"):
        Model(BertLMHeadModel(config))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2 (soft cap)"])
def test_packed_rows_do_not_see_one_another(kind):
    """The loss and gradients are those of one row at a time."""
    model = Model(MODULES[kind]())
    batch = demonstrations((1, 9), (4, 5), (3, 12), (2, 2), (1, 3))
    packed, _ = sft_loss(model, batch, batch.num_items(), pack=True)
    packed_gradients = gradients(model, packed)
    alone = sum(sft_loss(model, batch.take([row]), batch.num_items())[0] for row in range(5))
    alone_gradients = gradients(model, alone)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert packed_gradients.keys() == alone_gradients.keys()
    for name, gradient in alone_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_packing_is_refused_where_packed_rows_see_one_another():
    config = FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    model, batch = Model(FalconForCausalLM(config)), demonstrations((1, 4), (1, 5))
    with pytest.raises(UserError, match="packing=false"):
        sft_loss(model, batch, batch.num_items(), pack=True)


def test_sft_loss_counts_completion_tokens_only():
    model, batch = Model(MODULES["llama"]()), demonstrations((3, 7), (2, 4))
    loss, _ = sft_loss(model, batch, batch.num_items())
    truth = model.module(input_ids=batch.tokens).logits.log_softmax(-1)
    expected = [truth[0, t - 1, batch.tokens[0, t]] for t in range(3, 7)]
    expected += [truth[1, t - 1, batch.tokens[1, t]] for t in range(2, 4)]
    torch.testing.assert_close(loss, -torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_is_off_outside_of_train_mode(kind):
    model, batch = Model(MODULES[kind]()), demonstrations((1, 9))
    expected = model.hidden(batch.tokens)
    with model.train_mode():
        assert torch.equal(model.hidden(batch.tokens), expected)
    with model.train_mode(dropout=0.5):
        dropped = model.hidden(batch.tokens)
        assert not torch.allclose(dropped, expected, atol=1e-3)
        assert not torch.equal(model.hidden(batch.tokens), dropped)
    assert torch.equal(model.hidden(batch.tokens), expected) and not model.module.training


def test_residual_dropout_scales_what_each_branch_adds():
    """A fraction p of the entries is 0, and the others are multiplied by 1 / (1 - p)."""
    model, seen = Model(MODULES["llama"]()), {}
    branch = model.decoder.layers[0].mlp
    branch.register_forward_hook(lambda _, __, output: seen.update(before=output.detach()))
    with model.train_mode(dropout=0.25):
        branch.register_forward_hook(lambda _, __, output: seen.update(after=output.detach()))
        model.hidden(torch.randint(3, 61, (16, 32)))
    kept = seen["after"] != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(seen["after"][kept], seen["before"][kept] / 0.75)


@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, rank):
    if rank:
        pytest.importorskip("peft")
    folder, found, batch = toy.model(tmp_path / "base"), [], demonstrations((1, 6), (2, 8), vocabulary=11)
    for checkpointing in (False, True):
        cfg = ModelConfig(folder, lora=LoraConfig(rank=rank), gradient_checkpointing=checkpointing)
        model, runs = Model.load(cfg), []
        model.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with model.train_mode():  # with checkpointing a layer runs again in the backward pass
            found.append(gradients(model, sft_loss(model, batch, batch.num_items())[0]))
        assert len(runs) == 1 + checkpointing
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_save_and_load_in_plain_transformers(tmp_path):
    model = Model.load(ModelConfig(toy.model(tmp_path / "base")))
    model.save(tmp_path / "out")
    tokens = torch.tensor([[3, 4, 5, 6]])
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(plain(input_ids=tokens).logits, model.module(input_ids=tokens).logits)
    assert Model.load(ModelConfig(str(tmp_path / "out"))).tokenizer.get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scalar_head(tmp_path, kind):
    folder = toy.model(tmp_path / "base", kind)
    with pytest.raises(UserError, match="never trained"):
        Model.load(ModelConfig(folder), head="scalar")
    model = Model.load(ModelConfig(folder), head="scalar", fresh_head=True, seed=3)
    model.score_bias = 1.25
    tokens, lengths = pad_rows([[3, 4, 5, 6, 7], [3, 4], [8, 9, 3]])
    last = model.last_scores(tokens, lengths)
    every = model.score_hidden(model.hidden(tokens))
    torch.testing.assert_close(last, torch.stack([every[0, 4], every[1, 1], every[2, 2]]))
    values = model.values(tokens, torch.tensor([2, 1, 3]), lengths)
    torch.testing.assert_close(values[0], every[0, 1:4])
    torch.testing.assert_close(values[1], torch.stack([every[1, 0], *torch.zeros(2)]))
    assert (values[2] == 0).all()
    model.save(tmp_path / "reward")
    again = Model.load(ModelConfig(str(tmp_path / "reward")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths), last)
    plain = type(model.module).from_pretrained(tmp_path / "reward").eval()
    torch.testing.assert_close(plain(input_ids=tokens[:1]).logits[0, 0] + 1.25, last[0])
    with pytest.raises(UserError, match="is a reward model"):
        Model.load(ModelConfig(str(tmp_path / "reward")))


def test_rounding_alone_refuses_no_score_head(monkeypatch):
    """In bfloat16 the layers of two forward passes may round to scores that differ by a tenth; one pass has one."""
    gaps, right = [], checks._allclose

    def allclose(actual, expected, weight):
        gaps.append(float((actual - expected).abs().max() / expected.abs().max().clamp_min(1)))
        return right(actual, expected, weight)

    monkeypatch.setattr(checks, "_allclose", allclose)
    config = LlamaConfig(**SMALL | {"pad_token_id": 0}, num_labels=1, initializer_range=0.3)
    for _ in range(20):
        Model(LlamaForSequenceClassification(config).bfloat16(), head="scalar")
    assert len(gaps) == 60 and max(gaps) < 0.01, "a plain row, one with an end token, a padded one, of 20 models"


class ScoresTheTokenBefore(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids[:, :-1], None if attention_mask is None else attention_mask[:, :-1], **kwargs)


class ReadsPadding(LlamaForSequenceClassification):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        found = super().forward(input_ids, attention_mask, **kwargs)
        found.logits = self.score(self.model(input_ids).last_hidden_state[:, -1])
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, words", [(ScoresTheTokenBefore, "state$"), (ReadsPadding, "that is not padding")])
def test_a_score_of_another_token_is_refused(kind, words, dtype):
    torch.manual_seed(0)  # a few random models have nearly the same score at both tokens
    config = LlamaConfig(**SMALL | {"pad_token_id": 0}, num_labels=1, initializer_range=0.3)
    with pytest.raises(UserError, match=f"its score is not a linear map of the last token's hidden.*{words}"):
        Model(kind(config).to(dtype), head="scalar")


def test_padding_does_not_change_a_score():
    config = LlamaConfig(**SMALL, num_labels=1, initializer_range=0.2)
    model = Model(LlamaForSequenceClassification(config), head="scalar")
    tokens, lengths = pad_rows([[5, 6, 7], [8, 9, 10, 11, 12, 13]])
    alone = model.last_scores(tokens[:1, :3], lengths[:1])
    tokens[0, 3:] = 60
    torch.testing.assert_close(model.last_scores(tokens, lengths)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_trains_adapters_only_and_keeps_its_reference(tmp_path, kind):
    pytest.importorskip("peft")
    folder = toy.model(tmp_path / "base", kind)
    plain = Model.load(ModelConfig(folder))
    model = Model.load(ModelConfig(folder, lora=LoraConfig(rank=4)))
    batch = demonstrations((1, 6), (2, 8), vocabulary=11)
    assert all("lora_" in name for name in model.trainable())
    for p in model.trainable().values():
        torch.nn.init.normal_(p, std=0.3)
    before, (now, _) = plain.logprobs(*batch[:3])[0], model.logprobs(*batch[:3])
    assert not torch.allclose(now, before, atol=1e-2)
    assert torch.equal(model.reference().logprobs(*batch[:3])[0], before)
    assert torch.equal(model.logprobs(*batch[:3])[0], now)
    weights = {name: p.clone() for name, p in model.module.state_dict().items()}
    model.save(tmp_path / "out")
    assert all(torch.equal(weights[name], p) for name, p in model.module.state_dict().items())
    merged = Model.load(ModelConfig(str(tmp_path / "out")))
    torch.testing.assert_close(merged.logprobs(*batch[:3])[0], now, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="adapter alone"):
        Model.load(ModelConfig(str(tmp_path / "out" / "adapter")))


def test_lora_on_a_scalar_model_trains_the_score_row_too(tmp_path):
    pytest.importorskip("peft")
    cfg = ModelConfig(toy.model(tmp_path / "base"), lora=LoraConfig(rank=2))
    model = Model.load(cfg, head="scalar", fresh_head=True)
    trainable = model.trainable()
    assert any("score" in name for name in trainable)
    for p in trainable.values():
        torch.nn.init.normal_(p, std=0.3)
    tokens, lengths = pad_rows([[3, 4, 5], [6, 7]])
    scores = model.last_scores(tokens, lengths)
    model.save(tmp_path / "out")
    again = Model.load(ModelConfig(str(tmp_path / "out")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths), scores, rtol=1e-4, atol=1e-5)


def test_errors_of_loading(tmp_path):
    for path, words in [("", "no path"), (str(tmp_path / "nothing"), "no such folder")]:
        with pytest.raises(UserError, match=words):
            Model.load(ModelConfig(path))
    folder = toy.model(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        Model.load(ModelConfig(folder))
    toy.tokenizer("abcdefghijklmnop").save_pretrained(folder)
    with pytest.raises(UserError, match="19 tokens, the model only 11"):
        Model.load(ModelConfig(folder))


def test_weights_that_are_not_finite_are_refused():
    module = MODULES["llama"]()
    module.model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity"):
        Model(module)


def test_the_first_token_of_a_row_cannot_be_predicted():
    model, batch = Model(MODULES["llama"]()), demonstrations((0, 3))
    with pytest.raises(ValueError, match="at least 1"):
        model.logprobs(*batch[:3])
