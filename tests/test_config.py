"""Settings: documented, checked with a sentence that names the place, and the same as flags, YAML and saved run."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import rlhf_fast
from rlhf_fast.cli.options import GenerateOptions
from rlhf_fast.cli.show_config import show_config
from rlhf_fast.config import fields, stages
from rlhf_fast.config.checks import BadSetting
from rlhf_fast.config.fields import DataConfig, LogConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.flags import parse, stage_config
from rlhf_fast.config.presets import PRESETS, preset
from rlhf_fast.config.resolve import (
    difference,
    flatten,
    from_json,
    resolve,
    setting_docs,
    setting_types,
    to_plain,
    to_yaml,
)
from rlhf_fast.config.sections import read_stage
from rlhf_fast.config.stages import STAGES, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.config.yaml_file import Setting, read_yaml
from rlhf_fast.errors import UserError


def settings(values: dict, origin: str = "r.yaml:12") -> dict:
    return {path: Setting(value, origin) for path, value in values.items()}


@pytest.mark.parametrize("module", [fields, stages])
def test_every_setting_says_what_it_does(module):
    tree = ast.parse(Path(module.__file__).read_text())
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for field, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
                continue
            group = ast.unparse(field.annotation).endswith("Config")
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented or group or field.target.id == "out", f"{cls.name}.{field.target.id}"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["default", "paper", "tutorial"])
def test_yaml_and_json_give_the_same_settings_back(stage, name, tmp_path):
    cfg = resolve(STAGES[stage], preset(stage, name), settings({"data.columns": {"prompt": "q: #1"}, "seed": 7}))
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    assert resolve(STAGES[stage], read_yaml(tmp_path / "c.yaml")) == cfg
    assert from_json(stage, json.loads(json.dumps(to_plain(cfg)))) == cfg
    assert json.loads(json.dumps(dataclasses.asdict(cfg))) == json.loads(json.dumps(to_plain(cfg)))


def test_the_later_layer_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: 1e-5\nseed: 3\nkl.coef: 0.5\n")
    cfg = stage_config(PPOConfig, ["--preset", "tutorial", f"--config={file}", "--seed", "4", "--no-resume"])
    assert (cfg.inner_epochs, cfg.optim.lr, cfg.kl.coef, cfg.seed, cfg.resume) == (4, 1e-5, 0.5, 4, False)
    # The group's other settings keep the stage's defaults.
    assert cfg.optim.warmup_steps == PPOConfig().optim.warmup_steps


def test_a_recipe_serves_as_the_config_of_one_stage(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("out: runs/x\nppo:\n  reward: somewhere\n  seed: 5\nreward:\n  seed: 6\n")
    assert stage_config(PPOConfig, ["--config", str(file)]).reward == "somewhere"
    assert stage_config(RewardConfig, ["--config", str(file)]).seed == 6


@pytest.mark.parametrize("flags", ["", "--seed 7", "--preset tutorial", "--device auto", "--out here"])
def test_what_a_recipe_sets_for_all_stages_holds_for_one(tmp_path, flags):
    """seed, device, out and preset, each weaker than the section and a flag."""
    file = tmp_path / "recipe.yaml"
    file.write_text("out: runs/x\nseed: 5\ndevice: meta\npreset: paper\nppo: {reward: r, gamma: 0.5}\nsft: {seed: 6}\n")
    cfg = stage_config(PPOConfig, ["--config", str(file), *flags.split()])
    assert cfg.seed == (7 if "seed" in flags else 5) and cfg.gamma == 0.5
    assert cfg.device == ("auto" if "device" in flags else "meta")
    assert cfg.out == ("here" if "out" in flags else "runs/x/ppo")
    assert cfg.select == ("last" if "tutorial" in flags else "ema")
    assert stage_config(SFTConfig, ["--config", str(file)]).seed == 6
    assert "select: ema" in "\n".join(show_config("ppo", "", str(file)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: 9\nsft: {batch: 4}", 'no setting "epochs" for all stages; there are out, preset, seed, device, sft'),
        ("nonsense: 9\nsft.batch: 4", 'no setting "nonsense" for all stages'),
        ("sft: {batch: 4}\noptim.lr: 1", 'no setting "optim.lr" for all stages'),
        ("seed: x\nsft: {batch: 4}", "sft: seed must be a whole number, got x"),
        ("reward: {batch: 4}\nseed: 1", "has no section sft; it has reward"),
        ("preset: papr\nsft:", "sft: no preset 'papr'"),
        ("out: [a]\nsft:", "out must be text"),
    ],
)
def test_what_a_recipe_sets_elsewhere_is_not_lost(tmp_path, text, sentence):
    """Only `epochs`, `nonsense` and `seed` were reported."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        stage_config(SFTConfig, ["--config", str(tmp_path / "r.yaml")])
    assert sentence in str(error.value)


