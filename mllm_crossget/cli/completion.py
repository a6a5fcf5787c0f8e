"""``mllm-crossget completion SHELL``: the script that completes commands, options and their values.

The script is written once and starts no Python when a key is pressed. It is made from the parsers of all commands.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Literal, get_args

from mllm_crossget.cli.command_line import PROGRAM, all_options
from mllm_crossget.cli.commands import COMMANDS
from mllm_crossget.field_types import check_field_types

Shell = Literal["bash", "zsh", "fish", "tcsh"]
# The option whose values a command's first words are; of other commands these are files.
_FIRST_WORD = {"completion": "shell", "inspect": "geometry", "ceilings": "geometry", "bench-layers": "geometry"}


@dataclass
class CompletionOptions:
    """For which shell.

    Args:
        shell: bash, zsh, fish or tcsh.
    """

    shell: Shell

    def __post_init__(self) -> None:
        check_field_types(self)


def completion(options: CompletionOptions) -> None:
    """Print the script. Where a command's extra is not installed, stderr says that its options are missing."""
    import shtab

    print(shtab.complete(_whole_parser(shtab.FILE), shell=options.shell))


def _whole_parser(files: object) -> argparse.ArgumentParser:
    """One parser with every command and the options of all methods; nothing is ever parsed with it."""
    known = _known_values()
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, description=command.help)
        first = own.add_argument("words", nargs="*")
        _set_values(first, known.get(_FIRST_WORD.get(name, "")), files)
        try:
            actions = all_options(name, command)
        except ImportError as error:
            print(f"# without the options of {name}: {error}", file=sys.stderr)
            continue
        for action in actions:
            # one spelling: in both, the shell would have to ask which one is meant
            action.option_strings = [word for word in action.option_strings if "-" not in word[2:]]
            _set_values(action, known.get(action.dest), files)
            own._add_action(action)
    return parser


def _known_values() -> dict[str, list[str]]:
    """What may stand behind options that take a word, where a list of it exists."""
    from mllm_crossget.config import POSITIONS, SCHEDULES, method_names
    from mllm_crossget.costs.geometries.llava import geometry_names

    return {
        "geometry": geometry_names(),
        "methods": method_names(),
        "positions": list(POSITIONS),
        "schedule": list(SCHEDULES),
        "shell": list(get_args(Shell)),
    }


def _set_values(action: argparse.Action, known: list[str] | None, files: object) -> None:
    """Complete the option's values: those that are known, else files where any word may stand."""
    if known:
        action.choices = known
    elif action.choices is None and action.type in (None, str):
        action.complete = files  # type: ignore[attr-defined]
