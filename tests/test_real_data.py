"""The three stages for a few steps on real data: a pretrained model of 260,000 weights, human demonstrations, rankings.

The data are not part of this repository: they are in ../shared/data, or in the folder that RLHF_FAST_DATA names.
"""

import os
from pathlib import Path

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast.config.fields import DataConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig
from rlhf_fast.config.stages import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.stages import ppo, reward, sft

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MODEL = DATA / "models" / "stories260K"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.is_dir(), reason=f"{DATA} holds no real data")]
LOG = LogConfig(samples=2, live=False)
SHORT = {"max_prompt_tokens": 64, "max_response_tokens": 96}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run sft, reward (on rankings and on pairs) and ppo, each from the one before; return the folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("real")
    demonstrations = DataConfig(str(DATA / "demonstrations.jsonl"), limit=400, valid_fraction=0.05, **SHORT)
    pretrain = DataConfig(str(DATA / "pretrain.jsonl"), limit=60, **SHORT)
    sft.run(
        SFTConfig(
            out=str(folder / "sft"),
            model=ModelConfig(str(MODEL)),
            data=demonstrations,
            pretrain=pretrain,
            pretrain_fraction=0.1,
            optim=OptimConfig(lr=1e-3),
            log=LOG,
            epochs=2,
            batch=16,
            residual_dropout=0.2,
            sampling=SamplingConfig(max_new_tokens=16),
        )
    )
    for out, name, limit in (("reward", "rankings", 0), ("pairs", "preferences", 150)):
        rows = DataConfig(
            str(DATA / f"{name}.jsonl"), limit=limit, valid_fraction=0.1, max_prompt_tokens=128, max_response_tokens=144
        )
        reward.run(
            RewardConfig(
                out=str(folder / out),
                model=ModelConfig(str(folder / "sft")),
                data=rows,
                demonstrations=demonstrations,
                optim=OptimConfig(lr=1e-3),
                log=LOG,
                epochs=3,
                batch=4,
            )
        )
    schedule = {"schedule": "constant", "warmup_steps": 2}
    ppo.run(
        PPOConfig(
            out=str(folder / "ppo"),
            policy=ModelConfig(str(folder / "sft")),
            reward=str(folder / "reward"),
            data=DataConfig(str(DATA / "prompts.jsonl"), max_prompt_tokens=64),
            pretrain=pretrain,
            ptx_ratio=2,
            optim=OptimConfig(lr=1e-4, **schedule),
            value_optim=OptimConfig(lr=5e-4, **schedule),
            inner_epochs=2,
            sampling=SamplingConfig(max_new_tokens=24),
            log=LOG,
            episodes=4 * 16,
            batch=16,
            minibatch=8,
            ptx_coef=1.0,
        )
    )
    torch.set_num_threads(threads)
    return folder


def column(path: Path, name: str) -> list[float]:
    return [row[name] for row in toy.rows(path / "metrics.jsonl") if name in row]


def test_sft_fits_human_demonstrations(runs):
    loss, valid = column(runs / "sft", "loss/sft"), column(runs / "sft", "valid/sft")
    pretrain = column(runs / "sft", "loss/pretrain")
    assert loss[-1] < 0.9 * loss[0] and valid[1] < valid[0] < loss[0] and pretrain[-1] < 0.9 * pretrain[0]
    model = AutoModelForCausalLM.from_pretrained(runs / "sft")
    tokenizer = AutoTokenizer.from_pretrained(runs / "sft")
    ids = tokenizer("Once upon a time", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(answer[0])) > len("Once upon a time")
    assert len(toy.rows(runs / "sft/samples.jsonl")) == 4


@pytest.mark.parametrize("out", ["reward", "pairs"])
def test_reward_fits_human_rankings(runs, out):
    loss, accuracy = column(runs / out, "loss/reward"), column(runs / out, "reward/accuracy")
    quarter = len(loss) // 4
    assert sum(loss[-quarter:]) < sum(loss[:quarter]) and sum(accuracy[-quarter:]) > 0.5 * quarter
    assert len(column(runs / out, "valid/accuracy")) == 3 == len(column(runs / out, "valid/longer_wins"))
    model = AutoModelForSequenceClassification.from_pretrained(runs / out)
    assert model.config.num_labels == 1
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


def test_ppo_learns_on_real_prompts(runs):
    rows = toy.rows(runs / "ppo/metrics.jsonl")
    assert len(rows) == 4 and all(abs(row["val/ratio_first"] - 1) < 1e-3 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-3) and rows[-1]["objective/kl"] != 0
    assert rows[-1]["loss/value_avg"] < rows[0]["loss/value_avg"]
    assert all(0.5 < row["loss/pretrain"] < 6 for row in rows)
    names = "config.json model.safetensors metrics.jsonl samples.jsonl run.json ema value"
    found = {entry.name for entry in (runs / "ppo").iterdir()}
    assert {*names.split()} <= found and "checkpoints" not in found
    before, after = (AutoModelForCausalLM.from_pretrained(runs / part).state_dict() for part in ("sft", "ppo"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(runs / "ppo/ema")
    AutoModelForSequenceClassification.from_pretrained(runs / "ppo/value")
