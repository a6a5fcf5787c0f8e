"""From the words of ``mllm-crossget COMMAND`` to the call of its function, which takes one dataclass of options.

A command's modules are imported when it is called, so that a missing extra of one command does not stop the others.
torch and transformers are imported inside functions: help and many mistakes come without them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from mllm_crossget import __version__
from mllm_crossget.cli.commands import COMMANDS, GROUPS, Command
from mllm_crossget.cli.option_names import check_names, field_names
from mllm_crossget.field_types import check_type
from mllm_crossget.files.quiet import quiet
from mllm_crossget.files.user_files import read_yaml

PROGRAM = "mllm-crossget"
_DEFAULT_METHOD = "crossget"
_SHARED = {"seed"}  # options that the run and a method both have, so that the value may be meant for the run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        Exit status: the command's own (0 if it returns none); 2 after a mistake in the input, or a file that cannot be
            read or written, with a message in one line; 130 after Ctrl-C.

    Raises:
        SystemExit: after ``--help``, ``--version`` and arguments that the parser does not know.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = _overview().parse_args(words[:1]).command
    command = COMMANDS[name]
    try:
        arguments = parse_command(name, command, words[1:], check_files=True)
        with quiet() if command.quiet else contextlib.nullcontext():
            status: int | None = _imported(command.function)(*arguments)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "").startswith("mllm_crossget"):
            raise
        print(f"error: {_in_one_line(error)}; pip install 'mllm-crossget[{command.extra}]'", file=sys.stderr)
        return 2
    except ImportError as error:
        if error.name is not None:  # not our own error, which says what to install
            raise
        print(f"error: {_in_one_line(error)}", file=sys.stderr)
        return 2
    return status or 0


def _in_one_line(error: BaseException) -> str:
    """The message of an error; for an error in a worker of the data loader, its last line without the traceback."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split()) or type(error).__name__


def parse_command(name: str, command: Command, words: Sequence[str], check_files: bool = False) -> tuple[Any, ...]:
    """The arguments for a command's function: its options and, if it takes a method, the method's settings.

    Args:
        name: the command's name.
        command: its entry.
        words: the arguments after the name.
        check_files: whether the files that the options name must exist (``Command.early``).

    Raises:
        ValueError, TypeError: a mistyped name, or from the dataclasses' own checks.
        SystemExit: ``--help``, or arguments that the parser does not know.
    """
    words, from_file = _read_file(words) if command.takes_file else (list(words), {})
    rest: list[str] = []
    if command.takes_rest and "--" in words:
        words, rest = words[: words.index("--")], words[words.index("--") + 1 :]
    _refuse_repeated(words)
    early = not {"-h", "--help"} & set(words)
    if early and command.names:
        _check_names(command, words, from_file)
    kinds = [_imported(command.options)]
    if early and command.settings:
        found = _told_early(name, kinds, words, from_file)
        if found and check_files and command.early:
            _imported(command.early)(found)
    if command.takes_method:
        kinds.append(_method_kind(words, from_file))
    if command.settings:
        if early:
            _told_early(name, kinds, words, from_file)
        kinds.append(_imported(command.settings))
    taken = _taken_twice(kinds) if command.takes_method else {}
    example = f"example: {PROGRAM} {command.example}" if command.example else ""
    epilog = "\n\n".join(filter(None, [example, _imported(command.details) if command.details else ""]))
    parsable = [_parsable(kind, taken if index == 1 else {}) for index, kind in enumerate(kinds)]
    parser = _parser(name, parsable, command.takes_method, description=command.help, epilog=epilog)
    _set_defaults(parser, from_file)
    values = vars(parser.parse_args(_with_leading_options(kinds[0], words, command.leading)))
    built = tuple(_built(kind, values, taken if index == 1 else {}, from_file) for index, kind in enumerate(kinds))
    if not command.takes_rest:
        return built
    return (built[0], built[1] if _names_any({"method", *_fields(kinds[1])}, words) else None, rest)


def _parser(name: str, kinds: Sequence[Any], takes_method: bool, **texts: str) -> argparse.ArgumentParser:
    """The parser of a command; every option is known in both spellings, with _ and with -."""
    from transformers import HfArgumentParser

    class Parser(_ErrorsInOneLine, HfArgumentParser):
        """``HfArgumentParser`` with short errors."""

    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(kinds, prog=f"{PROGRAM} {name}", formatter_class=formatter, allow_abbrev=False, **texts)
    if takes_method:
        from mllm_crossget.config import method_names

        parser.add_argument("--method", default=_DEFAULT_METHOD, choices=method_names(), help="the reduction")
    return parser


