"""MkDocs hook: pages may link to files outside docs/, such as results and tests."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"\[([^\]]+)\]\(([^):#\s]+)\)")
AS_TEXT = {".md", ".py"}  # shown by browsers, not downloaded or taken for a page


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Copy each linked file of the repository to `files/` in the site, and link to the copy."""
    root, docs = Path(config.config_file_path).parent, Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def relink(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[2]))
        if target.is_relative_to(docs) or not target.exists():
            return link[0]  # MkDocs checks it
        if target.is_dir():
            return link[1]
        suffix = ".txt" if target.suffix in AS_TEXT else ""
        uri = f"files/{target.relative_to(root).as_posix()}{suffix}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        return f"[{link[1]}]({os.path.relpath(docs / uri, folder)})"

    return LINK.sub(relink, markdown)
