"""Files and folders that are written whole, JSON objects, and the cache folder.

A file is written under a temporary name in its folder, flushed to the disk and then renamed, so
that its final name never holds a part of it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PathLike = str | os.PathLike[str]

CACHE_OFF = "off"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that gets the name `path` at the end of the block, flushed to the disk.

    If the block or the disk fails, an existing file of that name is kept and nothing else is left.

    Args:
        path: The final name. Its folder must exist.

    Yields:
        The temporary file, open for writing.

    Raises:
        OSError: with the path and the reason, if the file cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path.parent)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _disk_error(error, "file cannot be written", path) from error
        raise


def prepare_folder(folder: PathLike) -> None:
    """Create a folder if it is missing, and check that files can be created in it.

    Raises:
        OSError: with the path and the reason, if it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary(folder)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _disk_error(error, "folder cannot be written to", folder) from error


def _temporary(folder: Path) -> Path:
    return folder / f".ddpm_fast.{secrets.token_hex(4)}.tmp"


def _disk_error(error: OSError, what: str, path: Path) -> OSError:
    reason = f"{what}: {error.strerror or error}"
    return OSError(error.errno or errno.EIO, reason, str(path))


def replace_directory(new: Path, target: Path, aside: Path) -> None:
    """Rename the folder `new` to `target`, and remove the folder that had this name.

    On systems that can swap two names, `target` exists at every moment, as the old folder or the
    new one. Elsewhere the old folder is renamed to `aside` first. After an error both folders have
    their own names again.

    Args:
        new: The new folder. Its contents have been flushed (see `fsync_path`).
        target: The final name, in the same folder as `new`; it need not exist.
        aside: A free name in the same folder.

    Raises:
        OSError: a folder cannot be renamed.
    """
    old = new if swap_names(new, target) else aside
    try:
        if old is aside:
            if target.exists():
                target.rename(aside)
            new.rename(target)
        fsync_path(target.parent)
    except BaseException:
        if old is new:
            swap_names(new, target)
        else:
            if not new.exists():
                target.rename(new)
            if aside.exists():
                aside.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file, or the list of names of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def swap_names(a: Path, b: Path) -> bool:
    """Swap the names of two folders atomically.

    Python has no call for it. glibc has renameat2, which some file systems refuse.

    Args:
        a: A folder.
        b: Another folder.

    Returns:
        False if the names cannot be swapped, or `b` does not exist.
    """
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    return call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Infinity is accepted, as Python and diffusers write it.

    Raises:
        ValueError: the file is not JSON or no object, or has NaN or a repeated key; the message
            names the file.
        OSError: the file cannot be read.
    """
    try:
        value = _parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object; got {type(value).__name__}")
    return value


def _parse(text: str) -> Any:
    def number(constant: str) -> float:
        if constant == "NaN":
            raise ValueError("NaN is not a JSON number")
        return float(constant)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!r} is repeated")
            found[key] = value
        return found

    return json.loads(text, parse_constant=number, object_pairs_hook=unique)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object whole (see `atomic_write`); creates the folder, not its parents.

    Args:
        path: Name of the file; an existing file is replaced.
        document: The object.

    Raises:
        TypeError: `document` has values that JSON does not have.
        ValueError: `document` has values that `read_json` does not accept.
        OSError: the file cannot be written.
    """
    text = json.dumps(document, indent=2, sort_keys=True)
    _parse(text)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def cache_dir() -> Path | None:
    """Return the folder of the package's cache.

    Returns:
        $DDPM_FAST_CACHE, or else $XDG_CACHE_HOME/ddpm_fast or ~/.cache/ddpm_fast. None where
        DDPM_FAST_CACHE is `off`, or where there is no home folder.
    """
    chosen = os.environ.get("DDPM_FAST_CACHE", "")
    if chosen.lower() == CACHE_OFF:
        return None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ddpm_fast"
    except RuntimeError:  # no home folder
        return None
