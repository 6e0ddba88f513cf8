"""Ollama's Modelfile beside a GGUF file: the format of prompts as a Go template, stop texts, sampling parameters.

The template is built from what the model's own format writes around turns, and is compared with that format on
conversations before it is written. One that cannot be expressed like that is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_fast.data.encode import Encoder
from rlhf_fast.data.fields import InvalidRow, Message
from rlhf_fast.errors import UserError
from rlhf_fast.model.model import Model

ROLES = ("system", "user", "assistant")
CONTEXT = 4096
"""Largest num_ctx that is written; Ollama's memory grows with it."""
MARK = "\ue000{}\ue001"


class GoTemplate(NamedTuple):
    """A format of prompts: texts around each turn's content, by its role."""

    first: str
    """Text before everything, or before the first turn if that is no system turn: a default system turn."""
    around: dict[str, tuple[str, str]]
    between: str
    """Text between two turns."""
    last: str
    """Text behind the last turn, after which the model answers."""

    def render(self, turns: Sequence[Message]) -> str:
        """Return what Go makes of `source`."""
        parts = [self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1] for turn in turns]
        first = "" if turns[0]["role"] == "system" else self.first
        return first + self.between.join(parts) + self.last

    def source(self) -> str:
        """Return the template in Go's language, as Ollama executes it: over .Messages."""
        default = (
            f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.first)}{{{{ end }}}}' if self.first else ""
        )
        cases = ""
        for role, (before, after) in self.around.items():
            word = "else if" if cases else "if"
            cases += f'{{{{ {word} eq $m.Role "{role}" }}}}{_go(before)}{{{{ $m.Content }}}}{_go(after)}'
        between = f"{{{{ if $i }}}}{_go(self.between)}{{{{ end }}}}" if self.between else ""
        turns = f"{{{{ range $i, $m := .Messages }}}}{between}{cases}{{{{ end }}}}{{{{ end }}}}"
        return f"{default}{turns}{_go(self.last)}"


PLAIN = "{{ .Prompt }}"


def _go(text: str) -> str:
    """Return a text as Go's template has it. UserError for marks that would end the text or the template."""
    if "{{" in text or "}}" in text or '"""' in text:
        raise UserError(f"export: --ollama cannot write the format of prompts, which has {text!r} in it; leave it out")
    # Go takes the first two of "{{{" for the start of an action
    return text[:-1] + '{{ "{" }}' if text.endswith("{") else text


def go_template(model: Model, encoder: Encoder) -> str:
    """Return the TEMPLATE of the model's prompts. UserError if none of ours gives its prompts."""
    if encoder.template == "plain":
        return PLAIN
    start = model.tokenizer.decode(encoder.bos) if encoder.bos and encoder.chat else ""
    try:
        template = _chat_template(encoder, start) if encoder.chat else _dialog_template()
        wrong = next((turns for turns in CHECKS if _prompt(encoder, turns, start) != template.render(turns)), None)
    except InvalidRow as error:
        raise _untranslated(model, f"it refuses a conversation ({error})") from error
    if wrong:
        roles = " ".join(turn["role"] for turn in wrong)
        raise _untranslated(model, f"it writes a conversation ({roles}) in another way than turn by turn")
    return template.source()


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CHECKS: tuple[list[Message], ...] = (
    [_turn("user", "What is 2 + 2, ä and <b>?\nSay it.")],
    [_turn("system", "Be brief."), _turn("user", "Why?")],
    [_turn("user", "One."), _turn("assistant", "Two.\n\nThree."), _turn("user", "Four")],
    [
        _turn("system", "A"),
        *(_turn(role, f"{role} {i}") for i in range(3) for role in ("user", "assistant")),
        _turn("user", "?"),
    ],
)
"""Conversations on which a template and the format must be the same."""


def _prompt(encoder: Encoder, turns: list[Message], start: str) -> str:
    """Return the prompt's text without the start token, which Ollama adds."""
    text = encoder.prompt(turns)[1]
    return text.removeprefix(start)


def _dialog_template() -> GoTemplate:
    around = {"user": ("Human: ", ""), "assistant": ("Assistant: ", ""), "system": ("", "")}
    return GoTemplate("", around, "\n\n", "\n\nAssistant:")


def _chat_template(encoder: Encoder, start: str) -> GoTemplate:
    """Return a template with what the chat template writes around marked contents."""

    def chunks(*roles: str) -> list[str]:
        """Return the texts before, between and behind the contents of a conversation with these roles."""
        text, found = _prompt(encoder, [_turn(role, MARK.format(i)) for i, role in enumerate(roles)], start), []
        for i in range(len(roles)):
            before, mark, text = text.partition(MARK.format(i))
            if not mark:
                raise InvalidRow("it leaves out a turn")
            found.append(before)
        return [*found, text]

    answer = encoder.chat.answer if encoder.chat else None
    if answer is None:
        raise InvalidRow("it has no form of its own for an answer")
    system, after_system, _ = chunks("system", "user")
    bare, _ = chunks("user")
    _, after_user, after_answer, end = chunks("user", "assistant", "user")
    header = after_answer.removeprefix(answer.tail)
    user_end = end.removesuffix(answer.opening)
    around = {
        "system": (system, after_system.removesuffix(header)),
        "user": (header, user_end),
        "assistant": (after_user.removeprefix(user_end), answer.tail),
    }
    return GoTemplate(bare.removesuffix(header), around, "", end.removeprefix(user_end))


def _untranslated(model: Model, reason: str) -> UserError:
    return UserError(
        f"{model.name}: --ollama cannot translate its chat template to Ollama's, because {reason}; export without"
        " --ollama, and write the TEMPLATE by hand"
    )


def modelfile(file: str, model: Model, encoder: Encoder, ends: Sequence[int], positions: int) -> str:
    """Return the text of the Modelfile of the GGUF file beside it."""
    stops = [model.tokenizer.decode([id]) for id in ends]
    parameters: list[tuple[str, Any]] = [("stop", f'"{stop}"') for stop in stops if stop.strip() and '"' not in stop]
    parameters += [(name, value) for name, value in _sampling(model).items()]
    parameters.append(("num_ctx", min(positions, CONTEXT)))
    lines = "\n".join(f"PARAMETER {name} {value}" for name, value in parameters)
    template = go_template(model, encoder)
    return f'FROM ./{file}\nTEMPLATE """{template}"""\n{lines}\n'


def _sampling(model: Model) -> dict[str, float]:
    """Return the sampling parameters of the generation config; without them, plain sampling, as the model was trained:
    Ollama's own defaults are others."""
    config: Any = getattr(model.base, "generation_config", None)

    def number(name: str, default: float) -> float:
        value = getattr(config, name, None)
        return default if value is None else value

    sampling = {"temperature": number("temperature", 1.0), "top_p": number("top_p", 1.0)}
    sampling["top_k"] = number("top_k", 0) if getattr(config, "do_sample", False) else 0
    return sampling | {"repeat_penalty": number("repetition_penalty", 1.0)}
