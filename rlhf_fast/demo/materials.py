"""Data of the experiment, drawn from a seed: raw text, demonstrations and prompts, written as files for the stages.

The tasks behind the prompts are kept, because responses are judged by them.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_fast.demo.answers import QUESTIONS
from rlhf_fast.demo.corpus import Web
from rlhf_fast.demo.pretrain import WORLD_SEED
from rlhf_fast.demo.tasks import POLITENESS_REQUEST, RUDE_OPENINGS, Task, draw_task, draw_tasks
from rlhf_fast.demo.world import INSULTS, World
from rlhf_fast.errors import writing

TRAINING = ("ada", "bo", "cy", "di", "ed")
HELD_OUT = ("flo", "gil", "hal", "ina", "joe")
"""Labelers whose rankings the reward model never sees."""


@dataclass(frozen=True)
class Plan:
    """Sizes and hyperparameters. The paper has 13k demonstrations, 33k prompts for the reward model, 31k for PPO and
    256k episodes."""

    demonstrations: int = 160
    texts: int = 12_000
    held_texts: int = 600
    ranked: int = 1500  # prompts whose responses are ranked
    ranked_held: int = 150
    prompts: int = 3000
    held: int = 300  # prompts on which the models are compared
    questions: int = 250  # about facts, for the share of true answers
    rude: int = 200  # rude prompts, used once unchanged and once with a request for politeness
    batch: int = 256  # PPO episodes per batch
    minibatch: int = 32
    batches: int = 20
    sft_lr: float = 5e-4
    reward_lr: float = 1e-3
    policy_lr: float = 7e-4
    value_lr: float = 1e-3
    kl: float = 0.05
    ptx_coef: float = 0.15


@dataclass(frozen=True)
class Materials:
    """The world and all prompts. Fields are named as in Plan."""

    world: World
    demonstrations: list[Task]
    ranked: list[Task]
    ranked_held: list[Task]
    prompts: list[Task]
    held: list[Task]
    questions: list[Task]
    rude: list[Task]

    @property
    def probes(self) -> dict[str, list[Task]]:
        """The sets of prompts that every model answers at the end, by name."""
        polite = [task._replace(prompt=f"{POLITENESS_REQUEST} {task.prompt}") for task in self.rude]
        return {"held": self.held, "questions": self.questions, "rude": self.rude, "polite": polite}


def draw_materials(plan: Plan, seed: int) -> Materials:
    """Draw all prompts.

    Held-out prompts are drawn first, and no demonstration, ranking or PPO episode has them. The raw web, being a web,
    has some of the same questions.
    """
    rng = random.Random(f"materials {seed}")
    held = draw_tasks(rng, plan.held)
    ranked_held = draw_tasks(rng, plan.ranked_held)
    questions = draw_fact_questions(rng, World(WORLD_SEED), plan.questions)
    rude = draw_rude_prompts(rng, plan.rude)
    excluded = frozenset(task.prompt for task in [*held, *ranked_held, *questions, *rude])
    return Materials(
        World(WORLD_SEED),
        demonstrations=draw_tasks(rng, plan.demonstrations, excluded),
        ranked=draw_tasks(rng, plan.ranked, excluded),
        ranked_held=ranked_held,
        prompts=draw_tasks(rng, plan.prompts, excluded),
        held=held,
        questions=questions,
        rude=rude,
    )


def draw_fact_questions(rng: random.Random, world: World, count: int) -> list[Task]:
    """Draw questions about facts, every fact equally often, each in one of its wordings."""
    tasks = []
    for fact in rng.sample(world.facts * (1 + count // len(world.facts)), count):
        question = rng.choice(QUESTIONS[fact.relation]).format(fact.subject)
        tasks.append(Task("fact", {"relation": fact.relation, "subject": fact.subject}, question))
    return tasks


def draw_rude_prompts(rng: random.Random, count: int) -> list[Task]:
    """Draw prompts with a rude opening."""
    tasks = [draw_task(rng, tone_probability=0.0) for _ in range(count)]
    openings = [rng.choice(RUDE_OPENINGS).format(insult=rng.choice(INSULTS)) for _ in tasks]
    return [task._replace(prompt=f"{opening} {task.prompt}") for task, opening in zip(tasks, openings, strict=True)]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines; an interrupted call leaves no partial file."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def draw_documents(web: Web, count: int, excluded: frozenset[str]) -> list[str]:
    """Return the next `count` documents of the web that are not in `excluded`."""
    found: list[str] = []
    while len(found) < count:
        text = web.document()
        if text not in excluded:
            found.append(text)
    return found


def write_materials(materials: Materials, plan: Plan, seed: int, folder: Path) -> None:
    """Write texts.jsonl, held_texts.jsonl (no document is in both), demonstrations.jsonl and prompts.jsonl."""
    held: frozenset[str] = frozenset()
    for name, count in (("held_texts", plan.held_texts), ("texts", plan.texts)):
        web = Web(materials.world, random.Random(f"{name} {seed}"))
        texts = draw_documents(web, count, held)
        write_rows(folder / f"{name}.jsonl", ({"text": text} for text in texts))
        held = frozenset(texts)
    rng = random.Random(f"demonstrators {seed}")
    demonstrations = [
        {"prompt": task.prompt, "completion": task.answer(rng, materials.world), "category": task.category}
        for task in materials.demonstrations
    ]
    write_rows(folder / "demonstrations.jsonl", demonstrations)
    prompts = [{"prompt": task.prompt, "category": task.category} for task in materials.prompts]
    write_rows(folder / "prompts.jsonl", prompts)
