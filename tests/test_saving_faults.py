"""The comparison of a saved model survives attention without float32, odd tokenizers, a full disk and no memory; and
adapters that are rounded away, or that change the base, are told."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
import transformers as t
from architectures import SMALL
from tokenizers import AddedToken, Tokenizer, models
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from rlhf_fast.config.fields import LoraConfig, ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model import saved_model
from rlhf_fast.model.end_tokens import end_token_ids
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import PROBE, check_finished, check_saving, save_with_probe
from rlhf_fast.stages import sft

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def half_only(module, query, key, value, mask, **kwargs):
    """Refuse float32, as FlashAttention does."""
    if query.dtype == torch.float32:
        raise RuntimeError("only supports fp16 and bf16")
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_trial_needs_no_attention_in_float32(kind, tmp_path):
    t.AttentionInterface.register("half_only", half_only)
    ALL_MASK_ATTENTION_FUNCTIONS.register("half_only", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = Model.load(ModelConfig(toy.model(tmp_path / "base", kind), dtype="bfloat16"))
    model.base.set_attn_implementation("half_only")
    check_saving(model, tmp_path)
    assert model.base.config._attn_implementation == "half_only"
    model.hidden(torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    "made",
    [models.WordLevel({"a": 0, "b": 1, "</s>": 2}), models.Unigram([("a", -1.0), ("b", -2.0), ("</s>", -3.0)])],
    ids=["WordLevel", "Unigram"],
)
def test_a_tokenizer_without_an_unknown_token_is_compared(made, tmp_path):
    words = t.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made), eos_token="</s>")
    model = Model(t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval(), words)
    check_saving(model, tmp_path)


@pytest.mark.parametrize("given", [None, 1, [1, 2]])
def test_the_saved_generation_config_lists_every_end_token(given, tmp_path):
    """Also the one of the chat template, which other servers do not look for."""
    words = toy.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", AddedToken("<|im_end|>")]})
    words.chat_template = CHATML
    model = Model(t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, "eos_token_id": None})).eval(), words)
    model.base.generation_config.eos_token_id = given
    expected = end_token_ids(model)
    assert words.convert_tokens_to_ids("<|im_end|>") in expected and 1 in expected
    model.save(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == expected
    assert model.base.generation_config.eos_token_id == given


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (MemoryError("none"), MemoryError),
        (torch.OutOfMemoryError("none"), torch.OutOfMemoryError),
    ],
    ids=["full disk", "memory", "GPU memory"],
)
def test_the_trial_does_not_blame_the_model_for_the_computer(error, raised, tmp_path, monkeypatch):
    model, calls = Model(t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval()), []

    def failing(*_, **__):
        calls.append(1)
        raise error

    monkeypatch.setattr(model.base, "save_pretrained", failing)
    (tmp_path / "trial_of_a_killed_run").mkdir()
    with pytest.raises(raised) as found:
        check_saving(model, tmp_path)
    assert len(calls) == 1 and "cannot be saved" not in str(found.value) and not list(tmp_path.iterdir())


def test_the_trial_names_the_type_of_an_error(tmp_path, monkeypatch):
    model = Model(t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval())
    monkeypatch.setattr(model.base, "save_pretrained", lambda *_, **__: {}["config"])
    with pytest.raises(UserError, match="KeyError: 'config'"):
        check_saving(model, tmp_path)


@pytest.mark.parametrize("error", [MemoryError("too little"), OSError(errno.EIO, "Input/output error")])
def test_a_run_ends_though_its_folder_cannot_be_compared(error, tmp_path, monkeypatch):
    """The trial before it has passed, and all training is done."""
    monkeypatch.setattr(saved_model, "_compare", lambda file: _fail(error) if "finished" in str(file) else None)
    sft.run(replace(toy.sft(tmp_path), epochs=1))
    saved = json.loads((tmp_path / "sft" / "run.json").read_text())["finished"]
    assert f"was not read again to compare it, because {type(error).__name__}" in saved["notes"][0]
    assert not list((tmp_path / "sft").rglob(PROBE))


def test_any_other_error_of_the_comparison_is_a_sentence(tmp_path, monkeypatch):
    model = Model(t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval())
    save_with_probe(model, tmp_path / "out")
    monkeypatch.setattr(saved_model, "_check", lambda *_: _fail(KeyError("x")))
    with pytest.raises(
        UserError, match=r"cannot be read again: KeyError: 'x'. The trained weights stay in .*out; look"
    ):
        check_finished(tmp_path / "out")


def _fail(error):
    raise error


@pytest.mark.parametrize(("scale", "lost"), [(1e-2, False), (3e-5, True), (1e-6, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_that_merging_rounds_away_is_told(scale, lost, dtype, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = Model.load(ModelConfig(toy.model(tmp_path / "base"), dtype=dtype, lora=LoraConfig(rank=4)))
    for name, p in model.module.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, scale)
    save_with_probe(model, tmp_path / "out")
    share = json.loads((tmp_path / "out" / PROBE).read_text())["merged_share"]
    base, out = (t.AutoModelForCausalLM.from_pretrained(tmp_path / x).double().state_dict() for x in ("base", "out"))
    layers = {name: layer for name, layer in model.base.named_modules() if hasattr(layer, "get_delta_weight")}
    deltas = {f"{name}.weight": layer.get_delta_weight("default").double() for name, layer in layers.items()}
    start = {key: base[key].to(getattr(torch, dtype)).double() for key in deltas}
    kept = sum(float(((out[key] - start[key]) * delta).sum()) for key, delta in deltas.items())
    assert share == pytest.approx(kept / sum(float((delta**2).sum()) for delta in deltas.values()), abs=0.01)
    notes = check_finished(tmp_path / "out")
    lost = lost and dtype == "bfloat16"
    assert (share < 0.9) == lost
    assert notes == [] or (lost and f"the merged weights hold {share:.0%} of what the adapter learned" in notes[0])
    assert bool(notes) == lost


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(method):
    peft = pytest.importorskip("peft")
    base = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    wrapped = peft.get_peft_model(base, getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UserError, match="puts virtual tokens before each row"):
        Model(wrapped.eval())


@pytest.mark.parametrize(("start", "same"), [("pissa", False), ("olora", False), ("orthogonal", True), (True, True)])
def test_the_base_below_an_adapter_is_the_reference_or_none(start, same):
    peft = pytest.importorskip("peft")
    base = t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval()
    tokens = torch.arange(3, 11)[None]
    expected = Model(base).hidden(tokens)
    config = peft.LoraConfig(r=2, init_lora_weights=start, target_modules="all-linear", task_type="CAUSAL_LM")
    model = Model(peft.get_peft_model(base, config).eval())
    if not same:
        with pytest.raises(UserError, match=f"init_lora_weights='{start}': changes the model below"):
            model.reference()
        return
    torch.testing.assert_close(model.reference().hidden(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_adapter_of_a_reward_model_says_how_its_score_is_read(kind, tmp_path):
    """On a base whose padding token is its end token. What the sentence says is done here."""
    peft = pytest.importorskip("peft")
    folder = Path(toy.model(tmp_path / "base", kind))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    model = Model.load(ModelConfig(str(folder), lora=LoraConfig(rank=2)), head="scalar", fresh_head=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    model.save(tmp_path / "out")
    row = torch.tensor([[3, 4, 5, 1]])
    pad, rows = model.text_config.pad_token_id, len(model.base.get_input_embeddings().weight)
    text = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"resize_token_embeddings({rows})" in text and f"pad_token_id = {pad}" in text and pad != 1
    base = t.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    base.resize_token_embeddings(rows)
    base.config.get_text_config().pad_token_id = pad
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(input_ids=row).logits[0]
    torch.testing.assert_close(found, model.last_scores(row, torch.tensor([4])), rtol=1e-4, atol=1e-5)


class AtFirstEnd(t.LlamaForSequenceClassification):
    """Reads the score at the first end token."""

    def forward(self, input_ids=None, attention_mask=None, **_):
        scores = self.score(self.model(input_ids).last_hidden_state)
        ends = (input_ids == 40).int()
        at = torch.where(ends.any(1), ends.argmax(1), input_ids.shape[1] - 1)
        return t.modeling_outputs.SequenceClassifierOutputWithPast(logits=scores[torch.arange(len(scores)), at])


class AtLastPlace(AtFirstEnd):
    """Reads the score of padding too."""

    def forward(self, input_ids=None, attention_mask=None, **_):
        scores = self.score(self.model(input_ids).last_hidden_state)
        return t.modeling_outputs.SequenceClassifierOutputWithPast(logits=scores[:, -1])


@pytest.mark.parametrize("kind", [AtFirstEnd, AtLastPlace])
def test_a_score_that_is_read_elsewhere_is_refused(kind):
    config = t.LlamaConfig(**{**SMALL, "num_labels": 1, "pad_token_id": 5, "eos_token_id": 40})
    with pytest.raises(UserError, match="with end or padding tokens in it"):
        Model(kind(config).eval(), head="scalar")


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_the_score_is_no_target(head, tmp_path):
    pytest.importorskip("peft")
    cfg = ModelConfig(toy.model(tmp_path), lora=LoraConfig(rank=2, targets=("score",)))
    with pytest.raises(UserError, match=r"lora.targets: .*`?score"):
        Model.load(cfg, head=head, fresh_head=head == "scalar")
