"""Saving keeps what was trained: adapters of every kind merged by peft's own code, padding tokens of reward models,
composite configs, and the check that reads a folder again before and after a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
import transformers as t
from architectures import GPT, SMALL, prompts, sampling
from shrink import shrunken
from torch import nn

from rlhf_fast.batches import Comparisons, pad_rows
from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import lora, saved_model
from rlhf_fast.model.model import Model
from rlhf_fast.model.pretrained import SCORE_TOKEN
from rlhf_fast.model.saved_model import PROBE, check_folder, check_saving, save_with_probe
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.training.losses import reward_loss

MOE = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
ROW = torch.arange(3, 15)[None]


def moe(name, **sizes):
    return lambda: getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**MOE, **sizes))


def llama(**changes):
    return lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **changes}))


def gpt2():
    return t.GPT2LMHeadModel(t.GPT2Config(**GPT))


WRAPPED = {
    "experts, Mixtral": (moe("Mixtral", num_local_experts=4), {"target_modules": "all-linear"}),
    "experts, Qwen3 MoE": (moe("Qwen3Moe", num_experts=4), {"target_modules": "all-linear"}),
    "experts as (in, out), GPT-OSS": (
        moe("GptOss", num_local_experts=4),
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    "a linear layer's parameter": (
        llama(),
        {"target_parameters": ["q_proj.weight", "down_proj.weight"], "target_modules": []},
    ),
    "DoRA": (llama(), {"target_modules": "all-linear", "use_dora": True}),
    "rank-stabilised": (llama(), {"target_modules": "all-linear", "use_rslora": True}),
    "bias of the adapter": (
        llama(attention_bias=True),
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "bias": "all"},
    ),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "embedding, not tied": (llama(), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding beside": (llama(tie_word_embeddings=True), {"target_modules": "all-linear"}),
    "trained norm": (llama(), {"target_modules": ["o_proj"], "modules_to_save": ["input_layernorm"]}),
    "trained token rows": (llama(), {"target_modules": ["o_proj"], "trainable_token_indices": [5, 7]}),
}
"""Modules and the settings of peft's LoraConfig. None of them is made of linear layers with plain products alone."""


def wrapped(name) -> Model:
    """Return a model whose adapters are not 0."""
    peft = pytest.importorskip("peft")
    make, settings = WRAPPED[name]
    module = peft.get_peft_model(make(), peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **settings))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Model(module.eval())


def logprobs(module) -> torch.Tensor:
    """Return log p of ROW by the module's own logits."""
    with torch.no_grad():
        return module(input_ids=ROW).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("name", WRAPPED)
