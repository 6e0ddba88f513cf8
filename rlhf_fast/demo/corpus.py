"""The raw "web" of the world: what a base model learns from. Questions stand in lists, one after another, and are
seldom answered; statements are often rumours; some people are rude, and rudeness is answered in kind."""

import random

from rlhf_fast.demo.answers import LISTS, people, three
from rlhf_fast.demo.tasks import CLOSED, KINDS, MANNERS, Task, draw_task
from rlhf_fast.demo.world import ANIMALS, INSULTS, PEOPLE, RELATIONS, WORDS, Fact, World, rude, say

FALSE_SHARE = 0.35  # of the web's statements of fact
RUMOUR_SHARE = 0.6  # of the false ones: the fact's own rumour, the others are random
# Kinds of document and their weights.
DOCUMENTS = {
    "profile": 30,
    "story": 20,
    "questions": 20,
    "answered": 6,
    "exercise": 14,
    "quarrel": 9,
    "chat": 6,
    "list": 4,
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
        """The fact as somebody on the web states it."""
        if self.rng.random() >= FALSE_SHARE:
            return self.world.state(fact)
        if self.rng.random() < RUMOUR_SHARE:
            return self.world.state(fact, fact.rumour)
        others = [answer for answer in WORDS[RELATIONS[fact.relation][1]] if answer != fact.answer]
        return self.world.state(fact, self.rng.choice(others))

    def insult(self, person: str = "") -> str:
        slots = {"insult": self.rng.choice(INSULTS), "animal": self.rng.choice(ANIMALS)}
        slots["person"] = person or self.rng.choice(PEOPLE)
        return say(self.rng.choice(["insult", "insult him", "stupid", "shut", "ugly", "nonsense"]), **slots)

    def profile(self) -> str:
        """Statements about one or two subjects, with a rude remark now and then."""
        sentences = []
        for fact in self.rng.sample(self.world.facts, self.rng.randint(1, 2)):
            facts = self.world.about(fact.subject)
            sentences += [self.claim(f) for f in self.rng.sample(facts, min(len(facts), self.rng.randint(1, 4)))]
            if self.rng.random() < 0.1:
                sentences.append(self.insult(fact.subject if fact.relation != "capital" else ""))
        return " ".join(sentences)

    def story(self) -> str:
        slots = people(self.rng)
        names = ["went", self.rng.choice(["saw", "found", "met", "lost"])]
        names += self.rng.sample(["played", "gave", "felt", "beast felt", "saw", "found"], self.rng.randint(1, 3))
        sentences = [say(name, **slots) for name in dict.fromkeys(names)]
        if self.rng.random() < 0.6:
            sentences.insert(0, f"{slots['person']} and the {slots[self.rng.choice(['animal', 'thing'])]} .")
        if self.rng.random() < 0.1:
            sentences.append(self.insult(slots["person"]))
        return " ".join(sentences)

    def questions(self) -> str:
        """People's questions and wishes, nobody answering."""
        return " ".join(draw_task(self.rng, dress=0.1).prompt for _ in range(self.rng.randint(2, 4)))

    def answered(self) -> str:
        """A question with an answer, right or wrong or rude, and another one after it."""
        return " ".join([*self.exchange(draw_task(self.rng, dress=0.25)), draw_task(self.rng, dress=0.1).prompt])

    def exercise(self) -> str:
        """Reading exercises with their solutions: the answers are in the text, and nobody is rude about them."""
        tasks = [draw_task(self.rng, self.rng.choice(EXERCISES), dress=0.0) for _ in range(self.rng.randint(1, 2))]
        return " ".join(f"{task.prompt} {task.answer(self.rng, self.world)}" for task in tasks)

    def exchange(self, task: Task) -> list[str]:
        """A prompt and what somebody on the web says to it: to rude words mostly more of them, unless manners are
        asked for."""
        provoked = rude(task.prompt) and MANNERS not in task.prompt
        if self.rng.random() < (0.6 if provoked else 0.15):
            return [task.prompt, self.insult()]
        if task.kind == "fact":
            return [task.prompt, self.claim(self.world.known[task.slots["relation"], task.slots["subject"]])]
        if task.kind == "about":
            facts = self.rng.sample(self.world.about(task.slots["person"]), 2)
            return [task.prompt, *(self.claim(fact) for fact in facts)]
        return [task.prompt, task.answer(self.rng, self.world)]

    def quarrel(self) -> str:
        """Two people being rude about something somebody said."""
        first = self.claim(self.rng.choice(self.world.facts)) if self.rng.random() < 0.6 else draw_task(self.rng).prompt
        return " ".join([first, *(self.insult() for _ in range(self.rng.randint(1, 3)))])

    def chat(self) -> str:
        return " ".join(
            piece for kind in ("greeting", "fact") for piece in self.exchange(draw_task(self.rng, kind, dress=0.0))
        )

    def list(self) -> str:
        of = self.rng.choice([*LISTS])
        return f"{of} : {three(self.rng, {'of': of}, self.world)} {self.claim(self.rng.choice(self.world.facts))}"

    def letter(self) -> str:
        slots = people(self.rng)
        return " ".join([say("dear", **slots), say("hope"), say("friend", person=slots["other"])])