def test_an_empty_reward_is_a_setting_of_ppo(tmp_path):
    (tmp_path / "c.yaml").write_text("reward:\ngamma: 0.5\n")
    assert stage_config(PPOConfig, ["--config", str(tmp_path / "c.yaml")]).gamma == 0.5


def test_flags_of_every_shape():
    args = "--optim.betas 0.8 0.9 --data.columns prompt q completion a --sampling.stop x y --missing-eos replace"
    cfg = stage_config(PPOConfig, [*args.split(), "--missing-eos-value", "-2.5", "--data.no-append-eos"])
    assert cfg.optim.betas == (0.8, 0.9) and cfg.data.columns == {"prompt": "q", "completion": "a"}
    assert cfg.sampling.stop == ("x", "y") and cfg.missing_eos_value == -2.5 and not cfg.data.append_eos


@pytest.mark.parametrize(
    ("text", "number"), [("1e2", 100), ("1.0", 1), ("+3", 3), ("1E1", 10), ("9007199254740993", 9007199254740993)]
)
def test_whole_numbers_read_the_same_as_flags_and_in_a_file(tmp_path, text, number):
    """+3, 1E1 and a number that no float holds were not reported."""
    (tmp_path / "c.yaml").write_text(f"seed: {text}\nlog.keep: {text}\n")
    for argv in (
        ["--seed", text, f"--log.keep={text}"],
        [f"--seed={text}", "--log.keep", text],
        ["--config", f"{tmp_path}/c.yaml"],
    ):
        cfg = stage_config(SFTConfig, argv)
        assert (cfg.seed, cfg.log.keep) == (number, number)
    options = parse(GenerateOptions, ["--model=m", "--prompts=p", "--max-new-tokens", text, "-n", text], "generate")
    assert (options.sampling.max_new_tokens, options.n) == (number, number)


