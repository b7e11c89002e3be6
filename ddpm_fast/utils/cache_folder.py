"""The folder in which the package keeps what it would otherwise make again."""

from __future__ import annotations

import os
from pathlib import Path

OFF = "off"


def default_folder() -> Path | None:
    """$DDPM_FAST_CACHE, or else $XDG_CACHE_HOME/ddpm_fast or ~/.cache/ddpm_fast.

    None where DDPM_FAST_CACHE is ``off``, or where there is no home folder.
    """
    chosen = os.environ.get("DDPM_FAST_CACHE", "")
    if chosen.lower() == OFF:
        return None
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ddpm_fast"
    except RuntimeError:  # no home folder
        return None
