"""PPO on a toy world: it learns, every switch runs, plain transformers reads its files, and wrong input is refused."""

import json

import pytest
import torch
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
    assert first < 0.3 and last > 2 * first, (first, last)
    assert all(abs(row["val/ratio_first"] - 1) < 1e-5 for row in rows)
    assert rows[-1]["loss/value_avg"] < 0.5 * rows[0]["loss/value_avg"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["objective/kl"] > 0.1
    assert all(row["episode"] == 32 * row["step"] and row["steps"] == 4 for row in rows)
    names = "objective/rlhf_reward objective/entropy policy/clipfrac_avg policy/approxkl_avg val/ratio val/clipfrac_avg"
    assert {*names.split(), "loss/policy_avg", "loss/value_avg", "value/lr", "lr"} <= rows[0].keys()
    for part in ("ppo", "ppo/ema"):
        assert AutoTokenizer.from_pretrained(folder / part)("a .").input_ids == [3, 2]
    for one, other in (("ppo", "ppo/ema"), ("ppo/ema", "model"), ("ppo", "model")):
        assert not toy.same_weights(folder / one, folder / other)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "ppo/value").config.num_labels == 1
    sample = toy.rows(folder / "ppo/samples.jsonl")[-1]
    assert {"prompt", "response", "length", "eos", "score", "kl"} <= sample.keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ppo_against_a_reward_model_starts_the_critic_from_it(folder, kind):
    toy.model_at(folder, kind=kind)
    reward.run(toy.reward(folder))
    cfg = toy.ppo(folder, reward=str(folder / "reward"), critic_warmup=6, ema=0.0)
    ppo.run(cfg)
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    # While only the critic learns, the policy stays where it is.
    assert toy.same_weights(folder / "model", folder / "ppo")
    assert "loss/policy_avg" not in rows[-1] and "loss/value_avg" in rows[-1]
    judge, critic = ((folder / part / "model.safetensors").read_bytes() for part in ("reward", "ppo/value"))
    assert judge != critic and not (folder / "ppo/ema").exists()


def test_ptx_is_one_gradient_with_ppos(folder):
    """The step's gradient is PPO's plus coefficient times the texts'."""
    from rlhf_fast.batches import Texts
    from rlhf_fast.training.learner import Learner
    from rlhf_fast.training.losses import pretrain_loss

    cfg = toy.ppo(folder, episodes=16)
    model = ppo.Model.load(cfg.policy)
    texts = Texts(torch.randint(3, 9, (5, 12)), torch.tensor([12, 11, 5, 12, 2]))
    other = Texts(torch.randint(3, 9, (3, 9)), torch.tensor([9, 8, 9]))

    def gradient(terms):
        learner = Learner(model, OptimConfig(lr=1e-3), 10)
        for term in terms:
            list(learner._backward(*term))
        return {name: p.grad.clone() for name, p in learner.params.items()}

    def cleared(*terms):
        model.module.zero_grad()
        return gradient(terms)

    one, two = cleared((pretrain_loss, texts, 1.0)), cleared((pretrain_loss, other, 1.0))
    both = cleared((pretrain_loss, texts, 1.0), (pretrain_loss, other, 27.8))
    for name in both:
        torch.testing.assert_close(both[name], one[name] + 27.8 * two[name], rtol=1e-4, atol=1e-5)
    ppo.run(cfg)
    assert "loss/pretrain" in toy.rows(folder / "ppo/metrics.jsonl")[0]


