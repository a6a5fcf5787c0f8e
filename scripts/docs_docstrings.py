"""Griffe extension: an entry ``a, b: text`` of a docstring's section becomes one entry per name.

The docstrings of the package describe several arguments in one entry where one sentence serves all. Griffe takes such
an entry for one argument of that name, finds none in the signature, and warns.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHARED = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {5,}.*)*)", flags=re.M)


def split_entries(docstring: str) -> str:
    """The docstring with one entry per name; sections stand indented by four columns, prose at the margin."""
    return _SHARED.sub(
        lambda entry: "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", ")), docstring
    )


class SplitEntries(griffe.Extension):
    """Applies ``split_entries`` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
