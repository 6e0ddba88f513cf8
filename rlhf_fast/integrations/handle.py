"""The base class of handles: what lazy_head and each fused() return."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any, ClassVar

from rlhf_fast.errors import UserError


class Handle(contextlib.AbstractContextManager):
    """Keep something replaced until `remove()` or the end of a `with` block, which a removed handle does not enter."""

    call: ClassVar[str]
    """The call that returns such a handle."""
    failed = False
    """True where an error ended the block: that no call came says nothing then."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """True until `remove()` is called."""

    @abstractmethod
    def remove(self) -> None:
        """Put back what was there. A second call does nothing."""

    def __enter__(self) -> Any:
        if not self.is_open:
            raise UserError(f"this handle of {self.call.partition('(')[0]} was removed; call {self.call} again")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        self.failed = kind is not None
        self.remove()
