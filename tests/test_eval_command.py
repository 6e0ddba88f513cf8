"""`rlhf-fast eval` from end to end, on the demo's base models and the sets of its world."""

import contextlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.config.evaluation import EvalConfig, JudgeConfig
from rlhf_fast.config.fields import LogConfig, ModelConfig
from rlhf_fast.demo.run import BASE_MODELS
from rlhf_fast.errors import UserError
from rlhf_fast.eval import answers as answers_module
from rlhf_fast.eval import evaluate as evaluate_module
from rlhf_fast.eval import run_task
from rlhf_fast.eval.evaluate import evaluate
from rlhf_fast.eval.sets import DEMO_SETS
from rlhf_fast.eval.tasks import TASKS
from rlhf_fast.model.model import Model
from rlhf_fast.run.logs import read_metrics
from rlhf_fast.run.outputs import take_lock
from rlhf_fast.run.plot import panels

pytestmark = pytest.mark.usefixtures("one_thread", "folder")
SMALL, LARGE = str(BASE_MODELS / "small"), str(BASE_MODELS / "large")
MODELS = (f"base={SMALL}", f"large={LARGE}")
JUDGES = """
import math

def shorter(prompts, first, second):
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second)]

def first_always(prompts, first, second):
    return [1.0 for _ in first]

def all_refused(answers):
    return [1.0 for _ in answers]

def nan_at_three(answers):
    return [math.nan if i == 3 else 0.0 for i in range(len(answers))]

def counted(prompts, answers):
    with open("asked.txt", "a") as stream:
        stream.writelines(f"{pair!r}\\n" for pair in zip(prompts, answers))
    return [float(len(answer) % 2) for answer in answers]

def one_too_few(answers):
    return [0.0 for _ in answers[1:]]

def length(texts):
    return [float(len(text)) for text in texts]
"""


def config(**changes) -> EvalConfig:
    return EvalConfig(**{"models": MODELS, "out": "runs/eval", "limit": 8, **changes})


def quiet(_line: str) -> None:
    """Say nothing."""


def without_seconds(results: dict) -> dict:
    return {**results, "results": [{**record, "seconds": None} for record in results["results"]]}


def forbid_loading(monkeypatch) -> None:
    def fail(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Model, "load", fail)