BROKEN = [
    (PPOConfig, {"optim.lrr": 1}, 'ppo: no setting "optim.lrr"; did you mean optim.lr? (r.yaml:12)'),
    (PPOConfig, {"lr": 1}, 'ppo: no setting "lr"; did you mean optim.lr? (r.yaml:12)'),
    (SFTConfig, {"packng": 1}, 'sft: no setting "packng"; did you mean packing? (r.yaml:12)'),
    (SFTConfig, {"zzz": 1}, 'sft: no setting "zzz"; `rlhf-fast show-config sft` lists them (r.yaml:12)'),
    (PPOConfig, {"optim": 1}, 'ppo: "optim" takes no value; it is a group, of optim.lr, optim.betas,'),
    (PPOConfig, {"value_optim.lr": -1}, "ppo: value_optim.lr must be above 0, got -1.0 (r.yaml:12)"),
    (PPOConfig, {"optim.lr": float("nan")}, "ppo: optim.lr must be a number"),
    (PPOConfig, {"optim.lr": "fast"}, "ppo: optim.lr must be a number, got fast (r.yaml:12)"),
    (PPOConfig, {"kl.controller": "adaptve"}, "must be one of fixed, adaptive (did you mean adaptive?), got adaptve"),
    (PPOConfig, {"batch": 100}, "ppo: batch must be a multiple of minibatch (64), got 100 (r.yaml:12)"),
    (PPOConfig, {"batch": 3.5}, "ppo: batch must be a whole number, got 3.5 (r.yaml:12)"),
    (PPOConfig, {"seed": True}, "ppo: seed must be a whole number, got true (r.yaml:12)"),
    (PPOConfig, {"seed": -1}, "ppo: seed must be from 0 to below 2**63, got -1 (r.yaml:12)"),
    (SFTConfig, {"seed": 2**63}, "sft: seed must be from 0 to below 2**63"),
    (RewardConfig, {"seed": 10**400}, "reward: seed must be a whole number"),
    (PPOConfig, {"value_clip": float("inf")}, "ppo: value_clip must be a number"),
    (PPOConfig, {"dual_clip": 0.5}, "ppo: dual_clip must be 0 (none) or above 1, got 0.5 (r.yaml:12)"),
    (PPOConfig, {"missing_eos": "subtract"}, "ppo: missing_eos_value must be above 0 with missing_eos=subtract"),
    (PPOConfig, {"sampling.temperature": 0}, "ppo: sampling.temperature must be above 0"),
    (PPOConfig, {"sampling.min_new_tokens": 500}, "must be at most max_new_tokens (128), got 500"),
    (
        PPOConfig,
        {"sampling.top_p": 0.9},
        "ppo: sampling.top_p must be 1 in PPO, which trains on the log-probabilities of",
    ),
    (PPOConfig, {"sampling.top_k": 50}, "set sampling.allow_biased_filters, got 50 (r.yaml:12)"),
    (PPOConfig, {"sampling.min_p": 0.1}, "ppo: sampling.min_p must be 0 in PPO"),
    (PPOConfig, {"sampling.min_new_tokens": 3}, "ppo: sampling.min_new_tokens must be 0 in PPO"),
    (
        SFTConfig,
        {"sampling.stop": ["x", ""]},
        "sft: sampling.stop must not have an empty text, which every response has",
    ),
    (PPOConfig, {"sampling.stop": "x"}, "ppo: sampling.stop must be a list, got x (r.yaml:12)"),
    (PPOConfig, {"optim.betas": [0.9]}, "ppo: optim.betas must have 2 entries, got [0.9] (r.yaml:12)"),
    (PPOConfig, {"data.columns": 3}, "ppo: data.columns must be a map such as {completion: answer}, got 3 (r.yaml:12)"),
    (PPOConfig, {"data.columns": {"prompt": 5}}, "number) for prompt, got"),
    (PPOConfig, {"data.columns": {"prompt": "a", "group": None}}, "ppo: data.columns must have a value for group, got"),
    (
        PPOConfig,
        {"sampling.stop": ["x", True]},
        "ppo: sampling.stop must be text (in quotes, if it looks like a number) f",
    ),
    (PPOConfig, {"optim.betas": [0.9, "x"]}, "ppo: optim.betas must be a number for entry 2, got"),
    (SFTConfig, {"pretrain_fraction": 0.1}, "sft: pretrain_fraction needs pretrain.path, the text to mix in, got 0.1"),
    (SFTConfig, {"select": "reward"}, "sft: select needs select_reward, the reward model's directory"),
    (SFTConfig, {"packing": "yes"}, "sft: packing must be true or false, got yes (r.yaml:12)"),
    (RewardConfig, {"model.dtype": "fp8"}, r"reward: model.dtype must be one of float32, bfloat16, got fp8"),
]


