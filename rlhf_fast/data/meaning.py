"""Names of columns and keys that change the meaning of a row or of a turn: one table of patterns for both.

Names are compared without case, underscores and other separators: systemPrompt, system_prompt and system-prompt are
one. Names that no pattern knows, such as category, source, id, url or score, are metadata.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

IN_PROMPT = "write it into the prompt"
BELOW_PROMPT = "write it into the prompt, or set columns: {instruction: prompt} to put it below"
SYSTEM = "set columns: {system: NAME}"
NO_LOSS = "give it as weight of a turn, 0 or 1"
THOUGHT = "give it as reasoning_content of the answer"
RENDERING = "the chat template is rendered with its own defaults"
QUESTION = "question|query|queries|instruction|context|input|prompt|post|problem|request|utterance|article|document"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of the thought of an answer that are read as reasoning_content."""


class Rule(NamedTuple):
    """Says what the value of a column or key means, and the remedy.

    media: no text. text: it belongs to the prompt, and is harmless if the prompt has it. thought: text of an answer.
    any: every value changes the meaning. off: a value that says no is a mask. on: a value that says yes is one.
    weight: every value but 1 is one. label: a value that says no marks a bad answer. channel: all but the final one.
    """

    kind: str
    remedy: str


BOTH: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        Rule("media", "only text can be trained on"),
        (
            "(image|img|picture|photo|screenshot|audio|video|pixel|attachment)s?"
            "(url|path|file|byte|data|value|content)?s?",
        ),
    ),
    (Rule("on", NO_LOSS), ("(is|has)?masked", "(is)?(ignored?|skip(ped)?|frozen|untrained)")),
    (Rule("on", NO_LOSS), ("(no|dont|ignore|skip)(loss|train|learn)",)),
    (Rule("any", NO_LOSS), ("masks?",)),
    (
        Rule("weight", NO_LOSS),
        (
            "(loss|label|token|train|training|attention|assistant|completion)masks?",
            "(loss|sample|example|instance|row|turn|token|importance)?(weight|scale)s?",
        ),
    ),
    (Rule("off", NO_LOSS), ("(is|do|has|use|compute)?(train(able|ing|ed)?.*|loss.*|learn(able|ing|ed)?.*)",)),
    (
        Rule("any", RENDERING),
        (
            "(chat)?template(kwargs|args|arguments|params)",
            "(enable|disable|use|no)(thinking|reasoning|think)",
            "(reasoning|thinking)(effort|mode|budget|level)",
            "addgenerationprompt|continuefinalmessage",
        ),
    ),
    (
        Rule("thought", THOUGHT),
        (
            "(.*(reasoning|thinking|rationale|chainofthought|thought|scratchpad)|(.*complex|gold|long|short|model)?cot)s?",
            "(reasoning|thinking|thought|cot)(content|detail|trace|step|text|process|chain)s?",
        ),
    ),
    (Rule("any", "give it as tool_calls"), ("functioncalls?",)),
)
ROW: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (Rule("label", ""), ("(kto)?label", "ktotag", "desirable")),
    (Rule("any", "give it in messages"), ("toolcalls?",)),
    (Rule("any", "give it beside a conversation"), ("tools",)),
    (
        Rule("any", "give it as tools"),
        ("functions", "(available|openai)(tools|functions)", "(tool|function)s?(definition|description|schema|spec)s?"),
    ),
    (Rule("text", "give it as turns of a conversation"), ("system",)),
    (
        Rule("text", SYSTEM),
        ("(custom|default)?(sys(tem)?|developer|dev)(prompt|message|msg|instruction|content|text|turn)?s?", "preamble"),
    ),
    (
        Rule("text", "give it as history, or as turns of a conversation"),
        (
            "(chat|dialog|dialogue|conversation|message)?histor(y|ies)",
            "(previous|prior|past|earlier)(turn|message|dialog)s?",
        ),
    ),
    (Rule("text", "give the whole conversation in one column"), ("messages|conversations?|dialog(ue)?s?",)),
    (Rule("text", BELOW_PROMPT), ("contexts?|inputs?",)),
    (
        Rule("text", IN_PROMPT),
        (
            ".*contexts?|ctxs?",
            "(user)?(prompt|question|query|queries|instruction|input|message|request)s?",
            "(retrieved|supporting|reference|gold|source)?(doc|document|passage|paragraph|article|chunk|snippet|fact)s?",
            "(.*evidence|.*knowledge|background|table|hint|choices|options|persona|prefix|suffix|schema|premise)s?",
            "((few|one|in)?(shot|context))?(example|demonstration|exemplar)s?|fewshots?",
        ),
    ),
)
TURN: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (Rule("any", "write who speaks into the content"), ("name|speaker|author",)),
    (Rule("any", "give them as the row's tools"), ("tools|functions",)),
    (Rule("any", "only the turns of a demonstration or a prompt can have it"), ("toolcalls?",)),
    (Rule("any", "a turn has one role and one content"), ("role|from|content|value|text|message",)),
    (Rule("any", "a turn is learned whole or not at all"), ("prefix",)),
    (Rule("channel", "only the final channel is an answer"), ("channel",)),
    (Rule("any", "give a call as tool_calls"), ("recipients?|to",)),
    (Rule("off", "every answer ends with an end token"), ("endturn|endofturn|eot",)),
)
NO = ("", "0", "false", "no", "off", "none", "bad", "rejected", "undesirable", "negative")


def compact(name: str) -> str:
    """Return a name without case and separators."""
    return re.sub(r"[\W_]+", "", name).lower()


@cache
def rule_of(name: str, turn: bool = False) -> Rule | None:
    """Return the rule for a column, or with `turn` for a key of a turn; None for metadata."""
    bare = compact(name)
    for rule, patterns in (*(TURN if turn else ROW), *BOTH):
        if any(re.fullmatch(pattern, bare) for pattern in patterns):
            return rule._replace(remedy=rule.remedy.replace("NAME", name))
    return None


def says_no(value: object) -> bool:
    """Return whether a value is a false flag: false, 0, or a text that says so."""
    if isinstance(value, str):
        return value.strip().lower() in NO
    return value is False or (isinstance(value, (int, float)) and value == 0)


def is_question(name: str) -> bool:
    """Return whether a column of this name is probably a prompt."""
    return bool(re.fullmatch(rf"(user|human|original|full)?({QUESTION})s?(text|body)?", compact(name)))
