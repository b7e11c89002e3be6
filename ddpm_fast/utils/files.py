"""A folder that takes the name of another, as a whole."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def install(new: Path, target: Path, aside: Path) -> None:
    """Give `new` the name `target`, and remove what had it.

    All three lie in one folder; `new` and what is in it has been flushed. Where the system can
    exchange two names, `target` is there at every moment, the old or the new one; elsewhere it is
    `aside` for a moment between two renames. After an error both have their own names again.
    """
    old = new if exchange(new, target) else aside
    try:
        if old is aside:
            if target.exists():
                target.rename(aside)
            new.rename(target)
        flush(target.parent)
    except BaseException:
        if old is new:
            exchange(new, target)
        else:
            if not new.exists():
                target.rename(new)
            if aside.exists():
                aside.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders at once; False where it cannot be done, or b is not there.

    Python has no call for it, glibc has (renameat2); some file systems refuse.
    """
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    return call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0
