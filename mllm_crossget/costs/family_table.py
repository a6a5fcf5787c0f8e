"""``mllm-crossget families``: supported families, where their tokens are reduced, and what that saves on one picture;
refused ones and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mllm_crossget import families as _registered_families  # noqa: F401 - registers them
from mllm_crossget.costs.picture import PIXELS, Saving, saving_of
from mllm_crossget.families.family import Family, families, refused_families
from mllm_crossget.methods.crossget import CrossGetConfig
from mllm_crossget.unlisted import picture_types, reason_of_type

SERVED = ("model type", "vision towers", "where tokens are reduced", "what is exact")
SAVED = ("model type", f"tokens of a picture of {PIXELS} x {PIXELS}", "FLOPs of vision tower and prefill saved")
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
    return [(kind.title, ", ".join(kind.towers), kind.note, kind.exact) for kind in _in_order()]


def _in_order() -> list[Family]:
    return sorted(families().values(), key=lambda family: family.title)


def refused_rows() -> list[tuple[str, str]]:
    """Rows of (model type, reason) for every family that is refused by name."""
    return sorted(refused_families().items())


def other_rows() -> list[tuple[str, str]]:
    """Rows of (model type, reason) for other models in the installed transformers that take a picture and a text."""
    named = refused_families()
    reasons = [(name, reason_of_type(name)) for name in picture_types() if name not in named]
    return [(name, reason) for name, reason in reasons if reason is not None]


def savings() -> list[Saving]:
    """What the default method saves on one picture, in the order of ``served_rows``; with a bar on a terminal."""
    method, rows = CrossGetConfig(), _in_order()
    terminal = Console(stderr=True)
    return [
        saving_of(family, method)
        for family in track(rows, "counting", console=terminal, transient=True, disable=not terminal.is_terminal)
    ]


def list_families(options: FamiliesOptions) -> None:
    """Print the registered families, the refused ones, and the other models of transformers."""
    found = savings()
    if options.json:
        names = ("model_type", "towers", "reduces", "exact")
        served = [
            {**dict(zip(names, row, strict=True)), "picture": asdict(saving)}
            for row, saving in zip(served_rows(), found, strict=True)
        ]
        refused = [{"model_type": model_type, "reason": reason} for model_type, reason in refused_rows()]
        others = [{"model_type": model_type, "reason": reason} for model_type, reason in other_rows()]
        print(json.dumps({"supported": served, "refused": refused, "others": others}, indent=2))
        return
    console = Console()
    saved = [(row[0], *_saved(saving)) for row, saving in zip(served_rows(), found, strict=True)]
    for title, heads, rows in (
        ("Supported model families", SERVED, served_rows()),
        (
            f"What keep_ratio={CrossGetConfig().keep_ratio} saves, in default configurations, 60 text tokens",
            SAVED,
            saved,
        ),
        ("Refused by name", REFUSED, refused_rows()),
        (f"Not served in transformers {transformers.__version__}", REFUSED, other_rows()),
    ):
        table = Table(*heads, title=title, show_lines=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _saved(saving: Saving) -> tuple[str, str]:
    tokens = "-" if saving.before is None else f"{saving.before} -> {saving.after}"
    return tokens, f"- ({saving.why})" if saving.share is None else f"{saving.share:.0%}"


def markdown_tables() -> str:
    """The same tables in Markdown, for the documentation."""
    parts = []
    for heads, rows in ((SERVED, served_rows()), (REFUSED, refused_rows())):
        lines = [_markdown_row(heads), "|" + "---|" * len(heads), *map(_markdown_row, rows)]
        parts.append("\n".join(lines) if rows else "")
    return "\n\n".join(filter(None, parts))


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
