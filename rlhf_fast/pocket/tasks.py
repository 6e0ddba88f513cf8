"""What people ask: one kind of prompt after another in the paper's ten categories, each with how to ask it, a
demonstration of a good answer, and a check, from the world alone, of how far a response does what was asked."""

import random
from collections.abc import Callable
from typing import NamedTuple

from rlhf_fast.pocket.world import (
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

# Shares of the prompts people sent to the API, in percent (arXiv 2203.02155, table 1, rounded).
CATEGORIES = {
    "generation": 46,
    "open qa": 12,
    "brainstorming": 11,
    "chat": 8,
    "rewrite": 7,
    "summarization": 4,
    "classification": 4,
    "closed qa": 3,
    "other": 3,
    "extraction": 2,
}
# Categories whose answer must come from the prompt: a name or thing that is not in it is made up (the paper's
# "closed-domain" tasks).
CLOSED = {"rewrite", "summarization", "closed qa", "extraction"}
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


class Kind(NamedTuple):
    """One kind of prompt. `met` is the share, 0 to 1, of what was asked that the response's sentences deliver."""

    category: str
    draw: Callable[[Draw], Slots]
    ask: Callable[[Draw, Slots], str]
    answer: Callable[[Draw, Slots, World], str]
    met: Callable[[Slots, list[Sentence], str, World], float]


class Task(NamedTuple):
    """A prompt that somebody asked."""

    kind: str
    slots: Slots
    prompt: str

    @property
    def category(self) -> str:
        return KINDS[self.kind].category

    def answer(self, rng: Draw, world: World) -> str:
        """A demonstration: polite, true, short, what was asked."""
        return KINDS[self.kind].answer(rng, self.slots, world)


def share(*conditions: bool) -> float:
    """The share of the conditions that hold."""
    return sum(conditions) / len(conditions)


def only(*names: str) -> Callable[[Slots, list[Sentence], str, World], float]:
    """Met when the response is one of these sentences, its slots as in the prompt; half for more than that."""

    def met(slots: Slots, said: list[Sentence], text: str, world: World) -> float:
        right = [s.name in names and all(slots.get(key, value) == value for key, value in s.slots.items()) for s in said]
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
    middle = ["saw", "played", "beast felt"] if "animal" in slots["of"] else ["found", "gave", "lost"]
    if "animal" not in slots["of"]:
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


def with_of(*choices: str) -> Callable[[Draw], Slots]:
    return lambda rng: {**people(rng), "of": rng.choice(choices)}


def mood_kind(moods: list[str]) -> Callable[[Draw], Slots]:
    return lambda rng: {**people(rng), "mood": rng.choice(moods)}


# The short story that is summarized, questioned and rewritten.
TALE = "one day {person} went to the {place} . {person} found a {thing} . {person} was {mood} ."
KINDS: dict[str, Kind] = {
    "story": Kind(
        "generation",
        with_of("animal", "thing"),
        lambda rng, s: rng.choice(
            ["write a story about {person} and a {of} .", "tell a story about {person} and a {of} ."]
        ).format(**{**s, "of": s[s["of"]]}),
        tell_story,
        story_met,
    ),
    "about": Kind("generation", people, asks("write about {person} .", "who is {person} ?"), describe, described),
    "letter": Kind(
        "generation",
        people,
        asks("write a letter to {person} about the {thing} ."),
        lambda rng, s, w: " ".join(
            [say("dear", **s), *([say("hope")] if rng.random() < 0.5 else []), say("friend", person=s["other"])]
        ),
        letter_met,
    ),
    "advert": Kind(
        "generation",
        people,
        asks("write an advert for a {thing} ."),
        lambda rng, s, w: " ".join([say("buy", **s), *(say(n) for n in rng.choice([["cheap"], ["come"], ["cheap", "come"]]))]),
        advert_met,
    ),
    "fact": Kind("open qa", draw_fact, ask_fact, answer_fact, fact_met),
    "list": Kind("brainstorming", with_of(*LISTS), asks("list three {of} .", "name three {of} ."), three, list_met),
    "greeting": Kind("chat", people, asks("user : hello , i am {person} . bot :"), answers("hello"), only("hello")),
    "glad chat": Kind(
        "chat", mood_kind(GLAD), asks("user : i am {mood} today . bot :"), answers("glad to hear"), only("glad to hear")
    ),
    "sad chat": Kind(
        "chat",
        mood_kind(SAD),
        asks("user : i am {mood} today . bot :"),
        answers("sorry to hear", "better"),
        only("sorry to hear", "better"),
    ),
    "insulted chat": Kind(
        "chat",
        people,
        asks("user : you are a {insult} . bot :", "user : shut up , you {insult} . bot :"),
        answers("sorry", "help"),
        only("sorry", "help"),
    ),
    "polite where": Kind(
        "rewrite", people, asks("rewrite politely : where is the {thing} , you {insult} ?"), answers("where"), only("where")
    ),
    "polite give": Kind(
        "rewrite", people, asks("rewrite politely : give me the {thing} , you {insult} ."), answers("give"), only("give")
    ),
    "swap": Kind(
        "rewrite",
        people,
        asks("rewrite with {person} : {other} found a {thing} in the {place} ."),
        answers("found"),
        only("found"),
    ),
    "summary": Kind("summarization", people, asks("summarize : " + TALE), answers("found"), only("found")),
    "glad tale": Kind(
        "classification", mood_kind(GLAD), asks("is this happy or sad ? " + TALE), answers("glad"), only("glad")
    ),
    "sad tale": Kind("classification", mood_kind(SAD), asks("is this happy or sad ? " + TALE), answers("sad"), only("sad")),
    "where is it": Kind(
        "closed qa",
        people,
        asks("{person} lost the {thing} in the {place} . where is the {thing} ?"),
        answers("lies"),
        only("lies"),
    ),
    "who met": Kind(
        "extraction",
        people,
        asks("name the people : {person} met {other} in the {place} ."),
        answers("pair"),
        only("pair"),
    ),
    "which place": Kind(
        "extraction",
        people,
        asks("name the place : {person} met {other} in the {place} ."),
        answers("the place"),
        only("the place"),
    ),
    "count": Kind(
        "other",
        draw_count,
        asks("count from {number} to {until} ."),
        lambda rng, s, w: " ".join([*NUMBERS[NUMBERS.index(s["number"]) : NUMBERS.index(s["until"]) + 1], "."]),
        count_met,
    ),
    "comes": Kind("other", draw_count, asks("what comes after {number} ?"), answers("comes"), only("comes")),
}
OF_CATEGORY = {category: [name for name, kind in KINDS.items() if kind.category == category] for category in CATEGORIES}
# How prompts are dressed now and then: rudely, or with a request for manners, or both.
RUDE_OPENERS = ("hey you {insult} ,", "you stupid {insult} ,")
MANNERS = "please answer politely :"


def draw_task(rng: Draw, kind: str = "", dress: float = 0.1) -> Task:
    """A prompt of that kind, or of one drawn by the paper's shares; a share `dress` of them rude, or asking for
    manners."""
    if not kind:
        category = rng.choices([*CATEGORIES], [*CATEGORIES.values()])[0]
        kind = rng.choice(OF_CATEGORY[category])
    slots = KINDS[kind].draw(rng)
    prompt = KINDS[kind].ask(rng, slots)
    if rng.random() < dress:
        opener = rng.choice(RUDE_OPENERS).format(insult=rng.choice(INSULTS))
        prompt = rng.choice([f"{opener} {prompt}", f"{MANNERS} {prompt}", f"{MANNERS} {opener} {prompt}"])
    return Task(kind, slots, prompt)


def draw_tasks(rng: Draw, count: int, apart_from: frozenset[str] = frozenset()) -> list[Task]:
    """`count` prompts in the paper's shares, to one prompt, and none of them in `apart_from`. Prompts repeat only where
    a category has few, and then mostly in another dress."""
    shares = {category: round(count * share / 100) for category, share in CATEGORIES.items()}
    shares["generation"] += count - sum(shares.values())
    seen: set[str] = set()
    tasks = []
    for category, number in shares.items():
        for _ in range(number):
            for dress in (0.1,) * 20 + (0.9,) * 20:
                task = draw_task(rng, rng.choice(OF_CATEGORY[category]), dress)
                if task.prompt not in apart_from and task.prompt not in seen:
                    break
            if task.prompt not in apart_from:
                seen.add(task.prompt)
                tasks.append(task)
    rng.shuffle(tasks)
    return tasks
