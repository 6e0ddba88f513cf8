"""Calls of reward functions: each within a time, again after a failure, and those that are `async` together."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import sysconfig
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast.errors import BadRows

FIRST_WAIT = 1.0
"""Seconds before a function is called for the second time. Each further wait is twice as long."""
LONGEST_WAIT = 60.0


class Call(NamedTuple):
    """A reward function and what it is called with."""

    name: str
    function: Callable[[], Any]
    uids: Sequence[int]
    """The prompts of its responses, for messages."""
    is_async: bool = False


class CallLimits(NamedTuple):
    """The time that a call may take, and what follows a failure."""

    timeout: float = 0.0
    """Seconds. 0 = any."""
    retries: int = 0
    """Times that a function is called again."""


class _Slow(Exception):
    """A call took longer than it may."""


def call_all(calls: Sequence[Call], limits: CallLimits, notify: Callable[[str], object]) -> list[Any]:
    """Return what each call returns: plain functions run one after another, then all `async` ones together.

    notify: gets a sentence for each failure that another call follows. BadRows with all rows for a call that still
    fails. A plain function that is too slow cannot be stopped: its thread goes on, and what it returns is dropped.
    """
    results: list[Any] = [None] * len(calls)
    waiting: list[tuple[int, Call]] = []
    for i, call in enumerate(calls):
        if call.is_async:
            waiting.append((i, call))
            continue
        results[i] = _call(call, limits, notify)
        if inspect.isawaitable(results[i]):  # of a plain function that returns a coroutine
            waiting.append((i, call._replace(function=_first_result(results[i], call.function))))
    if waiting:
        found = _run(_together([call for _, call in waiting], limits, notify))
        for (i, _), result in zip(waiting, found, strict=True):
            results[i] = result
    return results


def _first_result(result: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that returns `result` once, and what `function` returns after that."""
    left = [result]
    return lambda: left.pop() if left else function()


def _call(call: Call, limits: CallLimits, notify: Callable[[str], object]) -> Any:
    for attempt in range(limits.retries + 1):
        try:
            return _in_thread(call.function, limits.timeout) if limits.timeout else call.function()
        except (Exception, SystemExit) as error:
            wait = _next_wait(call, error, attempt, limits, notify)
        threading.Event().wait(wait)
    raise AssertionError("the last failure raises")


async def _together(calls: Sequence[Call], limits: CallLimits, notify: Callable[[str], object]) -> list[Any]:
    found = await asyncio.gather(*(_await(call, limits, notify) for call in calls), return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


async def _await(call: Call, limits: CallLimits, notify: Callable[[str], object]) -> Any:
    for attempt in range(limits.retries + 1):
        try:
            return await _within(call.function(), limits.timeout)
        except Exception as error:
            wait = _next_wait(call, error, attempt, limits, notify)
        await asyncio.sleep(wait)
    raise AssertionError("the last failure raises")


async def _guarded(result: Awaitable[Any]) -> Any:
    """Return the result. An exit within the function is its error: out of a task it would end the loop instead."""
    try:
        return await result
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__} {error}") from error


async def _within(result: Awaitable[Any], timeout: float) -> Any:
    task = asyncio.ensure_future(_guarded(result))
    await asyncio.wait({task}, timeout=timeout or None)
    if not task.done():
        task.cancel()
        raise _Slow
    return task.result()


def _in_thread(function: Callable[[], Any], timeout: float) -> Any:
    """Return what a function returns within `timeout` seconds, in a thread of its own."""
    found: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        torch.set_grad_enabled(False)  # each thread has its own switch
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="reward")
    thread.start()
    thread.join(timeout)
    if not found:
        raise _Slow
    result, error = found[0]
    if error is not None:
        raise error
    return result


def _next_wait(
    call: Call, error: BaseException, attempt: int, limits: CallLimits, notify: Callable[[str], object]
) -> float:
    """Return the seconds until the next call; BadRows if there is none."""
    if isinstance(error, _Slow):
        what = f"took longer than reward_timeout ({limits.timeout:g} s)"
        remedy = "raise it, or make the function faster"
    else:
        what = f"raised {type(error).__name__}: {' '.join(str(error).split())}{_place(error)}"
        remedy = "mend the function"
    if attempt < limits.retries:
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
        notify(f"reward {call.name}: {what}; called again in {wait:g} s ({attempt + 1} of {limits.retries})")
        return wait
    times = f", the last of {attempt + 1} calls" if attempt else ""
    uids = list(dict.fromkeys(call.uids))
    raise BadRows(
        f"reward {call.name}: {what}{times}, called with {len(call.uids)} responses; {remedy}",
        [("Responses", uid) for uid in uids],
        by_function=True,
    ) from error


def _place(error: BaseException) -> str:
    """Return where in the user's files an exception comes from: the innermost line outside of installed packages."""
    library = tuple(filter(None, (sysconfig.get_paths().get(name) for name in ("stdlib", "purelib", "platlib"))))
    ours = str(Path(__file__).parent.parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    own = [frame for frame in frames if not frame.filename.startswith(library)] or frames
    return f" ({own[-1].filename}:{own[-1].lineno}, in {own[-1].name})" if own else ""


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Return the one event loop of this process's reward functions, in a thread of its own: a notebook's loop runs
    already, and a client that a function keeps belongs to the loop in which it was made."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)
        asyncio.set_event_loop(loop)
        loop.run_forever()

    threading.Thread(target=run, daemon=True, name="rewards").start()
    return loop


def _run(coroutine: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


def print_note(sentence: str) -> None:
    """Print a sentence where no log is open."""
    print(sentence, file=sys.stderr)
