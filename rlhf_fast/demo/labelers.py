"""Five simulated labelers. What each makes of a response is a rubric that the world can check (helpful, truthful,
harmless, in the paper's order of trouble) with personal weights, plus personal noise; the noise is set so that two
labelers agree on as many pairs as the paper's did."""

import hashlib
import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from rlhf_fast.demo.tasks import CLOSED, KINDS, Task
from rlhf_fast.demo.world import ANIMALS, CITIES, FOODS, PEOPLE, PLACES, THINGS, World, parse, rude, split

AGREEMENT = 0.73  # 72.6 +- 1.5 % among the paper's training labelers
TOO_LONG = 30  # words
CLOSE = 0.25  # opinions nearer than about this are a tie in a ranking
Pair = tuple[Task, str, str]  # a prompt and two responses to it
_NAMES = frozenset([*PEOPLE, *CITIES, *ANIMALS, *THINGS, *PLACES, *FOODS])
_STANDARD = NormalDist()


class Judgement(NamedTuple):
    """What can be checked about a response, the same for everybody."""

    helpful: float  # 0 to 1: what was asked, in sentences that make sense
    true: int  # claims that hold
    false: int  # claims that do not
    rude: bool
    ended: bool  # with a full stop (or question mark)
    words: int
    invented: bool  # names something that the prompt does not have, where the prompt has all that is needed

    @property
    def truthful(self) -> bool:
        """True and informative: claims something, and nothing false."""
        return self.true > 0 and self.false == 0


def judge(task: Task, response: str, world: World) -> Judgement:
    """The facts about a response on which the labelers base their opinions."""
    pieces = split(response)
    known = [parse(piece) for piece in pieces]
    said = [sentence for sentence in known if sentence]
    claims = [world.true(sentence) for sentence in said]
    kind = KINDS[task.kind]
    met = kind.met(task.slots, said, response, world)
    # Lists and counting are not sentences of the world; everything else has to be.
    sense = 1.0 if task.kind in {"list", "count"} else len(said) / max(len(pieces), 1)
    words = response.split()
    return Judgement(
        helpful=met * (0.4 + 0.6 * sense),
        true=claims.count(True),
        false=claims.count(False),
        rude=rude(response),
        ended=bool(words) and words[-1] in {".", "?"},
        words=len(words),
        invented=kind.category in CLOSED and bool(_NAMES.intersection(words) - {*task.prompt.split()}),
    )


class Labeler:
    """One person's taste: weights around everybody's, a liking for long or short answers, and moments of inattention.

    The noise is a function of the labeler, the prompt and the response, so asking twice gives the same opinion."""

    def __init__(self, name: str, seed: int, noise: float):
        rng = random.Random(f"labeler {name} {seed}")
        self.name, self.seed, self.noise = name, seed, noise
        self.helpful, self.truthful, self.harmless, self.ended = (
            weight * math.exp(rng.gauss(0, 0.25)) for weight in (4.0, 2.0, 2.5, 1.5)
        )
        self.length = rng.gauss(0.0, 0.02)

    def opinion(self, prompt: str, response: str, seen: Judgement) -> float:
        """How good the response is in this labeler's eyes; only differences mean anything."""
        digest = hashlib.blake2b(f"{self.seed}|{self.name}|{prompt}|{response}".encode(), digest_size=8).digest()
        luck = _STANDARD.inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)
        return (
            self.helpful * seen.helpful
            + self.truthful * (0.5 * min(seen.true, 2) - min(seen.false, 2))
            - self.harmless * seen.rude
            + self.ended * (seen.ended - 0.1 * max(seen.words - TOO_LONG, 0))
            + self.length * seen.words
            + self.noise * luck
        )

    def ranks(self, task: Task, responses: Sequence[str], world: World) -> list[int]:
        """0 = best. The same text gets the same rank, and so do opinions that are too close to call."""
        opinions = [round(self.opinion(task.prompt, r, judge(task, r, world)) / CLOSE) for r in responses]
        order = sorted(set(opinions), reverse=True)
        return [order.index(opinion) for opinion in opinions]


def team(names: Sequence[str], seed: int, noise: float) -> list[Labeler]:
    return [Labeler(name, seed, noise) for name in names]


def preferences(labelers: Sequence[Labeler], pair: Pair, world: World) -> list[float]:
    """Each labeler's vote: 1 for the first response, 0 for the second, 0.5 if they are too close to call."""
    task, *texts = pair
    seen = [judge(task, text, world) for text in texts]
    votes = []
    for who in labelers:
        first, second = (who.opinion(task.prompt, *side) for side in zip(texts, seen, strict=True))
        votes.append(0.5 if abs(first - second) < CLOSE else float(first > second))
    return votes


def agreement(labelers: Sequence[Labeler], pairs: Sequence[Pair], world: World) -> list[float]:
    """For each pair of responses on which at least two labelers have a preference, how many of those who have one
    agree, as a share of all pairs of them. Ties are left out, as the paper leaves them out of its rankings."""
    shares = []
    for pair in pairs:
        votes = preferences(labelers, pair, world)
        ayes, noes = votes.count(1.0), votes.count(0.0)
        if ayes + noes > 1:
            shares.append((math.comb(ayes, 2) + math.comb(noes, 2)) / math.comb(ayes + noes, 2))
    return shares


def calibrate(names: Sequence[str], seed: int, pairs: Sequence[Pair], world: World, target: float = AGREEMENT) -> float:
    """The noise at which labelers agree on `target` of the pairs, by bisection."""
    low, high = 0.0, 16.0
    for _ in range(10):
        middle = (low + high) / 2
        shares = agreement(team(names, seed, middle), pairs, world)
        low, high = (middle, high) if sum(shares) / len(shares) > target else (low, middle)
    return (low + high) / 2
