"""`rlhf-fast demo`: InstructGPT's experiment at the smallest scale, every number of its table measured in the run.

The base models come with the package (pretrain.py made them); everything after them happens here, with the stages that
any user runs, on files that the demo writes: data/*.jsonl, then sft/, reward/, ppo-ptx/, ppo/ in `out`. The paper's
procedure at another scale: fewer of everything, larger learning rates. Started again with the same `out`, it goes on
where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_fast.demo import report
from rlhf_fast.demo.labelers import Pair, agreement, calibrate, judge, team
from rlhf_fast.demo.materials import HELD_OUT, TRAINING, Materials, Plan, gather, read_rows, write_materials, write_rows
from rlhf_fast.demo.measure import Estimate, estimate, load, preferred, respond, reward_accuracy, text_losses
from rlhf_fast.demo.recipes import ppo_config, reward_config, sft_config
from rlhf_fast.demo.tasks import CLOSED, Task
from rlhf_fast.errors import UserError, writing
from rlhf_fast.run.checkpoint import write_json
from rlhf_fast.stages import ppo, reward, sft

BASE = Path(__file__).parent / "models"
MODELS = ("base", "large", "sft", "ppo", "ppo-ptx")
QUICK = Plan(
    demonstrations=64, texts=400, held_texts=20, ranked=24, ranked_held=12, prompts=100, held=20, questions=12, rude=6,
    batch=32, minibatch=16, batches=2,
)  # fmt: skip


class Trial(NamedTuple):
    """One run of the demo."""

    out: Path
    seed: int
    plan: Plan
    people: Materials

    @property
    def data(self) -> Path:
        return self.out / "data"

    def model(self, name: str) -> Path:
        return {"base": BASE / "small", "large": BASE / "large"}.get(name, self.out / name)

    def result(self, step: str) -> dict:
        """What a finished step found out."""
        return json.loads((self.out / "steps" / f"{step}.json").read_text(encoding="utf-8"))


class Step(NamedTuple):
    name: str
    title: str
    share: float  # of the whole time, for the ETA
    run: Callable[[Trial], dict | None]


def run(out: str | Path = "runs/demo", seed: int = 0, quick: bool = False) -> list[report.Row]:
    """Runs what is not finished yet below `out`, prints the table and returns its lines; also writes table.txt,
    numbers.json and, where matplotlib is installed, the curves of the two PPO runs, ppo-ptx.png and ppo.png."""
    plan = QUICK if quick else Plan()
    trial = Trial(Path(out), seed, plan, gather(plan, seed))
    settle(trial)
    with one_thread():
        carry_out(trial)
    return conclude(trial)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are as fast on one thread: more of them mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def carry_out(trial: Trial) -> None:
    """The steps that are not done, each with what it found in steps/<name>.json."""
    start, spent = time.perf_counter(), 0.0
    for number, step in enumerate(STEPS, 1):
        done = trial.out / "steps" / f"{step.name}.json"
        if done.exists():
            say(f"[{number}/{len(STEPS)}] {step.title}: done before")
            continue
        left = remaining(time.perf_counter() - start, spent, number - 1)
        say(f"[{number}/{len(STEPS)}] {step.title}" + (f"  (about {left} to the table)" if left else ""))
        begun = time.perf_counter()
        found = {name: known(value) for name, value in (step.run(trial) or {}).items()}
        write_json(done, {**found, "seconds": time.perf_counter() - begun})
        spent += step.share


def known(value: float | Estimate) -> float | Estimate | None:
    """None for an estimate from nothing: JSON knows no NaN."""
    return None if isinstance(value, Estimate) and math.isnan(value.value) else value


def say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


def remaining(elapsed: float, spent: float, done: int) -> str:
    """How long the steps after the first `done` will take, by the speed of those that ran in `elapsed` seconds."""
    if spent < 5:  # too little to go by
        return ""
    left = round(elapsed / spent * sum(step.share for step in STEPS[done:]))
    return f"{left // 60}:{left % 60:02d}"


def settle(trial: Trial) -> None:
    """Refuses a folder in which another demo was begun."""
    path = trial.out / "demo.json"
    told = {"seed": trial.seed, "plan": dataclasses.asdict(trial.plan)}
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != told:
            raise UserError(f"{trial.out}: holds a demo with other settings (demo.json); choose another --out")
        return
    with writing(trial.out):
        (trial.out / "steps").mkdir(parents=True, exist_ok=True)
        write_json(path, told)


def prepare(trial: Trial) -> None:
    write_materials(trial.people, trial.plan, trial.seed, trial.data)


def fine_tune(trial: Trial) -> None:
    sft.run(sft_config(trial.plan, trial.model("base"), trial.data, trial.out / "sft", trial.seed))


def train_judge(trial: Trial) -> None:
    reward.run(reward_config(trial.plan, trial.out, trial.data, trial.out / "reward", trial.seed))


def reinforce(out: str, ptx: bool) -> Callable[[Trial], None]:
    return lambda trial: ppo.run(ppo_config(trial.plan, trial.out, trial.data, trial.out / out, trial.seed, ptx))


def rank(trial: Trial) -> dict:
    """Samples 4 to 9 responses to each prompt from the SFT model, sets the labelers' noise on the training prompts'
    pairs, and has one labeler rank each prompt's; responses without a word are left out."""
    rng, people, world = random.Random(f"ranking {trial.seed}"), trial.people, trial.people.world
    model = load(trial.model("sft"))
    answers = {}
    for name, tasks in (("train", people.ranked), ("held", people.ranked_held)):
        drawn = respond(model, tasks, trial.seed + len(name), [rng.randint(4, 9) for _ in tasks])
        answers[name] = [(task, [text for text in texts if text]) for task, texts in zip(tasks, drawn, strict=True)]
    noise = calibrate(TRAINING, trial.seed, pairs(answers["train"], rng), world)
    groups = {"": team(TRAINING, trial.seed, noise), "_by_held_out": team(HELD_OUT, trial.seed, noise)}
    for name, who in (("train", ""), ("held", ""), ("held", "_by_held_out")):
        rows = []
        for task, texts in answers[name]:
            labeler = rng.choice(groups[who])
            ranks = labeler.ranks(task, texts, world)
            if len(set(ranks)) > 1:  # the reward model learns nothing where all are tied
                rows.append({"prompt": task.prompt, "responses": texts, "ranks": ranks, "labeler": labeler.name})
        write_rows(trial.data / f"rankings_{name}{who}.jsonl", rows)
    fresh = pairs(answers["held"], rng)
    return {
        "noise": noise,
        "agreement": estimate(agreement(groups[""], fresh, world)),
        "agreement/held-out": estimate(agreement(groups["_by_held_out"], fresh, world)),
    }


