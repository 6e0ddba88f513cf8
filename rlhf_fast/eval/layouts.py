"""Layouts of the benchmarks' files: ours and the official ones, each a function from a row to a row in our layout.

A layout is recognised by its columns. The functions raise InvalidRow for a wrong value, and return None for a row that
the set leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_fast.data.fields import InvalidRow, json_type, text_value
from rlhf_fast.data.rows import parse_row
from rlhf_fast.eval.files import Row

INSTRUCTIONS = ("respectful", "biased")
"""The paper's instructions. A row may have its own words for them: `instructions`, an object."""
BINS = 4
"""Bins of a prompt's toxicity: quarters of [0, 1]."""


class Layout(NamedTuple):
    """One form of a set's files."""

    name: str
    columns: tuple[str, ...]
    """Columns that every row has."""
    convert: Callable[[Row], Row | None]
    """Function from a row to one in our layout."""


def _texts(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not value:
        raise InvalidRow(f"{name} must be a list of texts, found {json_type(value) if value != [] else 'an empty one'}")
    return [text_value(text, f"entry {i + 1} of {name}") for i, text in enumerate(value)]


def _optional_text(value: Any, name: str) -> str:
    return "" if value in (None, "") else text_value(value, name)


def _number(value: Any, name: str) -> float | None:
    """Return a number, also one that is written as text, as in a table; None for null and for an empty cell."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidRow(f"{name} must be a number, found {value!r:.40}") from error


def _index(value: Any, name: str, count: int) -> int:
    number = _number(value, name)
    if number is None or number != int(number) or not 0 <= number < count:
        raise InvalidRow(f"{name} must be a whole number from 0 to {count - 1}, found {value!r:.40}")
    return int(number)


def _own_instructions(row: Row) -> Row:
    """Return the row's own words for the paper's instructions as a field, {} if it has none."""
    found = row.get("instructions")
    if found is None:
        return {}
    if not isinstance(found, dict) or set(found) != set(INSTRUCTIONS):
        raise InvalidRow(f"instructions must be an object with {' and '.join(INSTRUCTIONS)}")
    return {"instructions": {name: text_value(found[name], name) for name in INSTRUCTIONS}}


def hellaswag(row: Row) -> Row:
    endings = _texts(row["endings"], "endings")
    if len(endings) < 2:
        raise InvalidRow("endings has one text; a choice needs two or more")
    label = _index(row["label"], "label", len(endings))
    return {"ctx": text_value(row["ctx"], "ctx"), "endings": endings, "label": label}


def lm_eval_text(text: str) -> str:
    """Return a text of HellaSwag as lm-eval's `preprocess` cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def hellaswag_official(row: Row) -> Row:
    head, tail = row["ctx_a"], row["ctx_b"]
    if not isinstance(head, str) or not isinstance(tail, str):  # either may be empty
        raise InvalidRow("ctx_a and ctx_b must be texts")
    context = f"{text_value(row['activity_label'], 'activity_label')}: {head} {tail.capitalize()}"
    endings = [lm_eval_text(ending) for ending in _texts(row["endings"], "endings")]
    return hellaswag({"ctx": lm_eval_text(context), "endings": endings, "label": row["label"]})


def lambada(row: Row) -> Row:
    return {name: text_value(row[name], name) for name in ("context", "target")}


def lambada_official(row: Row) -> Row:
    context, _, target = text_value(row["text"], "text").rpartition(" ")
    if not context or not target:
        raise InvalidRow("text must be words with one space before the last, which is the word to predict")
    return {"context": context, "target": target}


def truthfulqa(row: Row) -> Row:
    own = {"prompt": text_value(row["prompt"], "prompt")} if row.get("prompt") is not None else {}
    return {
        "question": text_value(row["question"], "question"),
        "best_answer": text_value(row["best_answer"], "best_answer"),
        "correct_answers": _texts(row["correct_answers"], "correct_answers"),
        "incorrect_answers": _texts(row["incorrect_answers"], "incorrect_answers"),
        "category": _optional_text(row.get("category"), "category"),
        **own,
    }


def truthfulqa_csv(row: Row) -> Row:
    def split(name: str) -> list[str]:
        return [answer.strip() for answer in text_value(row[name], name).split(";") if answer.strip()]

    return truthfulqa(
        {
            "question": row["Question"],
            "best_answer": text_value(row["Best Answer"], "Best Answer").strip(),
            "correct_answers": split("Correct Answers"),
            "incorrect_answers": split("Incorrect Answers"),
            "category": row["Category"],
        }
    )


def _targets(row: Row, name: str) -> dict[str, bool]:
    """Return answer -> whether it is right, of the official object or of the hub's choices and labels."""
    found = row[name]
    if isinstance(found, dict) and set(found) == {"choices", "labels"}:
        if not isinstance(found["labels"], list) or len(_texts(found["choices"], "choices")) != len(found["labels"]):
            raise InvalidRow(f"{name} must have as many labels as choices")
        found = dict(zip(found["choices"], found["labels"], strict=True))
    if not isinstance(found, dict) or not found or any(label not in (0, 1) for label in found.values()):
        raise InvalidRow(f"{name} must be an object of answers, each with 1 (right) or 0")
    return {answer: bool(label) for answer, label in found.items()}


def truthfulqa_choices(row: Row) -> Row:
    first, second = _targets(row, "mc1_targets"), _targets(row, "mc2_targets")
    best = [answer for answer, right in first.items() if right]
    if len(best) != 1:
        raise InvalidRow(f"mc1_targets must have one right answer, found {len(best)}")
    return truthfulqa(
        {
            "question": row["question"],
            "best_answer": best[0],
            "correct_answers": [answer for answer, right in second.items() if right],
            "incorrect_answers": [answer for answer, right in second.items() if not right],
        }
    )


def winogender(row: Row) -> Row:
    return {
        **{name: text_value(row[name], name) for name in ("occupation", "male", "female")},
        "bls_pct_female": _number(row.get("bls_pct_female"), "bls_pct_female"),
        **_own_instructions(row),
    }


def winogender_sentence(row: Row) -> Row:
    """Return one of a schema's three sentences, which `join_winogender` puts together."""
    parts = text_value(row["sentid"], "sentid").split(".")
    if len(parts) < 4 or parts[3] not in ("male", "female", "neutral"):
        raise InvalidRow("sentid must be like technician.customer.1.male.txt")
    return {"schema": ".".join(parts[:3]), "occupation": parts[0], parts[3]: text_value(row["sentence"], "sentence")}


def winogender_percentage(row: Row) -> Row:
    """Return an occupation's share of women, which `join_winogender` gives to its schemas."""
    percentage = _number(row["bls_pct_female"], "bls_pct_female")
    return {"occupation": text_value(row["occupation"], "occupation"), "bls_pct_female": percentage}


def crows_pairs(row: Row) -> Row:
    stereotype = _optional_text(row.get("stereotype"), "stereotype")
    if stereotype not in ("", "a", "b"):
        raise InvalidRow(f'stereotype must be "a" or "b", the sentence that has it, found {stereotype!r:.40}')
    return {
        **{name: text_value(row[name], name) for name in ("a", "b")},
        "stereotype": stereotype,
        "bias_type": _optional_text(row.get("bias_type"), "bias_type"),
        **_own_instructions(row),
    }


def crows_pairs_official(row: Row) -> Row:
    """Return a pair whose first sentence is sent_more, the more stereotypical one in either direction."""
    return crows_pairs({"a": row["sent_more"], "b": row["sent_less"], "stereotype": "a", "bias_type": row["bias_type"]})


def toxicity_prompt(row: Row) -> Row | None:
    if isinstance(row["prompt"], dict):
        return real_toxicity_prompt(row)
    toxicity = _number(row.get("prompt_toxicity"), "prompt_toxicity")
    if toxicity is not None and not 0 <= toxicity <= 1:
        raise InvalidRow(f"prompt_toxicity must be between 0 and 1, found {toxicity:g}")
    if row.get("bin") is not None:
        bin_ = _index(row["bin"], "bin", BINS)
    else:
        bin_ = -1 if toxicity is None else min(int(toxicity * BINS), BINS - 1)
    text = text_value(row["prompt"], "prompt")
    return {"prompt": text, "prompt_toxicity": toxicity, "bin": bin_, **_own_instructions(row)}


def real_toxicity_prompt(row: Row) -> Row | None:
    prompt = row["prompt"]
    if not isinstance(prompt, dict) or not isinstance(prompt.get("text"), str) or "toxicity" not in prompt:
        raise InvalidRow("prompt must be an object with text and toxicity")
    if prompt["toxicity"] is None:
        return None
    return toxicity_prompt({"prompt": prompt["text"], "prompt_toxicity": prompt["toxicity"]})


def harmful_prompt(row: Row) -> Row:
    kind = row["kind"]
    if kind not in ("harmful", "safe"):
        raise InvalidRow(f'kind must be "harmful" or "safe", found {kind!r:.40}')
    text, source = text_value(row["prompt"], "prompt"), text_value(row["source"], "source")
    category = _optional_text(row.get("category"), "category")
    return {"prompt": text, "kind": kind, "source": source, "category": category}


def xstest(row: Row) -> Row:
    category = text_value(row["type"], "type")
    harmful = category.startswith("contrast")
    if row.get("label") and row["label"] != ("unsafe" if harmful else "safe"):
        raise InvalidRow(f"label is {row['label']!r:.40}, but a prompt of type {category!r} is the other kind")
    kind = "harmful" if harmful else "safe"
    return harmful_prompt({"prompt": row["prompt"], "kind": kind, "source": "xstest", "category": category})


def advbench(row: Row) -> Row:
    return harmful_prompt({"prompt": row["goal"], "kind": "harmful", "source": "advbench"})


def strongreject(row: Row) -> Row:
    own = {"prompt": row["forbidden_prompt"], "category": row["category"]}
    return harmful_prompt({**own, "kind": "harmful", "source": "strongreject"})


def harmbench(row: Row) -> Row | None:
    if row["FunctionalCategory"] != "standard":  # the others need a context, or are about copyright
        return None
    own = {"prompt": row["Behavior"], "category": row["SemanticCategory"]}
    return harmful_prompt({**own, "kind": "harmful", "source": "harmbench_standard"})


def prompt(row: Row) -> Row:
    if isinstance(row.get("prompt"), dict):
        raise InvalidRow("prompt is an object, as in RealToxicityPrompts; name its file toxicity_prompts.jsonl")
    return {"prompt": parse_row(row, "prompts").prompt}


def text(row: Row) -> Row:
    return {"text": text_value(row["text"], "text")}
