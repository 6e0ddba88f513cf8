"""The requests of a rollout in the order in which they start, and the prefixes that their prompts share.

Responses of one prompt share all its pages. Prompts that begin with the same full pages, as those of a chat template or
a few-shot header, share these pages too: the first prompt that starts computes them. They are kept until the last one
has started. Prompts with a common prefix are adjacent in the queue, so that only pages are kept that the next one uses.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_fast.rollout.kv_cache import PagedKVCache
from rlhf_fast.rollout.prefix_tree import PrefixNode, build_prefix_tree
from rlhf_fast.rollout.response_buffer import Requests


@dataclass
class SharedPrefix:
    """Full pages with which the prompts of several groups begin."""

    start: int
    """Position of its first token, after those of its parent."""
    end: int
    number: int
    """Its place among the prefixes of equally long prompts."""
    longest: int = 0
    """Tokens of the longest prompt that begins with it."""
    num_waiting: int = 0
    """Number of groups that begin with it and have not started."""
    pages: list[int] = field(default_factory=list)
    """Its own pages, without its parent's; empty until they are computed."""


@dataclass
class PromptGroup:
    """The requests for one prompt."""

    prompt: list[int]
    num_waiting: int
    prefixes: list[SharedPrefix] = field(default_factory=list)
    """Prefixes that it shares with other prompts, shortest first."""
    pages: list[int] = field(default_factory=list)
    """The prompt's pages, from prefill until all its responses have started. Only one response at a time may append to
    the last page if it is partly filled."""
    last_hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    """(D,) the hidden state of the prompt's last token, after prefill."""

    def computed_pages(self) -> list[int]:
        """Return the pages of its prefixes that are computed."""
        return [page for prefix in self.prefixes for page in prefix.pages]

    def keep_prefixes(self, cache: PagedKVCache, pages: list[int]) -> None:
        """Keep those of the prompt's `pages` that other prompts share, and release pages that no other one waits for.
        Call it once, when the group starts."""
        for prefix in self.prefixes:
            if not prefix.pages:
                prefix.pages = pages[prefix.start // cache.page_size : prefix.end // cache.page_size]
                cache.incref(prefix.pages)
            prefix.num_waiting -= 1
            if not prefix.num_waiting:
                cache.release(prefix.pages)


def waiting_queue(requests: Requests, page_size: int, device: torch.device) -> deque[tuple[int, PromptGroup]]:
    """Return (response, group) of all requests: longest prompt first, those of one prompt together, and those with a
    common prefix together, at the place of the longest."""
    responses_by_prompt = requests.responses_by_prompt()
    groups = [
        PromptGroup(prompt, num_waiting=len(responses))
        for prompt, responses in zip(requests.prompts, responses_by_prompt, strict=True)
    ]
    _find_prefixes(groups, page_size, device)

    def place(index: int) -> tuple[tuple[int, int], ...]:
        group = groups[index]
        return *((-prefix.longest, prefix.number) for prefix in group.prefixes), (-len(group.prompt), index)

    order = sorted(range(len(groups)), key=place)
    return deque((response, groups[index]) for index in order for response in responses_by_prompt[index])


def _find_prefixes(groups: list[PromptGroup], page_size: int, device: torch.device) -> None:
    """Set the prefixes of all groups. A prompt's last token is never shared: its hidden state is needed."""
    by_prompt = sorted(groups, key=lambda group: group.prompt)
    heads = [group.prompt[:-1] for group in by_prompt]
    distinct = [head for i, head in enumerate(heads) if not i or head != heads[i - 1]]
    ends = dict(zip(map(tuple, distinct), build_prefix_tree(distinct, page_size, page_size), strict=True))
    found: dict[PrefixNode, SharedPrefix] = {}
    for group, head in zip(by_prompt, heads, strict=True):
        node = ends[tuple(head)]
        path = [] if node is None else node.path()
        if path and path[-1].end % page_size:
            path.pop()  # the rest of this prompt alone
        # on a GPU the rest of a prompt cannot use the kernels for whole prompts
        if device.type == "cuda" and path and 2 * path[-1].end < len(group.prompt):
            path = []
        for node in path:
            prefix = found.setdefault(node, SharedPrefix(node.start, node.end, len(found)))
            prefix.longest = max(prefix.longest, len(group.prompt))
            prefix.num_waiting += 1
            group.prefixes.append(prefix)