@pytest.mark.parametrize(("cls", "values", "sentence"), BROKEN, ids=[next(iter(values)) for _, values, _ in BROKEN])
def test_a_wrong_setting_is_named_with_its_place(cls, values, sentence):
    with pytest.raises(UserError) as error:
        resolve(cls, settings(values))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_the_group_of_a_wrong_value_is_named(tmp_path):
    """Two groups of one kind are given, and the rules of both are checked only with the flags."""
    (tmp_path / "r.yaml").write_text("optim.lr: 1\nvalue_optim.lr: -1\n")
    with pytest.raises(UserError, match=r"^ppo: value_optim\.lr must be above 0, got -1\.0 \(.*r\.yaml:2\)$"):
        stage_config(PPOConfig, ["--config", str(tmp_path / "r.yaml")])


def test_ppo_samples_with_filters_only_where_that_is_allowed():
    """Filters are no fault elsewhere: sft's sampling is for showing responses and choosing among weights."""
    for setting in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"min_new_tokens": 2}):
        values = {f"sampling.{name}": value for name, value in setting.items()}
        assert resolve(SFTConfig, settings(values))
        assert resolve(PPOConfig, settings(values | {"sampling.allow_biased_filters": True}))
        with pytest.raises(BadSetting, match=r"must be [01] in PPO"):
            PPOConfig(sampling=SamplingConfig(**setting))
    assert PPOConfig(sampling=SamplingConfig(temperature=0.7, stop=("x",)))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--optim.lrr 1", 'ppo: no setting "optim.lrr"; did you mean optim.lr? (--optim.lrr)'),
        ("--optim.lr abc", "ppo: optim.lr must be a number, got abc (--optim.lr)"),
        ("--value-optim.lr -1", "ppo: value_optim.lr must be above 0, got -1.0 (--value-optim.lr)"),
        ("--sampling.top-p 0.9", "set sampling.allow_biased_filters, got 0.9 (--sampling.top-p)"),
        ("--sampling.min-new-tokens 3", "ppo: sampling.min_new_tokens must be 0 in PPO, which trains"),
        ("--preset papr", "ppo: no preset 'papr'; there are default, paper, tutorial"),
        ("--config", "ppo: --config needs a value"),
        ("--config a.yaml --config=b.yaml", "ppo: --config is given twice, a.yaml and b.yaml; give one"),
        ("--preset paper --preset tutorial", "ppo: --preset is given twice"),
        ("--no-lam", 'ppo: no setting "no_lam"'),
        ("--data.append-eos False", "--data.append-eos takes no value: give --data.append-eos alone, or --data.no-app"),
        ("--resume=no", "--resume takes no value: give --resume alone, or --no-resume"),
        ("--sampling.allow-biased-filters 1 --seed 2", "or --sampling.no-allow-biased-filters"),
        ("--data.columns prompt a prompt b", "ppo: --data.columns has prompt twice, and only one can be meant"),
        ("--data.columns prompt a --data.columns group b", "ppo: --data.columns is given twice"),
        ("--sampling.stop a --sampling.stop=b", "ppo: --sampling.stop is given twice"),
        ("--episodes 1.5", "ppo: episodes must be a whole number, got 1.5 (--episodes)"),
        ("--seed 1e400", "ppo: seed must be a whole number, got 1e400 (--seed)"),
        ("stray", "stray"),
        ("--optim.betas 1", "--optim.betas"),
    ],
)
def test_a_wrong_flag_is_named(flags, sentence):
    with pytest.raises(UserError) as error:
        stage_config(PPOConfig, flags.split())
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\noptim:\n  lrr: 2\n", 'ppo: no setting "optim.lrr"; did you mean optim.lr? ({file}:3)'),
        ("seed: 1\noptim.lr: 1\noptim:\n  lr: 2\n", "{file}:4: optim.lr is set twice, first in line 2"),
        ("seed: [1\n", "{file}:2: not YAML"),
        ("- 1\n- 2\n", "{file}:1: expected settings such as `seed: 1`, found sequence"),
        ("seed: 1\n\nclip_low: 2\n", "ppo: clip_low must be between 0 and 1, got 2.0 ({file}:3)"),
    ],
)
def test_a_wrong_file_is_answered_with_its_line(tmp_path, text, sentence):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        resolve(PPOConfig, read_yaml(file))
    assert sentence.format(file=file) in str(error.value)


