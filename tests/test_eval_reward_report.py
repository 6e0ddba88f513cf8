"""The reward model's own report: orderings, best of K, ties, calibration, and the curve of a second reward."""

import json
import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_fast.config.evaluation import EvalConfig
from rlhf_fast.config.fields import DataConfig, ModelConfig
from rlhf_fast.data import read_comparisons
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import Estimate, mean
from rlhf_fast.eval.gold_curve import (
    CurvePoint,
    best_of_n_curve,
    change_line,
    curve_lines,
    read_samples,
    run_curve,
    step_curve,
)
from rlhf_fast.eval.gold_curve import records as curve_records
from rlhf_fast.eval.reward_records import ppo_models, reward_records
from rlhf_fast.eval.reward_report import (
    Ranked,
    calibration,
    pair_accuracy,
    records,
    report,
    report_lines,
    reward_accuracy,
    score_comparisons,
)
from rlhf_fast.model.model import Model
from rlhf_fast.run.info import sha256

RANKED = [
    Ranked((3.0, 2.0, 1.0), (0, 1, 2)),  # 3 of 3 right, the best first
    Ranked((1.0, 1.0, 0.0), (0, 1, 1)),  # one label tie, one score tie: 1.5 of 2; the best first half of the time
    Ranked((0.0, 5.0), (0, 1)),  # wrong
    Ranked((1.0, 2.0), (0, 0)),  # all tied: no pair, no best one
]


def values(found):
    return {measure.name: measure.estimate().value for measure in found.measures}


def test_figures_by_hand():
    found = report(RANKED)
    assert values(found) == pytest.approx({
        "pair_accuracy": 4.5 / 6, "best_of_k": (1 + 0.5 + 0) / 3, "best_of_k_random": (1 / 3 + 1 / 3 + 1 / 2) / 3,
        "rank": (1 + 1.5 + 2) / 3, "rank_random": (2 + 5 / 3 + 1.5) / 3, "label_ties": 2 / 8, "score_ties": 1 / 6,
    })  # fmt: skip
    assert found.num_pairs == 6 and pair_accuracy(RANKED).estimate().n == 3
    text = "\n".join(report_lines(found))
    assert (
        "6 pairs of 3 prompts" in text and "random 0.389, mean rank 1.72" in text and "| 0.5 to 0.6 | 0.500 |" in text
    )
    kept = records(found, "rm")
    assert {r["measure"] for r in kept} == {*values(found), "calibration_error"}
    assert all(r["task"] == "reward_model" and r["model"] == "rm" for r in kept)
    assert json.loads(json.dumps(kept, allow_nan=False))[0]["value"] == 0.75


def test_pairs_of_one_prompt_in_several_rows():
    """Ten prompts of four rows each, all right or all wrong: ten things are known, not forty."""
    rows = [Ranked((float(i % 2), 0.5), (0, 1), f"prompt {i}") for i in range(10) for _ in range(4)]
    found = report(rows)
    for measure in found.measures:
        assert measure.estimate().n == 10, measure.name
    once = report(rows[::4])
    assert values(found) == values(once)
    for found_of, once_of in zip(found.measures, once.measures, strict=True):
        if found_of.name in ("pair_accuracy", "best_of_k"):
            assert found_of.estimate().half_width == pytest.approx(once_of.estimate().half_width, rel=0.15)
    assert [bin_.observed.n for bin_ in found.calibration] == [10] and "40 pairs of 10 prompts" in report_lines(found)[
        0
    ]
    assert pair_accuracy([row._replace(prompt="") for row in rows]).estimate().n == 40


def test_calibration():
    found = calibration(RANKED)
    by_bin = {bin_.low: bin_ for bin_ in found}
    assert [round(low, 1) for low in by_bin] == [0.5, 0.7, 0.8, 0.9]
    assert by_bin[0.5].observed.value == 0.5 and by_bin[0.5].num_pairs == 1  # equal scores: half and half
    certain = by_bin[max(by_bin)]
    assert certain.observed.value == 0 and certain.predicted == pytest.approx(1 / (1 + math.exp(-5)))
    random = np.random.default_rng(0)
    scores = random.normal(0, 1.5, (4000, 2))
    first = random.random(4000) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    true = report([Ranked(tuple(s), (0, 1) if better else (1, 0)) for s, better in zip(scores, first, strict=True)])
    sure = report([Ranked(tuple(8 * s), (0, 1) if better else (1, 0)) for s, better in zip(scores, first, strict=True)])
    assert true.calibration_error < 0.02 and sure.calibration_error > 0.15
    assert all(abs(bin_.observed.value - bin_.predicted) < 1.5 * bin_.observed.half_width for bin_ in true.calibration)
    assert values(true)["pair_accuracy"] == values(sure)["pair_accuracy"]


