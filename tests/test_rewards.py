"""Rewards: what each function receives, sums with weights, None, async functions, timeouts, retries, errors."""

import asyncio
import functools
import json
import re
import shlex
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy

import rlhf_fast
from rlhf_fast.batches import GivenRow, Prompts
from rlhf_fast.cli.main import main
from rlhf_fast.config.fields import DataConfig, LogConfig, ModelConfig, SamplingConfig
from rlhf_fast.errors import BadRows, UserError, row_locations
from rlhf_fast.eval.reward_report import score_comparisons, score_texts
from rlhf_fast.model.model import Model
from rlhf_fast.rollout.rollout import Rollout
from rlhf_fast.run.logs import read_metrics
from rlhf_fast.stages import ppo, reward, sft
from rlhf_fast.stages.fit import check_fit
from rlhf_fast.training import reward_calls
from rlhf_fast.training.reward_calls import Call, CallLimits, call_all
from rlhf_fast.training.reward_functions import FunctionReward, call_form
from rlhf_fast.training.rewards import Reward, load_reward

ROWS = [
    GivenRow("a b .", {"answer": "a", "level": 1}),
    GivenRow([{"role": "user", "content": "c ."}], {"answer": "c", "level": None}),
    GivenRow("b c d .", {"answer": "d", "level": [3]}),
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return Model.load(ModelConfig(toy.model(tmp_path_factory.mktemp("policy"))))


@pytest.fixture(scope="module")
def prompts(policy):
    texts = ["a b .", "c .", "b c d ."]
    return Prompts([70, 71, 72], Prompts.from_texts(policy.tokenizer, texts).tokens, texts, ROWS)


@pytest.fixture(scope="module")
def responses(policy, prompts):
    return Rollout(policy, SamplingConfig(max_new_tokens=5)).generate(prompts, samples=2)


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(reward_calls, "FIRST_WAIT", 0.01)


def combined(policy, *functions, weights=(), timeout=0.0, retries=0):
    found = load_reward(functions, policy.tokenizer, weights=weights, limits=CallLimits(timeout, retries))
    found.said = []
    found.notify = found.said.append
    return found


def test_a_function_is_called_by_the_names_of_its_parameters(policy, prompts, responses):
    """Each response meets the columns of its own prompt, also where a prompt has several and in another order."""
    calls = []

    def by_name(completions, answer, prompts, completion_ids, missing="default", **kwargs):
        calls.append((prompts, completions, completion_ids, answer, missing, kwargs))
        return [float(i) for i in range(len(completions))]

    order = torch.tensor([5, 0, 3, 2, 4, 1])
    shuffled = responses.take(order)
    assert combined(policy, by_name)(shuffled, prompts).tolist() == [0, 1, 2, 3, 4, 5]
    ((asked, completions, ids, answer, missing, kwargs),) = calls
    rows = [ROWS[i // 2] for i in order.tolist()]
    assert asked == [row.prompt for row in rows]
    assert answer == [row.columns["answer"] for row in rows]
    assert kwargs == {"level": [row.columns["level"] for row in rows]} and missing == "default"
    assert ids == shuffled.response_ids()
    texts = [policy.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    expected = [
        [{"role": "assistant", "content": text}] if isinstance(row.prompt, list) else text
        for row, text in zip(rows, texts, strict=True)
    ]
    assert completions == expected and any(texts)


def test_kwargs_get_everything_and_the_older_forms_go_on(policy, prompts, responses):
    calls = {}

    def everything(**kwargs):
        calls["everything"] = kwargs
        return [0.0] * len(kwargs["completions"])

    def texts_alone(texts, **_kwargs):
        calls["texts"] = texts
        return [0.0] * len(texts)

    def pairs(prompts, responses):
        calls["pairs"] = (prompts, responses)
        return [0.0] * len(prompts)

    combined(policy, everything, texts_alone, pairs).score(responses, prompts)
    assert set(calls["everything"]) == {"prompts", "completions", "completion_ids", "answer", "level"}
    answers = responses.texts(policy.tokenizer)
    asked = [text for text in prompts.texts for _ in range(2)]
    assert calls["pairs"] == (asked, answers)
    assert [text.split() for text in calls["texts"]] == [
        [*prompt.split(), *answer.split()] for prompt, answer in zip(asked, answers, strict=True)
    ]


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda texts: texts, "texts (prompt and response together)"),
        (lambda x: x, "texts (prompt and response together)"),
        (lambda prompts, responses: responses, "prompts and responses"),
        (lambda a, b, *, scale=1: (a, b, scale), "prompts and responses"),
        (lambda prompt, response: (prompt, response), "prompts and responses"),
        (lambda prompts, answers: (prompts, answers), "prompts and responses"),
        (lambda prompt, completion: (prompt, completion), "prompts and responses"),
        (lambda prompts, texts, k=1: (prompts, texts, k), "prompts and responses"),
        (lambda prompts, completions: (prompts, completions), "prompts, completions, by name"),
        (lambda completions, **kwargs: (completions, kwargs), "completions, all other columns, by name"),
        (lambda *, completions, answer: (completions, answer), "completions, answer, by name"),
        (lambda prompts, **kwargs: (prompts, kwargs), "prompts, all other columns, by name"),
        (lambda completions_ids, k=1: (completions_ids, k), "completions_ids, k, by name"),
        (functools.partial(lambda completions, k: (completions, k), k=2), "completions, by name"),
    ],
)
def test_the_form_follows_from_the_names(function, expected):
    assert str(call_form(function, "f")) == expected


@pytest.mark.parametrize(
    "function, words",
    [
        (
            lambda completion: completion,
            "completion would get prompt and response together, .* completions, or name it texts if",
        ),
        (lambda completion, answer: (completion, answer), "completion would get the prompts, .* or name it prompts if"),
        (lambda completion_id: completion_id, "completion_id would get prompt .* name it completion_ids, or"),
        (lambda prompts: prompts, r"prompts would get prompt and response together, .* and add \*\*kwargs, or"),
        (lambda response: response, "response would get prompt and response together, .* name it completions, or"),
        (lambda responses, prompts: (responses, prompts), "responses would get the prompts, by its position"),
    ],
)
def test_a_name_that_says_another_list_is_refused(policy, function, words):
    with pytest.raises(UserError, match=f"^reward f: its parameter {words}"):
        FunctionReward(function, policy.tokenizer, "f")


def test_what_cannot_be_called_is_refused(policy):
    def slash(completions, /, answer):
        return completions, answer

    for function, words in [
        (lambda: 1, "takes 0 arguments"),
        (lambda a, b, c: (a, b, c), "or by name prompts, completions and columns; it takes 3 arguments"),
        (slash, "called by the names of its parameters, and one has none; remove the /"),
        (torch.nn.Linear(1, 1), "is a torch module, not a function"),
        (max, "its parameters cannot be read; wrap it in a def"),
    ]:
        with pytest.raises(UserError, match=words):
            FunctionReward(function, policy.tokenizer, "f")


def test_a_function_cannot_change_the_rows(policy, prompts, responses):
    def greedy(prompts, completions, level):
        for prompt, entry in zip(prompts, level, strict=True):
            for value in (prompt, entry):
                if isinstance(value, list):
                    value.append("changed")
        return [0.0] * len(completions)

    before = repr(ROWS)
    combined(policy, greedy)(responses, prompts)
    assert repr(ROWS) == before


def test_a_sum_with_weights_ignores_none(policy, prompts, responses):
    """TRL's rule: a reward that does not apply to a row adds nothing, and its mean is over the others."""

    def first(completions):
        return [1.0, 2.0, None, None, 5.0, 6.0]

    def second(completions):
        return torch.tensor([10, 20, 30, 40, 50, 60])

    found = combined(policy, first, second, weights=[2.0, -0.5]).score(responses, prompts)
    assert found.total.tolist() == [-3.0, -6.0, -15.0, -20.0, -15.0, -18.0] and found.total.dtype == torch.float32
    expected = {"rewards/first/mean": 3.5, "rewards/second/mean": 35.0}
    assert {name: found.stats[name] for name in expected} == expected
    std = torch.tensor([1.0, 2.0, 5.0, 6.0]).double().std(correction=0)
    assert found.stats["rewards/first/std"] == pytest.approx(float(std)) and len(found.stats) == 4
    alone = combined(policy, second).score(responses, prompts)
    assert alone.total.tolist() == [10, 20, 30, 40, 50, 60] and not alone.stats


def test_a_row_without_any_reward_is_named(policy, prompts, responses):
    def none(completions):
        return [1.0, 1.0, None, 1.0, 1.0, 1.0]

    def other(completions):
        return [None] * 6

    with (
        pytest.raises(UserError, match=r"all returned None; 1 of 6 .* at least \(rows:71\)$"),
        row_locations(Responses=lambda uid: f"rows:{uid}"),
    ):
        combined(policy, none, other)(responses, prompts)


def test_async_functions_wait_together(policy, prompts, responses):
    """Each of the three waits until the others have begun, so that one after another would never end."""
    started = []

    def make(number):
        async def function(completions, **_kwargs):
            started.append(number)
            while len(started) < 3:
                await asyncio.sleep(0.001)
            return [float(number)] * len(completions)

        return function

    found = combined(policy, make(1), make(2), make(3), weights=[1, 10, 100], timeout=30).score(responses, prompts)
    assert found.total.tolist() == [321.0] * 6
    assert sorted(found.stats) == sorted(f"rewards/function{n}/{m}" for n in ("", "-2", "-3") for m in ("mean", "std"))


def test_async_functions_share_one_loop_and_run_within_another(policy, prompts, responses):
    loops = []

    async def function(completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    def returns_a_coroutine(completions):
        return function(completions)

    async def notebook():
        return combined(policy, function, returns_a_coroutine)(responses, prompts)

    assert asyncio.run(notebook()).tolist() == [2.0] * 6
    combined(policy, function)(responses, prompts)
    assert len(loops) == 3 and len(set(loops)) == 1


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_failure_is_followed_by_another_call(policy, prompts, responses, no_wait, kind):
    seen = []

    def flaky(completions):
        seen.append(list(completions))
        completions.clear()  # the next call gets whole lists
        if len(seen) < 3:
            raise ConnectionError("no route")
        return [float(len(seen))] * 6

    async def flaky_async(completions):
        return flaky(completions)

    function = flaky if kind == "plain" else flaky_async
    found = combined(policy, function, retries=2)
    assert found(responses, prompts).tolist() == [3.0] * 6
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 6
    assert [sentence.partition("; ")[2] for sentence in found.said] == [
        "called again in 0.01 s (1 of 2)",
        "called again in 0.02 s (2 of 2)",
    ]
    assert f"raised ConnectionError: no route ({__file__}:" in found.said[0]


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("retries", [0, 1])
def test_the_last_failure_names_rows_and_line(policy, prompts, responses, no_wait, kind, retries):
    def broken(completions):
        return [{}["key"] for _ in completions]

    async def broken_async(completions):
        return broken(completions)

    found = combined(policy, broken if kind == "plain" else broken_async, retries=retries)
    with (
        pytest.raises(UserError) as caught,
        row_locations(Responses=lambda uid: f"rows.jsonl:{uid}"),
    ):
        found(responses, prompts)
    text = str(caught.value)
    assert "raised KeyError: 'key' (" in text and f"{__file__}:" in text
    assert ("the last of 2 calls" in text) is bool(retries) and len(found.said) == retries
    assert text.endswith("called with 6 responses; mend the function (rows.jsonl:70, rows.jsonl:71, rows.jsonl:72)")
    assert isinstance(caught.value.__cause__.__cause__, KeyError)  # its traceback is printed by Python


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_slow_function_is_called_again_and_given_up(policy, prompts, responses, no_wait, kind):
    release, calls = threading.Event(), []

    def slow(completions):
        calls.append(torch.is_grad_enabled())
        if len(calls) != 2:
            release.wait(30)
        return [1.0] * 6

    async def slow_async(completions):
        calls.append(torch.is_grad_enabled())
        if len(calls) != 2:
            await asyncio.sleep(30)
        return [1.0] * 6

    function = slow if kind == "plain" else slow_async
    start = time.monotonic()
    try:
        assert combined(policy, function, timeout=0.2, retries=1)(responses, prompts).tolist() == [1.0] * 6
        with pytest.raises(UserError, match=r"slow\w*: took longer than reward_timeout \(0.2 s\), the last of 2 calls"):
            combined(policy, function, timeout=0.2, retries=1)(responses, prompts)
    finally:
        release.set()
    assert calls == [False] * 4 and time.monotonic() - start < 20


def test_an_iterator_of_scores_is_read_once(policy, prompts, responses):
    def scores(completions):
        return (float(i) for i, _ in enumerate(completions))

    assert combined(policy, scores)(responses, prompts).tolist() == [0, 1, 2, 3, 4, 5]


def test_text_is_no_number(policy, prompts, responses):
    for returned in ("123456", ["1", "2", "3", "4", "5", "6"]):
        with pytest.raises(UserError, match="must return one number for each response"):
            combined(policy, lambda completions, found=returned: found)(responses, prompts)


def data(folder, rows=None):
    rows = rows or [{"prompt": text, "answer": text.split()[0]} for text in toy.prompts(12)]
    return DataConfig(toy.jsonl(folder / "answers.jsonl", rows), template="plain")


def settings(folder, **changes):
    small = {"episodes": 16, "batch": 8, "minibatch": 8, "pretrain": DataConfig(), "log": LogConfig(live=False)}
    return toy.ppo(folder, **(small | {"data": changes.pop("data", None) or data(folder)} | changes))


def test_a_run_scores_each_response_by_the_columns_of_its_row(folder, capfd):
    """Training and validation rows alike, over the end of an epoch; the note on unused columns is gone."""
    seen = []

    def holds_answer(prompts, completions, answer):
        seen.extend(zip(prompts, answer, strict=True))
        return [float(text in completion.split()) for text, completion in zip(answer, completions, strict=True)]

    valid = toy.jsonl(folder / "valid.jsonl", [{"prompt": "h h .", "answer": "h"}, {"prompt": "g .", "answer": "g"}])
    cfg = settings(folder, reward=holds_answer, data=DataConfig(data(folder).path, valid, template="plain"))
    ppo.run(cfg)
    assert len(seen) >= 16 + 2 and all(prompt.split()[0] == answer for prompt, answer in seen)
    assert {("h h .", "h"), ("g .", "g")} < set(seen) and len(set(seen)) > 10
    printed = capfd.readouterr().err
    assert "is called with prompts, completions, answer, by name" in printed and "not used" not in printed
    ppo.run(settings(folder, out=str(folder / "other")))
    assert "not used: answer (12 of 12 rows)" in capfd.readouterr().err


def test_messages_reach_a_function_as_in_trl(folder):
    seen = []

    def by_turns(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0], kwargs))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": text}], "topic": i} for i, text in enumerate(toy.prompts(8))]
    ppo.run(settings(folder, reward=by_turns, data=data(folder, rows), episodes=8))
    prompt, completion, kwargs = seen[0]
    assert prompt == rows[kwargs["topic"][0]]["prompt"]
    assert completion[0]["role"] == "assistant" and set(completion[0]) == {"role", "content"}
    assert "messages" not in kwargs and len(kwargs["completion_ids"]) == 8