@pytest.fixture
def judges(folder, monkeypatch):
    (folder / "eval_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(folder))
    return "eval_judges"


@pytest.mark.slow
def test_all_tasks_of_two_models(judges, monkeypatch, capsys):
    """The results, a run that is killed and started again, one with nothing to do, and another judge."""
    cfg = config(judge=JudgeConfig(preference=f"{judges}:shorter"))
    results = evaluate(cfg, quiet)
    found = {(record["model"], record["task"]) for record in results["results"]}
    tasks = TASKS.keys() - {"truthfulqa_instruction"}  # which asks the same of rows with prompts of their own
    assert found == {(model, task) for model in ("base", "large") for task in tasks}
    assert any(note.startswith("truthfulqa_instruction was left out: its rows have") for note in results["notes"])
    for record in results["results"]:
        assert any(
            fnmatchcase(record["measure"], name)
            for name in (*TASKS[record["task"]].measure_names, "harmful_minus_safe")
        )
        assert record["n"] > 0 and record["value"] is not None
        assert record["low"] <= record["value"] <= record["high"], record
    compared = {record["task"] for record in results["differences"]}
    assert compared == tasks and {r["baseline"] for r in results["differences"]} == {"base"}
    assert results["judges"].keys() == {"truth", "informative", "toxicity", "refusal", "preference"}
    assert results["judges"]["preference"]["validation"] is None
    report = Path("runs/eval/report.md").read_text()
    assert "preference: eval_judges:shorter: not validated" in report and "InstructGPT paper" in report
    assert Path("runs/eval/report.png").stat().st_size > 10_000
    written = json.loads(Path("runs/eval/results.json").read_text())
    assert written == json.loads(json.dumps(results))

    # killed within a task of the second model
    calls = []
    score = run_task.score_rows

    def killed(model, task, rows, encoder):
        calls.append(task.name)
        if len(calls) == 23:
            raise KeyboardInterrupt
        return score(model, task, rows, encoder)

    monkeypatch.setattr(run_task, "FIRST_BLOCK", 3)
    monkeypatch.setattr(run_task, "MAX_BLOCK", 3)
    monkeypatch.setattr(run_task, "score_rows", killed)
    again = config(out="runs/killed", judge=cfg.judge)
    with pytest.raises(KeyboardInterrupt):
        evaluate(again, quiet)
    assert not Path("runs/killed/results.json").exists()
    half = next(Path("runs/killed/answers/base").glob(f"{calls[-1]}.jsonl"))
    assert 0 < len(half.read_text().splitlines()) < 8
    with half.open("a") as stream:  # torn by the kill
        stream.write('{"key": "1234')
    assert without_seconds(evaluate(again, quiet)) == without_seconds(results)

    # nothing to do, and another judge: no model is loaded
    forbid_loading(monkeypatch)
    assert without_seconds(evaluate(cfg, quiet)) == without_seconds(results)
    other = evaluate(replace(cfg, judge=replace(cfg.judge, refusal=f"{judges}:all_refused")), quiet)
    rates = [r["value"] for r in other["results"] if r["measure"] == "refusal_rate"]
    assert rates == [1.0] * 4 and other["judges"]["refusal"]["name"] == f"{judges}:all_refused"


def test_more_rows_are_added_to_what_is_there(monkeypatch):
    evaluate(config(tasks=("lambada",), limit=4), quiet)
    asked = []
    score = run_task.score_rows

    def counted(model, task, rows, encoder):
        asked.append(len(rows))
        return score(model, task, rows, encoder)

    monkeypatch.setattr(run_task, "score_rows", counted)
    more = evaluate(config(tasks=("lambada",), limit=9), quiet)
    new = asked[0]
    assert asked == [new, new] and 0 < new <= 5
    assert {r["n"] for r in more["results"]} == {4 + new}  # one may be there twice
    fewer = evaluate(config(tasks=("lambada",), limit=4), quiet)
    assert len(asked) == 2 and {r["n"] for r in fewer["results"]} == {4}


@pytest.mark.parametrize(("seconds", "sizes"), [(0.0, [2, 1, 1, 1, 1]), (1e9, [2, 3, 1])])
def test_answers_are_kept_every_few_seconds(monkeypatch, seconds, sizes):
    """After blocks of as many rows as take so long."""
    for name, value in (("FIRST_BLOCK", 2), ("MAX_BLOCK", 3), ("BLOCK_SECONDS", seconds)):
        monkeypatch.setattr(run_task, name, value)
    asked, kept = [], []
    answer = run_task.answer_rows

    def counted(model, task, rows, *others):
        path = Path("runs/eval/answers/base/refusal.jsonl")
        kept.append(len(path.read_text().splitlines()) if path.exists() else 0)
        asked.append(len(rows))
        return answer(model, task, rows, *others)

    monkeypatch.setattr(run_task, "answer_rows", counted)
    (Path("sets")).mkdir()
    rows = [{"prompt": f"where is {word} ?", "kind": "harmful", "source": "x"} for word in "abcdef"]
    toy.jsonl(Path("sets/harmful_prompts.jsonl"), rows)
    evaluate(config(tasks=("refusal",), data="sets", models=(f"base={SMALL}",)), quiet)
    assert asked == sizes and kept == [sum(sizes[:i]) for i in range(len(sizes))]


def test_progress_is_said_every_few_seconds(monkeypatch):
    """Not after each block, where these are short."""
    monkeypatch.setattr(run_task, "FIRST_BLOCK", 1)
    monkeypatch.setattr(run_task, "MAX_BLOCK", 1)
    for seconds, out, expected in ((5.0, "slow", 0), (0.0, "fast", 3)):
        monkeypatch.setattr(evaluate_module, "PROGRESS_SECONDS", seconds)
        lines = []
        evaluate(config(tasks=("text",), models=(f"base={SMALL}",), limit=4, out=out), lines.append)
        assert len([line for line in lines if " of 4 rows" in line]) == expected and "4 rows, " in lines[-1]


def test_models_that_leave_the_report_are_said(monkeypatch):
    """Their answers stay, and naming them again computes nothing."""
    evaluate(config(tasks=("lambada",)), quiet)
    lines: list[str] = []
    evaluate(config(models=MODELS[:1], tasks=("lambada",)), lines.append)
    (said,) = [line for line in lines if line.startswith("the report in runs/eval had also large, whose answers")]
    assert "name them again in models for a report of all, or give another out" in said
    forbid_loading(monkeypatch)
    lines.clear()
    Path("runs/eval/results.json").write_text("{")  # damaged, which costs nothing but that line
    results = evaluate(config(tasks=("lambada",)), lines.append)
    assert results["meta"]["models"].keys() == {"base", "large"} and not any("had also" in line for line in lines)


def test_one_process_at_a_time(monkeypatch):
    one = config(tasks=("lambada",), models=(f"base={SMALL}",), limit=1)
    evaluate(one, quiet)
    with take_lock("runs/eval/answers", "runs/eval"), pytest.raises(UserError, match="another process runs there"):
        evaluate(one, quiet)
    evaluate(one, quiet)


def test_losses_of_a_token_are_compared_for_one_tokenizer(folder):
    """Bits a byte alone are, where another one has other tokens."""
    shutil.copytree(SMALL, "other")
    words = json.loads(Path("other/tokenizer.json").read_text())
    del words["model"]["vocab"][next(word for word in words["model"]["vocab"] if word == "baker")]
    words["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
    Path("other/tokenizer.json").write_text(json.dumps(words))
    for other, expected in ((LARGE, {"nats_per_token", "bits_per_byte"}), ("other", {"bits_per_byte"})):
        cfg = config(tasks=("text",), models=(f"base={SMALL}", f"other={other}"), out=f"runs/{Path(other).name}")
        assert {record["measure"] for record in evaluate(cfg, quiet)["differences"]} == expected


def test_answers_hang_on_the_model_and_the_settings(monkeypatch):
    """Answers that were made with another model, dtype, template or temperature are made again."""
    asked = []
    answer = run_task.answer_rows

    def counted(model, task, rows, *others):
        asked.append(len(rows))
        return answer(model, task, rows, *others)

    monkeypatch.setattr(run_task, "answer_rows", counted)
    one = {"tasks": ("over_refusal",), "models": (f"base={SMALL}",)}
    for changes in ({}, {"dtype": "bfloat16"}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1},
                    {"max_new_tokens": 5}, {"models": (f"base={LARGE}",)}):  # fmt: skip
        before = len(asked)
        for _ in range(2):
            evaluate(config(**{**one, **changes}), quiet)
        assert len(asked) == before + 1, changes


def test_win_rates(judges):
    cfg = config(tasks=("preference",), judge=JudgeConfig(preference=f"{judges}:first_always"))
    found = {r["measure"]: r for r in evaluate(cfg, quiet)["results"] if r["model"] == "large"}
    assert found["win_rate"]["value"] == 0.5 and found["flips"]["value"] == 1.0
    assert found["win_rate"]["n"] == found["longer_wins"]["n"] == 8


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--models base={small} base={large}", "models: two are called base ("),
        ("--models {small} {small}", "models: two are called small ("),
        ("--models", "models"),
        ("{small}", "models are given by a flag; write --models NAME={small}"),
        ("a={small} {large} --tasks tax", "write --models a={small} NAME={large}"),
        ("--models base={small} --taks tax", "Unrecognized options: --taks, tax; did you mean --tasks?"),
        ("--models base={small} --judge.refusel x", "did you mean --judge.refusal?"),
        ("--list False", "--list takes no value: give --list alone"),
        ("--models base={small} --temperature inf", "eval: temperature must be at least 0 and finite, got inf"),
        ("--models base={small} --temperature nan", "eval: temperature must be at least 0 and finite, got nan"),
        ("--models base={small} --temperature -1", "eval: temperature must be at least 0, got -1.0"),
        ("--models base={small} --fail-under lambada=inf", "fail_under: 'lambada=inf' is not TASK=VALUE"),
        ("--models base={small} --seed -1", "eval: seed must be from 0 to below 2**63, got -1"),
        (
            "--models base={small} y={small}/..",
            "{small}/..: is the folder of no model (it has no config.json); give one",
        ),
        ("--models base={small} y=other/thesis.txt", "other/thesis.txt: is a file; give the folder of a model"),
        ("--models base={small} y=empty", "empty: is the folder of no model (it has no config.json); look at the path"),
        ("--models base={small} --reward empty", "empty: is the folder of no model"),
        ("--models base={small} --template chat", "eval: template is chat, but the tokenizer of {small} has no chat"),
        ("--models base={small} y=rm", "eval: models: y: rm"),
        ("--models a=", "models: 'a=' is not NAME=MODEL; write for instance sft=runs/sft"),
        ("--models base={small} --tasks hellaswagg", "tasks: there is no 'hellaswagg'; did you mean hellaswag?"),
        ("--models base={small} --baseline sft", "baseline sft is not one of the models base"),
        ("--models base={small} --tasks lambada --data nowhere", "nowhere: is no folder that can be read"),
        ("--models base={small} --tasks lambada --data empty", "empty: has no file of the set lambada: lambada"),
        ("--models base={small} --tasks refusal,tax --data text", "text: has no file of the set harmful_prompts"),
        ("--models base={small} --tasks tax toxicity --data text", "no file of the set toxicity_prompts"),
        ("--models base={small} --data empty", "empty: has no set that these tasks read (it holds nothing)"),
        ("--models base={small} --data other", "other: has no set that these tasks read (it holds thesis.txt)"),
        ("--models base={small} --tasks ,", "tasks: no name is given"),
        ("--models base={small} --label 1", "label must be at least 2"),
        ("--models base={small} --tasks lambada --label 4", "label: none of the tasks has a judge"),
        (
            "--models base={small} x={large} --tasks preference --judge.preference eval_judges:shorter --label 4",
            "label: none of the tasks has a judge of single answers",
        ),
        ("--models base={small} --tasks lambada --fail-under base:text=1", "fail_under base:text: no task"),
        (
            "--models base={small} --tasks lambada --fail-under bose:lambada=1",
            "no model is called bose; did you mean base?",
        ),
        (
            "--models base={small} --tasks refusal --judge.refusal strickt",
            "a JSONL file of labels, strict, any or chat",
        ),
        ("--models base={small} --tasks preference tax", "preference cannot be run: it compares models"),
        ("--models base={small} --tasks preference", "preference cannot be run: it compares models"),
        ("--models base={small} x={large} --tasks preference", "preference cannot be run: no judge"),
        ("--models base={small} --fail-under preference", "fail_under: 'preference' is not TASK=VALUE"),
        (
            "--models base={small} --tasks lambada --fail-under lambda=0.1",
            "fail_under lambda: no task that runs has that name; did you mean lambada?",
        ),
        (
            "--models base={small} --tasks lambada --fail-under base:lambada.accc=0.1",
            "fail_under base:lambada.accc: lambada has no measure 'accc'; did you mean acc?",
        ),
        (
            "--models base={small} --tasks text --fail-under text.acc=0.1",
            "fail_under text.acc: text has no measure 'acc'; there are nats_per_token, bits_per_byte",
        ),
        (
            "--models base={small} --tasks over_refusal --fail-under over_refusal.harmful_minus_safe=0.1",
            "over_refusal has no measure 'harmful_minus_safe'; there are refusal_rate, refusal_rate_*, empty",
        ),
        (
            "--models base={small} --tasks tax --reward eval_judges:length --fail-under reward_model.acc=1",
            "reward_model has no measure 'acc'; there are pair_accuracy, best_of_k",
        ),
        ("--models base={small} --tasks lambada --out other", "other: is not empty and no evaluation of ours is in it"),
        ("--models base={small} --tasks refusal --judge.refusal eval_judges:nan_at_three", "not finite"),
        ("--models base={small} --tasks refusal --judge.refusal eval_judges:one_too_few", "for 8 answers"),
        ("--models base={small} --tasks refusal --judge.refusal eval_judges:nothing", "cannot be imported"),
        ("--models base={small} --tasks refusal --judge.refusal missing.jsonl", "missing.jsonl"),
        ("--models base={small} --gold x:y", "gold is compared with `reward`, which is not set"),
        ("--models base={small} --data empty --reward {small}", "eval: reward: empty has no file of ranked responses"),
        ("--models base={small} --tasks lambada --reward {small}", "reward: {small} is no reward model"),
        (
            "--models base={small} --tasks lambada --reward eval_judges:length --gold eval_judges:length",
            "gold: none of the models (base) is the folder of a PPO run with samples.jsonl",
        ),
    ],
)
def test_bad_input(judges, folder, capsys, arguments, sentence):
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "thesis.txt").write_text("mine")
    (folder / "rm").mkdir()
    (folder / "text").mkdir()
    toy.jsonl(folder / "text" / "text.jsonl", [{"text": "anna is a nurse ."}])
    toy.jsonl(folder / "rm" / "config.json", [{"architectures": ["LlamaForSequenceClassification"]}])
    words = arguments.format(small=SMALL, large=LARGE).split()
    assert main(["eval", *words, "--limit", "8"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rlhf-fast: error: ") and sentence.format(small=SMALL, large=LARGE) in error, error
    assert (folder / "other" / "thesis.txt").read_text() == "mine"


def test_help_at_80_columns(capsys, monkeypatch):
    """Lines are full, or end a sentence; and most flags have their text beside them."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) == 80 and "\n- each figure with" in shown
    boxes = shown[shown.index("  -h, --help") :].splitlines()
    lines = [line.strip("│| ") for line in boxes if set(line) - set("│-─ ")]
    flags = [line for line in lines if line.startswith("-")]
    assert len(lines) < 90 and len(flags) > 25 and sum("  " in line for line in flags) > 12
    for line, following in pairwise(lines):
        text = line.rpartition("  ")[2]
        if not following.startswith("-") and not text.startswith("-") and text[-1:] not in ".)s":
            assert len(text) + len(following.split()[0]) > 56, text


def test_missing_labels_are_asked_for_and_nothing_is_lost(folder, capsys, monkeypatch):
    (folder / "labels.jsonl").write_text("")
    rows = ["eval", "--models", f"base={SMALL}", "--tasks", "over_refusal", "--limit", "8", "--out", "out"]
    (folder / "labels.jsonl").write_text('{"prompt": "another", "answer": "no", "label": true, "labeler": "a"}\n')
    assert main([*rows, "--judge.refusal", "labels.jsonl"]) == 2
    assert "to_label.jsonl" in capsys.readouterr().err
    asked = [json.loads(line) for line in (folder / "out" / "to_label.jsonl").read_text().splitlines()]
    assert 0 < len(asked) <= 8 and all(row["label"] is None for row in asked)
    filled = [{**row, "label": i % 2 == 0, "labeler": "a"} for i, row in enumerate(asked)]
    (folder / "filled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
    forbid_loading(monkeypatch)  # the answers are there
    assert main([*rows, "--judge.refusal", "filled.jsonl"]) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert next(r["value"] for r in results["results"] if r["measure"] == "refusal_rate") > 0
    assert main([*rows, "--judge-labels", "filled.jsonl"]) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["judges"]["refusal"]["validation"]["labels"] == "a"


def test_all_missing_labels_are_asked_for_at_once(folder, capsys, monkeypatch):
    """The file has those of every task and role, and the same command goes on when they are there."""
    flags = ["--judge.toxicity", "labels.jsonl", "--judge.refusal", "labels.jsonl", "--judge.preference", "pairs.jsonl"]
    rows = ["eval", "--models", *MODELS, "--tasks", "preference,toxicity,refusal", "--limit", "8", "--out", "out"]
    assert main([*rows, *flags]) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    asked = [json.loads(line) for line in (folder / "out" / "to_label.jsonl").read_text().splitlines()]
    count = Counter(row["role"] for row in asked)
    assert min(count.values()) >= 5 and count.keys() == {"toxicity", "refusal", "preference"}
    for role, number in count.items():
        assert re.search(rf"\b{number} of \d+ {'pairs' if role == 'preference' else 'answers'} have no label", error)
    assert "append its rows to labels.jsonl (a new file) and to pairs.jsonl (a new file) and start the same" in error
    ours = {
        row["answer"] for row in map(json.loads, Path("out/answers/large/preference.jsonl").read_text().splitlines())
    }
    sides = [row["first"] in ours for row in asked if row["role"] == "preference"]
    assert any(sides) and not all(sides), "the order gives the model away"
    filled = [{**row, "label": "first" if row["role"] == "preference" else True} for row in asked]
    for name in ("labels.jsonl", "pairs.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in filled))
    forbid_loading(monkeypatch)
    assert main([*rows, *flags]) == 0
    results = json.loads((folder / "out" / "results.json").read_text())["results"]
    assert {r["value"] for r in results if r["measure"] == "refusal_rate"} == {1.0}


def test_a_kill_between_two_writes_leaves_no_other_models_answers(monkeypatch):
    """Two models under one name: whenever the second one is killed, the first one's figures are its own."""
    first = {"tasks": ("lambada",), "models": (f"m={SMALL}",), "limit": 8}
    expected = without_seconds(evaluate(config(**first), quiet))
    writes = [(answers_module.AnswerFile, "_lines"), (answers_module.os, "fsync"), (Path, "replace"), (Path, "open")]
    for owner, name in writes:
        for nth in (1, 2):
            calls = []
            original = getattr(owner, name)

            def failing(*args, calls=calls, nth=nth, original=original, **kwargs):
                calls.append(args)
                if len(calls) == nth and (not isinstance(args[0], Path) or "lambada.jsonl" in args[0].name):
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with contextlib.suppress(KeyboardInterrupt):
                    evaluate(config(**{**first, "models": (f"m={LARGE}",)}), quiet)
            assert without_seconds(evaluate(config(**first), quiet)) == expected, (name, nth)


def test_a_damaged_file_of_answers_is_made_again():
    cfg = config(tasks=("lambada",), models=(f"m={SMALL}",))
    expected = without_seconds(evaluate(cfg, quiet))
    file = Path("runs/eval/answers/m/lambada.jsonl")
    content = file.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        b"null\n[1]\n{}\n" + content[50:],
        content.replace(b"{", b"(", 2),
    ):
        file.write_bytes(damaged)
        assert without_seconds(evaluate(cfg, quiet)) == expected
        assert file.read_bytes().count(b"\n") == 8


def test_equal_rows_are_one_independent_thing(folder, judges):
    (folder / "sets").mkdir()
    rows = (DEMO_SETS / "lambada.jsonl").read_text().splitlines()[:5]
    (folder / "sets" / "lambada.jsonl").write_text("\n".join(rows * 20) + "\n")
    prompts = [{"prompt": f"is {name} a {thing} ?"} for name in ("gus", "kurt") for thing in ("dog", "hen")]
    toy.jsonl(folder / "sets" / "prompts.jsonl", prompts * 3)
    judge = JudgeConfig(preference=f"{judges}:shorter")
    results = evaluate(config(data="sets", tasks=("lambada", "preference"), limit=0, judge=judge), quiet)
    assert {(record["task"], record["n"]) for record in results["results"]} == {("lambada", 5), ("preference", 4)}
    assert any(record["measure"] == "win_rate" for record in results["results"])


def test_unknown_tokens_are_said(folder):
    (folder / "sets").mkdir()
    toy.jsonl(folder / "sets" / "lambada.jsonl", [{"context": "The quick brown", "target": "fox"}])
    results = evaluate(config(data="sets", tasks=("lambada",), models=(f"base={SMALL}",)), quiet)
    assert any("of the tokens are unknown to base's tokenizer" in note for note in results["notes"])


def test_mistakes_are_found_before_a_model_is_loaded(monkeypatch, capsys):
    forbid_loading(monkeypatch)
    rows = ["eval", "--models", *MODELS, "--tasks", "lambada", "--limit", "8"]
    thresholds = (["--fail-under", "lambda=1"], ["--fail-under", "lambada.accc=1"])
    for wrong in (*thresholds, ["--label", "4"], ["--reward", "nowhere"], ["--judge.truth", "no:way"]):
        tasks = ["--tasks", "lambada,truth"] if "--judge.truth" in wrong else []
        assert main([*rows, *tasks, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_threshold_is_an_exit_status(capsys):
    rows = ["eval", "--models", *MODELS, "--tasks", "lambada", "--limit", "8"]
    assert main([*rows, "--fail-under", "lambada=0.99", "base:lambada=0"]) == 1
    captured = capsys.readouterr()
    assert "large: lambada.acc is" in captured.err and "below 0.99" in captured.err and "Results" in captured.out
    assert main([*rows, "--fail-under", "lambada=0", "lambada.acc=0", "base:lambada.perplexity=1e9"]) == 0
    known = ["refusal.harmful_minus_safe=-1", "toxicity.toxic_bin_1=1", "refusal.refusal_rate_demo=0"]
    evaluate_module.check(config(tasks=("refusal", "toxicity"), fail_under=tuple(known)))


def test_a_reward_on_the_demos_ranked_responses(judges, capsys):
    """Without --data. Thresholds are those of the last language model, or the reward's own."""
    rows = ["eval", "--models", *MODELS, "--tasks", "lambada", "--limit", "8", "--reward", f"{judges}:length"]
    assert main([*rows, "--fail-under", "lambada=0.99", "reward_model=0.99", "base:lambada=0"]) == 1
    captured = capsys.readouterr()
    assert "large: lambada.acc is" in captured.err and f"{judges}:length: reward_model.pair_accuracy is" in captured.err
    title = f"Reward model {judges}:length on rankings.jsonl"
    assert title in captured.out and "|" not in captured.out and "pairs of 8 prompts" in captured.out
    results = json.loads(Path("runs/eval/results.json").read_text())
    assert {(r["task"], r["model"]) for r in results["reward"]} == {("reward_model", f"{judges}:length")}
    assert f"## {title}" in Path("runs/eval/report.md").read_text()


def test_the_list_names_every_task(capsys, monkeypatch):
    """Each on a line, and on a narrow terminal with its summary below it."""
    for columns in ("1000", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["eval", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in lines[1:] if not line.startswith(" ")} == set(TASKS)
        assert max(map(len, lines)) <= int(columns)
        assert len(lines) == 1 + len(TASKS) or columns == "80"
    text = " ".join(" ".join(lines).split())
    assert f"{TASKS['truthfulqa'].summary}; judge: truth, informative" in text and TASKS["lambada"].summary in text


def test_a_task_of_a_group_without_its_file_is_left_out(folder):
    (folder / "sets").mkdir()
    rows = (DEMO_SETS / "lambada.jsonl").read_text().splitlines()[:5]
    (folder / "sets" / "lambada.jsonl").write_text("\n".join(rows) + "\n")
    results = evaluate(config(data="sets", tasks=("tax", "bias")), quiet)
    assert {record["task"] for record in results["results"]} == {"lambada"}
    left_out = next(note for note in results["notes"] if note.startswith("Left out, because sets has no file"))
    assert "hellaswag (hellaswag.jsonl)" in left_out and "winogender_biased (winogender.jsonl)" in left_out


def test_people_are_asked_about_answers(folder, judges):
    """And the judge is asked about none of them again, nor twice about two models' equal answers."""
    models = (*MODELS, f"again={SMALL}")
    cfg = config(models=models, tasks=("toxicity",), judge=JudgeConfig(toxicity=f"{judges}:counted"))
    results = evaluate(cfg, quiet, label=6)
    answers = {
        (row["prompt"], row["answer"])
        for file in Path("runs/eval/answers").glob("*/*.jsonl")
        for row in map(json.loads, file.read_text().splitlines())
    }
    asked = (folder / "asked.txt").read_text().splitlines()
    assert len(asked) == len(answers) == len(set(asked)) > 8
    rows = [json.loads(line) for line in (folder / "runs/eval/to_label.jsonl").read_text().splitlines()]
    assert len(rows) <= 6 and {row["role"] for row in rows} == {"toxicity"} and results["judges"].keys() == {"toxicity"}


def test_a_missing_matplotlib_costs_the_picture_alone(monkeypatch, folder, capsys):
    def fail(*_):
        raise UserError("matplotlib is not installed")

    monkeypatch.setattr(evaluate_module, "draw", fail)
    evaluate(config(tasks=("lambada",)), quiet)
    assert "no picture: matplotlib is not installed" in capsys.readouterr().err
    assert (folder / "runs/eval/report.md").is_file() and not (folder / "runs/eval/report.png").exists()


def test_figures_in_training_are_those_of_the_command(folder):
    """log.eval_every: the last step's metrics, and the finished folder's results."""
    from rlhf_fast.stages import sft

    model = toy.model(folder / "model")
    text = {"text": "a b c . a b c"}
    (folder / "sets").mkdir()
    toy.jsonl(folder / "sets" / "text.jsonl", [text, {"text": "d e f . d"}, {"text": "h a . h"}])
    toy.jsonl(folder / "sets" / "lambada.jsonl", [{"context": "a b", "target": "c"}, {"context": "d", "target": "e"}])
    prompts = [{"prompt": f"{a} {b} .", "kind": "harmful", "category": "x", "source": "y"} for a in "ab" for b in "cd"]
    toy.jsonl(folder / "sets" / "harmful_prompts.jsonl", prompts)
    log = LogConfig(live=False, eval_every=2, eval_data="sets", eval_tasks=("tax", "refusal"))
    cfg = toy.sft(folder, log=log, select="last", model=ModelConfig(path=model))
    sft.run(cfg)
    rows = [row for row in read_metrics(cfg.out) if "eval/lambada.acc" in row]
    assert len(rows) >= 2 and rows[-1]["step"] == read_metrics(cfg.out)[-1]["step"]
    titles = [title for title, _ in panels(read_metrics(cfg.out))]
    assert {"eval/lambada", "eval/text", "eval/refusal"} <= set(titles)
    results = evaluate(EvalConfig(models=(f"sft={cfg.out}",), data="sets", tasks=("tax", "refusal")), quiet)
    for record in results["results"]:
        metric = rows[-1][f"eval/{record['task']}.{record['measure']}"]
        assert metric == pytest.approx(record["value"], rel=1e-6), record


def test_a_recipe_evaluates_its_models(folder, capsys):
    """The model that it starts from and those that it makes, without a word on them; and its thresholds."""
    model = toy.model(folder / "model")
    toy.demonstrations(folder / "demonstrations.jsonl", 24)
    (folder / "sets").mkdir()
    toy.jsonl(folder / "sets" / "lambada.jsonl", [{"context": "a b", "target": "c"}, {"context": "d", "target": "e"}])
    recipe = f"""\
out: runs
sft:
  model.path: {model}
  data.path: demonstrations.jsonl
  epochs: 1
  log.live: false
eval:
  data: sets
  tasks: [tax]
  fail_under: ["lambada=2", "base:lambada=0"]
"""
    (folder / "recipe.yaml").write_text(recipe)
    for _ in range(2):  # the second time all is there
        assert main(["run", "recipe.yaml"]) == 1
        assert "sft: lambada.acc is" in capsys.readouterr().err
    results = json.loads((folder / "runs" / "eval" / "results.json").read_text())
    assert list(results["meta"]["models"]) == ["base", "sft"]
    sft = folder / "again" / "sft"
    for wrong, sentence in (("tasks: [taxx]", "there is no 'taxx'"), ("tasks: [text]", "has no file of the set text")):
        (folder / "recipe.yaml").write_text(recipe.replace("tasks: [tax]", wrong).replace("out: runs", "out: again"))
        assert main(["run", "recipe.yaml"]) == 2 and not sft.exists()  # before anything is trained
        assert sentence in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(recipe.replace("tasks: [tax]", "taskz: [tax]"))
    assert main(["run", "recipe.yaml"]) == 2
    assert 'eval: no setting "taskz"; did you mean tasks? (recipe.yaml:9)' in capsys.readouterr().err
