"""Changes that other libraries (PEFT) make to a tree of modules, found by comparison, so that they can be undone.

This module does not know what the changes mean. Values of tensors are not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


class _Missing:
    """Marks a missing entry. It is used as a class without instances, as copies and pickles of a class are
    identical."""


_MISSING = _Missing
_TABLES = ("_modules", "_parameters", "_buffers")


@dataclass
class TreeState:
    """A tree of modules as it is now.

    Attributes:
        modules: every module, its class, its attributes, and its tables of submodules, parameters and buffers.
        learns: every parameter, and its ``requires_grad``.
    """

    modules: list[tuple[nn.Module, type, dict[str, Any], dict[str, dict[str, Any]]]]
    learns: list[tuple[nn.Parameter, bool]]

    @classmethod
    def of(cls, root: nn.Module) -> TreeState:
        """The state of a module and all its submodules."""
        modules = [
            (module, type(module), dict(vars(module)), {table: dict(vars(module)[table]) for table in _TABLES})
            for module in root.modules()
        ]
        return cls(modules, [(parameter, parameter.requires_grad) for parameter in root.parameters()])


@dataclass
class TreeChange:
    """The changes since a ``TreeState``, in the modules that it holds.

    Attributes:
        entries: (dictionary, key, old value, new value).
        classes: (module, old class, new class).
        learns: (parameter, its ``requires_grad`` before).
    """

    entries: list[tuple[dict[str, Any], str, Any, Any]] = field(default_factory=list)
    classes: list[tuple[nn.Module, type, type]] = field(default_factory=list)
    learns: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    @classmethod
    def since(cls, before: TreeState) -> TreeChange:
        """The difference between a state and now."""
        change = cls()
        for module, kind, attributes, tables in before.modules:
            change._compare(vars(module), attributes)
            for name, table in tables.items():
                change._compare(vars(module)[name], table)
            if type(module) is not kind:
                change.classes.append((module, kind, type(module)))
        change.learns = [(one, learned) for one, learned in before.learns if one.requires_grad != learned]
        return change

    def _compare(self, now: dict[str, Any], old: dict[str, Any]) -> None:
        for name in [*old, *(name for name in now if name not in old)]:
            was, present = old.get(name, _MISSING), now.get(name, _MISSING)
            if was is not present:
                self.entries.append((now, name, was, present))

    def without_attribute(self, name: str) -> TreeChange:
        """The same change without one attribute of the modules, which then stays as it is."""
        return TreeChange([one for one in self.entries if one[1] != name], self.classes, self.learns)

    def replaced_modules(self) -> dict[int, nn.Module]:
        """Modules that were replaced, by the ``id`` of their replacements."""
        return {id(new): old for _, _, old, new in self.entries if isinstance(old, nn.Module)}

    def undo(self) -> None:
        """Undo the changes, except where an entry was changed again since. Doing it twice is harmless."""
        for table, name, was, present in reversed(self.entries):
            _exchange(table, name, present, was)
        for module, kind, changed in self.classes:
            if type(module) is changed:
                module.__class__ = kind
        for parameter, learned in self.learns:
            parameter.requires_grad_(learned)

    def redo(self) -> None:
        """Make the changes again that ``undo`` has undone."""
        for table, name, was, present in self.entries:
            _exchange(table, name, was, present)
        for module, kind, changed in self.classes:
            if type(module) is kind:
                module.__class__ = changed
        for parameter, learned in self.learns:
            parameter.requires_grad_(not learned)


def _exchange(table: dict[str, Any], name: str, expected: Any, value: Any) -> None:
    """Replace the value of a key if it is the expected one."""
    if table.get(name, _MISSING) is not expected:
        return
    if value is _MISSING:
        table.pop(name, None)
    else:
        table[name] = value