def all_options(name: str, command: Command) -> list[argparse.Action]:
    """The options of a command, with those of every method and of its further settings, for shell completion.

    Raises:
        ImportError: an extra that the command needs is not installed.
    """
    kinds = [_imported(path) for path in (command.options, command.settings) if path]
    sets = [[_parsable(kind) for kind in kinds]]
    if command.takes_method:
        from mllm_crossget.config import method_class, method_names

        for kind in map(method_class, method_names()):
            taken = _taken_twice([kinds[0], kind, *kinds[1:]])
            sets.append([_parsable(kind, taken)])
    found: dict[str, argparse.Action] = {}
    for one in sets:
        for action in _parser(name, one, command.takes_method)._actions:
            found.setdefault(action.dest, action)
    return [action for action in found.values() if action.dest != "help"]


def _method_kind(words: Sequence[str], from_file: Mapping[str, Any]) -> type:
    from mllm_crossget.config import method_class  # its lookup imports the methods, and with them torch

    return method_class(_method_name(words, from_file.get("method", _DEFAULT_METHOD)))


def _check_names(command: Command, words: Sequence[str], from_file: Mapping[str, Any]) -> None:
    """Refuse mistyped names of options, from the source files of what defines them, if all of these are found."""
    found = [field_names(module) for module in command.names]
    if all(found):
        known = set().union(*found)
        check_names(words, from_file, known | {f"method_{name}" for name in known} | {"method"})


def _refuse_repeated(words: Sequence[str]) -> None:
    """Refuse an option that is given twice: the parser would use the last value and silently drop the first."""
    names = Counter(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0].replace('-', '_').replace('__', '--', 1)} is given twice; leave one out")


def _told_early(name: str, kinds: Sequence[type], words: Sequence[str], from_file: Mapping[str, Any]) -> Any:
    """Report mistakes in the options that are known already, before the import of the others takes seconds.

    Returns:
        The first dataclass's object, or None if a required option is not there, which is reported later.
    """
    parser = _parser(name, [_parsable(kind) for kind in kinds], takes_method=len(kinds) > 1)
    known = {action.dest for action in parser._actions} - _SHARED
    _set_defaults(parser, {option: value for option, value in from_file.items() if option in known})
    values = vars(parser.parse_known_args(_with_leading_options(kinds[0], words))[0])
    if any(not values[name] for name in getattr(kinds[0], "REQUIRED", ())):
        return None  # reported later: a misspelt name in the file is the more likely mistake
    built = []
    for kind in kinds:
        fields = [field for field in dataclasses.fields(kind) if field.name not in _SHARED]
        built.append(_built(kind, {field.name: values[field.name] for field in fields}, {}, from_file))
    return built[0]


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _names_any(options: set[str], words: Sequence[str]) -> bool:
    """Whether one of the options is among the words, in either spelling."""
    return any(word[2:].partition("=")[0].replace("-", "_") in options for word in words if word.startswith("--"))


def _taken_twice(kinds: Sequence[type]) -> dict[str, str]:
    """Fields of the method (the second dataclass) that another dataclass has too: field -> name of its option."""
    others = {field.name for kind in (kinds[0], *kinds[2:]) for field in dataclasses.fields(kind)}
    return {field.name: f"method_{field.name}" for field in dataclasses.fields(kinds[1]) if field.name in others}


class _ErrorsInOneLine(argparse.ArgumentParser):
    """A parser that does not print all options behind a mistake."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where the options are listed. Raises ``SystemExit`` with status 2."""
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help lists what is possible\n")


def _overview() -> argparse.ArgumentParser:
    """The parser of the commands' names, whose help has them in groups; ``parse_command`` parses their options."""
    parser = _ErrorsInOneLine(
        PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] COMMAND ...",
        description="Fewer visual tokens in Hugging Face vision-language models.",
        epilog=_grouped(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=list(COMMANDS), help="one of those below")
    return parser


def _grouped() -> str:
    """Every command with its help and an example, under its group's heading."""
    lines = []
    for group in dict.fromkeys((*GROUPS, *(command.group for command in COMMANDS.values()))):
        own = {name: command for name, command in COMMANDS.items() if command.group == group}
        lines += ["", f"{group or 'further'}:"] if own else []
        for name, command in own.items():
            lines += [f"  {name:<14}{command.help}", f"  {'':<14}  $ {PROGRAM} {command.example or name}"]
    return "\n".join(
        [*lines[1:], "", f"{PROGRAM} COMMAND --help lists a command's options, as --keep-ratio or --keep_ratio."]
    )