def test_a_column_that_no_row_has_is_named_before_anything_is_loaded(folder):
    def wrong(completions, anser):
        return anser

    words = "its parameter anser is neither prompts, completions, completion_ids nor a column of .*did you mean answer"
    cfg = settings(folder, reward=wrong, policy=ModelConfig(str(folder / "nowhere")))
    with pytest.raises(UserError, match=words):
        check_fit(cfg)
    many = [{"prompt": f"{text} a"} for text in toy.prompts(80)] + [{"prompt": "h h h h .", "late": 1}]

    def late(completions, late):
        assert set(late) <= {None, 1}
        return [1.0] * len(completions)

    assert check_fit(settings(folder, reward=late, data=data(folder, many))) == 64
    ppo.run(settings(folder, reward=late, data=data(folder, many), episodes=8))


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_a_column_that_a_function_would_not_get_is_named_before_anything_is_loaded(folder, stage):
    def by_position(outputs, answer):
        return [1.0] * len(answer)

    def with_default(texts, answer=None):
        return [1.0] * len(texts)

    def own(texts, *, factor=2.0):
        return [factor] * len(texts)

    made = data(folder, [{"prompt": t, "completion": t[:1], "answer": "a", "texts": "b"} for t in toy.prompts(8)])
    nowhere = ModelConfig(str(folder / "nowhere"))
    for function, lists in ((by_position, "prompts and responses"), (with_default, "texts ")):
        cfg = (
            settings(folder, reward=[own, function], data=made, policy=nowhere)
            if stage == "ppo"
            else toy.sft(folder, select="reward", select_reward=function, data=made, model=nowhere)
        )
        words = rf"its parameter answer is a column of \S+answers.jsonl, .* called with {lists}.* take .* completions"
        with pytest.raises(UserError, match=words):
            check_fit(cfg)
    ppo.run(settings(folder, reward=own, data=made, episodes=8))
    assert read_metrics(folder / "ppo")[-1]["objective/scores"] == 2.0


