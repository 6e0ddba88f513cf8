"""The reward model of an evaluation reads ranked responses as it has learned to, and held-out ones first."""

import json

import pytest
import toy

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.eval import reward_report
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
