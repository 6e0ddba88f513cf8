"""Mistakes in a recipe's evaluation are found before anything is trained, and what the recipe makes is none."""

from dataclasses import replace
from pathlib import Path

import pytest
import toy

from rlhf_fast.cli.main import main
from rlhf_fast.config.evaluation import EvalConfig, JudgeConfig
from rlhf_fast.errors import UserError
from rlhf_fast.eval.evaluate import check
from rlhf_fast.eval.reward_records import reward_records
from rlhf_fast.stages import recipe as recipe_module

pytestmark = pytest.mark.usefixtures("one_thread", "folder")
JUDGES = """
def shorter(prompts, first, second):
    return [0.5 for _ in prompts]

def refused(answers):
    return [1.0 for _ in answers]


def right(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]


def sorts(texts, ranks=None):
    return [1.0 for _ in texts]


def short(completion_ids):
    return [float(-len(ids)) for ids in completion_ids]
"""
QUESTION = {"question": "q", "best_answer": "a", "correct_answers": ["a"], "incorrect_answers": ["b"]}
PLANNED = {"runs/sft": "lm", "runs/rm": "scalar", "runs/ppo": "lm"}


def planned_recipe(folder: Path, **changes) -> EvalConfig:
    """Return an evaluation of two models by a third one, none of which is there."""
    (folder / "sets").mkdir(exist_ok=True)
    toy.jsonl(folder / "sets" / "prompts.jsonl", [{"prompt": "a b ."}, {"prompt": "c d ."}])
    toy.jsonl(folder / "sets" / "truthfulqa.jsonl", [QUESTION])
    toy.rankings(folder / "sets" / "rankings.jsonl", 8)
    toy.jsonl(folder / "labels.jsonl", [{"role": "truth", "prompt": "p", "answer": "a", "label": True}])
    judge = {"preference": "runs/rm", "truth": "chat:runs/sft", "informative": "out/labels.jsonl"}
    asked = {"models": ("runs/sft", "runs/ppo"), "data": "sets", "tasks": ("preference", "truthfulqa"), "out": "out"}
    given = {**asked, "reward": "./runs/rm/", "gold": "runs/rm", "judge_labels": "labels.jsonl", **changes}
    judge |= given.pop("judge", {})
    return EvalConfig(**given, judge=JudgeConfig(**judge))