def test_nothing_to_report_on():
    for ranked in ([], [Ranked((1.0, 2.0), (0, 0))]):
        found = report(ranked)
        assert found.num_pairs == 0 and math.isnan(found.calibration_error) and found.calibration == ()
        assert math.isnan(values(found)["pair_accuracy"])
        assert "pair accuracy –" in report_lines(found)[0]


@pytest.fixture
def file(tmp_path):
    rows = [
        {"prompt": "a ", "responses": ["xxx", "xx", "x"], "ranks": [0, 1, 2]},
        {"prompt": "b ", "responses": ["x", "xxxx"], "ranks": [0, 1]},
        {"prompt": [{"role": "user", "content": "c"}], "responses": ["xx", "x"], "ranks": [0, 1]},
    ]
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_function_of_texts(file):
    def length(prompts, responses):
        assert prompts[0] == "a " and len(prompts) == 7
        return [len(response) for response in responses]

    found = score_comparisons(length, file)
    assert [r.scores for r in found] == [(3, 2, 1), (1, 4), (2, 1)]
    assert [r.prompt for r in found[:2]] == ["a ", "b "]
    twice = Path(file).with_name("twice.jsonl")
    twice.write_text(Path(file).read_text() * 2)
    assert reward_accuracy(lambda texts: [len(text) for text in texts], str(twice)).n == 3
    assert reward_accuracy(length, file) == mean([3, 0, 1], weights=[3, 1, 1], bounded=True)
    assert score_comparisons(lambda texts: [len(text) for text in texts], file)[0].scores == (5, 4, 3)
    assert len(score_comparisons(length, DataConfig(path=file, limit=0))) == 3
    for wrong in (lambda texts: [1.0], lambda texts: [math.nan] * len(texts)):
        with pytest.raises(UserError):
            score_comparisons(wrong, file)


@torch.no_grad()
def test_a_model(tmp_path, one_thread):
    """Scores are those of each response alone, and the accuracy is that of its pairs."""
    model = Model.load(ModelConfig(str(BASE_MODELS / "small")), head="scalar", fresh_head=True)
    words = ["anna", "ben", "lives", "in", "a", "the", "."]
    random = np.random.default_rng(0)
    rows = [
        {"prompt": "who is anna ?", "responses": [" ".join(random.choice(words, 5)) for _ in range(k)],
         "ranks": [*range(k)]}
        for k in (2, 3, 4)
    ]  # fmt: skip
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = []
    ranked = score_comparisons(model, str(path), notes=notes)
    assert notes == [f"{path}: 3 comparisons"] and len({row.prompt for row in ranked}) == 1
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({**row, "prompt": f"who is {words[i]} ?"}) + "\n" for i, row in enumerate(rows))
    )
    assert len({row.prompt for row in score_comparisons(model, str(other))}) == 3
    right, pairs = [], []
    data = read_comparisons(DataConfig(path=str(path)), model.tokenizer).train
    for found, row in zip(ranked, data.rows, strict=True):
        alone = [
            float(model.last_scores(torch.tensor([row.prompt + ids]), torch.tensor([len(row.prompt + ids)])))
            for ids in row.responses
        ]
        assert found.scores == pytest.approx(alone, abs=1e-4)
        right.append(sum(alone[i] > alone[j] for i, j in combinations(range(len(alone)), 2)))
        pairs.append(len(alone) * (len(alone) - 1) / 2)
    assert reward_accuracy(model, str(path)).value == pytest.approx(sum(right) / sum(pairs))


def test_best_of_n():
    random = np.random.default_rng(0)
    proxy = random.normal(size=(7, 5)).round(1)  # a few ties
    proxy[0, :3] = 0.5
    gold = random.normal(size=(7, 5))
    for point in best_of_n_curve(proxy.tolist(), gold.tolist(), (1, 2, 3, 5)):
        expected = []
        for p, g in zip(proxy, gold, strict=True):
            sets = [list(s) for s in combinations(range(5), point.at)]
            expected.append(np.mean([np.mean([g[i] for i in s if p[i] == p[s].max()]) for s in sets]))
        assert point.gold.value == pytest.approx(np.mean(expected))
        assert point.gold.n == 7 and point.kl == pytest.approx(math.log(point.at) - 1 + 1 / point.at)
    curve = best_of_n_curve(proxy.tolist(), gold.tolist())
    assert [point.at for point in curve] == [1, 2, 4]
    assert [p.proxy.value for p in curve] == sorted(p.proxy.value for p in curve)
    assert best_of_n_curve([], []) == []
    with pytest.raises(UserError, match="best of 6: a prompt has 5 responses"):
        best_of_n_curve(proxy.tolist(), gold.tolist(), (6,))


