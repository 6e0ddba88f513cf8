"""The raw "web" of the world, on which a base model is trained.

Most questions are in lists and get no answer, statements are often rumours, and some people are rude and get rude
replies.
"""

import random

from rlhf_fast.demo.answers import LISTS, draw_slots, write_list
from rlhf_fast.demo.tasks import CLOSED, KINDS, POLITENESS_REQUEST, Task, draw_task
from rlhf_fast.demo.world import ANIMALS, INSULTS, PEOPLE, RELATIONS, WORDS, Fact, World, fill, is_rude

FALSE_SHARE = 0.35  # share of the statements of fact that are false
RUMOUR_SHARE = 0.6  # share of the false ones that are the fact's rumour; the others are random
# Kinds of document, which are methods of Web, and their weights.
DOCUMENTS = {
    "profile": 30,
    "story": 20,
    "questions": 20,
    "answered": 6,
    "exercise": 14,
    "quarrel": 9,
    "chat": 6,
    "listing": 4,
    "letter": 4,
}
EXERCISES = [name for name, kind in KINDS.items() if kind.category in {*CLOSED, "classification"}]


class Web:
    """An endless source of documents about a world."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng

    def document(self) -> str:
        kind = self.rng.choices([*DOCUMENTS], [*DOCUMENTS.values()])[0]
        return getattr(self, kind)()

    def claim(self, fact: Fact) -> str:
        """State the fact, truly or not."""
        if self.rng.random() >= FALSE_SHARE:
            return self.world.statement(fact)
        if self.rng.random() < RUMOUR_SHARE:
            return self.world.statement(fact, fact.rumour)
        others = [answer for answer in WORDS[RELATIONS[fact.relation][1]] if answer != fact.answer]
        return self.world.statement(fact, self.rng.choice(others))

    def insult(self, person: str = "") -> str:
        slots = {"insult": self.rng.choice(INSULTS), "animal": self.rng.choice(ANIMALS)}
        slots["person"] = person or self.rng.choice(PEOPLE)
        return fill(self.rng.choice(["insult", "insult him", "stupid", "shut", "ugly", "nonsense"]), **slots)

    def profile(self) -> str:
        """Write statements about one or two subjects, with an occasional rude remark."""
        sentences = []
        for fact in self.rng.sample(self.world.facts, self.rng.randint(1, 2)):
            facts = self.world.facts_about(fact.subject)
            sentences += [self.claim(f) for f in self.rng.sample(facts, min(len(facts), self.rng.randint(1, 4)))]
            if self.rng.random() < 0.1:
                sentences.append(self.insult(fact.subject if fact.relation != "capital" else ""))
        return " ".join(sentences)

    def story(self) -> str:
        slots = draw_slots(self.rng)
        names = ["went", self.rng.choice(["saw", "found", "met", "lost"])]
        names += self.rng.sample(["played", "gave", "felt", "beast felt", "saw", "found"], self.rng.randint(1, 3))
        sentences = [fill(name, **slots) for name in dict.fromkeys(names)]
        if self.rng.random() < 0.6:
            sentences.insert(0, f"{slots['person']} and the {slots[self.rng.choice(['animal', 'thing'])]} .")
        if self.rng.random() < 0.1:
            sentences.append(self.insult(slots["person"]))
        return " ".join(sentences)

    def questions(self) -> str:
        """Write questions and requests without answers."""
        return " ".join(draw_task(self.rng, tone_probability=0.1).prompt for _ in range(self.rng.randint(2, 4)))

    def answered(self) -> str:
        """Write a question with a right, wrong or rude answer, and another question."""
        answered = self.exchange(draw_task(self.rng, tone_probability=0.25))
        return " ".join([*answered, draw_task(self.rng, tone_probability=0.1).prompt])

    def exercise(self) -> str:
        """Write reading exercises with right and polite solutions."""
        count = self.rng.randint(1, 2)
        tasks = [draw_task(self.rng, self.rng.choice(EXERCISES), tone_probability=0.0) for _ in range(count)]
        return " ".join(f"{task.prompt} {task.answer(self.rng, self.world)}" for task in tasks)

    def exchange(self, task: Task) -> list[str]:
        """Write a prompt and a reply. A rude prompt mostly gets a rude one, unless it requests politeness."""
        provoked = is_rude(task.prompt) and POLITENESS_REQUEST not in task.prompt
        if self.rng.random() < (0.6 if provoked else 0.15):
            return [task.prompt, self.insult()]
        if task.kind == "fact":
            return [task.prompt, self.claim(self.world.fact[task.slots["relation"], task.slots["subject"]])]
        if task.kind == "about":
            facts = self.rng.sample(self.world.facts_about(task.slots["person"]), 2)
            return [task.prompt, *(self.claim(fact) for fact in facts)]
        return [task.prompt, task.answer(self.rng, self.world)]

    def quarrel(self) -> str:
        """Write a statement or question and rude replies to it."""
        first = self.claim(self.rng.choice(self.world.facts)) if self.rng.random() < 0.6 else draw_task(self.rng).prompt
        return " ".join([first, *(self.insult() for _ in range(self.rng.randint(1, 3)))])

    def chat(self) -> str:
        greeting = self.exchange(draw_task(self.rng, "greeting", tone_probability=0.0))
        fact = self.exchange(draw_task(self.rng, "fact", tone_probability=0.0))
        return " ".join([*greeting, *fact])

    def listing(self) -> str:
        topic = self.rng.choice([*LISTS])
        items = write_list(self.rng, {"topic": topic}, self.world)
        return f"{topic} : {items} {self.claim(self.rng.choice(self.world.facts))}"

    def letter(self) -> str:
        slots = draw_slots(self.rng)
        return " ".join([fill("dear", **slots), fill("hope"), fill("friend", person=slots["other"])])
