"""Suggestions for wrong names of settings, flags, commands and files, and sentences for arguments that are wrong."""

import re

import pytest

from rlhf_fast.cli.main import main
from rlhf_fast.cli.options import GenerateOptions
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.library_names import LIBRARY_NAMES, meant_setting
from rlhf_fast.config.resolve import setting_types
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.errors import did_you_mean, nearest, nearest_file

SETTINGS = {
    name: list(setting_types(cls)) for name, cls in (("sft", SFTConfig), ("reward", RewardConfig), ("ppo", PPOConfig))
}
MEANT = [
    # misspelt
    ("ppo", "optim.leraning_rate", "optim.lr"),
    ("ppo", "optim.lrr", "optim.lr"),
    ("ppo", "value_optim.lrr", "value_optim.lr"),
    ("ppo", "valu_optim.lr", "value_optim.lr"),
    ("ppo", "optm.weight_deacy", "optim.weight_decay"),
    ("ppo", "episods", "episodes"),
    ("ppo", "kl.coeff", "kl.coef"),
    ("ppo", "dta.path", "data.path"),
    ("sft", "packng", "packing"),
    ("sft", "modle.path", "model.path"),
    ("ppo", "xyz", ""),
    ("ppo", "optim.quux", ""),
    # without the group, or with that of another stage
    ("ppo", "lr", "optim.lr"),
    ("sft", "max_new_tokens", "sampling.max_new_tokens"),
    ("ppo", "model.path", "policy.path"),
    ("sft", "policy.lora.rank", "model.lora.rank"),
    # other libraries
    ("sft", "learning_rate", "optim.lr"),
    ("ppo", "learning_rate", "optim.lr"),
    ("ppo", "optim.learning_rate", "optim.lr"),
    ("ppo", "value_optim.learning_rate", "value_optim.lr"),
    ("sft", "num_train_epochs", "epochs"),
    ("ppo", "num_train_epochs", "episodes"),
    ("ppo", "per_device_train_batch_size", "batch"),
    ("sft", "batch_size", "batch"),
    ("ppo", "kl_coef", "kl.coef"),
    ("ppo", "init_kl_coef", "kl.coef"),
    ("ppo", "cliprange", "clip_low and clip_high"),
    ("ppo", "vf_coef", "value_coef"),
    ("sft", "max_seq_length", "data.max_prompt_tokens and data.max_response_tokens"),
    ("ppo", "response_length", "sampling.max_new_tokens"),
    ("ppo", "total_episodes", "episodes"),
    ("ppo", "num_ppo_epochs", "inner_epochs"),
    ("sft", "model_name_or_path", "model.path"),
    ("ppo", "model_name_or_path", "policy.path"),
    ("ppo", "reward_model_path", "reward"),
    ("reward", "output_dir", "out"),
    ("sft", "logging_steps", "log.every"),
    ("sft", "save_steps", "log.checkpoint_every"),
    ("sft", "eval_steps", "log.validate_every"),
    ("sft", "gradient_checkpointing", "model.gradient_checkpointing"),
    ("sft", "bf16", "model.dtype bfloat16"),
    ("ppo", "bf16", "policy.dtype bfloat16"),
    ("sft", "lora_r", "model.lora.rank"),
    ("sft", "warmup_ratio", "optim.warmup_steps"),
    ("sft", "lr_scheduler_type", "optim.schedule"),
    ("sft", "weight_decay", "optim.weight_decay"),
]


@pytest.mark.parametrize(("stage", "name", "meant"), MEANT)
def test_the_setting_that_is_meant(stage, name, meant):
    assert meant_setting(name, SETTINGS[stage]) == meant


