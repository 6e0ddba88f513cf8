"""A tokenizer as llama.cpp reads it: byte-level BPE by the name of its splits, and SentencePiece's BPE by scores.

llama.cpp knows how a text is split before BPE only by a name. The name is chosen by behaviour: that of the splits which
are the tokenizer's own on a text that tells them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from rlhf_fast.data.encode import Encoder, template_end
from rlhf_fast.errors import UserError
from rlhf_fast.model.end_tokens import end_token_ids
from rlhf_fast.model.model import Model

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf's TokenType."""
SPACE = "▁"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    🚀 (normal) 😶\u200d🌫️ ✅ 3 33 333 3333 33333 333333 3.3 3..3 3...3"
    ' កាន់តែពិសេស😁 ?我想在apple工作1314151天～ ------======= нещо на Български ```````""""......!!!!!!??????'
    " I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL "
    " HelloWorld/path_x \r\n"
)
"""A text on which the known ways to split differ."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END_OF_SPLITS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}"
    r"\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


NORMALIZES = (
    "the tokenizer composes characters (NFC) before it splits a text, llama.cpp does not: give it composed texts"
)


def _split(pattern: str) -> PreTokenizer:
    """Return the splits by a regular expression, as bytes."""
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


class Splits(NamedTuple):
    """A way to split a text, and whether a split that is a token is not merged anew."""

    split: PreTokenizer
    ignore_merges: bool = False


LLAMA3 = _split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{END_OF_SPLITS}")
PRE = {
    "gpt-2": Splits(ByteLevel(add_prefix_space=False)),
    "smollm": Splits(Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    "llama-bpe": Splits(LLAMA3, ignore_merges=True),
    "dbrx": Splits(LLAMA3),
    "qwen2": Splits(_split(rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{END_OF_SPLITS}")),
    "tekken": Splits(_split(TEKKEN), ignore_merges=True),
}
"""llama.cpp's tokenizer.ggml.pre -> what it does."""


class TokenizerFacts(NamedTuple):
    """The tokenizer's part of a GGUF file."""

    metadata: list[tuple[str, Any]]
    """Pairs of a method of gguf's writer and its argument."""
    ends: list[int]
    """Tokens that end a response."""
    note: str = ""
    """A sentence for the user."""


def tokenizer_facts(model: Model, encoder: Encoder) -> TokenizerFacts:
    """Return the tokenizer as llama.cpp reads it; UserError for one that it cannot read."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{model.name}: its tokenizer is not one of the package tokenizers, so that GGUF cannot hold it"
        )
    state = json.loads(backend.to_str())
    bpe, kind = state["model"], state["model"]["type"]
    if kind != "BPE":
        raise UserError(
            f"{model.name}: its tokenizer is {kind}; a GGUF file holds byte-level BPE and SentencePiece's BPE"
        )
    if bpe.get("dropout") or bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix"):
        raise UserError(f"{model.name}: its BPE has dropout, a prefix or a suffix of tokens, which GGUF cannot hold")
    tokens, types = _tokens(model, sentencepiece=bool(bpe.get("byte_fallback")))
    metadata: list[tuple[str, Any]] = []
    if bpe.get("byte_fallback"):
        scores = _scores(model, bpe, tokens)
        metadata += [("add_tokenizer_model", "llama"), ("add_tokenizer_pre", "default"), ("add_token_scores", scores)]
        metadata += [("add_add_space_prefix", _adds_space(model, backend))]
    else:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
        pre = pre_tokenizer_name(model.name, backend, bool(bpe.get("ignore_merges")))
        metadata += [("add_tokenizer_model", "gpt2"), ("add_tokenizer_pre", pre), ("add_token_merges", merges)]
    metadata += [("add_token_list", tokens), ("add_token_types", types)]
    special, ends = _special_tokens(model, encoder)
    normalizes = bool(backend.normalizer) and not bpe.get("byte_fallback")
    return TokenizerFacts(metadata + special, ends, NORMALIZES if normalizes else "")


def pre_tokenizer_name(name: str, backend: Tokenizer, ignore_merges: bool) -> str:
    """Return llama.cpp's name of the tokenizer's splits, by what they do to PROBE; UserError if it has none."""
    text = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
    if text != PROBE:
        raise UserError(f"{name}: its tokenizer changes a text before it splits it, which llama.cpp does not do")
    split = backend.pre_tokenizer
    chunks = split.pre_tokenize_str(PROBE) if split else None
    for pre, known in PRE.items():
        if chunks == known.split.pre_tokenize_str(PROBE) and ignore_merges == known.ignore_merges:
            return pre
    raise UserError(
        f"{name}: its tokenizer splits texts in a way that is none of llama.cpp's which are known here"
        f" ({', '.join(PRE)}), so that the file would read other tokens"
    )


def _tokens(model: Model, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Return the text and the type of each row's token."""
    tokenizer = model.tokenizer
    names = {id: token for token, id in tokenizer.get_vocab().items() if id < model.num_rows}
    added = {id: token for id, token in tokenizer.added_tokens_decoder.items() if id < model.num_rows}
    control = set(tokenizer.all_special_ids)
    tokens, types = [], []
    for id in range(model.num_rows):
        if id in added:
            tokens.append(added[id].content)
            is_unknown = sentencepiece and id == tokenizer.unk_token_id
            special = added[id].special or id in control
            types.append(UNKNOWN if is_unknown else CONTROL if special else USER_DEFINED)
        elif id in names:
            tokens.append(names[id])
            is_byte = sentencepiece and BYTE_TOKEN.fullmatch(names[id])
            unknown = sentencepiece and id == tokenizer.unk_token_id
            types.append(BYTE if is_byte else UNKNOWN if unknown else CONTROL if id in control else NORMAL)
        else:
            tokens.append(f"[PAD{id}]")
            types.append(UNUSED)
    return tokens, types