YAML_1_2 = [
    ("seed: 010", {"seed": 10}),
    ("seed: 0o10", {"seed": 8}),
    ("seed: 0x1F", {"seed": 31}),
    ("seed: '9007199254740993'", {"seed": 9007199254740993}),
    ("epochs: 1_0", {"epochs": 10}),
    ("optim.lr: .5", {"optim.lr": 0.5}),
    ("optim.lr: 1e-5", {"optim.lr": 1e-5}),
    ("epochs: 1e1", {"epochs": 10}),
    ("out: 2024-05-01", {"out": "2024-05-01"}),
    ("out: 12:30:45", {"out": "12:30:45"}),
    ("out: on", {"out": "on"}),
    ("out: =", {"out": "="}),
    ("data.columns: {prompt: yes, text: n}", {"data.columns": {"prompt": "yes", "text": "n"}}),
    ("data.columns: {on: off}", {"data.columns": {"on": "off"}}),
    ("out: !!str 010", {"out": "010"}),
    ("seed: !!int 010", {"seed": 10}),
    ("resume: FALSE", {"resume": False}),
    ("%YAML 1.2\n---\nseed: 010", {"seed": 10}),
    ("\ufeffseed: 1", {"seed": 1}),
    ("--- # a comment\nseed: 1\n...\n", {"seed": 1}),
    ("optim: &o {eps: 1e-6}\nsampling: {stop: &s [a]}\nlog: {sinks: *s}", {"optim.eps": 1e-6, "log.sinks": ("a",)}),
    ("", {}),
    ("# nothing\n---\n", {}),
]


@pytest.mark.parametrize(("text", "expected"), YAML_1_2, ids=[text for text, _ in YAML_1_2])
def test_yaml_1_2_is_read(tmp_path, text, expected):
    """Only 010 and a date are among the reported cases."""
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    found = flatten(resolve(SFTConfig, read_yaml(file), check=False))
    assert {path: found[path] for path in expected} == expected