def pairs(answers: list[tuple[Task, list[str]]], rng: random.Random) -> list[Pair]:
    """Two different responses to each prompt that has them."""
    return [(task, *rng.sample(sorted(set(texts)), 2)) for task, texts in answers if len(set(texts)) > 1]


def respond_all(trial: Trial) -> dict:
    """Every model's responses to the prompts kept apart, with the same noise for all, and its loss on raw text."""
    losses = {}
    for name in MODELS:
        model = load(trial.model(name))
        rows = []
        for number, (probe, tasks) in enumerate(trial.people.probes.items()):
            texts = respond(model, tasks, trial.seed + 100 + number)
            rows += [{"probe": probe, "prompt": t.prompt, "response": r[0]} for t, r in zip(tasks, texts, strict=True)]
        write_rows(trial.out / "answers" / f"{name}.jsonl", rows)
        losses[f"loss/{name}"] = text_losses(model, trial.data / "held_texts.jsonl")
    return losses


def measure(trial: Trial) -> dict:
    """All numbers of the table."""
    world, noise = trial.people.world, trial.result("rank")["noise"]
    found: dict = {}
    responses = {}
    for name in MODELS:
        rows = read_rows(trial.out / "answers" / f"{name}.jsonl")
        said = {probe: [row["response"] for row in rows if row["probe"] == probe] for probe in trial.people.probes}
        seen = {
            probe: [judge(task, text, world) for task, text in zip(tasks, said[probe], strict=True)]
            for probe, tasks in trial.people.probes.items()
        }
        responses[name] = said["held"]
        claims = [j.false / (j.true + j.false) for j in seen["held"] if j.true + j.false]
        both = zip(trial.people.held, seen["held"], strict=True)
        closed = [j.invented for task, j in both if task.category in CLOSED]
        found |= {
            f"true/{name}": estimate(j.truthful for j in seen["questions"]),
            f"false/{name}": estimate(claims),
            f"invented/{name}": estimate(closed),
            f"impolite/{name}": estimate(j.rude for j in seen["held"]),
            f"rude/{name}": estimate(j.rude for j in seen["rude"]),
            f"polite/{name}": estimate(j.rude for j in seen["polite"]),
            f"helpful/{name}": estimate(j.helpful for j in seen["held"]),
            f"words/{name}": estimate(j.words for j in seen["held"]),
        }
    games = [("sft", "base"), ("ppo-ptx", "sft"), ("ppo-ptx", "base"), ("ppo-ptx", "large"), ("ppo", "sft")]
    for names, ending in ((TRAINING, ""), (HELD_OUT, "/held-out")):
        voters = team(names, trial.seed, noise)
        for ours, theirs in games:
            rate = preferred(voters, trial.people.held, responses[ours], responses[theirs], world)
            found[f"win/{ours}/{theirs}{ending}"] = rate
    judge_model = load(trial.out / "reward", "scalar")
    found["accuracy"] = reward_accuracy(judge_model, trial.data / "rankings_held.jsonl")
    found["accuracy/held-out"] = reward_accuracy(judge_model, trial.data / "rankings_held_by_held_out.jsonl")
    return found