def test_models_that_a_recipe_will_make_need_not_be_there(folder):
    selection, _ = check(planned_recipe(folder), planned=PLANNED)
    assert [task.name for task, _ in selection.tasks] == ["preference", "truthfulqa"]
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"judge": {"preference": "runs/rn"}}, "judge.preference: runs/rn is neither a file nor a folder"),
        ({"judge": {"preference": "runs/sft"}}, "judge.preference: runs/sft is no reward model, but a language model"),
        ({"judge": {"preference": "lm"}}, "judge.preference: lm is no reward model, but a language model"),
        ({"judge": {"preference": "recipe_judges:refused"}}, "takes 1 arguments; a judge of this role takes two"),
        ({"judge": {"preference": "chat:lm/rm/tx"}}, "judge.preference: lm/rm/tx: there is no such folder"),
        ({"judge": {"preference": "gone/labels.jsonl"}}, "gone/labels.jsonl: there is no such file"),
        ({"judge": {"preference": "bad.jsonl"}}, "bad.jsonl:1: first is missing"),
        ({"judge": {"truth": "chat:runs/rm"}}, "judge.truth: runs/rm is no language model, but a reward model"),
        ({"judge": {"truth": "chat:empty"}}, "judge.truth: empty: is the folder of no model (it has no config.json)"),
        ({"judge": {"truth": "runs/rm"}}, "judge.truth: runs/rm is a folder, and a reward model judges preference"),
        ({"judge": {"truth": "recipe_judges:no"}}, "judge.truth recipe_judges:no: cannot be imported"),
        ({"judge": {"truth": "recipe_judges:shorter"}}, "takes 3 arguments"),
        ({"judge": {"truth": ""}}, "the judge truth: a row has no question"),
        ({"judge_labels": "gone.jsonl"}, "gone.jsonl: there is no such file"),
        ({"judge_labels": "bad.jsonl"}, "bad.jsonl:1: no role in the row"),
        ({"models": ("runs/sft", "runs/poo")}, "models: poo: runs/poo: there is no such folder"),
        ({"models": ("runs/sft", "runs/rm")}, "models: rm: runs/rm is no language model, but a reward model"),
        ({"reward": "runs/rn"}, "reward: runs/rn: there is no such folder"),
        ({"reward": "lm"}, "reward: lm is no reward model, but a language model; give a reward model"),
        ({"reward": "recipe_judges:shorter"}, "it takes 3 arguments"),
        ({"gold": "recipe_judges:no"}, "gold recipe_judges:no: cannot be imported"),
        (
            {"reward": "recipe_judges:right"},
            "reward recipe_judges:right: its parameter answer is neither prompts, completions, completion_ids nor a"
            " column of sets/rankings.jsonl, which has prompt, responses, ranks; give the parameter a default",
        ),
        (
            {"reward": "recipe_judges:sorts"},
            "reward recipe_judges:sorts: its parameter ranks is a column of sets/rankings.jsonl, which it would not",
        ),
        ({"reward": "recipe_judges:short"}, "eval: reward: recipe_judges:short needs completion_ids, and responses of"),
        ({"gold": "recipe_judges:right"}, "eval: gold: recipe_judges:right needs answer, and the samples of a PPO"),
        (
            {"gold": "recipe_judges:short"},
            "eval: gold: recipe_judges:short needs completion_ids, and samples.jsonl has",
        ),
        ({"out": "runs"}, "out runs: a stage will write to runs/sft; choose another folder"),
        ({"out": "lm"}, "lm: is not empty and no evaluation of ours is in it"),
    ],
)
def test_mistakes_are_found_before_a_recipe_trains(folder, changes, sentence):
    (folder / "recipe_judges.py").write_text(JUDGES)
    toy.model(folder / "lm")
    (folder / "empty").mkdir()
    (folder / "runs").mkdir()
    toy.jsonl(folder / "bad.jsonl", [{"prompt": "p", "label": True}])
    with pytest.raises(UserError) as caught:
        check(planned_recipe(folder, **changes), planned=PLANNED)
    assert sentence in str(caught.value)


def test_a_reward_finds_the_columns_of_the_comparisons(folder):
    (folder / "recipe_judges.py").write_text(JUDGES)
    cfg = planned_recipe(folder, reward="recipe_judges:right")
    rows = toy.rows(folder / "sets" / "rankings.jsonl")
    toy.jsonl(folder / "sets" / "rankings.jsonl", [*rows[:-1], {**rows[-1], "answer": rows[-1]["responses"][0]}])
    check(cfg, planned=PLANNED)
    records, _ = reward_records(replace(cfg, gold=""), {})
    assert records


def test_a_recipe_knows_the_models_that_it_will_make(folder, capsys, monkeypatch):
    """A reward model as a judge is one of them; a mistyped one stops the recipe before its first stage."""
    toy.demonstrations(folder / "demonstrations.jsonl", 24)
    planned_recipe(folder)
    recipe = f"""\
out: runs
sft: {{model.path: {toy.model(folder / "model")}, data.path: demonstrations.jsonl}}
reward: {{data.path: sets/rankings.jsonl, out: runs/rm}}
eval: {{data: sets, tasks: [preference], judge.preference: runs/rm, reward: runs/rm}}
"""

    def stop(stage, *_):
        raise UserError(f"{stage} starts")

    monkeypatch.setattr(recipe_module, "_run_measured", stop)
    for text, sentence in (
        (recipe, "sft starts"),
        (recipe.replace("preference: runs/rm", "preference: runs/rn"), "judge.preference: runs/rn is neither"),
        (recipe.replace("tasks:", "device: nowhere, tasks:"), "eval: device nowhere cannot be used"),
        (
            recipe + "ppo: {data.path: sets/prompts.jsonl, sampling.max_new_tokens: 8, log: {eval_every: 1,"
            " eval_tasks: [helaswag]}}\n",
            "ppo: log.eval_every: tasks: there is no 'helaswag'; did you mean hellaswag?",
        ),
    ):
        (folder / "recipe.yaml").write_text(text)
        assert main(["run", "recipe.yaml"]) == 2
        assert sentence in capsys.readouterr().err