REFUSED_YAML = [
    ("seed: 1\nepochs: 1:30", 'sft: epochs must be a whole number, got "1:30" ({file}:2)'),
    ("packing: yes", "sft: packing must be true or false, got yes ({file}:1)"),
    ("resume: 'on'", "sft: resume must be true or false, got on ({file}:1)"),
    ("epochs: 0b11", "sft: epochs must be a whole number, got 0b11"),
    ("out: 5", "sft: out must be text (in quotes, if it looks like a number), got 5 ({file}:1)"),
    ("out: 1.10", "sft: out must be text"),
    ("optim.lr: .nan", "sft: optim.lr must be a number"),
    ("optim.lr: -.Inf", "sft: optim.lr must be a number"),
    ("seed: 1\nmodel.path: !ENV ${MODEL}", "{file}:2: the tag !ENV is not served"),
    ("out: !!python/object/apply:os.system [ls]", "{file}:1: the tag !!python/object/apply:os.system is not served"),
    ("out: !!python/name:os.system", "{file}:1: the tag !!python/name:os.system is not served"),
    ("out: !!binary aGk=", "{file}:1: the tag !!binary is not served"),
    ("out: !!timestamp 2024-05-01", "{file}:1: the tag !!timestamp is not served"),
    ("sampling.stop: !!set {a, b}", "{file}:1: the tag !!set is not served"),
    ("seed: !!int one", "{file}:1: one is no int"),
    ("seed: !!int 1:30", "{file}:1: 1:30 is no int"),
    ("a: &a {lr: 1}\noptim:\n  <<: *a", "{file}:3: merge keys (<<) are not part of YAML 1.2"),
    ("%YAML 1.1\n---\nseed: 010", "{file}:1: is to be read as YAML 1.1, and only 1.2 is served; remove %YAML"),
    ("# old\n%YAML 1.0\n--- {seed: 010}", "{file}:2: is to be read as YAML 1.0"),
    ("%YAML 2.0\n---\nseed: 1", "{file}"),
    ("seed: 1\nseed: 1", "{file}:2: seed is set twice, first in line 1"),
    ("optim: {lr: 1}\noptim: {eps: 1}", "{file}:2: optim is set twice, first in line 1"),
    ("data.columns: {prompt: a, prompt: b}", "{file}:1: prompt is set twice"),
    ("? [a, b]\n: 1", "{file}:1: a name must be text, found a sequence"),
    ("optim: &a\n  lr: *a", "this group contains itself"),
    ("sampling.stop: [[a]]", "{file}:1: no setting is a list or map of lists or maps"),
    ("seed: 1\n---\nseed: 2", "{file}:2: not YAML: a second document begins"),
    ("optim:\n\tlr: 1", "{file}:2: not YAML: found character"),
    ("out: a: b", "{file}:1: not YAML: mapping values are not allowed here; look at the indentation of this line and"),
    ("seed: " + "1" * 5000, "{file}:1: 11111"),
    ("out: *nowhere", "{file}:1: not YAML: found undefined alias"),
    ("just text", "{file}:1: expected settings such as `seed: 1`, found scalar"),
    ("out: \x00", "{file}: not YAML: unacceptable character"),
    (b"out: caf\xe9", "{file}: is not UTF-8 text (byte 8); save it as UTF-8"),
    ("seed: 1".encode("utf-16"), "{file}: is not UTF-8 text (byte 0); save it as UTF-8"),
    ("[" * 100_000, "{file}"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED_YAML, ids=[str(text)[:30] for text, _ in REFUSED_YAML])
def test_what_yaml_1_1_would_turn_into_something_else_is_refused_with_its_line(tmp_path, text, sentence):
    """Only 1:30 and !ENV are among the reported cases."""
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        resolve(SFTConfig, read_yaml(file))
    assert sentence.format(file=file) in str(error.value) and "\n" not in str(error.value)


def test_aliases_of_aliases_end_soon(tmp_path):
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{l: *a{i - 1}, r: *a{i - 1}}}" for i in range(1, 40)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="more than 10000 settings"):
        read_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "text", ["yes", "010", "1e5", "0o10", "1:30", "2024-05-01", "null", "~", "<<", ".inf", "", "a: b"]
)
def test_text_that_looks_like_something_else_is_written_in_quotes(tmp_path, text):
    """For our reader and for one of YAML 1.1."""
    cfg = SFTConfig(out=text, log=LogConfig(sinks=(text,)), data=DataConfig(columns={"prompt": text}))
    (tmp_path / "c.yaml").write_text(to_yaml(cfg))
    assert resolve(SFTConfig, read_yaml(tmp_path / "c.yaml")) == cfg
    assert yaml.safe_load(to_yaml(cfg))["out"] == cfg.out


def test_a_missing_file_and_a_missing_path():
    with pytest.raises(UserError, match=r"nowhere.yaml: cannot be read: No such file"):
        read_yaml("nowhere.yaml")
    with pytest.raises(UserError, match=r"ppo: policy.path is not set; give --policy.path PATH"):
        PPOConfig().ready()


@pytest.mark.parametrize(
    "given, missing, written",
    [
        ({}, "policy.path", "policy=ModelConfig(path=...)"),
        ({"policy": fields.ModelConfig("m")}, "reward", "reward=..."),
        ({"policy": fields.ModelConfig("m"), "reward": "r"}, "data.path", "data=DataConfig(path=...)"),
    ],
)
def test_a_setting_that_is_missing_is_named_in_python_too(given, missing, written):
    """The setting is there once the code of the sentence has been written."""
    words = f"ppo: {missing} is not set; give --{missing} PATH, put it in the YAML file, or in Python write PPOConfig"
    with pytest.raises(UserError, match=f"^{re.escape(f'{words}({written})')}$"):
        PPOConfig(**given).ready()
    made = eval(
        f"PPOConfig({written.replace('...', repr('x'))}, **given)", {**vars(fields), **globals()}, {"given": {}}
    )
    assert getattr(made, missing.partition(".")[0]) in ("x", fields.ModelConfig("x"), DataConfig("x"))