def _imported(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def _read_file(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without a leading YAML file, and the file's values."""
    if not words or words[0].startswith("-"):
        return list(words), {}
    if Path(words[0]).suffix not in (".yaml", ".yml"):
        raise ValueError(f"{words[0]!r} is no YAML file: give one that ends in .yaml or .yml first, or options alone")
    path = Path(words[0])
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected option names and values")
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    if len(named) < len(values):
        raise ValueError(f"{path} gives an option in two spellings, with - and with _; leave one out")
    return list(words[1:]), named


def _set_defaults(parser: argparse.ArgumentParser, values: dict[str, Any]) -> None:
    """Make a file's values the defaults of the options, so that options on the command line override them."""
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown option {name!r} in the file" + (f"; did you mean {near[0]!r}?" if near else ""))
    parser.set_defaults(**values)


def _method_name(words: Sequence[str], default: str = _DEFAULT_METHOD) -> str:
    """The name of the method, which is found before parsing because it decides which options exist."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=default)
    return str(parser.parse_known_args(list(words))[0].method)


def _with_leading_options(kind: type, words: Sequence[str], leading: str = "") -> list[str]:
    """``NAME ...`` as ``--first_field NAME ...`` for as many leading words as there are fields without a default; or as
    ``--leading NAME ...``."""
    if leading and words and not words[0].startswith("-"):
        return [f"--{leading}", *words]
    named, left = [], list(words)
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        if not required or not left or left[0].startswith("-"):
            break
        named += [f"--{field.name}", left.pop(0)]
    return named + left


def _parsable(kind: type, renamed: Mapping[str, str] | None = None) -> Any:
    """A copy of a dataclass for the parser: help from the docstring, no checks, and lists for fields that take one
    value or a list. ``renamed`` fields get another option name."""
    hints, help_texts, renamed = get_type_hints(kind), _argument_help(kind), renamed or {}
    fields = []
    for field in dataclasses.fields(kind):
        text = help_texts.get(field.name, "") + (f" (--{field.name} is the run's)" if field.name in renamed else "")
        metadata = {"help": text.replace("%", "%%"), **field.metadata}
        copy = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=metadata)
        fields.append(
            (renamed.get(field.name, field.name), _list_of_union(hints[field.name]) or hints[field.name], copy)
        )
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _built(kind: type, values: Mapping[str, Any], renamed: Mapping[str, str], from_file: Mapping[str, Any]) -> Any:
    """The dataclass from the parsed values. Values from a file bypass the parser, so their types are checked here."""
    hints = get_type_hints(kind)
    names = {field.name: renamed.get(field.name, field.name) for field in dataclasses.fields(kind)}
    chosen = {name: _at_home(values[option]) for name, option in names.items() if option in values}
    for name, value in chosen.items():
        is_list = get_origin(hints[name]) is list
        if isinstance(value, list) and len(value) == 1 and _list_of_union(hints[name]):
            chosen[name] = value[0]
        elif is_list and isinstance(value, (str, int, float)):
            chosen[name] = [value]
        if renamed.get(name, name) in from_file:
            check_type(renamed.get(name, name), chosen[name], hints[name])
    return kind(**chosen)


def _at_home(value: Any) -> Any:
    """Paths with the home folder for ``~``, which is not expanded by a shell after ``=``, or in a file."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _list_of_union(hint: Any) -> Any:
    """``list[int] | None`` for ``int | list[int] | None``, None for everything else."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    members = [member for member in get_args(hint) if member is not type(None)]
    lists = [member for member in members if get_origin(member) is list]
    return lists[0] | None if lists and len(members) > 1 else None


def _argument_help(kind: type) -> dict[str, str]:
    """Field name -> its text in the ``Args`` or ``Attributes`` of the docstrings, including those of base classes."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        block = re.search(r"\n\s*(?:Args|Attributes):\n(.*?)(?:\n\s*\n|\Z)", base.__doc__ or "", re.DOTALL)
        entries = re.split(r"\n(?=\s+[\w, ]+: )", "\n" + block.group(1)) if block else []
        for entry in filter(str.strip, entries):
            names, _, text = entry.partition(":")
            texts |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return texts


if __name__ == "__main__":
    sys.exit(main())
