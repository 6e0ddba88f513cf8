"""Five simulated labelers. What each makes of a response is a rubric that the world can check (helpful, truthful,
harmless, in the paper's order of trouble) with personal weights, plus personal noise; the noise is set so that two
labelers agree on as many pairs as the paper's did."""

import hashlib
import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

from rlhf_fast.pocket.tasks import CLOSED, KINDS, Task
from rlhf_fast.pocket.world import ANIMALS, CITIES, FOODS, PEOPLE, PLACES, THINGS, World, parse, rude, split

AGREEMENT = 0.73  # 72.6 +- 1.5 % among the paper's training labelers
TOO_LONG = 30  # words
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
            weight * math.exp(rng.gauss(0, 0.25)) for weight in (3.0, 1.5, 2.0, 1.0)
        )
        self.length = rng.gauss(0, 0.02)

    def opinion(self, task: Task, response: str, world: World) -> float:
        """How good the response is in this labeler's eyes; only differences mean anything."""
        seen = judge(task, response, world)
        digest = hashlib.blake2b(f"{self.seed}|{self.name}|{task.prompt}|{response}".encode(), digest_size=8).digest()
        luck = _STANDARD.inv_cdf((int.from_bytes(digest, "big") + 0.5) / 2**64)
        return (
            self.helpful * seen.helpful
            + self.truthful * (0.5 * min(seen.true, 1) - min(seen.false, 2))
            - self.harmless * seen.rude
            + self.ended * (seen.ended - 0.1 * max(seen.words - TOO_LONG, 0))
            + self.length * seen.words
            + self.noise * luck
        )

    def ranks(self, task: Task, responses: Sequence[str], world: World) -> list[int]:
        """0 = best. The same text gets the same rank, and so do opinions that are too close to call."""
        opinions = [round(self.opinion(task, response, world) / 0.25) for response in responses]
        order = sorted(set(opinions), reverse=True)
        return [order.index(opinion) for opinion in opinions]


def team(names: Sequence[str], seed: int, noise: float) -> list[Labeler]:
    return [Labeler(name, seed, noise) for name in names]


def agreement(labelers: Sequence[Labeler], pairs: Sequence[tuple[Task, str, str]], world: World) -> list[float]:
    """For each pair, the share of pairs of labelers that prefer the same response."""
    shares = []
    for task, first, second in pairs:
        votes = [who.opinion(task, first, world) > who.opinion(task, second, world) for who in labelers]
        ayes, all_ = sum(votes), len(votes)
        shares.append((math.comb(ayes, 2) + math.comb(all_ - ayes, 2)) / math.comb(all_, 2))
    return shares


def calibrate(
    names: Sequence[str], seed: int, pairs: Sequence[tuple[Task, str, str]], world: World, target: float = AGREEMENT
) -> float:
    """The noise at which labelers agree on `target` of the pairs (of different texts), by bisection."""
    low, high = 0.0, 16.0
    for _ in range(12):
        middle = (low + high) / 2
        shares = agreement(team(names, seed, middle), pairs, world)
        low, high = (middle, high) if sum(shares) / len(shares) > target else (low, middle)
    return (low + high) / 2
