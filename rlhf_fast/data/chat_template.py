"""A tokenizer's chat template as text: what it puts before and after an answer, at a date that does not change.

The prompt and the answer that a model learns must be the beginning of what the template makes of the whole
conversation. One question with its answer, rendered once, shows how the template does that; every row is compared with
its own rendering too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple

from transformers.utils import chat_template_utils

from rlhf_fast.data.control_tokens import ControlTokens, Segment
from rlhf_fast.data.fields import InvalidRow, Message
from rlhf_fast.errors import UserError

Tools = Sequence[Mapping[str, Any]]

TEXTS = ("content", "reasoning_content")
"""Fields of a turn that are text."""
NOT_RENDERED = ("weight",)
"""Fields of a turn that are ours and no template's."""
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
THOUGHT_END = re.compile(r"</[\w:]+>|\[/\w+\]|<\|/\w+\|>|<\w+\|>")
"""Marks that end a thought in an answer's content."""
STRIPS: tuple[Callable[[str], str], ...] = (lambda text: text, str.strip, str.lstrip, str.rstrip)
"""Functions that templates apply to a content: they strip the blanks around it, or not."""


class AnswerFormat(NamedTuple):
    """The texts that a chat template writes around an answer."""

    opening: str
    """Text that ends every prompt, behind the question."""
    header: str
    """Text that ends a prompt and that the template writes only where an answer follows."""
    generation_prompt: bool
    """True if prompts are rendered with add_generation_prompt."""
    before: str
    """Text between the prompt and the answer, which is learned: a space, or an empty thought."""
    between: str
    """Text between the answer and the end token."""
    end: str
    """The end token, or "" if the template writes none."""
    tail: str
    """Everything behind the answer that ends a conversation."""
    strip: Callable[[str], str]
    """The function that the template applies to the blanks around an answer."""


