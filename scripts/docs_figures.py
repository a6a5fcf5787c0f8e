"""MkDocs hook: pages show the pictures of eval/results, which are outside of docs/, and load nothing from the network.

A page writes ``../eval/results/demo/curves.png``, so that the link also works in the repository. MkDocs only knows
files of its own folder: the pictures are added to the site as ``figures/demo/curves.png``, and the links are changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

RESULTS = Path("eval") / "results"
_LINK = re.compile(r"\]\((?:\.\./)+eval/results/([^)\s]+\.png)\)")
_REMOTE = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\brel=["']?stylesheet[^>]*//"""
)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures to the site."""
    root = Path(config.config_file_path).parent
    for path in sorted((root / RESULTS).rglob("*.png")):
        name = path.relative_to(root / RESULTS).as_posix()
        files.append(File.generated(config, f"figures/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the page's links to pictures point to where ``on_files`` put them."""
    up = "../" * page.file.src_uri.count("/")
    return _LINK.sub(rf"]({up}figures/\1)", markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that a reader without a network would see incomplete."""
    found = _REMOTE.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads a file from the network: {output[found.start() :][:120]}")
    return output
