"""The three stages on a toy world: each learns, writes what plain transformers reads, and refuses what is wrong."""

import json
from dataclasses import replace

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.config import DataConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.errors import UserError
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.stages.run_dir import RunDir

TRAJECTORY = (
    (0.0854167, 0.0, 0.00652534, 0.268851, 2.39816, 1.34546),
    (0.0854167, 0.0116193, -0.00386406, 0.0787208, 2.40119, 1.25480),
)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder of one's own, in which `toy` can be imported as a reward."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def untied_sum(path) -> float:
    return float(sum(w.double().abs().sum() for w in weights(path).values()))


# SFT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sft_learns_the_demonstrations(folder, kind):
    toy.model_at(folder, kind=kind)
    cfg = toy.sft(folder, epochs=10, pretrain_fraction=0.0, residual_dropout=0.0, optim=OptimConfig(lr=1e-2))
    sft.run(cfg)
    rows = toy.rows(folder / "sft/metrics.jsonl")
    assert rows[-1]["loss/sft"] < 0.5 * rows[0]["loss/sft"]
    valid = [row["valid/sft"] for row in rows if "valid/sft" in row]
    assert len(valid) == 10 and valid[-1] < valid[0]
    told = json.loads((folder / "sft/run.json").read_text())
    assert told["config"]["optim"]["lr"] == 1e-2 and told["finished"]["score"] == pytest.approx(-min(valid))
    model, words = AutoModelForCausalLM.from_pretrained(folder / "sft"), AutoTokenizer.from_pretrained(folder / "sft")
    assert words("a b .").input_ids == toy.tokenizer()("a b .").input_ids
    generated = model.generate(**words("a a .", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert len(generated[0]) > 3
    samples = toy.rows(folder / "sft/samples.jsonl")
    assert {"prompt", "response", "length", "eos", "step"} <= samples[0].keys() and len(samples) == 20


def test_sft_keeps_the_epoch_with_the_best_validation_loss(folder):
    """There is nothing to learn in random answers but by heart: `loss` writes an earlier model than `last`."""
    chance = toy.random.Random(0)
    noise = [{"prompt": text, "completion": " ".join(chance.choices("abcdefgh", k=4))} for text in toy.prompts(40)]
    data, steep = DataConfig(toy.jsonl(folder / "noise.jsonl", noise), valid_fraction=0.2), OptimConfig(lr=0.01)
    losses = {}
    for select in ("loss", "last"):
        cfg = toy.sft(folder, select, data=data, select=select, optim=steep, epochs=10, pretrain_fraction=0.0)
        sft.run(cfg)
        rows = toy.rows(folder / select / "metrics.jsonl")
        losses[select] = [row["valid/sft"] for row in rows if "valid/sft" in row]
    assert losses["loss"] == losses["last"]
    best = losses["loss"].index(min(losses["loss"]))
    assert best < len(losses["loss"]) - 1, "the test needs a run whose last epoch is not its best"
    assert untied_sum(folder / "loss") != untied_sum(folder / "last")
    assert json.loads((folder / "loss/run.json").read_text())["finished"]["score"] == -min(losses["loss"])
    assert not (folder / "loss/checkpoints/best").exists()


def test_sft_mixes_in_pretraining_text_by_its_share(folder):
    cfg = toy.sft(folder, pretrain_fraction=0.2, batch=8)
    sft.run(cfg)
    rows = toy.rows(folder / "sft/metrics.jsonl")
    assert all("loss/pretrain" in row for row in rows)
    assert rows[-1]["loss/pretrain"] < rows[0]["loss/pretrain"]

    class Counted:
        def __init__(self, data):
            self.data, self.taken = data, []

        def batch(self, position, size):
            self.taken.append((position, size))
            return self.data.batch(position, size)

        def __len__(self):
            return len(self.data)

    model = sft.Model.load(cfg.model)
    demonstrations = Counted(sft.read_demonstrations(cfg.data, model.tokenizer).train)
    texts = Counted(sft.read_texts(cfg.pretrain, model.tokenizer).train)
    weights = [sum(c for _, _, c in sft.mixture(cfg, demonstrations, texts, step)) for step in range(1, 9)]
    assert weights == pytest.approx([1.0] * 8)
    # 20 % of the sequences: 2 texts to 8 demonstrations, each text once.
    assert texts.taken == [(2 * step, 2) for step in range(8)]
    assert demonstrations.taken == [(8 * step, 8) for step in range(8)]


def test_sft_chooses_by_the_score_of_a_reward_model(folder):
    reward.run(toy.reward(folder))
    cfg = toy.sft(folder, select="reward", select_reward=str(folder / "reward"))
    sft.run(cfg)
    scores = [row["valid/scores"] for row in toy.rows(folder / "sft/metrics.jsonl") if "valid/scores" in row]
    assert len(scores) == 4
    assert json.loads((folder / "sft/run.json").read_text())["finished"]["score"] == max(scores)
    assert "score" in toy.rows(folder / "sft/samples.jsonl")[0]


def test_sft_without_validation_rows_cannot_select(folder):
    cfg = toy.sft(folder, data=DataConfig(toy.demonstrations(folder / "d.jsonl"), valid_fraction=0.0))
    with pytest.raises(UserError, match="select=loss needs validation rows"):
        sft.run(cfg)


def test_sft_samples_only_where_the_answer_fits(folder):
    """A demonstration may fill the model's 64 positions although its prompt leaves no room for a longest answer."""
    rows = [{"prompt": "a " * n + ".", "completion": "a"} for n in (*range(1, 30), 60)]
    sampling = SamplingConfig(max_new_tokens=40)
    for valid, samples in ((rows[10:12] + rows[-1:], 2), (rows[-1:], 0)):
        data = DataConfig(toy.jsonl(folder / "rows.jsonl", rows[:8]), valid=toy.jsonl(folder / "v.jsonl", valid))
        cfg = toy.sft(folder, f"sft{samples}", data=data, sampling=sampling, epochs=1, log=LogConfig(live=False))
        sft.run(cfg)
        assert len(toy.rows(folder / f"sft{samples}/samples.jsonl")) == samples
    reward.run(toy.reward(folder))
    with pytest.raises(UserError, match="no validation prompt leaves room for sampling.max_new_tokens"):
        sft.run(replace(cfg, out="x", select="reward", select_reward=str(folder / "reward")))


# Reward


def test_reward_learns_ragged_rankings(folder):
    cfg = toy.reward(folder)
    reward.run(cfg)
    rows = toy.rows(folder / "reward/metrics.jsonl")
    assert len(rows) == -(-3 * 86 // 16) and rows[-1]["valid/accuracy"] > 0.9 > rows[0]["reward/accuracy"]
    assert 0 < rows[-1]["valid/longer_wins"] < 1
    model, words = toy_scores(folder / "reward")
    good, bad = model(words, "a b . a a a</s>"), model(words, "a b . c d e</s>")
    assert good > bad
    sample = toy.rows(folder / "reward/samples.jsonl")[0]
    assert len(sample["responses"]) == len(sample["ranks"]) == len(sample["scores"])


def toy_scores(path):
    model, words = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def score(words, text):
        ids = words(text.replace("</s>", " </s>"), return_tensors="pt").input_ids
        return float(model(input_ids=ids).logits[0, 0])

    return score, words


def test_the_bias_puts_demonstrations_at_zero_and_keeps_the_ranking(folder):
    from rlhf_fast.data import read_demonstrations
    from rlhf_fast.model import Model

    cfg = toy.reward(folder)
    reward.run(cfg)
    reward.run(replace(cfg, out=str(folder / "unbiased"), demonstrations=DataConfig()))
    means = []
    for out in ("reward", "unbiased"):
        model = Model.load(ModelConfig(str(folder / out)), head="scalar")
        means.append(reward.mean_score(model, read_demonstrations(cfg.demonstrations, model.tokenizer).train))
    assert abs(means[0]) < 1e-5 < abs(means[1])
    one, other = ((folder / out / "model.safetensors").read_bytes() for out in ("reward", "unbiased"))
    assert one == other


def test_pairs_are_rankings_of_two(folder):
    chance = toy.random.Random(5)
    pairs = [
        {"prompt": text, "chosen": f"a a {chance.choice('bcd')}", "rejected": f"{chance.choice('bcd')} c a"}
        for text in toy.prompts(64)
    ]
    cfg = toy.reward(folder, data=DataConfig(toy.jsonl(folder / "pairs.jsonl", pairs), valid_fraction=0.1))
    reward.run(cfg)
    assert toy.rows(folder / "reward/metrics.jsonl")[-1]["valid/accuracy"] > 0.9


# PPO


def test_ppo_raises_a_callable_reward(folder):
    cfg = toy.ppo(folder, episodes=20 * 32, batch=32, minibatch=16, pretrain=DataConfig(), inner_epochs=2,
        data=DataConfig(toy.prompt_file(folder / "prompts.jsonl")), optim=OptimConfig(lr=4e-3, schedule="constant"))
    ppo.run(cfg)
    rows = toy.rows(folder / "ppo/metrics.jsonl")
    first, last = (sum(row["objective/scores"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert first < 0.3 and last > 2 * first, (first, last)
    assert all(abs(row["val/ratio_first"] - 1) < 1e-3 for row in rows)
    assert rows[-1]["loss/value_avg"] < 0.5 * rows[0]["loss/value_avg"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["objective/kl"] > 0.1
    assert all(row["episode"] == 32 * row["step"] and row["steps"] == 4 for row in rows)
    names = "objective/rlhf_reward objective/entropy policy/clipfrac_avg policy/approxkl_avg val/ratio val/clipfrac_avg"
    assert {*names.split(), "loss/policy_avg", "loss/value_avg", "value/lr", "lr"} <= rows[0].keys()
    for part in ("ppo", "ppo/ema"):
        assert AutoTokenizer.from_pretrained(folder / part)("a .").input_ids == [3, 2]
    assert untied_sum(folder / "ppo") != untied_sum(folder / "ppo/ema") != untied_sum(folder / "model")
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
    same = weights(folder / "model")
    assert all(torch.equal(w, same[name]) for name, w in weights(folder / "ppo").items())
    assert "loss/policy_avg" not in rows[-1] and "loss/value_avg" in rows[-1]
    judge, critic = ((folder / part / "model.safetensors").read_bytes() for part in ("reward", "ppo/value"))
    assert judge != critic and not (folder / "ppo/ema").exists()


def test_ptx_is_one_gradient_with_ppos(folder):
    """The step's gradient is PPO's plus coefficient times the texts'."""
    from rlhf_fast.batches import Texts
    from rlhf_fast.learner import Learner
    from rlhf_fast.losses import pretrain_loss

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
    assert untied_sum(folder / "ppo") != untied_sum(folder / "model")
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


# What is refused


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


def test_nan_in_training_stops_with_step_and_rows(folder):
    cfg = toy.sft(folder, optim=OptimConfig(lr=1e30, grad_clip=0.0), pretrain_fraction=0.0, select="last")
    with pytest.raises(UserError, match=r"optimizer step \d+: loss .*demonstrations.jsonl:\d+"):
        sft.run(cfg)


def test_a_folder_goes_on_only_with_its_own_settings_and_data(folder, capsys):
    cfg = toy.sft(folder)
    sft.run(cfg)
    assert "finished" in capsys.readouterr().err
    before = (folder / "sft/model.safetensors").stat().st_mtime_ns
    sft.run(replace(cfg, log=LogConfig(every=5)))
    assert "sft is finished already" in capsys.readouterr().err
    assert (folder / "sft/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"was started with optim.lr = 0.003, now it is 0.1"):
        sft.run(replace(cfg, optim=OptimConfig(lr=0.1)))
    with pytest.raises(UserError, match="holds a run of sft, not reward"):
        reward.run(toy.reward(folder, "sft"))
    with pytest.raises(UserError, match="holds a run already"):
        sft.run(replace(cfg, resume=False))
    with pytest.raises(UserError, match="no run of ours"):
        sft.run(replace(cfg, out=cfg.model.path))
    toy.jsonl(folder / "demonstrations.jsonl", [{"prompt": "a .", "completion": "a"}] * 40)
    with pytest.raises(UserError, match=r"demonstrations.jsonl: has changed since"):
        sft.run(cfg)


def test_two_processes_cannot_share_a_folder(folder):
    cfg = toy.sft(folder)
    with RunDir(cfg) as one, RunDir(cfg) as two:
        one.begin(1, (), {})
        with pytest.raises(UserError, match="sft: another process runs there"):
            two.begin(1, (), {})


def test_a_missing_path_is_named(folder):
    with pytest.raises(UserError, match="data.path is not set"):
        sft.run(toy.sft(folder, data=DataConfig()))
    with pytest.raises(UserError, match=r"nowhere.jsonl: there is no such file"):
        sft.run(toy.sft(folder, data=DataConfig("nowhere.jsonl", valid_fraction=0.1)))
    assert not (folder / "sft").exists()
