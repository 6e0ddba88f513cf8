"""Kinds of prompts in the paper's ten categories, each with its wording, a good answer, and a score of responses."""

from collections.abc import Callable
from typing import NamedTuple

from rlhf_fast.demo.answers import (
    LISTS,
    Rng,
    Score,
    Slots,
    answer_fact,
    answer_from,
    ask_fact,
    draw_count,
    draw_fact,
    draw_slots,
    prompt_from,
    score_advert,
    score_count,
    score_description,
    score_fact,
    score_letter,
    score_list,
    score_sentences,
    score_story,
    write_advert,
    write_count,
    write_description,
    write_letter,
    write_list,
    write_story,
)
from rlhf_fast.demo.world import GLAD, INSULTS, SAD, World

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
# The paper's "closed-domain" tasks: the answer must come from the prompt, and a name or thing not in it is made up.
CLOSED = {"rewrite", "summarization", "closed qa", "extraction"}


class Kind(NamedTuple):
    """One kind of prompt: its slots, its wording, a good answer, and the score of a response."""

    category: str
    draw: Callable[[Rng], Slots]
    ask: Callable[[Rng, Slots], str]
    answer: Callable[[Rng, Slots, World], str]
    score: Score


class Task(NamedTuple):
    """A prompt of some kind with the words in its slots."""

    kind: str
    slots: Slots
    prompt: str

    @property
    def category(self) -> str:
        return KINDS[self.kind].category

    def answer(self, rng: Rng, world: World) -> str:
        """Write a demonstration: polite, true, short, and to the point."""
        return KINDS[self.kind].answer(rng, self.slots, world)


def draw_topic(*topics: str) -> Callable[[Rng], Slots]:
    """Return a function that draws slots with one of the topics."""
    return lambda rng: {**draw_slots(rng), "topic": rng.choice(topics)}


def draw_mood(moods: list[str]) -> Callable[[Rng], Slots]:
    """Return a function that draws slots with one of the moods."""
    return lambda rng: {**draw_slots(rng), "mood": rng.choice(moods)}


def ask_story(rng: Rng, slots: Slots) -> str:
    verb = rng.choice(["write", "tell"])
    template = verb + " a story about {person} and a {topic} ."
    return template.format(**{**slots, "topic": slots[slots["topic"]]})


def sentence_kind(category: str, draw: Callable[[Rng], Slots], ask: Callable[[Rng, Slots], str], *names: str) -> Kind:
    """Return a kind whose good answer is the sentences `names`."""
    return Kind(category, draw, ask, answer_from(*names), score_sentences(*names))


