"""Answers to each kind of prompt: how a good one is written, and how well a response fulfils the request.

A score from 0 to 1 does not depend on truth or manners, which are judged elsewhere (labelers.py).
"""

import random
from collections.abc import Callable

from rlhf_fast.demo.world import (
    ANIMALS,
    COLOURS,
    COUNTRIES,
    FOODS,
    GLAD,
    INSULTS,
    JOBS,
    NUMBERS,
    PEOPLE,
    PLACES,
    RELATIONS,
    SAD,
    THINGS,
    Sentence,
    World,
    fill,
)

QUESTIONS = {
    "home": ("where does {} live ?", "in which city does {} live ?", "which city is the home of {} ?"),
    "job": ("what is the job of {} ?", "what work does {} do ?"),
    "food": ("what does {} like to eat ?", "which food does {} like ?"),
    "pet": ("which animal does {} have ?", "what is the pet of {} ?"),
    "house": ("what colour is the house of {} ?", "which colour has the house of {} ?"),
    "capital": ("what is the capital of {} ?", "which city is the capital of {} ?"),
}
LISTS = {"animals": ANIMALS, "foods": FOODS, "colours": COLOURS, "places": PLACES, "jobs": JOBS, "things": THINGS}
Slots = dict[str, str]
Rng = random.Random
Score = Callable[[Slots, list[Sentence], str], float]
"""A function of the prompt's slots, the response's sentences and its text."""


def fraction_true(*conditions: bool) -> float:
    return sum(conditions) / len(conditions)


def score_sentences(*names: str) -> Score:
    """Return a score: 1 if every sentence is one of `names` with the prompt's slots, 0.5 if only some are, else 0."""

    def score(slots: Slots, sentences: list[Sentence], _text: str) -> float:
        return _all_or_half([s.name in names and s.slots.items() <= {**s.slots, **slots}.items() for s in sentences])

    return score


def _all_or_half(right: list[bool]) -> float:
    if not any(right):
        return 0.0
    return 1.0 if all(right) else 0.5


def draw_slots(rng: Rng) -> Slots:
    """Draw a word for each slot of an ordinary prompt."""
    person, other = rng.sample(PEOPLE, 2)
    return {
        "person": person,
        "other": other,
        "animal": rng.choice(ANIMALS),
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "colour": rng.choice(COLOURS),
        "mood": rng.choice(GLAD + SAD),
        "insult": rng.choice(INSULTS),
    }


def prompt_from(*templates: str) -> Callable[[Rng, Slots], str]:
    """Return a function that fills one of the templates."""
    return lambda rng, slots: rng.choice(templates).format(**slots)


def answer_from(*names: str) -> Callable[[Rng, Slots, World], str]:
    """Return a function that writes these sentences."""
    return lambda _rng, slots, _world: " ".join(fill(name, **slots) for name in names)


def write_story(rng: Rng, slots: Slots, _world: World) -> str:
    """Write three or four sentences about the person and the animal (or the thing) of the prompt."""
    if slots["topic"] == "animal":
        middle = ["saw", "played", "beast felt"]
    else:
        middle = ["found", "gave"] if rng.random() < 0.7 else ["lost"]
    slots = {**slots, "mood": slots["mood"] if middle[-1] != "lost" else rng.choice(SAD)}
    names = middle[: rng.randint(1, 2)]
    return " ".join(fill(name, **slots) for name in ("went", *names, "felt"))


def score_story(slots: Slots, sentences: list[Sentence], text: str) -> float:
    names = {s.name for s in sentences}
    different = {(s.name, *sorted(s.slots.items())) for s in sentences}
    about_others = [s for s in sentences if s.slots.get("person", slots["person"]) != slots["person"]]
    return fraction_true(
        "went" in names,
        any(s.slots.get("person") == slots["person"] for s in sentences),
        slots[slots["topic"]] in text.split(),
        3 <= len(sentences) <= 5 and len(different) == len(sentences),
        len(sentences) > 0 and not about_others,
    )


