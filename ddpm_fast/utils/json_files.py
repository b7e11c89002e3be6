"""JSON objects on disk, read and written strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Infinity is read as Python and diffusers write it.

    Raises:
        ValueError: no JSON object, NaN, or a key given twice; the message names the file.
    """
    try:
        value = _parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
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
                raise ValueError(f"the key {key!r} is given twice")
            found[key] = value
        return found

    return json.loads(text, parse_constant=number, object_pairs_hook=unique)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write and flush `document`, making its folder.

    Raises:
        TypeError, ValueError: it holds what `read_json` would not read.
        OSError: the file cannot be written.
    """
    text = json.dumps(document, indent=2, sort_keys=True)
    _parse(text)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
