"""Every architecture of transformers loads and can be saved, or is refused with one sentence; and so is a folder whose
files hold wrong values."""

import json
from pathlib import Path

import pytest
import torch
import toy
import transformers as t
from shrink import count_weights, shrunken
from transformers.models.auto import modeling_auto

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.model.saved_model import check_saving

LARGEST = 20_000_000
"""Weights of a default that `shrunken` does not make small."""
MAPPINGS = {
    "lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "scalar": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
}
CASES = [(head, config) for head, mapping in MAPPINGS.items() for config in mapping]
REFUSED = """
Bert BertGeneration BigBird Camembert CpmAnt Data2VecText Electra Emu3 Ernie InklingText MegatronBert Mllama
ModernBertDecoder ProphetNet RemBert Roberta RobertaPreLayerNorm RoCBert RoFormer XLM XLMRoberta XLMRobertaXL
XLNet Xmod
"""
"""Configs of language models that are refused: encoders, and some whose forward or head is another. Every other must
load, and of the reward models every one with a score layer."""


def module_of(head: str, kind: type, folder: Path) -> str:
    """Write a small random model of the config's class; skip the test if it cannot be made."""
    architecture = MAPPINGS[head][kind]
    architecture = architecture[0] if isinstance(architecture, tuple) else architecture
    torch.manual_seed(0)
    try:
        config = shrunken(kind, **({"num_labels": 1} if head == "scalar" else {}))
        if architecture.config_class is not kind:
            config = config.get_text_config()
        if (weights := count_weights(architecture, config)) > LARGEST:
            pytest.skip(f"{weights} weights")
        architecture(config).save_pretrained(folder)
    except Exception as error:  # whatever transformers says of the shrunken config
        pytest.skip(f"cannot be made small: {type(error).__name__}: {error}")
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.exhaustive(1, by=("head",))
@pytest.mark.parametrize(("head", "kind"), CASES, ids=[f"{head}-{kind.__name__}" for head, kind in CASES])
def test_it_loads_and_can_be_saved_or_is_refused(head, kind, tmp_path):
    folder = module_of(head, kind, tmp_path / "model")
    try:
        model = Model.load(ModelConfig(folder), head=head)
    except UserError as error:
        assert "\n" not in str(error)
        if head == "lm":
            assert kind.__name__.removesuffix("Config") in REFUSED.split(), error
        else:
            assert str(error).endswith(" has no linear head `score` with one output")
        return
    check_saving(model, tmp_path)


WRONG = [
    {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
    {"rope_scaling": {"type": "nope", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"rope_parameters": "yes"},
    {"hidden_act": "nope"},
    {"num_hidden_layers": "2"},
    {"num_attention_heads": 0},
    {"vocab_size": None},
    {"architectures": 3},
    {"dtype": "float99"},
    {"attention_dropout": "0.1"},
    {"final_logit_softcapping": "30"},
    {"rlhf_fast_score_bias": [1]},
    {"eos_token_id": "</s>"},
    {"pad_token_id": 999},
    {"model_type": 3},
    {"id2label": 3},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_wrong_values_in_config_json_get_a_sentence(wrong, head, tmp_path):
    folder = Path(toy.model(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(UserError) as error:
        Model.load(ModelConfig(str(folder)), head=head, fresh_head=head == "scalar")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[1]"),
        ("config.json", "{"),
        ("generation_config.json", "[1]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"eos_token": 3}'),
        ("tokenizer.json", '{"model": 3}'),
    ],
)
def test_broken_files_get_a_sentence(file, text, tmp_path):
    folder = Path(toy.model(tmp_path))
    (folder / file).write_text(text)
    with pytest.raises(UserError) as error:
        Model.load(ModelConfig(str(folder)))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_unknown_rope_type_is_named(tmp_path):
    folder = Path(toy.model(tmp_path))
    config = t.LlamaConfig.from_pretrained(folder).to_dict() | {"rope_parameters": {"rope_type": "spiral"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'spiral', which transformers .* does not know"):
        Model.load(ModelConfig(str(folder)))
