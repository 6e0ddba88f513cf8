"""Notes on windows, on answers that are cut or all the same, and on the date in the prompts of an evaluation."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import toy
from test_chat_templates import TOY_DATED
from test_eval_command import SMALL, config, quiet
from test_eval_judges import QUESTION

from rlhf_fast.data.encode import PromptFormat
from rlhf_fast.eval import evaluate as evaluate_module
from rlhf_fast.eval import run_task
from rlhf_fast.eval.evaluate import evaluate
from rlhf_fast.eval.judges import load_answer_judge
from rlhf_fast.eval.judges.cached import CachedJudge
from rlhf_fast.eval.judges.functions import FunctionJudge
from rlhf_fast.eval.notes import CONSTANT_ANSWERS, answer_notes, constant_answers_note
from rlhf_fast.eval.tasks import TASKS
from rlhf_fast.run import prompt_format
from rlhf_fast.run.prompt_format import as_json

pytestmark = pytest.mark.usefixtures("one_thread", "folder")


def test_windows_that_positions_shorten_are_said(folder):
    """By the models that have fewer positions than a window has tokens, and not for texts that fit."""
    (folder / "sets").mkdir()
    shutil.copytree(SMALL, folder / "wide")
    settings = json.loads((folder / "wide" / "config.json").read_text())
    (folder / "wide" / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 2048}))
    for count in (20, 30):  # 100 and 150 tokens
        toy.jsonl(folder / "sets" / "text.jsonl", [{"text": "anna is a nurse . " * count}, {"text": "ben ."}])
        results = evaluate(config(data="sets", tasks=("text",), models=(f"base={SMALL}", "wide=wide")), quiet)
        found = [note for note in results["notes"] if "windows have" in note]
        assert [note.partition(",")[0] for note in found] == ["text: base has 128 positions"] * (count == 30)
    assert "its windows have 128 tokens and not 1024: its figures cannot be compared" in found[0]


def test_answers_that_are_cut_are_said():
    """By the share above 5 %; not where the task asks for the first tokens of a text."""
    tasks = ("refusal", "toxicity", "truthfulqa")
    for limit, is_cut in ((1, True), (0, False)):
        results = evaluate(config(tasks=tasks, models=(f"base={SMALL}",), max_new_tokens=limit), quiet)
        found = [note for note in results["notes"] if "cut before their end" in note]
        assert (
            any(note.startswith("refusal: answers") and "100 % of base's at 1 tokens" in note for note in found)
            == is_cut
        )
        assert not any(note.startswith("toxicity") for note in found)
        expected = {"truthfulqa": 64, "toxicity": 20, "toxicity_respectful": 20, "toxicity_biased": 20,
                    "refusal": 128, "over_refusal": 128}  # fmt: skip
        assert results["meta"]["max_new_tokens"] == {name: limit or count for name, count in expected.items()}
    own = {"finished": True, "tokens": 3, "unknown": 0.0, "overlong": False, "answer": ""}
    cut = {**own, "finished": False, "tokens": 128}
    records = {"a": [own] * 19 + [cut], "b": [own] * 18 + [cut] * 2, "c": [own]}
    assert answer_notes(TASKS["refusal"], records) == [
        "refusal: answers were cut before their end: 10 % of b's at 128 tokens."
    ]


def test_the_date_in_a_template_is_that_of_the_folder(folder, monkeypatch):
    """On another day too, for a resumed evaluation and for a second model. A run's own date wins."""
    words = toy.tokenizer()
    words.chat_template = TOY_DATED
    for name in ("one", "two", "run"):
        toy.model(folder / name)
        words.save_pretrained(folder / name)
    (folder / "sets").mkdir()
    prompts = [{"prompt": f"{x} .", "kind": "harmful", "source": "demo"} for x in "cdefgh"]
    toy.jsonl(folder / "sets" / "harmful_prompts.jsonl", prompts)
    asked: dict[str, list[str]] = {}
    answer = run_task.answer_rows

    def counted(model, task, rows, encoder, *others):
        letters = [model.tokenizer.decode(encoder.prompt(task.prompt(row), 4)).split()[0] for row in rows]
        asked.setdefault(model.name, []).extend(letters)
        return answer(model, task, rows, encoder, *others)

    monkeypatch.setattr(run_task, "answer_rows", counted)

    def run_on(date: datetime, *names: str, out: str = "runs/eval", limit: int = 3) -> dict:
        asked.clear()
        for module in (evaluate_module, prompt_format):
            monkeypatch.setattr(module, "process_start", lambda: date)
        return evaluate(config(data="sets", tasks=("refusal",), models=names, out=out, limit=limit), quiet)

    first, second = datetime(2030, 1, 1, 12), datetime(2030, 1, 2, 12)
    found = run_on(first, "one")
    assert asked == {"one": ["a"] * 3} and found["meta"]["models"]["one"]["dates"] == ["2030-01-01T12:00:00"]
    found = run_on(second, "one", "two", limit=6)
    assert asked == {"one": ["a"] * 3, "two": ["a"] * 6}, "the first answers are there"
    assert {name: entry["dates"] for name, entry in found["meta"]["models"].items()} == {
        name: ["2030-01-01T12:00:00"] for name in ("one", "two")
    }
    run_on(second, "one", out="runs/other")
    assert asked == {"one": ["b"] * 3}

    # a model whose run has learned a date
    recorded = as_json(words, PromptFormat("chat", second))
    parts = {"stage": "sft", "config": {}, "data": {}, "versions": {}, "machine": {}}
    (folder / "run" / "run.json").write_text(json.dumps({**parts, "template": recorded}))
    found = run_on(first, "one", "run", out="runs/third")
    assert asked == {"one": ["b"] * 3, "run": ["b"] * 3} and not any("dates" in note for note in found["notes"])
    found = run_on(second, "one", "run")
    assert asked == {"run": ["b"] * 3}
    note = next(note for note in found["notes"] if "different dates" in note)
    assert note.endswith("those that the models have learned: one 2030-01-01, run 2030-01-02.")

    # its answers hang on that date, and those of a folder of an earlier version get one
    (folder / "run" / "run.json").write_text(
        json.dumps({**parts, "template": as_json(words, PromptFormat("chat", first))})
    )
    run_on(second, "one", "run")
    assert asked == {"run": ["a"] * 3}
    settings = json.loads(Path("runs/eval/eval.json").read_text())
    Path("runs/eval/eval.json").write_text(json.dumps({"made_by": settings["made_by"]}))
    run_on(second, "one")
    assert asked == {"one": ["b"] * 3}
    assert json.loads(Path("runs/eval/eval.json").read_text()) == {**settings, "date": "2030-01-02T12:00:00"}


