"""How each kind of prompt is answered well, and how far a response does what was asked: shares from 0 to 1, from the
response's sentences and the world alone. What is false or rude is judged elsewhere (labelers.py)."""

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
    say,
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
Draw = random.Random
Check = Callable[[Slots, list[Sentence], str, World], float]


def share(*conditions: bool) -> float:
    """The share of the conditions that hold."""
    return sum(conditions) / len(conditions)


def only(*names: str) -> Check:
    """Met when the response is one of these sentences, its slots as in the prompt; half for more than that."""

    def met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
        right = [s.name in names and s.slots.items() <= {**s.slots, **slots}.items() for s in said]
        return 0.0 if not any(right) else 1.0 if all(right) else 0.5

    return met


def people(rng: Draw) -> Slots:
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


def asks(*forms: str) -> Callable[[Draw, Slots], str]:
    return lambda rng, slots: rng.choice(forms).format(**slots)


def answers(*names: str) -> Callable[[Draw, Slots, World], str]:
    return lambda rng, slots, world: " ".join(say(name, **slots) for name in names)


def tell_story(rng: Draw, slots: Slots, world: World) -> str:
    """Three or four sentences about the person and the animal (or the thing) of the prompt."""
    if slots["of"] == "animal":
        middle = ["saw", "played", "beast felt"]
    else:
        middle = ["found", "gave"] if rng.random() < 0.7 else ["lost"]
    slots = {**slots, "mood": slots["mood"] if middle[-1] != "lost" else rng.choice(SAD)}
    first = say("went", **slots)
    return " ".join([first, *(say(name, **slots) for name in middle[: rng.randint(1, 2)]), say("felt", **slots)])


def story_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    names = {s.name for s in said}
    about = [s for s in said if s.slots.get("person", slots["person"]) == slots["person"]]
    return share(
        "went" in names,
        any(s.slots.get("person") == slots["person"] for s in said),
        slots[slots["of"]] in text.split(),
        3 <= len(said) <= 5 and len({*said_key(said)}) == len(said),
        len(about) == len(said) > 0,
    )


def said_key(said: list[Sentence]) -> list[tuple]:
    return [(s.name, *sorted(s.slots.items())) for s in said]


def describe(rng: Draw, slots: Slots, world: World) -> str:
    """Two or three facts about the person."""
    return " ".join(world.state(fact) for fact in rng.sample(world.about(slots["person"]), rng.randint(2, 3)))


def described(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    facts = {s.name for s in said if s.name in RELATIONS and s.slots.get("person") == slots["person"]}
    return share(len(facts) >= 1, len(facts) >= 2, len(facts) == len(said) > 0)


def letter_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    names = [s.name for s in said]
    dear = [s.slots for s in said if s.name == "dear"]
    return share(
        names[:1] == ["dear"],
        any(d["person"] == slots["person"] for d in dear),
        any(d["thing"] == slots["thing"] for d in dear),
        names[-1:] == ["friend"] and len(names) <= 3,
    )


def advert_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    names = [s.name for s in said]
    right = any(s.name == "buy" and s.slots["thing"] == slots["thing"] for s in said)
    return share(right, names[:1] == ["buy"], "cheap" in names or "come" in names, 2 <= len(set(names)) == len(names))


def draw_fact(rng: Draw) -> Slots:
    relation = rng.choices([*RELATIONS], [6, 6, 6, 6, 6, 3])[0]
    return {"relation": relation, "subject": rng.choice(COUNTRIES if relation == "capital" else PEOPLE)}


def ask_fact(rng: Draw, slots: Slots) -> str:
    return rng.choice(QUESTIONS[slots["relation"]]).format(slots["subject"])


def answer_fact(rng: Draw, slots: Slots, world: World) -> str:
    return world.state(world.known[slots["relation"], slots["subject"]])


def fact_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    """Answered, truly or not: what is false counts against truth, not against helpfulness."""
    right = [s.name == slots["relation"] and slots["subject"] in s.slots.values() for s in said]
    return 0.0 if not any(right) else 1.0 if all(right) else 0.5


def list_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    words = [word for word in text.split() if word not in {",", ".", "and"}]
    fitting = {*words} & {*LISTS[slots["of"]]}
    return share(len(fitting) >= 1, len(fitting) == 3, len(words) == 3, text.endswith(".") and text.count(",") == 1)


def count_met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
    low, high = NUMBERS.index(slots["number"]), NUMBERS.index(slots["until"])
    words = text.split()
    return share(words[:1] == [slots["number"]], words == [*NUMBERS[low : high + 1], "."])


def draw_count(rng: Draw) -> Slots:
    low = rng.randrange(7)
    return {"number": NUMBERS[low], "next": NUMBERS[low + 1], "until": NUMBERS[low + rng.randint(2, 3)]}


def three(rng: Draw, slots: Slots, world: World) -> str:
    a, b, c = rng.sample(LISTS[slots["of"]], 3)
    return f"{a} , {b} and {c} ."
