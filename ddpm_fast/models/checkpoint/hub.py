"""Model repositories on the Hugging Face Hub, through huggingface_hub and its cache."""

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
    """Whether the Hub allows a repository of this name: owner/name, or name alone."""
    taken = "--" in name or ".." in name or name.endswith(".git")
    return _ID.fullmatch(name) is not None and not taken


def fetch(repository: str, revision: str | None, files: Iterable[str]) -> Path:
    """The folder of a repository's snapshot, with the named files as far as it has them.

    revision: a branch, tag or commit; None for the main branch.
    files: globs of paths in the repository.

    Raises:
        FileNotFoundError: huggingface_hub is not installed; or there is no such repository or
            revision, neither on the Hub nor, where it is out of reach, in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        reason = "no such checkpoint folder; " + missing(
            "huggingface_hub", "a repository of the Hugging Face Hub"
        )
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": sorted(files)}
    try:
        return Path(snapshot_download(repository, **wanted))
    except RevisionNotFoundError as error:
        reason = f"the repository has no {revision=}"
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    except RepositoryNotFoundError as error:
        reason = (
            "no such checkpoint folder, and no such repository on the Hugging Face Hub;"
            " check the name, or log in if it is private (hf auth login)"
        )
        raise FileNotFoundError(errno.ENOENT, reason, repository) from error
    # What a lost connection raises depends on the release of huggingface_hub.
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        try:
            return Path(snapshot_download(repository, **wanted, local_files_only=True))
        except OSError:
            cause = str(error).strip().partition("\n")[0] or type(error).__name__
            reason = (
                "no such checkpoint folder, and as a repository it is neither in the cache nor"
                f" to be had from the Hugging Face Hub ({cause})"
            )
            raise FileNotFoundError(errno.ENOENT, reason, repository) from error


def fetch_weights(repository: str, snapshot: Path, part: str, variant: str | None) -> None:
    """Fetch into a snapshot the weights of one variant: .bin only where there is nothing else.

    part: the folder of the snapshot that has them, "." for the snapshot itself.

    Raises:
        FileNotFoundError: see `fetch`.
    """
    home = snapshot / part
    for kind in FORMATS:
        names = patterns(variant, kind)
        fetch(repository, snapshot.name, [(Path(part) / name).as_posix() for name in names])
        if any(is_weights(path.name, variant, (kind,)) for path in home.iterdir()):
            return
