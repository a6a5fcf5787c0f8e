"""A record of changes to a model, by which they are undone bit for bit. It does not know what the changes mean."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from mllm_crossget.hooks.ground.arguments import kept_per_class

_MISSING = "<attribute was not there>"

_MADE_OF = "_mllm_crossget_made_of"
_CAPTURING = "_output_capturing_hooks_installed"  # in transformers' models


class _Thread(threading.local):
    """Set in ``__init__``, so that every thread has the attribute itself: the compiler cannot guard a class's."""

    def __init__(self) -> None:
        self.aside: frozenset[nn.Module] | None = None


_THREAD = _Thread()


def set_aside(module: Any) -> bool:
    """True if the changes to a module have no effect in this thread at the moment (``Journal.suspended``)."""
    aside = _THREAD.aside
    return aside is not None and module in aside


class Journal:
    """A list of changes to modules. ``rollback`` takes them back, last one first.

    It holds plain references and no closures, so that ``copy.deepcopy`` of a model copies its journal correctly.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[str, Any, Any, Any]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def set_attribute(self, target: Any, name: str, value: Any) -> None:
        """Set an instance attribute that is not a module or parameter."""
        old = target.__dict__.get(name, _MISSING)
        self._entries.append(("attribute", target, name, old))
        target.__dict__[name] = value

    def add_module(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Register a new submodule."""
        if hasattr(parent, name):
            raise ValueError(f"{type(parent).__name__} already has {name!r}; it cannot be accelerated")
        self._entries.append(("module", parent, name, None))
        parent.add_module(name, module)

    def swap_class(self, module: nn.Module, mixin: type) -> None:
        """Put ``mixin`` in front of the instance's class; the class keeps its name, module and qualified name."""
        original = type(module)
        self._entries.append(("class", module, original, None))
        _set_class(module, mixed_class(original, mixin))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Changed modules compute as before the changes, inside a ``with`` block and in this thread alone.

        No module is changed for it: methods of ``mixed_class`` call the original's method, and our attention functions
        call the model's own.
        """
        outer = _THREAD.aside
        modules = frozenset(target for _, target, _, _ in self._entries if isinstance(target, nn.Module))
        try:
            _THREAD.aside = modules if outer is None else modules | outer
            yield
        finally:
            _THREAD.aside = outer

    def rollback(self) -> None:
        """Undo every change; the journal is empty afterwards.

        An entry is removed once it is undone, and undoing it twice is harmless. After an interrupt (Ctrl-C) another
        call goes on where this one stopped.
        """
        while self._entries:
            _undo(self._entries[-1])
            self._entries.pop()

    def __getstate__(self) -> dict[str, Any]:
        """Classes in a form that can be pickled; see ``mixed_class``."""
        entries = [
            (kind, target, made_of(what) if kind == "class" else what, old) for kind, target, what, old in self._entries
        ]
        return {"_entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._entries = [
            (kind, target, class_of(*what) if kind == "class" else what, old)
            for kind, target, what, old in state["_entries"]
        ]


def _undo(entry: tuple[str, Any, Any, Any]) -> None:
    kind, target, what, old = entry
    if kind == "class":
        _set_class(target, what)
    elif kind == "attribute":
        _write(target, what, old)
    elif what in target._modules:
        delattr(target, what)


def _write(target: Any, name: str, value: Any) -> None:
    if isinstance(value, str) and value == _MISSING:
        target.__dict__.pop(name, None)
    else:
        target.__dict__[name] = value


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class. Its own ``forward`` comes first, so that a repetition after an interrupt is
    complete."""
    _rebind_forward(module, type(module), kind)
    module.__class__ = kind


def _rebind_forward(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """accelerate keeps a bound ``forward`` in the instance, which would hide the class's: point it at the new class."""
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old.forward:
            module.__dict__[name] = new.forward.__get__(module)


@kept_per_class
def mixed_class(original: type, mixin: type) -> type:
    """A subclass (mixin, original) that looks like ``original`` to code that looks classes up by name.

    transformers finds hidden-state hooks, device maps and sharding policies by class name, and reads the signatures of
    ``forward`` and ``generate``. Names and signatures therefore stay those of the original. Building another model with
    the class of an accelerated one (``type(model).from_pretrained``) gives an instance of the original.
    """

    def new(kind: type, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:  # a copy, whose attributes are set afterwards
            return object.__new__(kind)
        return original(*args, **kwargs)

    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__new__": new,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deep_copy,
        "__copy__": _shallow_copy,
        _MADE_OF: (*made_of(original), mixin),
    }
    for kind in _own_classes(mixin):
        for name, replacement in vars(kind).items():
            if inspect.isfunction(replacement) and not name.startswith("__") and hasattr(original, name):
                namespace.setdefault(name, _instead_of(getattr(original, name), replacement, mixin))
    mixed = type(original.__name__, (mixin, original), namespace)
    mixed.__qualname__ = original.__qualname__
    return mixed


def made_of(kind: type) -> tuple[type, ...]:
    """The importable class behind a mixed class, then the mixins that were put in front of it, in order."""
    found: tuple[type, ...] = vars(kind).get(_MADE_OF, (kind,))
    return found


def class_of(original: type, *mixins: type) -> type:
    """The inverse of ``made_of``."""
    return functools.reduce(mixed_class, mixins, original)


def _reduce(module: Any, protocol: Any) -> tuple[Any, ...]:
    """How an instance of a mixed class is pickled; the class itself is in no module and cannot be imported.

    transformers leaves hooks behind where hidden states were asked for, and these cannot be pickled. A twin with the
    same tensors and without the hooks is pickled instead; transformers installs the hooks again when they are missing.
    """
    if any(_captures(hook) for part in module.modules() for hook in part._forward_hooks.values()):
        tensors = [*module.parameters(), *module.buffers()]
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
        for part in twin.modules():
            for key in [key for key, hook in part._forward_hooks.items() if _captures(hook)]:
                del part._forward_hooks[key]
            vars(part).pop(_CAPTURING, None)
        return _itself, (twin,)
    return _empty, made_of(type(module)), module.__getstate__()


def _captures(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _itself(module: Any) -> Any:
    return module


def _empty(*classes: type) -> Any:
    return object.__new__(class_of(*classes))


def _deep_copy(module: Any, memo: dict[int, Any]) -> Any:
    twin = memo[id(module)] = _empty(*made_of(type(module)))
    twin.__setstate__(copy.deepcopy(module.__getstate__(), memo))
    return twin


def _shallow_copy(module: Any) -> Any:
    twin = _empty(*made_of(type(module)))
    twin.__setstate__(module.__getstate__())
    return twin


def _own_classes(mixin: type) -> list[type]:
    """A mixin and the mixins it derives from."""
    return [kind for kind in mixin.__mro__ if kind not in (nn.Module, object)]


def _instead_of(original: Callable[..., Any], replacement: Callable[..., Any], mixin: type) -> Callable[..., Any]:
    """A method with the original's name and signature.

    torch looks ``forward`` up before it runs the hooks in which a call waits for a change of the model by another
    thread. If that change is undone, the method that was looked up is no longer the module's.
    """

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, mixin):
            return getattr(self, replacement.__name__)(*args, **kwargs)
        if set_aside(self):
            return original(self, *args, **kwargs)
        return replacement(self, *args, **kwargs)

    return method