class ChatTemplate:
    """A chat template at a fixed date. `answer` is its AnswerFormat; None, and a `fault`, if it has none.

    note: a sentence if prompts are not what add_generation_prompt gives.
    """

    def __init__(self, tokenizer: Any, control: ControlTokens, date: datetime | None = None):
        self.tokenizer, self.control = tokenizer, control
        self.date = date or process_start()
        self.parts = False
        self.answer: AnswerFormat | None = None
        self.fault = self.note = ""
        self._frames: dict[tuple, str | None] = {}
        self._last_prompt: tuple[list[Message], list[Any], str] = ([], [], "")
        for turns in ([_turn("user", 0)], [_turn("system", 2), _turn("user", 0)]):
            for self.parts in (False, True):
                try:
                    self.answer = self._answer_format(turns)
                except InvalidRow as error:
                    self.fault = self.fault or str(error)
                if self.answer:
                    self.fault = ""
                    return
        self.parts = False

    @cached_property
    def shows_date(self) -> bool:
        """True if the template writes the date."""
        turns = [_turn("system", 1), _turn("user", 0)]
        dates = (datetime(2001, 2, 3, 4, 5, 6), datetime(2022, 11, 28, 17, 48, 59))
        texts = [[self._text_at(date, shown) for shown in (turns, turns[1:])] for date in dates]
        return texts[0] != texts[1]

    def render(self, turns: Sequence[Message], tools: Tools = (), generation_prompt: bool = False) -> str:
        """Return the template's text. InvalidRow if it raises an error."""
        return self._apply(turns, tools, generation_prompt, self.date)

    def prompt(self, turns: Sequence[Message], tools: Tools = ()) -> str:
        """Return the text before an answer, as it stands in a conversation that has one."""
        if self._last_prompt[:2] != (list(turns), list(tools)):  # the answers to one prompt ask for it again
            generation_prompt = self.answer.generation_prompt if self.answer else True
            text = self.render(turns, tools, generation_prompt) + (self.answer.header if self.answer else "")
            self._last_prompt = (list(turns), list(tools), text)
        return self._last_prompt[2]

    def require_kept(
        self, text: str, turns: Sequence[Message], tools: Tools = (), learned: Collection[int] = ()
    ) -> None:
        """Raise InvalidRow if the template leaves out a turn or a part of it, its tool calls or the tools, or the
        thought of a turn that is learned. It may leave out earlier thoughts. `text`: its rendering of the turns."""
        for i, turn in enumerate(turns):
            content = (turn.get("content") or "").strip()
            if content not in text and i not in learned and not _holds_turn(text, turn["role"], content):
                raise InvalidRow(
                    f"the chat template leaves out the content of turn {i + 1} ({turn['role']}), or a part of it:"
                    f" {content[:40]!r}; change the template or the row"
                )
        frame = self._frame(turns, tools, False)
        if frame is None:  # the template wants contents of a certain form
            return
        for i, turn in enumerate(turns):
            placeholders = (f"\ue000{2 * i}\ue001", f"\ue000{2 * i + 1}\ue001")
            if turn.get("content") and placeholders[0] not in frame:
                raise InvalidRow(
                    f"the chat template leaves out the content of turn {i + 1} ({turn['role']}); change the template or"
                    " the row"
                )
            if not (turn.get("reasoning_content") or turn.get("tool_calls")):
                continue
            name = f"turn {i + 1} ({turn['role']})"
            if turn.get("reasoning_content") and placeholders[1] not in frame:
                if not self._takes_reasoning:
                    raise InvalidRow(
                        f"the chat template takes no reasoning_content, which {name} has; put it in content"
                    )
                if i in learned:
                    raise InvalidRow(
                        f"the chat template leaves out the reasoning_content of {name}; set data.turns: last"
                    )
            for call in turn.get("tool_calls") or ():
                if missing := _missing_texts(call, frame):
                    raise InvalidRow(f"the chat template takes no tool calls: it leaves out {missing!r} of {name}")
        if tools and frame == self._frame(turns, (), False):
            raise InvalidRow(
                "the chat template takes no tools, and the row has some; choose a model whose template does"
            )
        for tool in tools:
            name = tool.get("function", tool).get("name", "") if isinstance(tool.get("function", tool), dict) else ""
            if name not in frame:
                raise InvalidRow(f"the chat template leaves out the tool {name!r}")

    def segments(self, text: str, turns: Sequence[Message], tools: Tools = (), prompt: bool = False) -> list[Segment]:
        """Split `text`, the rendering of `turns` as a prompt or not, at the control tokens that the template wrote."""
        spelled = sorted(
            {name for turn in turns for key in TEXTS for name in self.control.spelled(turn.get(key) or "")}
        )
        calls = [turn["tool_calls"] for turn in turns if turn.get("tool_calls")]
        given = json.dumps([list(tools), calls], ensure_ascii=False) if tools or calls else ""
        if in_tools := self.control.spelled(given):
            raise InvalidRow(f"the tools or tool calls spell the control token {in_tools[0]}; remove it")
        if not spelled:
            return self.control.split(text)
        frame = self._frame(turns, tools, prompt)
        contents = _fitting_contents(frame, text, turns) if frame is not None else None
        if frame is not None and contents is not None:
            return [(_fill(part, contents), control) for part, control in self.control.split(frame)]
        thoughtful = [_with_thought(turn) for turn in turns]
        if thoughtful != list(turns) and text == (self.prompt if prompt else self.render)(thoughtful, tools):
            return self.segments(text, thoughtful, tools, prompt)
        raise InvalidRow(
            f"the content spells the control token {', '.join(spelled)}, and the chat template changes it; remove it,"
            " or give a thought as reasoning_content"
        )

    def _frame(self, turns: Sequence[Message], tools: Tools, prompt: bool) -> str | None:
        """Return the rendering with placeholders for the texts, or None if the template refuses them."""
        key = (
            prompt,
            *((turn["role"], *((name, bool(turn[name])) for name in TEXTS if name in turn)) for turn in turns),
        )
        simple = not tools and all(set(turn) <= {"role", "weight", *TEXTS} for turn in turns)
        if simple and key in self._frames:
            return self._frames[key]
        marked = [
            turn | {name: f"\ue000{2 * i + j}\ue001" for j, name in enumerate(TEXTS) if turn.get(name)}
            for i, turn in enumerate(turns)
        ]
        try:
            frame = self.prompt(marked, tools) if prompt else self.render(marked, tools)
        except InvalidRow:
            frame = None
        if simple:
            self._frames[key] = frame
        return frame

    @cached_property
    def _takes_reasoning(self) -> bool:
        turns = [_turn("user", 0), _turn("assistant", 1) | {"reasoning_content": "\ue0002\ue001"}]
        try:
            return "\ue0002\ue001" in self.render(turns)
        except InvalidRow:
            return False

    def _answer_format(self, turns: list[Message]) -> AnswerFormat | None:
        """Return what the template writes around the answer to `turns`; InvalidRow, with the reason, if none."""
        question, answer = turns[-1]["content"], _turn("assistant", 1)["content"]
        with_prompt, without = self.render(turns, (), True), self.render(turns)
        whole = self.render([*turns, _turn("assistant", 1)])
        if whole != self.render([*turns, _turn("assistant", 1)]):
            raise UserError("the tokenizer's chat template renders one conversation in two ways; it must not be random")
        if question not in with_prompt or whole.count(answer) != 1:
            raise InvalidRow("the tokenizer's chat template leaves out the question or the answer, or repeats it")
        head, tail = whole.split(answer)
        generation_prompt = with_prompt != without and head.startswith(with_prompt)
        prompt = with_prompt if generation_prompt else without
        if not head.startswith(prompt):
            raise InvalidRow(
                f"the tokenizer's chat template changes a question once it is answered: {difference(prompt, head)}"
            )
        header, before = ("", head[len(prompt) :]) if generation_prompt else _split_blanks(head[len(prompt) :])
        if with_prompt != without and not generation_prompt:
            self.note = (
                f"the chat template's generation prompt is {with_prompt[len(without) :]!r}, but a conversation has"
                f" {head[len(without) :]!r} before an answer; prompts are rendered as in a conversation"
            )
        blank = self.render([*turns, _turn("assistant", 1) | {"content": f" {answer} "}])
        strip = next((strip for strip in STRIPS if head + strip(f" {answer} ") + tail == blank), STRIPS[0])
        between, end = self._end(tail)
        opening = with_prompt[len(without) :] if generation_prompt and with_prompt.startswith(without) else header
        return AnswerFormat(opening, header, generation_prompt, before, between, end, tail, strip)

    def _end(self, tail: str) -> tuple[str, str]:
        """Return the text before the first control token behind an answer, and that token; two empty texts if none."""
        segments = self.control.split(tail)
        first = next((i for i, (_, control) in enumerate(segments) if control), None)
        return ("", "") if first is None else ("".join(text for text, _ in segments[:first]), segments[first][0])

    def _text_at(self, date: datetime, turns: list[Message]) -> str:
        """Return the prompt at a date, "" if the template refuses it."""
        try:
            return self._apply(turns, (), True, date)
        except InvalidRow:
            return ""

    def _apply(self, turns: Sequence[Message], tools: Tools, generation_prompt: bool, date: datetime) -> str:
        shown = [_shown(turn, self.parts) for turn in turns]
        with clock_at(date):
            try:
                return self.tokenizer.apply_chat_template(
                    shown,
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            except Exception as error:  # a template raises what its author likes, mostly jinja2.TemplateError
                raise InvalidRow(f"the tokenizer's chat template refuses the conversation: {error}") from error


def _fitting_contents(frame: str, text: str, turns: Sequence[Message]) -> list[str] | None:
    """Return the texts, with or without the blanks around them, that make `text` of `frame` from left to right."""
    pattern, start = "", 0
    for match in PLACEHOLDER.finditer(frame):
        i, j = divmod(int(match[1]), len(TEXTS))
        content = turns[i].get(TEXTS[j]) or ""
        forms = {strip(content) for strip in STRIPS} | {content.strip("\n")}
        pattern += re.escape(frame[start : match.start()]) + "(" + "|".join(map(re.escape, forms)) + ")"
        start = match.end()
    found = re.fullmatch(pattern + re.escape(frame[start:]), text, re.DOTALL)
    return list(found.groups()) if found else None


def _fill(part: str, contents: list[str]) -> str:
    """Put texts in the place of the placeholders of a part of a frame, and remove them from the list."""
    return PLACEHOLDER.sub(lambda _: contents.pop(0), part)


def holds(text: str, part: str, before: str = "") -> bool:
    """Return whether `text` has `part` in it, up to blanks; `part` may begin at the end of what stands `before`."""
    if part in text:
        return True
    text, part, before = ("".join(each.split()) for each in (text, part, before))
    overlaps = (i for i in range(1, min(len(before), len(part)) + 1) if before.endswith(part[:i]))
    return part in text or any(text.startswith(part[i:]) for i in overlaps)


def _holds_turn(text: str, role: str, content: str) -> bool:
    """Return whether `text` has the content of a turn, up to blanks; as JSON if it is a tool's, and without its thought
    if it is an earlier answer."""
    forms = [content]
    if role == "assistant":
        forms.append(THOUGHT_END.split(content)[-1])
    elif role == "tool":
        forms += (json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1])
        with suppress(ValueError):
            parsed = json.loads(content)
            forms += (json.dumps(parsed), json.dumps(parsed, ensure_ascii=False))
    return any(holds(text, form) for form in forms)


