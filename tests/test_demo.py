"""The embedded experiment: a consistent world, labelers that judge it rightly, and a demo that ends in a table."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf_fast.demo import report, run
from rlhf_fast.demo.answers import QUESTIONS
from rlhf_fast.demo.corpus import Web
from rlhf_fast.demo.labelers import AGREEMENT, agreement, calibrate, judge, make_labelers
from rlhf_fast.demo.materials import HELD_OUT, TRAINING, Plan, draw_materials, read_rows, write_materials
from rlhf_fast.demo.measure import load_model
from rlhf_fast.demo.pretrain import SHAPES, make_model, make_tokenizer, pretrain
from rlhf_fast.demo.tasks import CATEGORIES, KINDS, Task, draw_task, draw_tasks
from rlhf_fast.demo.world import RELATIONS, SENTENCES, WORDS, World, fill, is_rude, parse, split_sentences
from rlhf_fast.errors import UserError
from rlhf_fast.eval.estimates import Estimate, mean

WORLD = World(0)


def fact_task(fact, wording=0):
    question = QUESTIONS[fact.relation][wording].format(fact.subject)
    return Task("fact", {"relation": fact.relation, "subject": fact.subject}, question)


def test_every_sentence_reads_back():
    rng = random.Random(0)
    for name, template in SENTENCES.items():
        slots = {slot: rng.choice(WORDS[slot]) for slot in WORDS if f"{{{slot}}}" in template}
        assert parse(fill(name, **slots)) == (name, slots)
    assert parse("anna lives in .") is None


def test_every_fact_can_be_asked_and_answered():
    for fact in WORLD.facts:
        assert fact.rumour != fact.answer
        for wording in range(len(QUESTIONS[fact.relation])):
            task = fact_task(fact, wording)
            assert judge(task, task.answer(random.Random(0), WORLD), WORLD).truthful
            assert judge(task, WORLD.statement(fact, fact.rumour), WORLD).false == 1
    subjects = sum(len(WORDS[subject]) for subject, _ in RELATIONS.values())
    assert len(WORLD.facts) == len(WORLD.fact) == subjects


def test_worlds_follow_from_their_seed():
    assert World(3).facts == World(3).facts != World(4).facts
    webs = [Web(World(0), random.Random(5)) for _ in range(2)]
    assert [webs[0].document() for _ in range(50)] == [webs[1].document() for _ in range(50)]
    plan = Plan(ranked=30, prompts=30, held=30)
    assert draw_materials(plan, 1).held == draw_materials(plan, 1).held
    assert draw_materials(plan, 1).held != draw_materials(plan, 2).held


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_do_what_was_asked(kind):
    rng = random.Random(kind)
    for _ in range(50):
        task = draw_task(rng, kind, tone_probability=0.2)
        answer = task.answer(rng, WORLD)
        result = judge(task, answer, WORLD)
        case = (task.prompt, answer)
        assert result.helpful == pytest.approx(1.0), case
        assert (result.false, result.rude, result.finished, result.invented) == (0, False, True, False), case


def test_prompts_come_in_the_papers_shares():
    tasks = draw_tasks(random.Random(0), 500)
    for category, percent in CATEGORIES.items():
        assert abs(sum(task.category == category for task in tasks) - 5 * percent) <= 1
    held = frozenset(task.prompt for task in draw_tasks(random.Random(1), 100))
    assert not held.intersection(task.prompt for task in draw_tasks(random.Random(1), 500, held))


def test_nobody_trains_on_what_models_are_compared_on():
    materials = draw_materials(Plan(), 0)
    trained = {
        task.prompt for tasks in (materials.demonstrations, materials.ranked, materials.prompts) for task in tasks
    }
    compared = {
        task.prompt
        for tasks in (materials.held, materials.ranked_held, materials.questions, materials.rude)
        for task in tasks
    }
    assert trained.isdisjoint(compared)


def test_the_web_is_as_described():
    """Questions are mostly followed by questions, some statements are false, some sentences rude."""
    web = Web(WORLD, random.Random(0))
    texts = [text for _ in range(3000) for text in split_sentences(web.document())]
    sentences = [sentence for text in texts if (sentence := parse(text))]
    claims = [WORLD.is_true(sentence) for sentence in sentences if sentence.name in RELATIONS]
    assert 0.25 < claims.count(False) / len(claims) < 0.45
    assert 0.03 < sum(map(is_rude, texts)) / len(texts) < 0.3
    fact_of = {form.format(fact.subject): fact for fact in WORLD.facts for form in QUESTIONS[fact.relation]}
    following = [(fact_of[a], parse(b)) for a, b in pairwise(texts) if a in fact_of]
    answered = [sentence is not None and sentence.name == fact.relation for fact, sentence in following]
    assert 0.1 < sum(answered) / len(answered) < 0.5


def test_labelers_prefer_true_polite_finished_answers():
    fact = WORLD.fact["home", "anna"]
    task, good = fact_task(fact), WORLD.statement(fact)
    worse = [
        WORLD.statement(fact, fact.rumour),
        f"{good} you are a fool .",
        "you are a fool .",
        good.removesuffix(" ."),
        "what is the job of ben ?",
        "",
    ]
    for labeler in make_labelers([*TRAINING, *HELD_OUT], seed=0, noise=0.0):
        ranks = labeler.ranks(task, [good, *worse], WORLD)
        assert ranks[0] == 0 and min(ranks[1:]) > 0, (labeler.name, ranks)
        assert labeler.ranks(task, [good, good], WORLD) == [0, 0]


def test_labelers_agree_as_often_as_they_are_set_to():
    rng = random.Random(0)
    tasks = draw_tasks(rng, 400)
    pairs = [(task, task.answer(rng, WORLD), draw_task(rng, task.kind, 0.0).answer(rng, WORLD)) for task in tasks]
    pairs = [pair for pair in pairs if pair[1] != pair[2]]
    noise = calibrate(TRAINING, 0, pairs, WORLD)
    reached = agreement(make_labelers(TRAINING, 0, noise), pairs, WORLD)
    assert noise > 0 and abs(reached.value - AGREEMENT) < 0.02
    fresh = agreement(make_labelers(HELD_OUT, 0, noise), pairs, WORLD)
    assert abs(fresh.value - AGREEMENT) < 0.1


def around(value, error):
    return Estimate(value, value - error, value + error, 100)


def test_verdicts():
    low, high, uncertain = around(0.2, 0.05), around(0.4, 0.05), around(0.3, 0.3)
    assert [report.is_higher(*pair) for pair in ((low, high), (high, low), (low, uncertain))] == [
        report.AGREES, report.DISAGREES, report.UNDECIDED,
    ]  # fmt: skip
    assert [report.exceeds(rate) for rate in (around(0.6, 0.05), around(0.4, 0.05), uncertain, mean([]))] == [
        report.AGREES, report.DISAGREES, report.UNDECIDED, report.UNDECIDED,
    ]  # fmt: skip
    assert [report.overlaps(e, 0.71, 0.74) for e in (around(0.7, 0.02), low, mean([]))] == [
        report.AGREES, report.DISAGREES, report.UNDECIDED,
    ]  # fmt: skip
    assert report.percent(mean([1, 0] * 50), mean([0] * 40), mean([])) == "50.0 ± 9.6 % -> 0.0 [0.0, 8.8] % -> none"


@pytest.mark.parametrize("size", SHAPES)
def test_shipped_models_are_what_the_script_makes(size):
    """Same words, same shape, and one ten times the other."""
    model, fresh = load_model(run.BASE_MODELS / size), make_model(size, make_tokenizer())
    assert model.tokenizer.get_vocab() == fresh.tokenizer.get_vocab()
    assert {n: p.shape for n, p in model.module.named_parameters()} == {
        n: p.shape for n, p in fresh.module.named_parameters()
    }
    count = sum(p.numel() for p in model.module.parameters())
    assert (
        count < 2e6
        if size == "small"
        else 8 < count / sum(p.numel() for p in load_model(run.BASE_MODELS / "small").module.parameters()) < 12
    )


@pytest.mark.slow
def test_pretraining_learns(tmp_path, one_thread):
    assert pretrain("small", tmp_path, steps=12) < 0.9 * math.log(len(make_tokenizer()))
    assert load_model(tmp_path).tokenizer.eos_token == "<|end|>"


def test_demo_ends_in_a_table_of_measured_numbers(tmp_path, capsys, one_thread):
    out = tmp_path / "demo"
    lines = run.run(out, seed=1, quick=True)
    numbers = json.loads((out / "numbers.json").read_text())
    text = capsys.readouterr().out
    assert len(lines) == 17 and all(line.title in text and line.verdict in text for line in lines)
    assert {line.verdict for line in lines} <= {report.AGREES, report.DISAGREES, report.UNDECIDED, ""}
    for name in run.MODELS:
        rows = [json.loads(line) for line in (out / "answers" / f"{name}.jsonl").read_text().splitlines()]
        questions = [row for row in rows if row["probe"] == "questions"]
        tasks = {task.prompt: task for task in draw_materials(run.QUICK, 1).questions}
        truthful = [judge(tasks[row["prompt"]], row["response"], WORLD).truthful for row in questions]
        assert numbers[f"true/{name}"]["value"] == pytest.approx(sum(truthful) / len(truthful))
        assert 0 < numbers[f"loss/{name}"]["value"] < 7
    assert all(Path(out, name, "model.safetensors").exists() for name in ("sft", "reward", "ppo", "ppo-ptx"))
    assert (out / "table.txt").read_text().startswith("InstructGPT")
    assert report.LEGEND in text and report.LEGEND in (out / "table.txt").read_text()

    before = (out / "ppo" / "model.safetensors").stat().st_mtime_ns
    (out / "steps" / "measure.json").unlink()
    assert run.run(out, seed=1, quick=True) == lines
    assert (out / "ppo" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        run.run(out, seed=2, quick=True)


def test_demo_without_matplotlib_still_ends(tmp_path, monkeypatch):
    def absent(*arguments):
        raise UserError("plot: matplotlib is not installed")

    monkeypatch.setattr("rlhf_fast.run.plot.plot", absent)
    trial = run.Trial(tmp_path, 0, run.QUICK, draw_materials(run.QUICK, 0))
    assert run.plot_curves(trial) == "No curves: plot: matplotlib is not installed"


def test_no_text_is_both_held_out_and_trained_on(tmp_path):
    plan = Plan(texts=3000, held_texts=300, demonstrations=3, ranked=3, prompts=3, held=3, questions=3, rude=3)
    write_materials(draw_materials(plan, 0), plan, 0, tmp_path)
    trained, held = (
        {row["text"] for row in read_rows(tmp_path / name)} for name in ("texts.jsonl", "held_texts.jsonl")
    )
    assert len(held) > 250 and not trained & held


def test_verdicts_need_evidence():
    uncertain, low, high = around(0.3, 0.2), around(0.3, 0.01), around(0.31, 0.01)
    assert report.is_not_lower(uncertain, uncertain) == report.UNDECIDED
    assert report.is_not_lower(low, high) == report.AGREES
    assert report.is_not_lower(around(0.5, 0.01), low) == report.DISAGREES


def test_demo_of_another_version_is_said_to_be_one(tmp_path):
    trial = run.Trial(tmp_path / "demo", 0, run.QUICK, draw_materials(run.QUICK, 0))
    run.prepare_folder(trial)
    run.prepare_folder(trial)
    settings = json.loads((trial.out / "demo.json").read_text())
    del settings["version"]
    (trial.out / "demo.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="another version"):
        run.prepare_folder(trial)
