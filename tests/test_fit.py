"""Models and sizes that do not fit each other are found before any weights are read, and before a recipe begins.

Not among the reported cases: reference and value model, the reward model that selects in SFT, rows as well as
positions, another tokenizer, prompts that are all too long, kinds of head, dtype, device, folders in one another.
"""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import toy
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import DataConfig, ModelConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.stages.fit import check_fit

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def judge(folder, name, kind="llama", positions=64, rows=11, letters=toy.LETTERS):
    """Write a reward model; return its folder."""
    size = {"vocab_size": rows, "num_labels": 1, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "gpt2":
        net = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=positions, **size))
    else:
        net = LlamaForSequenceClassification(LlamaConfig(max_position_embeddings=positions, **SHAPE, **size))
    net.save_pretrained(folder / name)
    toy.tokenizer(letters).save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("weights are read first"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("setting", ["reward", "value.path", "reference"])
def test_every_role_must_have_the_positions(folder, no_weights, kind, setting):
    small = judge(folder, "small", kind, positions=20)
    cfg = toy.ppo(folder, sampling=SamplingConfig(max_new_tokens=20))
    if setting == "reward":
        cfg = replace(cfg, reward=small)
    elif setting == "value.path":
        cfg = replace(cfg, value=ModelConfig(small))
    else:
        cfg = replace(cfg, reference=shrunk(folder, kind))
    with pytest.raises(UserError, match=rf"max_new_tokens is 20, but {setting} \(\S+\) has only 20 positions"):
        ppo.run(cfg)
    assert not (folder / "ppo").exists()


def shrunk(folder, kind):
    """Return a language model of 20 positions."""
    config = json.loads((folder / "model/config.json").read_text()) | {"max_position_embeddings": 20}
    toy.model(folder / "short", kind)
    if kind == "gpt2":
        config = json.loads((folder / "short/config.json").read_text()) | {"n_positions": 20}
    (folder / "short/config.json").write_text(json.dumps(config))
    return str(folder / "short")


def test_the_policys_own_positions_are_named(folder, no_weights):
    with pytest.raises(UserError, match=r"max_new_tokens is 64, but policy\.path \(\S+model\) has only 64 positions"):
        ppo.run(toy.ppo(folder, sampling=SamplingConfig(max_new_tokens=64)))
    data = DataConfig(toy.jsonl(folder / "long.jsonl", [{"prompt": "a " * 30}] * 70))
    cfg = toy.ppo(
        folder, data=data, reward=judge(folder, "small", positions=40), sampling=SamplingConfig(max_new_tokens=20)
    )
    with pytest.raises(UserError, match=r"no prompt fits: reward \(\S+\) has 40 positions, .* takes 20 \(.*70 rows"):
        ppo.run(cfg)
    toy.jsonl(folder / "long.jsonl", [*[{"prompt": "a " * 30}] * 70, {"prompt": "a ."}])
    assert check_fit(cfg) == 40


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: toy.ppo(f, reward=judge(f, "j", rows=10)), r"reward \(\S+j\) has 10 vocabulary rows, .* number 10;"),
        (lambda f: toy.ppo(f, value=ModelConfig(judge(f, "j", rows=9))), r"value\.path \(\S+j\) has 9 vocabulary rows"),
        (lambda f: toy.ppo(f, reward=judge(f, "j", letters="hgfedcba")), "its tokenizer is not the policy's"),
        (lambda f: toy.ppo(f, reference=judge(f, "j")), r"reference \(\S+j\): is a reward model, not a language model"),
        (lambda f: toy.ppo(f, reward=toy.model_at(f)), r"reward \(\S+\): is a language model, whose scalar head"),
        (lambda f: toy.ppo(f, reward="no_such_module:f"), "cannot be imported"),
        (lambda f: toy.ppo(f, policy=ModelConfig(toy.model_at(f), dtype="float16")), "policy.dtype is float16"),
        (lambda f: toy.ppo(f, value=ModelConfig(dtype="float16")), "value.dtype is float16"),
        (lambda f: toy.sft(f, model=ModelConfig(judge(f, "j"))), "is a reward model, not a language model"),
        (lambda f: toy.sft(f, select="reward", select_reward=judge(f, "j", positions=6)), r"select_reward \(\S+j\)"),
        (lambda f: toy.sft(f, select="reward", select_reward=judge(f, "j", rows=3)), r"select_reward \(\S+j\) has 3"),
        (lambda f: toy.reward(f, device="cuda:99"), "reward: device cuda:99 cannot be used"),
        (lambda f: toy.sft(f, device="gpu"), "sft: device gpu cannot be used"),
        (lambda f: toy.sft(f, model=ModelConfig("nowhere/x/y")), "there is no such folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(folder, monkeypatch, make, sentence):
    cfg = make(folder)
    monkeypatch.setattr(Model, "load", lambda *_, **__: pytest.fail("weights are read first"))
    with pytest.raises(UserError) as error:
        {"sft": sft, "reward": reward, "ppo": ppo}[cfg.stage].run(cfg)
    assert error.match(sentence) and "\n" not in str(error.value)
    assert not (folder / cfg.stage / "checkpoints").exists()


def test_what_fits_is_not_refused(folder):
    """Larger roles, more vocabulary rows than tokens, no limit of positions, and a reward function."""
    for cfg in (
        toy.ppo(folder),
        toy.ppo(folder, reward=judge(folder, "large", rows=100, positions=4096)),
        toy.ppo(folder, reward=judge(folder, "wide", rows=11), value=ModelConfig(judge(folder, "v", "gpt2", 70))),
        toy.sft(folder, select="reward", select_reward=str(folder / "wide")),
    ):
        assert check_fit(cfg) == 64
    assert check_fit(toy.reward(folder)) == 64


RECIPE = """
out: runs
sft: {{model.path: {model}, data.path: d.jsonl, epochs: 1, {sft}}}
reward: {{data.path: r.jsonl, {reward}}}
ppo: {{data.path: p.jsonl, {ppo}}}
"""


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ppo": "sampling.max_new_tokens: 64"}, r"max_new_tokens is 64, but policy.path \(runs/sft\) has only 64"),
        ({"ppo": "sampling.max_new_tokens: 63"}, r"no prompt fits: policy.path \(runs/sft\) has 64 positions"),
        ({"reward": "model.path: other"}, r"reward \(runs/reward\): its tokenizer is not the policy's"),
        ({"ppo": "reward: runs/sft"}, r"reward \(runs/sft\): is a language model"),
        ({"ppo": "policy.path: ./runs/reward"}, r"policy.path \(./runs/reward\): is a reward model"),
        ({"ppo": "reward: 'nothing_here:f'"}, "cannot be imported"),
        ({"ppo": "value.path: small"}, r"max_new_tokens is 24, but value.path \(small\) has only 9 positions"),
        ({"ppo": "policy.dtype: float16"}, "policy.dtype is float16"),
        ({"reward": "device: 'cuda:99'"}, "device cuda:99 cannot be used"),
        ({"ppo": "log.sinks: [wanbd]"}, "no sink is called 'wanbd'"),
        ({"ppo": "out: runs/sft"}, r"runs/sft: is what ppo.out names"),
        ({"reward": "out: runs/sft/reward"}, r"runs/sft: holds what reward.out names"),
        ({"sft": "out: runs/reward/../ppo/sft"}, r"lies in|holds what"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_recipe_is_compared_before_its_first_stage(folder, capsys, no_weights, changes, sentence):
    toy.demonstrations(folder / "d.jsonl", 8)
    toy.rankings(folder / "r.jsonl", 8)
    toy.prompt_file(folder / "p.jsonl", 8)
    toy.model(folder / "other", letters="abc")
    judge(folder, "small", positions=9)
    values = {"sft": "seed: 0", "reward": "seed: 0", "ppo": "sampling.max_new_tokens: 24"} | changes
    if "max_new" not in values["ppo"]:
        values["ppo"] += ", sampling.max_new_tokens: 24"
    (folder / "recipe.yaml").write_text(RECIPE.format(model=toy.model_at(folder), **values))
    assert main(["run", "recipe.yaml"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(sentence, line), line
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("make", [toy.sft, toy.reward, toy.ppo])
def test_a_token_beyond_the_models_own_rows_has_its_own_sentence(folder, make):
    """Only ppo was reported."""
    cfg = make(folder)
    check_fit(cfg)
    letters = toy.tokenizer(toy.LETTERS)
    letters.add_tokens(["<more>"])
    letters.save_pretrained(folder / "model")
    with pytest.raises(
        UserError, match=r"rows, but its own tokenizer has .* \('<more>'\); resize its embeddings"
    ) as error:
        check_fit(cfg)
    assert "one base model" not in str(error.value)


BAD_FILES = {
    "reward: {data.path: bad.jsonl}": '"chosen"',
    "reward: {data: {path: r.jsonl, valid: bad.jsonl}}": '"chosen"',
    "reward: {data.path: r.jsonl, demonstrations.path: bad.jsonl}": '"completion"',
    "reward: {data.path: r.jsonl, demonstrations: {path: d.jsonl, valid: bad.jsonl}}": '"completion"',
    "ppo: {reward: 'toy:share_of_a', data: {path: d.jsonl, columns: {prompt: question}}}": "question",
    "ppo: {reward: 'toy:share_of_a', data: {path: p.jsonl, valid: empty.jsonl}}": "holds no rows",
    "ppo: {reward: 'toy:share_of_a', data.path: p.jsonl, pretrain.path: bad.jsonl}": "bad.jsonl:1",
}


@pytest.mark.parametrize(("stage", "sentence"), BAD_FILES.items(), ids=BAD_FILES)
def test_a_bad_row_of_a_later_stage_is_found_before_the_first(folder, capsys, no_weights, stage, sentence):
    toy.demonstrations(folder / "d.jsonl", 8)
    toy.rankings(folder / "r.jsonl", 8)
    toy.prompt_file(folder / "p.jsonl", 8)
    toy.jsonl(folder / "bad.jsonl", [{"prompt": "a ."}])
    (folder / "empty.jsonl").write_text("\n")
    first = f"out: runs\nsft: {{model.path: {toy.model_at(folder)}, data.path: d.jsonl}}\n"
    (folder / "recipe.yaml").write_text(first + stage)
    assert main(["run", "recipe.yaml"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert sentence in line and ".jsonl" in line, line
    assert not (folder / "runs").exists()


def test_only_the_rows_that_are_read_count(folder):
    """Rows beyond data.limit and files that the stage does not read are left alone."""
    rows = [*toy.rows(Path(toy.demonstrations(folder / "d.jsonl", 8))), {"prompt": 3}]
    data = DataConfig(toy.jsonl(folder / "d.jsonl", rows), limit=8)
    unread = DataConfig(toy.jsonl(folder / "unread.jsonl", [{"prompt": 3}]))
    check_fit(toy.sft(folder, data=data, pretrain=unread, pretrain_fraction=0.0))
    with pytest.raises(UserError, match=r"d\.jsonl:9: "):
        check_fit(toy.sft(folder, data=replace(data, limit=0)))


def test_the_check_takes_little_time(folder):
    cfg = toy.ppo(folder, reward=judge(folder, "judge"))
    check_fit(cfg)
    start = time.perf_counter()
    check_fit(cfg)
    assert time.perf_counter() - start < 1