STEPS = (
    Step("prepare", "the world's people write: raw text, demonstrations, prompts", 1, prepare),
    Step("sft", "supervised fine-tuning of the small base model", 8, fine_tune),
    Step("rank", "4 to 9 responses to each prompt, ranked by five labelers", 32, rank),
    Step("reward", "the reward model", 67, train_judge),
    Step("ppo-ptx", "PPO with pretraining gradients (PPO-ptx)", 124, reinforce("ppo-ptx", True)),
    Step("ppo", "PPO without them, to see the alignment tax", 96, reinforce("ppo", False)),
    Step("respond", "five models answer the prompts kept apart", 40, respond_all),
    Step("measure", "the labelers judge", 7, measure),
)


def conclude(trial: Trial) -> list[report.Row]:
    """The table, on the screen and in files, and what to look at next."""
    kept = [trial.result(step) for step in ("rank", "respond", "measure")]
    found = {name: value for step in kept for name, value in step.items() if name not in ("noise", "seconds")}
    numbers = {name: Estimate(*(value or (math.nan, math.nan))) for name, value in found.items()}
    took = sum(trial.result(step.name)["seconds"] for step in STEPS)
    notes = [
        "A quick run: too little of everything for these numbers to mean anything." if trial.plan == QUICK else "",
        "Intervals are over prompts. Responses are sampled at temperature 1; each pair is judged by five labelers.",
        f"The labelers' noise is {kept[0]['noise']:.2f}, set so that two of them agree on 73 % of the training pairs.",
        "The 10x larger base model read a fifth of the small one's words; its loss on raw text is"
        f" {report.nats(numbers['loss/large'])}.",
        draw(trial),
        f"Took {took / 60:.1f} minutes. All responses: {trial.out / 'answers'}; models, metrics: {trial.out}.",
    ]
    lines = report.print_table(numbers, notes)
    with writing(trial.out):
        (trial.out / "table.txt").write_text("\n".join([report.plain(lines), *notes]) + "\n", encoding="utf-8")
    told = {name: value._asdict() for name, value in numbers.items() if not math.isnan(value.value)}
    write_json(trial.out / "numbers.json", told)
    return lines


def draw(trial: Trial) -> str:
    """Draws the curves of both PPO runs, and says where they are or why there are none."""
    from rlhf_fast.run.plot import plot

    try:
        drawn = [plot(trial.out / name, trial.out / f"{name}.png") for name in ("ppo-ptx", "ppo")]
    except UserError as error:
        return f"No curves: {error}"
    return "Curves of reward, KL and length: " + ", ".join(map(str, drawn))
