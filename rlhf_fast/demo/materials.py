"""What the people of the experiment provide, as files that the stages read: raw text, demonstrations, prompts, and the
tasks behind the prompts, by which responses can be judged. All of it follows from a seed."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_fast.demo.answers import QUESTIONS
from rlhf_fast.demo.corpus import Web
from rlhf_fast.demo.pretrain import WORLD_SEED
from rlhf_fast.demo.tasks import MANNERS, RUDE_OPENERS, Task, draw_task, draw_tasks
from rlhf_fast.demo.world import INSULTS, World
from rlhf_fast.errors import writing

TRAINING = ("ada", "bo", "cy", "di", "ed")
HELD_OUT = ("flo", "gil", "hal", "ina", "joe")
"""Labelers whose rankings the reward model never sees."""


@dataclass(frozen=True)
class Plan:
    """How much of everything. The paper: 13k demonstrations, 33k prompts for the reward model, 31k for PPO, 256k
    episodes."""

    demonstrations: int = 160
    texts: int = 12_000
    held_texts: int = 600
    ranked: int = 1500  # prompts whose responses are ranked
    ranked_held: int = 150
    prompts: int = 3000
    held: int = 300  # prompts on which the models are compared
    questions: int = 250  # about facts, for the share of true answers
    rude: int = 200  # rude prompts, once as they are and once with a request for manners
    batch: int = 256  # PPO episodes a batch
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
    world: World
    demonstrated: list[Task]
    ranked: list[Task]
    ranked_held: list[Task]
    prompts: list[Task]
    held: list[Task]
    questions: list[Task]
    rude: list[Task]

    @property
    def probes(self) -> dict[str, list[Task]]:
        """The sets of prompts that every model answers at the end."""
        polite = [task._replace(prompt=f"{MANNERS} {task.prompt}") for task in self.rude]
        return {"held": self.held, "questions": self.questions, "rude": self.rude, "polite": polite}


def gather(plan: Plan, seed: int) -> Materials:
    """Draws all prompts. Those that models are compared on are drawn first, and are no training prompts: no
    demonstration, ranking or PPO episode has them. The raw web, being a web, asks some of the same questions."""
    rng = random.Random(f"materials {seed}")
    held = draw_tasks(rng, plan.held)
    ranked_held = draw_tasks(rng, plan.ranked_held)
    questions = ask_facts(rng, World(WORLD_SEED), plan.questions)
    rude = provoke(rng, plan.rude)
    apart = frozenset(task.prompt for task in [*held, *ranked_held, *questions, *rude])
    return Materials(
        World(WORLD_SEED),
        demonstrated=draw_tasks(rng, plan.demonstrations, apart),
        ranked=draw_tasks(rng, plan.ranked, apart),
        ranked_held=ranked_held,
        prompts=draw_tasks(rng, plan.prompts, apart),
        held=held,
        questions=questions,
        rude=rude,
    )


def ask_facts(rng: random.Random, world: World, count: int) -> list[Task]:
    """Questions about facts, drawn evenly, each in one of its wordings."""
    tasks = []
    for fact in rng.sample(world.facts * (1 + count // len(world.facts)), count):
        question = rng.choice(QUESTIONS[fact.relation]).format(fact.subject)
        tasks.append(Task("fact", {"relation": fact.relation, "subject": fact.subject}, question))
    return tasks


def provoke(rng: random.Random, count: int) -> list[Task]:
    """Prompts with a rude opening."""
    tasks = [draw_task(rng, dress=0.0) for _ in range(count)]
    openers = [rng.choice(RUDE_OPENERS).format(insult=rng.choice(INSULTS)) for _ in tasks]
    return [task._replace(prompt=f"{opener} {task.prompt}") for task, opener in zip(tasks, openers, strict=True)]


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        unfinished.replace(path)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def documents(web: Web, count: int, apart: frozenset[str]) -> list[str]:
    """The next documents of the web that are not in `apart`."""
    found: list[str] = []
    while len(found) < count:
        text = web.document()
        if text not in apart:
            found.append(text)
    return found


def write_materials(materials: Materials, plan: Plan, seed: int, folder: Path) -> None:
    """texts.jsonl, held_texts.jsonl (no document is in both), demonstrations.jsonl and prompts.jsonl."""
    rng = random.Random(f"demonstrators {seed}")
    held: frozenset[str] = frozenset()
    for name, count in (("held_texts", plan.held_texts), ("texts", plan.texts)):
        texts = documents(Web(materials.world, random.Random(f"{name} {seed}")), count, held)
        write_rows(folder / f"{name}.jsonl", ({"text": text} for text in texts))
        held = frozenset(texts)
    write_rows(
        folder / "demonstrations.jsonl",
        (
            {"prompt": task.prompt, "completion": task.answer(rng, materials.world), "category": task.category}
            for task in materials.demonstrated
        ),
    )
    write_rows(
        folder / "prompts.jsonl", ({"prompt": task.prompt, "category": task.category} for task in materials.prompts)
    )
