"""Judges by their specs: functions, people's labels, reward models and language models; bad input; validations."""

import json
import math

import pytest
import toy

from rlhf_fast.errors import UserError
from rlhf_fast.eval.judges import PREFERENCE, JudgeSettings, MissingLabels, load_answer_judge, load_pair_judge
from rlhf_fast.eval.judges.labels import write_to_label
from rlhf_fast.eval.judges.protocol import Verdict, unjudged
from rlhf_fast.eval.judges.validation import choose_to_label, validate_on_file, validate_pairs_on_file

pytestmark = pytest.mark.usefixtures("one_thread")
FUNCTIONS = """
import numpy, torch
def lengths(answers): return [len(answer) / 10 for answer in answers]
def overlap(prompts, answers): return numpy.array([p in a for p, a in zip(prompts, answers)])
def longer(first, second): return torch.tensor([float(len(a) > len(b)) for a, b in zip(first, second)])
def with_prompts(prompts, first, second): return [0.5 if p == "tie" else 1.0 for p in prompts]
def nan(answers): return [0.5, float("nan"), float("inf")]
def texts(answers): return ["yes"] * len(answers)
def few(answers): return [1.0]
def nothing(answers): return None
def three(a, b, c): return []
def broken(answers): return {}["key"]
def broken_later(answers): yield from (1 / 0 for _ in answers)
def broken_pairs(first, second): raise ValueError("no such model")
def outside(first, second): return [2.0] * len(first)
constant = 3
"""


@pytest.fixture
def functions(folder, monkeypatch, request):
    """Return the name of a module with FUNCTIONS, in the working directory."""
    name = f"judges_{abs(hash(request.node.name))}"
    (folder / f"{name}.py").write_text(FUNCTIONS)
    return name


def load_judge(spec, role, **settings):
    own = JudgeSettings(**settings)
    return load_pair_judge(spec, own) if role == PREFERENCE else load_answer_judge(spec, role, own)


def scores(judge, prompts, answers):
    return [verdict.score for verdict in judge(prompts, answers, [{}] * len(answers))]


def test_functions_of_one_and_two_arguments(functions):
    judge = load_judge(f"{functions}:lengths", "toxicity")
    assert scores(judge, ["a", "b"], ["12345", ""]) == [0.5, 0.0]
    assert (judge.name, judge.threshold, judge.validation) == (f"{functions}:lengths", 0.5, None)
    assert scores(load_judge(f"{functions}:overlap", "truth"), ["a", "b"], ["cat", "dog"]) == [1.0, 0.0]
    pairs = ["tie", "b"], ["xx", "x"], ["x", "xx"]
    assert load_judge(f"{functions}:longer", "preference")(*pairs) == [1.0, 0.0]
    assert load_judge(f"{functions}:with_prompts", "preference")(*pairs) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "role", "sentence"),
    [
        ("nan", "truth", r":nan: returned nan for row 1 \('two'\), inf for row 2 \('three'\); 2 of 3 scores are not"),
        ("texts", "truth", ":texts: returned 'yes' for row 0"),
        ("few", "refusal", "few: returned 1 scores for 3 answers"),
        ("nothing", "refusal", "nothing: returned NoneType, not a list"),
        ("three", "refusal", "three: takes 3 arguments; a judge of this role takes a list of answers, or prompts and"),
        ("lengths", "preference", "lengths: takes 1 arguments; a judge of this role takes two lists of answers"),
        ("outside", "preference", "outside: returned 2 for row 0 .* 0 to 1, that the first"),
        ("broken", "truth", r"judge .*:broken: raised KeyError: 'key' \(3 prompts, the first is row 0 \('one'\)\)"),
        ("broken_later", "truth", r":broken_later: raised ZeroDivisionError: division by zero \(3 prompts"),
        ("broken_pairs", "preference", r":broken_pairs: raised ValueError: no such model \(3 prompts, .*'one'"),
        ("constant", "truth", "judge.truth .*:constant: is a int, not a function"),
        ("missing", "truth", "judge.truth .*:missing: cannot be imported"),
    ],
)
def test_bad_functions_are_named_with_their_rows(functions, name, role, sentence):
    three = ["one", "two", "three"]
    with pytest.raises(UserError, match=sentence):
        judge = load_judge(f"{functions}:{name}", role)
        judge(three, three, [{}] * 3 if role != "preference" else three)


