"""The reward model of an evaluation reads ranked responses as it has learned to, and held-out ones first."""

import json

import pytest
import toy

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.eval import reward_report
from rlhf_fast.eval.report import check_thresholds
from rlhf_fast.eval.reward_records import find_comparisons, reward_records
from rlhf_fast.model.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("append_eos", [True, False])
def test_responses_end_as_in_the_reward_models_training(folder, monkeypatch, append_eos):
    model = Model.load(ModelConfig(toy.model(folder / "base")), head="scalar", fresh_head=True, seed=3, device="cpu")
    model.save(folder / "reward")
    parts = {"config": {"data": {"append_eos": append_eos}}, "data": {}, "versions": {}, "machine": {}}
    (folder / "reward" / "run.json").write_text(json.dumps({"stage": "reward", **parts}))
    toy.jsonl(folder / "rankings.jsonl", [{"prompt": "a b .", "responses": ["c d", "e"], "ranks": [0, 1]}])
    read = []
    score = reward_report._score_batch
    monkeypatch.setattr(reward_report, "_score_batch", lambda model, batch: read.append(batch) or score(model, batch))
    reward_records(EvalConfig(models=("a=b",), data=".", reward="reward", device="cpu"), {})
    (batch,) = read
    end = toy.tokenizer().eos_token_id
    ends = [tokens[length - 1].item() == end for tokens, length in zip(batch.tokens, batch.lengths, strict=True)]
    assert ends == [append_eos] * 2


def test_held_out_responses_come_first(folder):
    for name in ("rankings", "comparisons", "rankings_held"):
        toy.jsonl(folder / f"{name}.jsonl", [{}])
        assert find_comparisons(".").name == f"{name}.jsonl"


def test_a_threshold_of_the_calibration_error_is_a_highest_value(folder):
    """Two scores that are sure of the wrong order."""
    toy.jsonl(
        folder / "rankings.jsonl",
        [
            {"prompt": "a", "responses": ["bb", "c"], "ranks": [1, 0]},
            {"prompt": "b", "responses": ["c", "dd"], "ranks": [0, 1]},
        ],
    )
    (folder / "own_reward.py").write_text("def length(texts):\n    return [40.0 * len(text) for text in texts]\n")
    records, _ = reward_records(EvalConfig(models=("a=b",), data=".", reward="own_reward:length"), {})
    name = "own_reward:length:reward_model.calibration_error"
    assert check_thresholds(records, {name: 1.0}) == []
    (sentence,) = check_thresholds(records, {name: 0.9})
    assert sentence.endswith("is 1 (n 2), above 0.9")
