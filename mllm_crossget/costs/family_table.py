"""``mllm-crossget families``: supported families and where their tokens are reduced; refused ones and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

import transformers
from rich.console import Console
from rich.table import Table

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget.families.family import families, refused_families
from mllm_crossget.unlisted import picture_types, reason_of_type

SERVED = ("model type", "vision towers", "where tokens are reduced", "what is exact")
REFUSED = ("model type", "why it is refused")


@dataclass
class FamiliesOptions:
    """How to print the families.

    Args:
        json: print JSON instead of tables.
    """

    json: bool = False


def served_rows() -> list[tuple[str, str, str, str]]:
    """Rows of (model type, towers, where tokens are reduced, what is exact), one for every registered family."""
    return sorted((kind.title, ", ".join(kind.towers), kind.note, kind.exact) for kind in families().values())


def refused_rows() -> list[tuple[str, str]]:
    """Rows of (model type, reason) for every family that is refused by name."""
    return sorted(refused_families().items())


def other_rows() -> list[tuple[str, str]]:
    """Rows of (model type, reason) for other models in the installed transformers that take a picture and a text."""
    named = refused_families()
    reasons = [(name, reason_of_type(name)) for name in picture_types() if name not in named]
    return [(name, reason) for name, reason in reasons if reason is not None]


def list_families(options: FamiliesOptions) -> None:
    """Print the registered families, the refused ones, and the other models of transformers."""
    if options.json:
        served = [dict(zip(("model_type", "towers", "reduces", "exact"), row, strict=True)) for row in served_rows()]
        refused = [{"model_type": model_type, "reason": reason} for model_type, reason in refused_rows()]
        others = [{"model_type": model_type, "reason": reason} for model_type, reason in other_rows()]
        print(json.dumps({"supported": served, "refused": refused, "others": others}, indent=2))
        return
    console = Console()
    for title, heads, rows in (
        ("Supported model families", SERVED, served_rows()),
        ("Refused by name", REFUSED, refused_rows()),
        (f"Not served in transformers {transformers.__version__}", REFUSED, other_rows()),
    ):
        table = Table(*heads, title=title, show_lines=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown_tables() -> str:
    """The same tables in Markdown, for the documentation."""
    parts = []
    for heads, rows in ((SERVED, served_rows()), (REFUSED, refused_rows())):
        lines = [_markdown_row(heads), "|" + "---|" * len(heads), *map(_markdown_row, rows)]
        parts.append("\n".join(lines) if rows else "")
    return "\n\n".join(filter(None, parts))


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
