"""Settings given in Python: a wrong type or name is refused where it is given; what stands for the right type becomes
it. Rewards in flags, YAML and Python."""

import json
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_fast import DataConfig, KLConfig, LogConfig, ModelConfig, OptimConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.cli.main import main
from rlhf_fast.config.checks import settings
from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import LoraConfig, SamplingConfig
from rlhf_fast.config.flags import stage_config
from rlhf_fast.config.resolve import difference, from_json, to_plain, to_yaml
from rlhf_fast.errors import UserError
from rlhf_fast.stages.recipe import read_recipe


def score(texts):
    return [0.0] * len(texts)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: PPOConfig(optim={"lr": 1}),
            r"optim must be an OptimConfig; write OptimConfig\(lr=\.\.\.\), got {'lr'",
        ),
        (lambda: PPOConfig(episode=3), 'no setting "episode"; did you mean episodes?'),
        (lambda: PPOConfig(lr=3), r"did you mean optim=OptimConfig\(lr=\.\.\.\)\?"),
        (lambda: PPOConfig(xyzzy=3), 'no setting "xyzzy"; there are out, seed'),
        (lambda: PPOConfig(episodes="3"), "episodes must be a whole number, got '3'"),
        (lambda: PPOConfig(episodes=2.5), "episodes must be a whole number, got 2.5"),
        (lambda: PPOConfig(episodes=True), "episodes must be a whole number, got True"),
        (lambda: PPOConfig(gamma="1"), "gamma must be a number, got '1'"),
        (lambda: PPOConfig(whiten="batches"), r"whiten must be one of batch, minibatch, none \(did you mean batch\?\)"),
        (lambda: PPOConfig(gamma=10**400), "gamma must be a number, got 1000"),
        (lambda: PPOConfig(missing_eos_value=10**400), "missing_eos_value must be a number, got 1000"),
        (lambda: PPOConfig(whiten=np.array(["batch", "none"])), "whiten must be one of batch, minibatch, none"),
        (lambda: PPOConfig(resume=1), "resume must be True or False, got 1"),
        (lambda: PPOConfig(policy="runs/sft"), r"policy must be a ModelConfig; write ModelConfig\(\.\.\.\)"),
        (lambda: ModelConfig(path=3), "path must be text, got 3"),
        (lambda: OptimConfig(betas=(0.9,)), "betas must have 2 entries"),
        (lambda: OptimConfig(betas=(0.9, "x")), "betas must be a number for entry 2"),
        (lambda: LogConfig(sinks="wandb"), "sinks must be a list or tuple, got 'wandb'"),
        (lambda: DataConfig(columns=[("a", "b")]), "columns must be a dict such as"),
        (lambda: LoraConfig(ranks=3), "did you mean rank"),
        (lambda: KLConfig(0.1, coef=0.2), "coef is given twice, once by its position"),
        (lambda: KLConfig(*range(9)), "settings, got 9 values"),
        (lambda: EvalConfig(limit="5"), "limit must be a whole number"),
        (lambda: PPOConfig(reward=3), "reward must be a reward model's folder, module:function, a Python function"),
        (lambda: PPOConfig(reward=["a", None]), "or a list of these; entry 2 is none"),
        (lambda: PPOConfig(reward=["a", "a"]), "reward names a twice; give it once, with the sum of the weights"),
        (lambda: PPOConfig(reward=["a", score], reward_weights=[1]), r"one number for each reward \(a, score\)"),
        (lambda: PPOConfig(reward=["a"], reward_weights=[0]), "reward_weights must not all be 0"),
        (lambda: PPOConfig(reward=["a"], reward_weights=[float("inf")]), "reward_weights must be finite numbers"),
        (lambda: PPOConfig(reward_timeout=-1), "reward_timeout must be at least 0"),
    ],
)
def test_what_is_wrong_is_refused_where_it_is_given(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_a_class_may_take_other_forms():
    @settings
    class Size:
        width: int = 0

        @classmethod
        def prepared(cls, name, value):
            return len(value) if isinstance(value, list) else value

    assert Size([1, 2]).width == Size(width=[1, 2]).width == 2
    with pytest.raises(UserError, match="Size: width must be a whole number, got 'x'"):
        Size("x")


@dataclass(frozen=True)
class OwnPPO(PPOConfig):
    """A user's settings, made by dataclasses.dataclass."""

    penalty: float = 0.0
    scores: tuple[int, ...] = ()
    device_map: "dict[str, torch.device] | None" = None

    def __post_init__(self):
        super().__post_init__()
        if self.penalty < 0:
            raise UserError("penalty is negative")


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"episodes": "3"}, "OwnPPO: episodes must be a whole number, got '3'"),
        ({"optim": {"lr": 1}}, "OwnPPO: optim must be an OptimConfig"),
        ({"policy": ModelConfig(), "resume": 1}, "OwnPPO: resume must be True or False, got 1"),
        ({"penalty": "1"}, "OwnPPO: penalty must be a number, got '1'"),
        ({"penalty": -1}, "penalty is negative"),
        ({"scores": [1, None]}, "OwnPPO: scores must have a value for entry 2"),
    ],
)
def test_a_subclass_by_dataclass_keeps_the_checks(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        OwnPPO(**wrong)


def test_a_subclass_by_dataclass_gets_values_in_their_types():
    cfg = OwnPPO(policy=ModelConfig(Path("a") / "b"), batch=np.int64(8), minibatch=8, data=["a", "b"], scores=[1, 2])
    assert cfg.data.path == ("a", "b") and type(cfg.batch) is int and cfg.scores == (1, 2)
    assert replace(cfg, sampling=SamplingConfig(stop=["x"])).sampling.stop == ("x",)
    with pytest.raises(UserError, match="batch must be a whole number"):
        replace(cfg, batch="8")


def test_a_subclass_may_have_a_type_that_only_a_type_checker_finds():
    @dataclass(frozen=True)
    class Own(LoraConfig):
        layers: "Layers" = ()  # noqa: F821

    assert Own(layers=[3]).layers == [3]
    with pytest.raises(UserError, match="Own: rank must be a whole number"):
        Own(rank="3", layers=[3])


def test_what_stands_for_a_type_becomes_it():
    cfg = PPOConfig(episodes=1e3, batch=np.int64(8), minibatch=8, gamma=np.float32(0.5), reference=None, lam=1)
    assert (cfg.episodes, cfg.batch, cfg.gamma, cfg.reference) == (1000, 8, 0.5, "")
    assert type(cfg.episodes) is type(cfg.batch) is int
    assert ModelConfig(Path("a") / "b").path == "a/b" and OptimConfig(betas=[0.1, 0.2]).betas == (0.1, 0.2)
    assert SFTConfig(sampling=SamplingConfig(stop=["x"])).sampling.stop == ("x",)
    assert RewardConfig(seed=3).seed == 3
    json.dumps(to_plain(cfg))


def test_a_member_of_an_enum_of_texts_is_its_text():
    whiten = PPOConfig(whiten=Enum("Whiten", {"NONE": "none"}, type=str).NONE).whiten
    assert (whiten, type(whiten)) == ("none", str)


def test_scalars_of_numpy_and_torch_are_those_of_python():
    cfg = PPOConfig(
        resume=np.bool_(False), whiten=np.str_("none"), seed=torch.tensor(3), lam=np.float64(0.5),
        whiten_eps=np.int8(1), reward_weights=[np.float32(2)], reward=np.str_("my:format"),
        optim=OptimConfig(betas=(np.float16(0.5), 0)),
    )  # fmt: skip
    plain = PPOConfig(
        resume=False, whiten="none", seed=3, lam=0.5, whiten_eps=1, reward_weights=[2.0], reward="my:format",
        optim=OptimConfig(betas=(0.5, 0)),
    )  # fmt: skip
    assert cfg == plain and json.dumps(to_plain(cfg)) == json.dumps(to_plain(plain))
    assert {type(cfg.resume), type(cfg.whiten), type(cfg.seed), type(cfg.reward)} == {bool, str, int}
    for make in (lambda: PPOConfig(seed=np.bool_(True)), lambda: PPOConfig(seed=np.float64(0.5))):
        with pytest.raises(UserError, match=r"seed must be a whole number, got np\."):
            make()
    with pytest.raises(UserError, match=r"resume must be True or False, got np\.int64"):
        PPOConfig(resume=np.int64(1))


def test_rewards_in_flags_yaml_and_python_are_the_same(folder):
    yaml = folder / "ppo.yaml"
    yaml.write_text("reward: [runs/rm, my:format]\nreward_weights: [1, 0.5]\n")
    made = PPOConfig(reward=["runs/rm", "my:format"], reward_weights=[1, 0.5])
    flags = ["--reward", "runs/rm", "my:format", "--reward-weights", "1", "0.5"]
    for cfg in (stage_config(PPOConfig, flags), stage_config(PPOConfig, ["--config", str(yaml)])):
        assert cfg == made and cfg.rewards() == {"reward[1]": "runs/rm", "reward[2]": "my:format"}
    assert stage_config(PPOConfig, ["--config", str(yaml), "--reward", "a", "--reward-weights", "2"]).reward == "a"
    for one in ("runs/rm", ["runs/rm"], ("runs/rm",), Path("runs/rm"), [Path("runs/rm")]):
        assert PPOConfig(reward=one).reward == "runs/rm"
    assert PPOConfig(reward="~/rm").reward == PPOConfig(reward=["~/rm"]).reward == str(Path.home() / "rm")
    assert from_json("ppo", to_plain(made)) == made and "- my:format" in to_yaml(made)
    mixed = PPOConfig(reward=["runs/rm", score])
    assert not difference(from_json("ppo", json.loads(json.dumps(to_plain(mixed)))), mixed)
    assert not difference(PPOConfig(reward=f"{score.__module__}:score"), PPOConfig(reward=score))


def test_a_recipe_has_several_rewards(folder):
    for name in ("d", "r", "p"):
        (folder / f"{name}.jsonl").write_text("{}\n")
    text = "sft: {model.path: m, data.path: d.jsonl}\nreward: {data.path: r.jsonl}\nppo:\n  data.path: p.jsonl\n"
    (folder / "one.yaml").write_text(text)
    (folder / "two.yaml").write_text(text + "  reward: [runs/first/reward, my:format]\n  reward_weights: [1, 0.5]\n")
    assert read_recipe("one.yaml").stages["ppo"].reward == "runs/first/reward"
    assert read_recipe("two.yaml").stages["ppo"].reward == ("runs/first/reward", "my:format")
    (folder / "two.yaml").write_text(text + "  reward: {path: x}\n")
    with pytest.raises(UserError, match=r'reward must be .*, not a map with "path" .*two\.yaml:5'):
        read_recipe("two.yaml")


def test_the_command_line_says_what_is_wrong_with_rewards(capsys):
    for argv, sentence in [
        (["--reward", "a", "--reward", "b"], "--reward is given twice"),
        (["--reward", "a", "b", "--reward-weights", "1"], "reward_weights must have one number for each reward (a, b)"),
        (["--reward", "a", "a"], "reward names a twice"),
        (["--reward"], "reward is not set"),
    ]:
        assert main(["ppo", "--policy.path", "m", "--data.path", "p.jsonl", *argv]) == 2
        printed = capsys.readouterr().err
        assert sentence in printed and printed.count("\n") == 1, printed
