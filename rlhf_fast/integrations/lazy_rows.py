"""Hidden states and head behind lazy logits, and what was computed of them: statistics, or the logits themselves."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.integrations.head import LinearHead
from rlhf_fast.integrations.record import LogitsCalls, caller

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


class Source:
    """Remember the tensors of one forward pass and their versions: an optimizer's step writes into them. record: of
    what is done with their logits, if it counts."""

    def __init__(self, record: LogitsCalls | None, hidden: Tensor, head: LinearHead):
        self.record = record
        tensors = {"hidden states": hidden, "weight": head.weight, "bias": head.bias}
        self.tensors = {name: (x, version_of(x)) for name, x in tensors.items() if x is not None}

    def check(self) -> None:
        """Raise where the logits of that pass cannot be computed any more."""
        for name, (x, version) in self.tensors.items():
            if version_of(x) != version:
                raise RuntimeError(
                    f"lazy_head: the head's {name} changed between the forward pass and {caller()}, which reads logits"
                    " of that pass; read them before the optimizer's step, or keep logits.make()"
                )
            if x.numel() and x.untyped_storage().size() == 0:
                raise RuntimeError(
                    f"lazy_head: the head's {name} was freed between the forward pass and {caller()}, which reads its"
                    " logits; FSDP2 keeps the weight with fully_shard(model, reshard_after_forward=None)"
                )


class CachedStatistics(NamedTuple):
    """Statistics, with what they serve for: targets of this identity, any if every row has its own.

    The targets are kept, so that no others can have their address."""

    identity: tuple | None
    with_grad: bool
    every_row: bool
    targets: Tensor | None
    statistics: Statistics


def version_of(x: Tensor) -> int:
    """Return how often a tensor was written in place; 0 in inference mode, which does not count."""
    return 0 if x.is_inference() else x._version


class Rows:
    """Hidden states under a head. Views of the same logits share one, and so its statistics and the logits, once made.

    parent: the rows of which these are `part`, or the same ones with a gradient.
    """

    def __init__(
        self, hidden: Tensor | None, head: LinearHead, source: Source, parent: Rows | None = None,
        part: slice = slice(None), detached: bool = False,
    ):  # fmt: skip
        self._hidden, self.head, self.source = hidden, head, source
        self.parent, self.part, self.detached = parent, part, detached
        self.cached: list[CachedStatistics] = []
        self.made: Tensor | None = None
        self.made_version = 0
        self._twin: weakref.ref[Rows] | None = None

    @property
    def hidden(self) -> Tensor:
        """The hidden states (N, D)."""
        if self._hidden is None:
            assert self.parent is not None
            hidden = self.parent.hidden[self.part]
            self._hidden = hidden.detach() if self.detached else hidden
        if self._hidden.dim() != 2:
            self._hidden = self._hidden.reshape(-1, self._hidden.shape[-1])
        return self._hidden

    def shaped(self, lead: tuple[int, ...]) -> Tensor:
        """Return the hidden states in the shape (*lead, D), as they came if that is theirs."""
        if self._hidden is not None and self._hidden.shape[:-1] == lead:
            return self._hidden
        return self.hidden.reshape(*lead, self.hidden.shape[-1])

    def with_head(self, head: LinearHead) -> Rows:
        """Return the same hidden states under another head."""
        return Rows(self.hidden, head, self.source)

    def detach(self) -> Rows:
        """Return these rows without a gradient."""
        if self.is_detached():
            return self
        found = self._twin() if self._twin else None
        if found is None:
            found = Rows(None, self.head.detach(), self.source, self, detached=True)
            self._twin = weakref.ref(found)  # a strong one would be a circle, and keep the memory until it is collected
        return found

    def is_detached(self) -> bool:
        """Return whether nothing behind these logits has a gradient, whatever the mode."""
        with torch.enable_grad():
            return not self.needs_grad()

    def needs_grad(self) -> bool:
        """Return whether anything behind these logits needs a gradient now."""
        if self.detached or not torch.is_grad_enabled():
            return False
        of = self.parent.needs_grad() if self._hidden is None and self.parent else self.hidden.requires_grad
        head = self.head
        return of or head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)

    def has_statistics(self) -> bool:
        """Return whether there are statistics that serve now."""
        if self.parent is not None and self.parent.has_statistics():
            return True
        return any(cached.every_row and (cached.with_grad or not self.needs_grad()) for cached in self.cached)

    def has_statistics_of(self, targets: Tensor) -> bool:
        """Return whether there are statistics of these targets that serve now."""
        wanted, need = _identity(targets), self.needs_grad()
        return any(cached.identity == wanted and (cached.with_grad or not need) for cached in self.cached)

    def statistics(self, targets: Tensor | None = None, some_ignored: bool = False) -> Statistics:
        """Return log p, entropy, log_z and top1 of each row (N,), by one call of the op.

        targets (N,); None: log p and top1 are not read, and statistics for any targets serve. some_ignored: rows of
        target -100 may be among them, of which all statistics are 0."""
        if self.parent is not None and (targets is None or self.part == slice(None)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
                found = self.parent.statistics(targets, some_ignored)
            return tuple(x[self.part] for x in found)  # type: ignore[return-value]
        need, wanted = self.needs_grad(), None if targets is None else _identity(targets)
        for cached in self.cached:
            serves = cached.every_row if wanted is None else cached.identity == wanted
            if serves and (cached.with_grad or not need):
                found = cached.statistics
                return found if need else tuple(x.detach() for x in found)  # type: ignore[return-value]
        self.note_answer("linear_logprobs")
        chosen = targets
        if chosen is None:
            chosen = torch.zeros(len(self.hidden), dtype=torch.int64, device=self.hidden.device)
        found = self.head.logprobs(self.hidden, chosen)
        self.cached.append(CachedStatistics(wanted, need, not some_ignored, targets, found))
        return found

    def logits(self) -> Tensor:
        """Return the logits themselves (N, V), made once."""
        if self.parent is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
                return self.parent.logits()[self.part]
        need = self.needs_grad()
        if self.made is None or (need and not self.made.requires_grad):
            self.source.check()
            if self.source.record is not None:
                self.source.record.note_made(need)
            self.made = self.head.logits(self.hidden)
            self.made_version = version_of(self.made)
        return self.made if need else self.made.detach()

    def note_answer(self, name: str) -> None:
        """Check that the op `name` can answer, and count it."""
        self.source.check()
        if self.source.record is not None:
            self.source.record.answered[name] += 1

    def has_logits(self) -> bool:
        """Return whether the logits were made."""
        return self.made is not None or (self.parent is not None and self.parent.has_logits())

    def written_through_a_view(self) -> bool:
        """Return whether somebody wrote into the logits past their LazyLogits."""
        if self.parent is not None:
            return self.parent.written_through_a_view()
        return self.made is not None and version_of(self.made) != self.made_version

    def forget_logits(self) -> None:
        """Drop the logits: they were written into, and the LazyLogits that was written holds them from now on."""
        if self.parent is not None:
            self.parent.forget_logits()
        self.made = None


def _identity(targets: Tensor) -> tuple:
    written = object() if targets.is_inference() else version_of(targets)  # uncounted: no two are the same then
    return targets.data_ptr(), targets.shape, targets.stride(), targets.dtype, written
