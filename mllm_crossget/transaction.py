"""Transactions: the state of a model's acceleration and of its learned tokens is saved, and restored after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_crossget.hooks.apply import apply_method
from mllm_crossget.hooks.ground.module_tree import TreeChange, TreeState
from mllm_crossget.hooks.ground.running_calls import alone
from mllm_crossget.hooks.ground.state import HANDLE, Handle, base_model, handle_of, live_cross_tokens
from mllm_crossget.hooks.ground.vision_cache import VisionCache
from mllm_crossget.hooks.reuse.feature_reuse import use_cache
from mllm_crossget.methods.method import Method


@dataclass
class Before:
    """The saved state of a model.

    Attributes:
        model: the transformers model.
        handle, method, cache: those it was accelerated with; None if it was not.
        changes: number of entries of its journal.
        tokens: its active learned modules, by place.
        places: ``Handle.cross_tokens``.
        values: their parameters, with the values and ``requires_grad`` of these.
        adapter: see ``Handle.adapter``.
    """

    model: nn.Module
    handle: Handle | None
    method: Method | None
    cache: VisionCache | None
    changes: int
    tokens: dict[str, nn.Module]
    places: dict[str, nn.Module]
    values: list[tuple[nn.Parameter, Tensor, bool]]
    adapter: TreeChange | None

    @classmethod
    def of(cls, model: nn.Module) -> Before:
        """Save the state of a model."""
        target, handle = base_model(model), handle_of(model)
        if handle is None:
            return cls(target, None, None, None, 0, {}, {}, [], None)
        tokens = live_cross_tokens(target)
        parameters = [parameter for module in tokens.values() for parameter in module.parameters()]
        values = [(one, one.detach().clone(), one.requires_grad) for one in parameters]
        return cls(
            target,
            handle,
            handle.method,
            handle.vision_cache,
            len(handle.journal),
            tokens,
            dict(handle.cross_tokens),
            values,
            handle.adapter,
        )

    def give_back(self) -> None:
        """Restore the model: settings, learned modules and their values, adapter, cached images.

        An interrupt (Ctrl-C) meanwhile is raised again after that.
        """
        try:
            self._give_back()
        except BaseException:
            self._give_back()  # each of its steps can be repeated
            raise

    def _give_back(self) -> None:
        now = handle_of(self.model)
        if now is not None and now.adapter is not self.adapter:
            take_off_adapter(self.model)
        undone = now is not None and (now.method is not self.method or len(now.journal) < self.changes)
        if now is not self.handle or undone:
            self._accelerate_again(now)
        elif now is not None and now.vision_cache is not self.cache:
            use_cache(self.model, now, False if self.cache is None else self.cache)
        handle = handle_of(self.model)
        if handle is not None:
            handle.adapter, handle.cross_tokens = self.adapter, dict(self.places)
        if self.adapter is not None:
            self.adapter.redo()
        for parameter, value, learns in self.values:
            if parameter.shape == value.shape and not value.is_meta and not torch.equal(parameter.detach(), value):
                with torch.no_grad():
                    parameter.copy_(value)
            parameter.requires_grad_(learns)

    def _accelerate_again(self, now: Handle | None) -> None:
        if now is not None:
            now.journal.rollback()
        if self.handle is None or self.method is None:
            return
        self.handle.journal.rollback()  # an interrupt may have left entries
        apply_method(self.model, self.handle.family, self.handle.geometry, self.method, dict(self.tokens))
        handle: Handle = vars(self.model)[HANDLE]
        if self.cache is not None:
            self.cache.clear()
            use_cache(self.model, handle, self.cache)


@contextmanager
def unchanged_after_error(model: nn.Module) -> Iterator[None]:
    """Restore the model if anything is raised in the ``with`` block, including Ctrl-C."""
    before = Before.of(model)
    try:
        yield
    except BaseException:
        before.give_back()
        raise


@contextmanager
def changing(model: nn.Module, what: str) -> Iterator[Before]:
    """A ``with`` block that changes a model while no other thread is inside it. Yields the state before.

    Any error leaves the model as it was. This includes errors at the end of the block: an interrupt while other threads
    get access again, or a call that another thread has begun meanwhile.

    Args:
        model: the model, with or without wrappers.
        what: name of the change, for the error message.

    Raises:
        RuntimeError: another thread is inside the model, or changes it.
    """
    before: Before | None = None
    given_back = False
    try:
        with alone(base_model(model), what) as others_stayed_out:
            before = Before.of(model)
            try:
                yield before
                others_stayed_out()
            except BaseException:  # restored before other threads get access again
                before.give_back()
                given_back = True
                raise
    except BaseException:
        if before is not None and not given_back:  # an interrupt, above or while others get access again
            before.give_back()
        raise


@contextmanager
def adapter_put_on(model: nn.Module) -> Iterator[None]:
    """Record the changes of a ``with`` block to an accelerated model's tree of modules, as ``Handle.adapter``.

    After an error, including Ctrl-C, they are undone.
    """
    handle: Handle = vars(model)[HANDLE]
    state = TreeState.of(model)
    try:
        yield
        handle.adapter = TreeChange.since(state).without_attribute("training")
    except BaseException:
        try:
            TreeChange.since(state).undo()
        except BaseException:  # a second interrupt
            TreeChange.since(state).undo()
            raise
        raise


def take_off_adapter(model: nn.Module) -> None:
    """Remove the adapter that this library added to an accelerated model, if there is one."""
    handle = handle_of(model)
    if handle is None or handle.adapter is None:
        return
    kept = handle.adapter.replaced_modules()
    handle.adapter.undo()
    handle.cross_tokens = {place: kept.get(id(module), module) for place, module in handle.cross_tokens.items()}
    handle.adapter = None