@pytest.mark.parametrize("given, name", [({"out": "x"}, "dict"), ("x", "str"), (SamplingConfig(), "SamplingConfig")])
def test_what_are_no_settings_of_a_stage_is_named(given, name):
    inner = "out=..." if isinstance(given, dict) else "..."
    words = (
        rf"^run_stage: takes the settings of a stage \(SFTConfig, .*\), got {name}; write for .* PPOConfig\({inner}\)$"
    )
    with pytest.raises(UserError, match=words):
        rlhf_fast.run_stage(given)


def test_library_users_get_the_same_rules():
    with pytest.raises(UserError, match=r"OptimConfig: lr must be above 0, got -1"):
        OptimConfig(lr=-1)
    for wrong in ({"lr": float("inf")}, {"grad_clip": float("inf")}):
        with pytest.raises(UserError, match=f"OptimConfig: {next(iter(wrong))} must be"):
            OptimConfig(**wrong)
    assert SFTConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().seed = 1


def test_the_defaults_are_the_papers_but_for_a_few():
    differing = {"select", "missing_eos", "whiten", "sampling.max_new_tokens", "data.dedupe_prefix"}
    assert {path for path, _, _ in difference(PPOConfig(), resolve(PPOConfig, preset("ppo", "paper")))} == differing
    for name in differing:
        assert f"`{name}`" in stages.__doc__
    assert difference(RewardConfig(), resolve(RewardConfig, preset("reward", "paper"))) == []
    gentler = [path for path, _, _ in difference(SFTConfig(), resolve(SFTConfig, preset("sft", "paper")))]
    assert gentler == ["residual_dropout", "sampling.max_new_tokens"] and SFTConfig().residual_dropout == 0
    assert all(f"`{name}`" in stages.__doc__ for name in gentler)
    assert PRESETS["sft"]["paper-init"]["residual_dropout"] == PRESETS["sft"]["tutorial"]["residual_dropout"] == 0.2


def test_the_papers_numbers():
    """arXiv 2203.02155, appendix C."""
    cfg = resolve(PPOConfig, preset("ppo", "paper"))
    assert (cfg.episodes, cfg.batch, cfg.minibatch, cfg.inner_epochs, cfg.steps) == (256_000, 512, 64, 1, 4000)
    assert (cfg.kl.coef, cfg.clip_low, cfg.clip_high, cfg.gamma, cfg.ema) == (0.02, 0.2, 0.2, 1.0, 0.992)
    assert (cfg.ptx_coef, cfg.ptx_ratio, cfg.value_optim.lr) == (27.8, 8, 9e-6)
    assert (cfg.optim.schedule, cfg.optim.warmup_start, cfg.optim.betas) == ("constant", 0.1, (0.9, 0.95))
    assert cfg.optim.warmup_steps == 10 * cfg.batch // cfg.minibatch  # ten batches
    sft = resolve(SFTConfig, preset("sft", "paper"))
    assert (sft.epochs, sft.batch, sft.optim.lr, sft.residual_dropout) == (16, 32, 9.65e-6, 0.2)
    assert (sft.optim.schedule, sft.optim.final_ratio, sft.optim.warmup_steps) == ("cosine", 0.1, 0)
    init = resolve(SFTConfig, preset("sft", "paper-init"), check=False)
    assert (init.epochs, init.pretrain_fraction, init.optim.lr) == (2, 0.1, 5e-6)
    reward = resolve(RewardConfig, preset("reward", "paper"))
    assert (reward.epochs, reward.batch, reward.optim.lr) == (1, 64, 9e-6)