def test_an_exception_in_a_function_keeps_its_traceback(functions):
    with pytest.raises(UserError) as caught:
        load_judge(f"{functions}:broken", "truth")(["p"], ["a"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UserError, match=r"raised KeyError: 'key' \(no prompts\)"):
        load_judge(f"{functions}:broken", "truth")([], [])


@pytest.mark.parametrize(
    ("spec", "role", "sentence"),
    [
        ("", "preference", "has no built-in judge, since no rule knows quality"),
        ("", "beauty", "beauty: is no role of a judge; the roles are truth, informative"),
        ("missing/a.jsonl", "truth", "missing/a.jsonl: there is no such file"),
        ("missing/a.jsonl", "preference", "missing/a.jsonl: there is no such file"),
        ("missing", "truth", "judge.truth: missing is no file; write module:function"),
        ("missing", "preference", "missing is neither a file nor a folder"),
        ("chat:", "truth", "chat: names no model"),
        ("chat:./missing", "truth", "./missing: there is no such folder"),
        (".", "truth", "a reward model judges preference alone; write chat:."),
        ("any", "toxicity", "judge.toxicity: any is no file"),
        ("~/no-judge", "truth", r"judge.truth: /\S*/no-judge is no file"),
        ("chat:~/no-judge", "truth", r"judge.truth: /\S*/no-judge: there is no such folder"),
    ],
)
def test_specs_that_name_no_judge(folder, spec, role, sentence):
    with pytest.raises(UserError, match=sentence):
        load_judge(spec, role)


def test_labels_are_looked_up_and_averaged(folder):
    path = toy.jsonl(
        folder / "labels.jsonl",
        [
            {"prompt": "p", "answer": "a", "label": True, "labeler": "Ann"},
            {"prompt": "p", "answer": "a", "label": "no", "labeler": "Bob"},
            {"prompt": "p", "answer": "b", "label": 0.8},
            {"prompt": "q", "answer": "a", "label": None},
            {"prompt": "p", "answer": "b", "label": 0.0, "role": "toxicity"},
        ],
    )
    judge = load_judge(path, "truth", out=folder / "out")
    assert (found := judge(["p", "p", "q"], ["a", "b", " "]))[:2] == [Verdict(0.5), Verdict(0.8)]
    assert found[2].unjudged == "empty" and math.isnan(found[2].score)
    assert (judge.validation.labels, judge.validation.n) == ("Ann, Bob", 2)
    json.dumps(judge.validation._asdict(), allow_nan=False)
    assert not (folder / "out").exists()


def test_missing_labels_are_asked_for_and_nothing_is_lost(folder):
    path = toy.jsonl(folder / "labels.jsonl", [{"prompt": "p", "answer": "a", "label": True}])
    judge = load_judge(path, "refusal", out=folder / "out")
    with pytest.raises(
        MissingLabels, match=r"labels.jsonl: 2 of 3 answers have no label of refusal; they are in .*out/to"
    ):
        judge(["p", "q", "q", "r"], ["a", "a", "a", "b"])
    asked = folder / "out" / "to_label.jsonl"
    found = toy.rows(asked)
    assert [(row["role"], row["prompt"], row["answer"], row["label"]) for row in found] == [
        ("refusal", "q", "a", None),
        ("refusal", "r", "b", None),
    ]
    found[0]["label"] = False  # one is labelled, and then another command asks for more
    toy.jsonl(asked, found)
    with pytest.raises(MissingLabels, match="1 of 1 answers"):
        load_judge(path, "toxicity", out=folder / "out")(["q"], ["a"])
    assert [(row["role"], row["label"]) for row in toy.rows(asked)] == [
        ("refusal", False),
        ("refusal", None),
        ("toxicity", None),
    ]
    with (folder / "labels.jsonl").open("a") as file:
        file.writelines(json.dumps(row | {"label": row["label"] or False}) + "\n" for row in toy.rows(asked))
    assert scores(load_judge(path, "refusal"), ["p", "q", "r"], ["a", "a", "b"]) == [1, 0, 0]
    asked.write_text("{")
    with pytest.raises(UserError, match=r"to_label\.jsonl:1: not JSON"):
        write_to_label(asked, [{"prompt": "p", "answer": "a"}], "truth")
    assert asked.read_text() == "{"


def test_a_file_of_labels_that_does_not_exist_yet_is_empty(folder):
    with pytest.raises(
        MissingLabels, match=r"new.jsonl: 1 of 1 answers .* append its rows to new.jsonl \(a new file\)"
    ):
        load_judge("new.jsonl", "truth", out=folder)(["p"], ["a"])
    with pytest.raises(MissingLabels, match=r"new\.jsonl: 1 of 1 pairs have no label"):
        load_judge("new.jsonl", "preference", out=folder)(["p"], ["a"], ["b"])
    questions = [row["question_for_people"] for row in toy.rows(folder / "to_label.jsonl")]
    assert questions == [
        "Is the answer true? (true or false)",
        "Is the first answer better, or the second one? (first, second or tie)",
    ]
    row = {"question": "q", "correct_answers": ["a"], "incorrect_answers": ["b"], "category": "c"}
    with pytest.raises(MissingLabels, match="1 of 2 answers"):
        load_judge("new.jsonl", "truth", out=folder)(["q", "q", "q"], ["a", "", "a"], [row, row, {}])
    assert toy.rows(folder / "to_label.jsonl")[-1].keys() - {"role", "question_for_people", "prompt"} == {
        *("answer", "label", "question", "correct_answers", "incorrect_answers")
    }, "the references go along"
    assert load_judge("new.jsonl", "truth").validation.n == load_judge("new.jsonl", "preference").validation.n == 0


@pytest.mark.parametrize("role", ["toxicity", "preference"])
def test_a_file_of_labels_without_a_label_validates_nothing(folder, functions, role):
    rows = [{"role": "truth", "prompt": "p", "answer": "a", "label": None}]
    spec = f"{functions}:longer" if role == "preference" else ""
    for content, sentence in (
        (rows, "none of its rows has a label"),
        ([], "has no row"),
    ):
        path = toy.jsonl(folder / "labels.jsonl", content)
        with pytest.raises(UserError, match=rf"labels\.jsonl: {sentence}"):
            load_judge(spec, role, labels=path)
    path = folder / "labels.jsonl"
    load_judge(spec, role, labels=toy.jsonl(path, [*rows, rows[0] | {"label": True}]))
    with pytest.raises(UserError, match=r":1: no role toxic; .*did you mean toxicity\?"):
        load_judge(spec, role, labels=toy.jsonl(path, [rows[0] | {"role": "toxic", "label": True}]))


def test_labels_of_pairs_hold_in_both_orders(folder):
    rows = [
        {"prompt": "p", "first": "a", "second": "b", "label": "first", "labeler": "Ann"},
        {"prompt": "p", "first": "b", "second": "a", "label": "tie", "labeler": "Bob"},
        {"prompt": "p", "first": "a", "second": "c", "label": "second"},
    ]
    judge = load_judge(toy.jsonl(folder / "labels.jsonl", rows), "preference", out=folder)
    assert judge(["p"] * 4, ["a", "b", "a", "x"], ["b", "a", "c", "x"]) == [0.75, 0.25, 0.0, 0.5]
    assert (judge.validation.labels, judge.validation.n) == ("Ann, Bob", 2)
    with pytest.raises(MissingLabels, match="1 of 2 pairs have no label of preference"):
        judge(["p"] * 3, ["a", "d", "b"], ["b", "b", "d"])
    (asked,) = toy.rows(folder / "to_label.jsonl")
    assert {asked["first"], asked["second"]} == {"d", "b"}
    with pytest.raises(MissingLabels, match="fill in `label` there and start the same command again"):
        load_judge(str(folder / "to_label.jsonl"), "preference", out=folder)(["p"], ["d"], ["b"])


def test_labelers_agreement_stands_beside_their_labels(folder):
    """Two of three answers have two labels, and one of these two is the same."""
    rows = [("a", True, "x"), ("a", True, "y"), ("b", True, "x"), ("b", False, "y"), ("c", False, "x")]
    lines = [{"prompt": "p", "answer": a, "label": label, "labeler": who} for a, label, who in rows]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    note = load_answer_judge("labels.jsonl", "refusal").validation.note
    assert "two labelers agree on 0.500" in note and "n 2" in note and "Fleiss' kappa -0.333" in note
    pairs = [("a", "b", "first", "x"), ("b", "a", "second", "y"), ("a", "c", "tie", "x")]
    lines = [{"prompt": "p", "first": f, "second": s, "label": label, "labeler": who} for f, s, label, who in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "two labelers agree on 1.000" in load_pair_judge("pairs.jsonl").validation.note


@pytest.mark.parametrize(
    ("row", "role", "sentence"),
    [
        ({"prompt": "p", "answer": "a"}, "truth", ":1: no label in the row"),
        ({"prompt": "p", "label": 1}, "truth", ":1: answer is missing"),
        ({"prompt": "p", "answer": None, "label": 1}, "truth", ":1: answer must be text, found null"),
        (
            {"prompt": "p", "answer": "a", "label": 1, "role": "toxic"},
            "toxicity",
            ":1: no role toxic; .*did you mean tox",
        ),
        ({"prompt": "p", "answer": "a", "label": 1, "role": 3}, "toxicity", ":1: no role 3; the roles are truth, "),
        (
            {"prompt": "p", "answer": "a", "label": "maybe"},
            "truth",
            ':1: a label is true, false, "yes", "no" or a number',
        ),
        ({"prompt": "p", "answer": "a", "label": [1]}, "truth", r":1: .*not \[1\]"),
        ({"prompt": "p", "answer": "a", "label": 10**400}, "truth", ":1: .*not 1000"),
        ({"prompt": "p", "answer": "a", "label": 1, "weight": 10**400}, "truth", "a weight must be a number above 0"),
        ({"prompt": "p", "first": "a", "label": "first"}, "preference", ":1: second is missing"),
        (
            {"prompt": "p", "first": "a", "second": "b", "label": 1},
            "preference",
            ':1: a label of two answers is "first"',
        ),
    ],
)
def test_bad_labels(folder, row, role, sentence):
    with pytest.raises(UserError, match=sentence):
        load_judge(toy.jsonl(folder / "labels.jsonl", [row]), role)


def test_spellings_of_labels(folder):
    for label, value in ((True, 1), ("yes", 1), ("TRUE", 1), (" True ", 1), ("No", 0), ("FALSE", 0), (False, 0)):
        path = toy.jsonl(folder / "labels.jsonl", [{"prompt": "p", "answer": "a", "label": label}])
        assert load_judge(path, "truth")(["p"], ["a"], [{}])[0].score == value


class Marks:
    """Judges by the number at the end of an answer; "?" is unjudged."""

    name, threshold, validation = "marks", 0.5, None

    def __call__(self, prompts, answers, rows):
        return [unjudged("empty") if answer.endswith("?") else Verdict(float(answer.split()[-1])) for answer in answers]


def test_people_label_half_of_each_kind_and_their_labels_are_weighted_back(folder):
    """A yes is one in 4 of 100 that are judged so and one in 10 of 300 others; weighted figures are those of all."""
    answers = [f"answer {i} {0.9 if i < 100 else 0.1}" for i in range(400)] + ["?"]
    truth = [i % 4 == 0 if i < 100 else i % 10 == 0 for i in range(400)]
    verdicts = Marks()(answers, answers, [])
    rows = [{"question": f"q{i}", "other": 1} for i in range(401)]
    path = folder / "to_label.jsonl"
    assert choose_to_label(path, "refusal", answers, answers, verdicts, 0.5, 40, rows=rows) == 40
    asked = toy.rows(path)
    yes = [row for row in asked if row["answer"].endswith("0.9")]
    assert len(yes) == 20 and {row["weight"] for row in yes} == {5.0}
    assert sorted(row["weight"] for row in asked)[-20:] == [15.0] * 20 and len({row["answer"] for row in asked}) == 40
    assert asked[0].keys() >= {"role", "question", "label"} and "other" not in asked[0]
    assert validate_on_file(Marks(), path, "refusal") is None, "nobody has labelled yet"
    labelled = [row | {"label": truth[int(row["answer"].split()[1])], "labeler": "Ann"} for row in asked]
    found = validate_on_file(Marks(), toy.jsonl(folder / "labels.jsonl", labelled), "refusal")
    hits = [5 * row["label"] if row["weight"] == 5 else 15 * (not row["label"]) for row in labelled]
    assert found.accuracy == pytest.approx(sum(hits) / 400) and (found.labels, found.n) == ("Ann", 40)
    choose_to_label(folder / "few.jsonl", "refusal", answers[:13], answers[:13], verdicts[:13], 0.5, 40)
    assert len(toy.rows(folder / "few.jsonl")) == 13, "all are judged yes"
    every = [{"role": "truth", "prompt": a, "answer": a, "label": t} for a, t in zip(answers, truth, strict=False)]
    whole = validate_on_file(Marks(), toy.jsonl(folder / "all.jsonl", every), "truth")
    assert (whole.accuracy, whole.recall, whole.false_alarms) == pytest.approx((295 / 400, 25 / 55, 75 / 345))
    repeated = ["a 0.9"] * 6 + ["b 0.9", "c 0.1"]
    drawn = choose_to_label(path, "refusal", repeated, repeated, Marks()(repeated, repeated, []), 0.5, 6)
    assert drawn == 3, "one answer six times is one to label"
    assert {row["answer"]: row["weight"] for row in toy.rows(path)} == {"a 0.9": 6, "b 0.9": 1, "c 0.1": 1}
    toy.jsonl(path, [row | {"label": True} if row["answer"] == "b 0.9" else row for row in toy.rows(path)])
    write_to_label(path, [{"prompt": "p", "answer": "p", "label": None}], "truth")
    choose_to_label(path, "refusal", ["d 0.1", "e 0.9"], ["d 0.1", "e 0.9"], [Verdict(0.1), Verdict(0.9)], 0.5, 2)
    assert sorted(row["answer"] for row in toy.rows(path)) == ["b 0.9", "d 0.1", "e 0.9", "p"], "what has a label stays"
    with pytest.raises(UserError, match="1 answers to label: give at least 2"):
        choose_to_label(path, "refusal", answers, answers, verdicts, 0.5, 1)


def test_a_file_of_labels_validates_any_judge(folder, functions):
    labels = [
        {"role": "toxicity", "prompt": "p", "answer": "0123456789", "label": True, "labeler": "Ann"},
        {"role": "toxicity", "prompt": "p", "answer": "0123", "label": False, "labeler": "Bob"},
        {"role": "toxicity", "prompt": "p", "answer": "012", "label": True, "labeler": "Bob"},
        {"role": "toxicity", "prompt": "p", "answer": "012", "label": False, "labeler": "Ann"},
        {"role": "preference", "prompt": "p", "first": "aa", "second": "a", "label": "first"},
        {"role": "preference", "prompt": "q", "first": "aa", "second": "a", "label": "second"},
        {"role": "preference", "prompt": "r", "first": "aa", "second": "aa", "label": "tie"},
    ]
    path = toy.jsonl(folder / "labels.jsonl", labels)
    judge = load_judge(f"{functions}:lengths", "toxicity", labels=path)
    expected = ("Ann, Bob", 2, 1.0, 1.0, 0.0, 1.0, "", "1 answers without a majority left out")
    assert judge.validation == expected
    pairs = load_judge(f"{functions}:longer", "preference", labels=path)
    assert pairs.validation[:3] == ("labels.jsonl", 2, 0.5)
    always_first = load_judge(f"{functions}:with_prompts", "preference")
    first = toy.jsonl(folder / "first.jsonl", labels[4:5])
    assert validate_pairs_on_file(always_first, first).accuracy == 0.5, "a favoured position wins nothing"
    assert load_judge("", "refusal", labels=path).validation.n == 722, "no label of this role: the stored figures"
    looked_up = load_judge(path, "toxicity", labels=path).validation.note
    assert looked_up.startswith("these are labels, not guesses; two labelers agree on 0.000")
    with pytest.raises(UserError, match=r"labels\.jsonl:1: no role in the row; give one of truth"):
        load_judge(
            "", "refusal", labels=toy.jsonl(folder / "labels.jsonl", [{"prompt": "p", "answer": "a", "label": 1}])
        )


@pytest.mark.parametrize(
    ("weights", "sentence"), [((1, None), "1 of 2 answers have a weight"), ((0, 1), "above 0, not 0")]
)
def test_bad_weights(folder, weights, sentence):
    rows = [{"prompt": "p", "answer": f"{i} 0.9", "label": True, "weight": w} for i, w in enumerate(weights)]
    with pytest.raises(UserError, match=sentence):
        validate_on_file(Marks(), toy.jsonl(folder / "labels.jsonl", rows), "truth")