@pytest.mark.parametrize("changes", [
    {"missing_eos": "replace"},
    {"missing_eos": "subtract", "missing_eos_value": 0.5},
    {"missing_eos": "drop"},
    {"whiten": "minibatch", "whiten_shift_mean": False},
    {"whiten": "none", "loss_mean": "sequence", "dual_clip": 3.0, "entropy_coef": 0.01},
    {"old_logprobs": "recompute", "score_clip": 0.5, "score_scale": 2.0},
    {"target_kl": 1e-9, "inner_epochs": 3},
    {"select": "ema"},
    {"select": "reward"},
], ids=str)  # fmt: skip
def test_ppos_switches_run_to_the_end(folder, changes):
    cfg = toy.ppo(folder, **changes)
    ppo.run(cfg)
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert len(rows) == 6 and all(isinstance(row["objective/kl"], float) for row in rows)
    if "target_kl" in changes:
        assert all(row["steps"] == 2 for row in rows[1:]), "the first step has ratio 1, the second ends the batch"
    if changes.get("select") == "ema":
        assert (folder / "ppo/last").exists()
        assert (folder / "ppo/model.safetensors").read_bytes() == (folder / "ppo/ema/model.safetensors").read_bytes()
    if changes.get("select") == "reward":
        best = max(row["valid/rlhf_reward"] for row in rows if "valid/rlhf_reward" in row)
        best_step = next(row["step"] for row in rows if row.get("valid/rlhf_reward") == best)
        assert json.loads((folder / "ppo/run.json").read_text())["finished"]["step"] == best_step


def test_the_adaptive_controller_moves_the_coefficient_and_the_metrics_show_it(folder):
    ppo.run(toy.ppo(folder))
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    assert rows[0]["objective/kl_coef"] == 0.05
    for before, after in zip(rows, rows[1:], strict=False):
        error = min(max(before["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert after["objective/kl_coef"] == pytest.approx(before["objective/kl_coef"] * (1 + error * 16 / 200))


def test_a_policy_with_lora_is_its_own_reference(folder):
    pytest.importorskip("peft")
    policy = ModelConfig(toy.model_at(folder), lora=LoraConfig(rank=4))
    roles = ppo.load_roles(toy.ppo(folder, policy=policy), None)
    assert roles.reference.module is roles.policy.module
    ppo.run(toy.ppo(folder, policy=policy))
    assert not toy.same_weights(folder / "ppo", folder / "model")
    assert (folder / "ppo/adapter").is_dir()


def test_two_runs_are_the_same_to_the_bit(folder):
    runs = []
    for out in ("one", "two"):
        ppo.run(toy.ppo(folder, out))
        rows = toy.rows(folder / out / "metrics.jsonl")
        runs.append([{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows])
    assert runs[0] == runs[1]
    for part in ("", "ema/", "value/"):
        one, two = ((folder / out / f"{part}model.safetensors").read_bytes() for out in ("one", "two"))
        assert one == two


def test_the_loss_trajectory_is_the_one_on_file(folder):
    """Two batches of two steps: another number here is another algorithm (or another generator in torch)."""
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
    with pytest.raises(UserError, match=r"other: its tokenizer is not the policy's .*'h' differs"):
        ppo.run(toy.ppo(folder, reference=other))
    reward.run(toy.reward(folder, model=ModelConfig(other)))
    with pytest.raises(UserError, match=r"reward: its tokenizer is not the policy's"):
        ppo.run(toy.ppo(folder, reward=str(folder / "reward")))
    with pytest.raises(UserError, match=r"reward: its tokenizer is not the policy's"):
        sft.run(toy.sft(folder, select="reward", select_reward=str(folder / "reward")))


def test_nan_in_the_reward_names_the_rows(folder, monkeypatch):
    monkeypatch.setattr(toy, "share_of_a", lambda texts: [float("nan") if t.startswith("b") else 0.0 for t in texts])
    with pytest.raises(UserError, match=r"toy:share_of_a: returned nan .*prompts.jsonl:\d+") as caught:
        ppo.run(toy.ppo(folder))
    line = int(str(caught.value).rpartition("prompts.jsonl:")[2].rstrip(")").split(",")[0])
    assert toy.rows(folder / "prompts.jsonl")[line - 1]["prompt"].startswith("b")


def test_the_largest_seed_runs(folder):
    ppo.run(toy.ppo(folder, seed=2**63 - 1, episodes=2 * 16))
    assert len(toy.rows(folder / "ppo/metrics.jsonl")) == 2