def test_a_folder_holds_what_was_trained(name, tmp_path):
    """Plain transformers reads it, and the weights in memory are as before, bit for bit."""
    model = wrapped(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    expected = logprobs(model.module)
    model.save(tmp_path)
    after = model.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    found = logprobs(t.AutoModelForCausalLM.from_pretrained(tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.module.disable_adapter():
        assert (logprobs(model.module) - expected).abs().max() > 0.01, "the adapters of this test do nothing"


@pytest.mark.parametrize("name", ["rank-stabilised", "a linear layer's parameter", "DoRA", "bias of the adapter"])
def test_responses_are_sampled_with_every_adapter(name):
    """The fused path adds them up, or leaves the model to another path."""
    model = wrapped(name)
    rollout = Rollout(model, sampling(max_new_tokens=6))
    found = rollout.generate(prompts(5, 3))
    expected, _ = model.logprobs(found.tokens, found.prompt_lengths, found.lengths)
    torch.testing.assert_close(found.logprobs, expected, rtol=0, atol=1e-3)
    fused = name in ("rank-stabilised", "a linear layer's parameter")
    assert (rollout.decode_path == "fused") == fused


def test_a_new_adapter_that_the_fused_path_would_not_see_is_found(monkeypatch, tmp_path):
    """It is 0 at first: the comparison of hidden states must not be fooled by that."""
    pytest.importorskip("peft")
    cfg = ModelConfig(toy.model(tmp_path), lora=LoraConfig(rank=2))
    assert Rollout(Model.load(cfg), sampling(max_new_tokens=6)).decode_path == "fused"
    monkeypatch.setattr(lora, "weight_delta", lambda _: 0)
    assert Rollout(Model.load(cfg), sampling(max_new_tokens=6)).decode_path != "fused"


def test_adapters_on_a_shared_embedding_are_refused(tmp_path):
    pytest.importorskip("peft")
    module = llama(tie_word_embeddings=True)()
    module.save_pretrained(tmp_path)
    cfg = ModelConfig(str(tmp_path), lora=LoraConfig(rank=2, targets=("embed_tokens", "q_proj")))
    with pytest.raises(UserError, match="shares with its head"):
        Model.load(cfg, tokenizer=False)


# The check


MODULES = {
    "dense then experts": lambda: t.DeepseekV3ForCausalLM(shrunken(t.DeepseekV3Config, num_hidden_layers=7)),
    "two kinds of attention": lambda: t.Gemma3ForCausalLM(shrunken(t.Gemma3TextConfig, num_hidden_layers=8)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**{**GPT, "n_layer": 6})),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_trial_leaves_out_layers_and_puts_them_back(name, tmp_path, monkeypatch):
    model, sizes = Model(MODULES[name]().eval()), []
    expected, config = model.logprobs(ROW, *_whole())[0], model.base.config.to_dict()
    check = saved_model._check
    monkeypatch.setattr(
        saved_model, "_check", lambda folder, probe: sizes.append(_layers(folder)) or check(folder, probe)
    )
    check_saving(model, tmp_path)
    assert len(sizes) == 1 and sizes[0] < model.text_config.num_hidden_layers
    assert torch.equal(model.logprobs(ROW, *_whole())[0], expected) and model.base.config.to_dict() == config
    assert not list(tmp_path.iterdir())


def _whole():
    return torch.ones(1, dtype=torch.int64), torch.tensor([ROW.shape[1]])


def _layers(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return config.get("num_hidden_layers", config.get("n_layer"))


FAULTS = {
    "a weight is dropped": lambda state: {key: value for key, value in state.items() if "o_proj" not in key},
    "a delta is dropped": lambda state: {
        key: value * 0.7 if "up_proj" in key else value for key, value in state.items()
    },
    "two layers change places": lambda state: {
        key.replace("layers.0", "layers.x").replace("layers.1", "layers.0").replace("layers.x", "layers.1"): value
        for key, value in state.items()
    },
}


@pytest.mark.exhaustive(1)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_would_save_something_else_does_not_begin(fault, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    merge = lora.merged_state_dict
    monkeypatch.setattr(lora, "merged_state_dict", lambda module: FAULTS[fault](merge(module)))
    cfg = toy.sft(tmp_path)
    cfg = replace(cfg, model=replace(cfg.model, lora=LoraConfig(rank=2)))
    with pytest.raises(UserError, match="cannot be saved, as a trial before the run shows"):
        sft.run(cfg)
    assert not (tmp_path / "sft" / "metrics.jsonl").exists() or not toy.metrics(tmp_path / "sft")


@pytest.mark.exhaustive(1)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_checkpoints_stay_if_the_folder_is_not_the_model(stage, folder, monkeypatch):
    """A disk that returns other bytes, or a transformers that reads them otherwise: the run fails at its end, and the
    same command goes on from the last checkpoint."""
    settings = {"sft": toy.sft, "reward": toy.reward, "ppo": toy.ppo}[stage](folder)
    run = {"sft": sft, "reward": reward, "ppo": ppo}[stage].run
    save = Model.save

    def spoiled(self, target):
        save(self, target)
        if ".tmp" in str(target):  # not the trial
            file = next(Path(target).glob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:-4000] + bytes(4000))

    monkeypatch.setattr(Model, "save", spoiled)
    with pytest.raises(
        UserError, match=r"differ from the trained model's .* trained weights stay in .*/finished; look"
    ):
        run(settings)
    out = folder / stage
    assert list((out / "checkpoints").glob("step_*")) and "finished" not in json.loads((out / "run.json").read_text())
    monkeypatch.setattr(Model, "save", save)
    run(settings)
    assert "finished" in json.loads((out / "run.json").read_text())
    assert not list(out.rglob(PROBE)) and not list((out / "checkpoints").glob("step_*"))


def test_the_check_reads_tokenizer_and_constant_too(tmp_path):
    model = Model.load(ModelConfig(toy.model(tmp_path / "base")), head="scalar", fresh_head=True)
    model.score_bias = 1.5
    for spoil, words in [
        (lambda folder: toy.tokenizer("hgfedcba").save_pretrained(folder), "its tokenizer is not the one"),
        (lambda folder: _set(folder / "config.json", rlhf_fast_score_bias=0.0), "does not hold the score's constant"),
        (lambda folder: _set(folder / "config.json", num_hidden_layers=1), "weights are not the architecture's"),
    ]:
        save_with_probe(model, tmp_path / "out")
        spoil(tmp_path / "out")
        with pytest.raises(UserError, match=words):
            check_folder(tmp_path / "out")
    save_with_probe(model, tmp_path / "out")
    check_folder(tmp_path / "out")
    assert not (tmp_path / "out" / PROBE).exists()


def _set(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Reward models


def base(folder: Path, kind: str, pad: str | None) -> str:
    """Write a language model whose tokenizer has `pad` as padding token."""
    toy.model(folder, kind)
    words = toy.tokenizer()
    if pad:
        words.pad_token = pad
        _set(folder / "config.json", pad_token_id=words.pad_token_id)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad", [None, "</s>", "<unk>"])
def test_every_program_reads_the_score_at_the_end_token(kind, pad, tmp_path):
    """In a batch padded by the folder's own tokenizer, on either side, and alone. Members: GPT-2 with no spare token,
    padding by the end token, by the unknown token that an answer can end with."""
    model = Model.load(ModelConfig(base(tmp_path / "base", kind, pad)), head="scalar", fresh_head=True)
    model.score_bias = 0.25
    model.save(tmp_path / "reward")
    plain = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    words = t.AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = ["a b c </s>", "d </s>", "a zz", "</s> b c d e f </s>"]
    tokens, lengths = pad_rows(model.tokenizer(texts)["input_ids"])
    with torch.no_grad():
        ours = model.last_scores(tokens, lengths) - 0.25
        alone = [plain(**words(text, return_tensors="pt")).logits[0, 0] for text in texts]
        batch = words(texts, padding=True, return_tensors="pt")
        together = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(torch.stack(alone), ours, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, ours, rtol=1e-4, atol=1e-5)
    again = Model.load(ModelConfig(str(tmp_path / "reward")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths) - 0.25, ours)


def foreign(folder: Path, pad: int | None, **changes) -> str:
    """Write a reward model as other trainers do."""
    words = toy.tokenizer()
    config = t.LlamaConfig(
        **{**SMALL, "vocab_size": len(words), "eos_token_id": 1, "pad_token_id": pad, "num_labels": 1, **changes}
    )
    t.LlamaForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("pad", [1, 0, None])
def test_a_foreign_reward_model_is_read_by_its_own_rule(pad, tmp_path):
    """Also after it was trained further, and saved with a constant."""
    folder = foreign(tmp_path / "theirs", pad)
    tokens, lengths = pad_rows([[3, 4, 5, 1], [6, 7, 1], [8, 9, 10, 3, 4]])

    def read(path):
        plain = t.AutoModelForSequenceClassification.from_pretrained(path)
        with torch.no_grad():
            rows = [plain(input_ids=row[None, :n]).logits[0, 0] for row, n in zip(tokens, lengths, strict=True)]
        return torch.stack(rows)

    model = Model.load(ModelConfig(folder), head="scalar")
    torch.testing.assert_close(model.last_scores(tokens, lengths), read(folder), rtol=1e-4, atol=1e-5)
    model.score_bias = 2.0
    model.save(tmp_path / "ours")
    again = Model.load(ModelConfig(str(tmp_path / "ours")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths), read(folder) + 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(read(tmp_path / "ours"), read(folder))


def test_folders_of_earlier_versions_mean_the_last_token(tmp_path):
    folder = Path(foreign(tmp_path / "ours", 1))
    tokens, lengths = pad_rows([[3, 4, 5, 1], [6, 7, 1]])
    _set(folder / "config.json", rlhf_fast_score_bias=0.5)
    model = Model.load(ModelConfig(str(folder)), head="scalar")
    every = model.score_hidden(model.hidden(tokens))
    torch.testing.assert_close(model.last_scores(tokens, lengths), torch.stack([every[0, 3], every[1, 2]]))
    model.save(tmp_path / "again")
    assert SCORE_TOKEN in json.loads((tmp_path / "again" / "config.json").read_text())
    again = Model.load(ModelConfig(str(tmp_path / "again")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths), model.last_scores(tokens, lengths))


def test_a_head_of_two_outputs_is_refused(tmp_path):
    with pytest.raises(UserError, match="its head has 2 outputs"):
        Model.load(ModelConfig(foreign(tmp_path, 0, num_labels=2)), head="scalar")


def test_a_head_with_a_bias_is_followed():
    module = t.LlamaForSequenceClassification(t.LlamaConfig(**{**SMALL, "num_labels": 1}))
    module.score = nn.Linear(32, 1)
    model = Model(module.eval(), head="scalar")
    with torch.no_grad():
        expected = module(input_ids=ROW).logits[0, 0]
    torch.testing.assert_close(model.last_scores(ROW, torch.tensor([ROW.shape[1]]))[0], expected, rtol=1e-4, atol=1e-5)


def test_the_padding_token_is_one_made_for_it_if_there_is_one(tmp_path):
    words = toy.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|finetune_right_pad_id|>"]})
    config = t.LlamaConfig(**{**SMALL, "vocab_size": len(words), "eos_token_id": 1})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = Model.load(ModelConfig(str(tmp_path)), head="scalar", fresh_head=True)
    assert model.tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert model.text_config.pad_token_id == model.tokenizer.pad_token_id
    assert len(model.base.get_input_embeddings().weight) == len(words), "no row was needed"


def test_rows_of_the_vocabulary_without_a_token_come_before_new_ones(tmp_path):
    words = toy.tokenizer()
    config = t.LlamaConfig(**{**SMALL, "vocab_size": len(words) + 5, "eos_token_id": 1})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = Model.load(ModelConfig(str(tmp_path)), head="scalar", fresh_head=True)
    assert model.text_config.pad_token_id == len(words)
    assert len(model.base.get_input_embeddings().weight) == len(words) + 5


COMPOSITE = {
    "Qwen3.5": (t.Qwen3_5Config, t.Qwen3_5ForConditionalGeneration),
    "Gemma 3": (t.Gemma3Config, t.Gemma3ForConditionalGeneration),
}


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_reward_model_from_a_composite_config(name, tmp_path):
    """Its padding token lies in the config of its text."""
    kind, architecture = COMPOSITE[name]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shrunken(kind.sub_configs["text_config"], vocab_size=16).to_dict()
    extra = {"mm_tokens_per_image": 4} if name == "Gemma 3" else {}
    vision |= (
        {"image_size": 28, "patch_size": 14}
        if name == "Gemma 3"
        else {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    )
    config = kind(text_config={**text, "pad_token_id": None, "eos_token_id": 1}, vision_config=vision, **extra)
    architecture(config).save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    model = Model.load(ModelConfig(str(tmp_path / "base")), head="scalar", fresh_head=True)
    check_saving(model, tmp_path)
    model.save(tmp_path / "out")
    tokens, lengths = pad_rows([[3, 4, 5, 1], [6, 7, 1]])
    again = Model.load(ModelConfig(str(tmp_path / "out")), head="scalar")
    torch.testing.assert_close(again.last_scores(tokens, lengths), model.last_scores(tokens, lengths))
    assert again.text_config.pad_token_id == model.tokenizer.pad_token_id not in (None, 1)


def test_generation_config_and_dtype_are_saved_as_they_were(tmp_path):
    folder = Path(toy.model(tmp_path / "base"))
    given = {"temperature": 0.5, "top_p": 0.9, "eos_token_id": [1, 2], "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(given))
    model = Model.load(ModelConfig(str(folder), dtype="bfloat16"))
    model.save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: found[key] for key in given} == given
    assert t.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_reward_training_uses_the_padding_token_nowhere(tmp_path):
    """The score of a row, and its gradient, are the same with other tokens behind it."""
    model = Model.load(ModelConfig(toy.model(tmp_path)), head="scalar", fresh_head=True)
    tokens, lengths = pad_rows([[3, 4, 5, 1], [3, 6, 1]])
    other = tokens.clone()
    other[1, 3] = 9
    losses = [
        reward_loss(
            model, Comparisons(rows, torch.tensor([1, 1]), lengths, torch.tensor([0, 2]), torch.tensor([0, 1])), 1
        )[0]
        for rows in (tokens, other)
    ]
    torch.testing.assert_close(losses[0], losses[1])