def difference(a: str, b: str) -> str:
    """Return the place at which two texts begin to differ, as a phrase."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{a[max(same - 10, 0) : same + 20]!r} against {b[max(same - 10, 0) : same + 20]!r}"


@cache
def process_start() -> datetime:
    """Return the date at which this process first asked for it."""
    return datetime.now().replace(microsecond=0)


class Clock(datetime):
    """A datetime whose now() is `moment`."""

    moment: ClassVar[datetime]

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return cls.moment.replace(tzinfo=tz)


@contextmanager
def clock_at(date: datetime) -> Iterator[None]:
    """Let templates read `date`: transformers' `strftime_now` takes the time from its module's `datetime`."""

    module: Any = chat_template_utils
    before, Clock.moment = module.datetime, date
    module.datetime = Clock
    try:
        yield
    finally:
        module.datetime = before


def _turn(role: str, number: int) -> Message:
    return {"role": role, "content": f"\ue000{number}\ue001"}


def _shown(turn: Message, parts: bool) -> Message:
    """Return a turn as a template reads it: without our fields, arguments of tool calls as objects.

    parts: the content as a list of parts, which some templates want.
    """
    shown = {name: value for name, value in turn.items() if name not in NOT_RENDERED}
    if parts and isinstance(shown.get("content"), str):
        shown["content"] = [{"type": "text", "text": shown["content"]}]
    if shown.get("tool_calls"):
        shown["tool_calls"] = [_with_parsed_arguments(call) for call in shown["tool_calls"]]
    return shown


def _with_thought(turn: Message) -> Message:
    """Return an answer whose content begins with a thought with that as its reasoning_content."""
    found = THOUGHT.fullmatch(turn.get("content") or "") if turn["role"] == "assistant" else None
    if not found or turn.get("reasoning_content"):
        return turn
    return turn | {"content": found[2], "reasoning_content": found[1]}


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call


def _missing_texts(call: Any, text: str) -> str:
    """Return a name or argument of a tool call that `text` lacks, "" if it has them all."""
    function = _with_parsed_arguments(call).get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    values = list(arguments) + list(arguments.values()) if isinstance(arguments, dict) else [arguments]
    for value in (function.get("name"), *values):
        if isinstance(value, str) and not any(
            form in text for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
        ):
            return value
    return ""


def _split_blanks(text: str) -> tuple[str, str]:
    """Split spaces off the end of a text: they belong to the word behind them."""
    bare = text.rstrip(" ")
    return bare, text[len(bare) :]
