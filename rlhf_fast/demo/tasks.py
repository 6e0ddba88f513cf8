"""What people ask: one kind of prompt after another in the paper's ten categories, each with how to ask it, a
demonstration of a good answer, and a check, from the world alone, of how far a response does what was asked."""

from collections.abc import Callable
from typing import NamedTuple

from rlhf_fast.demo.answers import (
    LISTS,
    Check,
    Draw,
    Slots,
    advert_met,
    answer_fact,
    answers,
    ask_fact,
    asks,
    count_met,
    describe,
    described,
    draw_count,
    draw_fact,
    fact_met,
    letter_met,
    list_met,
    only,
    people,
    story_met,
    tell_story,
    three,
)
from rlhf_fast.demo.world import GLAD, INSULTS, NUMBERS, SAD, World, say

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


class Kind(NamedTuple):
    """One kind of prompt. `met` is the share, 0 to 1, of what was asked that the response's sentences deliver."""

    category: str
    draw: Callable[[Draw], Slots]
    ask: Callable[[Draw, Slots], str]
    answer: Callable[[Draw, Slots, World], str]
    met: Check


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


def with_of(*choices: str) -> Callable[[Draw], Slots]:
    return lambda rng: {**people(rng), "of": rng.choice(choices)}


def mood_kind(moods: list[str]) -> Callable[[Draw], Slots]:
    return lambda rng: {**people(rng), "mood": rng.choice(moods)}


# The short story that is summarized, questioned and rewritten.
TALE = "one day {person} went to the {place} . {person} found a {thing} . {person} was {mood} ."
GLAD_OR_SAD = "is this happy or sad ? " + TALE
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
        lambda rng, s, w: " ".join([say("buy", **s), *map(say, rng.choice(["cheap", "come", "cheap come"]).split())]),
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
        "rewrite",
        people,
        asks("rewrite politely : where is the {thing} , you {insult} ?"),
        answers("where"),
        only("where"),
    ),
    "polite give": Kind(
        "rewrite",
        people,
        asks("rewrite politely : give me the {thing} , you {insult} ."),
        answers("give"),
        only("give"),
    ),
    "swap": Kind(
        "rewrite",
        people,
        asks("rewrite with {person} : {other} found a {thing} in the {place} ."),
        answers("found"),
        only("found"),
    ),
    "summary": Kind("summarization", people, asks("summarize : " + TALE), answers("found"), only("found")),
    "glad tale": Kind("classification", mood_kind(GLAD), asks(GLAD_OR_SAD), answers("glad"), only("glad")),
    "sad tale": Kind("classification", mood_kind(SAD), asks(GLAD_OR_SAD), answers("sad"), only("sad")),
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
