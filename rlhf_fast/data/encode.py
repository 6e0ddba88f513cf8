"""Prompts, responses and texts as tokens. What is trained on is what the sampler will see and must produce.

The prompt and the response are tokenized apart, because a sampled response is: the boundary is exact, and no token
spans it. Text from the data never becomes a special token, whatever it spells: only the template and this file add
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlhf_fast.data.fields import Bad, Dialog, Message, hh_turns
from rlhf_fast.errors import UserError


def as_text(turns: Sequence[Message]) -> str:
    """A conversation as HH writes it: "Human: ...\\n\\nAssistant:", a system turn in front as it stands."""
    speakers = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "\n\n".join([*(speakers[turn["role"]] + turn["content"] for turn in turns), "Assistant:"])


class Encoder:
    """A tokenizer and the way prompts are put to the model.

    template: "chat" uses the tokenizer's chat template. "plain" takes a text as it stands and writes a conversation as
    HH does. "dialog" writes texts so too, and puts a space before the response. "auto" is chat if there is a template,
    else plain.
    """

    def __init__(self, tokenizer: Any, template: Literal["auto", "chat", "plain", "dialog"] = "auto", eos: bool = True):
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("data.template is chat, but the tokenizer has no chat template; choose plain or dialog")
        self.tokenizer, self.template = tokenizer, template
        if template == "auto":
            self.template = "chat" if tokenizer.chat_template else "plain"
        self.special = special_tokens(tokenizer)
        self.bos = self._bos()
        self.anchors = self._anchors()
        self.end = [] if not eos else [self._end_token()]

    def prompt(self, dialog: Dialog) -> tuple[list[int], str]:
        """The tokens that stand before the response, and their text."""
        if self.template == "chat":
            turns = dialog if isinstance(dialog, list) else hh_turns(dialog) or [{"role": "user", "content": dialog}]
            return self._chat(turns)
        if isinstance(dialog, list):
            text = as_text(dialog)
        elif self.template == "dialog" and hh_turns(dialog) is None:
            text = as_text([{"role": "user", "content": dialog}])
        else:
            text = dialog
        return self.bos + self._plain(text), text

    def response(self, text: str) -> list[int]:
        """The tokens that follow a prompt: the text as it would be sampled, and the end token."""
        return self._continue(" " + text.lstrip() if self.template == "dialog" else text) + self.end

    def text(self, text: str) -> list[int]:
        """A document of pretraining text, from start token (if the tokenizer has the habit) to end token."""
        return self.bos + self._plain(text) + self.end

    def spelled(self, dialog: Dialog | str) -> list[str]:
        """Special tokens that occur in the data as text (and stay text)."""
        contents = [dialog] if isinstance(dialog, str) else [turn["content"] for turn in dialog]
        return [token for token in self.special if any(token in content for content in contents)]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _bos(self) -> list[int]:
        """[start token] if the tokenizer puts one before a text, else []."""
        ids, bare = self.tokenizer("a").input_ids, self._plain("a")
        at = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        return ids[:at]

    def _anchors(self) -> list[tuple[str, list[int]]]:
        """What to put before a response while it is tokenized, for tokenizers that give every text a leading space;
        with its tokens."""
        if self._plain("\na")[len(self._plain("\n")) :] == self._plain("a"):
            return []
        return [(anchor, self._plain(anchor)) for anchor in ("\n", ".", "a", "1")]

    def _continue(self, text: str) -> list[int]:
        for anchor, before in self.anchors:  # one that the tokenizer does not join with what the text begins with
            ids = self._plain(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._plain(text)

    def _render(self, turns: Sequence[Message]) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's author raises, mostly jinja2.TemplateError
            raise Bad(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def _chat(self, turns: list[Message]) -> tuple[list[int], str]:
        text = self._render(turns)
        if not any(self.spelled(turn["content"]) for turn in turns):
            return self.tokenizer(text, add_special_tokens=False).input_ids, text
        # Some content spells a special token. Marks take the place of the contents, the template's own special tokens
        # cut the text, and what is between them is tokenized as plain text with the contents back in.
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        frame = self._render([turn | {"content": mark} for turn, mark in zip(turns, marks, strict=True)])
        for contents in ([turn["content"] for turn in turns], [turn["content"].strip() for turn in turns]):
            if _fill(frame, marks, contents) == text:
                ids: list[int] = []
                for i, piece in enumerate(_cut(frame, self.special)):
                    if i % 2:
                        ids.append(self.tokenizer.convert_tokens_to_ids(piece))
                    elif piece:
                        ids += (self._continue if ids else self._plain)(_fill(piece, marks, contents))
                return ids, text
        spelled = ", ".join(sorted({token for turn in turns for token in self.spelled(turn["content"])}))
        raise Bad(f"the content spells the special token {spelled}, and the chat template changes it; remove it")

    def _end_token(self) -> int:
        """The token that ends a response: what the chat template puts behind one, else the tokenizer's end token."""
        end = template_end(self.tokenizer) if self.template == "chat" else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise UserError("the tokenizer has no end token (eos_token), so no response can end; set append_eos: false")
        return end


def template_end(tokenizer: Any) -> int | None:
    """The special token that the tokenizer's chat template puts behind an answer (often not eos_token), if any."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked, answer = [{"role": "user", "content": "a"}], "\ue000"
    try:
        text = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    except Exception:  # a template that does not serve one question and its answer has no end to offer
        return None
    behind = _cut(text.rpartition(answer)[2], special_tokens(tokenizer)) if answer in text else []
    return tokenizer.convert_tokens_to_ids(behind[1]) if len(behind) > 1 else None


def special_tokens(tokenizer: Any) -> list[str]:
    """The texts that a tokenizer reads as special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*added, *(token for token in tokenizer.all_special_tokens if token not in added)]


def _cut(text: str, special: Sequence[str]) -> list[str]:
    """text, special token, text, special token, ..., text."""
    pieces, start = [], 0
    while True:
        found = [(text.find(token, start), -len(token), token) for token in special if token]
        found = [hit for hit in found if hit[0] >= 0]
        if not found:
            return [*pieces, text[start:]]
        at, _, token = min(found)
        pieces += [text[start:at], token]
        start = at + len(token)


def _fill(frame: str, marks: Sequence[str], contents: Sequence[str]) -> str:
    for mark, content in zip(marks, contents, strict=True):
        frame = frame.replace(mark, content)
    return frame