def test_the_files_own_name_of_the_prompt_may_be_a_parameters(folder):
    def judge(question, output):
        assert all(text in toy.prompts(8) for text in question)
        return [3.0] * len(output)

    made = toy.jsonl(folder / "q.jsonl", [{"question": text} for text in toy.prompts(8)])
    cfg = settings(folder, reward=judge, data=DataConfig(made, columns={"prompt": "question"}), episodes=8)
    ppo.run(cfg)
    assert read_metrics(folder / "ppo")[-1]["objective/scores"] == 3.0


def test_several_rewards_in_a_run_each_have_their_metrics(folder):
    """A reward model in a list has the checks that it has alone, and the value model starts from it."""
    reward.run(toy.reward(folder, epochs=1))

    def shorter(completions):
        return [-float(len(text.split())) for text in completions]

    cfg = settings(folder, reward=[shorter, str(folder / "reward")], reward_weights=[0.5, 2], score_scale=1.0)
    ppo.run(cfg)
    for row in read_metrics(folder / "ppo"):
        total = 0.5 * row["rewards/shorter/mean"] + 2 * row["rewards/reward/mean"]
        assert row["objective/scores"] == pytest.approx(total, abs=1e-5)
        assert row["rewards/shorter/std"] >= 0
    with pytest.raises(UserError, match="is a language model, whose scalar head was never trained"):
        check_fit(settings(folder, reward=[shorter, toy.model_at(folder)]))
    toy.tokenizer("abcdefgx").save_pretrained(folder / "reward")
    with pytest.raises(UserError, match=r"reward\): its tokenizer is not the policy's"):
        check_fit(settings(folder, reward=[shorter, str(folder / "reward")]))


