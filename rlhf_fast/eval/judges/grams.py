"""Linear judges on n-grams by numpy alone: sublinear counts, idf, unit length and one weight a gram, as scikit-learn's
TfidfVectorizer and linear models compute them."""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

CONTRACTIONS = (
    ("can't", "cannot"),
    ("can not", "cannot"),
    ("won't", "will not"),
    ("n't", " not"),
    ("'m", " am"),
    ("'re", " are"),
    ("it's", "it is"),
    ("that's", "that is"),
)
"""In this order. A tokenizer that drops "I" and cuts "can't" to "can" finds 7 % of GPT-4's refusals, this one 97 %."""
WORD = re.compile(r"[a-z']+")
BUCKETS = 1 << 15
CHAR_SIZES = (3, 4, 5)


APOSTROPHES = str.maketrans(dict.fromkeys("’‘‛′ʼ`´", "'"))


def lowered(text: str) -> str:
    """Return a text in lower case with straight apostrophes; letters of full width and ligatures become plain (NFKC).

    The apostrophes go first: NFKC makes a space and an accent of an acute accent that stands alone.
    """
    return unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).lower()


def spelled_out(text: str, max_chars: int | None = None) -> str:
    """Return the first characters of a text in lower case, without contractions."""
    text = lowered(text)[:max_chars]
    for short, long in CONTRACTIONS:
        text = text.replace(short, long)
    return text


def word_grams(text: str, max_chars: int | None = 400) -> list[str]:
    """Return the words and pairs of words at the beginning of a text."""
    words = WORD.findall(spelled_out(text, max_chars))
    return words + [f"{first} {second}" for first, second in pairwise(words)]


def char_buckets(text: str) -> list[int]:
    """Return the hash buckets of a text's character 3- to 5-grams within words that have a space on both sides."""
    return [zlib.crc32(gram.encode("utf-8", "replace")) % BUCKETS for gram in _char_grams(text)]


def _char_grams(text: str) -> Iterator[str]:
    for word in lowered(text).split():
        padded = f" {word} "
        for size in CHAR_SIZES:
            for start in range(max(len(padded) - size + 1, 1)):
                yield padded[start : start + size]


class WordWeights:
    """A linear judge on words and pairs of words. terms: gram -> (idf, weight)."""

    def __init__(self, bias: float, terms: Mapping[str, tuple[float, float]], max_chars: int | None = 400):
        self.bias, self.terms, self.max_chars = bias, terms, max_chars

    def __call__(self, text: str) -> float:
        """Return the bias and the weighted grams; just the bias if no gram is known."""
        total = squares = 0.0
        for gram, count in Counter(word_grams(text, self.max_chars)).items():
            if (term := self.terms.get(gram)) is None:
                continue
            value = (1 + math.log(count)) * term[0]
            squares += value * value
            total += value * term[1]
        return self.bias + (total / math.sqrt(squares) if squares else 0.0)


class CharWeights:
    """A linear judge on hashed character grams. idf, weight: (BUCKETS,); a bucket that no gram has filled has idf 0."""

    def __init__(self, bias: float, idf: np.ndarray, weight: np.ndarray):
        self.bias, self.idf, self.weight = bias, idf.astype(np.float64), weight.astype(np.float64)

    def __call__(self, text: str) -> float:
        """Return the bias and the weighted grams; just the bias if no gram is known."""
        buckets, counts = np.unique(np.array(char_buckets(text), np.int64), return_counts=True)
        values = (1 + np.log(counts)) * self.idf[buckets]
        norm = float(np.sqrt((values * values).sum()))
        return self.bias + (float((values * self.weight[buckets]).sum()) / norm if norm else 0.0)
