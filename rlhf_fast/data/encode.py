"""Prompts, responses and texts as tokens, exactly as a sampler is given and produces them.

Prompt and response are tokenized separately, as they are in sampling: the boundary is exact and no token spans it. Text
from the data never becomes a control token, whatever it spells. Only the template and this file add control tokens.
With a chat template, prompt and response together are the beginning of what it makes of the whole conversation; a row
for which they are not is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from rlhf_fast.data.chat_template import AnswerFormat, ChatTemplate, Tools, difference, holds
from rlhf_fast.data.control_tokens import ControlTokens, Segment, cut
from rlhf_fast.data.fields import Dialog, InvalidRow, Message, hh_turns
from rlhf_fast.errors import UserError

Template = Literal["auto", "chat", "plain", "dialog"]
CHAT_FIELDS = ("tool_calls", "reasoning_content")
"""Fields of a turn that only a chat template can show."""


class PromptFormat(NamedTuple):
    """The form in which prompts become text. A run's run.json holds it; later stages and resumed runs use the same."""

    template: Template = "auto"
    date: datetime | None = None
    """Date that a chat template takes for today's. None = the date at which the process first asked for it."""


class Encoded(NamedTuple):
    """A conversation as tokens up to the last token to learn."""

    prompt: list[int]
    text: str
    """The prompt as text."""
    response: list[int]
    """Everything behind the prompt: the answers, and between two of them the turns that the model only reads."""
    loss_mask: list[bool]
    """For each token of the response, whether it has a loss."""


class _Whole(NamedTuple):
    """A conversation as the template writes it, rendered and split once for all its answers."""

    turns: Sequence[Message]
    tools: Tools
    text: str
    segments: list[Segment]


class _Answer(NamedTuple):
    ids: list[int]
    start: int
    """Position in the text of the conversation."""
    stop: int


def hh_text(turns: Sequence[Message]) -> str:
    """Return a conversation in HH's form, "Human: ...\\n\\nAssistant:". A system turn has no speaker."""
    speakers = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    for turn in turns:
        if turn["role"] not in speakers:
            raise InvalidRow(f"only a chat template can show a turn of {turn['role']!r}; set data.template: chat")
    return "\n\n".join([*(speakers[turn["role"]] + turn["content"] for turn in turns), "Assistant:"])