@pytest.mark.parametrize(
    "proxy, gold, verdict",
    [
        (1, 1, "both rise."),
        (1, -1, "the policy exploits the proxy."),
        (1, 0, "the gold one's direction is not decided by so few samples."),
        (0, -1, "the proxy's rise is not decided by so few samples."),
        (0, 0, "neither direction is decided by so few samples."),
    ],
)
def test_verdict_on_a_curve(proxy, gold, verdict):
    def around(value):
        return Estimate(value, value - 0.2, value + 0.2, 9)

    points = [CurvePoint(1, around(0.0), around(0.0)), CurvePoint(9, around(proxy), around(gold))]
    assert change_line(points).endswith(f": {verdict}")
    kept = curve_records(points, "ppo", "my:gold")
    assert [(r["step"], r["measure"], r["value"], r["judge"], r["kl"]) for r in kept] == [
        (1, "proxy", 0.0, "", None), (1, "gold", 0.0, "my:gold", None),
        (9, "proxy", proxy, "", None), (9, "gold", gold, "my:gold", None),
    ]  # fmt: skip


def test_curve_of_a_run(tmp_path):
    rows = [
        {"step": step, "prompt": f"p{i // 2}", "response": "x", "length": 1, "eos": True, "score": step + i, "kl": 0.5}
        for step in (10, 1)
        for i in range(4)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(tmp_path)
    curve = step_curve(samples, [-sample.score for sample in samples])
    assert [(p.at, p.proxy.value, p.gold.value, p.gold.n, p.kl) for p in curve] == [
        (1, 2.5, -2.5, 2, 0.5), (10, 11.5, -11.5, 2, 0.5),
    ]  # fmt: skip
    (whole,) = step_curve(samples, [0.0] * 8, num_points=1)
    assert (whole.at, whole.proxy.value, whole.gold) == (10, 7.0, (0.0, 0.0, 0.0, 2))
    assert step_curve([], []) == []
    assert [p.gold.value for p in run_curve(tmp_path, lambda texts: map(len, texts))] == [3.0, 3.0]
    assert change_line(curve).startswith(
        "From the first steps to the last the proxy changes by +9.000 ± 17.969 and the gold"
    )
    assert change_line(curve[:1]) == ""
    many = [{"step": i // 4, "prompt": f"p{i}", "response": "x", "score": i / 100} for i in range(80)]
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    assert [(p.at, p.proxy.n) for p in run_curve(tmp_path / "many", lambda texts: map(len, texts))] == [
        (3, 16), (7, 16), (11, 16), (15, 16), (19, 16),
    ]  # fmt: skip
    assert curve_lines(curve)[2].startswith("| 1 | 0.50 | 2.500 ± ") and curve_lines(curve)[2].endswith("| 2 |")
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "response": "x"}\n')
    with pytest.raises(UserError, match=r"samples.jsonl:1: has no step, prompt, response and score"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"samples.jsonl:1: not JSON"):
        read_samples(tmp_path / "samples.jsonl")


def run_json(folder, stage, data=()):
    """Write the run.json of a run of ours."""
    parts = {"config": {}, "data": {str(path): sha256(path) for path in data}, "versions": {}, "machine": {}}
    (folder / "run.json").write_text(json.dumps({"stage": stage, **parts}))


def test_a_reward_model_on_what_it_was_trained_on(folder, one_thread):
    row = {"prompt": "who is anna ?", "responses": ["anna is a cook .", "a .", "the ."], "ranks": [0, 1, 1]}
    (folder / "rankings.jsonl").write_text(json.dumps(row) + "\n")
    Model.load(ModelConfig(str(BASE_MODELS / "small")), head="scalar", fresh_head=True).save(folder / "rm")
    cfg = EvalConfig(models=("a=b",), data=".", reward="rm")
    for data in ((), (folder / "rankings.jsonl",)):
        run_json(folder / "rm", "reward", data)
        _, sections = reward_records(cfg, {})
        (lines,) = sections.values()
        assert lines[0] == "- rankings.jsonl: 1 comparisons"
        assert any("rankings.jsonl: rm was trained on this file" in line for line in lines) == bool(data)


def test_models_that_ppo_has_trained(folder):
    for name in ("sft", "ppo", "other"):
        (folder / name).mkdir()
        (folder / name / "samples.jsonl").write_text("")
    run_json(folder / "sft", "sft")
    run_json(folder / "ppo", "ppo")
    assert ppo_models({"a": "sft", "b": "ppo", "c": "other", "d": "nowhere"}) == {"b": "ppo"}
    with pytest.raises(UserError, match=re.escape("gold: none of the models (a, c) is the folder of a PPO run")):
        ppo_models({"a": "sft", "c": "other"})