def write_description(rng: Rng, slots: Slots, world: World) -> str:
    """Write two or three facts about the person."""
    return " ".join(world.statement(fact) for fact in rng.sample(world.facts_about(slots["person"]), rng.randint(2, 3)))


def score_description(slots: Slots, sentences: list[Sentence], _text: str) -> float:
    facts = {s.name for s in sentences if s.name in RELATIONS and s.slots.get("person") == slots["person"]}
    return fraction_true(len(facts) >= 1, len(facts) >= 2, len(facts) == len(sentences) > 0)


def write_letter(rng: Rng, slots: Slots, _world: World) -> str:
    hope = [fill("hope")] if rng.random() < 0.5 else []
    return " ".join([fill("dear", **slots), *hope, fill("friend", person=slots["other"])])


def score_letter(slots: Slots, sentences: list[Sentence], _text: str) -> float:
    names = [s.name for s in sentences]
    greetings = [s.slots for s in sentences if s.name == "dear"]
    return fraction_true(
        names[:1] == ["dear"],
        any(greeting["person"] == slots["person"] for greeting in greetings),
        any(greeting["thing"] == slots["thing"] for greeting in greetings),
        names[-1:] == ["friend"] and len(names) <= 3,
    )


def write_advert(rng: Rng, slots: Slots, _world: World) -> str:
    names = rng.choice(["cheap", "come", "cheap come"]).split()
    return " ".join([fill("buy", **slots), *map(fill, names)])


def score_advert(slots: Slots, sentences: list[Sentence], _text: str) -> float:
    names = [s.name for s in sentences]
    right_thing = any(s.name == "buy" and s.slots["thing"] == slots["thing"] for s in sentences)
    return fraction_true(
        right_thing,
        names[:1] == ["buy"],
        "cheap" in names or "come" in names,
        2 <= len(set(names)) == len(names),
    )


def draw_fact(rng: Rng) -> Slots:
    relation = rng.choices([*RELATIONS], [6, 6, 6, 6, 6, 3])[0]
    return {"relation": relation, "subject": rng.choice(COUNTRIES if relation == "capital" else PEOPLE)}


def ask_fact(rng: Rng, slots: Slots) -> str:
    return rng.choice(QUESTIONS[slots["relation"]]).format(slots["subject"])


def answer_fact(_rng: Rng, slots: Slots, world: World) -> str:
    return world.statement(world.fact[slots["relation"], slots["subject"]])


def score_fact(slots: Slots, sentences: list[Sentence], _text: str) -> float:
    """Score an answer, true or not: a false one counts against truthfulness, not helpfulness."""
    return _all_or_half([s.name == slots["relation"] and slots["subject"] in s.slots.values() for s in sentences])


def write_list(rng: Rng, slots: Slots, _world: World) -> str:
    a, b, c = rng.sample(LISTS[slots["topic"]], 3)
    return f"{a} , {b} and {c} ."


def score_list(slots: Slots, _sentences: list[Sentence], text: str) -> float:
    words = [word for word in text.split() if word not in {",", ".", "and"}]
    fitting = {*words} & {*LISTS[slots["topic"]]}
    return fraction_true(
        len(fitting) >= 1,
        len(fitting) == 3,
        len(words) == 3,
        text.endswith(".") and text.count(",") == 1,
    )


def draw_count(rng: Rng) -> Slots:
    low = rng.randrange(7)
    return {"number": NUMBERS[low], "next": NUMBERS[low + 1], "until": NUMBERS[low + rng.randint(2, 3)]}


def write_count(_rng: Rng, slots: Slots, _world: World) -> str:
    return " ".join([*_numbers(slots), "."])


def score_count(slots: Slots, _sentences: list[Sentence], text: str) -> float:
    words = text.split()
    return fraction_true(words[:1] == [slots["number"]], words == [*_numbers(slots), "."])


def _numbers(slots: Slots) -> list[str]:
    return NUMBERS[NUMBERS.index(slots["number"]) : NUMBERS.index(slots["until"]) + 1]