def _scores(model: Model, bpe: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return the scores by which llama.cpp merges in the order of the tokenizer's merges.

    It merges the two neighbours that make the token of the highest score, whichever they are. So every pair of tokens
    that makes a token must be a merge, and those that make one token must stand together.
    """
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in bpe["merges"]]
    given, vocabulary = set(merges), bpe["vocab"]
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        if left + right != last:
            last = left + right
            if last in ranks:
                raise _not_by_scores(model, f"it makes {last!r} early and late")
            ranks[last] = len(ranks)
    missing = next((pair for token in ranks for pair in _pairs(token, vocabulary) if pair not in given), None)
    if missing:
        raise _not_by_scores(model, f"it does not merge {missing[0]!r} and {missing[1]!r}")
    return [float(-ranks[token]) if token in ranks else -1e9 for token in tokens]


def _pairs(token: str, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of tokens that make a token."""
    for i in range(1, len(token)):
        if token[:i] in vocabulary and token[i:] in vocabulary:
            yield token[:i], token[i:]


def _not_by_scores(model: Model, reason: str) -> UserError:
    return UserError(
        f"{model.name}: the order of its tokenizer's merges cannot be written as scores of tokens ({reason}), so that"
        " llama.cpp would read other tokens"
    )


def _adds_space(model: Model, backend: Tokenizer) -> bool:
    """Return whether a text gets a space before it. UserError for other changes to a text than spaces to ▁."""
    bare = backend.encode("a b  c", add_special_tokens=False).tokens
    text = "".join(bare)
    if text not in (f"{SPACE}a{SPACE}b{SPACE}{SPACE}c", f"a{SPACE}b{SPACE}{SPACE}c"):
        raise UserError(
            f"{model.name}: its tokenizer changes a text in a way that GGUF cannot hold ('a b  c' to {text!r})"
        )
    return text.startswith(SPACE)


def _special_tokens(model: Model, encoder: Encoder) -> tuple[list[tuple[str, Any]], list[int]]:
    """Return the start token, the end tokens, whether a text begins with the former, and the chat template."""
    tokenizer, bos = model.tokenizer, encoder.bos
    start = bos[0] if bos else tokenizer.bos_token_id
    if len(bos) > 1:
        raise UserError(f"{model.name}: its tokenizer puts {len(bos)} tokens before a text, and llama.cpp at most one")
    ends = [id for id in end_token_ids(model) if 0 <= id < model.num_rows]
    if not ends:
        raise UserError(f"{model.name}: no token ends its responses; give its tokenizer an end token (eos_token)")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    of_turn = [id for id in (template_end(tokenizer), *ends) if id is not None and id != end]
    others = list(dict.fromkeys(of_turn))
    if len(others) > 2:
        raise UserError(f"{model.name}: {len(ends)} tokens end its responses, and a GGUF file names at most 3")
    metadata: list[tuple[str, Any]] = [("add_eos_token_id", end), ("add_add_bos_token", bool(bos))]
    metadata += [("add_add_eos_token", False)]
    metadata += list(zip(("add_eot_token_id", "add_eom_token_id"), others, strict=False))
    for name, id in (("bos", start), ("unk", tokenizer.unk_token_id), ("pad", tokenizer.pad_token_id)):
        if id is not None and id < model.num_rows:
            metadata.append((f"add_{name}_token_id", id))
    if isinstance(tokenizer.chat_template, str) and tokenizer.chat_template:
        metadata.append(("add_chat_template", tokenizer.chat_template))
    return metadata, ends
