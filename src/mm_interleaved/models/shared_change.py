"""A change to something that threads share, which lasts as long as any of them needs it."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

Target = TypeVar("Target")
Undo = Callable[[], None]


@dataclass(slots=True)
class _Change:
    undo: Undo
    callers: int = 0


class SharedChange(Generic[Target]):
    """Made when the first caller enters, undone when the last one leaves; any number of threads at once.

    Args:
        make: changes a target and returns what undoes it; None where nothing needs to change.
    """

    def __init__(self, make: Callable[[Target], Undo | None]):
        self._make, self._lock = make, threading.Lock()
        self._changes: WeakKeyDictionary[Target, _Change] = WeakKeyDictionary()

    @contextmanager
    def of(self, target: Target) -> Generator[None, None, None]:
        """Within, the target is changed."""
        change = self._enter(target)
        try:
            yield
        finally:
            if change is not None:
                self._leave(target, change)

    def _enter(self, target: Target) -> _Change | None:
        with self._lock:
            change = self._changes.get(target)
            if change is None and (undo := self._make(target)) is not None:
                change = self._changes[target] = _Change(undo)
            if change is not None:
                change.callers += 1
            return change

    def _leave(self, target: Target, change: _Change) -> None:
        with self._lock:
            change.callers -= 1
            if change.callers == 0:
                del self._changes[target]
                change.undo()
