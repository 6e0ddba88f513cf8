"""The base of judges of a text alone, and the test by which all built-in ones leave out what is not English."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rlhf_fast.eval.judges.grams import lowered
from rlhf_fast.eval.judges.protocol import Verdict, unjudged
from rlhf_fast.eval.judges.weight_files import read_json

WORD_IN_ANY_LANGUAGE = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
ENGLISH_WORDS = "english_words.json"
MIN_TEXTS = 3
"""Number of labelled texts with a word, from which on it counts as English."""
MIN_KNOWN = 0.4
"""Share of known words below which a text is unlike those that a judge knows: another language, code, names.

Other languages in Latin letters reach 0.33 by words such as "die" and "no"; 99 % of English web texts have more.
"""


def distinct_words(text: str) -> set[str]:
    """Return the words of a text in lower case, each once."""
    return set(WORD_IN_ANY_LANGUAGE.findall(lowered(text)))


def frequent_words(texts: Iterable[str]) -> list[str]:
    """Return the words that at least MIN_TEXTS of the texts have, in order; of single letters, "a" and "i" alone."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in distinct_words(text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= MIN_TEXTS and (len(word) > 1 or word in "ai"))


@lru_cache(maxsize=1)
def english_words() -> frozenset[str]:
    """Return the words that ship with the package."""
    return frozenset(read_json(ENGLISH_WORDS)["words"])


def why_not_english(text: str, known: Collection[str] = ()) -> str:
    """Return the reason why a text cannot be judged, "" if it can. known: words that count as English too."""
    words = distinct_words(text)
    num_known = sum(word in english_words() or word in known for word in words)
    if not num_known:
        return "no known word"
    return "" if num_known >= MIN_KNOWN * len(words) else "few known words"


class TextJudge:
    """Judges answers by their text alone. A subclass gives the score."""

    threshold = 0.5
    max_chars: int | None = None
    """Number of characters that are read; None = all."""

    def __call__(
        self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()
    ) -> list[Verdict]:
        """Return the verdicts."""
        del prompts, rows
        return [self.verdict(answer) for answer in answers]

    def verdict(self, answer: str) -> Verdict:
        """Return the verdict on one answer."""
        if not answer.strip():
            return unjudged("empty")
        if not self.is_certain(answer):
            if reason := why_not_english(answer[: self.max_chars]):
                return unjudged(reason)
            if self.is_too_short(answer):
                return unjudged("too short")
        return Verdict(self.score(answer))

    def is_certain(self, answer: str) -> bool:
        """Return whether the answer can be judged whatever its other words are."""
        del answer
        return False

    def is_too_short(self, answer: str) -> bool:
        """Return whether an English answer is too short to be judged."""
        raise NotImplementedError

    def score(self, answer: str) -> float:
        """Return the score of an answer that can be judged, from 0 to 1."""
        raise NotImplementedError