class Encoder:
    """A tokenizer and the format of prompts.

    template: "chat" uses the tokenizer's chat template. "plain" leaves a text unchanged and puts a conversation in HH's
    form. "dialog" puts texts in HH's form too, and a space before the response. "auto" is chat if the tokenizer has a
    template, else plain.
    """

    def __init__(self, tokenizer: Any, template: Template = "auto", eos: bool = True, date: datetime | None = None):
        self.tokenizer, self.template, self.eos = tokenizer, resolve_template(tokenizer, template), eos
        self.control = ControlTokens(tokenizer)
        self.special = self.control.names
        self.chat = ChatTemplate(tokenizer, self.control, date) if self.template == "chat" else None
        self.bos = self._bos()
        self.end = [self._end_token()] if eos else []

    def prompt(self, dialog: Dialog, tools: Tools = ()) -> tuple[list[int], str]:
        """Return the tokens before the response, and their text."""
        if self.chat:
            return self._chat_prompt(self.chat, as_turns(dialog), tools)
        _refuse_chat_fields(dialog, tools)
        if isinstance(dialog, list):
            text = hh_text(dialog)
        elif self.template == "dialog" and hh_turns(dialog) is None:
            text = hh_text([{"role": "user", "content": dialog}])
        else:
            text = dialog
        return self.bos + self.control.text_ids(text), text

    def response(self, text: str) -> list[int]:
        """Return the tokens that follow a prompt: the text as it would be sampled, and the end token."""
        if not self.chat:
            return self.control.continued_ids(" " + text.lstrip() if self.template == "dialog" else text) + self.end
        answer = self._require_answer_format(self.chat)
        segments = self.control.split(answer.before)
        before = segments.pop()[0] if segments and not segments[-1][1] else ""
        segments.append((before + answer.strip(text) + (answer.between if self.eos else ""), False))
        return self.control.segment_ids(segments, follows=True) + self.end

    def answer(self, dialog: Dialog, message: Message, tools: Tools = ()) -> list[int]:
        """Return the tokens of the answer to a prompt, with the end token, as the template writes it in this
        conversation."""
        if not self.chat:
            _refuse_chat_fields([message], ())
            return self.response(message["content"])
        conversation = [*as_turns(dialog), message]
        last = len(conversation) - 1
        return self._answer_ids(self.chat, self._whole(self.chat, conversation, tools, [last]), last).ids

    def all_answers(self, conversation: Sequence[Message], tools: Tools = ()) -> Encoded:
        """Return a conversation with a loss on every answer and its end token, but for those of weight 0."""
        learned = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant" and has_loss(turn)]
        if not learned:
            return Encoded([], "", [], [])
        if not self.chat:
            raise InvalidRow(
                "data.turns is all, but only a chat template ends every answer with an end token; set data.template:"
                " chat, or data.turns: last"
            )
        prompt, text = self.prompt(list(conversation[: learned[0]]), tools)
        whole = self._whole(self.chat, conversation, tools, learned)
        ids: list[int] = []
        mask: list[bool] = []
        position = len(text)
        for i in learned:
            answer = self._answer_ids(self.chat, whole, i)
            if answer.start < position:
                raise InvalidRow(
                    f"the chat template ends the answer before turn {i + 1} with no end token of its own, so that"
                    " data.turns: all cannot learn it; set data.turns: last"
                )
            between = self._ids_between(whole, position, answer.start)
            ids += between + answer.ids
            mask += [False] * len(between) + [True] * len(answer.ids)
            position = answer.stop
        return Encoded(prompt, text, ids, mask)

    def text(self, text: str) -> list[int]:
        """Return a document of pretraining text, with a start token if the tokenizer adds one, and the end token."""
        return self.bos + self.control.text_ids(text) + self.end

    def spelled_special_tokens(self, dialog: Dialog) -> list[str]:
        """Return the control tokens that the data spell as text (and that stay text)."""
        contents = [dialog] if isinstance(dialog, str) else [turn.get("content") or "" for turn in dialog]
        found = {name for content in contents for name in self.control.spelled(content)}
        return [name for name in self.special if name in found]

    def notes(self, learned: bool = True) -> list[str]:
        """Return sentences on the format, for a stage's start. learned: responses have a loss."""
        end = " ".join(self.tokenizer.convert_ids_to_tokens(self.end))
        if not learned:
            sentence = f"template: {self.template}"
        elif end:
            sentence = f"template: {self.template}; a response ends with {end}, which has a loss"
        else:
            sentence = f"template: {self.template}; no end token has a loss (data.append_eos: false)"
        notes = [sentence]
        if self.chat:
            notes += [note for note in (self.chat.note, self.chat.fault) if note]
            if self.chat.shows_date:
                date = self.chat.date.date()
                notes.append(f"the chat template writes a date; it is {date} in this run and in later stages")
        return notes

    def _bos(self) -> list[int]:
        """Return [start token] if the tokenizer puts one before a text, else []."""
        ids, bare = self.tokenizer("a").input_ids, self.control.text_ids("a")
        start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        return ids[:start]

    def _chat_prompt(self, chat: ChatTemplate, turns: list[Message], tools: Tools) -> tuple[list[int], str]:
        """Return the conversation in the chat template: its tokens and its text."""
        text = chat.prompt(turns, tools)
        chat.require_kept(text, turns, tools)
        if not any(self.spelled_special_tokens([turn]) for turn in turns):
            return self.tokenizer(text, add_special_tokens=False).input_ids, text
        # Some content spells a control token: only those of the template become tokens.
        return self.control.segment_ids(chat.segments(text, turns, tools, prompt=True), follows=False), text

    def _whole(self, chat: ChatTemplate, turns: Sequence[Message], tools: Tools, learned: Sequence[int]) -> _Whole:
        """Return the rendering of a conversation of which the turns `learned` have a loss."""
        text = chat.render(turns, tools)
        chat.require_kept(text, turns, tools, learned)
        return _Whole(turns, tools, text, chat.segments(text, turns, tools))

    def _answer_ids(self, chat: ChatTemplate, conversation: _Whole, i: int) -> _Answer:
        """Return the tokens of turn i, an answer, and where the template's text of the conversation has it.

        InvalidRow if the prompt is not how the text begins, or if something of the answer is missing.
        """
        opening, turn = self._require_answer_format(chat).opening, conversation.turns[i]
        prompt, whole = chat.prompt(conversation.turns[:i], conversation.tools), conversation.text
        remedy = "change the template or the row" if i + 1 == len(conversation.turns) else "set data.turns: last"
        if not whole.startswith(prompt):
            raise InvalidRow(
                f"the chat template does not leave the prompt as it is once turn {i + 1} (assistant) follows:"
                f" {difference(prompt, whole)}; {remedy}"
            )
        start = len(prompt)
        stop = self._end_of_answer(chat, conversation, i, start)
        if not holds(whole[start:stop], turn.get("content") or "", opening):
            raise InvalidRow(
                f"the chat template leaves out a part of turn {i + 1} (assistant), which then cannot be learned:"
                f" {turn['content'][:40]!r} against {whole[start:stop][:40]!r}; {remedy}"
            )
        return _Answer(self._ids_between(conversation, start, stop), start, stop)

    def _end_of_answer(self, chat: ChatTemplate, conversation: _Whole, i: int, start: int) -> int:
        """Return where in the text the answer that starts at `start` stops, its end token included if it gets one."""
        format_, whole = self._require_answer_format(chat), conversation.text
        is_last = i + 1 == len(conversation.turns)
        if is_last and whole.endswith(format_.tail):
            content_end = len(whole) - len(format_.tail)
            ending = format_.between + format_.end if self.eos else ""
            return content_end + len(ending) if format_.tail.startswith(ending) else content_end
        position, found = 0, None
        for text, control in conversation.segments:
            if control and position >= start and (text == format_.end or is_last):
                found = (position, position + len(text))
                if not is_last:
                    break
            position += len(text)
        if found is None or (is_last and whole[found[1] :].strip()):
            raise InvalidRow(
                f"the chat template does not end turn {i + 1} (assistant) with {format_.end or 'its text'} as it ends"
                f" other answers: {whole[start:][-40:]!r}; change the template or the row"
            )
        return found[1] if self.eos else found[0]

    def _ids_between(self, conversation: _Whole, start: int, stop: int) -> list[int]:
        """Return the tokens of a part of the conversation's text that is not its beginning."""
        return self.control.segment_ids(list(cut(conversation.segments, start, stop)), follows=True)

    def _require_answer_format(self, chat: ChatTemplate) -> AnswerFormat:
        """Return what the chat template writes around an answer. UserError if no response can be written like that."""
        if chat.answer is None:
            raise UserError(
                f"{chat.fault}; no response can be written as this template does: choose another data.template"
            )
        if self.eos and not chat.answer.end:
            raise UserError(
                "the tokenizer's chat template ends an answer with no token, so that a model would not learn to stop as"
                " the template has it; write {{ eos_token }} behind the answer in the template, choose another"
                " data.template, or set data.append_eos: false"
            )
        return chat.answer

    def _end_token(self) -> int:
        """Return the token that ends a response: the one the chat template puts after it, else the tokenizer's."""
        answer = self.chat.answer if self.chat else None
        if answer and answer.end:
            return self.tokenizer.convert_tokens_to_ids(answer.end)
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token), so no response can end; set append_eos: false")
        return self.tokenizer.eos_token_id