def test_every_name_of_another_library_leads_to_a_setting():
    flags = {path.rpartition(".")[2] for cls in (GenerateOptions, EvalConfig) for path in setting_types(cls)} | {
        "system"
    }
    every = {*flags, *(path for paths in SETTINGS.values() for path in paths)}
    for name, targets in LIBRARY_NAMES.items():
        for target in targets:
            for setting in target.replace(" bfloat16", "").split(" and "):
                assert any(f".{path}".endswith(f".{setting}") for path in every), (name, setting)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            "ppo --optim.leraning_rate 1",
            'ppo: no setting "optim.leraning_rate"; did you mean optim.lr? (--optim.leraning_rate)',
        ),
        ("sft --learning-rate 1", 'sft: no setting "learning_rate"; did you mean optim.lr? (--learning-rate)'),
        ("sft --xyzzy 1", 'sft: no setting "xyzzy"; `rlhf-fast show-config sft` lists them (--xyzzy)'),
        (
            "generate --model m --prompts p --max-tokens 3",
            "generate: Unrecognized options: --max-tokens, 3; did you mean --max-new-tokens?",
        ),
        (
            "generate --model m --prompts p --output o",
            "generate: Unrecognized options: --output, o; did you mean --out?",
        ),
        ("generate --model_name_or_path m --prompts p", "did you mean --model?"),
        ("eval --pretrained m", "did you mean --models?"),
        ("chat m --sytem x", "did you mean --system?"),
        ("chta m", 'no command "chta"; did you mean chat?'),
        # arguments that are left out
        ("generate", "generate: --model and --prompts must be given; see `rlhf-fast generate --help`"),
        ("check", "check: FILE must be given; see `rlhf-fast check --help`"),
        ("run", "run: RECIPE must be given; see `rlhf-fast run --help`"),
        (
            "run --recipe r.yaml --out x",
            "run: RECIPE is given without --recipe, before the flags: `rlhf-fast run r.yaml --out x`",
        ),
        ("run --out x --recipe=r.yaml", "before the flags: `rlhf-fast run r.yaml --out x`"),
        ("run --recipe --out x", "run: RECIPE must be given"),
        ("plot", "plot: RUN must be given; see `rlhf-fast plot --help`"),
        ("chat", "chat: MODEL must be given; see `rlhf-fast chat --help`"),
        ("completion", "completion: SHELL must be given; see `rlhf-fast completion --help`"),
        # values
        (
            "check f --as comparison",
            "check: --as must be one of auto, demonstrations, comparisons, prompts, texts (did you mean comparisons?),"
            " got comparison;",
        ),
        ("show-config foo", "show-config: stage must be one of all, sft, reward, ppo, eval, got foo;"),
        ("show-config --diff paper", "show-config: --diff takes two names, got paper;"),
        ("check f --columns prompt", "check: --columns takes pairs of names, as in --columns prompt question;"),
        ("export r --out o --gguf q4_0", "must be one of q8_0, f16, bf16, f32 (did you mean q8_0?), got q4_0;"),
        ("check f --limit x", "check: --limit must be a whole number, got x;"),
        ("chat m --top-p x", "chat: --top-p must be a number, got x;"),
        ("generate --model m --prompts p -n", "generate: --n needs a value;"),
        ("completion sh", "completion: shell must be one of bash, zsh, fish (did you mean zsh?), got sh;"),
    ],
)
def test_wrong_arguments_get_one_sentence(capsys, folder, argv, sentence):
    assert main(argv.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlhf-fast: error: ") and sentence in line


def test_a_file_is_suggested_only_if_its_name_is_near(capsys, folder):
    for name in ("prompts.jsonl", "demo.jsonl", "notes.txt"):
        (folder / name).touch()
    for given, hint in (
        ("nope.jsonl", "look at the path"),
        ("prompt.jsonl", "did you mean prompts.jsonl?"),
        ("prompts.json", "did you mean prompts.jsonl?"),
        ("promtps.jsonl", "did you mean prompts.jsonl?"),
        ("dmeo.jsonl", "did you mean demo.jsonl?"),
        ("x.jsonl", "look at the path"),
    ):
        assert main(["generate", "--model", "m", "--prompts", given]) == 2
        assert capsys.readouterr().err == f"rlhf-fast: error: {given}: there is no such file; {hint}\n"


def test_the_nearest_name():
    assert nearest("rewrd", ["sft", "reward"]) == "reward" and nearest("xyz", ["sft", "reward"]) == ""
    assert did_you_mean("sfft", ["sft"], "no") == "did you mean sft?" and did_you_mean("q", ["sft"], "no") == "no"
    assert nearest_file("a.jsonl", ["a.jsonl"]) == ""
    assert nearest_file("data.jsonl", ["date.jsonl", "data.json"]) == "data.json"


def test_no_other_place_compares_names():
    from test_house import FILES

    users = [name for name, path in FILES.items() if re.search(r"\bdifflib\b", path.read_text())]
    assert sorted(users) == ["rlhf_fast.config.library_names", "rlhf_fast.errors"]
