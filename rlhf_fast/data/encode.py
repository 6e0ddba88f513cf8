"""Prompts, responses and texts as tokens, exactly as a sampler is given and produces them.

Prompt and response are tokenized separately, as they are in sampling: the boundary is exact and no token spans it. Text
from the data never becomes a special token, whatever it spells. Only the template and this file add special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlhf_fast.data.fields import Dialog, InvalidRow, Message, hh_turns
from rlhf_fast.errors import UserError


def hh_text(turns: Sequence[Message]) -> str:
    """Return a conversation in HH's form, "Human: ...\\n\\nAssistant:". A system turn has no speaker."""
    speakers = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "\n\n".join([*(speakers[turn["role"]] + turn["content"] for turn in turns), "Assistant:"])


class Encoder:
    """A tokenizer and the format of prompts.

    template: "chat" uses the tokenizer's chat template. "plain" leaves a text unchanged and puts a conversation in HH's
    form. "dialog" puts texts in HH's form too, and a space before the response. "auto" is chat if the tokenizer has a
    template, else plain.
    """

    def __init__(self, tokenizer: Any, template: Literal["auto", "chat", "plain", "dialog"] = "auto", eos: bool = True):
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("data.template is chat, but the tokenizer has no chat template; choose plain or dialog")
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "plain"
        self.tokenizer, self.template = tokenizer, template
        self.special = special_tokens(tokenizer)
        self.bos = self._bos()
        self.anchors = self._anchors()
        self.end = [self._end_token()] if eos else []

    def prompt(self, dialog: Dialog) -> tuple[list[int], str]:
        """Return the tokens before the response, and their text."""
        if self.template == "chat":
            if isinstance(dialog, str):
                dialog = hh_turns(dialog) or [{"role": "user", "content": dialog}]
            return self._chat(dialog)
        if isinstance(dialog, list):
            text = hh_text(dialog)
        elif self.template == "dialog" and hh_turns(dialog) is None:
            text = hh_text([{"role": "user", "content": dialog}])
        else:
            text = dialog
        return self.bos + self._plain(text), text

    def response(self, text: str) -> list[int]:
        """Return the tokens that follow a prompt: the text as it would be sampled, and the end token."""
        return self._continue(" " + text.lstrip() if self.template == "dialog" else text) + self.end

    def text(self, text: str) -> list[int]:
        """Return a document of pretraining text, with a start token if the tokenizer adds one, and the end token."""
        return self.bos + self._plain(text) + self.end

    def spelled_special_tokens(self, dialog: Dialog) -> list[str]:
        """Return the special tokens that the data spell as text (and that stay text)."""
        contents = [dialog] if isinstance(dialog, str) else [turn["content"] for turn in dialog]
        return [token for token in self.special if any(token in content for content in contents)]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _bos(self) -> list[int]:
        """Return [start token] if the tokenizer puts one before a text, else []."""
        ids, bare = self.tokenizer("a").input_ids, self._plain("a")
        start = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), 0)
        return ids[:start]

    def _anchors(self) -> list[tuple[str, list[int]]]:
        """Return texts to put before a response while it is tokenized, and their tokens.

        Only tokenizers that add a space before every text need them: such a space is no part of the response.
        """
        if self._plain("\na")[len(self._plain("\n")) :] == self._plain("a"):
            return []
        return [(anchor, self._plain(anchor)) for anchor in ("\n", ".", "a", "1")]

    def _continue(self, text: str) -> list[int]:
        """Return the tokens of a text that follows another. An anchor that merges with the text is not used."""
        for anchor, before in self.anchors:
            ids = self._plain(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._plain(text)

    def _render(self, turns: Sequence[Message]) -> str:
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what its author likes, mostly jinja2.TemplateError
            raise InvalidRow(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def _chat(self, turns: list[Message]) -> tuple[list[int], str]:
        """Return the conversation in the chat template: its tokens and its text."""
        text = self._render(turns)
        if not any(self.spelled_special_tokens(turn["content"]) for turn in turns):
            return self.tokenizer(text, add_special_tokens=False).input_ids, text
        # Some content spells a special token. The template is rendered with placeholders for the contents and split at
        # its own special tokens; the parts between them are tokenized as plain text, with the contents put back.
        placeholders = [f"\ue000{i}\ue001" for i in range(len(turns))]
        frame = self._render([turn | {"content": mark} for turn, mark in zip(turns, placeholders, strict=True)])
        for contents in ([turn["content"] for turn in turns], [turn["content"].strip() for turn in turns]):
            if _fill(frame, placeholders, contents) == text:
                return self._frame_ids(frame, placeholders, contents), text
        spelled = ", ".join(sorted({token for turn in turns for token in self.spelled_special_tokens(turn["content"])}))
        raise InvalidRow(f"the content spells the special token {spelled}, and the chat template changes it; remove it")

    def _frame_ids(self, frame: str, placeholders: Sequence[str], contents: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(_split_at_special(frame, self.special)):
            if i % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                filled = _fill(part, placeholders, contents)
                ids += self._continue(filled) if ids else self._plain(filled)
        return ids

    def _end_token(self) -> int:
        """Return the token that ends a response: the one the chat template puts after it, else the tokenizer's."""
        end = template_end(self.tokenizer) if self.template == "chat" else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None:
            raise UserError("the tokenizer has no end token (eos_token), so no response can end; set append_eos: false")
        return end


def template_end(tokenizer: Any) -> int | None:
    """Return the special token that the chat template puts after a response (often not eos_token), or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    prompt, response = {"role": "user", "content": "a"}, "\ue000"
    try:
        text = tokenizer.apply_chat_template([prompt, {"role": "assistant", "content": response}], tokenize=False)
    except Exception:  # the template does not support one question and its answer
        return None
    if response not in text:
        return None
    after = _split_at_special(text.rpartition(response)[2], special_tokens(tokenizer))
    return tokenizer.convert_tokens_to_ids(after[1]) if len(after) > 1 else None


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer reads as special tokens."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*added, *(token for token in tokenizer.all_special_tokens if token not in added)]


def _split_at_special(text: str, special: Sequence[str]) -> list[str]:
    """Return [text, special token, text, special token, ..., text]. At one position the longest token wins."""
    parts: list[str] = []
    start = 0
    while True:
        found = [(text.find(token, start), -len(token), token) for token in special if token]
        found = [hit for hit in found if hit[0] >= 0]
        if not found:
            return [*parts, text[start:]]
        position, _, token = min(found)
        parts += [text[start:position], token]
        start = position + len(token)


def _fill(frame: str, placeholders: Sequence[str], contents: Sequence[str]) -> str:
    for placeholder, content in zip(placeholders, contents, strict=True):
        frame = frame.replace(placeholder, content)
    return frame
