"""PPO on the toy task: it learns, every setting runs, plain transformers reads its files, wrong input is refused."""

import itertools
import json
import re

import pytest
import toy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.config.fields import DataConfig, LoraConfig, ModelConfig, OptimConfig
from rlhf_fast.errors import UserError
from rlhf_fast.stages import ppo, reward, sft

pytestmark = pytest.mark.usefixtures("one_thread")
TRAJECTORY = (
    (0.0854167, 0.0, 0.00652534, 0.268851, 2.39816, 1.34546),
    (0.0854167, 0.0116193, -0.00386406, 0.0787208, 2.40119, 1.25480),
)


def test_ppo_raises_a_callable_reward(folder):
    cfg = toy.ppo(
        folder,
        episodes=20 * 32,
        batch=32,
        minibatch=16,
        pretrain=DataConfig(),
        inner_epochs=2,
        data=DataConfig(toy.prompt_file(folder / "prompts.jsonl")),
        optim=OptimConfig(lr=4e-3, schedule="constant"),
    )
    ppo.run(cfg)
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    first, last = (sum(row["objective/scores"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert first < 0.3
    assert last > 2 * first
    assert all(abs(row["val/ratio_first"] - 1) < 1e-5 for row in rows)
    assert rows[-1]["loss/value_avg"] < 0.5 * rows[0]["loss/value_avg"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["objective/kl"] > 0.1


def test_ppo_writes_metrics_samples_and_folders_that_transformers_reads(folder):
    ppo.run(toy.ppo(folder, inner_epochs=2))
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert [row["episode"] for row in rows] == [16 * row["step"] for row in rows]
    assert {row["steps"] for row in rows} == {4}
    names = "objective/rlhf_reward objective/entropy policy/clipfrac_avg policy/approxkl_avg val/ratio val/clipfrac_avg"
    assert {*names.split(), "loss/policy_avg", "loss/value_avg", "value/lr", "lr"} <= rows[0].keys()
    for name in ("ppo", "ppo/ema"):
        assert AutoTokenizer.from_pretrained(folder / name)("a .").input_ids == [3, 2]
    for one, other in (("ppo", "ppo/ema"), ("ppo/ema", "model"), ("ppo", "model")):
        assert not toy.same_weights(folder / one, folder / other)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "ppo/value").config.num_labels == 1
    for row in rows:  # the gap is that of the first of 4 steps: the later ones have other weights
        assert 0 <= row["rollout/gap_mean"] <= row["rollout/gap_max"] < 1e-4 < row["val/ratio_max"] - 1
        assert row["rollout/ratio_outside"] == 0
    sample = toy.rows(folder / "ppo/samples.jsonl")[-1]
    assert {"prompt", "response", "length", "eos", "score", "kl"} <= sample.keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_value_model_starts_from_the_reward_model_and_learns_alone_at_first(folder, kind):
    toy.model_at(folder, kind=kind)
    reward.run(toy.reward(folder))
    cfg = toy.ppo(folder, reward=str(folder / "reward"), critic_warmup=6, ema=0.0)
    ppo.run(cfg)
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert toy.same_weights(folder / "model", folder / "ppo")
    assert not {"loss/policy_avg", "rollout/gap_mean"} & rows[-1].keys()
    assert "loss/value_avg" in rows[-1]
    reward_file, value_file = (folder / name / "model.safetensors" for name in ("reward", "ppo/value"))
    assert reward_file.read_bytes() != value_file.read_bytes()
    assert not (folder / "ppo/ema").exists()


def test_ppo_ptx_adds_the_pretraining_gradient_to_the_same_step(folder):
    """test_learner.py holds the sum of the gradients; here the stage's own step is asked for both terms."""
    cfg = toy.ppo(folder, episodes=16)
    ppo.run(cfg)
    (row,) = toy.rows(folder / "ppo/metrics.jsonl")
    assert row["steps"] == 2
    assert row["loss"] == pytest.approx(row["loss/policy_avg"] + cfg.ptx_coef * row["loss/pretrain"], rel=1e-4)


@pytest.mark.parametrize("changes", [
    {"missing_eos": "replace"},
    {"missing_eos": "subtract", "missing_eos_value": 0.5},
    {"missing_eos": "drop"},
    {"whiten": "minibatch", "whiten_shift_mean": False},
    {"whiten": "none", "loss_mean": "sequence", "dual_clip": 3.0, "entropy_coef": 0.01},
    {"old_logprobs": "recompute", "score_clip": 0.5, "score_scale": 2.0},
    {"bootstrap_truncated": True},
], ids=str)  # fmt: skip
def test_each_setting_runs_to_the_end(folder, changes):
    ppo.run(toy.ppo(folder, **changes))
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert len(rows) == 6
    assert all(isinstance(row["objective/kl"], float) and row["rollout/gap_max"] < 1e-4 for row in rows)


def test_target_kl_ends_a_batch_early(folder):
    ppo.run(toy.ppo(folder, target_kl=1e-9, inner_epochs=3))
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert {row["steps"] for row in rows[1:]} == {2}, "the first step has ratio 1, the second ends the batch"


def test_select_ema_writes_the_average_and_keeps_the_last_weights(folder):
    ppo.run(toy.ppo(folder, select="ema"))
    assert (folder / "ppo/last").exists()
    assert (folder / "ppo/model.safetensors").read_bytes() == (folder / "ppo/ema/model.safetensors").read_bytes()


def test_select_reward_writes_the_best_validated_weights(folder):
    ppo.run(toy.ppo(folder, select="reward"))
    rewards = {
        row["step"]: row["valid/rlhf_reward"]
        for row in toy.rows(folder / "ppo/metrics.jsonl")
        if "valid/rlhf_reward" in row
    }
    finished = json.loads((folder / "ppo/run.json").read_text())["finished"]
    assert finished["step"] == max(rewards, key=rewards.get)


def test_the_adaptive_controller_moves_the_coefficient_and_the_metrics_show_it(folder):
    ppo.run(toy.ppo(folder))
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert rows[0]["objective/kl_coef"] == 0.05
    for before, after in itertools.pairwise(rows):
        error = min(max(before["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 16 / 200))


def test_a_policy_with_lora_is_its_own_reference(folder):
    pytest.importorskip("peft")
    policy = ModelConfig(toy.model_at(folder), lora=LoraConfig(rank=4))
    models = ppo.load_models(toy.ppo(folder, policy=policy), None)
    assert models.reference.module is models.policy.module
    ppo.run(toy.ppo(folder, policy=policy))
    assert not toy.same_weights(folder / "ppo", folder / "model")
    assert (folder / "ppo/adapter").is_dir()


def test_two_runs_are_the_same_to_the_bit(folder):
    for out in ("one", "two"):
        ppo.run(toy.ppo(folder, out))
    assert toy.metrics(folder / "one") == toy.metrics(folder / "two")
    for file in ("model.safetensors", "ema/model.safetensors", "value/model.safetensors"):
        assert (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()


def test_the_loss_trajectory_is_the_recorded_one(folder):
    """Two batches of two steps: other numbers mean another algorithm, or another generator in torch."""
    ppo.run(toy.ppo(folder, episodes=2 * 16))
    names = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "loss/pretrain", "grad_norm")
    rows = [[row[name] for name in names] for row in toy.rows(folder / "ppo/metrics.jsonl")]
    assert rows[0] == pytest.approx(TRAJECTORY[0], rel=1e-3, abs=1e-5)
    assert rows[1] == pytest.approx(TRAJECTORY[1], rel=1e-3, abs=1e-5)


def test_an_untrained_reward_model_is_refused(folder):
    for cfg in (toy.ppo(folder, reward=toy.model_at(folder)), toy.ppo(folder, value=ModelConfig(toy.model_at(folder)))):
        with pytest.raises(UserError, match="scalar head was never trained"):
            ppo.run(cfg)


def test_tokenizers_that_differ_are_refused(folder):
    other = toy.model(folder / "other", letters="abcdefgx")
    with pytest.raises(UserError, match=r"other\): its tokenizer is not the policy's .*'h' differs"):
        ppo.run(toy.ppo(folder, reference=other))
    reward.run(toy.reward(folder, model=ModelConfig(other)))
    with pytest.raises(UserError, match=r"reward\): its tokenizer is not the policy's"):
        ppo.run(toy.ppo(folder, reward=str(folder / "reward")))
    with pytest.raises(UserError, match=r"reward\): its tokenizer is not the policy's"):
        sft.run(toy.sft(folder, select="reward", select_reward=str(folder / "reward")))


def test_nan_in_the_reward_names_the_rows(folder, monkeypatch):
    monkeypatch.setattr(toy, "share_of_a", lambda texts: [float("nan") if t.startswith("b") else 0.0 for t in texts])
    with pytest.raises(UserError, match=r"toy:share_of_a \(.*\): returned nan; .*prompts.jsonl:\d+") as caught:
        ppo.run(toy.ppo(folder))
    line = int(re.findall(r"prompts\.jsonl:(\d+)", str(caught.value))[-1])
    assert toy.rows(folder / "prompts.jsonl")[line - 1]["prompt"].startswith("b")


def test_the_largest_seed_runs(folder):
    ppo.run(toy.ppo(folder, seed=2**63 - 1, episodes=2 * 16))
    assert len(toy.rows(folder / "ppo/metrics.jsonl")) == 2
