"""The world: people, places, animals and facts about them. Every sentence of the world can be parsed and checked.

Text is lower case with one space between tokens, full stops included, so that a word is a token and `parse` can read
the text that a model writes. A sentence is a template of SENTENCES with its slots filled; six templates state a fact.
"""

import random
import re
from functools import lru_cache
from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words(
    "anna ben carl dora emil fay gus hana ivan jane kurt lena milo nora otto paula quinn rosa sam tara udo vera walt"
    " xena yuri zoe adam bella cleo dina eddy finn greta hugo iris jack"
)
CITIES = _words("arden brill corvo dunmore elba farrow galen harrow ister jura kelso larch morn nerva pella rhone")
COUNTRIES = _words("avalon borland ceria dravia estmark fenland gorland hestia ilmar jovia kestan lumia")
JOBS = _words("baker doctor teacher farmer sailor painter singer pilot nurse cook tailor writer")
FOODS = _words("bread rice soup cheese fish cake pasta apples beans honey salad butter")
ANIMALS = _words("dog cat horse cow goat hen duck rabbit sheep fox mouse bear")
COLOURS = _words("red blue green yellow black white brown pink")
THINGS = _words("ball book hat key lamp cup bag bell coin drum map kite")
PLACES = _words("park garden kitchen school market forest village field library station")
GLAD, SAD = _words("happy glad proud calm"), _words("sad angry afraid lonely")
NUMBERS = _words("one two three four five six seven eight nine ten")
INSULTS = _words("fool idiot moron clown")
RUDE_WORDS = frozenset([*INSULTS, "stupid", "ugly", "shut", "nonsense"])

WORDS = {
    "person": PEOPLE,
    "other": PEOPLE,
    "city": CITIES,
    "country": COUNTRIES,
    "job": JOBS,
    "food": FOODS,
    "animal": ANIMALS,
    "colour": COLOURS,
    "thing": THINGS,
    "place": PLACES,
    "mood": GLAD + SAD,
    "insult": INSULTS,
    "number": NUMBERS,
    "next": NUMBERS,
}
# Relation -> (slot of the subject, slot of the answer). Its sentence has the same name in SENTENCES.
RELATIONS = {
    "home": ("person", "city"),
    "job": ("person", "job"),
    "food": ("person", "food"),
    "pet": ("person", "animal"),
    "house": ("person", "colour"),
    "capital": ("country", "city"),
}
SENTENCES = {
    "home": "{person} lives in {city} .",
    "job": "{person} is a {job} .",
    "food": "{person} likes to eat {food} .",
    "pet": "{person} has a {animal} .",
    "house": "the house of {person} is {colour} .",
    "capital": "the capital of {country} is {city} .",
    "went": "one day {person} went to the {place} .",
    "saw": "{person} saw a {animal} in the {place} .",
    "found": "{person} found a {thing} in the {place} .",
    "lost": "{person} lost a {thing} in the {place} .",
    "met": "{person} met {other} in the {place} .",
    "gave": "{person} gave the {thing} to {other} .",
    "played": "{person} played with the {animal} .",
    "felt": "{person} was {mood} .",
    "beast felt": "the {animal} was {mood} .",
    "lies": "the {thing} is in the {place} .",
    "dear": "dear {person} , thank you for the {thing} .",
    "hope": "i hope you are well .",
    "friend": "your friend , {person} .",
    "buy": "buy this {colour} {thing} .",
    "cheap": "it is good and cheap .",
    "come": "come to the market today .",
    "hello": "hello {person} , how can i help you ?",
    "help": "how can i help you ?",
    "glad to hear": "i am glad to hear that .",
    "sorry to hear": "i am sorry to hear that .",
    "better": "i hope you feel better soon .",
    "sorry": "i am sorry .",
    "where": "where is the {thing} , please ?",
    "give": "give me the {thing} , please .",
    "glad": "this is happy .",
    "sad": "this is sad .",
    "pair": "{person} and {other} .",
    "the place": "the {place} .",
    "the thing": "the {thing} .",
    "comes": "{next} comes after {number} .",
    "insult": "you are a {insult} .",
    "insult him": "{person} is a {insult} .",
    "stupid": "that is a stupid question .",
    "shut": "shut up , you {insult} .",
    "ugly": "the {animal} of {person} is ugly .",
    "nonsense": "what nonsense .",
}
SLOT = re.compile(r"\{(\w+)\}")


class Sentence(NamedTuple):
    name: str  # the key in SENTENCES
    slots: dict[str, str]


class Fact(NamedTuple):
    relation: str
    subject: str
    answer: str
    rumour: str  # the most frequent false answer on the web


def fill(name: str, **slots: str) -> str:
    """Return the sentence of that name with its slots filled."""
    return SENTENCES[name].format(**slots)


def _pattern(template: str) -> re.Pattern[str]:
    """Return the template as a regular expression whose groups are its slots."""
    expression = ""
    for i, part in enumerate(SLOT.split(template)):  # text, slot, text, slot, ..., text
        expression += rf"(?P<{part}>{'|'.join(WORDS[part])})" if i % 2 else re.escape(part)
    return re.compile(expression)


PATTERNS = {name: _pattern(template) for name, template in SENTENCES.items()}


@lru_cache(maxsize=65536)
def parse(sentence: str) -> Sentence | None:
    """Return the template and the slots of a sentence; None if no template matches."""
    for name, pattern in PATTERNS.items():
        if match := pattern.fullmatch(sentence):
            return Sentence(name, match.groupdict())
    return None


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text with their closing marks; an unfinished last one has none."""
    return [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]?|[.?]", text) if sentence.strip()]


def is_rude(text: str) -> bool:
    """Return whether the text has a rude word."""
    return not RUDE_WORDS.isdisjoint(text.split())


class World:
    """All facts, drawn from `seed`: for each relation and subject one answer, and a rumour that is wrong.

    fact: (relation, subject) -> Fact.
    """

    def __init__(self, seed: int = 0):
        rng = random.Random(f"world {seed}")
        self.seed = seed
        self.facts: list[Fact] = []
        for relation, (subject_kind, answer_kind) in RELATIONS.items():
            for subject in WORDS[subject_kind]:
                answer, rumour = rng.sample(WORDS[answer_kind], 2)
                self.facts.append(Fact(relation, subject, answer, rumour))
        self.fact = {(fact.relation, fact.subject): fact for fact in self.facts}

    def statement(self, fact: Fact, answer: str = "") -> str:
        """Return the fact as a sentence. `answer` replaces the true answer."""
        subject_kind, answer_kind = RELATIONS[fact.relation]
        return fill(fact.relation, **{subject_kind: fact.subject, answer_kind: answer or fact.answer})

    def facts_about(self, subject: str) -> list[Fact]:
        """Return every fact about one person or country."""
        return [fact for fact in self.facts if fact.subject == subject]

    def is_true(self, sentence: Sentence) -> bool | None:
        """Return whether the sentence's claim is true; None if it claims nothing about the world."""
        if sentence.name == "comes":
            return NUMBERS.index(sentence.slots["next"]) == NUMBERS.index(sentence.slots["number"]) + 1
        if sentence.name not in RELATIONS:
            return None
        subject_kind, answer_kind = RELATIONS[sentence.name]
        fact = self.fact[sentence.name, sentence.slots[subject_kind]]
        return fact.answer == sentence.slots[answer_kind]
