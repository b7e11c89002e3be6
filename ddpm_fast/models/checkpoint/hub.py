"""Download of model repositories from the Hugging Face Hub, with the cache of huggingface_hub."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ddpm_fast.models.checkpoint.weights import FORMATS, is_weights, patterns
from ddpm_fast.utils.optional import missing

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(f"(?:{_PART}/)?{_PART}")


def is_repository_id(name: str) -> bool:
    """Return True for a name that a repository on the Hub can have: owner/name or name."""
    reserved = "--" in name or ".." in name or name.endswith(".git")
    return _ID.fullmatch(name) is not None and not reserved


def fetch(repository: str, revision: str | None, files: Iterable[str]) -> Path:
    """Download files of a repository.

    Args:
        repository: Name of the repository.
        revision: Branch, tag or commit. None: the main branch.
        files: Glob patterns of paths in the repository. Not all need to match a file.

    Returns:
        Folder of the snapshot in the cache.

    Raises:
        FileNotFoundError: huggingface_hub is not installed, or the repository or revision is
            neither on the Hub nor, without a connection, in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        reason = "no such checkpoint folder; " + missing(
            "huggingface_hub", "a repository of the Hugging Face Hub"
        )
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    options: dict[str, Any] = {"revision": revision, "allow_patterns": sorted(files)}
    try:
        return Path(snapshot_download(repository, **options))
    except RevisionNotFoundError as error:
        reason = f"the repository has no {revision=}"
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    except RepositoryNotFoundError as error:
        reason = (
            "no such checkpoint folder, and no such repository on the Hugging Face Hub;"
            " check the name, or log in if it is private (hf auth login)"
        )
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    # The error of a failed connection depends on the release of huggingface_hub.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        try:
            return Path(snapshot_download(repository, **options, local_files_only=True))
        except OSError:
            cause = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = (
                "no such checkpoint folder, and no repository in the cache; the Hugging Face Hub"
                f" cannot be reached ({cause})"
            )
            raise FileNotFoundError(errno.ENOENT, reason, repository) from error


def fetch_weights(repository: str, snapshot: Path, part: str, variant: str | None) -> None:
    """Download the weights of a variant into a snapshot; .bin files only if there are no others.

    Args:
        repository: Name of the repository.
        snapshot: Folder of the snapshot.
        part: Folder of the weights, relative to the snapshot.
        variant: The variant.

    Raises:
        FileNotFoundError: As `fetch`.
    """
    for kind in FORMATS:
        names = patterns(variant, kind)
        fetch(repository, snapshot.name, [(Path(part) / name).as_posix() for name in names])
        if any(is_weights(path.name, variant, (kind,)) for path in (snapshot / part).iterdir()):
            return