def test_sft_selects_by_a_function_with_columns(folder):
    seen = []

    def holds_answer(completions, answer):
        seen.extend(answer)
        return [float(text in completion) for text, completion in zip(answer, completions, strict=True)]

    rows = [{"prompt": t, "completion": t.removesuffix(" ."), "answer": t.split()[0]} for t in toy.prompts(40)]
    made = DataConfig(toy.jsonl(folder / "d.jsonl", rows), valid_fraction=0.2, template="plain")
    sft.run(toy.sft(folder, data=made, select="reward", select_reward=holds_answer, epochs=1))
    assert seen and set(seen) <= set(toy.LETTERS)


def test_the_evaluation_calls_functions_by_name_too(folder):
    rows = [{"prompt": "a .", "chosen": "a", "rejected": "b", "best": "a"}] * 3

    def is_best(completions, best):
        return [float(text == wanted) for text, wanted in zip(completions, best, strict=True)]

    ranked = score_comparisons(is_best, toy.jsonl(folder / "c.jsonl", rows))
    assert [found.scores for found in ranked] == [(1.0, 0.0)] * 3
    with pytest.raises(UserError, match="reward is_best: needs best, which these rows do not have"):
        score_texts(is_best, ["a ."], ["a"])


PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")
def test_the_page_shows_what_runs(folder, monkeypatch):
    """The three commands, the row with its function, and the script that TRL's documentation could have."""
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    toy.model(folder / "runs" / "sft")
    reward.run(toy.reward(folder, "runs/rm", epochs=1))
    (row,) = blocks("jsonl")
    rows = [json.loads(row) | {"prompt": text} for text in toy.prompts(8)]
    toy.jsonl(folder / "prompts.jsonl", rows)
    correct, script = blocks("python")
    (folder / "my.py").write_text(correct)
    commands = [shlex.split(line) for line in blocks("")[0].splitlines()]
    small = ["--episodes=4", "--batch=4", "--minibatch=4", "--sampling.max-new-tokens=4", "--data.template=plain"]
    for number, words in enumerate(commands):
        assert main([*words[1:], *small, f"--out=runs/{number}"]) == 0
    (metrics,) = read_metrics("runs/2")
    assert metrics["rewards/correct/mean"] == 0 and "rewards/rm/mean" in metrics and number == 2

    monkeypatch.setattr(sys, "argv", ["train.py"])
    found, run, shown = {"__name__": "__main__"}, rlhf_fast.run_stage, []
    monkeypatch.setattr(rlhf_fast, "run_stage", shown.append)
    exec(script, found)
    (cfg,) = shown
    toy.assert_is_short(cfg)
    run(replace(cfg, sampling=SamplingConfig(max_new_tokens=4), episodes=4, batch=4, minibatch=4))
    (metrics,) = read_metrics("runs/verified")
    assert metrics["rewards/format_reward/mean"] == metrics["rewards/accuracy_reward/mean"] == 0
    good = {"completions": [r"It is \boxed{4}.", r"\boxed{5}", "4"], "answer": ["4", "4", "4"]}
    assert found["format_reward"](**good) == [1, 1, 0]
    assert asyncio.run(found["accuracy_reward"](**good)) == [1, 0, 0]


