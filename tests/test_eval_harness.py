"""Our model in lm-eval: scores, windows and answers of its own `hf` model, and its command."""

import importlib
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from rlhf_fast.demo.materials import read_rows
from rlhf_fast.errors import UserError
from rlhf_fast.eval import likelihood
from rlhf_fast.eval.encoding import Encoder
from rlhf_fast.eval.sets import DEMO_SETS
from rlhf_fast.scoring import Scorer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "rlhf_fast" / "demo" / "models" / "small"
PAIRS = [
    ("one day anna went to the park . anna", " found a ball ."),
    ("", "anna is a baker ."),
    ("the house of ben is  ", "red ."),
    ("ben has a dog . " * 60, "ben has a cat ."),
]
TEXTS = ["anna is a nurse . " * 70, "ben ."]
QUESTIONS = [
    ("where does anna live ?", {"until": ["."], "max_gen_toks": 12}),
    ("list three animals .", {"until": "and", "max_gen_toks": 12, "do_sample": False}),
    ("what is the job of ben ? " * 40, {"until": [".", "?"], "max_gen_toks": 12}),
    ("what is the job of anna ?", {"max_new_tokens": 7, "num_beams": 1}),
    ("list three colors .", {"max_tokens": 5, "do_sample": False, "temperature": 1}),
    ("where does ben live ?", {"max_completion_tokens": 3, "temperature": 0.0}),
    ("is ben a baker ?", {"max_gen_toks": 14, "min_new_tokens": 12}),
]


def test_without_lm_eval_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "rlhf_fast.eval.harness", raising=False)
    with pytest.raises(UserError, match="harness needs lm-eval, which is not installed: pip install lm-eval"):
        importlib.import_module("rlhf_fast.eval.harness")


@pytest.fixture
def ours():
    from rlhf_fast.eval.harness import RlhfFastLM

    return RlhfFastLM(str(MODEL), batch_size="auto")


def instances(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_scores_and_answers_are_those_of_lm_evals_own_model(ours):
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(str(MODEL), dtype="float32", device="cpu", batch_size=4)
    requests = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(text,) for text in TEXTS],
        "generate_until": QUESTIONS,
    }
    found = {name: [getattr(m, name)(instances(name, r)) for m in (ours, hf)] for name, r in requests.items()}
    for (logprob, greedy), (expected, is_greedy) in zip(*found["loglikelihood"], strict=True):
        assert abs(logprob - expected) < 1e-3 and greedy == is_greedy
    assert found["loglikelihood_rolling"][0] == pytest.approx(found["loglikelihood_rolling"][1], abs=1e-3)
    assert found["generate_until"][0] == found["generate_until"][1]
    assert any(found["generate_until"][0]) and ours.encoder.overlong == 2
    assert (ours.max_length, ours.prefix_token_id) == (hf.max_length, hf.prefix_token_id)


def test_settings_of_generation_are_read_as_lm_eval_reads_them(ours):
    """In all combinations of do_sample, temperature and the names of the length."""
    resolve = pytest.importorskip("lm_eval.models.utils").normalize_gen_kwargs
    lengths = [{}, {"max_gen_toks": 9}, {"max_tokens": 8, "max_new_tokens": 7}, {"max_completion_tokens": 6},
               {"max_tokens": 3, "until": "."}, {"max_new_tokens": 5, "max_gen_toks": 4, "until": ["a"]}]  # fmt: skip
    for length, do_sample, temperature in product(lengths, (None, False, True), (None, 0.0, 0.5, 1)):
        own = {"do_sample": do_sample, "temperature": temperature}
        settings = length | {name: value for name, value in own.items() if value is not None}
        expected = resolve(settings, 100)
        if expected["do_sample"] and not expected.get("temperature"):
            continue  # an error
        found = ours._sampling({"max_completion_tokens": 100, **settings} if not length else settings)
        assert found.max_new_tokens == expected["max_gen_toks"] and list(found.stop) == expected["until"]
        assert found.temperature == (expected["temperature"] if expected["do_sample"] else 0.0), settings
    found = ours._sampling({"max_gen_toks": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": None})
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 3, 0.0)
    assert ours._sampling({"max_gen_toks": 9, "min_new_tokens": 4}).min_new_tokens == 4


@pytest.mark.slow
def test_our_task_has_the_results_of_lm_evals(ours):
    """On the rows of the demo's world, with the same model."""
    import lm_eval

    task = {
        "task": "demo",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(DEMO_SETS / "hellaswag.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx}}",
        "doc_to_choice": "{{endings}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(ours, tasks=[task], bootstrap_iters=0)["results"]["demo"]
    rows, encoder, scorer = read_rows(DEMO_SETS / "hellaswag.jsonl"), Encoder(ours.tokenizer, 128), Scorer(ours.model)
    scores = [scorer(likelihood.hellaswag_requests(row, encoder)) for row in rows]
    acc, acc_norm, _ = (measure.estimate().value for measure in likelihood.hellaswag_measures(rows, scores))
    assert (found["acc,none"], found["acc_norm,none"]) == pytest.approx((acc, acc_norm))
    assert 0 < acc < 1


def test_encoding_is_that_of_lm_eval(ours):
    for context, continuation in PAIRS[::2]:
        assert Encoder(ours.tokenizer).pair(context, continuation) == ours._encode_pair(context, continuation)


@pytest.mark.slow
def test_its_command_knows_our_model():
    command = [sys.executable, "-m", "rlhf_fast.eval.harness", "run", "--model", "rlhf_fast", "--model_args"]
    found = subprocess.run(
        [*command, f"pretrained={MODEL}", "--tasks", "no_such_task"], capture_output=True, text=True, cwd=ROOT
    )
    assert "no_such_task" in found.stdout + found.stderr and "rlhf_fast" not in found.stderr.split("no_such_task")[-1]


def test_without_a_gpu_the_default_device_is_the_cpu(monkeypatch):
    """lm-eval's command passes cuda:0 where nobody has named a device."""
    from rlhf_fast.eval.harness import RlhfFastLM

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert RlhfFastLM(str(MODEL), device="cuda:0").model.device.type == "cpu"


def test_bad_arguments(ours):
    with pytest.raises(UserError, match="max_gen_toks 128 leaves no room in 128 positions"):
        ours.generate_until(instances("generate_until", [("anna", {"until": ["."], "max_gen_toks": 128})]))
    for settings, message in (
        ({"max_tokens": 128}, "^max_tokens 128 leaves no room in 128 positions"),
        ({}, "^max_gen_toks 256 leaves no room in 128 positions"),
        ({"max_length": 20}, "^max_length counts the tokens of the prompt too; give max_gen_toks"),
        ({"max_gen_toks": 9, "num_beams": 4}, "^generation_kwargs: num_beams: 4 is not supported; leave it out"),
        ({"max_gen_toks": 9, "repetition_penalty": 1.2}, "repetition_penalty: 1.2 is not supported"),
        ({"max_gen_toks": 9, "penalty_alpha": 0}, "penalty_alpha: 0 is not supported"),
        ({"max_gen_toks": 9, "do_sample": True, "temperature": 0}, "do_sample is true and temperature is 0"),
        ({"max_gen_toks": 9, "do_sample": True}, "do_sample is true and temperature is 0"),
    ):
        with pytest.raises(UserError, match=message):
            ours.generate_until(instances("generate_until", [("anna", settings)]))
    with pytest.raises(UserError, match="has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "hello"}])
