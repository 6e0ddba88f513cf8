"""`rlhf-fast chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from rlhf_fast.cli.conversation import Conversation, Stopped, ending, positions_of
from rlhf_fast.cli.options import ChatOptions
from rlhf_fast.config.fields import ModelConfig
from rlhf_fast.errors import REMEDIES, UserError, did_you_mean
from rlhf_fast.model.model import Model
from rlhf_fast.run.prompt_format import model_prompt_format
from rlhf_fast.run.terminal import aligned, quoted, without_controls
from rlhf_fast.stages.fit import check_device

PROMPT = "> "
CONTINUED = "... "
LIKELY, UNLIKELY = math.log(0.5), math.log(0.1)
"""Log-probabilities from which on a token is shown as likely, and below which as unlikely."""


class _Leave(Exception):
    """Ends the conversation."""


class Command(NamedTuple):
    """A command within the conversation. argument: its name in the help; "" if it takes none."""

    run: Callable[[_Chat, str], None]
    argument: str
    help: str


def chat(options: ChatOptions) -> None:
    """Read messages and commands until the input ends."""
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="strict")  # in the C locale, bytes that are no text would be read as half surrogate pairs
    check_device("chat", options.device)
    device = None if options.device == "auto" else options.device
    model = Model.load(ModelConfig(path=options.model, dtype=options.dtype), device=device)
    prompt_format, notes = model_prompt_format(
        options.model, model.tokenizer, options.template, "template", strict=False
    )
    sampling, positions = options.sampling, positions_of(model)
    if positions and sampling.max_new_tokens >= positions:
        sampling = replace(sampling, max_new_tokens=max(positions // 2, 1), min_new_tokens=0)
        notes.append(
            f"{options.model} has only {positions} positions, prompt included; an answer has at most"
            f" {sampling.max_new_tokens} tokens"
        )
    conversation = Conversation(model, prompt_format, sampling, options.seed)
    try:
        conversation.set_system(options.system)
    except UserError as error:
        raise UserError(f"chat: --system: {error}") from error
    notes += conversation.encoder.notes(learned=False)
    if not conversation.has_turns:
        notes.append(
            "this model continues texts: each message is a text of its own, which it goes on with, and earlier ones are"
            " not read"
        )
    _Chat(conversation, notes).run()


class _Chat:
    """Input, output and commands of a conversation."""

    def __init__(self, conversation: Conversation, notes: list[str]):
        self.conversation = conversation
        self.on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.left_out = 0
        self.console = Console(highlight=False, soft_wrap=True)
        for note in notes:
            self.note(note)
        if self.on_terminal:
            self.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")

    def run(self) -> None:
        """Take messages and commands until the input ends or one of them is /exit."""
        if self.on_terminal:
            with suppress(ImportError):  # not in every build of Python
                import readline  # noqa: F401  input() then edits the line and remembers earlier ones
        while True:
            try:
                line = self._message()
                if line is None:
                    return
                if line.strip():
                    self._take(line)
            except _Leave:  # noqa: PERF203
                return
            except KeyboardInterrupt:
                if not self.on_terminal:
                    raise
                print()
            except UserError as error:
                if not self.on_terminal:  # a script must not go on as if nothing had happened
                    raise UserError(f"chat: {error}") from error
                self.note(str(error))

    def note(self, text: str) -> None:
        """Print a sentence that is no part of the conversation."""
        sys.stdout.flush()
        print(f"chat: {text}", file=sys.stderr, flush=True)

    def _message(self) -> str | None:
        """Return the next message or command, None at the end of the input. A line that ends with a backslash goes on
        in the next one."""
        parts: list[str] = []
        try:
            while (line := self._line(CONTINUED if parts else PROMPT)) is not None:
                parts.append(line.removesuffix("\\"))
                if not line.endswith("\\"):
                    break
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8; convert it, for instance with iconv") from error
        return "\n".join(parts) if parts else None

    def _line(self, prompt: str) -> str | None:
        """Return a line without its end; None at the end of the input."""
        if not self.on_terminal:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            print()
            return None

    def _take(self, line: str) -> None:
        """Answer a message, or run a command."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line[1:] if line.startswith("//") else line)
            return
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name not in COMMANDS:
            hint = did_you_mean(name, COMMANDS, "/help lists them")
            raise UserError(f"no command {name}; {hint} (a message that begins with / is written with //)")
        command = COMMANDS[name]
        if argument and not command.argument:
            raise UserError(f"{name} takes no argument; write {name} alone")
        command.run(self, argument)

    def _ask(self, message: str) -> None:
        prompt = self.conversation.prompt(message)
        if prompt.left_out > self.left_out:
            self.note(
                f"the first {_count(prompt.left_out, 'message')} and the answers to them are left out of the prompt,"
                f" which would not fit the model's {self.conversation.positions} positions"
            )
        self.left_out = prompt.left_out
        self._show(lambda show: self.conversation.ask(message, show, prompt))

    def _show(self, sample: Callable[[Callable[[str], None]], Any]) -> None:
        """Print an answer while it is sampled; on a terminal, with U+FFFD for its control characters."""
        strips, cleans = self.conversation.has_turns, sys.stdout.isatty()
        printed, held = False, ""

        def write(text: str) -> None:
            nonlocal held
            if cleans:
                text = held + text
                held = "\r" if text.endswith("\r") else ""  # the line feed of a CRLF may come in the next chunk
                text = without_controls(text.removesuffix("\r").replace("\r\n", "\n"))
            sys.stdout.write(text)
            sys.stdout.flush()

        with self._stop_at_interrupt() as is_stopped:

            def show(text: str) -> None:
                nonlocal printed
                text = text if printed or not strips else text.lstrip()  # the blank before an answer
                if text:
                    printed = True
                    write(text)
                if is_stopped():
                    raise Stopped

            answer = sample(show)
        write("\n")
        if sentence := ending(answer, self.conversation.sampling):
            self.note(sentence)

    @contextmanager
    def _stop_at_interrupt(self) -> Iterator[Callable[[], bool]]:
        """Let Ctrl-C on a terminal end the answer at its next token; a second one breaks it off at once."""
        interrupted = False

        def stop(*_: object) -> None:
            nonlocal interrupted
            interrupted = True
            signal.signal(signal.SIGINT, before)

        if not self.on_terminal:
            yield lambda: False
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield lambda: interrupted
        finally:
            signal.signal(signal.SIGINT, before)

    def regenerate(self, _: str) -> None:
        self.conversation.last()
        if not self.conversation.sampling.temperature:
            self.note("at temperature 0 it is the same answer; start with a --temperature above 0 for others")
        self._show(self.conversation.ask_again)

    def logprobs(self, _: str) -> None:
        answer = self.conversation.last().answer
        texts = self.conversation.token_texts(answer.tokens)
        for text, logprob in zip(texts, answer.logprobs, strict=True):
            color = "green" if logprob >= LIKELY else "red" if logprob < UNLIKELY else "yellow"
            self.console.print(Text(f"{logprob:>10.4f}  {quoted(text)}", style=color))
        total = math.fsum(answer.logprobs)
        mean = total / len(answer.logprobs)
        self.console.print(
            f"{_count(len(texts), 'token')}, {total:.4f} nats together, {mean:.4f} a token, at temperature 1"
        )

    def undo(self, _: str) -> None:
        message = self.conversation.undo().message
        self.note(f"forgotten: {quoted(message)} and its answer")

    def clear(self, _: str) -> None:
        self.conversation.exchanges.clear()
        self.left_out = 0
        self.note("the conversation is empty" + "; the system turn stays" * bool(self.conversation.system))

    def system(self, text: str) -> None:
        self.conversation.set_system(text)
        self.note("the system turn is set" if text else "there is no system turn")

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file; write for instance /save conversation.jsonl")
        self.conversation.last()
        try:
            path = Path(name).expanduser()
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.conversation.rows())
        except FileExistsError as error:
            raise UserError(f"{name}: exists already; give another name") from error
        except (OSError, RuntimeError) as error:  # RuntimeError: a home folder of nobody
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"{name}: {reason}; {REMEDIES.get(getattr(error, 'errno', 0), 'look at the path')}"
            ) from error
        self.note(f"{name}: written")

    def help(self, _: str) -> None:
        rows = [(f"{name} {command.argument}".strip(), command.help) for name, command in COMMANDS.items()]
        keys = [
            ("Ctrl-C", "stop the answer"),
            ("Ctrl-D", "leave"),
            ("\\ at the end", "the message goes on in the next line"),
        ]
        print("\n".join(aligned([*rows, *keys])), flush=True)

    def leave(self, _: str) -> None:
        raise _Leave


COMMANDS: dict[str, Command] = {
    "/regenerate": Command(_Chat.regenerate, "", "another sample of the last answer"),
    "/logprobs": Command(_Chat.logprobs, "", "the log-probability of each token of the last answer"),
    "/undo": Command(_Chat.undo, "", "forget the last message and its answer"),
    "/clear": Command(_Chat.clear, "", "forget all messages and answers"),
    "/system": Command(_Chat.system, "TEXT", "set the system turn; without TEXT there is none"),
    "/save": Command(_Chat.save, "FILE", "write the conversation as JSON lines, which sft reads"),
    "/help": Command(_Chat.help, "", "this list"),
    "/exit": Command(_Chat.leave, "", "leave"),
}
"""Command -> what it does."""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