# TRL's own examples of reward functions (its page on the GRPO trainer), as short: by tokens, by a reference, by turns,
# by the task of a row, and one that waits.
TRL_SCRIPT = """
import asyncio
import re

from rlhf_fast import DataConfig, ModelConfig, PPOConfig, SamplingConfig, run_stage

def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def reference_reward(completions, ground_truth, **kwargs):
    return [1.0 if c[0]["content"].split()[:1] == [gt] else 0.0 for c, gt in zip(completions, ground_truth)]

def math_reward(prompts, completions, task, **kwargs):
    return [float(len(p[-1]["content"])) if t == "math" else None for p, c, t in zip(prompts, completions, task)]

def coding_reward(prompts, completions, task, **kwargs):
    return [-1.0 if t == "coding" else None for t in task]

async def slow_reward(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [1.0 if c else 0.0 for c in completions]

functions = [length_reward, reference_reward, math_reward, coding_reward, slow_reward]
run_stage(PPOConfig(out="out", policy=ModelConfig("model"), reward=functions, data=DataConfig("data.jsonl"),
                    sampling=SamplingConfig(max_new_tokens=4), episodes=8, batch=8, minibatch=8))
"""


def test_trls_kinds_of_functions_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    toy.model_at(folder)
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "ground_truth": "a",
            "task": ("math", "coding")[i % 2],
            "solution": "a",
        }
        for i, text in enumerate(["a b"] * 4 + ["c"] * 4)
    ]
    toy.jsonl(folder / "data.jsonl", rows)
    exec(TRL_SCRIPT, {"__name__": "trl_script"})
    (row,) = read_metrics("out")
    assert row["rewards/math_reward/mean"] == 2.0 and row["rewards/coding_reward/mean"] == -1.0
    assert row["rewards/length_reward/mean"] == row["tokens/length"] and row["rewards/slow_reward/mean"] == 1.0
    parts = row["rewards/length_reward/mean"] + row["rewards/reference_reward/mean"] + 1.0
    assert row["objective/scores"] == pytest.approx(parts + (2.0 - 1.0) / 2, abs=1e-6)


def test_rewards_stand_alone_too(policy, responses):
    """Without prompts, a function that is called by names gets the decoded prompts."""
    found = Reward([FunctionReward(lambda prompts, completions: [float(len(p)) for p in prompts], policy.tokenizer)])
    assert found(responses).tolist() == [5.0, 5.0, 3.0, 3.0, 7.0, 7.0]


@pytest.mark.parametrize("timeout", [0.0, 5.0])
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_a_function_that_exits_is_an_error(kind, timeout):
    """Out of a task of asyncio an exit ends the loop, and the run would wait for ever."""

    async def leaves(completions, **kwargs):
        sys.exit(3)

    def plain_leaves(completions, **kwargs):
        sys.exit(3)

    call = Call("leaves", functools.partial(leaves if kind == "async" else plain_leaves, ["a"]), [0], kind == "async")
    with pytest.raises(BadRows, match="SystemExit"):
        call_all([call], CallLimits(timeout, 0), print)
