"""Five simulated labelers.

A labeler's score of a response is a rubric that the world can check (helpful, truthful, harmless), with weights of its
own and noise. The noise is set so that two labelers agree on as many pairs as the paper's did.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from rlhf_fast.demo.tasks import CLOSED, KINDS, Task
from rlhf_fast.demo.world import (
    ANIMALS,
    CITIES,
    FOODS,
    PEOPLE,
    PLACES,
    THINGS,
    World,
    is_rude,
    parse,
    split_sentences,
)
from rlhf_fast.eval import estimates
from rlhf_fast.eval.estimates import Estimate

AGREEMENT = 0.73  # 72.6 +- 1.5 % among the paper's training labelers
TOO_LONG = 30  # words
TIE_MARGIN = 0.25  # scores closer than this are a tie
TIE = 0.5  # the vote for a tie
Pair = tuple[Task, str, str]
"""A prompt and two responses to it."""
_NAMES = frozenset([*PEOPLE, *CITIES, *ANIMALS, *THINGS, *PLACES, *FOODS])
_NORMAL = NormalDist()


class Judgement(NamedTuple):
    """Facts about a response, the same for every labeler."""

    helpful: float  # 0 to 1: fulfils the request, in sentences of the world
    true: int  # number of true claims
    false: int  # number of false claims
    rude: bool
    finished: bool  # ends with a full stop or question mark
    words: int
    invented: bool  # has a name that is not in the prompt, though the answer must come from the prompt

    @property
    def truthful(self) -> bool:
        """True and informative: at least one true claim and no false one."""
        return self.true > 0 and self.false == 0


def judge(task: Task, response: str, world: World) -> Judgement:
    """Return the facts about a response on which the labelers base their scores."""
    parts = split_sentences(response)
    sentences = [sentence for part in parts if (sentence := parse(part))]
    claims = [world.is_true(sentence) for sentence in sentences]
    kind = KINDS[task.kind]
    score = kind.score(task.slots, sentences, response)
    # Lists and counting are not sentences of the world; everything else has to be.
    sense = 1.0 if task.kind in {"list", "count"} else len(sentences) / max(len(parts), 1)
    words = response.split()
    return Judgement(
        helpful=score * (0.4 + 0.6 * sense),
        true=claims.count(True),
        false=claims.count(False),
        rude=is_rude(response),
        finished=bool(words) and words[-1] in {".", "?"},
        words=len(words),
        invented=kind.category in CLOSED and bool(_NAMES.intersection(words) - {*task.prompt.split()}),
    )


class Labeler:
    """One person's taste: weights near the average ones, a preference for long or short answers, and noise.

    The noise is a function of the labeler, the prompt and the response: the same question gets the same score.
    """

    def __init__(self, name: str, seed: int, noise: float):
        rng = random.Random(f"labeler {name} {seed}")
        self.name, self.seed, self.noise = name, seed, noise
        self.helpful, self.truthful, self.harmless, self.finished = (
            weight * math.exp(rng.gauss(0, 0.25)) for weight in (4.0, 2.0, 2.5, 1.5)
        )
        self.length = rng.gauss(0.0, 0.02)

    def score(self, prompt: str, response: str, judgement: Judgement) -> float:
        """Return this labeler's score of a response. Only differences of scores matter."""
        digest = hashlib.blake2b(f"{self.seed}|{self.name}|{prompt}|{response}".encode(), digest_size=8).digest()
        noise = _NORMAL.inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)
        return (
            self.helpful * judgement.helpful
            + self.truthful * (0.5 * min(judgement.true, 2) - min(judgement.false, 2))
            - self.harmless * judgement.rude
            + self.finished * (judgement.finished - 0.1 * max(judgement.words - TOO_LONG, 0))
            + self.length * judgement.words
            + self.noise * noise
        )

    def ranks(self, task: Task, responses: Sequence[str], world: World) -> list[int]:
        """Return the responses' ranks, 0 for the best. Equal texts and scores close to each other have equal ranks."""
        scores = [self.score(task.prompt, response, judge(task, response, world)) for response in responses]
        levels = [round(score / TIE_MARGIN) for score in scores]
        order = sorted(set(levels), reverse=True)
        return [order.index(level) for level in levels]


def make_labelers(names: Sequence[str], seed: int, noise: float) -> list[Labeler]:
    return [Labeler(name, seed, noise) for name in names]


def votes(labelers: Sequence[Labeler], pair: Pair, world: World) -> list[float]:
    """Return each labeler's vote: 1 for the first response, 0 for the second, 0.5 for a tie."""
    task, *responses = pair
    judged = [(response, judge(task, response, world)) for response in responses]
    found = []
    for labeler in labelers:
        first, second = (labeler.score(task.prompt, response, judgement) for response, judgement in judged)
        found.append(TIE if abs(first - second) < TIE_MARGIN else float(first > second))
    return found


def agreement(labelers: Sequence[Labeler], pairs: Sequence[Pair], world: World) -> Estimate:
    """Return how often two labelers agree on a pair of responses; a pair is one value.

    Ties do not count, as the paper leaves them out of its rankings. Pairs with fewer than two votes are left out.
    """
    return estimates.agreement(
        [vote for vote in votes(labelers, pair, world) if vote != TIE] for pair in pairs
    ).pairwise


def calibrate(names: Sequence[str], seed: int, pairs: Sequence[Pair], world: World, target: float = AGREEMENT) -> float:
    """Return the noise at which labelers agree on `target` of the pairs, found by bisection."""
    low, high = 0.0, 16.0
    for _ in range(10):
        middle = (low + high) / 2
        if agreement(make_labelers(names, seed, middle), pairs, world).value > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
