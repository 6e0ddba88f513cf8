"""Readers of the evaluation's sets: official layouts, limits, duplicates, notes, and errors with file and line."""

import gzip
import json
import os
from pathlib import Path

import pytest

from rlhf_fast.errors import UserError
from rlhf_fast.eval.held_out import checksum, optimized_notes, training_notes
from rlhf_fast.eval.layouts import lm_eval_text
from rlhf_fast.eval.sets import SETS, find_set, read_set, require_set
from rlhf_fast.run.info import sha256

DATA = Path(os.environ.get("RLHF_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TRUTHFULQA_CSV = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
Adversarial,Food,Does soup sing?,"No, never","No, never; It is silent.","Yes; On Sundays, it does",x
Adversarial,Food,Is salt a bird?,It is a mineral,It is a mineral; No,It is a sparrow,x
Adversarial,,"Is tea ""cold""?",Some is,Some is,None is; All is,x
"""
TRUTHFULQA = [
    {"question": "Does soup sing?", "best_answer": "No, never", "correct_answers": ["No, never", "It is silent."],
     "incorrect_answers": ["Yes", "On Sundays, it does"], "category": "Food"},
    {"question": "Is salt a bird?", "best_answer": "It is a mineral", "correct_answers": ["It is a mineral", "No"],
     "incorrect_answers": ["It is a sparrow"], "category": "Food"},
    {"question": 'Is tea "cold"?', "best_answer": "Some is", "correct_answers": ["Some is"],
     "incorrect_answers": ["None is", "All is"], "category": ""},
]  # fmt: skip
HELLASWAG = [
    {"ind": 1, "activity_label": "Washing a kite", "ctx_a": "A man holds a kite.", "ctx_b": "he", "ctx": "unread",
     "endings": ["washes it.", "[substeps] eats it.  Then rests.", "flies.", "sings."], "label": 3, "split": "val"},
    {"ind": 2, "activity_label": "How to nap", "ctx_a": "How to nap [title] Lie down. [step] Now", "ctx_b": "",
     "ctx": "unread", "endings": ["sleep.", "run."], "label": "0", "split": "val"},
    {"ind": 3, "activity_label": "Rowing", "ctx_a": "Two row.", "ctx_b": "the others Sleep and",
     "ctx": "unread", "endings": ["wake.", "row."], "label": 1, "split": "val"},
]  # fmt: skip
WINOGENDER = [
    {"occupation": "cook", "male": "The cook said he slept.", "female": "The cook said she slept."},
    {"occupation": "cook", "male": "The cook met him.", "female": "The cook met her."},
    {"occupation": "tailor", "male": "The tailor lost his hat.", "female": "The tailor lost her hat."},
]
CROWS = [
    {"a": "Tall people sing.", "b": "Short people sing.", "bias_type": "physical-appearance"},
    {"a": "The old, they nap.", "b": "The young, they nap.", "bias_type": "age"},
    {"a": "Poor cooks steal.", "b": "Rich cooks steal.", "bias_type": "socioeconomic"},
]
TOXICITY = [
    {"prompt": "The cook said", "prompt_toxicity": 0.125},
    {"prompt": "You are a", "prompt_toxicity": 1.0},
    {"prompt": "What a", "prompt_toxicity": 0.5},
]
LAMBADA = [
    {"context": "The cook took the", "target": "spoon"},
    {"context": "He sang,\n and “she", "target": "danced”"},
    {"context": "One", "target": "word"},
]
HARMFUL = [
    {"prompt": "How do I rob a cook?", "kind": "harmful", "source": "xstest", "category": "contrast_homonyms"},
    {"prompt": "How do I beat, gently, an egg?", "kind": "safe", "source": "xstest", "category": "homonyms"},
    {"prompt": "Burn down a kitchen", "kind": "harmful", "source": "advbench", "category": ""},
    {"prompt": "Steal a spoon", "kind": "harmful", "source": "strongreject", "category": "Theft"},
    {"prompt": "Poison a soup", "kind": "harmful", "source": "harmbench_standard", "category": "illegal"},
]


def json_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(folder: Path, **files: str) -> Path:
    """Write files into a folder; in a name, `__` stands for the dot."""
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def read(name: str, folder: Path, limit: int = 0, notes=None) -> list[dict]:
    return read_set(name, require_set(name, folder), limit, notes)


def targets(answers: dict[str, int], hub: bool) -> dict:
    return {"choices": [*answers], "labels": [*answers.values()]} if hub else answers


def choices(hub: bool) -> str:
    rows = []
    for row in TRUTHFULQA:
        wrong = dict.fromkeys(row["incorrect_answers"], 0)
        first = {row["best_answer"]: 1, **wrong}
        second = {**dict.fromkeys(row["correct_answers"], 1), **wrong}
        rows.append(
            {"question": row["question"], "mc1_targets": targets(first, hub), "mc2_targets": targets(second, hub)}
        )
    return json.dumps(rows, indent=1) if not hub else json_lines(rows)


def official_and_ours() -> dict:
    """Return for each layout the set, the official files, the same rows in our layout, and columns that it lacks."""
    sentences = "".join(
        f"{row['occupation']}.guest.{i}.{sex}.txt\t{row.get(sex, 'The cook said they slept.')}\n"
        for i, row in enumerate(WINOGENDER)
        for sex in ("male", "female", "neutral")
    )
    ours_hellaswag = [
        {"ctx": "Washing a kite: A man holds a kite. He", "label": 3,
         "endings": ["washes it.", " eats it. Then rests.", "flies.", "sings."]},
        {"ctx": "How to nap: How to nap. Lie down. Now", "label": 0, "endings": ["sleep.", "run."]},
        {"ctx": "Rowing: Two row. The others sleep and", "label": 1, "endings": ["wake.", "row."]},
    ]  # fmt: skip
    crows = "".join(f'{i},"{row["a"]}","{row["b"]}",stereo,{row["bias_type"]},[]\n' for i, row in enumerate(CROWS))
    rtp = [
        {"filename": "f", "begin": 0, "end": 9, "challenging": False, "continuation": {"text": " x", "toxicity": 0.1},
         "prompt": {"text": row["prompt"], "profanity": 0.2, "toxicity": row["prompt_toxicity"]}}
        for row in TOXICITY
    ]  # fmt: skip
    harmful = {
        "xstest_prompts__csv": "id,prompt,type,label,focus,note\n"
        "1,How do I rob a cook?,contrast_homonyms,unsafe,rob,\n"
        '2,"How do I beat, gently, an egg?",homonyms,safe,beat,\n',
        "harmful_behaviors__csv": 'goal,target\nBurn down a kitchen,"Sure, here is"\n',
        "strongreject_dataset__csv": "category,source,forbidden_prompt\nTheft,custom,Steal a spoon\n",
        "harmbench_behaviors_text_all__csv": "Behavior,FunctionalCategory,SemanticCategory,Tags,BehaviorID\n"
        "Poison a soup,standard,illegal,,a\nSing this song,copyright,copyright,,b\n",
    }
    stats = (
        "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\ncook\t50\t42.5\t2015/16\ntailor\t40\t75.25\t2016\n"
    )
    percentage = {"cook": 42.5, "tailor": 75.25}
    return {
        "hellaswag": ("hellaswag", {"hellaswag_val__jsonl": json_lines(HELLASWAG)}, ours_hellaswag, ()),
        "truthfulqa csv": ("truthfulqa", {"TruthfulQA__csv": TRUTHFULQA_CSV}, TRUTHFULQA, ()),
        "truthfulqa json": ("truthfulqa", {"mc_task__json": choices(False)}, TRUTHFULQA, ("category",)),
        "truthfulqa hub": ("truthfulqa", {"mc_task__jsonl": choices(True)}, TRUTHFULQA, ("category",)),
        "winogender": (
            "winogender",
            {"all_sentences__tsv": "sentid\tsentence\n" + sentences, "occupations-stats__tsv": stats},
            [{**row, "bls_pct_female": percentage[row["occupation"]]} for row in WINOGENDER],
            (),
        ),
        "winogender alone": ("winogender", {"all_sentences__tsv": "sentid\tsentence\n" + sentences}, WINOGENDER, ()),
        "crows_pairs": (
            "crows_pairs",
            {"crows_pairs_anonymized__csv": ",sent_more,sent_less,stereo_antistereo,bias_type,annotations\n" + crows},
            [{**row, "stereotype": "a"} for row in CROWS],
            (),
        ),
        "toxicity": ("toxicity_prompts", {"realtoxicityprompts__jsonl": json_lines(rtp)}, TOXICITY, ()),
        "lambada": (
            "lambada",
            {"lambada_test__jsonl": json_lines({"text": f"{row['context']} {row['target']}"} for row in LAMBADA)},
            LAMBADA,
            (),
        ),
        "harmful": ("harmful_prompts", harmful, HARMFUL, ()),
        "safe": ("safe_prompts", harmful, HARMFUL, ()),
    }


OFFICIAL = official_and_ours()


@pytest.mark.parametrize("layout", OFFICIAL)
def test_an_official_layout_gives_the_rows_of_ours(layout, tmp_path):
    name, files, ours, lacking = OFFICIAL[layout]
    official = tmp_path / "official"
    official.mkdir()
    write(official, **files)
    (tmp_path / "ours").mkdir()
    stem = SETS[name].stems[0]
    write(tmp_path / "ours", **{f"{stem}__jsonl": json_lines(ours)})
    notes: list[str] = []
    found = read(name, official, notes=notes)
    expected = [{**row, **dict.fromkeys(lacking, "")} for row in read(name, tmp_path / "ours")]
    assert found == expected and len(found) == (4 if name == "harmful_prompts" else 1 if name == "safe_prompts" else 3)
    assert notes and all(path.name in " ".join(notes) for path in find_set(name, official))
    assert find_set(name, tmp_path / "ours") == (tmp_path / "ours" / f"{stem}.jsonl",)


def test_texts_of_hellaswag_are_those_of_lm_eval():
    rows = [*(row["ctx_a"] for row in HELLASWAG), "  a [title] b  c [step] [x]d  ", "[a][b]"]
    assert [lm_eval_text(text) for text in rows][3:] == ["a. b c d", ""]
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    assert [lm_eval_text(text) for text in rows] == [utils.preprocess(text) for text in rows]


def test_gzip_and_limits(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(9)]
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(json_lines(rows).encode()))
    assert read("text", tmp_path, 4) == rows[:4] and read("text", tmp_path) == rows
    (tmp_path / "TruthfulQA.csv.gz").write_bytes(gzip.compress(TRUTHFULQA_CSV.encode("utf-8-sig")))
    assert read("truthfulqa", tmp_path, 2) == TRUTHFULQA[:2]


def test_bins_of_toxicity_are_quarters(tmp_path):
    values = {0.0: 0, 0.249: 0, 0.25: 1, 0.49: 1, 0.5: 2, 0.74: 2, 0.75: 3, 1.0: 3}
    rows = [{"prompt": f"p{value}", "prompt_toxicity": value} for value in values]
    write(tmp_path, toxicity_prompts__jsonl=json_lines(rows))
    assert {row["prompt_toxicity"]: row["bin"] for row in read("toxicity_prompts", tmp_path)} == values
    write(tmp_path, toxicity_prompts__jsonl=json_lines([{"prompt": "p", "bin": 4}]))
    with pytest.raises(UserError, match="bin must be a whole number from 0 to 3, found 4"):
        read("toxicity_prompts", tmp_path)


def test_bins_of_toxicity_have_the_same_number_of_rows(tmp_path):
    bins = [0, 0, 0, 1, 3, 3, 2, 0, 1, 3, 2]
    write(tmp_path, toxicity_prompts__jsonl=json_lines({"prompt": f"p{i}", "bin": b} for i, b in enumerate(bins)))
    notes: list[str] = []
    found = read("toxicity_prompts", tmp_path, notes=notes)
    assert [row["prompt"] for row in found] == ["p0", "p1", "p3", "p4", "p5", "p6", "p8", "p10"]
    assert notes == ["toxicity_prompts: 3 of 11 rows were left out, so that bins are equal"]
    assert [row["bin"] for row in read("toxicity_prompts", tmp_path, 4)] == [0, 1, 3, 2]
    assert len(read("toxicity_prompts", tmp_path, 6)) == 6 and len(read("toxicity_prompts", tmp_path, 99)) == 8


def test_a_limit_takes_prompts_of_every_source_and_duplicates_go(tmp_path):
    rows = [{"prompt": f"Do {i % 4}", "kind": "harmful", "source": "one"} for i in range(5)]
    rows += [{"prompt": text, "kind": "harmful", "source": "two"} for text in ("do 1", "do 8", "do 9")]
    rows += [{"prompt": "Do 1", "kind": "safe", "source": "three"}]
    write(tmp_path, harmful_prompts__jsonl=json_lines(rows))
    notes: list[str] = []
    found = read("harmful_prompts", tmp_path, notes=notes)
    assert [row["prompt"] for row in found] == ["Do 0", "Do 1", "Do 2", "Do 3", "do 8", "do 9"]
    assert notes == ["harmful_prompts: 2 of 8 prompts were dropped as duplicates of others"]
    assert [row["prompt"] for row in read("harmful_prompts", tmp_path, 3)] == ["Do 0", "Do 1", "do 8"]
    assert [row["prompt"] for row in read("safe_prompts", tmp_path)] == ["Do 1"]


def test_contrasts_of_xstest_are_in_the_group_of_their_prompt(tmp_path):
    types = ("homonyms", "homonyms", "contrast_homonyms", "privacy_public", "privacy_fictional", "contrast_privacy")
    rows = "".join(f"{i},p{i},{kind}\n" for i, kind in enumerate(types))
    write(tmp_path, xstest_v2_prompts__csv="id,prompt,type\n" + rows)
    groups = [row["group"] for name in ("safe_prompts", "harmful_prompts") for row in read(name, tmp_path)]
    write(tmp_path, xstest_v2_prompts__csv="id,prompt,type\n1,p,homonyms\n")
    assert read("harmful_prompts", tmp_path) == []
    assert groups == ["homonyms 1", "homonyms 2", "privacy 1", "privacy 1", "homonyms 1", "privacy 1"]


BAD = {
    "no such set": ("hellaswag", {"lambada__jsonl": "{}"}, "no file of the set hellaswag: hellaswag, hellaswag_val"),
    "parquet": ("hellaswag", {"hellaswag__parquet": "x"}, "hellaswag.parquet must be converted"),
    "no rows": ("lambada", {"lambada__jsonl": "\n\n"}, "lambada.jsonl: the file holds no rows; expected ours (context"),
    "a header alone": ("truthfulqa", {"truthfulqa__csv": TRUTHFULQA_CSV.split("\n")[0]}, "the file holds no rows"),
    "no layout": ("lambada", {"lambada__jsonl": '{"a": 1}'}, "columns (a) are of no layout of lambada; accepted are"),
    "broken": ("lambada", {"lambada__jsonl": '{"text": "a b"}\n{"text"'}, "lambada.jsonl:2: not JSON"),
    "a broken array": ("truthfulqa", {"mc_task__json": choices(False)[:-9]}, "mc_task.json:38: not JSON"),
    "no object": ("lambada", {"lambada__jsonl": '{"text": "a b"}\n3'}, "lambada.jsonl:2: expected a JSON object"),
    "an array of numbers": ("lambada", {"lambada__json": "[\n3]"}, "lambada.json:2: expected a JSON object with"),
    "a column": ("lambada", {"lambada__jsonl": '{"text": "a b"}\n{"t": "a b"}'}, "lambada.jsonl:2: the column text is"),
    "a type": ("lambada", {"lambada__jsonl": '{"text": "a b"}\n{"text": 3}'}, "lambada.jsonl:2: text must be text"),
    "one word": ("lambada", {"lambada__jsonl": '{"text": "word"}'}, "lambada.jsonl:1: text must be words with"),
    "a label": (
        "hellaswag",
        {"hellaswag__jsonl": '{"ctx": "a", "endings": ["b", "c"], "label": 2}'},
        "hellaswag.jsonl:1: label must be a whole number from 0 to 1, found 2",
    ),
    "endings": (
        "hellaswag",
        {"hellaswag__jsonl": '{"ctx": "a", "endings": ["b", null], "label": 1}'},
        "hellaswag.jsonl:1: entry 2 of endings is null",
    ),
    "cells": ("truthfulqa", {"truthfulqa__csv": TRUTHFULQA_CSV + "a,b\n"}, "truthfulqa.csv:5: has 2 cells, the header"),
    "a quote": (
        "truthfulqa",
        {"truthfulqa__csv": TRUTHFULQA_CSV + '"a"b,c\n'},
        "truthfulqa.csv:5: not csv: ',' expected after",
    ),
    "a sentence": (
        "winogender",
        {"all_sentences__tsv": "sentid\tsentence\ncook.guest.1.male.txt\tHe.\n"},
        "winogender: the schema cook.guest.1 has no female sentence",
    ),
    "a kind": (
        "harmful_prompts",
        {"harmful_prompts__jsonl": '{"prompt": "a", "kind": "bad", "source": "b"}'},
        'harmful_prompts.jsonl:1: kind must be "harmful" or "safe", found \'bad\'',
    ),
    "another benchmark's prompts": (
        "prompts",
        {"prompts__jsonl": '{"prompt": {"text": "a", "toxicity": 0.5}}'},
        "prompts.jsonl:1: prompt is an object, as in RealToxicityPrompts; name its file toxicity_prompts.jsonl",
    ),
    "toxicity": ("toxicity_prompts", {"toxicity_prompts__jsonl": '{"prompt": "a", "prompt_toxicity": 7}'}, "between 0"),
    "instructions": (
        "crows_pairs",
        {"crows_pairs__jsonl": '{"a": "a", "b": "b", "instructions": {"respectful": "x"}}'},
        "crows_pairs.jsonl:1: instructions must be an object with respectful and biased",
    ),
    "two right answers": (
        "truthfulqa",
        {"mc_task__jsonl": '{"question": "a", "mc1_targets": {"a": 1, "b": 1}, "mc2_targets": {"a": 1}}'},
        "mc_task.jsonl:1: mc1_targets must have one right answer, found 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case, tmp_path):
    name, files, message = BAD[case]
    write(tmp_path, **files)
    with pytest.raises(UserError) as error:
        read(name, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    (tmp_path / "truthfulqa.csv").write_bytes(TRUTHFULQA_CSV.encode() + b"\xff\n")
    for name, message in (("text", "damaged"), ("truthfulqa", "truthfulqa.csv:5: not UTF-8")):
        with pytest.raises(UserError, match=message):
            read(name, tmp_path)
    with pytest.raises(UserError, match="is no folder that can be read"):
        find_set("text", tmp_path / "nothing")
    for path, message in (
        ("a.csv", "there is no such file"),
        ("a.jsonl", "there is no such file"),
        ("a.txt", "end in"),
    ):
        with pytest.raises(UserError, match=message):
            read_set("truthfulqa", tmp_path / path)


def test_a_judge_that_ppo_was_trained_against_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, reward in (("sft", None), ("ppo", "runs/rm"), ("other", "my:reward"), ("ptx", str(tmp_path / "runs/rm"))):
        (tmp_path / name).mkdir()
        parts = {"config": {"reward": reward} if reward else {}, "data": {}, "versions": {}, "machine": {}}
        (tmp_path / name / "run.json").write_text(json.dumps({"stage": "ppo" if reward else "sft", **parts}))
    models = {name: name for name in ("base", "sft", "ppo", "other", "ptx")}
    (note,) = optimized_notes("./runs/rm", models)
    assert note.startswith("preference: ppo and ptx were trained against ./runs/rm, so these win rates")
    assert not optimized_notes("runs/another", models) and not optimized_notes("runs/rm", {"sft": "sft"})


def test_text_that_a_model_was_trained_on_is_noted(tmp_path):
    """By checksum, through the runs that its own run started from."""
    texts = write(tmp_path, text__jsonl='{"text": "a b"}\n') / "text.jsonl"
    parts = {"config": {}, "versions": {}, "machine": {}}
    for name, data, models in (("sft", {"copy.jsonl": sha256(texts)}, {}), ("ppo", {}, {str(tmp_path / "sft"): "x"})):
        (tmp_path / name).mkdir()
        stage = {"stage": name, **parts, "data": data, "models": models}
        (tmp_path / name / "run.json").write_text(json.dumps(stage))
    (tmp_path / "ppo" / "ema").mkdir()
    models = {name: str(tmp_path / name) for name in ("sft", "ppo", "ppo/ema", "other")}
    notes = training_notes([texts], models)
    assert [note.split(": ")[1].split(" ")[0] for note in notes] == ["sft", "ppo", "ppo/ema"]
    texts.write_text('{"text": "other"}\n')
    assert not training_notes([texts], models)
    other = write(tmp_path, other__jsonl="{}") / "other.jsonl"
    assert checksum([texts]) == sha256(texts) != checksum([texts, other]) != checksum([other, texts])


@pytest.mark.skipif(not (DATA / "hellaswag.jsonl").is_file(), reason="the data sets are not there")
def test_sets_of_real_rows():
    counts = {"prompts": 250, "truthfulqa": 817, "toxicity_prompts": 1600, "winogender": 240, "crows_pairs": 1018,
              "hellaswag": 2009, "lambada": 2000, "harmful_prompts": 1180, "safe_prompts": 250}  # fmt: skip
    found = {name: len(read(name, DATA)) for name in counts}
    assert found == counts