def test_the_tutorials_numbers_and_what_they_change():
    cfg = resolve(PPOConfig, preset("ppo", "tutorial"))
    assert (cfg.optim.lr, cfg.inner_epochs, cfg.value_coef, cfg.batch, cfg.kl.coef) == (1.77e-6, 4, 1.0, 512, 0.02)
    shown = "\n".join(show_config("ppo", "", diff=("paper", "tutorial")))
    assert "inner_epochs" in shown and "1.77e-06" in shown and "kl.coef" not in shown


def test_presets_name_only_settings_that_exist():
    for stage, named in PRESETS.items():
        for values in named.values():
            assert values.keys() <= setting_types(STAGES[stage]).keys()


def test_shown_settings_can_be_read_back(tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("\n".join(show_config("ppo", "paper")))
    assert resolve(PPOConfig, read_yaml(file)) == resolve(PPOConfig, preset("ppo", "paper"))


@pytest.mark.parametrize("stage", STAGES)
def test_shown_settings_say_what_they_do(stage):
    lines = list(show_config(stage, "default"))
    docs = setting_docs(STAGES[stage])
    assert setting_types(STAGES[stage]).keys() <= docs.keys() and all(docs.values())
    for path in setting_types(STAGES[stage]):
        *groups, name = path.split(".")
        indent = "  " * len(groups)
        at = [i for i, line in enumerate(lines) if line.startswith(f"{indent}{name}:")]
        assert any(lines[i - 1].startswith(f"{indent}# ") for i in at), path
    assert max(map(len, lines)) <= 120
    whole = "\n".join(line.strip("# ") for line in lines).replace("\n", " ")
    assert docs["optim"] in whole and docs["log.keep"] in whole


def test_all_stages_can_be_shown_as_one_recipe(tmp_path):
    file = tmp_path / "all.yaml"
    file.write_text("\n".join(show_config("all", "default")))
    for stage, cls in STAGES.items():
        preset_name, settings = read_stage(file, stage)
        assert resolve(cls, settings) == cls() and preset_name == ""


MAPS = [
    ("ppo", "policy.path: m\nreward:\n  a: r\n", r'^ppo: reward must be a reward.*, not a map with "a" \(.*:3\)$'),
    ("ppo", "episodes: 8\nreward: {runs/rm: 1}\n", r'not a map with "runs/rm" \(.*:2\)$'),
    ("ppo", "ppo:\n  reward: {a: runs/rm}\n", r'^ppo: reward must be .*, not a map with "a" \(.*:2\)$'),
    ("ppo", "seed: 1\nreward: {data.path: r.jsonl}\n", "has no section ppo; it has reward$"),
    ("sft", "data.path: {a: 3}\n", r'^sft: data\.path takes a value; there is no setting "a" in it \(.*:1\)$'),
]


@pytest.mark.parametrize(("stage", "text", "sentence"), MAPS)
def test_a_map_in_the_place_of_a_value_is_refused(tmp_path, stage, text, sentence):
    """The reward of a file for ppo alone is no section of a recipe."""
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        stage_config(STAGES[stage], ["--config", str(tmp_path / "c.yaml")])


def test_difference_sees_every_setting():
    cfg = PPOConfig()
    assert difference(cfg, PPOConfig()) == []
    changed = resolve(PPOConfig, settings({"sampling.temperature": 0.9}))
    assert difference(cfg, changed) == [("sampling.temperature", 1.0, 0.9)]
    assert flatten(cfg).keys() == setting_types(PPOConfig).keys()


def test_every_setting_is_read_somewhere():
    """A setting that no code looks at would be a promise without effect."""
    package = Path(rlhf_fast.__file__).parent
    used: set[str] = set()
    for file in package.rglob("*.py"):
        if file.parent.name == "demo":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                node.body = []  # a rule is no use
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    wanted = {path.rpartition(".")[2] for stage in STAGES.values() for path in setting_types(stage)}
    assert wanted - used == set()