def resolve_template(tokenizer: Any, template: Template, setting: str = "data.template", path: str = "") -> Template:
    """Return chat, plain or dialog for a setting that may be auto. UserError for chat if the tokenizer has no template.

    setting: the name of the setting, and path: the model, for that error.
    """
    if template == "chat" and not tokenizer.chat_template:
        owner = f" of {path}" if path else ""
        raise UserError(f"{setting} is chat, but the tokenizer{owner} has no chat template; choose plain or dialog")
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    return template


def template_end(tokenizer: Any) -> int | None:
    """Return the control token that the chat template puts after a response (often not eos_token), or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = ChatTemplate(tokenizer, ControlTokens(tokenizer)).answer
    return tokenizer.convert_tokens_to_ids(answer.end) if answer and answer.end else None


def has_loss(turn: Message) -> bool:
    """Return whether an answer is learned: all are but those of weight 0."""
    return turn.get("weight", 1) != 0


def as_turns(dialog: Dialog) -> list[Message]:
    """Return a prompt as turns. A text in HH's form has several."""
    if isinstance(dialog, str):
        return hh_turns(dialog) or [{"role": "user", "content": dialog}]
    return dialog


def _refuse_chat_fields(dialog: Dialog, tools: Tools) -> None:
    """Raise InvalidRow for what only a chat template can show."""
    found = ["tools"] if tools else []
    found += [name for turn in (dialog if isinstance(dialog, list) else ()) for name in CHAT_FIELDS if turn.get(name)]
    if found:
        raise InvalidRow(f"only a chat template can show {found[0]}; set data.template: chat")