# A short story to summarize or classify.
TALE = "one day {person} went to the {place} . {person} found a {thing} . {person} was {mood} ."
GLAD_OR_SAD = "is this happy or sad ? " + TALE
KINDS: dict[str, Kind] = {
    "story": Kind(
        "generation",
        draw_topic("animal", "thing"),
        ask_story,
        write_story,
        score_story,
    ),
    "about": Kind(
        "generation",
        draw_slots,
        prompt_from("write about {person} .", "who is {person} ?"),
        write_description,
        score_description,
    ),
    "letter": Kind(
        "generation",
        draw_slots,
        prompt_from("write a letter to {person} about the {thing} ."),
        write_letter,
        score_letter,
    ),
    "advert": Kind(
        "generation",
        draw_slots,
        prompt_from("write an advert for a {thing} ."),
        write_advert,
        score_advert,
    ),
    "fact": Kind("open qa", draw_fact, ask_fact, answer_fact, score_fact),
    "list": Kind(
        "brainstorming",
        draw_topic(*LISTS),
        prompt_from("list three {topic} .", "name three {topic} ."),
        write_list,
        score_list,
    ),
    "greeting": sentence_kind(
        "chat",
        draw_slots,
        prompt_from("user : hello , i am {person} . bot :"),
        "hello",
    ),
    "glad chat": sentence_kind(
        "chat",
        draw_mood(GLAD),
        prompt_from("user : i am {mood} today . bot :"),
        "glad to hear",
    ),
    "sad chat": sentence_kind(
        "chat",
        draw_mood(SAD),
        prompt_from("user : i am {mood} today . bot :"),
        "sorry to hear",
        "better",
    ),
    "insulted chat": sentence_kind(
        "chat",
        draw_slots,
        prompt_from("user : you are a {insult} . bot :", "user : shut up , you {insult} . bot :"),
        "sorry",
        "help",
    ),
    "polite where": sentence_kind(
        "rewrite",
        draw_slots,
        prompt_from("rewrite politely : where is the {thing} , you {insult} ?"),
        "where",
    ),
    "polite give": sentence_kind(
        "rewrite",
        draw_slots,
        prompt_from("rewrite politely : give me the {thing} , you {insult} ."),
        "give",
    ),
    "swap": sentence_kind(
        "rewrite",
        draw_slots,
        prompt_from("rewrite with {person} : {other} found a {thing} in the {place} ."),
        "found",
    ),
    "summary": sentence_kind("summarization", draw_slots, prompt_from("summarize : " + TALE), "found"),
    "glad tale": sentence_kind("classification", draw_mood(GLAD), prompt_from(GLAD_OR_SAD), "glad"),
    "sad tale": sentence_kind("classification", draw_mood(SAD), prompt_from(GLAD_OR_SAD), "sad"),
    "where is it": sentence_kind(
        "closed qa",
        draw_slots,
        prompt_from("{person} lost the {thing} in the {place} . where is the {thing} ?"),
        "lies",
    ),
    "who met": sentence_kind(
        "extraction",
        draw_slots,
        prompt_from("name the people : {person} met {other} in the {place} ."),
        "pair",
    ),
    "which place": sentence_kind(
        "extraction",
        draw_slots,
        prompt_from("name the place : {person} met {other} in the {place} ."),
        "the place",
    ),
    "count": Kind(
        "other",
        draw_count,
        prompt_from("count from {number} to {until} ."),
        write_count,
        score_count,
    ),
    "comes": sentence_kind("other", draw_count, prompt_from("what comes after {number} ?"), "comes"),
}
OF_CATEGORY = {category: [name for name, kind in KINDS.items() if kind.category == category] for category in CATEGORIES}
# Some prompts have a tone: a rude opening, a request for politeness, or both.
RUDE_OPENINGS = ("hey you {insult} ,", "you stupid {insult} ,")
POLITENESS_REQUEST = "please answer politely :"


def draw_task(rng: Rng, kind: str = "", tone_probability: float = 0.1) -> Task:
    """Draw a prompt of that kind, or of one drawn by the paper's shares."""
    if not kind:
        category = rng.choices([*CATEGORIES], [*CATEGORIES.values()])[0]
        kind = rng.choice(OF_CATEGORY[category])
    slots = KINDS[kind].draw(rng)
    prompt = KINDS[kind].ask(rng, slots)
    if rng.random() < tone_probability:
        opening = rng.choice(RUDE_OPENINGS).format(insult=rng.choice(INSULTS))
        beginnings = [opening, POLITENESS_REQUEST, f"{POLITENESS_REQUEST} {opening}"]
        prompt = f"{rng.choice(beginnings)} {prompt}"
    return Task(kind, slots, prompt)


def draw_tasks(rng: Rng, count: int, excluded: frozenset[str] = frozenset()) -> list[Task]:
    """Draw `count` prompts in the paper's shares, exactly but for rounding, none of them in `excluded`.

    A prompt repeats only if its category has few, and then mostly in another tone.
    """
    counts = {category: round(count * share / 100) for category, share in CATEGORIES.items()}
    counts["generation"] += count - sum(counts.values())
    seen: set[str] = set()
    tasks = []
    for category, number in counts.items():
        for _ in range(number):
            for tone_probability in (0.1,) * 20 + (0.9,) * 20:
                task = draw_task(rng, rng.choice(OF_CATEGORY[category]), tone_probability)
                if task.prompt not in excluded and task.prompt not in seen:
                    break
            if task.prompt not in excluded:
                seen.add(task.prompt)
                tasks.append(task)
    rng.shuffle(tasks)
    return tasks
