"""Reference values of a real model on real sets: those of lm-eval's HFLM, on the same rows."""

from pathlib import Path

import pytest
from test_rollout import SMOLLM2, STORIES

from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.eval.run_task import read_scores, score_rows
from rlhf_fast.eval.sets import read_set
from rlhf_fast.eval.tasks import TASKS
from rlhf_fast.model.model import Model

SETS = STORIES.parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SMOLLM2, reason="RLHF_FAST_SMOLLM2 names no folder with SmolLM2-135M"),
    pytest.mark.skipif(not (SETS / "hellaswag.jsonl").is_file(), reason=f"no sets in {SETS}"),
]


@pytest.fixture(scope="module")
def model():
    return Model.load(ModelConfig(SMOLLM2))


def evaluated(model: Model, name: str, limit: int) -> tuple[list, dict[str, float]]:
    """Return the scores of a task's first rows, and its measures."""
    task = TASKS[name]
    rows = read_set(task.set, Path(SETS) / f"{task.set}.jsonl", limit)
    records = score_rows(model, task, rows, Encoder(model.tokenizer, model.max_positions))
    scores = [read_scores(record) for record in records]
    return scores, {measure.name: measure.estimate().value for measure in task.measures(rows, scores)}


def test_hellaswag(model):
    scores, found = evaluated(model, "hellaswag", 100)
    assert [score.logprob for score in scores[0]] == pytest.approx([-40.282, -30.665, -23.611, -31.512], abs=2e-3)
    assert found["acc"] == pytest.approx(0.33) and found["acc_norm"] == pytest.approx(0.36)
    _, found = evaluated(model, "hellaswag", 20)
    assert found["acc"] == pytest.approx(0.40) and found["acc_norm"] == pytest.approx(0.45)


def test_lambada(model):
    _, found = evaluated(model, "lambada", 200)
    assert found["acc"] == pytest.approx(0.325) and found["perplexity"] == pytest.approx(50.844, rel=1e-3)
