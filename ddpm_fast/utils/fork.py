"""Locks and thread pools in a child process made by `os.fork`."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

import torch

_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
_thread_state = threading.local()


class ForkSafeLock:
    """A reentrant lock that is free in a forked child, unless the forking thread holds it.

    The threads of the parent do not exist in the child, so nobody would release their locks there.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        _locks.add(self)

    @property
    def held(self) -> bool:
        """True if this thread holds the lock."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
        self._lock.release()

    def _after_fork(self) -> None:
        if not self.held:
            self._lock, self._owner, self._depth = threading.RLock(), None, 0


def runs_on_thread_pool(device: torch.device) -> None:
    """Record that this thread runs operators of a device, on a CPU by a pool of threads.

    The pool of GNU OpenMP does not survive a fork: the next parallel operator of the child would
    wait for it for ever. The child of a thread that has a pool therefore computes with one thread,
    as the workers of a DataLoader do.
    """
    if device.type == "cpu":
        _thread_state.has_pool = True


def _after_fork() -> None:
    for lock in list(_locks):
        lock._after_fork()
    if getattr(_thread_state, "has_pool", False):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