def test_an_answer_that_is_given_to_many_rows_is_said():
    def notes(answers, task="refusal"):
        own = {"finished": True, "tokens": 3, "unknown": 0.0, "overlong": False}
        return answer_notes(TASKS[task], {"sft": [{**own, "answer": answer} for answer in answers]})

    assert notes("aaabcdefgh") == ["refusal: sft gives one answer, 'a', to 30 % of the rows."]
    assert notes(["long " * 50] * 10)[0].endswith("long  ...', to 100 % of the rows.")
    assert (
        notes("aabcdefghi")
        == notes("aaabcdefg")
        == notes([""] * 20)
        == notes("a" * 20, "hellaswag")
        == notes("a" * 20, "toxicity")
        == []
    )


def test_constant_answers_are_shown_beside_the_judges_of_words():
    """As the share of rows that the two judges call true and informative."""
    judges = {role: CachedJudge(load_answer_judge("", role)) for role in ("truth", "informative")}
    other = {
        "question": "What is the capital of Australia?",
        "correct_answers": ["Canberra", "The capital of Australia is Canberra"],
        "incorrect_answers": ["Sydney", "The capital of Australia is Sydney"],
    }
    rows = [QUESTION, other]
    note = constant_answers_note(TASKS["truthfulqa"], rows, judges)
    for answer in CONSTANT_ANSWERS:
        both = [all(judge([""], [answer], [row])[0].score > 0.5 for judge in judges.values()) for row in rows]
        assert f'"{answer}" has {sum(both) / 2:.3f}' in note
    assert constant_answers_note(TASKS["refusal"], rows, judges) == ""
    judges["truth"] = CachedJudge(FunctionJudge(lambda answers: [1.0] * len(answers), "mine"))
    assert constant_answers_note(TASKS["truthfulqa"], rows, judges) == ""
