"""Runs: many calls of a model by one thread, with the same weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_thread_state = threading.local()


class Run:
    """A run of a thread.

    Attributes:
        checked: Objects that have compared their weights in this run.
    """

    def __init__(self) -> None:
        self.checked: set[object] = set()


@contextmanager
def run_scope() -> Iterator[None]:
    """Mark the calls of a model in this context as one run.

    An accelerated network compares its weights with those that it was built from at the first call
    of a run, and not again. Nested runs are runs of their own.
    """
    outer = current_run()
    _thread_state.run = Run()
    try:
        yield
    finally:
        _thread_state.run = outer


def current_run() -> Run | None:
    """Return the run of this thread, or None outside of one."""
    return getattr(_thread_state, "run", None)
